"""BatchNorm (+residual) + activation as passes around a convolution: plans and launchers of passes_kernels.py."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from .passes_kernels import (
    _act_bwd_kernel,
    _bn_act_bwd_apply_kernel,
    _bn_act_bwd_finalize_kernel,
    _bn_act_bwd_reduce_kernel,
    _bn_act_fwd_kernel,
    _bn_finalize_kernel,
    _bn_stats_kernel,
)

OP = "conv3d_bn_act"
MERGED_TILES = 64  # partials merged at once
ACCUMULATORS = {torch.float64: tl.float64}


class Plan(NamedTuple):
    """How one kernel cuts a tensor's layout into tiles."""

    grid: tuple[int, int]
    tiles: int
    rows: int
    c: int
    total: int
    where: tuple[int, ...]  # C, length, tiles_per_segment and the three strides
    tile: dict[str, Any]  # the tile's constants
    merge_grid: tuple[int]  # of the kernel that merges the partials: few programs, each a tree
    merge: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def plan(
    kernel: str, arch: str, n: int, c: int, volume: int, channels_last: bool, dtype: torch.dtype
) -> Plan:
    key = (
        ("channels", c),
        ("itemsize", dtype.itemsize),
        ("layout", "channels_last" if channels_last else "contiguous"),
    )
    config = _tuning.config(OP, kernel, arch, key)
    if channels_last:
        segments, length, strides = 1, n * volume, (0, c, 1)
    else:
        segments, length, strides = n, volume, (c * volume, 1, volume)
    acc = ACCUMULATORS.get(dtype, tl.float32)
    rows = config["BLOCK_M"] * config["ITERATIONS"]
    block_c = min(config["BLOCK_C"], triton.next_power_of_2(c))
    merge_c = min(16, triton.next_power_of_2(c))
    tiles_per_segment = triton.cdiv(length, rows)
    tiles = segments * tiles_per_segment
    tile = {"ROWS": rows, "BLOCK_M": config["BLOCK_M"], "BLOCK_C": block_c, "ACC": acc}
    return Plan(
        grid=(tiles, triton.cdiv(c, block_c)),
        tiles=tiles,
        rows=rows,
        c=c,
        total=n * volume,
        where=(c, length, tiles_per_segment, *strides),
        tile={**tile, "num_warps": config["num_warps"]},
        merge_grid=(triton.cdiv(c, merge_c),),
        merge={"BLOCK_T": MERGED_TILES, "BLOCK_C": merge_c, "ACC": acc},
    )


def plan_for(y: Tensor, kernel: str) -> Plan:
    n, c, t, h, w = y.shape
    channels_last = y.is_contiguous(memory_format=torch.channels_last_3d)
    return plan(kernel, arch_of(y.device), n, c, t * h * w, channels_last, y.dtype)


def _partials(plan: Plan, y: Tensor, kinds: int = 2) -> Tensor:
    return torch.empty(plan.tiles, kinds, plan.c, dtype=accumulator(y), device=y.device)


def accumulator(y: Tensor) -> torch.dtype:
    """The dtype of statistics, sums and partials."""
    return torch.promote_types(y.dtype, torch.float32)


@functools.lru_cache(maxsize=16)
def _arch_of(device: int) -> str:
    return _tuning.arch_of(torch.cuda.get_device_capability(device))


def arch_of(device: torch.device) -> str:
    return _arch_of(device.index) if device.type == "cuda" else "default"


def _check(y: Tensor, **others: Tensor | None) -> None:
    """The last look before pointers are taken: one device, dense layout, matching sizes."""
    dense = y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last_3d)
    if y.dim() != 5 or not dense or not y.is_floating_point():
        raise ValueError(
            f"y: expected a dense floating 5-D tensor, got {y.dtype} {tuple(y.shape)} {y.stride()}"
        )
    for name, t in others.items():
        if t is None:
            continue
        expected = y.shape if t.dim() == 5 else (y.shape[1],)
        strides = y.stride() if t.dim() == 5 else (1,)
        # A size-1 axis may carry any stride.
        same = all(s == 1 or a == b for s, a, b in zip(t.shape, t.stride(), strides, strict=False))
        if t.device != y.device or tuple(t.shape) != tuple(expected) or not same:
            raise ValueError(
                f"{name}: expected {tuple(expected)} on {y.device} with strides {strides}, "
                f"got {tuple(t.shape)} on {t.device} with strides {t.stride()}"
            )


