"""Pyramid pooling's Triton kernels. ``launches.py`` plans and launches them.

The forward kernels work on tiles of channels x bins of one level x lanes that walk a bin together. Every bin of a tile
is as far along its own elements as the others, so that a tile is as full for 512 bins of nine elements as for one
bin of thousands. The axis that is innermost in x's memory comes last: lanes, or channels where they are inner.

The backward kernel gathers: an element of dx looks up the few bins that contain it. Nothing is added atomically, every
sum has a fixed order, and no kernel reads what its own launch wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .levels import WHOLE as _WHOLE
from .levels import Level

WHOLE = tl.constexpr(_WHOLE)
LAST = tl.constexpr(2**31 - 1)  # a place after every other


class Pyramid(NamedTuple):
    """What a kernel is specialised for: as ``layout.Form``, with the levels' relations worked out.

    Attributes:
        levels: bins of t, h, w; ``WHOLE`` keeps an axis.
        source: the level whose children a level's codes number, -1 for one that has indices.
        root: the level whose results the second launch makes a level from; itself if it is made from x.
        maxima, means: what there is of every level, in this order.
        flat, ndhwc, inner: as in ``layout.Form``.
    """

    levels: tuple[Level, ...]
    source: tuple[int, ...]
    root: tuple[int, ...]
    maxima: bool
    means: bool
    flat: bool
    ndhwc: bool
    inner: bool


# Bins and elements ------------------------------------------------------------------------------------------------


@triton.jit
def _span(i, o, n):
    """Bin i of o over n elements: from, to (excluded). Of element p: the bins that it is in, ``_span(p, n, o)``."""
    return i * n // o, ((i + 1) * n + o - 1) // o


@triton.jit
def _longest(o, n):
    """Elements of the longest bin of o over n; bins of the element that is in most, ``_longest(n, o)``."""
    rest = n % o
    return n // o + tl.where(rest > 0, 1, 0) + tl.where(o % tl.maximum(rest, 1) > 0, 1, 0)


@triton.jit
def _bin_span(i, O: tl.constexpr, n):
    """A whole axis has bins beyond its n elements, which are empty."""
    if O == WHOLE:
        return i, tl.minimum(i + 1, n)
    else:
        return _span(i, O, n)


@triton.jit
def _longest_bin(O: tl.constexpr, n):
    if O == WHOLE:
        return tl.minimum(n, 1)
    else:
        return _longest(O, n)


@triton.jit
def _bins_of(p, O: tl.constexpr, n):
    """The bins that element p is in: from, to (excluded)."""
    if O == WHOLE:
        return p, p + 1
    else:
        return _span(p, tl.maximum(n, 1), O)


@triton.jit
def _most_bins(O: tl.constexpr, n):
    """How many bins an element is in at most."""
    if O == WHOLE:
        return tl.minimum(n, 1)
    else:
        return _longest(tl.maximum(n, 1), O)


@triton.jit
def _region(valid_ptr, b, T, H, W):
    """How much of sample b's T, H and W counts."""
    if valid_ptr is None:
        return T, H, W
    else:
        t = tl.load(valid_ptr + b * 3)
        h = tl.load(valid_ptr + b * 3 + 1)
        w = tl.load(valid_ptr + b * 3 + 2)
        return (
            tl.minimum(tl.maximum(t, 0), T).to(tl.int32),
            tl.minimum(tl.maximum(h, 0), H).to(tl.int32),
            tl.minimum(tl.maximum(w, 0), W).to(tl.int32),
        )


@triton.jit
def _bins(O: tl.constexpr, n):
    if O == WHOLE:
        return n
    else:
        return n * 0 + O


@triton.jit
def _count(k: tl.constexpr, T, H, W, P: tl.constexpr):
    """Bins of level k."""
    ot, oh, ow = _bins(P.levels[k][0], T), _bins(P.levels[k][1], H), _bins(P.levels[k][2], W)
    return ot * oh * ow


@triton.jit
def _count_before(k: tl.constexpr, CODED: tl.constexpr, T, H, W, P: tl.constexpr):
    """Columns of the tape of codes, or of indices, that belong to levels before k."""
    count = T * 0
    for j in tl.static_range(k):
        if (P.source[j] >= 0) == CODED:
            count += _count(j, T, H, W, P)
    return count


