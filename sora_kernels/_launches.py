"""What an operator launches, said by the operator and recorded from its launchers.

``ops/<op>/launches.py`` lists :class:`Launch` objects for a layer of ``benchmarks/shapes.yaml``.
Their ``run`` calls the operator's own launchers, so that ``audit``, ``tune`` and the benchmarks
meet the plans, configs and specialisations of a real call; on ``meta`` tensors nothing but the
launch itself is looked at.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, NamedTuple

from torch import Tensor


class Launch(NamedTuple):
    """One call of a launcher.

    Attributes:
        label: layer, layout, dtype and variant, unique within an operator.
        kernels: names of the kernels whose configs it looks up.
        key: what a tuned row is matched by: ``{"layout": ..., "channels": ...}``.
        run: makes the call, on tensors made beforehand; returns what the kernels wrote.
    """

    label: str
    kernels: tuple[str, ...]
    key: dict[str, Any]
    run: Callable[[], tuple[Tensor | None, ...]]


class Record(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any  # triton.JITFunction
    grid: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.kwargs)


def operators() -> dict[str, Any]:
    """Operators with Triton kernels: name -> their ``launches`` module (imports Triton)."""
    found = {}
    for folder in sorted(
        (resources.files("sora_kernels") / "ops").iterdir(), key=lambda path: path.name
    ):
        if (folder / "launches.py").is_file():
            found[folder.name] = importlib.import_module(f"sora_kernels.ops.{folder.name}.launches")
    return found


@contextlib.contextmanager
def record(launch: bool = True) -> Iterator[list[Record]]:
    """Collects every Triton launch inside; with ``launch=False`` none of them happens."""
    from triton.runtime.jit import JITFunction

    records: list[Record] = []
    run = JITFunction.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        records.append(Record(self, grid, args, dict(kwargs)))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs) if launch else None

    JITFunction.run = recorded
    try:
        yield records
    finally:
        JITFunction.run = run
