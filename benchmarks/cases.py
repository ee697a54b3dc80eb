"""A benchmark row: what is compared, on what, and how it is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sora_kernels.testing import assert_within_2x

from . import roofline, timers

Check = Callable[[], dict[str, dict[str, float]]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """One comparison; every provider of it is a row of its own.

    Attributes:
        group: names the comparison: operator, shape, mode, dtype, layout.
        makers: provider -> maker of a fresh instance: modules and inputs of its own, returned as
            the call that is timed. ``"torch"`` is the baseline.
        check: provider -> the 2x rule against plain torch and fp64; raises where it is broken.
        bytes, flops: least traffic and arithmetic of one call.
        info: whatever else belongs into the row.
        within_2x: whether ``check`` holds the 2x rule; int8 weights have a bound of their own.
    """

    group: str
    device: str
    dtype: torch.dtype
    makers: dict[str, Callable[[], timers.Call]]
    check: Callable[[str], dict[str, dict[str, float]]]
    bytes: int
    flops: int
    info: dict[str, Any] = field(default_factory=dict)
    within_2x: bool = True

    baseline = "torch"


def measure(case: Case, rounds: int) -> timers.Measurement:
    """Times every provider of a case, interleaved, by the rule of its device."""
    if case.device == "cpu":
        timer = timers.wall()
        calls = {
            name: timers.fastest(make, timer) if name == case.baseline else make()
            for name, make in case.makers.items()
        }
        threads = torch.get_num_threads()
        return timers.measure(
            calls, case.baseline, timer=timer, rounds=rounds, method=f"wall clock, {threads} thread"
        )
    return _measure_cuda(case, rounds)


def _measure_cuda(case: Case, rounds: int) -> timers.Measurement:
    events = timers.Events()
    calls = {name: make() for name, make in case.makers.items()}
    for call in calls.values():
        for _ in range(3):  # cuDNN's search, Triton's compilation, allocator
            call()
    once = dict.fromkeys(calls, 1)
    first = timers.measure(
        calls, case.baseline, timer=events, rounds=5, attempts=1, calls=once, method=events.method
    )
    if min(min(samples) for samples in first.samples.values()) >= timers.GRAPH_BELOW:
        return timers.measure(
            calls, case.baseline, timer=events, rounds=rounds, calls=once, method=events.method
        )
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    copies = max(2, min(16, -(-2 * l2 // max(case.bytes, 1))))
    try:
        graphs = {
            name: timers.Graph([make() for _ in range(copies)])
            for name, make in case.makers.items()
        }
    except RuntimeError as error:
        torch.cuda.synchronize()
        method = f"{events.method}; no CUDA graph: {str(error).splitlines()[0]}"
        return timers.measure(
            calls, case.baseline, timer=events, rounds=rounds, calls=once, method=method
        )
    return timers.measure(
        graphs, case.baseline, timer=timers.replay, rounds=rounds, calls=once,
        method=timers.Graph.method,
    )  # fmt: skip


def row(case: Case, provider: str, found: timers.Measurement) -> dict[str, Any]:
    """What a row says beside its times."""
    samples = sorted(found.samples[provider])
    seconds = samples[len(samples) // 2]
    share = roofline.share(case.device, case.dtype, case.bytes, case.flops, seconds)
    return {
        **case.info,
        "provider": provider,
        "baseline": found.baseline,
        "speedup": None if found.void else round(found.speedup(provider), 4),
        "aa_noise": round(found.noise, 4),
        "void": found.void,
        "attempts": found.attempts,
        "method": found.method,
        "gated": case.device == "cuda" or torch.get_num_threads() == 1,
        "bytes": case.bytes,
        "flops": case.flops,
        "gb_per_s": round(case.bytes / seconds / 1e9, 2),
        "tflop_per_s": round(case.flops / seconds / 1e12, 4),
        "roofline_share": round(share, 3),
    }


def module_call(
    model: nn.Module, inputs: tuple[Any, ...], grads: tuple[Tensor, ...] | None
) -> timers.Call:
    """Inference, or with ``grads`` (of the outputs) a forward and backward pass."""
    if grads is None:

        def infer() -> Any:
            with torch.no_grad():
                return model(*inputs)

        return infer
    wanted = [p for p in model.parameters() if p.requires_grad]
    wanted += [t for t in map(_data, inputs) if t is not None and t.requires_grad]

    def train() -> Any:
        return torch.autograd.grad(outputs(model(*inputs)), wanted, grads)

    return train


def backward_call(
    model: nn.Module, inputs: tuple[Any, ...], grads: tuple[Tensor, ...]
) -> timers.Call:
    """The backward pass alone, again and again over one forward pass."""
    from torch._functorch import config

    wanted = [p for p in model.parameters() if p.requires_grad]
    wanted += [t for t in map(_data, inputs) if t is not None and t.requires_grad]
    with config.patch(donated_buffer=False):  # torch.compile's would not survive the first pass
        out = outputs(model(*inputs))

    def run() -> Any:
        return torch.autograd.grad(out, wanted, grads, retain_graph=True)

    return run


def outputs(result: Any) -> list[Tensor]:
    """The first tensor of a result: what is differentiated and compared."""
    while not isinstance(result, Tensor):
        result = result[0]
    return [result]


def _data(value: Any) -> Tensor | None:
    """What of an input can be differentiated: a tensor, or a PackedSequence's rows."""
    value = value.data if isinstance(value, PackedSequence) else value
    return value if isinstance(value, Tensor) else None


def peak_bytes(case: Case, provider: str) -> int | None:
    """GPU memory that one call holds at most, beyond its module and inputs; ``None`` on a CPU."""
    if case.device != "cuda":
        return None
    call = case.makers[provider]()
    call()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def evaluate(
    model: nn.Module, inputs: tuple[Any, ...], grads: tuple[Tensor, ...] | None
) -> dict[str, Tensor]:
    """Output and, with ``grads``, every gradient by name."""
    if grads is None:
        with torch.no_grad():
            return {"output": outputs(model(*inputs))[0]}
    names = {f"d{name}": p for name, p in model.named_parameters() if p.requires_grad}
    for number, t in enumerate(map(_data, inputs)):
        if t is not None and t.requires_grad:
            names[f"dinput{number}"] = t
    out = outputs(model(*inputs))
    found = torch.autograd.grad(out, list(names.values()), grads, allow_unused=True)
    pairs = zip(names, found, strict=True)
    return {"output": out[0].detach(), **{name: g for name, g in pairs if g is not None}}


def compare(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], kink: bool
) -> dict[str, dict[str, float]]:
    """The 2x rule, tensor by tensor. ``kink``: gradients behind a ReLU are compared by RMS."""
    return {
        name: assert_within_2x(
            ours[name], plain[name], truth[name], name=name, kink=kink and name != "output",
            storage=ours["output"].dtype,
        )
        for name in truth
    }  # fmt: skip
