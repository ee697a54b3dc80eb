"""What a matrix product's tile becomes: normalised and activated, or stored with its statistics. In Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .elementwise import _activate

FINISHED = 1024  # sums a warp finishes at once, 32 a thread; half with statistics


def finished(config: dict[str, Any], least: int) -> int:
    """Columns of a tile that are finished at once."""
    return max(least, FINISHED * config["num_warps"] // config["BLOCK_M"])


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's left and right columns; of an accumulator, other registers of the same threads."""
    tile = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    return tl.split(tile)


@triton.jit
def _affine_act(
    acc, offs_residual, mask, filters, mask_n, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr,
    residual_ptr, EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """act(((acc + bias) - mean) / std * bn_weight + bn_bias + residual); absent parts (None) cost nothing."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + filters, mask=mask_n, other=0.0).to(ACC)[None, :]
    if mean_ptr is not None:
        acc -= tl.load(mean_ptr + filters, mask=mask_n, other=0.0).to(ACC)[None, :]
        variance = tl.load(variance_ptr + filters, mask=mask_n, other=1.0).to(ACC)
        scale = 1.0 / tl.sqrt(variance + EPS)
        if bn_weight_ptr is not None:
            scale *= tl.load(bn_weight_ptr + filters, mask=mask_n, other=1.0).to(ACC)
        acc *= scale[None, :]
        if bn_bias_ptr is not None:
            acc += tl.load(bn_bias_ptr + filters, mask=mask_n, other=0.0).to(ACC)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs_residual, mask=mask, other=0.0).to(ACC)
    return _activate(acc, ACTIVATION, SLOPE)


@triton.jit
def _store_statistics(y, part_ptr, left, mask_m, filters, mask_n, FILTERS: tl.constexpr):
    """Of the tile's rows the mean's rounding, the mean and M2. Under a large mean rounding shows: the mean is taken in
    two steps, and what its sum rounds off is kept.
    """
    rows = left.to(y.dtype)
    mean = tl.sum(tl.where(mask_m, y, 0.0), axis=0) / rows
    delta = tl.where(mask_m, y - mean[None, :], 0.0)
    off = tl.sum(delta, axis=0) / rows
    rounded = mean + off
    tl.store(part_ptr + filters, off - (rounded - mean), mask=mask_n)
    tl.store(part_ptr + FILTERS + filters, rounded, mask=mask_n)
    m2 = tl.sum(delta * delta, axis=0) - rows * off * off
    tl.store(part_ptr + 2 * FILTERS + filters, m2, mask=mask_n)


@triton.jit
def finish(
    acc, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
    pid_m, first, group, M,
    K: tl.constexpr, FILTERS: tl.constexpr, STRIDE_RESIDUAL: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FINISHED: tl.constexpr,
):  # fmt: skip
    """Everything after the sums, of the columns from ``first`` on: FINISHED at once, so that registers suffice."""
    AT_ONCE: tl.constexpr = FINISHED if part_ptr is None else FINISHED // 2
    if BLOCK_N > AT_ONCE:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        finish(
            left, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
            pid_m, first, group, M, K, FILTERS, STRIDE_RESIDUAL, EPS, ACTIVATION, SLOPE, ACC,
            BLOCK_M, BLOCK_N // 2, FINISHED,
        )  # fmt: skip
        finish(
            right, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
            pid_m, first + BLOCK_N // 2, group, M, K, FILTERS, STRIDE_RESIDUAL, EPS, ACTIVATION, SLOPE, ACC,
            BLOCK_M, BLOCK_N // 2, FINISHED,
        )  # fmt: skip
    else:
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_m = (offs_m < M)[:, None]
        mask_n = offs_n < K
        mask = mask_m & mask_n[None, :]
        filters = group * K + offs_n
        pixels = offs_m.to(tl.int64)[:, None]
        if part_ptr is None:
            offs_residual = pixels * STRIDE_RESIDUAL + filters[None, :]
            y = _affine_act(
                acc, offs_residual, mask, filters, mask_n, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr,
                bn_bias_ptr, residual_ptr, EPS, ACTIVATION, SLOPE, ACC,
            ).to(z_ptr.dtype.element_ty)  # fmt: skip
        else:
            # Of the values as stored: those are what will be normalised.
            y = acc.to(z_ptr.dtype.element_ty)
            left = tl.minimum(M - pid_m * BLOCK_M, BLOCK_M)
            part_ptr += pid_m.to(tl.int64) * 3 * FILTERS
            _store_statistics(y.to(ACC), part_ptr, left, mask_m, filters, mask_n, FILTERS)
        tl.store(z_ptr + pixels * FILTERS + filters[None, :], y, mask=mask)