# Where numbers lie (layout.py): each gives a tensor's offset of sample b and the offsets within the sample ---------


@triton.jit
def _result_at(b, bins, channels, PART: tl.constexpr, k: tl.constexpr, C, T, H, W,
               P: tl.constexpr):  # fmt: skip
    """Of level k's maxima, or means where PART is 1, or of their gradients."""
    PARTS: tl.constexpr = P.maxima + P.means
    count = _count(k, T, H, W, P)
    if P.flat:
        before, total = T * 0, T * 0
        for j in tl.static_range(len(P.levels)):
            if j < k:
                before += _count(j, T, H, W, P)
            total += _count(j, T, H, W, P)
        return (b * total + before) * PARTS * C, (PART * C + channels) * count + bins
    elif P.ndhwc:
        return b * count * PARTS * C, (bins * PARTS + PART) * C + channels
    else:
        return b * count * PARTS * C, (PART * C + channels) * count + bins


@triton.jit
def _tape_at(b, bins, channels, CODED: tl.constexpr, k: tl.constexpr, C, T, H, W,
             P: tl.constexpr):  # fmt: skip
    """Of level k's codes or indices."""
    before = _count_before(k, CODED, T, H, W, P)
    total = _count_before(len(P.levels), CODED, T, H, W, P)
    if P.inner:
        return b * total * C, (before + bins) * C + channels
    else:
        return b * total * C, channels * total + before + bins


