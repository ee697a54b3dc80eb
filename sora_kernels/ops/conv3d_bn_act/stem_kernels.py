"""Convolution of at most four channels, a video network's first: Triton kernel. ``stem.py`` plans and launches it.

With so few channels an implicit GEMM that reduces tap by tap is mostly padding. But with pixels of four elements, the
taps of one row are contiguous in memory: a reduction step takes a row of taps, kw * 4 elements in BLOCK_K, whatever
the stride. The zero padding along w is a mask of whole pixels, so that a load is a pixel wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .coordinates import output_place, pixel_number
from .epilogue import finish

PIXEL = tl.constexpr(4)


@triton.jit(do_not_specialize=["T", "H", "W", "TO", "HO", "WO", "M"])
def _conv3d_stem_fwd_kernel(
    x_ptr,  # [N, T, H, W, 4]
    weight_ptr,  # [K, kt * kh, BLOCK_K]: a row of taps, zeros past it
    z_ptr,  # [N, T', H', W', K]
    bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr,  # [K]
    residual_ptr,  # like z, STRIDE_RESIDUAL elements a pixel
    part_ptr,  # [tiles of rows, 3, K]: statistics; None for the affine epilogue
    T, H, W, TO, HO, WO, M,
    K: tl.constexpr, WINDOW: tl.constexpr, STRIDE_RESIDUAL: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FINISHED: tl.constexpr,
):  # fmt: skip
    KT: tl.constexpr = WINDOW.kernel[0]
    KH: tl.constexpr = WINDOW.kernel[1]
    KW: tl.constexpr = WINDOW.kernel[2]
    COLUMNS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    # Tiles of filters run side by side: they read the same x.
    pid = tl.program_id(0)
    pid_m = (pid // COLUMNS).to(INDEX)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    filters = pid % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and filters past the end repeat the last one and are not stored.
    n, t, h, w = output_place(tl.minimum(offs_m, M - 1), TO, HO, WO)
    t = t * WINDOW.stride[0] - WINDOW.before[0]
    h = h * WINDOW.stride[1] - WINDOW.before[1]
    w = w * WINDOW.stride[2] - WINDOW.before[2]
    kw = offs_k // PIXEL
    at_w = w[:, None] + kw[None, :]
    inside_w = (kw < KW)[None, :] & (at_w >= 0) & (at_w < W)

    x_ptrs = (
        x_ptr + (pixel_number(n.to(tl.int64), t, h, w, T, H, W) * PIXEL)[:, None] + offs_k[None, :]
    )
    weight_ptrs = (
        weight_ptr + tl.minimum(filters, K - 1)[None, :] * (KT * KH * BLOCK_K) + offs_k[:, None]
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(0, KT * KH):
        down_t = step // KH * WINDOW.dilation[0]
        down_h = step % KH * WINDOW.dilation[1]
        inside = (t + down_t >= 0) & (t + down_t < T) & (h + down_h >= 0) & (h + down_h < H)
        moved = (down_t.to(tl.int64) * H + down_h) * W * PIXEL
        a = tl.load(x_ptrs + moved, mask=inside[:, None] & inside_w, other=0.0)
        b = tl.load(weight_ptrs + step * BLOCK_K)
        acc = dot(a, b, acc, PRECISION)

    finish(
        acc, z_ptr, bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr, residual_ptr, part_ptr,
        pid_m, pid % COLUMNS * BLOCK_N, 0, M,
        K, K, STRIDE_RESIDUAL, EPS, ACTIVATION, SLOPE, ACC, BLOCK_M, BLOCK_N, FINISHED,
    )  # fmt: skip
