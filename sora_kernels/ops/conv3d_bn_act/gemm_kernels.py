"""Implicit-GEMM convolution, channels innermost: Triton kernel. ``gemm.py`` plans and launches it.

GEMM rows are the N*T'*H'*W' output pixels, columns a group's filters; the reduction walks taps outside, channels
inside, so that loads are contiguous and a tap's rows are, but for one pixel, those the tap before left in L2. What a
tap needs of a row is worked out once, before the loop: the row's first element (int64) and one bit a tap for whether
it falls on the map. In the loop a tap is one scalar offset and one bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .coordinates import clamped_pixel, is_inside, output_place, pixel_number
from .epilogue import finish

SET = tl.constexpr(32)  # taps in one set of bits


@triton.jit
def _axis_bits(first, size, WINDOW: tl.constexpr, AXIS: tl.constexpr):
    """One bit for each tap of an axis; ``first`` is tap 0's coordinate."""
    KERNEL: tl.constexpr = WINDOW.kernel[AXIS]
    bits = tl.zeros(first.shape, dtype=tl.int32)
    for k in tl.static_range(KERNEL):
        at = first + k * WINDOW.dilation[AXIS]
        inside = is_inside(at, size, WINDOW.before[AXIS], WINDOW.after[AXIS])
        bits |= inside.to(tl.int32) << k
    return bits


@triton.jit
def _spread(outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """The bits of two axes as one set, the outer axis' taps INNER apart."""
    bits = tl.zeros(inner.shape, dtype=tl.int32)
    for k in tl.static_range(OUTER):
        bits |= tl.where((outer >> k) & 1 != 0, inner << (k * INNER), 0)
    return bits


@triton.jit
def _tap_bits(t, h, w, T, H, W, WINDOW: tl.constexpr):
    """Which taps fall on the map: one set for them all where it holds them, else one an axis."""
    KT: tl.constexpr = WINDOW.kernel[0]
    KH: tl.constexpr = WINDOW.kernel[1]
    KW: tl.constexpr = WINDOW.kernel[2]
    bits_t = _axis_bits(t, T, WINDOW, 0)
    bits_h = _axis_bits(h, H, WINDOW, 1)
    bits_w = _axis_bits(w, W, WINDOW, 2)
    if KT * KH * KW <= SET:
        bits_w = _spread(bits_t, _spread(bits_h, bits_w, KH, KW), KT, KH * KW)
    return bits_t, bits_h, bits_w


@triton.jit
def _is_valid(bits_t, bits_h, bits_w, tap, kt, kh, kw, WINDOW: tl.constexpr):
    TAPS: tl.constexpr = WINDOW.kernel[0] * WINDOW.kernel[1] * WINDOW.kernel[2]
    if TAPS <= SET:
        return (bits_w >> tap) & 1 != 0
    else:
        return (bits_t >> kt) & (bits_h >> kh) & (bits_w >> kw) & 1 != 0


@triton.jit(do_not_specialize=["T", "H", "W", "TO", "HO", "WO", "M"])
def _conv3d_gemm_fwd_kernel(
    x_ptr,  # [N, T, H, W, C of all groups], STRIDE_X elements a pixel
    w_ptr,  # [K of all groups, taps, PACKED]: channels past C are zero
    z_ptr,  # [N, T', H', W', K of all groups]
    bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr,  # [K of all groups]
    residual_ptr,  # like z, STRIDE_RESIDUAL elements a pixel
    part_ptr,  # [tiles of rows, 3, K of all groups]; where given, y is stored as it is, and its statistics here
    T, H, W, TO, HO, WO, M,
    C: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, READS: tl.constexpr,  # C and K of a group
    STRIDE_X: tl.constexpr, STRIDE_RESIDUAL: tl.constexpr, READ: tl.constexpr, PACKED: tl.constexpr,
    CLEAN: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FINISHED: tl.constexpr,
):  # fmt: skip
    KH: tl.constexpr = WINDOW.kernel[1]
    KW: tl.constexpr = WINDOW.kernel[2]
    TAPS: tl.constexpr = WINDOW.kernel[0] * KH * KW
    COLUMNS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = PACKED // BLOCK_K

    # A tile's columns and groups run side by side: they read the same rows of x.
    pid = tl.program_id(0)
    pid_n = pid % COLUMNS
    group = pid // COLUMNS % WINDOW.groups
    pid_m = pid // (COLUMNS * WINDOW.groups)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat the last one and are not stored, so that no load masks them.
    row = tl.minimum(offs_m, M - 1)
    column = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)

    if READS == "rows":
        pixel = row.to(tl.int64)
    else:
        n, t, h, w = output_place(row, TO, HO, WO)
        n = n.to(tl.int64)
        t = t * WINDOW.stride[0] - WINDOW.before[0]
        h = h * WINDOW.stride[1] - WINDOW.before[1]
        w = w * WINDOW.stride[2] - WINDOW.before[2]
        pixel = pixel_number(n, t, h, w, T, H, W)
        if READS == "masked":
            bits_t, bits_h, bits_w = _tap_bits(t, h, w, T, H, W, WINDOW)

    x_ptr += group * C
    x_ptrs = x_ptr + pixel[:, None] * STRIDE_X + offs_k[None, :]
    w_ptrs = w_ptr + (group * K + column)[None, :] * (TAPS * PACKED) + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(0, TAPS * BLOCKS):
        tap = step // BLOCKS
        first = step % BLOCKS * BLOCK_K
        kt = tap // (KH * KW)
        kh = tap // KW % KH
        kw = tap % KW
        if READS == "clamped":
            at = clamped_pixel(n, t, h, w, kt, kh, kw, T, H, W, WINDOW)
            a_ptrs = x_ptr + at[:, None] * STRIDE_X + (first + offs_k)[None, :]
        else:
            moved = pixel_number(
                0, (kt * WINDOW.dilation[0]).to(tl.int64),
                kh * WINDOW.dilation[1], kw * WINDOW.dilation[2], T, H, W,
            )  # fmt: skip
            a_ptrs = x_ptrs + (moved * STRIDE_X + first)
        if READS == "masked":
            valid = _is_valid(bits_t, bits_h, bits_w, tap, kt, kh, kw, WINDOW)[:, None]
            if C % BLOCK_K != 0:
                valid = valid & (first + offs_k < READ)[None, :]
            a = tl.load(a_ptrs, mask=valid, other=0.0)
        elif C % BLOCK_K != 0:
            a = tl.load(a_ptrs, mask=(first + offs_k < READ)[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs)
        if CLEAN:  # whole vectors were read: what lies past C may be anything, NaN too
            a = tl.where((first + offs_k < C)[None, :], a, 0.0)
        b = tl.load(w_ptrs + step * BLOCK_K)
        acc = dot(a, b, acc, PRECISION)

    finish(
        acc, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
        pid_m, pid_n * BLOCK_N, group, M,
        K, K * WINDOW.groups, STRIDE_RESIDUAL, EPS, ACTIVATION, SLOPE, ACC,
        BLOCK_M, BLOCK_N, FINISHED,
    )  # fmt: skip
