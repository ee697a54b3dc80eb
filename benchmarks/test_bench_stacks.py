"""Whole R3D-18, R(2+1)D-18 and X3D-M: stock modules against ``ConvBNAct3d``, the same weights in both."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from . import cases, rivals, shapes, stacks, timers
from .rivals import LAYOUTS

STACKS = sorted(shapes.load("stacks", "cuda"))
# The smoke test's: more than a handful of values a channel in the last stage.
TINY = {"batch": 2, "input": [3, 8, 64, 64]}


def build(
    stack: str,
    mode: str,
    layout: str,
    device: str,
    dtype_name: str,
    tiny: bool,
    providers: list[str],
) -> cases.Case:
    shape = TINY if tiny else shapes.load("stacks", device)[stack]
    width = 0.125 if tiny else 1.0
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    x = torch.randn(shape["batch"], *shape["input"], device=device)
    master = stacks.build(stack, "torch", width=width).to(device)
    stacks.settle(master, x)
    master = master.to(dtype=dtype, memory_format=LAYOUTS[layout]).train(training)
    x = x.to(dtype=dtype, memory_format=LAYOUTS[layout])
    dy = torch.randn(shape["batch"], 400, device=device).to(dtype)

    def module(provider: str) -> nn.Module:
        kind, _, backend = provider.partition(":")
        stock = kind in ("torch", "compile")
        own = stacks.build(
            stack, "torch" if stock else "sora", width=width, backend=backend or None
        )
        own.to(device=device, dtype=dtype, memory_format=LAYOUTS[layout])
        own.load_state_dict(master.state_dict())
        own.train(training)
        return torch.compile(own) if kind == "compile" else own

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (x.to(dtype, copy=True),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), inputs(dtype), grads(dtype))

    others = rivals.Rivals()
    if device == "cpu" and not training:
        freezing = layout == "channels_last" and shape.get("freezing", False)
        others = rivals.of(master, inputs(dtype), layout, freezing=int(freezing))

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = torch.float64
        truth = cases.evaluate(module("torch").double(), inputs(wide), grads(wide))
        plain = cases.evaluate(module("torch"), inputs(dtype), grads(dtype))
        plain["output"] = rivals.least_exact(others, plain["output"], truth["output"])
        return truth, plain

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(provider), inputs(dtype), grads(dtype))
        ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
        return cases.compare(ours, plain, truth, kink=True)

    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module("torch")(*inputs(dtype))
    passes = 3 if training else 1
    weights = sum(p.numel() for p in master.parameters())
    return rivals.Case(
        f"stacks/{stack}/{mode}/{layout}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers} | others.makers(),
        check,
        # Only the clip, the weights and the answer must move: what is between could stay on chip.
        (x.numel() + weights + dy.numel()) * dtype.itemsize * passes,
        counter.get_total_flops() * passes,
        {"op": "stacks", "layer": stack, "mode": mode, "layout": layout, "device": device,
         "dtype": dtype_name, "shape": shape},
        layout=layout,
        rivals=tuple(others.calls),
        saved=(lambda name: rivals.saved_bytes(module(name), inputs(dtype))) if training else None,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("stack", STACKS)
def test_stacks(measured, benchmark, provider, stack, mode, layout, device, dtype, tiny):
    measured(build, provider, stack, mode, layout, device, dtype, tiny)
    rivals.complete(benchmark, provider)
