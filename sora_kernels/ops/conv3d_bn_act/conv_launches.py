"""The convolutions' kernels through their launchers, for one layer: what ``audit`` compiles. ``launches.py`` joins them
to the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..._launches import Launch
from . import choice, depthwise, gemm, stem
from .window import Window

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODULES = (gemm, depthwise, stem)
# What the test command compiles: each kernel, epilogue and form of reads, and tiles of both widths.
GATED = {
    "r3d_18.stem": ("bf16, affine",),
    "r3d_18.layer1": ("bf16, affine, residual", "bf16, statistics", "bf16, dgrad", "bf16, wgrad",
                      "fp32, affine, residual"),
    "r3d_18.layer2": ("bf16, affine, residual",),
    "r2plus1d_18.stem.spatial": ("bf16, wgrad",),  # masked, of 3 and 45 channels
    "x3d_m.res2.expand": ("bf16, affine", "bf16, dgrad"),  # 1x1x1; of 54 channels, no whole vectors
    "x3d_m.res2.depthwise": ("bf16, affine", "bf16, statistics", "bf16, wgrad"),
    "x3d_m.res4.depthwise": ("bf16, affine", "bf16, statistics", "bf16, wgrad"),
}  # fmt: skip

Run = Callable[[], tuple[Tensor | None, ...]]


def launches(
    layer: str, shape: dict[str, Any], *, device: str, gated: bool = False
) -> Iterator[Launch]:
    """As ``launches.launches``, channels-last alone: forward in both epilogues, and the gradients that there are."""
    window = window_of(shape)
    channels, *sizes = shape["input"]
    filters = shape["channels"]
    for name, dtype in DTYPES.items():
        wanted = GATED.get(layer, ()) if gated else None
        if wanted is not None and not any(label.startswith(name) for label in wanted):
            continue
        key = {
            "layout": "convolution", "channels": channels, "filters": filters, "itemsize": dtype.itemsize,
        }  # fmt: skip
        x = _dense([shape["batch"], channels, *sizes], dtype, device)
        weight = _dense([filters, channels // window.groups, *window.kernel], dtype, device)
        residual = bool(shape.get("residual"))
        for variant, kernels, run in _variants(x, weight, window, residual):
            label = f"{name}, {variant}"
            if wanted is None or label in wanted:
                yield Launch(f"{layer}, {label}", kernels, key, run)


def window_of(shape: dict[str, Any]) -> Window:
    """Of a layer's fields."""
    kernel, stride, padding = (
        tuple(shape.get(field, default))
        for field, default in (("kernel", ()), ("stride", (1, 1, 1)), ("padding", (0, 0, 0)))
    )
    return Window(kernel, stride, padding, padding, groups=shape.get("groups", 1))


def forget_plans() -> None:
    """After a change of the configs."""
    for module in MODULES:
        module.forget_plans()


def _variants(
    x: Tensor, weight: Tensor, window: Window, has_residual: bool
) -> Iterator[tuple[str, tuple[str, ...], Run]]:
    channels, filters = x.shape[1], weight.shape[0]
    made_by = choice.kernels(window, channels, filters, x.dtype)
    is_depthwise = choice.is_depthwise(window, channels, filters)
    gradients = depthwise if is_depthwise else gemm  # as own.convolve_backward
    y = _dense([x.shape[0], filters, *window.output(x.shape[2:])], x.dtype, x.device)
    residual = torch.clone(y) if has_residual else None
    mean, variance, bn_weight, bn_bias = torch.linspace(
        0.5, 1.5, 4 * filters, device=x.device
    ).view(4, filters)

    def affine() -> tuple[Tensor | None, ...]:
        z = made_by.forward(
            x, weight, window, mean=mean, variance=variance, bn_weight=bn_weight, bn_bias=bn_bias, eps=1e-5,
            residual=residual, activation="relu",
        )  # fmt: skip
        return (z,)

    forward = (made_by.FORWARD,)
    yield "affine, residual" if has_residual else "affine", forward, affine
    yield (
        "statistics",
        forward,
        lambda: made_by.forward_with_statistics(x, weight, window)[:2],
    )
    if choice.has_dgrad(window, channels, filters):
        yield (
            "dgrad",
            (gradients.FORWARD,),
            lambda: (gradients.dgrad(y, weight, window, x.shape[2:]),),
        )
    yield "wgrad", (gradients.WGRAD,), lambda: (gradients.wgrad(x, y, window),)


def _dense(size: list[int], dtype: torch.dtype, device: Any) -> Tensor:
    t = torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last_3d)
    return t if t.is_meta else t.normal_()
