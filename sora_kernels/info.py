"""What this installation is and can do: ``python -m sora_kernels.info [--json]``.

The report to put into an issue. A broken driver or extension becomes a line of it, not a crash.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata, resources
from typing import Any

from sora_kernels import _native
from sora_kernels._native import build_info
from sora_kernels._version import __version__

__all__ = ["build_info", "collect", "main"]

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
)


def _conv3d_bn_act(device: str) -> tuple[Any, ...]:
    import torch

    x, weight = torch.zeros(1, 8, 4, 8, 8, device=device), torch.zeros(8, 8, 3, 3, 3, device=device)
    return (x, weight, *torch.ones(4, 8, device=device))


def _conv3d_act(device: str) -> tuple[Any, ...]:
    return _conv3d_bn_act(device)[:2]


def _recurrent(gates: int, device: str) -> tuple[Any, ...]:
    import torch

    rows = gates * 16
    x = torch.zeros(4, 2, 16, device=device)
    shapes = ((rows, 16), (rows, 16), (rows,), (rows,))
    return x, None, [torch.zeros(shape, device=device) for shape in shapes]


def _pyramid_pool3d(device: str) -> tuple[Any, ...]:
    import torch

    return (torch.empty(2, 8, 4, 8, 8, device=device),)


def _window_attention3d(device: str) -> tuple[Any, ...]:
    import torch

    return torch.empty(1, 4, 8, 8, 96, device=device), 2, (2, 4, 4), (1, 2, 2)


def _neighborhood_attention3d(device: str) -> tuple[Any, ...]:
    import torch

    return (*(torch.empty(1, 4, 8, 8, 2, 16, device=device),) * 3, 3)


# One small call an operator, arguments of its public function.
SAMPLES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "conv3d_act": _conv3d_act,
    "conv3d_bn_act": _conv3d_bn_act,
    "conv_transpose3d_bn_act": _conv3d_bn_act,
    "gru": partial(_recurrent, 3),
    "lstm": partial(_recurrent, 4),
    "neighborhood_attention3d": _neighborhood_attention3d,
    "pyramid_pool3d": _pyramid_pool3d,
    "rnn": partial(_recurrent, 1),
    "window_attention3d": _window_attention3d,
}


def collect() -> dict[str, dict[str, str]]:
    """The report as ``{section: {item: text}}``. Never raises."""
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "extension": _extension,
        "backends": _backends,
        "tuned configs": _tuned,
        "environment": _environment,
    }
    return {name: _guard(section) for name, section in sections.items()}


def _guard(section: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return section()
    except Exception as error:  # the report itself must not fail where something is broken
        return {"failed": f"{type(error).__name__}: {error}"}


def _versions() -> dict[str, str]:
    report = {
        "sora_kernels": f"{__version__} ({_native.PACKAGE})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {platform.machine()}",
    }
    for name in ("torch", "triton", "numpy"):
        try:
            report[name] = str(importlib.import_module(name).__version__)
        except Exception as error:
            report[name] = f"not usable ({type(error).__name__}: {error})"
    try:
        installed = metadata.version("sora_kernels")
    except metadata.PackageNotFoundError:
        report["installed as"] = "not installed: imported from a source tree"
    else:
        if installed != __version__:
            report["installed as"] = f"{installed}: not the version that was imported"
    return report


def _devices() -> dict[str, str]:
    import torch

    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    report = {"cpu": f"{isa}, {threads} threads in torch"}
    if torch.version.cuda is None:
        report["gpu"] = "none: this torch was built without CUDA"
    elif not torch.cuda.is_available():
        report["gpu"] = f"none that torch (CUDA {torch.version.cuda}) can use"
    else:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            served = _said(_native.cuda_status((device.major, device.minor)))
            report[f"cuda:{index}"] = (
                f"{device.name}, sm_{device.major}{device.minor}, {memory}; CUDA part: {served}"
            )
    return report


def _extension() -> dict[str, str]:
    state = _native.status()
    report = {"sora_kernels._C": _said(state)}
    if not state.ok:
        return report
    if stale := _native.stale():
        report["sources"] = stale
    cuda = _native.cuda_status()
    report["CUDA part"] = _said(cuda)
    info = build_info()
    if info["cuda_runtime"] is not None:
        archs = [f"sm_{arch}" for arch in info["cuda_archs"]]
        if info["cuda_ptx"]:
            archs.append(f"PTX {info['cuda_ptx']}")
        report["CUDA build"] = f"nvcc {info['nvcc']}, {', '.join(archs)}, runtime linked statically"
        driver = _native.module().cuda_driver_version()
        report["CUDA driver"] = f"up to CUDA {_native.dotted(driver)}" if driver else "none"
    report["built"] = (
        f"{info['cxx']}, Python {info['python']}, pybind11 {info['pybind11']}, "
        f"SORA_BUILD={info['mode']}, commit {info['commit'] or 'not known'}"
    )
    threads = _native.module().openmp_max_threads()
    report["OpenMP"] = (
        f"{info['openmp']}, {threads} threads" if info["openmp"] else "none: one thread"
    )
    return report


def _backends() -> dict[str, str]:
    """What each operator would run for a small call, on each kind of device that is here."""
    import torch

    import sora_kernels.ops  # noqa: F401  (the operators register themselves)
    from sora_kernels._dispatch import OPERATORS

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    report = {}
    for name, operator in sorted(OPERATORS.items()):
        for device in devices:
            where = f"{name}, {device}"
            if name not in SAMPLES:
                report[where] = ", ".join(operator.backends)
                continue
            lines = _guard(partial(_explained, operator, device))
            report[where] = "\n".join(lines.values())
    return report


def _explained(operator: Any, device: str) -> dict[str, str]:
    arguments = SAMPLES[operator.name](device)
    explanation = operator.explain(operator.facts(*arguments))
    lines = {"chosen": f"{explanation.chosen or 'none'} is chosen"}
    for row in explanation.rows:
        if row.backend != explanation.chosen:
            lines[row.backend] = f"{row.backend}: {row.why or 'can run'}"
    return lines


def _said(state: _native.Status) -> str:
    return f"{state.state}: {state.why}" if state.why else state.state


def _environment() -> dict[str, str]:
    names = [n for n in sorted(os.environ) if n.startswith("SORA_") or n in VARIABLES]
    return {name: os.environ[name] for name in names} or {
        "set": "none of the variables that matter"
    }


def _tuned() -> dict[str, str]:
    report: dict[str, str] = {}
    for operator in sorted(
        (resources.files("sora_kernels") / "ops").iterdir(), key=lambda p: p.name
    ):
        folder = operator / "tuned"
        if folder.is_dir():
            files = sorted(f.name for f in folder.iterdir() if f.name.endswith(".json"))
            rows = {f: json.loads((folder / f).read_text()) for f in files}
            report[operator.name] = ", ".join(
                f"{name.removesuffix('.json')} ({sum(map(len, kernels.values()))} rows)"
                for name, kernels in rows.items()
            )
    return report or {"found": "none"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sora_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    report = collect()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for section, items in report.items():
        print(section)
        width = max(map(len, items), default=0)
        for item, text in items.items():
            first, *rest = text.splitlines() or [""]
            print(f"  {item:<{width}}  {first}")
            for line in rest:
                print(f"  {'':<{width}}  {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
