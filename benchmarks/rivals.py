"""What a row says beyond the harness's one baseline: evaluation on the CPU against the strongest of several builds of
stock PyTorch, training with the bytes that it keeps for the backward pass."""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sora_kernels.testing import assert_within_2x

from . import cases, timers

LAYOUTS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
FREEZING = "freezing"


@dataclass
class Case(cases.Case):
    """
    Attributes:
        layout: of :data:`LAYOUTS`: what the baseline runs in, and its name among the rivals.
        rivals: further builds of the baseline, timed in the same rounds; they are no rows of their own.
        saved: provider -> :func:`saved_bytes` of it; None where nothing is trained.
        gate: rival, or ``layout`` -> the least speed-up of ours over it.
    """

    layout: str = ""
    rivals: tuple[str, ...] = ()
    saved: Callable[[str], int] | None = None
    gate: dict[str, float] = field(default_factory=dict)


@dataclass
class Rivals:
    """Calls by name, and why one is missing."""

    calls: dict[str, timers.Call] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def makers(self) -> dict[str, Callable[[], timers.Call]]:
        """For a case, beside its providers'."""
        return {name: (lambda call=call: call) for name, call in self.calls.items()}

    def info(self) -> dict[str, Any]:
        return {"not_measured": self.missing} if self.missing else {}

    def evaluate(self) -> dict[str, dict[str, Tensor]]:
        """Name -> output, to be checked like a provider's."""
        return {
            name: {"output": cases.outputs(call())[0].contiguous()}
            for name, call in self.calls.items()
        }


def of(stock: nn.Module, inputs: tuple[Tensor, ...], layout: str, freezing: int) -> Rivals:
    """Eager in the other layout, and compiled and frozen in channels-last: the fastest of fresh
    instances, as the baseline is.

    Args:
        stock: the baseline's module, in evaluation mode on the CPU.
        freezing: how many frozen instances; each is compiled anew. 0: no such rival.
    """
    timer, found = timers.wall(), Rivals()

    def instance(layout: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
        form = LAYOUTS[layout]
        own = copy.deepcopy(stock).to(memory_format=form)
        return own, tuple(t.to(memory_format=form, copy=True) for t in inputs)

    def eager(layout: str) -> timers.Call:
        return cases.module_call(*instance(layout), None)

    def frozen() -> timers.Call:
        own, arguments = instance("channels_last")
        return cases.module_call(freeze(own, arguments), arguments, None)

    for other in LAYOUTS:
        if other != layout:
            found.calls[other] = timers.fastest(lambda other=other: eager(other), timer)
    if freezing:
        try:
            found.calls[FREEZING] = timers.fastest(frozen, timer, freezing)
        except (RuntimeError, OSError) as error:  # no C++ compiler, say
            found.missing[FREEZING] = str(error).strip().splitlines()[0]
    return found


def built(
    names: Iterable[str],
    make: Callable[[str], timers.Call],
    check: Callable[[str], Any],
    device: str,
) -> tuple[dict[str, Callable[[], timers.Call]], dict[str, str]]:
    """Makers, for a case, of the rivals that can be built and are right, and why another is missing.

    Args:
        make: name -> a fresh instance; on a CPU the fastest of three is taken.
        check: as a case's. A rival that breaks the rule is no fault of the row.
    """
    makers: dict[str, Callable[[], timers.Call]] = {}
    missing: dict[str, str] = {}
    for name in names:
        fresh = functools.partial(make, name)
        try:
            check(name)
            if device == "cpu":
                fastest = timers.fastest(fresh, timers.wall(), 3)
                fresh = functools.partial(lambda call: call, fastest)
            makers[name] = fresh
        except (RuntimeError, OSError, AssertionError) as error:  # no C++ compiler, say
            missing[name] = str(error).strip().splitlines()[0][:200]
    return makers, missing


def forget_compiled() -> None:
    """Before a case: torch.compile gives up on a function that has met eight shapes, and runs it eagerly."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def least_exact(others: Rivals, plain: Tensor, truth: Tensor) -> Tensor:
    """Of a whole network's stock outputs the one furthest from ``truth``, by RMS.

    Frozen graphs and ours take oneDNN's channels-last convolution, eager small maps another: rounding
    differs by up to twice, and through forty layers no rule could tell that from a fault of ours.
    Each must be within twice of plain eager.
    """
    worst, most = plain, (plain - truth).square().mean()
    for name, found in others.evaluate().items():
        output = found["output"]
        assert_within_2x(output, plain, truth, name=name, kink=True)
        if (error := (output - truth).square().mean()) > most:
            worst, most = output, error
    return worst


def freeze(module: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """``torch.compile`` with its parameters as constants, compiled for ``inputs``.

    Modules of one class share their compiled code, which does not ask whether it was frozen: this
    one gets a class, and code, of its own.

    Raises:
        RuntimeError: the graph was compiled but not frozen.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config

    kind = type(module)
    forward = kind.forward
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    module.__class__ = type(kind.__name__, (kind,), {"forward": own})
    compiled = torch.compile(module)
    folded = counters["inductor"]["binary_folding"]
    with config.patch(freezing=True), torch.no_grad():
        compiled(*inputs)
    if counters["inductor"]["binary_folding"] == folded:
        raise RuntimeError("torch.compile left BatchNorm out of the weights: it did not freeze")
    return compiled


def saved_bytes(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """What one forward pass keeps for the backward pass: each storage once, the model's own not."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # Holding them keeps an address from coming twice.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


def speedups(found: timers.Measurement, provider: str, case: Case) -> dict[str, Any]:
    """Over each rival and the baseline by the name of its layout, and over the best of them."""
    if found.void:
        return {"speedup_over": None, "speedup_over_best": None}
    own = found.samples[provider]
    over = {}
    for name in (found.baseline, *case.rivals):
        pairs = zip(found.samples[name], own, strict=True)
        shown = case.layout if name == found.baseline else name
        over[shown] = round(statistics.median(theirs / ours for theirs, ours in pairs), 4)
    return {"speedup_over": over, "speedup_over_best": min(over.values())}


def complete(benchmark: Any, provider: str) -> None:
    """Adds to the row that the fixture ``measured`` has just made."""
    from . import conftest

    (case,) = conftest._BUILT.values()
    if not isinstance(case, Case):
        raise TypeError(f"case: expected rivals.Case, got {type(case).__name__}")
    if case.saved is not None:
        benchmark.extra_info["saved_bytes"] = case.saved(provider)
    if (case.rivals or case.gate) and case.group in conftest._MEASURED:
        found = speedups(conftest._MEASURED[case.group], provider, case)
        benchmark.extra_info.update(found)
        if case.gate and provider.partition(":")[0] == "sora":
            benchmark.extra_info.update(
                gate=case.gate, gate_met=met(case.gate, found["speedup_over"])
            )


def met(gate: dict[str, float], over: dict[str, float] | None) -> bool | None:
    """None where the row is void or a rival is missing that might decide it."""
    if over is None:
        return None
    if any(over.get(name, least) < least for name, least in gate.items()):
        return False
    return True if gate.keys() <= over.keys() else None
