"""Session set-up: Triton's interpreter, missing parts on request, skips that say why.

``TRITON_INTERPRET`` fixes a whole process, so it is set here, before Triton loads; ``-m gpu`` runs without it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

_TESTS = Path(__file__).parent
_BENCHMARKS = _TESTS.parent / "benchmarks"
# Folders whose tests share costly set-ups.
_TOGETHER = ("packaging", "audit", "benchmarks")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sora_kernels")
    group.addoption("--require-gpu", action="store_true", help="fail where a GPU test would skip")
    group.addoption(
        "--require-native",
        action="store_true",
        help="fail where a test of the extension would skip",
    )
    group.addoption(
        "--without",
        default="",
        metavar="PARTS",
        help="hide parts from this run: triton, native or both, comma-separated",
    )


def pytest_configure(config: pytest.Config) -> None:
    hidden = set(filter(None, config.getoption("--without").split(",")))
    modules = {"triton": "triton", "native": "sora_kernels._C"}
    if hidden - set(modules):
        raise pytest.UsageError(f"--without: expected triton, native, got {sorted(hidden)}")
    for part in hidden:
        sys.modules[modules[part]] = None  # type: ignore[assignment]
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" not in hidden:
            _mend_interpreter()
    _find_benchmarks()
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // workers))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs a file, or a folder of ``_TOGETHER``, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = Path(file).parent.name
            return folder if folder in _TOGETHER else file

    config.option.loadscopereorder = False
    return Together(config, log)


def _find_benchmarks() -> None:
    """Makes ``benchmarks/`` importable under its name, and nothing else of the source tree."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", _BENCHMARKS / "__init__.py", submodule_search_locations=[str(_BENCHMARKS)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter reads a loop's bound with ``int(array of one)``, which numpy 2.5 refuses. And a third of
    the time: no check of each integer operation for overflow (fixture ``checked_overflow`` brings it back), Triton's
    names patched once a launch, not once a helper's call.
    """
    try:
        import numpy
        from triton.runtime import interpreter
    except ImportError:
        return
    try:
        int(numpy.zeros(1))
    except TypeError:
        set_attr = interpreter._LangPatchScope.set_attr

        def mended(self, obj, name, value):
            by_item = name == "__index__"
            set_attr(self, obj, name, (lambda t: t.handle.data.item()) if by_item else value)

        interpreter._LangPatchScope.set_attr = mended

    builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    call = function.__call__

    def quick(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("sora_kernels.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    function.__call__ = quick


@pytest.fixture
def checked_overflow(monkeypatch) -> None:
    """Every integer operation of an interpreted kernel is checked for overflow."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", exc_type=ImportError)
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=True)
    monkeypatch.setattr(builder, "options", options)


def _parts() -> dict[str, str]:
    """marker -> why its tests cannot run here, '' where they can."""
    import torch

    from sora_kernels import _native

    native, cuda = _native.status(), torch.cuda.is_available()
    interpreter = importlib.util.find_spec("triton") is not None
    return {
        "native": "" if native.state == "ok" else native.why,
        "triton": "" if interpreter else "Triton is not installed",
        "gpu": "" if cuda else "torch sees no CUDA device",
    }


def pytest_report_header(config: pytest.Config) -> str:
    found = ", ".join(f"{part}: {why or 'yes'}" for part, why in _parts().items())
    return f"sora_kernels parts: {found}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    parts = _parts()
    if config.getoption("markexpr") != "gpu":
        parts["gpu"] = "run with -m gpu"
    items.sort(key=_place)
    required = {p for p in ("gpu", "native") if config.getoption(f"--require-{p}")}
    for item in items:
        for part, why in parts.items():
            if why and item.get_closest_marker(part):
                if part in required:
                    item.add_marker(pytest.mark.usefixtures("fail_missing_part"))
                else:
                    item.add_marker(pytest.mark.skip(reason=why))


def _place(item: pytest.Item) -> int:
    """What takes longest comes first: begun last, it would run while the other worker waits."""
    folder, *_ = item.path.relative_to(_TESTS).parts
    if folder in _TOGETHER:
        return _TOGETHER.index(folder)
    return len(_TOGETHER) + ("_kernels" not in item.path.stem)


@pytest.fixture
def fail_missing_part() -> None:
    missing = {part: why for part, why in _parts().items() if why}
    pytest.fail(f"required, and missing here: {missing}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
