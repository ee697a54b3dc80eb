"""The public arguments of the convolution operators: normal forms and checks. Nothing here touches data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dtypes import DTYPES

# What a parameter or running statistic may be kept in, by x's dtype.
VECTOR_DTYPES = {dtype: {dtype, torch.promote_types(dtype, torch.float32)} for dtype in DTYPES}


class Geometry(NamedTuple):
    """A convolution's shape arguments in normal form; [t, h, w] lists, nobody writes to them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    pad: tuple[list[int], list[int]] | None  # before, after, where the tensor itself is padded
    output: list[int]  # [N, K, T', H', W']


def geometry(
    x: Sequence[int], weight: Sequence[int], stride: Any, padding: Any, padding_mode: str, dilation: Any, groups: int
) -> Geometry:  # fmt: skip
    """Checks the shapes of x and weight and everything about the window."""
    if len(x) != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, T, H, W], got {tuple(x)}")
    if len(weight) != 5:
        raise ValueError(
            f"weight: expected 5 dimensions [K, C / groups, kt, kh, kw], got {tuple(weight)}"
        )
    k = weight[0]
    if groups < 1 or k % groups:
        raise ValueError(
            f"groups: expected a divisor of weight's {k} output channels, got {groups}"
        )
    if x[1] != weight[1] * groups:
        raise ValueError(
            f"x: expected {weight[1] * groups} channels for weight {tuple(weight)} and groups {groups}, "
            f"got {tuple(x)}"
        )
    if padding_mode not in ("zeros", "replicate"):
        raise ValueError(f"padding_mode: expected 'zeros' or 'replicate', got {padding_mode!r}")
    strides, dilations = triple("stride", stride, 1), triple("dilation", dilation, 1)
    before, after = paddings(padding)
    sizes = [
        (x[2 + i] + before[i] + after[i] - dilations[i] * (weight[2 + i] - 1) - 1) // strides[i] + 1
        for i in range(3)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"x: too small for the kernel {tuple(weight[2:])} with dilation {tuple(dilations)}: "
            f"got {tuple(x)} with padding {padding}"
        )
    output = [x[0], k, *sizes]
    if before != after or (padding_mode != "zeros" and any(before)):
        return Geometry(strides, [0, 0, 0], dilations, (before, after), output)
    return Geometry(strides, before, dilations, None, output)


cached_geometry = functools.lru_cache(maxsize=4096)(geometry)


def triple(name: str, value: int | Sequence[int], least: int) -> list[int]:
    """``value`` as [t, h, w]."""
    if isinstance(value, int):
        value = (value, value, value)
    if len(value) != 3 or min(value) < least:
        raise ValueError(f"{name}: expected an int or 3 ints >= {least}, got {value!r}")
    return list(value)


def paddings(padding: int | Sequence[int] | Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Padding before and after, as [t, h, w] each."""
    if isinstance(padding, int) or all(isinstance(p, int) for p in padding):
        both = triple("padding", padding, 0)  # type: ignore[arg-type]
        return both, both
    pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in padding]
    if len(pairs) != 3 or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(
            f"padding: expected an int, (t, h, w) or ((t0, t1), (h0, h1), (w0, w1)) >= 0, got {padding!r}"
        )
    return [p[0] for p in pairs], [p[1] for p in pairs]


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> Tensor:
    """x padded as a tensor: for the forms that ATen's convolution cannot take."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    sides = [side for axis in (2, 1, 0) for side in (before[axis], after[axis])]
    x = F.pad(x, sides, "constant" if mode == "zeros" else "replicate")
    return x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x


def check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, output: list[int],
) -> None:  # fmt: skip
    """Dtypes, devices and the shapes that ``geometry`` has not seen. One look a tensor: this runs every call."""
    dtype, device, k = x.dtype, x.device, weight.shape[0]
    allowed = VECTOR_DTYPES.get(dtype)
    if allowed is None:
        raise ValueError(f"x: expected fp16, bf16, fp32 or fp64, got {_said(x)}")
    if weight.dtype is not dtype or weight.device != device:
        raise ValueError(f"weight: expected {dtype} on {device} like x, got {_said(weight)}")
    vectors = (bn_weight, bn_bias, running_mean, running_var)
    for v in vectors:
        if v is not None and (v.dtype not in allowed or v.shape != (k,) or v.device != device):
            names = ("bn_weight", "bn_bias", "running_mean", "running_var")
            name = next(n for n, other in zip(names, vectors, strict=True) if other is v)
            expected = " or ".join(sorted(map(str, allowed)))
            raise ValueError(f"{name}: expected ({k},) {expected} on {device}, got {_said(v)}")
    if bias is not None and (bias.dtype is not dtype or bias.device != device or bias.shape != (k,)):  # fmt: skip
        raise ValueError(f"bias: expected ({k},) {dtype} on {device}, got {_said(bias)}")
    if residual is not None and (
        residual.dtype is not dtype or residual.device != device or list(residual.shape) != output
    ):
        raise ValueError(
            f"residual: expected {tuple(output)} {dtype} on {device}, got {_said(residual)}"
        )
    if (running_mean is None) is not (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{missing}: expected both running statistics or neither, got None for this one"
        )


def _said(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
