"""Depthwise convolution, channels innermost: Triton kernels. ``depthwise.py`` plans and launches them.

No tensor cores: a tap is one multiply-add an element, so what counts is how often an element of x is loaded. A lane
makes FRAMES x COLUMNS outputs, neighbours in time and along w; an element that it loads goes to every one of them
that a tap brings it to: for a 3x3x3 kernel and 4 x 2 outputs, 9 loads an output instead of 27. Lanes are numbered
with h innermost, so that the rows which neighbouring lanes share are in L1.

What goes where (which element to which output by which tap) is in depthwise_walk.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .depthwise_walk import (
    element_count,
    element_t,
    element_w,
    piece_count,
    use_count,
    use_output,
    use_tap,
)
from .elementwise import _activate


@triton.jit
def _replaced(values, k: tl.constexpr, value):
    return values[:k] + (value,) + values[k + 1 :]


@triton.jit
def _zeros(like, COUNT: tl.constexpr, ACC: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros(like.shape, dtype=ACC),)  # type: ignore[assignment]
    return values


@triton.jit
def _decode(lane, lanes, TO, HO, WO, WALK: tl.constexpr):
    """A lane's sample (int64), first output in time, h, first output along w. Lanes past the end repeat the last."""
    lane = tl.minimum(lane, lanes - 1)
    groups = tl.cdiv(WO, WALK.columns)
    strips = tl.cdiv(TO, WALK.frames)
    h = lane % HO
    lane = lane // HO
    w = lane % groups * WALK.columns
    lane = lane // groups
    return (lane // strips).to(tl.int64), lane % strips * WALK.frames, h, w


@triton.jit
def _tile(first, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr,
          INDEX: tl.constexpr, WALK: tl.constexpr):  # fmt: skip
    """Lanes [BLOCK_L, 1] and channels [BLOCK_L, BLOCK_C] of a tile.

    A flat tile is BLOCK_L vectors of BLOCK_C channels, of as many lanes as they fill: no channel past C is worked on.
    The other has whole lanes, so that sums over them are sums along an axis.
    """
    offs_l = first + tl.arange(0, BLOCK_L).to(INDEX)[:, None]
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    if FLAT:
        VECTORS: tl.constexpr = (WALK.channels + BLOCK_C - 1) // BLOCK_C
        return offs_l // VECTORS, (offs_l % VECTORS).to(tl.int32) * BLOCK_C + offs_c
    else:
        offs_c = tl.program_id(1) * BLOCK_C + offs_c
        return offs_l, tl.broadcast_to(offs_c, (BLOCK_L, BLOCK_C))


@triton.jit
def _mask_readable(mask, channels, BLOCK_C: tl.constexpr, WALK: tl.constexpr):
    """``mask`` of lanes, narrowed to channels that are there; a flat tile has no others."""
    if WALK.readable % BLOCK_C != 0:
        return mask & (channels < WALK.readable)
    else:
        return mask


@triton.jit
def _load_element(
    x_ptr, n, t, h, w, pixel, e: tl.constexpr, frame, T, W, channels, mask, WALK: tl.constexpr
):
    """Element e of a lane, whose first one of this row of taps is (t, h, w), ``pixel`` from the start; h is valid."""
    AT_T: tl.constexpr = element_t(WALK, e)
    AT_W: tl.constexpr = element_w(WALK, e)
    if WALK.replicate:
        t = tl.minimum(tl.maximum(t + AT_T, 0), T - 1)
        w = tl.minimum(tl.maximum(w + AT_W, 0), W - 1)
        at = n * (frame * T) + t * frame + h.to(tl.int64) * W + w
    else:
        mask = mask & (t + AT_T >= 0) & (t + AT_T < T) & (w + AT_W >= 0) & (w + AT_W < W)
        at = pixel + (frame * AT_T + AT_W)
    return tl.load(x_ptr + (at * WALK.pixel_x + channels), mask=mask, other=0.0)


@triton.jit
def _vector(ptr, channels, mask_c, ACC: tl.constexpr):
    return tl.load(ptr + channels, mask=mask_c, other=0.0).to(ACC)


@triton.jit
def _store_statistics(outputs, masks, part_ptr, channels, WALK: tl.constexpr, ACC: tl.constexpr):
    """Count, mean (what its rounding left out, then itself) and M2 of a tile's outputs, as they were stored."""
    count = tl.sum(masks[0].to(ACC), axis=0)
    total = tl.where(masks[0], outputs[0], 0.0)
    for k in tl.static_range(1, len(outputs)):
        count += tl.sum(masks[k].to(ACC), axis=0)
        total += tl.where(masks[k], outputs[k], 0.0)
    mean = tl.sum(total, axis=0) / count
    low = tl.zeros(outputs[0].shape, dtype=ACC)
    m2 = tl.zeros(outputs[0].shape, dtype=ACC)
    for k in tl.static_range(len(outputs)):
        delta = tl.where(masks[k], outputs[k] - mean[None, :], 0.0)
        low += delta
        m2 += delta * delta
    low = tl.sum(low, axis=0) / count
    m2 = tl.sum(m2, axis=0) - low * low * count
    at = part_ptr + tl.program_id(0).to(tl.int64) * 4 * WALK.channels + channels
    count += tl.zeros(mean.shape, dtype=ACC)
    _store_part(at, count, low, mean, m2, channels < WALK.channels, WALK.channels)


@triton.jit
def _store_part(ptrs, count, low, mean, m2, mask, C):
    tl.store(ptrs, count, mask=mask)
    tl.store(ptrs + C, low, mask=mask)
    tl.store(ptrs + 2 * C, mean, mask=mask)
    tl.store(ptrs + 3 * C, m2, mask=mask)


@triton.jit(
    do_not_specialize=[
        "lanes", "T", "H", "W", "TO", "HO", "WO", "start_z", "stride_n", "stride_t", "stride_h", "stride_w",
    ]
)  # fmt: skip
def _conv3d_depthwise_fwd_kernel(
    x_ptr,  # [N, T, H, W, C], pixel_x elements a pixel
    weight_ptr,  # [taps, readable]
    z_ptr,  # [N, T', H', W', C] within a dense tensor: strides in pixels, to write every second pixel
    residual_ptr,  # [N, T', H', W', C], pixel_y elements a pixel
    bias_ptr, mean_ptr, variance_ptr, bn_weight_ptr, bn_bias_ptr,  # [C]
    part_ptr,  # [tiles, 4, C]: count, low part of the mean, mean, M2; None for the affine epilogue
    lanes, T, H, W, TO, HO, WO, start_z, stride_n, stride_t, stride_h, stride_w,
    WALK: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    KT: tl.constexpr = WALK.kernel[0]
    TAPS_W: tl.constexpr = WALK.taps_w
    CHUNKS: tl.constexpr = WALK.kernel[2] // TAPS_W
    OUTPUTS: tl.constexpr = WALK.frames * WALK.columns
    first = tl.program_id(0).to(INDEX) * BLOCK_L
    lane, channels = _tile(first, BLOCK_L, BLOCK_C, part_ptr is None, INDEX, WALK)
    n, to, ho, wo = _decode(lane, lanes, TO, HO, WO, WALK)
    t = to * WALK.stride[0] - WALK.before[0]
    h = ho * WALK.stride[1] - WALK.before[1]
    w = wo * WALK.stride[2] - WALK.before[2]
    frame = H.to(tl.int64) * W
    pixel = (n * T + t) * frame + h.to(tl.int64) * W + w

    inside = _mask_readable(lane < lanes, channels, BLOCK_C, WALK)
    acc = _zeros(channels, OUTPUTS, ACC)
    for piece in range(0, piece_count(WALK)):
        kh = piece // CHUNKS
        kw = piece % CHUNKS * TAPS_W
        weights = ()
        for kt in tl.static_range(KT):
            for k in tl.static_range(TAPS_W):
                tap = (kt * WALK.kernel[1] + kh) * WALK.kernel[2] + kw + k
                at = weight_ptr + tap * WALK.readable + channels
                weights = weights + (tl.load(at, mask=inside, other=0.0).to(ACC),)  # type: ignore[assignment]
        down = kh * WALK.dilation[1]
        right = kw * WALK.dilation[2]
        row = h + down
        mask = inside
        if WALK.replicate:
            row = tl.minimum(tl.maximum(row, 0), H - 1)
        else:
            mask = mask & (row >= 0) & (row < H)
        moved = pixel + (down.to(tl.int64) * W + right)
        for e in tl.static_range(element_count(WALK)):
            x = _load_element(
                x_ptr, n, t, row, w + right, moved, e, frame, T, W, channels, mask, WALK
            )
            x = x.to(ACC)
            for use in tl.static_range(use_count(WALK, e)):
                product = x * weights[use_tap(WALK, e, use)]
                acc = _replaced(
                    acc, use_output(WALK, e, use), acc[use_output(WALK, e, use)] + product
                )

    mask_c = channels < WALK.channels
    if part_ptr is None:
        if bias_ptr is not None:
            conv_bias = _vector(bias_ptr, channels, mask_c, ACC)
        if mean_ptr is not None:
            mean = _vector(mean_ptr, channels, mask_c, ACC)
            scale = 1.0 / tl.sqrt(_vector(variance_ptr, channels, mask_c, ACC) + EPS)
            if bn_weight_ptr is not None:
                scale *= _vector(bn_weight_ptr, channels, mask_c, ACC)
            if bn_bias_ptr is not None:
                bn_bias = _vector(bn_bias_ptr, channels, mask_c, ACC)
    stored = ()
    masks = ()
    for k in tl.static_range(OUTPUTS):
        to_k = to + k // WALK.columns
        wo_k = wo + k % WALK.columns
        mask_l = (lane < lanes) & (to_k < TO) & (wo_k < WO)
        mask = mask_l & mask_c
        out = acc[k]
        if part_ptr is None:
            if bias_ptr is not None:
                out += conv_bias
            if mean_ptr is not None:
                out = (out - mean) * scale
                if bn_bias_ptr is not None:
                    out += bn_bias
            if residual_ptr is not None:
                at = ((n * TO + to_k) * HO + ho) * WO + wo_k
                at = at * WALK.pixel_y + channels
                out += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
            out = _activate(out, ACTIVATION, SLOPE)
        out = out.to(z_ptr.dtype.element_ty)
        at = start_z + n * stride_n + to_k.to(tl.int64) * stride_t + ho * stride_h + wo_k * stride_w
        tl.store(z_ptr + (at * WALK.channels + channels), out, mask=mask)
        stored = stored + (out.to(ACC),)  # type: ignore[assignment]
        masks = masks + (mask_l,)  # type: ignore[assignment]
    if part_ptr is not None:
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        _store_statistics(stored, masks, part_ptr, columns, WALK, ACC)


@triton.jit(do_not_specialize=["tiles"])
def _conv3d_depthwise_merge_kernel(
    part_ptr,  # [tiles, 4, C]: count, low part of the mean, mean, M2
    out_ptr,  # [programs, 4, C]: of BLOCK_T tiles each, by Chan's formula
    C, tiles,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_t = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channels < C
    tile = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (tile < tiles)[:, None] & mask_c[None, :]
    at = part_ptr + tile[:, None] * 4 * C + channels[None, :]
    count = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + C, mask=mask, other=0.0)
    mean = tl.load(at + 2 * C, mask=mask, other=0.0)
    m2 = tl.load(at + 3 * C, mask=mask, other=0.0)
    # Relative to the first tile's, and with what rounding left out: a large common mean costs no digits.
    origin = tl.load(part_ptr + (pid_t * BLOCK_T * 4 + 2) * C + channels, mask=mask_c, other=0.0)
    delta = tl.where(mask, mean - origin[None, :] + low, 0.0)
    total = tl.where(mask_c, tl.sum(count, axis=0), 1.0)
    moved = tl.sum(delta * count, axis=0) / total
    delta = delta - moved[None, :]
    m2 = tl.sum(m2 + delta * delta * count, axis=0)
    mean = origin + moved
    out = out_ptr + pid_t * 4 * C + channels
    _store_part(out, total, moved - (mean - origin), mean, m2, mask_c, C)


@triton.jit(do_not_specialize=["lanes", "repeats", "T", "H", "W", "TO", "HO", "WO"])
def _conv3d_depthwise_wgrad_kernel(
    x_ptr,  # [N, T, H, W, C], pixel_x elements a pixel
    dy_ptr,  # [N, T', H', W', C], pixel_y elements a pixel
    part_ptr,  # [chunks, taps, C]
    lanes, repeats, T, H, W, TO, HO, WO,
    WALK: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program sums one row of taps over ``repeats`` tiles of lanes; rows of taps run side by side, on the same x."""
    KT: tl.constexpr = WALK.kernel[0]
    TAPS_W: tl.constexpr = WALK.taps_w
    CHUNKS: tl.constexpr = WALK.kernel[2] // TAPS_W
    TAPS: tl.constexpr = KT * WALK.kernel[1] * WALK.kernel[2]
    OUTPUTS: tl.constexpr = WALK.frames * WALK.columns
    pid = tl.program_id(0)
    piece = pid % piece_count(WALK)
    chunk = (pid // piece_count(WALK)).to(INDEX)
    down = piece // CHUNKS * WALK.dilation[1]
    right = piece % CHUNKS * TAPS_W * WALK.dilation[2]
    frame = H.to(tl.int64) * W
    lane, channels = _tile(chunk * repeats * BLOCK_L, BLOCK_L, BLOCK_C, False, INDEX, WALK)

    acc = _zeros(channels, KT * TAPS_W, ACC)
    for _ in range(0, repeats):
        inside = _mask_readable(lane < lanes, channels, BLOCK_C, WALK)
        n, to, ho, wo = _decode(lane, lanes, TO, HO, WO, WALK)
        grads = ()
        masks = ()
        for k in tl.static_range(OUTPUTS):
            to_k = to + k // WALK.columns
            wo_k = wo + k % WALK.columns
            mask = (to_k < TO) & (wo_k < WO) & inside
            masks = masks + (mask,)  # type: ignore[assignment]
            at = ((n * TO + to_k) * HO + ho) * WO + wo_k
            at = at * WALK.pixel_y + channels
            dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
            grads = grads + (dy.to(ACC),)  # type: ignore[assignment]
        t = to * WALK.stride[0] - WALK.before[0]
        row = ho * WALK.stride[1] - WALK.before[1] + down
        w = wo * WALK.stride[2] - WALK.before[2] + right
        mask = inside
        if WALK.replicate:
            row = tl.minimum(tl.maximum(row, 0), H - 1)
        else:
            mask = mask & (row >= 0) & (row < H)
        pixel = (n * T + t) * frame + row.to(tl.int64) * W + w
        for e in tl.static_range(element_count(WALK)):
            x = _load_element(x_ptr, n, t, row, w, pixel, e, frame, T, W, channels, mask, WALK)
            x = x.to(ACC)
            for use in tl.static_range(use_count(WALK, e)):
                # An output past the end has no gradient, whatever x is: 0 * NaN must not count.
                product = x * grads[use_output(WALK, e, use)]
                product = tl.where(masks[use_output(WALK, e, use)], product, 0.0)
                acc = _replaced(acc, use_tap(WALK, e, use), acc[use_tap(WALK, e, use)] + product)
        lane += BLOCK_L

    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part_ptr += chunk.to(tl.int64) * TAPS * WALK.channels
    for k in tl.static_range(KT * TAPS_W):
        tap = (k // TAPS_W * WALK.kernel[1] + piece // CHUNKS) * WALK.kernel[2]
        tap += piece % CHUNKS * TAPS_W + k % TAPS_W
        at = part_ptr + tap * WALK.channels + columns
        tl.store(at, tl.sum(acc[k], axis=0), mask=columns < WALK.channels)


@triton.jit(do_not_specialize=["chunks"])
def _conv3d_depthwise_reduce_kernel(
    part_ptr,  # [chunks, taps, C]
    dw_ptr,  # [C, taps]
    chunks, taps, C,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < taps * C
    acc = tl.zeros((BLOCK_P, BLOCK_E), dtype=ACC)
    for first in range(0, chunks, BLOCK_P):
        chunk = first + tl.arange(0, BLOCK_P)
        mask = (chunk < chunks)[:, None] & mask_e[None, :]
        at = chunk.to(tl.int64)[:, None] * (taps * C) + offs_e[None, :]
        acc += tl.load(part_ptr + at, mask=mask, other=0.0)
    at = offs_e % C * taps + offs_e // C
    tl.store(dw_ptr + at, tl.sum(acc, axis=0), mask=mask_e)
