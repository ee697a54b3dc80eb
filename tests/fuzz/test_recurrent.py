"""Random calls of the recurrent modules and functions: outputs, states and every gradient by the 2x rule.

The test command runs 200 configurations, ``make fuzz`` 2,000. A number is a configuration for ever::

    SORA_FUZZ=1234:1234 pytest tests/fuzz

``SORA_FUZZ=FIRST:LAST`` says which run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import sora_kernels as sk
from sora_kernels.testing import assert_within_2x, poisoned

from .configuration import Configuration, Inputs, against_torch, beyond_torch

FIRST, LAST = map(int, os.environ.get("SORA_FUZZ", "0:199").split(":"))
# A call, given x and states, and what its weights are called.
Side = tuple[Callable[[Tensor, Any], Any], dict[str, Tensor]]

pytestmark = pytest.mark.native


def by_torch(inputs: Inputs, dtype: torch.dtype) -> Side:
    """Torch's own module; rows of different lengths are packed for it."""
    c = inputs.c
    module = copy.deepcopy(inputs.stock).to(dtype)

    def call(x: Tensor, hx: Any) -> Any:
        if c.lengths is None:
            return module(x, hx)
        y, hidden = module(packed(c, x), hx)
        if c.form != "lengths":
            return y, hidden
        return pad_packed_sequence(y, c.batch_first, total_length=c.T)[0], hidden

    return call, dict(module.named_parameters())


def by_us(inputs: Inputs, dtype: torch.dtype, backend: str | None) -> Side:
    c = inputs.c
    options: dict[str, Any] = {"lengths": inputs.lengths, "reset": inputs.reset}
    if c.cell == "lstm":
        options["return_cells"] = c.cells
    if c.form not in ("dense", "lengths"):
        options = {}
    module: Any = inputs.ours(dtype, backend)
    weights = dict(module.named_parameters())

    def call(x: Tensor, hx: Any) -> Any:
        if c.module:
            return module(packed(c, x) if c.form.startswith("packed") else x, hx, **options)
        function = getattr(sk, c.cell)
        return function(
            x, hx, list(weights.values()), **c.shape, **options, memory=c.memory, backend=backend
        )

    return call, weights


def packed(c: Configuration, x: Tensor) -> PackedSequence:
    assert c.lengths is not None
    lengths = torch.tensor(c.lengths)
    return pack_padded_sequence(x, lengths, c.batch_first, enforce_sorted=c.form == "packed")


def run(inputs: Inputs, side: Side, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    c, (call, weights) = inputs.c, side
    leaves = {"x": inputs.x.to(dtype).detach()}
    leaves |= {f"state{k}": t.to(dtype).detach() for k, t in enumerate(inputs.states)}
    for name, t in leaves.items():
        t.requires_grad_(c.grad and (c.x_grad if name == "x" else c.states.endswith("learned")))
    for k, t in enumerate(weights.values()):
        t.requires_grad_(
            c.grad and k not in {f % len(weights) for f in c.frozen[: len(weights) - 1]}
        )
    states = tuple(t for name, t in leaves.items() if name != "x")
    hx = states if len(states) > 1 else states[0] if states else None
    with torch.set_grad_enabled(c.grad):
        found = flat(call(leaves["x"], hx))
    outputs = dict(zip(("y", "h_n", "c_n", "cells"), found, strict=False))
    if not c.grad:
        return outputs
    wanted = {name: t for name, t in (leaves | weights).items() if t.requires_grad}
    used = sorted({k % len(found) for k in c.used})
    generator = torch.Generator().manual_seed(c.number)
    grads = [torch.randn(t.shape, generator=generator).to(c.dtype).to(dtype) for t in found]
    gradients = torch.autograd.grad(
        [found[k] for k in used], list(wanted.values()), [grads[k] for k in used], allow_unused=True
    )
    for (name, t), g in zip(wanted.items(), gradients, strict=True):
        outputs[f"d{name}"] = torch.zeros_like(t) if g is None else g
    return {name: t.detach() for name, t in outputs.items()}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in flat(part)]


class NearestKink(TorchDispatchMode):
    """The smallest absolute value that any relu was given, by torch's modules or by the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.value = float("inf")

    def __enter__(self):
        # Inside a registered op the mode sees nothing, but the reference is Python.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Tensor, "relu", lambda t: self.see(t) or torch.relu(t))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def see(self, t: Tensor) -> None:
        if t.numel():
            self.value = min(self.value, t.detach().abs().min().item())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::relu", "aten::relu_", "aten::clamp_min"):
            self.see(args[0])
        return func(*args, **(kwargs or {}))


FEW = 16  # numbers that by themselves say nothing: plain torch's errors may all happen to be none


def compare(
    c: Configuration, ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor],
    nearest: float = float("inf"),
) -> None:  # fmt: skip
    """Each result by the 2x rule, and all side by side, each in units of its largest value.

    ``nearest``: to relu's kink. Where rounding may cross it, gradients are of another function.
    """
    assert list(ours) == list(plain) == list(truth)
    names = list(truth)
    if not smooth(c, ours, plain, truth, nearest):
        names = [name for name in names if not name.startswith("d")]
    sides = (ours, plain, truth)
    try:
        for name in names:
            # However many results there are, those of few states stand on few roundings.
            if min(truth[name].numel(), c.T * c.B * c.H) >= FEW:
                assert_within_2x(*(side[name] for side in sides), name=name, storage=c.dtype)
        units = {
            name: truth[name].abs().max().item() or 1.0 for name in names if truth[name].numel()
        }
        whole = [
            torch.cat(
                [side[name].double().flatten() / units[name] for name in units] or [torch.empty(0)]
            )
            for side in sides
        ]
        assert_within_2x(*whole, name="all results", storage=c.dtype)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{c}") from None


def smooth(
    c: Configuration, ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor],
    nearest: float,
) -> bool:  # fmt: skip
    """Whether all three are surely on the same side of every kink."""
    if c.kind != "rnn_relu":
        return True
    if c.layers == 1:
        return all(torch.equal(side["y"] > 0, truth["y"] > 0) for side in (ours, plain))
    return nearest > 64 * torch.finfo(c.dtype).eps


@pytest.mark.parametrize("number", range(FIRST, LAST + 1))
def test_against_torch(number):
    check(against_torch(number), by_torch)


@pytest.mark.parametrize("number", range(FIRST, FIRST + (LAST - FIRST) // 4 + 1))
def test_against_the_definition(number):
    check(beyond_torch(number), functools.partial(by_us, backend="reference"))


def check(c: Configuration, other: Callable[[Inputs, torch.dtype], Side]) -> None:
    inputs = Inputs(c)
    kink = NearestKink()
    with kink if c.kind == "rnn_relu" else contextlib.nullcontext():
        truth = run(inputs, other(inputs, torch.float64), torch.float64)
    # Every one of them was seen: torch still calls the op that is looked for.
    assert c.kind != "rnn_relu" or kink.value < float("inf") or not truth["y"].numel()
    plain = run(inputs, other(inputs, c.dtype), c.dtype)
    with poisoned():
        ours = run(inputs, by_us(inputs, c.dtype, c.backend), c.dtype)
    compare(c, ours, plain, truth, kink.value)
