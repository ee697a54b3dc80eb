"""Convolution of at most four channels: plan and launchers of stem_kernels.py. A first layer needs no dgrad, and its
wgrad is the implicit GEMM's."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from ..._dispatch import YES, Verdict, no
from ..common.dtypes import DTYPES
from . import passes
from .epilogue import finished
from .passes import ACCUMULATORS, OP, accumulator
from .pixels import LEAST, WIDEST, Plan, check_like, empty, epilogue_arguments, precision, require
from .stem_kernels import PIXEL, _conv3d_stem_fwd_kernel
from .window import Window

FORWARD = "_conv3d_stem_fwd_kernel"
MOST_COLUMNS = 32  # taps along w: a reduction step of 128


def can_run(window: Window, channels: int, filters: int, dtype: torch.dtype) -> Verdict:
    """Forward only: there is no dgrad and no wgrad here."""
    if dtype not in DTYPES:
        return no(f"x is {dtype}; the kernels take fp16, bf16, fp32 and fp64")
    if not 1 <= channels <= PIXEL.value:
        return no(f"x has {channels} channels; the stem kernel takes 1 to {PIXEL.value}")
    if window.groups != 1:
        return no(f"groups is {window.groups}; the stem kernel takes 1")
    if window.transposed:
        return no("the convolution is transposed")
    if window.dilation[2] != 1:
        return no(f"dilation is {window.dilation}; the stem kernel takes 1 along w")
    if window.kernel[2] > MOST_COLUMNS:
        return no(f"kernel is {window.kernel}; the stem kernel takes {MOST_COLUMNS} taps along w")
    if window.replicate and max(*window.before, *window.after) > 0:
        return no("padding is replicate; the stem kernel pads with zeros")
    return YES


def forward(
    x: Tensor,
    weight: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str = "",
    negative_slope: float = 0.0,
) -> Tensor:
    """``act(((conv(x) + bias) - mean) / sqrt(variance + eps) * bn_weight + bn_bias + residual)``, each part optional.

    Args:
        x: [N, C, T, H, W] in any layout: it is copied to pixels of four channels, unless it is that already.

    Returns:
        [N, K, T', H', W'], dense ``channels_last_3d``, rounded once.
    """
    z, plan, pixels, packed = _prepare(x, weight, window)
    vectors, stride = epilogue_arguments(
        z, bias, mean, variance, bn_weight, bn_bias, residual, activation
    )
    _conv3d_stem_fwd_kernel[plan.grid](
        pixels, packed, z, *vectors, residual, None, *plan.sizes, STRIDE_RESIDUAL=stride,
        EPS=eps, ACTIVATION=activation, SLOPE=negative_slope, **plan.constants,
    )  # fmt: skip
    return z


def forward_with_statistics(
    x: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, int]:
    """The convolution, and mean and M2 of its rounded values.

    Returns:
        y: [N, K, T', H', W'], dense ``channels_last_3d``.
        part: [tiles, 3, K], the mean's rounding, the mean and M2; tile i holds rows ``i * ROWS`` and on of the
            N*T'*H'*W'.
        ROWS: rows of a tile; the last one's may be fewer.
    """
    y, plan, pixels, packed = _prepare(x, weight, window)
    rows = plan.constants["BLOCK_M"]
    tiles = triton.cdiv(y.numel() // y.shape[1], rows)
    part = torch.empty(tiles, 3, y.shape[1], dtype=accumulator(y), device=y.device)
    _conv3d_stem_fwd_kernel[plan.grid](
        pixels, packed, y, None, None, None, None, None, None, part, *plan.sizes, STRIDE_RESIDUAL=0,
        EPS=0.0, ACTIVATION="", SLOPE=0.0, **plan.constants,
    )  # fmt: skip
    return y, part, rows


@functools.lru_cache(maxsize=4096)
def plan_forward(
    arch: str, window: Window, n: int, k: int, sizes: tuple[int, ...], dtype: torch.dtype, precision: str
) -> Plan:  # fmt: skip
    config = dict(_tuning.config(OP, FORWARD, arch, (("filters", k), ("itemsize", dtype.itemsize))))
    config["BLOCK_N"] = min(config["BLOCK_N"], max(LEAST, triton.next_power_of_2(k)))
    output = window.output(sizes)
    if min(n, *output) < 1:
        raise ValueError(f"x: expected at least one output pixel, got {n} x {tuple(output)}")
    t, h, w = output
    rows = n * t * h * w
    constants = {
        "K": k, "WINDOW": window, "PRECISION": precision, "ACC": ACCUMULATORS.get(dtype, tl.float32),
        "FINISHED": finished(config, LEAST),
        "INDEX": tl.int64 if rows >= WIDEST else tl.int32, "BLOCK_K": _segment(window), **config,
    }  # fmt: skip
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(k, config["BLOCK_N"]),)
    return Plan(grid, (*sizes, *output, rows), constants)


def forget_plans() -> None:
    """After a change of the configs."""
    plan_forward.cache_clear()


def _segment(window: Window) -> int:
    """Elements of one reduction step: a row of taps."""
    return max(LEAST, triton.next_power_of_2(window.kernel[2] * PIXEL.value))


def _prepare(x: Tensor, weight: Tensor, window: Window) -> tuple[Tensor, Plan, Tensor, Tensor]:
    """The last look before pointers are taken; the output, the plan, and x and the weight as the kernel wants them."""
    if x.dim() != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, T, H, W], got {tuple(x.shape)}")
    n, c, *sizes = x.shape
    k, *_ = weight.shape
    require(can_run(window, c, k, x.dtype))
    check_like("weight", weight, x, (k, c, *window.kernel))
    plan = plan_forward(
        passes.arch_of(x.device), window, n, k, tuple(sizes), x.dtype, precision(x.dtype)
    )
    z = empty(x, (n, k, *plan.sizes[3:6]))
    kt, kh, kw = window.kernel
    packed = F.pad(weight.permute(0, 2, 3, 4, 1), (0, PIXEL.value - c))
    packed = packed.reshape(k, kt * kh, kw * PIXEL.value)
    packed = F.pad(packed, (0, plan.constants["BLOCK_K"] - kw * PIXEL.value)).contiguous()
    return z, plan, _pixels(x), packed


def _pixels(x: Tensor) -> Tensor:
    """x as dense [N, T, H, W, 4], zeros past its channels: what only looks padded may hold anything there."""
    n, c, *sizes = x.shape
    if c == PIXEL.value:
        return x.permute(0, 2, 3, 4, 1).contiguous()
    pixels = x.new_zeros(n, *sizes, PIXEL.value)
    pixels[..., :c] = x.permute(0, 2, 3, 4, 1)
    return pixels
