"""BatchNorm (+residual) + activation as passes around a convolution: Triton kernels.

A convolution output y is seen as segments of rows, so that one kernel serves both layouts without an index
division an element: channels-last is one segment of N*T*H*W rows whose channels are contiguous; contiguous is
N segments of T*H*W contiguous rows, one channel a program. Grid: (tile of ROWS rows, block of channels).

Traffic in units of y: training forward reads 2 and writes 1 (+1 residual); evaluation reads 1, writes 1 (+1);
backward reads 4 and writes 1 (dz, y twice; dy), with a residual 6 and 2, without y 2 and 1. No atomics: every sum has
a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import _activate, _activation_grad, _affine


@triton.jit
def _tile(length, tiles_per_segment, stride_segment, stride_row, stride_channel, C,
          ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """This program's first element (int64), rows left, and int32 offsets and masks within the tile."""
    pid_tile = tl.program_id(0).to(tl.int64)
    pid_c = tl.program_id(1).to(tl.int64)
    start = (pid_tile % tiles_per_segment) * ROWS
    segment = pid_tile // tiles_per_segment
    base = segment * stride_segment + start * stride_row + pid_c * BLOCK_C * stride_channel
    left = tl.minimum(length - start, ROWS).to(tl.int32)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs = offs_m[:, None] * stride_row + offs_c[None, :] * stride_channel
    channels = pid_c * BLOCK_C + offs_c
    return base, left, offs_m, offs, channels, channels < C


