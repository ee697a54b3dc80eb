"""``nn.LSTM`` against ``sora_kernels.nn.LSTM``."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import sora_kernels as sk

from . import cases, shapes, timers

LAYERS = sorted(shapes.load("lstm", "cuda"))


def build(
    layer: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = shapes.load("lstm", device, tiny).get(layer)
    if shape is None:
        pytest.skip("a GPU row")
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    size = {
        "num_layers": shape.get("layers", 1),
        "bidirectional": shape.get("bidirectional", False),
    }
    stock = nn.LSTM(shape["input"], shape["hidden"], **size).to(device, dtype).train(training)
    x = torch.randn(shape["time"], shape["batch"], shape["input"], device=device).to(dtype)
    directions = 1 + size["bidirectional"]
    dy = torch.randn(*x.shape[:2], directions * shape["hidden"], device=device).to(dtype)

    def module(provider: str) -> nn.Module:
        if provider in ("torch", "compile"):
            own = copy.deepcopy(stock)
            own.flatten_parameters()
            return own if provider == "torch" else torch.compile(own)
        backend = provider.partition(":")[2] or None
        ours = sk.nn.LSTM(shape["input"], shape["hidden"], **size, backend=backend)
        ours.to(device, dtype).load_state_dict(stock.state_dict())
        return ours.train(training)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (x.to(dtype, copy=True).requires_grad_(training),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), inputs(dtype), grads(dtype))

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        exact, wide = copy.deepcopy(stock).double(), torch.float64
        truth = cases.evaluate(exact, inputs(wide), grads(wide))
        return truth, cases.evaluate(module("torch"), inputs(dtype), grads(dtype))

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(provider), inputs(dtype), grads(dtype))
        ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
        return cases.compare(ours, plain, truth, kink=False)

    weights = sum(p.numel() for p in stock.parameters())
    rows = shape["time"] * shape["batch"]
    products = sum(p.numel() for name, p in stock.named_parameters() if "weight" in name)
    passes = 3 if training else 1
    return cases.Case(
        f"lstm/{layer}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers},
        check,
        # Forward: x, weights in, y out. Backward: dy, x, weights, y in, dx, dweights out.
        (x.numel() + weights + dy.numel()) * dtype.itemsize * passes,
        2 * rows * products * passes,
        {"op": "lstm", "layer": layer, "mode": mode, "device": device, "dtype": dtype_name,
         "shape": shape},
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_lstm(measured, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, layer, mode, device, dtype, tiny)
