"""The weight's gradient as an implicit GEMM, channels innermost: Triton kernels. ``gemm.py`` launches them.

For each tap, dW[K, C] = dY^T x over the output pixels. The pixels are split into chunks, one program each, whose
fp32 partials a second kernel adds in a fixed order. SHARE taps of a program use one tile of dY.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .coordinates import clamped_pixel, is_inside, output_place, pixel_number


@triton.jit
def _carry(at, step, end, span):
    """One digit of a row's place moved on: the digit, and whether it passed its end."""
    at += step
    carry = (at >= end).to(tl.int32)
    return at - carry * span, carry


@triton.jit
def _tap(first, NEXT: tl.constexpr, WINDOW: tl.constexpr, SHARE: tl.constexpr):
    """kt, kh, kw of the tap NEXT after a program's first; past the last tap, of the last: read, but not stored."""
    KH: tl.constexpr = WINDOW.kernel[1]
    KW: tl.constexpr = WINDOW.kernel[2]
    if KW % SHARE == 0:  # of one row of taps, seen to share kt and kh
        return first // (KH * KW), first // KW % KH, first % KW + NEXT
    else:
        tap = tl.minimum(first + NEXT, WINDOW.kernel[0] * KH * KW - 1)
        return tap // (KH * KW), tap // KW % KH, tap % KW


