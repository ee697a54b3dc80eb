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
from .elementwise import _activate

SET = tl.constexpr(32)  # taps in one set of bits


@triton.jit
def _decode(row, TO, HO, WO):
    """n, t, h, w of an output pixel."""
    w = row % WO
    row = row // WO
    h = row % HO
    row = row // HO
    return row // TO, row % TO, h, w


@triton.jit
def _inside(at, size, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Whether a coordinate is on the map; an axis without padding cannot leave it."""
    if BEFORE > 0 or AFTER > 0:
        return at.to(tl.uint32) < size.to(
            tl.uint32
        )  # one comparison: what is negative becomes large
    else:
        return at == at


@triton.jit
def _axis_bits(first, size, WINDOW: tl.constexpr, AXIS: tl.constexpr):
    """One bit for each tap of an axis; ``first`` is tap 0's coordinate."""
    KERNEL: tl.constexpr = WINDOW.kernel[AXIS]
    bits = tl.zeros(first.shape, dtype=tl.int32)
    for k in tl.static_range(KERNEL):
        at = first + k * WINDOW.dilation[AXIS]
        inside = _inside(at, size, WINDOW.before[AXIS], WINDOW.after[AXIS])
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


@triton.jit
def _pixel(n, t, h, w, T, H, W):
    """A pixel's number; n is int64 where the map can pass 2^31 elements."""
    return ((n * T + t) * H + h) * W + w


@triton.jit
def _clamp(at, size, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    if BEFORE > 0 or AFTER > 0:
        at = tl.minimum(tl.maximum(at, 0), size - 1)
    return at


@triton.jit
def _clamped(n, t, h, w, kt, kh, kw, T, H, W, WINDOW: tl.constexpr):
    """The pixel a tap reads where padding repeats the border."""
    t = _clamp(t + kt * WINDOW.dilation[0], T, WINDOW.before[0], WINDOW.after[0])
    h = _clamp(h + kh * WINDOW.dilation[1], H, WINDOW.before[1], WINDOW.after[1])
    w = _clamp(w + kw * WINDOW.dilation[2], W, WINDOW.before[2], WINDOW.after[2])
    return _pixel(n, t, h, w, T, H, W)


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
    """Mean and M2 of the tile's rows; the mean in two steps, for under a large one a sum's rounding shows."""
    rows = left.to(y.dtype)
    mean = tl.sum(tl.where(mask_m, y, 0.0), axis=0) / rows
    delta = tl.where(mask_m, y - mean[None, :], 0.0)
    off = tl.sum(delta, axis=0) / rows
    tl.store(part_ptr + filters, mean + off, mask=mask_n)
    m2 = tl.sum(delta * delta, axis=0) - rows * off * off
    tl.store(part_ptr + FILTERS + filters, m2, mask=mask_n)


@triton.jit
def _finish(
    acc, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
    pid_m, first, group, M,
    K: tl.constexpr, FILTERS: tl.constexpr, STRIDE_RESIDUAL: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FINISHED: tl.constexpr,
):  # fmt: skip
    """Everything after the sums, of the columns from ``first`` on: few at once, so that registers suffice."""
    AT_ONCE: tl.constexpr = FINISHED if part_ptr is None else FINISHED // 2
    if BLOCK_N > AT_ONCE:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        _finish(
            left, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
            pid_m, first, group, M, K, FILTERS, STRIDE_RESIDUAL, EPS, ACTIVATION, SLOPE, ACC,
            BLOCK_M, BLOCK_N // 2, FINISHED,
        )  # fmt: skip
        _finish(
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
            part_ptr += pid_m.to(tl.int64) * 2 * FILTERS
            _store_statistics(y.to(ACC), part_ptr, left, mask_m, filters, mask_n, FILTERS)
        tl.store(z_ptr + pixels * FILTERS + filters[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["T", "H", "W", "TO", "HO", "WO", "M"])
def _conv3d_gemm_fwd_kernel(
    x_ptr,  # [N, T, H, W, C of all groups], STRIDE_X elements a pixel
    w_ptr,  # [K of all groups, taps, PACKED]: channels past C are zero
    z_ptr,  # [N, T', H', W', K of all groups]
    bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr,  # [K of all groups]
    residual_ptr,  # like z, STRIDE_RESIDUAL elements a pixel
    part_ptr,  # [tiles of rows, 2, K of all groups]; where given, y is stored as it is, and its statistics here
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
        n, t, h, w = _decode(row, TO, HO, WO)
        n = n.to(tl.int64)
        t = t * WINDOW.stride[0] - WINDOW.before[0]
        h = h * WINDOW.stride[1] - WINDOW.before[1]
        w = w * WINDOW.stride[2] - WINDOW.before[2]
        pixel = _pixel(n, t, h, w, T, H, W)
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
            at = _clamped(n, t, h, w, kt, kh, kw, T, H, W, WINDOW)
            a_ptrs = x_ptr + at[:, None] * STRIDE_X + (first + offs_k)[None, :]
        else:
            moved = _pixel(
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

    _finish(
        acc, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
        pid_m, pid_n * BLOCK_N, group, M,
        K, K * WINDOW.groups, STRIDE_RESIDUAL, EPS, ACTIVATION, SLOPE, ACC,
        BLOCK_M, BLOCK_N, FINISHED,
    )  # fmt: skip
