"""The public arguments of the convolution operators: normal forms and checks. Nothing here touches data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dtypes import DTYPES
from .window import Triple, Window

# What a parameter or running statistic may be kept in, by x's dtype.
VECTOR_DTYPES = {dtype: {dtype, torch.promote_types(dtype, torch.float32)} for dtype in DTYPES}


class Geometry(NamedTuple):
    """A convolution's shape arguments in normal form.

    Attributes:
        flags: the window as the registered op takes it: stride, padding (before, then after), replicate, dilation,
            groups, transposed, output_padding.
    """

    window: Window
    flags: tuple[Any, ...]
    output: list[int]  # [N, K, T', H', W']; nobody writes to it


def geometry(
    x: Sequence[int], weight: Sequence[int], stride: Any, padding: Any, padding_mode: str, dilation: Any,
    groups: int, transposed: bool = False, output_padding: Any = 0,
) -> Geometry:  # fmt: skip
    """Checks the shapes of x and weight and everything about the window."""
    if len(x) != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, T, H, W], got {tuple(x)}")
    if len(weight) != 5:
        form = "[C, K / groups, kt, kh, kw]" if transposed else "[K, C / groups, kt, kh, kw]"
        raise ValueError(f"weight: expected 5 dimensions {form}, got {tuple(weight)}")
    first, kind = weight[0], "input" if transposed else "output"
    if groups < 1 or first % groups:
        raise ValueError(
            f"groups: expected a divisor of weight's {first} {kind} channels, got {groups}"
        )
    channels = first if transposed else weight[1] * groups
    if x[1] != channels:
        raise ValueError(
            f"x: expected {channels} channels for weight {tuple(weight)} and groups {groups}, "
            f"got {tuple(x)}"
        )
    if padding_mode not in ("zeros", "replicate"):
        raise ValueError(f"padding_mode: expected 'zeros' or 'replicate', got {padding_mode!r}")
    before, after = paddings(padding)
    kt, kh, kw = weight[2:]
    window = Window(
        (kt, kh, kw), triple("stride", stride, 1), before, after, triple("dilation", dilation, 1), groups,
        padding_mode == "replicate" and any(before + after), transposed,
        triple("output_padding", output_padding, 0),
    )  # fmt: skip
    _check_transposed(window, padding)
    sizes = window.output(x[2:])
    if min(sizes) < 1:
        raise ValueError(
            f"x: too small for the kernel {tuple(weight[2:])} with dilation {window.dilation}: "
            f"got {tuple(x)} with padding {padding}"
        )
    if window.replicate and min(x[2:]) < 1:
        raise ValueError(f"x: nothing to replicate, got {tuple(x)}")
    flags = (
        window.stride, (*before, *after), window.replicate, window.dilation, groups, transposed,
        window.output_padding,
    )  # fmt: skip
    return Geometry(window, flags, [x[0], window.filters(weight), *sizes])


cached_geometry = functools.lru_cache(maxsize=4096)(geometry)


def _check_transposed(window: Window, padding: Any) -> None:
    if not window.transposed:
        return
    if not window.symmetric:
        raise ValueError(
            f"padding: a transposed convolution takes an int or (t, h, w), got {padding!r}"
        )
    least = [max(s, d) for s, d in zip(window.stride, window.dilation, strict=True)]
    if any(o >= limit for o, limit in zip(window.output_padding, least, strict=True)):
        raise ValueError(
            f"output_padding: expected less than stride {window.stride} or dilation {window.dilation}, "
            f"got {window.output_padding}"
        )


def triple(name: str, value: int | Sequence[int], least: int) -> Triple:
    """``value`` as (t, h, w)."""
    if isinstance(value, int):
        value = (value, value, value)
    if len(value) != 3 or min(value) < least:
        raise ValueError(f"{name}: expected an int or 3 ints >= {least}, got {value!r}")
    t, h, w = value
    return t, h, w


def paddings(padding: int | Sequence[int] | Sequence[Sequence[int]]) -> tuple[Triple, Triple]:
    """Padding before and after, as (t, h, w) each."""
    if isinstance(padding, int) or all(isinstance(p, int) for p in padding):
        both = triple("padding", padding, 0)  # type: ignore[arg-type]
        return both, both
    pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in padding]
    if len(pairs) != 3 or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(
            f"padding: expected an int, (t, h, w) or ((t0, t1), (h0, h1), (w0, w1)) >= 0, got {padding!r}"
        )
    (t0, t1), (h0, h1), (w0, w1) = pairs
    return (t0, h0, w0), (t1, h1, w1)


def check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, output: list[int],
) -> None:  # fmt: skip
    """Dtypes, devices and the shapes that ``geometry`` has not seen. One look a tensor: this runs every call."""
    dtype, device, k = x.dtype, x.device, output[1]
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
