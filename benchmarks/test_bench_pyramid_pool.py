"""``torch.cat`` of adaptive pools against ``PyramidPool3d``, in both memory layouts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sora_kernels as sk

from . import cases, shapes, timers

ROWS = sorted(shapes.load("pyramid_pool3d", "cuda"))
LAYOUTS = ("NCDHW", "NDHWC")


class Stock(nn.Module):
    """What a user writes."""

    def __init__(self, levels: Any, mode: str, maps: bool, data_format: str) -> None:
        super().__init__()
        self.levels, self.maps, self.last = levels, maps, data_format == "NDHWC"
        pools = {"max": F.adaptive_max_pool3d, "avg": F.adaptive_avg_pool3d}
        self.pools = [pools[kind] for kind in ("max", "avg") if kind in mode]

    def forward(self, x: Tensor) -> Any:
        x = x.movedim(-1, 1) if self.last else x
        found = [pool(x, level) for level in self.levels for pool in self.pools]
        if not self.maps:
            return torch.cat([m.flatten(1) for m in found], 1)
        per = len(self.pools)
        pairs = [found[k : k + per] for k in range(0, len(found), per)]
        maps = [torch.cat(pair, 1) if per > 1 else pair[0] for pair in pairs]
        return [m.movedim(1, -1) for m in maps] if self.last else maps


class Joined(nn.Module):
    """Maps as one tensor, that one gradient may flow into all of them."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        found = self.pool(x)
        return found if isinstance(found, Tensor) else torch.cat([m.flatten(1) for m in found], 1)


def build(
    layer: str, mode: str, layout: str, kind: str, device: str, dtype_name: str, tiny: bool,
    providers: list[str],
) -> cases.Case:  # fmt: skip
    shape = shapes.load("pyramid_pool3d", device, tiny)[layer]
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    levels = tuple(o if isinstance(o, int) else tuple(o) for o in shape["levels"])
    maps = shape.get("maps", False)
    output = "maps" if maps else "flat"
    channels, *sizes = shape["input"]
    x = torch.randn(shape["batch"], channels, *sizes, device=device).to(dtype)
    x = x.movedim(1, -1).contiguous() if layout == "NDHWC" else x

    def module(provider: str) -> nn.Module:
        if provider in ("torch", "compile"):
            stock = Joined(Stock(levels, kind, maps, layout))
            return stock if provider == "torch" else torch.compile(stock)
        backend = provider.partition(":")[2] or None
        return Joined(
            sk.nn.PyramidPool3d(levels, mode=kind, output=output, data_format=layout, backend=backend)
        )  # fmt: skip

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (x.to(dtype, copy=True).requires_grad_(training),)

    with torch.no_grad():
        dy = torch.randn_like(module("torch")(x))

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), inputs(dtype), grads(dtype))

    def check(provider: str) -> dict[str, dict[str, float]]:
        wide = torch.float64
        found = [
            cases.evaluate(module(name), inputs(t), grads(t))
            for name, t in (("torch", wide), ("torch", dtype), (provider, dtype))
        ]
        truth, plain, ours = found
        return cases.compare(ours, plain, truth, kink=False)

    values = dy.numel() * dtype.itemsize
    bytes_ = x.numel() * dtype.itemsize + values
    if training:  # and dy in, dx out, with an int32 a maximum out and in
        bytes_ += bytes_ + (8 * dy.numel() if "max" in kind else 0)
    return cases.Case(
        f"pyramid_pool3d/{layer}/{kind}/{mode}/{layout}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers},
        check,
        bytes_,
        x.numel(),
        {"op": "pyramid_pool3d", "layer": layer, "kind": kind, "mode": mode, "layout": layout,
         "device": device, "dtype": dtype_name, "shape": shape},
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("kind", ["max", "avg", "maxavg"])
@pytest.mark.parametrize("layer", ROWS)
def test_pyramid_pool3d(measured, provider, layer, kind, mode, layout, device, dtype, tiny):
    measured(build, provider, layer, mode, layout, kind, device, dtype, tiny)
