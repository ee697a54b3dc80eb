"""Which backend runs a call, and why the others do not.

An operator describes a call by a small *facts* object (device, dtype, sizes, flags) and lists its
backends, best first for those facts. ``can_run`` answers with a :class:`Verdict` whose ``why`` is one
sentence with the offending value. A backend that the caller (or ``SORA_BACKEND``) names runs or raises
that sentence; only the automatic choice moves on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import _env


class Verdict(NamedTuple):
    """Whether a backend can run a call; ``why`` says what stands against it."""

    ok: bool
    why: str = ""


YES = Verdict(True)


def no(why: str) -> Verdict:
    return Verdict(False, why)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call."""


@dataclass(frozen=True)
class Backend:
    """One way to run an operator.

    ``impl`` is what the operator's own code calls (a namespace of functions, or one function);
    ``deterministic`` says for which facts the results repeat bit for bit; ``config`` and
    ``floor_bytes`` feed :func:`explain` and may be left out.
    """

    name: str
    can_run: Callable[[Any], Verdict]
    impl: Any
    deterministic: Callable[[Any], bool] = lambda facts: True
    config: Callable[[Any], str] | None = None
    floor_bytes: Callable[[Any], int] | None = None


class Operator:
    """The backends of one operator and the order in which they are tried.

    Args:
        name: the public function's name.
        backends: every backend of the operator.
        prefer: facts -> backend names, fastest first; those left out are never chosen on their own.
        facts: the public function's arguments -> facts, for :func:`explain`.
    """

    def __init__(
        self,
        name: str,
        backends: Iterable[Backend],
        prefer: Callable[[Any], tuple[str, ...]],
        facts: Callable[..., Any],
    ) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.prefer = prefer
        self.facts = facts
        OPERATORS[name] = self

    def check_name(self, backend: str | None) -> str:
        """``backend`` as the registered op takes it (``""`` is the automatic choice)."""
        if backend is None:
            return ""
        if backend not in self.backends:
            raise ValueError(
                f"{self.name}: backend must be one of {', '.join(self.backends)} or None, "
                f"got {backend!r}"
            )
        return backend

    def select(self, requested: str, facts: Any) -> Backend:
        """The backend for this call; raises :class:`BackendError` where the named one cannot run."""
        requested = requested or _env.requested_backend(self.name, self.backends)
        if requested:
            backend = self.backends[requested]
            verdict = backend.can_run(facts)
            if not verdict.ok:
                raise BackendError(f"{self.name}: backend {requested!r} cannot run: {verdict.why}")
            return backend
        deterministic = torch.are_deterministic_algorithms_enabled()
        for name in self.prefer(facts):
            backend = self.backends[name]
            if deterministic and not backend.deterministic(facts):
                continue
            if backend.can_run(facts).ok:
                return backend
        raise BackendError(f"{self.name}: no backend can run {facts}\n{self.explain(facts)}")

    def explain(self, facts: Any) -> Explanation:
        requested = _env.requested_backend(self.name, self.backends)
        preferred = self.prefer(facts)
        deterministic = torch.are_deterministic_algorithms_enabled()
        rows, chosen = [], ""
        for name in (*preferred, *(n for n in self.backends if n not in preferred)):
            backend = self.backends[name]
            verdict = backend.can_run(facts)
            why = verdict.why
            if verdict.ok and deterministic and not backend.deterministic(facts):
                verdict, why = no(why), "not bitwise repeatable, and deterministic mode is on"
            if verdict.ok and requested and name != requested:
                why = f"SORA_BACKEND asks for {requested}"
            elif verdict.ok and not chosen and name in (requested or preferred):
                chosen = name
            elif verdict.ok and not why:
                why = "slower here" if name in preferred else "runs only when named"
            ok = verdict.ok
            rows.append(
                Row(
                    backend=name,
                    usable=ok,
                    why=why,
                    config=backend.config(facts) if ok and backend.config else "",
                    floor_bytes=backend.floor_bytes(facts) if ok and backend.floor_bytes else None,
                )
            )
        return Explanation(self.name, str(facts), chosen, rows)


OPERATORS: dict[str, Operator] = {}


class Row(NamedTuple):
    """One backend in an :class:`Explanation`; ``floor_bytes`` is the least memory traffic."""

    backend: str
    usable: bool
    why: str
    config: str
    floor_bytes: int | None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``print`` it, or read ``chosen`` and ``rows``."""

    operator: str
    facts: str
    chosen: str
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        bandwidth = _bandwidth()
        head = ("", "backend", "usable", "config", "floor", "measured", "why not")
        table = [head]
        for row in self.rows:
            floor = ""
            if row.floor_bytes is not None:
                floor = f"{row.floor_bytes / 1e6:.3g} MB"
                if bandwidth:
                    floor += f", {row.floor_bytes / bandwidth * 1e6:.3g} us"
            mark = "->" if row.backend == self.chosen else ""
            usable = "yes" if row.usable else "no"
            measured = "not measured" if row.usable else ""
            table.append((mark, row.backend, usable, row.config, floor, measured, row.why))
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        return "\n".join([f"{self.operator}: {self.facts}", *(line.rstrip() for line in lines)])


def _bandwidth() -> float | None:
    """Memory bandwidth of the current GPU in bytes/s from its own clocks; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock = getattr(properties, "memory_clock_rate", 0) * 1e3
    width = getattr(properties, "memory_bus_width", 0) / 8
    return 2 * clock * width or None


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Every backend of an operator for one call: usable or why not, config, floor, choice.

    Args:
        op: the public function or its name.
        *args, **kwargs: the call's own arguments. Nothing is run.

    Example:
        >>> print(sora_kernels.explain("lstm", x, None, weights))  # doctest: +SKIP
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    from . import ops as _  # noqa: F401  (the operators register themselves)

    if name not in OPERATORS:
        raise ValueError(f"explain: op must be one of {', '.join(OPERATORS)}, got {name!r}")
    operator = OPERATORS[name]
    return operator.explain(operator.facts(*args, **kwargs))
