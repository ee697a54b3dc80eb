"""Conv3d -> BatchNorm3d (-> + residual) -> ReLU: stock modules against ``ConvBNAct3d``."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

import sora_kernels as sk

from . import cases, rivals, shapes, timers
from .rivals import LAYOUTS

LAYERS = sorted(shapes.load("conv3d_bn_act", "cuda"))
BF16 = sorted(name for name, row in shapes.load("conv3d_bn_act", "cpu").items() if "bf16" in row)


class Stock(nn.Module):
    """What a user writes; the activation in place, as torchvision does."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm3d(conv.out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        if residual is not None:
            out = out + residual
        return torch.relu_(out)


def build(
    layer: str,
    mode: str,
    layout: str,
    device: str,
    dtype_name: str,
    tiny: bool,
    providers: list[str],
) -> cases.Case:
    shape = shapes.load("conv3d_bn_act", device, tiny).get(layer)
    if shape is None:
        pytest.skip("a GPU row")
    if tiny and shape["kernel"] == [7, 7, 7]:
        # oneDNN leaves part of the weight gradient unwritten where all three sizes are the kernel's.
        shape["input"][1] += 1
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    conv = nn.Conv3d(
        shape["input"][0], shape["channels"], shape["kernel"], shape.get("stride", 1),
        shape.get("padding", 0), groups=shape.get("groups", 1), bias=False,
    )  # fmt: skip
    stock = Stock(conv).to(device=device, dtype=dtype, memory_format=LAYOUTS[layout])
    nn.init.uniform_(stock.bn.weight, 0.5, 1.5)
    nn.init.normal_(stock.bn.bias)
    stock.train(training)

    def random(*size: int) -> Tensor:
        made = torch.randn(size, device=device).to(dtype)
        return made.to(memory_format=LAYOUTS[layout])

    x = random(shape["batch"], *shape["input"])
    with torch.no_grad():
        size = conv(x).shape
    residual = random(*size) if shape.get("residual") else None
    dz = random(*size)

    def module(provider: str) -> nn.Module:
        own = copy.deepcopy(stock)
        if provider == "torch":
            return own
        if provider == "compile":
            return torch.compile(own)
        backend = provider.partition(":")[2] or None
        return sk.nn.ConvBNAct3d.from_modules(own.conv, own.bn, nn.ReLU(), backend=backend)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = [t.to(dtype, copy=True) for t in (x, residual) if t is not None]
        return tuple(t.requires_grad_(training) for t in made)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dz.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), inputs(dtype), grads(dtype))

    others = rivals.Rivals()
    if device == "cpu" and not training:
        others = rivals.of(stock, inputs(dtype), layout, freezing=0 if tiny else 3)

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        exact, wide = copy.deepcopy(stock).double(), torch.float64
        truth = cases.evaluate(exact, inputs(wide), grads(wide))
        return truth, cases.evaluate(module("torch"), inputs(dtype), grads(dtype))

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(provider), inputs(dtype), grads(dtype))
        ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
        if provider == "torch":
            for output in others.evaluate().values():
                cases.compare(output, plain, truth, kink=True)
        return cases.compare(ours, plain, truth, kink=True)

    # Forward: x, w, residual in, z out. Backward: dz, x, w, z in, dx, dw, dresidual out.
    read = x.numel() + (0 if residual is None else residual.numel()) + conv.weight.numel()
    bytes_ = (read + dz.numel()) * dtype.itemsize * (3 if training else 1)
    flops = 2 * dz.numel() * math.prod(conv.weight.shape[1:]) * (3 if training else 1)
    return rivals.Case(
        f"conv3d_bn_act/{layer}/{mode}/{layout}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers} | others.makers(),
        check,
        bytes_,
        flops,
        {"op": "conv3d_bn_act", "layer": layer, "mode": mode, "layout": layout, "device": device,
         "dtype": dtype_name, "shape": shape, **others.info()},
        layout=layout,
        rivals=tuple(others.calls),
        saved=(lambda name: rivals.saved_bytes(module(name), inputs(dtype))) if training else None,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_conv3d_bn_act(measured, benchmark, provider, layer, mode, layout, device, dtype, tiny):
    measured(build, provider, layer, mode, layout, device, dtype, tiny)
    rivals.complete(benchmark, provider)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", BF16)
def test_cpu_bf16(measured, benchmark, pytestconfig, provider, layer, mode, layout, tiny):
    if pytestconfig.getoption("device") == "cuda":
        pytest.skip("a CPU row")
    if not (tiny or torch.cpu._is_avx512_bf16_supported()):
        pytest.skip("not measured: this CPU has no bf16 instructions (avx512_bf16)")
    measured(build, provider, layer, mode, layout, "cpu", "bf16", tiny)
    rivals.complete(benchmark, provider)