@triton.jit
def _bn_stats_kernel(
    y_ptr,  # [N, K, T, H, W], either layout
    part_ptr,  # [tiles, 3, K]: of a tile's rows the mean's rounding, the mean, M2
    C, length, tiles_per_segment, stride_segment, stride_row, stride_channel,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    base, left, offs_m, offs, channels, mask_c = _tile(
        length, tiles_per_segment, stride_segment, stride_row, stride_channel, C, ROWS, BLOCK_M, BLOCK_C
    )  # fmt: skip
    # Welford down each lane's own rows, so that lanes meet only once, at the end; relative to the tile's first
    # row, so that a large common mean costs no digits.
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    seen = 0.0
    y_ptr += base
    origin = tl.load(y_ptr + tl.arange(0, BLOCK_C) * stride_channel, mask=mask_c, other=0.0).to(
        ACC
    )[None, :]
    for first in range(0, left, BLOCK_M):
        mask = (first + offs_m < left)[:, None] & mask_c[None, :]
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(ACC) - origin
        delta = y - mean
        seen += 1.0
        step = delta / seen
        mean = tl.where(mask, mean + step, mean)
        m2 = tl.where(mask, m2 + delta * (delta - step), m2)
        y_ptr += BLOCK_M * stride_row
    # Chan's merge of the lanes: counts differ where the tile's tail is ragged.
    count = ((left - offs_m + BLOCK_M - 1) // BLOCK_M).to(ACC)
    count = tl.maximum(count, 0.0)[:, None]
    tile_mean = tl.sum(mean * count, axis=0) / left.to(ACC)
    delta = mean - tile_mean[None, :]
    tile_m2 = tl.sum(m2 + delta * delta * count, axis=0)
    origin = tl.sum(origin, axis=0)
    rounded = tile_mean + origin
    moved = rounded - origin
    low = (origin - (rounded - moved)) + (tile_mean - moved)
    out = part_ptr + tl.program_id(0).to(tl.int64) * 3 * C + channels
    tl.store(out, low, mask=mask_c)
    tl.store(out + C, rounded, mask=mask_c)
    tl.store(out + 2 * C, tile_m2, mask=mask_c)


@triton.jit
def _bn_finalize_kernel(
    part_ptr,  # [tiles, 3, K]: the mean's rounding, the mean, M2
    mean_ptr, invstd_ptr,  # [K], written
    running_mean_ptr, running_var_ptr,  # [K], updated in place
    bias_ptr,  # [K]: the convolution's, which y leaves out
    C, tiles, tiles_per_segment, length, total,
    momentum, momentum_low,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_RUNNING: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channels < C
    offs_t = tl.arange(0, BLOCK_T)
    count_all = tl.zeros((1,), dtype=ACC) + total
    # Means are merged relative to the first tile's: a large common mean costs no digits.
    origin = tl.load(part_ptr + C + channels, mask=mask_c, other=0.0)
    moved = tl.zeros((BLOCK_C,), dtype=ACC)
    for first in range(0, tiles, BLOCK_T):
        tile = first + offs_t
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = part_ptr + tile.to(tl.int64)[:, None] * 3 * C + channels[None, :]
        rows = tl.minimum(length - (tile % tiles_per_segment).to(tl.int64) * ROWS, ROWS).to(ACC)
        off = tl.load(at + C, mask=mask, other=0.0) - origin[None, :]
        off += tl.load(at, mask=mask, other=0.0)
        moved += tl.sum(tl.where(mask, off * rows[:, None], 0.0), axis=0)
    mean = origin + moved / count_all
    m2 = tl.zeros((BLOCK_C,), dtype=ACC)
    for first in range(0, tiles, BLOCK_T):
        tile = first + offs_t
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = part_ptr + tile.to(tl.int64)[:, None] * 3 * C + channels[None, :]
        rows = tl.minimum(length - (tile % tiles_per_segment).to(tl.int64) * ROWS, ROWS).to(ACC)
        # A tile's mean rounded would enter the variance to first order.
        delta = tl.load(at + C, mask=mask, other=0.0) - mean[None, :]
        delta += tl.load(at, mask=mask, other=0.0)
        tile_m2 = tl.load(at + 2 * C, mask=mask, other=0.0)
        m2 += tl.sum(tl.where(mask, tile_m2 + delta * delta * rows[:, None], 0.0), axis=0)
    variance = m2 / count_all
    tl.store(mean_ptr + channels, mean, mask=mask_c)
    invstd = 1.0 / tl.sqrt(variance + EPS)
    tl.store(invstd_ptr + channels, invstd, mask=mask_c)
    if HAS_RUNNING:
        rate = tl.zeros((1,), dtype=ACC) + momentum + momentum_low
        seen = mean
        if HAS_BIAS:
            seen += tl.load(bias_ptr + channels, mask=mask_c, other=0.0).to(ACC)
        old_mean = tl.load(running_mean_ptr + channels, mask=mask_c, other=0.0).to(ACC)
        old_var = tl.load(running_var_ptr + channels, mask=mask_c, other=0.0).to(ACC)
        unbiased = m2 / tl.maximum(count_all - 1.0, 1.0)
        new_mean = old_mean + rate * (seen - old_mean)
        new_var = old_var + rate * (unbiased - old_var)
        tl.store(running_mean_ptr + channels, new_mean, mask=mask_c)
        tl.store(running_var_ptr + channels, new_var, mask=mask_c)


@triton.jit
def _bn_act_fwd_kernel(
    y_ptr, residual_ptr, z_ptr,  # [N, K, T, H, W], one layout
    mean_ptr, invstd_ptr,  # [K]; with INVSTD_IS_VAR the second holds the variance
    weight_ptr, bias_ptr,  # [K]
    C, length, tiles_per_segment, stride_segment, stride_row, stride_channel,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    EPS: tl.constexpr, INVSTD_IS_VAR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    base, left, offs_m, offs, channels, mask_c = _tile(
        length, tiles_per_segment, stride_segment, stride_row, stride_channel, C, ROWS, BLOCK_M, BLOCK_C
    )  # fmt: skip
    mean, invstd, weight, bias = _affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, mask_c, EPS,
        INVSTD_IS_VAR, HAS_WEIGHT, HAS_BIAS, ACC,
    )  # fmt: skip
    scale = invstd * weight
    for first in range(0, left, BLOCK_M):
        mask = (first + offs_m < left)[:, None] & mask_c[None, :]
        at = base + first * stride_row
        y = tl.load(y_ptr + at + offs, mask=mask, other=0.0).to(ACC)
        out = (y - mean) * scale + bias
        if HAS_RESIDUAL:
            out += tl.load(residual_ptr + at + offs, mask=mask, other=0.0).to(ACC)
        tl.store(z_ptr + at + offs, _activate(out, ACTIVATION, SLOPE), mask=mask)


@triton.jit
def _masked_grad(dz_ptr, y_ptr, other_ptr, at, mask, mean, invstd, weight, bias,
                 MASK: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The gradient before the activation, and xhat. MASK: what the activation's derivative is taken from:
    "y" alone, "residual" (y and the residual) or "output" (z, whose sign is the pre-activation's)."""
    dz = tl.load(dz_ptr + at, mask=mask, other=0.0).to(ACC)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
    xhat = (y - mean) * invstd
    pre = (y - mean) * (invstd * weight) + bias
    if MASK == "residual":
        pre += tl.load(other_ptr + at, mask=mask, other=0.0).to(ACC)
    if MASK == "output":
        pre = tl.load(other_ptr + at, mask=mask, other=0.0).to(ACC)
    da = _activation_grad(dz, pre, ACTIVATION, SLOPE)
    return da, xhat


@triton.jit
def _bn_act_bwd_reduce_kernel(
    dz_ptr, y_ptr, other_ptr,  # [N, K, T, H, W], one layout
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr,  # [K]
    part_ptr,  # [tiles, 2, K]: sum of da and of da * xhat over a tile's rows
    C, length, tiles_per_segment, stride_segment, stride_row, stride_channel,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    base, left, offs_m, offs, channels, mask_c = _tile(
        length, tiles_per_segment, stride_segment, stride_row, stride_channel, C, ROWS, BLOCK_M, BLOCK_C
    )  # fmt: skip
    mean, invstd, weight, bias = _affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, mask_c, 0.0,
        False, HAS_WEIGHT, HAS_BIAS, ACC,
    )  # fmt: skip
    sum_da = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    sum_da_xhat = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for first in range(0, left, BLOCK_M):
        mask = (first + offs_m < left)[:, None] & mask_c[None, :]
        at = base + first * stride_row + offs
        da, xhat = _masked_grad(
            dz_ptr, y_ptr, other_ptr, at, mask, mean, invstd, weight, bias,
            MASK, ACTIVATION, SLOPE, ACC,
        )  # fmt: skip
        sum_da += tl.where(mask, da, 0.0)
        sum_da_xhat += tl.where(mask, da * xhat, 0.0)
    out = part_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channels
    tl.store(out, tl.sum(sum_da, axis=0), mask=mask_c)
    tl.store(out + C, tl.sum(sum_da_xhat, axis=0), mask=mask_c)


@triton.jit
def _act_bwd_kernel(
    dz_ptr, z_ptr,  # [N, K, T, H, W], one layout
    da_ptr,  # [N, K, T, H, W], written where the activation changes dz
    part_ptr,  # [tiles, 2, K]: sum of da over a tile's rows, and zero
    C, length, tiles_per_segment, stride_segment, stride_row, stride_channel,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    base, left, offs_m, offs, channels, mask_c = _tile(
        length, tiles_per_segment, stride_segment, stride_row, stride_channel, C, ROWS, BLOCK_M, BLOCK_C
    )  # fmt: skip
    sum_da = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for first in range(0, left, BLOCK_M):
        mask = (first + offs_m < left)[:, None] & mask_c[None, :]
        at = base + first * stride_row + offs
        da = tl.load(dz_ptr + at, mask=mask, other=0.0).to(ACC)
        if ACTIVATION != "":
            z = tl.load(z_ptr + at, mask=mask, other=0.0).to(ACC)
            da = _activation_grad(da, z, ACTIVATION, SLOPE)
            tl.store(da_ptr + at, da, mask=mask)
        sum_da += da
    out = part_ptr + tl.program_id(0).to(tl.int64) * 2 * C + channels
    tl.store(out, tl.sum(sum_da, axis=0), mask=mask_c)
    tl.store(out + C, tl.zeros((BLOCK_C,), dtype=ACC), mask=mask_c)


@triton.jit
def _bn_act_bwd_finalize_kernel(
    part_ptr,  # [tiles, 2, K]
    sums_ptr,  # [2, K]: sum of da and of da * xhat
    dweight_ptr, dbias_ptr,  # [K], in the parameters' dtypes
    C, tiles,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channels < C
    sum_da = tl.zeros((BLOCK_C,), dtype=ACC)
    sum_da_xhat = tl.zeros((BLOCK_C,), dtype=ACC)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = part_ptr + tile.to(tl.int64)[:, None] * 2 * C + channels[None, :]
        sum_da += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        sum_da_xhat += tl.sum(tl.load(at + C, mask=mask, other=0.0), axis=0)
    tl.store(sums_ptr + channels, sum_da, mask=mask_c)
    tl.store(sums_ptr + C + channels, sum_da_xhat, mask=mask_c)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + channels, sum_da_xhat, mask=mask_c)
    if HAS_BIAS:
        tl.store(dbias_ptr + channels, sum_da, mask=mask_c)


@triton.jit
def _bn_act_bwd_apply_kernel(
    dz_ptr, y_ptr, other_ptr,  # [N, K, T, H, W], one layout
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr,  # [K]
    sums_ptr,  # [2, K]
    dy_ptr, dresidual_ptr,  # [N, K, T, H, W]
    total,
    C, length, tiles_per_segment, stride_segment, stride_row, stride_channel,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, BATCH_STATS: tl.constexpr,
    NEEDS_DY: tl.constexpr, NEEDS_DRESIDUAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    base, left, offs_m, offs, channels, mask_c = _tile(
        length, tiles_per_segment, stride_segment, stride_row, stride_channel, C, ROWS, BLOCK_M, BLOCK_C
    )  # fmt: skip
    mean, invstd, weight, bias = _affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, mask_c, 0.0,
        False, HAS_WEIGHT, HAS_BIAS, ACC,
    )  # fmt: skip
    scale = invstd * weight
    if BATCH_STATS and NEEDS_DY:
        count = tl.zeros((1,), dtype=ACC) + total
        mean_da = tl.load(sums_ptr + channels, mask=mask_c, other=0.0) / count
        mean_da_xhat = tl.load(sums_ptr + C + channels, mask=mask_c, other=0.0) / count
    for first in range(0, left, BLOCK_M):
        mask = (first + offs_m < left)[:, None] & mask_c[None, :]
        at = base + first * stride_row + offs
        da, xhat = _masked_grad(
            dz_ptr, y_ptr, other_ptr, at, mask, mean, invstd, weight, bias,
            MASK, ACTIVATION, SLOPE, ACC,
        )  # fmt: skip
        if NEEDS_DRESIDUAL:
            tl.store(dresidual_ptr + at, da, mask=mask)
        if NEEDS_DY:
            if BATCH_STATS:
                da = da - mean_da[None, :] - xhat * mean_da_xhat[None, :]
            tl.store(dy_ptr + at, da * scale, mask=mask)
