"""Implicit-GEMM convolution: plans and launchers of gemm_kernels.py and gemm_wgrad_kernels.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from ..._dispatch import YES, Verdict, no
from ..common.dtypes import DTYPES
from . import passes
from .epilogue import finished
from .gemm_kernels import _conv3d_gemm_fwd_kernel
from .gemm_wgrad_kernels import _conv3d_gemm_wgrad_kernel, _conv3d_gemm_wgrad_reduce_kernel
from .passes import ACCUMULATORS, OP, accumulator
from .pixels import (
    LEAST,
    WIDEST,
    Plan,
    check_like,
    empty,
    epilogue_arguments,
    is_whole,
    pixel_stride,
    precision,
    readable,
    require,
)
from .window import Window

FORWARD, WGRAD = "_conv3d_gemm_fwd_kernel", "_conv3d_gemm_wgrad_kernel"
PLAIN = {"STRIDE_RESIDUAL": 0, "EPS": 0.0, "ACTIVATION": "", "SLOPE": 0.0}
AXIS_TAPS = 32  # bits of a set
FILL = 528  # programs: four waves of a large GPU
REDUCED = 256  # sums that one program makes of partials
ROWS_PER_SPLIT = 512  # fewer, and writing the partials costs more than the products


def can_run(window: Window, channels: int, filters: int, dtype: torch.dtype) -> Verdict:
    """Whether the kernels take such a convolution, forward and both gradients (of x: at stride 1, zeros)."""
    if dtype not in DTYPES:
        return no(f"x is {dtype}; the kernels take fp16, bf16, fp32 and fp64")
    if window.transposed:
        return no("window is transposed; the kernels take convolutions")
    groups = window.groups
    if groups < 1 or channels % groups or filters % groups:
        return no(f"groups is {groups}; it must divide {channels} channels and {filters} filters")
    if max(window.kernel) > AXIS_TAPS:
        return no(f"kernel is {window.kernel}; the kernels take at most {AXIS_TAPS} an axis")
    if filters * (channels // groups) * math.prod(window.kernel) >= WIDEST:
        return no(
            f"weight has {filters} x {channels // groups} x {window.kernel} elements; 2^31 is too many"
        )
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
    finite_tail: bool = False,
) -> Tensor:
    """``act(((conv(x) + bias) - mean) / sqrt(variance + eps) * bn_weight + bn_bias + residual)``, each part optional.

    Args:
        finite_tail: what lies between x's channels and its pixel stride is finite (zeros, say), so that whole vectors
            go to the tensor cores as they are.

    Returns:
        [N, K, T', H', W'], dense ``channels_last_3d``, rounded once.
    """
    z, plan, laid = _prepare(x, weight, window, finite_tail)
    vectors, stride = epilogue_arguments(
        z, bias, mean, variance, bn_weight, bn_bias, residual, activation
    )
    _conv3d_gemm_fwd_kernel[plan.grid](
        x, laid, z, *vectors, residual, None, *plan.sizes, STRIDE_RESIDUAL=stride, EPS=eps,
        ACTIVATION=activation, SLOPE=negative_slope, **plan.constants,
    )  # fmt: skip
    return z


def forward_with_statistics(
    x: Tensor, weight: Tensor, window: Window, *, finite_tail: bool = False
) -> tuple[Tensor, Tensor, int]:
    """The convolution, and mean and M2 of its rounded values.

    Returns:
        y: [N, K, T', H', W'], dense ``channels_last_3d``.
        part: [tiles, 3, K], the mean's rounding, the mean and M2; tile i holds rows ``i * ROWS`` and on of the
            N*T'*H'*W'.
        ROWS: rows of a tile; the last one's may be fewer.
    """
    y, plan, laid = _prepare(x, weight, window, finite_tail)
    rows = plan.constants["BLOCK_M"]
    tiles = triton.cdiv(y.numel() // y.shape[1], rows)
    part = torch.empty(tiles, 3, y.shape[1], dtype=accumulator(y), device=y.device)
    _conv3d_gemm_fwd_kernel[plan.grid](
        x, laid, y, None, None, None, None, None, None, part, *plan.sizes, **PLAIN, **plan.constants
    )  # fmt: skip
    return y, part, rows


def dgrad(
    dy: Tensor, weight: Tensor, window: Window, sizes: Sequence[int], *, finite_tail: bool = False
) -> Tensor:
    """The gradient of x ``[N, C, *sizes]``: a convolution of dy with the taps turned round, C and K exchanged."""
    if max(window.stride) > 1 or (window.replicate and max(*window.before, *window.after) > 0):
        raise ValueError(f"window: expected stride 1 and padding of zeros, got {window}")
    k, c, *kernel = weight.shape
    check_like("dy", dy, weight, (dy.shape[0], k, *window.output(sizes)))
    groups = window.groups
    turned = weight.reshape(groups, k // groups, c, *kernel).transpose(1, 2).flip(3, 4, 5)
    turned = turned.reshape(groups * c, k // groups, *kernel)
    dx, plan, laid = _prepare(dy, turned, _turned(window), finite_tail, "dy")
    _conv3d_gemm_fwd_kernel[plan.grid](
        dy, laid, dx, None, None, None, None, None, None, None, *plan.sizes, **PLAIN, **plan.constants
    )  # fmt: skip
    return dx


def wgrad(x: Tensor, dy: Tensor, window: Window) -> Tensor:
    """The gradient of the weight ``[K, C / groups, kt, kh, kw]``, in x's dtype; any stride, padding and dilation."""
    stride_x = pixel_stride("x", x)
    check_like("dy", dy, x, (x.shape[0], dy.shape[1], *window.output(x.shape[2:])))
    stride_dy = pixel_stride("dy", dy)
    n, c, *sizes = x.shape
    k, groups = dy.shape[1], window.groups
    require(can_run(window, c, k, x.dtype))
    plan = plan_wgrad(
        passes.arch_of(x.device), window, n, c, k, tuple(sizes), x.dtype, stride_x, stride_dy,
        readable(x, stride_x, groups), readable(dy, stride_dy, groups), precision(x.dtype),
    )  # fmt: skip
    splits = plan.grid[1]
    dw = torch.empty(k, c // groups, *window.kernel, dtype=x.dtype, device=x.device)
    dw = dw.contiguous(memory_format=torch.channels_last_3d)
    part = dw
    if splits > 1:
        part = torch.empty(splits, dw.numel(), dtype=accumulator(x), device=x.device)
    _conv3d_gemm_wgrad_kernel[plan.grid](x, dy, part, *plan.sizes, **plan.constants)
    if splits > 1:
        _conv3d_gemm_wgrad_reduce_kernel[(triton.cdiv(dw.numel(), REDUCED),)](
            part, dw, dw.numel(), splits, ACC=plan.constants["ACC"], BLOCK=REDUCED
        )
    return dw


@functools.lru_cache(maxsize=4096)
def _turned(window: Window) -> Window:
    """The window of the convolution of dy that gives dx: what a side has of padding, the other reaches less far."""
    before, after = (
        tuple(d * (n - 1) - p for d, n, p in zip(window.dilation, window.kernel, side, strict=True))
        for side in (window.before, window.after)
    )
    return window._replace(before=before, after=after, replicate=False)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def plan_forward(
    arch: str, window: Window, n: int, c: int, k: int, sizes: tuple[int, ...], dtype: torch.dtype,
    stride: int, readable: int, finite_tail: bool, precision: str,
) -> Plan:  # fmt: skip
    """Args:
    c, k: of all groups.
    stride, readable: elements of x a pixel, and those of a group's that may be read, whatever they hold.
    """
    c, k = c // window.groups, k // window.groups
    whole = is_whole(dtype, stride, c if window.groups > 1 else 0)
    config = _config(FORWARD, arch, window, c, k, dtype, whole, {"BLOCK_N": k, "BLOCK_K": c})
    output = window.output(sizes)
    rows = _rows(n, output)
    block_m, block_n, block_k = (config[f"BLOCK_{a}"] for a in "MNK")
    programs = triton.cdiv(rows, block_m) * triton.cdiv(k, block_n) * window.groups
    constants = {
        "C": c, "K": k, "WINDOW": window, "READS": _reads(window), "STRIDE_X": stride,
        "READ": readable, "CLEAN": readable > c and not finite_tail, "PACKED": packed(c, block_k),
        "FINISHED": finished(config, LEAST), "PRECISION": precision,
        "ACC": ACCUMULATORS.get(dtype, tl.float32), **config,
    }  # fmt: skip
    return Plan((programs,), (*sizes, *output, rows), constants)


@functools.lru_cache(maxsize=4096)
def plan_wgrad(
    arch: str, window: Window, n: int, c: int, k: int, sizes: tuple[int, ...], dtype: torch.dtype,
    stride_x: int, stride_dy: int, readable_x: int, readable_dy: int, precision: str,
) -> Plan:  # fmt: skip
    """As :func:`plan_forward`; the grid's second axis is the splits of the rows."""
    c, k = c // window.groups, k // window.groups
    whole = is_whole(dtype, stride_x, stride_dy, *((c, k) if window.groups > 1 else ()))
    config = _config(WGRAD, arch, window, c, k, dtype, whole, {"BLOCK_N": k, "BLOCK_C": c})
    output = window.output(sizes)
    rows = _rows(n, output)
    taps = math.prod(window.kernel)
    config["SHARE"] = min(config["SHARE"], taps)
    tiles = triton.cdiv(c, config["BLOCK_C"]) * triton.cdiv(k, config["BLOCK_N"])
    programs = tiles * window.groups * triton.cdiv(taps, config["SHARE"])
    splits = max(1, min(triton.cdiv(FILL, programs), rows // ROWS_PER_SPLIT))
    block_m = config["BLOCK_M"]
    chunk = triton.cdiv(triton.cdiv(rows, splits), block_m) * block_m
    wide = n * math.prod(sizes) * stride_x >= WIDEST
    constants = {
        "C": c, "K": k, "WINDOW": window, "READS": _reads(window),
        "STRIDE_X": stride_x, "STRIDE_DY": stride_dy, "READ_X": readable_x, "READ_DY": readable_dy,
        "PRECISION": precision, "ACC": ACCUMULATORS.get(dtype, tl.float32),
        "INDEX": tl.int64 if wide else tl.int32, **config,
    }  # fmt: skip
    return Plan((programs, triton.cdiv(rows, chunk)), (*sizes, *output, rows, chunk), constants)


def forget_plans() -> None:
    """After a change of the configs."""
    plan_forward.cache_clear()
    plan_wgrad.cache_clear()


def packed(extent: int, block: int) -> int:
    return triton.cdiv(extent, block) * block


def pack(weight: Tensor, channels: int) -> Tensor:
    """The weight as [K, kt, kh, kw, channels], zeros past its own; itself where it lies so already."""
    k, c, *kernel = weight.shape
    if c == channels:
        return weight.contiguous(memory_format=torch.channels_last_3d)
    laid = weight.new_zeros(k, *kernel, channels)
    laid[..., :c] = weight.permute(0, 2, 3, 4, 1)
    return laid


def _prepare(
    x: Tensor, weight: Tensor, window: Window, finite_tail: bool, name: str = "x"
) -> tuple[Tensor, Plan, Tensor]:
    """The last look before pointers are taken; the output, the plan and the weight as the kernel wants it."""
    stride = pixel_stride(name, x)
    n, c, *sizes = x.shape
    k = weight.shape[0]
    check_like("weight", weight, x, (k, c // window.groups, *window.kernel))
    require(can_run(window, c, k, x.dtype))
    plan = plan_forward(
        passes.arch_of(x.device), window, n, c, k, tuple(sizes), x.dtype,
        stride, readable(x, stride, window.groups), finite_tail, precision(x.dtype),
    )  # fmt: skip
    z = empty(x, (n, k, *plan.sizes[3:6]))
    return z, plan, pack(weight, plan.constants["PACKED"])


def _config(
    kernel: str, arch: str, window: Window, c: int, k: int, dtype: torch.dtype, whole: bool,
    extents: dict[str, int],
) -> dict[str, int]:  # fmt: skip
    """The shipped config, its tile no larger than its extents."""
    key: _tuning.Key = (
        ("channels", c), ("filters", _unpadded(k)), ("itemsize", dtype.itemsize), ("taps", math.prod(window.kernel)),
        ("vectors", "whole" if whole else "partial"),
    )  # fmt: skip
    config = dict(_tuning.config(OP, kernel, arch, key))
    for name, extent in extents.items():
        config[name] = min(config[name], max(LEAST, triton.next_power_of_2(extent)))
    if "BLOCK_K" in config and _wastes(c, config["BLOCK_K"]):
        config["BLOCK_K"] //= 2
    return config


def _wastes(extent: int, block: int) -> bool:
    """Whether blocks of half the size would leave a fifth less of the work to padding."""
    half = block // 2
    return half >= LEAST and packed(extent, block) >= 1.2 * packed(extent, half)


def _unpadded(filters: int) -> int:
    """K as the configs know it: tiles of 128 stand half empty at 144, where 64 is the better row."""
    return 64 if filters > 64 and _wastes(filters, 128) else filters


def _rows(n: int, output: Sequence[int]) -> int:
    rows = n * math.prod(output)
    if min(n, *output) < 1 or rows >= WIDEST:
        raise ValueError(f"x: expected 1 to {WIDEST} output pixels, got {n} x {tuple(output)}")
    return rows


def _reads(window: Window) -> str:
    """How the kernels read x: ``"rows"`` as they stand, ``"inside"`` where no tap leaves the map, else ``"masked"``
    or ``"clamped"``."""
    sides = (*window.before, *window.after)
    if max(sides) > 0:
        return "clamped" if window.replicate else "masked"
    single = max(*window.kernel, *window.stride) == 1
    return "rows" if single and min(sides) == 0 else "inside"
