"""Options, machine description, and the fixture through which every row is measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import cases, compare, machine, timers

_MEASURED: dict[str, timers.Measurement] = {}
_VOID: list[str] = []
_BUILT: dict[Any, cases.Case] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sora_kernels benchmarks")
    group.addoption(
        "--providers",
        default="torch,sora",
        help="comma-separated: torch (the baseline, always measured), sora, sora:BACKEND, compile",
    )
    group.addoption(
        "--threads", type=int, default=1, help="CPU threads; rows of more than one are not gated"
    )
    group.addoption(
        "--rounds", type=int, default=timers.ROUNDS, help="interleaved rounds (default %(default)s)"
    )
    group.addoption("--device", choices=("cpu", "cuda"), help="rows of this device only")
    group.addoption(
        "--sample", type=int, metavar="N", help="N cases of each benchmark, evenly spaced, no more"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest-benchmark is not installed: pip install pytest-benchmark")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if interpreted and not config.getoption("benchmark_disable"):
        raise pytest.UsageError(
            "TRITON_INTERPRET=1 is set: interpreted kernels are not worth timing. Unset it, or "
            "run the smoke test: --benchmark-disable"
        )
    if config.getoption("threads") < 1 or config.getoption("rounds") < 2:
        raise pytest.UsageError("--threads must be at least 1 and --rounds at least 2")
    _providers(config)
    if config.getoption("benchmark_storage") == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://.benchmarks/{machine.slug()}"
    torch.set_num_threads(config.getoption("threads"))


@pytest.hookimpl(trylast=True)  # the provider varies fastest: its rows share a measurement
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        asked = metafunc.config.getoption("device")
        no_gpu = pytest.mark.skipif(
            not torch.cuda.is_available(), reason="not measured: no CUDA GPU"
        )
        rows = [
            pytest.param(device, dtype, id=f"{device}-{dtype}", marks=no_gpu if gpu else ())
            for device, dtype, gpu in (
                ("cpu", "fp32", False),
                ("cuda", "bf16", True),
                ("cuda", "fp32", True),
            )
            if asked in (None, device)
        ]
        metafunc.parametrize(("device", "dtype"), rows)
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", _providers(metafunc.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (wanted := config.getoption("sample")) is None:
        return
    cases_of: dict[Any, dict[str, list[pytest.Item]]] = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        parameters = {} if callspec is None else dict(callspec.params)
        parameters.pop("provider", None)
        cases_of.setdefault((item.path, item.originalname), {}).setdefault(
            str(parameters), []
        ).append(item)
    kept: list[pytest.Item] = []
    for found in cases_of.values():
        of_cases = list(found.values())
        step = max(1.0, len(of_cases) / wanted)
        kept += [
            item
            for n in range(min(wanted, len(of_cases)))
            for item in of_cases[int((n + 0.5) * step)]
        ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _providers(config: pytest.Config) -> list[str]:
    """Those asked for, the baseline first."""
    names = [name.strip() for name in config.getoption("providers").split(",")]
    for name in names:
        if name.partition(":")[0] not in ("torch", "sora", "compile"):
            raise pytest.UsageError(
                f"--providers: expected torch, sora, sora:BACKEND or compile, got {name!r}"
            )
    return list(dict.fromkeys(["torch", *names]))


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config) -> bool:
    """The smoke test: every row once, small, checked and not timed."""
    return bool(pytestconfig.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def providers(pytestconfig: pytest.Config) -> list[str]:
    return _providers(pytestconfig)


@pytest.fixture
def measured(benchmark: Any, pytestconfig: pytest.Config, providers: list[str]) -> Any:
    """``measured(build, provider, *key)``: checks, times (all providers of a case together),
    reports.

    ``build(*key, providers)`` makes the case; it is kept for the case's next provider.
    """

    def run(build: Callable[..., cases.Case], provider: str, *key: Any) -> None:
        if (build, key) not in _BUILT:
            _BUILT.clear()
            _BUILT[build, key] = build(*key, providers)
        case = _BUILT[build, key]
        # Not in the check: in fp64 cuDNN's search would take longer than the row.
        torch.backends.cudnn.benchmark = False
        errors = case.check(provider)
        torch.backends.cudnn.benchmark = (
            True  # the baseline's strongest flags; TF32 as torch sets it
        )
        benchmark.group = case.group
        if not benchmark.enabled:
            benchmark(case.makers[provider]())
            return
        if (peak := cases.peak_bytes(case, provider)) is not None:
            benchmark.extra_info["peak_bytes"] = peak
        if case.group not in _MEASURED:
            _MEASURED[case.group] = cases.measure(case, pytestconfig.getoption("rounds"))
        found = _MEASURED[case.group]
        benchmark.extra_info.update(cases.row(case, provider, found))
        benchmark.extra_info["errors"] = errors
        benchmark.extra_info["within_2x"] = case.within_2x
        timers.inject(benchmark, found.samples[provider], found.calls[provider])
        if found.void and provider == case.baseline:
            _VOID.append(f"{case.group}: {found.void}")

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        machine.hardware(),
        threads=config.getoption("threads"),
        slug=machine.slug(),
        versions=machine.versions(),
        # pytest-benchmark's own table prints these.
        python_version=machine.versions()["python"],
        cpu_count=cpu.get("count"),
    )


def pytest_benchmark_update_json(output_json: dict) -> None:
    """Samples to five digits, and nothing that is the same in every row: results are committed."""
    for row in output_json["benchmarks"]:
        row.pop("options", None)
        row["stats"]["data"] = [float(f"{t:.5g}") for t in row["stats"].get("data", [])]


def pytest_benchmark_compare_machine_info(machine_info: dict, compared_benchmark: dict) -> None:
    if found := compare.differences(compared_benchmark["machine_info"], machine_info):
        raise pytest.UsageError("the saved run is another machine's: " + "; ".join(found))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _VOID:
        terminalreporter.section("void rows: no speed-up is claimed for them")
        for line in _VOID:
            terminalreporter.write_line(line)
