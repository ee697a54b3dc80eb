"""The weight's gradient as an implicit GEMM, channels innermost: Triton kernels. ``gemm.py`` launches them.

For each tap, dW[K, C] = dY^T x over the output pixels. The pixels are split into chunks, one program each, whose
fp32 partials a second kernel adds in a fixed order. SHARE taps of a program use one tile of dY.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .gemm_kernels import _clamped, _decode, _inside, _pixel


@triton.jit
def _x_tile(
    x_ptr, pixel, row, n, t, h, w, T, H, W, tap, offs_c, mask_m, C, READ: tl.constexpr,
    WINDOW: tl.constexpr, READS: tl.constexpr, STRIDE_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_M, BLOCK_C] as one tap meets it."""
    KH: tl.constexpr = WINDOW.kernel[1]
    KW: tl.constexpr = WINDOW.kernel[2]
    kt = tap // (KH * KW)
    kh = tap // KW % KH
    kw = tap % KW
    valid = mask_m
    if READS == "clamped":
        pixel = _clamped(n, t, h, w, kt, kh, kw, T, H, W, WINDOW)
    else:
        dt = kt * WINDOW.dilation[0]
        dh = kh * WINDOW.dilation[1]
        dw = kw * WINDOW.dilation[2]
        x_ptr += _pixel(0, dt.to(tl.int64), dh, dw, T, H, W) * STRIDE_X
        if READS == "masked":
            valid &= _inside(t + dt, T, WINDOW.before[0], WINDOW.after[0])
            valid &= _inside(h + dh, H, WINDOW.before[1], WINDOW.after[1])
            valid &= _inside(w + dw, W, WINDOW.before[2], WINDOW.after[2])
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
    n, t, h, w = _decode(start + offs_m, TO, HO, WO)
    # BLOCK_M as an output pixel's coordinates: the loop moves rows on by adding it, with carries, not by division.
    step_n, step_t, step_h, step_w = _decode(BLOCK_M, TO, HO, WO)

    x_ptr += group * C
    dy_ptr += start.to(tl.int64) * STRIDE_DY + group * K
    dy_offs = offs_m[:, None] * STRIDE_DY + offs_n[None, :]
    last = TAPS - 1
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    acc_1 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    acc_2 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    for first in range(start, end, BLOCK_M):
        row = first + offs_m
        mask_m = row < end
        mask_dy = mask_m[:, None]
        if K % BLOCK_N != 0:
            mask_dy = mask_dy & (offs_n < READ_DY)[None, :]
        dy = tl.trans(tl.load(dy_ptr + dy_offs, mask=mask_dy, other=0.0))
        at_t = t * WINDOW.stride[0] - WINDOW.before[0]
        at_h = h * WINDOW.stride[1] - WINDOW.before[1]
        at_w = w * WINDOW.stride[2] - WINDOW.before[2]
        at_n = n.to(INDEX)
        if READS == "rows":
            pixel = row.to(INDEX)
        else:
            pixel = _pixel(at_n, at_t, at_h, at_w, T, H, W)
        x = _x_tile(
            x_ptr, pixel, row, at_n, at_t, at_h, at_w, T, H, W, tap, offs_c, mask_m, C, READ_X,
            WINDOW, READS, STRIDE_X, BLOCK_C,
        )  # fmt: skip
        acc = dot(dy, x, acc, PRECISION)
        if SHARE > 1:
            x = _x_tile(
                x_ptr, pixel, row, at_n, at_t, at_h, at_w, T, H, W, tl.minimum(tap + 1, last),
                offs_c, mask_m, C, READ_X, WINDOW, READS, STRIDE_X, BLOCK_C,
            )  # fmt: skip
            acc_1 = dot(dy, x, acc_1, PRECISION)
        if SHARE > 2:
            x = _x_tile(
                x_ptr, pixel, row, at_n, at_t, at_h, at_w, T, H, W, tl.minimum(tap + 2, last),
                offs_c, mask_m, C, READ_X, WINDOW, READS, STRIDE_X, BLOCK_C,
            )  # fmt: skip
            acc_2 = dot(dy, x, acc_2, PRECISION)
        w += step_w
        carry = (w >= WO).to(tl.int32)
        w -= carry * WO
        h += step_h + carry
        carry = (h >= HO).to(tl.int32)
        h -= carry * HO
        t += step_t + carry
        carry = (t >= TO).to(tl.int32)
        t -= carry * TO
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