def launch_stats(
    y: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    partials: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Batch mean and 1/std of y ``[N, K, T, H, W]``; updates the running statistics in place.

    Args:
        bias: the convolution's where y leaves it out: it moves the running mean and nothing else.
        partials: of tiles of channels-last rows ``[tiles, 3, K]`` the mean's rounding, the mean and M2, and the rows of
            a tile, where a convolution's kernel has taken them: y itself is not read then.
    """
    _check(y, bias=bias, running_mean=running_mean, running_var=running_var)
    p = plan_for(y, "_bn_stats_kernel")
    if partials is None:
        part, rows, tiles = _partials(p, y, 3), p.rows, p.tiles
        _, length, tiles_per_segment, *_ = p.where
        _bn_stats_kernel[p.grid](y, part, *p.where, **p.tile)
    else:
        part, rows = partials
        tiles = tiles_per_segment = part.shape[0]
        length = p.total
    mean = torch.empty(p.c, dtype=part.dtype, device=y.device)
    invstd = torch.empty_like(mean)
    # Triton passes floats as fp32, its interpreter as they are: the same two parts for both.
    high = ctypes.c_float(momentum).value
    low = momentum - high
    _bn_finalize_kernel[p.merge_grid](
        part, mean, invstd, running_mean, running_var, bias,
        p.c, tiles, tiles_per_segment, length, p.total, high, low,
        EPS=eps, ROWS=rows, HAS_RUNNING=running_mean is not None, HAS_BIAS=bias is not None, **p.merge,
    )  # fmt: skip
    return mean, invstd


def launch_fwd(
    y: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    invstd_is_var: bool,
    activation: str,
    negative_slope: float,
    out: Tensor | None = None,
) -> Tensor:
    """``z = activation((y - mean) * invstd * weight + bias + residual)`` in one pass over y.

    mean and invstd None: 0 and 1. ``out`` may be y itself.
    """
    _check(y, residual=residual, mean=mean, invstd=invstd, weight=weight, bias=bias, out=out)
    z = torch.empty_like(y) if out is None else out
    p = plan_for(y, "_bn_act_fwd_kernel")
    _bn_act_fwd_kernel[p.grid](
        y, residual, z, mean, invstd, weight, bias, *p.where,
        EPS=eps, INVSTD_IS_VAR=invstd_is_var, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, SLOPE=negative_slope, **p.tile,
    )  # fmt: skip
    return z


def launch_bwd(
    dz: Tensor,
    y: Tensor,
    other: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    mask: str,
    activation: str,
    negative_slope: float,
    batch_stats: bool,
    needs_dy: bool,
    needs_dresidual: bool,
    needs_parameters: bool,
    share: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy, dresidual, dweight, dbias (None where not needed): one reducing and one writing pass.

    ``share`` makes of the sums ``[2, K]`` of da and da * xhat, after the parameters' gradients were taken from them,
    those that dy is made with.
    """
    _check(y, dz=dz, other=other, mean=mean, invstd=invstd, weight=weight, bias=bias)
    flags = {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "MASK": mask,
        "ACTIVATION": activation,
        "SLOPE": negative_slope,
    }
    sums = dweight = dbias = dy = dresidual = None
    if needs_parameters or (batch_stats and needs_dy):
        p = plan_for(y, "_bn_act_bwd_reduce_kernel")
        part = _partials(p, y)
        _bn_act_bwd_reduce_kernel[p.grid](
            dz, y, other, mean, invstd, weight, bias, part, *p.where, **flags, **p.tile
        )
        sums = torch.empty(2, p.c, dtype=part.dtype, device=y.device)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        _bn_act_bwd_finalize_kernel[p.merge_grid](
            part, sums, dweight, dbias, p.c, p.tiles,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **p.merge,
        )  # fmt: skip
        if share is not None:
            sums = share(sums)
    if needs_dy or needs_dresidual:
        p = plan_for(y, "_bn_act_bwd_apply_kernel")
        dy = torch.empty_like(y) if needs_dy else None
        dresidual = torch.empty_like(y) if needs_dresidual else None
        _bn_act_bwd_apply_kernel[p.grid](
            dz, y, other, mean, invstd, weight, bias, sums, dy, dresidual, p.total, *p.where,
            BATCH_STATS=batch_stats, NEEDS_DY=needs_dy, NEEDS_DRESIDUAL=needs_dresidual, **flags, **p.tile,
        )  # fmt: skip
    return dy, dresidual, dweight, dbias


def launch_masked(
    dz: Tensor, z: Tensor | None, *, activation: str, negative_slope: float
) -> tuple[Tensor, Tensor]:
    """dz times the activation's derivative by the sign of its output z, and the sums of that ``[K]``: one pass."""
    _check(dz, z=z)
    p = plan_for(dz, "_act_bwd_kernel")
    da = torch.empty_like(dz) if activation else dz
    part = _partials(p, dz)
    _act_bwd_kernel[p.grid](
        dz, z, da, part, *p.where, ACTIVATION=activation, SLOPE=negative_slope, **p.tile
    )
    sums = torch.empty(2, p.c, dtype=part.dtype, device=dz.device)
    _bn_act_bwd_finalize_kernel[p.merge_grid](
        part, sums, None, None, p.c, p.tiles, HAS_WEIGHT=False, HAS_BIAS=False, **p.merge
    )
    return da, sums[0]
