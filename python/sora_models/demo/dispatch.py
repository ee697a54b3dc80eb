"""Which backend each operator of ``sora_kernels`` took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode


class _Dispatched(TorchDispatchMode):
    """Changes nothing; but while a mode is on, no call takes a short way past the choice."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def operators_used(run: Callable[[], object]) -> dict[str, list[str]]:
    """Runs, and tells for each operator called the backends it took, in order, each once.

    A backend that could not run is named with its reason after the one that did:
    ``"torch (native: no extension was built)"``.
    """
    from sora_kernels._dispatch import Backend, Operator

    taken: dict[str, list[str]] = {}
    select = Operator.select

    def recorded(self: Operator, requested: str, facts: Any) -> Backend:
        backend = select(self, requested, facts)
        refused = [
            f"{row.backend}: {row.why}" for row in self.explain(facts).rows if not row.usable
        ]
        line = backend.name + (f" ({'; '.join(refused)})" if refused else "")
        lines = taken.setdefault(self.name, [])
        if line not in lines:
            lines.append(line)
        return backend

    with mock.patch.object(Operator, "select", recorded), _Dispatched():
        run()
    return taken