@triton.jit
def _x_tile(
    x_ptr, pixel, n, t, h, w, mask_m, first_tap, offs_c, T, H, W, NEXT: tl.constexpr, SHARE: tl.constexpr,
    C: tl.constexpr, READ: tl.constexpr, WINDOW: tl.constexpr, READS: tl.constexpr, STRIDE_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_M, BLOCK_C] as one tap meets it; t, h, w are where tap (0, 0, 0) falls."""
    kt, kh, kw = _tap(first_tap, NEXT, WINDOW, SHARE)
    valid = mask_m
    if READS == "clamped":
        pixel = clamped_pixel(n, t, h, w, kt, kh, kw, T, H, W, WINDOW)
    else:
        kt *= WINDOW.dilation[0]
        kh *= WINDOW.dilation[1]
        kw *= WINDOW.dilation[2]
        x_ptr += pixel_number(0, kt.to(tl.int64), kh, kw, T, H, W) * STRIDE_X
        if READS == "masked":
            valid &= is_inside(t + kt, T, WINDOW.before[0], WINDOW.after[0])
            valid &= is_inside(h + kh, H, WINDOW.before[1], WINDOW.after[1])
            valid &= is_inside(w + kw, W, WINDOW.before[2], WINDOW.after[2])
    mask = valid[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (offs_c < READ)[None, :]
    return tl.load(x_ptr + pixel[:, None] * STRIDE_X + offs_c[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "H", "W", "TO", "HO", "WO", "M", "chunk"])
def _conv3d_gemm_wgrad_kernel(
    x_ptr,  # [N, T, H, W, C of all groups], STRIDE_X elements a pixel
    dy_ptr,  # [N, T', H', W', K of all groups], STRIDE_DY elements a pixel
    part_ptr,  # [splits, K of all groups, taps, C]
    T, H, W, TO, HO, WO, M, chunk,
    C: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, READS: tl.constexpr,  # C and K of a group
    STRIDE_X: tl.constexpr, STRIDE_DY: tl.constexpr, READ_X: tl.constexpr, READ_DY: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = WINDOW.kernel[0] * WINDOW.kernel[1] * WINDOW.kernel[2]
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    FILTERS: tl.constexpr = K * WINDOW.groups

    # All programs of a chunk run side by side: they read the same rows.
    pid = tl.program_id(0)
    split = tl.program_id(1)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_n = pid // TILES_C % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // (TILES_C * TILES_N)
    group = pid % WINDOW.groups
    tap = pid // WINDOW.groups * SHARE

    offs_m = tl.arange(0, BLOCK_M)
    start = split * chunk
    end = tl.minimum(start + chunk, M)
    row = start + offs_m
    n, t, h, w = output_place(row, TO, HO, WO)
    t = t * WINDOW.stride[0] - WINDOW.before[0]
    h = h * WINDOW.stride[1] - WINDOW.before[1]
    w = w * WINDOW.stride[2] - WINDOW.before[2]
    # BLOCK_M rows as a place on x's map: the loop moves rows on by adding it, with carries, not by division.
    step_n, step_t, step_h, step_w = output_place(BLOCK_M, TO, HO, WO)
    step_t *= WINDOW.stride[0]
    step_h *= WINDOW.stride[1]
    step_w *= WINDOW.stride[2]
    span_t = TO * WINDOW.stride[0]
    span_h = HO * WINDOW.stride[1]
    span_w = WO * WINDOW.stride[2]

    x_ptr += group * C
    dy_ptr += start.to(tl.int64) * STRIDE_DY + group * K
    dy_offs = offs_m[:, None] * STRIDE_DY + offs_n[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    acc_1 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    acc_2 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    for first in range(start, end, BLOCK_M):
        mask_m = first + offs_m < end
        mask_dy = mask_m[:, None]
        if K % BLOCK_N != 0:
            mask_dy = mask_dy & (offs_n < READ_DY)[None, :]
        dy = tl.trans(tl.load(dy_ptr + dy_offs, mask=mask_dy, other=0.0))
        at = n.to(INDEX)
        if READS == "rows":
            pixel = (first + offs_m).to(INDEX)
        else:
            pixel = pixel_number(at, t, h, w, T, H, W)
        x = _x_tile(
            x_ptr, pixel, at, t, h, w, mask_m, tap, offs_c,
            T, H, W, 0, SHARE, C, READ_X, WINDOW, READS, STRIDE_X, BLOCK_C,
        )  # fmt: skip
        acc = dot(dy, x, acc, PRECISION)
        if SHARE > 1:
            x = _x_tile(
                x_ptr, pixel, at, t, h, w, mask_m, tap, offs_c,
                T, H, W, 1, SHARE, C, READ_X, WINDOW, READS, STRIDE_X, BLOCK_C,
            )  # fmt: skip
            acc_1 = dot(dy, x, acc_1, PRECISION)
        if SHARE > 2:
            x = _x_tile(
                x_ptr, pixel, at, t, h, w, mask_m, tap, offs_c,
                T, H, W, 2, SHARE, C, READ_X, WINDOW, READS, STRIDE_X, BLOCK_C,
            )  # fmt: skip
            acc_2 = dot(dy, x, acc_2, PRECISION)
        w, carry = _carry(w, step_w, span_w - WINDOW.before[2], span_w)
        h, carry = _carry(h, step_h + carry * WINDOW.stride[1], span_h - WINDOW.before[1], span_h)
        t, carry = _carry(t, step_t + carry * WINDOW.stride[0], span_t - WINDOW.before[0], span_t)
        n += step_n + carry
        dy_ptr += BLOCK_M * STRIDE_DY

    filters = group * K + offs_n
    part_ptr += split.to(tl.int64) * (FILTERS * TAPS * C) + tap * C
    out = part_ptr + filters[:, None] * (TAPS * C) + offs_c[None, :]
    mask = (offs_n < K)[:, None] & (offs_c < C)[None, :]
    tl.store(out, acc, mask=mask)
    if SHARE > 1:
        tl.store(out + C, acc_1, mask=mask & (tap + 1 < TAPS))
    if SHARE > 2:
        tl.store(out + 2 * C, acc_2, mask=mask & (tap + 2 < TAPS))


@triton.jit(do_not_specialize=["splits"])
def _conv3d_gemm_wgrad_reduce_kernel(
    part_ptr,  # [splits, total]
    dw_ptr,  # [total]
    total, splits,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    acc = tl.zeros((BLOCK,), dtype=ACC)
    part_ptr += offs
    for _ in range(0, splits):
        acc += tl.load(part_ptr, mask=mask, other=0.0)
        part_ptr += total
    tl.store(dw_ptr + offs, acc, mask=mask)