@triton.jit
def _child(place, parent, O: tl.constexpr, F: tl.constexpr, n):
    """Which child of bin ``parent`` of O, on one axis, holds an element: the first of those of F bins that do.

    A bin's winner wins in every part of the bin that it is in, so this is the child whose winner it is.
    """
    if O == F:
        return place * 0
    else:
        first = parent * (F // O)
        return tl.maximum(place * F // tl.maximum(n, 1), first) - first


@triton.jit
def _store_winners(
    value, place, b, bins, channels, mask, k: tl.constexpr, result_ptr, indices_ptr, codes_ptr,
    C, T, H, W, size_t, size_h, size_w, P: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    """Level k's maxima and where they are: an index, or the number of the source's child that has it."""
    base, offs = _result_at(b, bins, channels, 0, k, C, T, H, W, P)
    tl.store(result_ptr + base + offs, value, mask=mask)
    if TRACK:
        if P.source[k] < 0:
            base, offs = _tape_at(b, bins, channels, False, k, C, T, H, W, P)
            tl.store(indices_ptr + base + offs, place, mask=mask)
        else:
            OWN: tl.constexpr = P.levels[k]
            SOURCE: tl.constexpr = P.levels[P.source[k]]
            jt, jh, jw = _coordinates(bins, OWN, H, W)
            row = place // W
            t = _child(row // H, jt, OWN[0], SOURCE[0], size_t)
            h = _child(row % H, jh, OWN[1], SOURCE[1], size_h)
            w = _child(place % W, jw, OWN[2], SOURCE[2], size_w)
            KH: tl.constexpr = 1 if OWN[1] == WHOLE else SOURCE[1] // OWN[1]
            KW: tl.constexpr = 1 if OWN[2] == WHOLE else SOURCE[2] // OWN[2]
            code = tl.where(place < 0, 0, (t * KH + h) * KW + w)
            base, offs = _tape_at(b, bins, channels, True, k, C, T, H, W, P)
            tl.store(codes_ptr + base + offs, code.to(tl.uint8), mask=mask)


@triton.jit
def _coordinates(bins, LEVEL: tl.constexpr, H, W):
    """t, h and w of bins numbered in this order."""
    if LEVEL[2] == WHOLE:
        rows, w = bins // W, bins % W
    else:
        rows, w = bins // LEVEL[2], bins % LEVEL[2]
    if LEVEL[1] == WHOLE:
        return rows // H, rows % H, w
    else:
        return rows // LEVEL[1], rows % LEVEL[1], w


# Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _winner(value, place, v, p):
    """Of two candidates: the larger, the first of equals; a NaN beats numbers, the last NaN the others."""
    nan = v != v
    number = (v > value) | ((v == value) & (p < place))
    take = tl.where(value != value, nan & (p > place), nan | number)
    return tl.where(take, v, value), tl.where(take, p, place)


@triton.jit
def _larger(value, v):
    return tl.maximum(value, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile(BINS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr, INNER: tl.constexpr):
    """Numbers of a tile's channels, bins and lanes, each along its axis."""
    c, bins, lanes = tl.arange(0, BLOCK_C), tl.arange(0, BINS), tl.arange(0, LANES)
    if INNER:
        return c[None, None, :], bins[:, None, None], lanes[None, :, None]
    else:
        return c[:, None, None], bins[None, :, None], lanes[None, None, :]


@triton.jit
def _pool_tile(
    x_ptr, result_ptr, indices_ptr, codes_ptr, b, first_channel, first_bin,
    C, T, H, W, stride_c, stride_t, stride_h, stride_w, size_t, size_h, size_w,
    k: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Some bins of level k, from x: their maxima, means or both."""
    LEVEL: tl.constexpr = P.levels[k]
    BINS: tl.constexpr = TILES[k][0]
    LANES_H: tl.constexpr = TILES[k][1]
    LANES_W: tl.constexpr = TILES[k][2]
    LANES: tl.constexpr = LANES_H * LANES_W
    AXIS: tl.constexpr = 1 if P.inner else 2  # of the lanes
    offs_c, offs_bin, lane = _tile(BINS, LANES, BLOCK_C, P.inner)
    channels, bins = (first_channel + offs_c).to(INDEX), (first_bin + offs_bin).to(INDEX)
    mask_c, mask_bin = channels < C, bins < _count(k, T, H, W, P)
    jt, jh, jw = _coordinates(bins, LEVEL, H, W)
    start_t, end_t = _bin_span(jt, LEVEL[0], size_t)
    start_h, end_h = _bin_span(jh, LEVEL[1], size_h)
    start_w, end_w = _bin_span(jw, LEVEL[2], size_w)
    end_t = tl.where(mask_bin, end_t, 0)
    empty = (end_t <= start_t) | (end_h <= start_h) | (end_w <= start_w)

    zero = tl.zeros((1, 1, 1), ACC) + channels.to(ACC) * 0 + (bins + lane).to(ACC) * 0
    best, total = zero + float("-inf"), zero
    # All lanes begin at the bin's first element: it is the winner where every element is -inf.
    place = ((start_t * H + start_h) * W + start_w).to(tl.int32) + zero.to(tl.int32)
    for step_t in range(0, _longest_bin(LEVEL[0], size_t)):
        t = start_t + step_t
        for step_h in range(0, _longest_bin(LEVEL[1], size_h), LANES_H):
            h = start_h + step_h + lane // LANES_W
            inside_row = (t < end_t) & (h < end_h)
            row = t * stride_t + h * stride_h
            for step_w in range(0, _longest_bin(LEVEL[2], size_w), LANES_W):
                w = start_w + step_w + lane % LANES_W
                mask = inside_row & (w < end_w) & mask_c
                at = x_ptr + (row + w * stride_w) + channels * stride_c
                v = tl.load(at, mask=mask, other=float("-inf")).to(ACC)
                if P.means:
                    total += tl.where(mask, v, 0.0)
                if P.maxima and TRACK:
                    take = (v > best) | (v != v)  # a lane meets its elements in order
                    best = tl.where(take, v, best)
                    place = tl.where(take, ((t * H + h) * W + w).to(tl.int32), place)
                elif P.maxima:
                    best = _larger(best, v)

    mask = mask_c & mask_bin
    if P.maxima:
        if TRACK:
            best, place = tl.reduce((best, place), AXIS, _winner, keep_dims=True)
        else:
            best = tl.reduce(best, AXIS, _larger, keep_dims=True)
        _store_winners(
            tl.where(empty, 0.0, best), tl.where(empty, -1, place), b, bins, channels, mask, k,
            result_ptr, indices_ptr, codes_ptr, C, T, H, W, size_t, size_h, size_w, P, TRACK,
        )  # fmt: skip
    if P.means:
        count = (end_t - start_t) * (end_h - start_h) * (end_w - start_w)
        count = tl.where(empty, 1, count).to(ACC)
        base, offs = _result_at(b, bins, channels, P.maxima + 0, k, C, T, H, W, P)
        total = tl.sum(total, AXIS, keep_dims=True)
        tl.store(result_ptr + base + offs, total / count, mask=mask)


@triton.jit
def _share(programs, C, BLOCK_C: tl.constexpr):
    """Of this program: which one it is of those that share a block of channels, its channels, its sample (int64)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    pid_c = pid // programs
    return pid % programs, pid_c % blocks * BLOCK_C, (pid_c // blocks).to(tl.int64)


@triton.jit(
    do_not_specialize=["programs", "T", "H", "W", "stride_b", "stride_t", "stride_h"],
    do_not_specialize_on_alignment=["stride_c", "stride_w"],
)
def _pyramid_pool_fwd_kernel(
    x_ptr,  # [B, C, T, H, W], any strides
    valid_ptr,  # [B, 3] or None
    result_ptrs,  # a tuple: [B, F], or the levels' maps
    indices_ptr, codes_ptr,  # [B, C, columns], or [B, columns, C] where channels are inner; or None
    programs, C, T, H, W, stride_b, stride_c, stride_t, stride_h, stride_w,
    P: tl.constexpr, WALKED: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr, TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The WALKED levels, from x. The strides of outer axes count in UNITs."""
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    size_t, size_h, size_w = _region(valid_ptr, b, T, H, W)
    x_ptr += b * stride_b * UNIT
    if P.inner:
        stride_t, stride_h, stride_w = stride_t * UNIT, stride_h * UNIT, stride_w * UNIT
    for k in tl.static_range(len(P.levels)):
        if WALKED[k]:
            tiles = tl.cdiv(_count(k, T, H, W, P), TILES[k][0])
            for tile in range(turn, tiles, programs):
                _pool_tile(
                    x_ptr, result_ptrs[0 if P.flat else k], indices_ptr, codes_ptr, b, first_channel,
                    tile * TILES[k][0], C, T, H, W, stride_c, stride_t, stride_h, stride_w,
                    size_t, size_h, size_w, k, P, TILES, BLOCK_C, TRACK, ACC, INDEX,
                )  # fmt: skip
            turn = (turn + programs - tiles % programs) % programs


@triton.jit
def _nested_tile(
    result_ptr, root_ptr, indices_ptr, codes_ptr, b, first_channel, first_bin,
    C, T, H, W, size_t, size_h, size_w,
    k: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The maxima of some bins of level k, from those of its root's bins that make them up."""
    LEVEL: tl.constexpr = P.levels[k]
    ROOT: tl.constexpr = P.levels[P.root[k]]
    BINS: tl.constexpr = TILES[k][0]
    LANES: tl.constexpr = TILES[k][1] * TILES[k][2]
    KT: tl.constexpr = 1 if LEVEL[0] == WHOLE else ROOT[0] // LEVEL[0]
    KH: tl.constexpr = 1 if LEVEL[1] == WHOLE else ROOT[1] // LEVEL[1]
    KW: tl.constexpr = 1 if LEVEL[2] == WHOLE else ROOT[2] // LEVEL[2]
    AXIS: tl.constexpr = 1 if P.inner else 2  # of the lanes
    offs_c, offs_bin, lane = _tile(BINS, LANES, BLOCK_C, P.inner)
    channels, bins = (first_channel + offs_c).to(INDEX), (first_bin + offs_bin).to(INDEX)
    mask = (channels < C) & (bins < _count(k, T, H, W, P))
    jt, jh, jw = _coordinates(bins, LEVEL, H, W)

    zero = tl.zeros((1, 1, 1), ACC) + channels.to(ACC) * 0 + (bins + lane).to(ACC) * 0
    best, place = zero + float("-inf"), zero.to(tl.int32) + LAST
    for first in range(0, KT * KH * KW, LANES):
        child = first + lane
        it, ih, iw = child // (KH * KW), child // KW % KH, child % KW
        row = (jt * KT + it) * _bins(ROOT[1], H) + jh * KH + ih
        fine = row * _bins(ROOT[2], W) + jw * KW + iw
        mask_fine = mask & (child < KT * KH * KW)
        base, offs = _result_at(b, fine, channels, 0, P.root[k], C, T, H, W, P)
        v = tl.load(root_ptr + base + offs, mask=mask_fine, other=float("-inf")).to(ACC)
        if TRACK:
            base, offs = _tape_at(b, fine, channels, False, P.root[k], C, T, H, W, P)
            p = tl.load(indices_ptr + base + offs, mask=mask_fine, other=LAST)
            best, place = _winner(best, place, v, p)
        else:
            best = _larger(best, v)
    if TRACK:
        best, place = tl.reduce((best, place), AXIS, _winner, keep_dims=True)
    else:
        best = tl.reduce(best, AXIS, _larger, keep_dims=True)
    _store_winners(
        best, place, b, bins, channels, mask, k, result_ptr, indices_ptr, codes_ptr,
        C, T, H, W, size_t, size_h, size_w, P, TRACK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "T", "H", "W"])
def _pyramid_pool_nested_kernel(
    valid_ptr,  # [B, 3] or None
    result_ptrs,  # a tuple: [B, F], or the levels' maps
    indices_ptr, codes_ptr,  # [B, C, columns], or [B, columns, C] where channels are inner; or None
    programs, C, T, H, W,
    P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The second launch: the levels that are not their own root."""
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    size_t, size_h, size_w = _region(valid_ptr, b, T, H, W)
    for k in tl.static_range(len(P.levels)):
        if P.root[k] != k:
            tiles = tl.cdiv(_count(k, T, H, W, P), TILES[k][0])
            for tile in range(turn, tiles, programs):
                _nested_tile(
                    result_ptrs[0 if P.flat else k], result_ptrs[0 if P.flat else P.root[k]],
                    indices_ptr, codes_ptr, b, first_channel, tile * TILES[k][0],
                    C, T, H, W, size_t, size_h, size_w,
                    k, P, TILES, BLOCK_C, TRACK, ACC, INDEX,
                )  # fmt: skip
            turn = (turn + programs - tiles % programs) % programs


# Backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load_grad(grad_ptrs, b, bins, channels, mask, PART: tl.constexpr, k: tl.constexpr,
               C, T, H, W, P: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    base, offs = _result_at(b, bins, channels, PART, k, C, T, H, W, P)
    at = grad_ptrs[0 if P.flat else k] + base + offs
    return tl.load(at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _grad_of_winner(
    grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, C, T, H, W,
    k: tl.constexpr, P: tl.constexpr, GIVEN: tl.constexpr, WANTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What reaches the winner of bin (jt, jh, jw) of level k: the bin's own gradient, and that of the coarser bins
    whose codes point to this one.
    """
    grad = tl.zeros((1, 1), ACC)
    if GIVEN[k]:
        bins = (jt * _bins(P.levels[k][1], H) + jh) * _bins(P.levels[k][2], W) + jw
        grad += _load_grad(grad_ptrs, b, bins, channels, mask, 0, k, C, T, H, W, P, ACC)
    for parent in tl.static_range(len(P.levels)):
        if P.source[parent] == k and WANTED[parent]:
            grad += _grad_of_parent(
                grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, C, T, H, W,
                parent, P, GIVEN, WANTED, ACC,
            )  # fmt: skip
    return grad


@triton.jit
def _grad_of_parent(
    grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, C, T, H, W,
    k: tl.constexpr, P: tl.constexpr, GIVEN: tl.constexpr, WANTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What reaches bin (jt, jh, jw) of level k's source from level k, and from what is coarser still."""
    OWN: tl.constexpr = P.levels[k]
    FINER: tl.constexpr = P.levels[P.source[k]]
    KT: tl.constexpr = 1 if OWN[0] == WHOLE else FINER[0] // OWN[0]
    KH: tl.constexpr = 1 if OWN[1] == WHOLE else FINER[1] // OWN[1]
    KW: tl.constexpr = 1 if OWN[2] == WHOLE else FINER[2] // OWN[2]
    child = (jt % KT * KH + jh % KH) * KW + jw % KW
    jt, jh, jw = jt // KT, jh // KH, jw // KW
    bins = (jt * _bins(OWN[1], H) + jh) * _bins(OWN[2], W) + jw
    base, offs = _tape_at(b, bins, channels, True, k, C, T, H, W, P)
    code = tl.load(codes_ptr + base + offs, mask=mask, other=0).to(tl.int32)
    return _grad_of_winner(
        grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask & (code == child), C, T, H, W,
        k, P, GIVEN, WANTED, ACC,
    )  # fmt: skip


@triton.jit
def _gather(
    dx, grad_ptrs, indices_ptr, codes_ptr, b, places, channels, mask_c, inside, C, T, H, W,
    size_t, size_h, size_w, k: tl.constexpr, P: tl.constexpr, GIVEN: tl.constexpr,
    WANTED: tl.constexpr, WINNERS: tl.constexpr, MEANS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx with what comes from the bins of level k: from those whose winner a place is, and from means."""
    LEVEL: tl.constexpr = P.levels[k]
    from_t, to_t = _bins_of(places // W // H, LEVEL[0], size_t)
    from_h, to_h = _bins_of(places // W % H, LEVEL[1], size_h)
    from_w, to_w = _bins_of(places % W, LEVEL[2], size_w)
    for step_t in range(0, _most_bins(LEVEL[0], size_t)):
        jt = from_t + step_t
        start_t, end_t = _bin_span(jt, LEVEL[0], size_t)
        for step_h in range(0, _most_bins(LEVEL[1], size_h)):
            jh = from_h + step_h
            start_h, end_h = _bin_span(jh, LEVEL[1], size_h)
            inside_row = inside & (jt < to_t) & (jh < to_h)
            row = (jt * _bins(LEVEL[1], H) + jh) * _bins(LEVEL[2], W)
            for step_w in range(0, _most_bins(LEVEL[2], size_w)):
                jw = from_w + step_w
                mask_bin = inside_row & (jw < to_w)
                mask = mask_bin & mask_c
                if WINNERS:
                    base, at = _tape_at(b, row + jw, channels, False, k, C, T, H, W, P)
                    winner = tl.load(indices_ptr + base + at, mask=mask, other=-1)
                    dx += _grad_of_winner(
                        grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask & (winner == places),
                        C, T, H, W, k, P, GIVEN, WANTED, ACC,
                    )  # fmt: skip
                if MEANS:
                    start_w, end_w = _bin_span(jw, LEVEL[2], size_w)
                    count = (end_t - start_t) * (end_h - start_h) * (end_w - start_w)
                    grad = _load_grad(
                        grad_ptrs, b, row + jw, channels, mask, P.maxima + 0, k, C, T, H, W, P, ACC
                    )
                    dx += grad / tl.where(mask_bin, count, 1).to(ACC)
    return dx


@triton.jit(do_not_specialize=["programs", "T", "H", "W"])
def _pyramid_pool_bwd_kernel(
    grad_ptrs,  # a tuple, as the results: [B, F], or the levels' maps; None where there is none
    indices_ptr, codes_ptr,  # [B, C, columns], or [B, columns, C] where channels are inner; or None
    valid_ptr,  # [B, 3] or None
    dx_ptr,  # [B, C, T, H, W], or [B, T, H, W, C] where channels are inner
    programs, C, T, H, W, volume,
    P: tl.constexpr, GIVEN: tl.constexpr, WANTED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dx of a block of places, gathered from the bins that hold them. GIVEN: the levels with a gradient; WANTED: those
    that one comes through."""
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    size_t, size_h, size_w = _region(valid_ptr, b, T, H, W)
    places = turn.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = first_channel.to(INDEX) + tl.arange(0, BLOCK_C)
    if P.inner:
        places, channels = places[:, None], channels[None, :]
        offs = places * C + channels
    else:
        places, channels = places[None, :], channels[:, None]
        offs = channels * volume + places
    mask_c = channels < C
    rows = places // W
    inside = (places < volume) & (rows // H < size_t) & (rows % H < size_h) & (places % W < size_w)
    dx = tl.zeros((1, 1), ACC) + offs.to(ACC) * 0
    for k in tl.static_range(len(P.levels)):
        if (P.maxima and P.source[k] < 0 and WANTED[k]) or (P.means and GIVEN[k]):
            dx = _gather(
                dx, grad_ptrs, indices_ptr, codes_ptr, b, places, channels, mask_c, inside, C, T, H, W,
                size_t, size_h, size_w, k, P, GIVEN, WANTED,
                P.maxima and P.source[k] < 0 and WANTED[k], P.means and GIVEN[k], ACC,
            )  # fmt: skip
    base = b * C * volume
    tl.store(dx_ptr + base + offs, dx, mask=mask_c & (places < volume))
