"""Pyramid pooling's Triton kernels. ``launches.py`` plans and launches them.

The forward kernels work on tiles of channels x bins of one level x lanes that walk a bin together. Every bin of a tile
is as far along its own elements as the others, so that a tile is as full for 512 bins of nine elements as for one
bin of thousands. The axis that is innermost in x's memory comes last: lanes, or channels where they are inner.

The backward kernel gathers: an element of dx looks up the few bins that contain it. Nothing is added atomically, every
sum has a fixed order, and no kernel reads what its own launch wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import geometry
from .geometry import WHOLE

LAST = tl.constexpr(2**31 - 1)  # a place after every other


@triton.jit
def _share(programs, C, BLOCK_C: tl.constexpr):
    """Which this program is of those that share some channels of a sample, the first of these, and the sample."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    pid_c = pid // programs
    return pid % programs, pid_c % blocks * BLOCK_C, (pid_c // blocks).to(tl.int64)


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
def _join_lanes(value, place, AXIS: tl.constexpr, TRACK: tl.constexpr):
    """The winners of all lanes, as :func:`_winner` or :func:`_larger` would find them."""
    nan = value != value
    top = tl.max(tl.where(nan, float("-inf"), value), AXIS, keep_dims=True)
    last_nan = tl.max(tl.where(nan, place, -1), AXIS, keep_dims=True)
    if TRACK:
        place = tl.min(tl.where(value == top, place, LAST), AXIS, keep_dims=True)
        place = tl.where(last_nan < 0, place, last_nan)
    return tl.where(last_nan < 0, top, float("nan")), place


@triton.jit
def _tile(
    first_channel, first_bin, BLOCK_C: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr,
    P: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile's channels, bins and lanes, each along its axis."""
    channels = first_channel + tl.arange(0, BLOCK_C).to(INDEX)
    bins = first_bin + tl.arange(0, BINS).to(INDEX)
    lanes = tl.arange(0, LANES)
    if P.inner:
        return channels[None, None, :], bins[:, None, None], lanes[None, :, None]
    else:
        return channels[:, None, None], bins[None, :, None], lanes[None, None, :]


@triton.jit
def _child(place, parent, OWN: tl.constexpr, FINER: tl.constexpr, n):
    """Which child of bin ``parent`` of OWN holds an element, on one axis: the first of those of FINER bins that do.

    A bin's winner wins in every part of the bin that it is in, so this is the child whose winner it is.
    """
    if OWN == FINER:
        return place * 0
    else:
        first = parent * (FINER // OWN)
        return tl.maximum(place * FINER // tl.maximum(n, 1), first) - first


@triton.jit
def _store_winners(
    value, place, b, bins, channels, mask, result_ptr, indices_ptr, codes_ptr,
    k: tl.constexpr, s, P: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    """Level k's maxima and where they are: an index, or the number of the source's child that has it."""
    base, offs = geometry.result_at(b, bins, channels, 0, k, s, P)
    tl.store(result_ptr + base + offs, value, mask=mask)
    if TRACK:
        base, offs = geometry.tape_at(b, bins, channels, k, s, P)
        if P.source[k] < 0:
            tl.store(indices_ptr + base + offs, place, mask=mask)
        else:
            OWN: tl.constexpr = P.levels[k]
            FINER: tl.constexpr = P.levels[P.source[k]]
            KH: tl.constexpr = 1 if OWN[1] == WHOLE else FINER[1] // OWN[1]
            KW: tl.constexpr = 1 if OWN[2] == WHOLE else FINER[2] // OWN[2]
            jt, jh, jw = geometry.coordinates(bins, k, s, P)
            t = _child(place // s.W // s.H, jt, OWN[0], FINER[0], s.region[0])
            h = _child(place // s.W % s.H, jh, OWN[1], FINER[1], s.region[1])
            w = _child(place % s.W, jw, OWN[2], FINER[2], s.region[2])
            code = tl.where(place < 0, 0, (t * KH + h) * KW + w)
            tl.store(codes_ptr + base + offs, code.to(tl.uint8), mask=mask)


@triton.jit
def _pool_tile(
    x_ptr, result_ptr, indices_ptr, codes_ptr, b, first_channel, first_bin,
    stride_c, stride_t, stride_h, stride_w,
    k: tl.constexpr, s, P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Some bins of level k, from x: their maxima, means or both."""
    LEVEL: tl.constexpr = P.levels[k]
    LANES_H: tl.constexpr = TILES[k][1]
    LANES_W: tl.constexpr = TILES[k][2]
    AXIS: tl.constexpr = 1 if P.inner else 2  # of the lanes
    channels, bins, lane = _tile(
        first_channel, first_bin, BLOCK_C, TILES[k][0], LANES_H * LANES_W, P, INDEX
    )
    mask_c, mask_bin = channels < s.C, bins < s.bins[k]
    jt, jh, jw = geometry.coordinates(bins, k, s, P)
    start_t, end_t = geometry.elements(jt, LEVEL[0], s.region[0])
    start_h, end_h = geometry.elements(jh, LEVEL[1], s.region[1])
    start_w, end_w = geometry.elements(jw, LEVEL[2], s.region[2])
    end_t = tl.where(mask_bin, end_t, 0)
    empty = (end_t <= start_t) | (end_h <= start_h) | (end_w <= start_w)
    most_h = geometry.most_elements(LEVEL[1], s.region[1])
    most_w = geometry.most_elements(LEVEL[2], s.region[2])

    zero = ((channels + bins + lane) * 0).to(ACC)
    best, total = zero + float("-inf"), zero
    # All lanes begin at the bin's first element: it is the winner where every element is -inf.
    place = ((start_t * s.H + start_h) * s.W + start_w + zero.to(INDEX)).to(tl.int32)
    for step_t in range(0, geometry.most_elements(LEVEL[0], s.region[0])):
        t = start_t + step_t
        for step_h in range(0, most_h, LANES_H):
            h = start_h + step_h + lane // LANES_W
            mask_row = (t < end_t) & (h < end_h) & mask_c
            row = t * stride_t + h * stride_h + channels * stride_c
            first = (t * s.H + h) * s.W
            for step_w in range(0, most_w, LANES_W):
                w = start_w + step_w + lane % LANES_W
                mask = mask_row & (w < end_w)
                v = tl.load(x_ptr + row + w * stride_w, mask=mask, other=float("-inf")).to(ACC)
                if P.means:
                    total += tl.where(mask, v, 0.0)
                if P.maxima and TRACK:
                    take = (v > best) | (v != v)  # a lane meets its elements in order
                    best = tl.where(take, v, best)
                    place = tl.where(take, (first + w).to(tl.int32), place)
                elif P.maxima:
                    best = _larger(best, v)

    mask = mask_c & mask_bin
    if P.maxima:
        best, place = _join_lanes(best, place, AXIS, TRACK)
        _store_winners(
            tl.where(empty, 0.0, best), tl.where(empty, -1, place), b, bins, channels, mask,
            result_ptr, indices_ptr, codes_ptr, k, s, P, TRACK,
        )  # fmt: skip
    if P.means:
        count = (end_t - start_t) * (end_h - start_h) * (end_w - start_w)
        base, offs = geometry.result_at(b, bins, channels, P.maxima + 0, k, s, P)
        mean = tl.sum(total, AXIS, keep_dims=True) / tl.where(empty, 1, count).to(ACC)
        tl.store(result_ptr + base + offs, mean, mask=mask)


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
    P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The levels that are their own root, from x. Where channels are inner, the other strides count in UNITs."""
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    s = geometry.sizes(valid_ptr, b, C, T, H, W, P)
    if P.inner:
        stride_t, stride_h, stride_w = stride_t * UNIT, stride_h * UNIT, stride_w * UNIT
    x_ptr += b * stride_b * UNIT
    for k in tl.static_range(len(P.levels)):
        if P.root[k] == k:
            tiles = tl.cdiv(s.bins[k], TILES[k][0])
            for tile in range(turn, tiles, programs):
                _pool_tile(
                    x_ptr, result_ptrs[0 if P.flat else k], indices_ptr, codes_ptr, b, first_channel,
                    tile * TILES[k][0], stride_c, stride_t, stride_h, stride_w,
                    k, s, P, TILES, BLOCK_C, TRACK, ACC, INDEX,
                )  # fmt: skip
            # The next level's first tile is for the program after this level's last.
            turn = (turn + programs - tiles % programs) % programs


@triton.jit
def _nested_tile(
    result_ptr, root_ptr, indices_ptr, codes_ptr, b, first_channel, first_bin,
    k: tl.constexpr, s, P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The maxima of some bins of level k, from those of its root's bins that make them up."""
    OWN: tl.constexpr = P.levels[k]
    ROOT: tl.constexpr = P.levels[P.root[k]]
    KT: tl.constexpr = 1 if OWN[0] == WHOLE else ROOT[0] // OWN[0]
    KH: tl.constexpr = 1 if OWN[1] == WHOLE else ROOT[1] // OWN[1]
    KW: tl.constexpr = 1 if OWN[2] == WHOLE else ROOT[2] // OWN[2]
    LANES: tl.constexpr = TILES[k][1] * TILES[k][2]
    AXIS: tl.constexpr = 1 if P.inner else 2  # of the lanes
    channels, bins, lane = _tile(first_channel, first_bin, BLOCK_C, TILES[k][0], LANES, P, INDEX)
    mask = (channels < s.C) & (bins < s.bins[k])
    jt, jh, jw = geometry.coordinates(bins, k, s, P)

    zero = ((channels + bins + lane) * 0).to(ACC)
    best, place = zero + float("-inf"), zero.to(tl.int32) + LAST
    for first in range(0, KT * KH * KW, LANES):
        child = first + lane
        t, h, w = child // (KH * KW), child // KW % KH, child % KW
        finer = geometry.number(jt * KT + t, jh * KH + h, jw * KW + w, P.root[k], s, P)
        mask_finer = mask & (child < KT * KH * KW)
        base, offs = geometry.result_at(b, finer, channels, 0, P.root[k], s, P)
        v = tl.load(root_ptr + base + offs, mask=mask_finer, other=float("-inf")).to(ACC)
        if TRACK:
            base, offs = geometry.tape_at(b, finer, channels, P.root[k], s, P)
            p = tl.load(indices_ptr + base + offs, mask=mask_finer, other=LAST)
            best, place = _winner(best, place, v, p)
        else:
            best = _larger(best, v)
    best, place = _join_lanes(best, place, AXIS, TRACK)
    _store_winners(
        best, place, b, bins, channels, mask, result_ptr, indices_ptr, codes_ptr, k, s, P, TRACK
    )


@triton.jit(do_not_specialize=["programs", "T", "H", "W"])
def _pyramid_pool_nested_kernel(
    valid_ptr,  # [B, 3] or None
    result_ptrs,  # a tuple: [B, F], or the levels' maps
    indices_ptr, codes_ptr,  # [B, C, columns], or [B, columns, C] where channels are inner; or None
    programs, C, T, H, W,
    P: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The other levels' maxima, from what an earlier launch made of their roots."""
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    s = geometry.sizes(valid_ptr, b, C, T, H, W, P)
    for k in tl.static_range(len(P.levels)):
        if P.root[k] != k:
            tiles = tl.cdiv(s.bins[k], TILES[k][0])
            for tile in range(turn, tiles, programs):
                _nested_tile(
                    result_ptrs[0 if P.flat else k], result_ptrs[0 if P.flat else P.root[k]],
                    indices_ptr, codes_ptr, b, first_channel, tile * TILES[k][0],
                    k, s, P, TILES, BLOCK_C, TRACK, ACC, INDEX,
                )  # fmt: skip
            turn = (turn + programs - tiles % programs) % programs


@triton.jit
def _load_grad(
    grad_ptrs, b, bins, channels, mask, PART: tl.constexpr, k: tl.constexpr, s, P: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    base, offs = geometry.result_at(b, bins, channels, PART, k, s, P)
    at = grad_ptrs[0 if P.flat else k] + base + offs
    return tl.load(at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _grad_of_winner(
    grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, k: tl.constexpr, s, P: tl.constexpr,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What reaches the winner of bin (jt, jh, jw) of level k: the bin's own gradient, and that of the coarser bins
    whose codes point to this one.
    """
    grad = ((jt + channels) * 0).to(ACC)
    if GIVEN[k]:
        bins = geometry.number(jt, jh, jw, k, s, P)
        grad += _load_grad(grad_ptrs, b, bins, channels, mask, 0, k, s, P, ACC)
    for parent in tl.static_range(len(P.levels)):
        if P.source[parent] == k and WANTED[parent]:
            grad += _grad_of_parent(
                grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, parent, s, P,
                GIVEN, WANTED, ACC,
            )  # fmt: skip
    return grad


@triton.jit
def _grad_of_parent(
    grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, k: tl.constexpr, s, P: tl.constexpr,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What reaches bin (jt, jh, jw) of level k's source from level k, and from what is coarser still."""
    OWN: tl.constexpr = P.levels[k]
    FINER: tl.constexpr = P.levels[P.source[k]]
    KT: tl.constexpr = 1 if OWN[0] == WHOLE else FINER[0] // OWN[0]
    KH: tl.constexpr = 1 if OWN[1] == WHOLE else FINER[1] // OWN[1]
    KW: tl.constexpr = 1 if OWN[2] == WHOLE else FINER[2] // OWN[2]
    child = (jt % KT * KH + jh % KH) * KW + jw % KW
    jt, jh, jw = jt // KT, jh // KH, jw // KW
    base, offs = geometry.tape_at(b, geometry.number(jt, jh, jw, k, s, P), channels, k, s, P)
    code = tl.load(codes_ptr + base + offs, mask=mask, other=0).to(tl.int32)
    return _grad_of_winner(
        grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask & (code == child), k, s, P,
        GIVEN, WANTED, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "T", "H", "W"])
def _pyramid_pool_push_kernel(
    grad_ptrs,  # a tuple, as the results: [B, F], or the levels' maps; None where there is none
    codes_ptr,  # [B, C, columns], or [B, columns, C] where channels are inner
    pushed_ptr,  # as the indices, in the accumulator's dtype; written
    programs, C, T, H, W,
    P: tl.constexpr, TILES: tl.constexpr, GIVEN: tl.constexpr, WANTED: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradients of coarse maxima pushed down to the bins that have indices: what each one's winner gets.

    GIVEN: the levels with a gradient; WANTED: those that one comes through.
    """
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    s = geometry.sizes(None, b, C, T, H, W, P)
    for k in tl.static_range(len(P.levels)):
        if P.source[k] < 0 and WANTED[k]:
            tiles = tl.cdiv(s.bins[k], TILES[k][0])
            for tile in range(turn, tiles, programs):
                first_bin = tile * TILES[k][0]
                channels, bins, _ = _tile(
                    first_channel, first_bin, BLOCK_C, TILES[k][0], 1, P, INDEX
                )
                mask = (channels < C) & (bins < s.bins[k])
                jt, jh, jw = geometry.coordinates(bins, k, s, P)
                grad = _grad_of_winner(
                    grad_ptrs, codes_ptr, b, jt, jh, jw, channels, mask, k, s, P, GIVEN, WANTED, ACC
                )
                base, offs = geometry.tape_at(b, bins, channels, k, s, P)
                tl.store(pushed_ptr + base + offs, grad, mask=mask)
            turn = (turn + programs - tiles % programs) % programs


@triton.jit
def _gather(
    dx, grad_ptrs, pushed_ptr, indices_ptr, b, places, channels, mask_c, inside, k: tl.constexpr, s,
    P: tl.constexpr, WINNERS: tl.constexpr, MEANS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx with what comes from the bins of level k: from those whose winner a place is, and from means."""
    LEVEL: tl.constexpr = P.levels[k]
    from_t, to_t = geometry.bins_with(places // s.W // s.H, LEVEL[0], s.region[0])
    from_h, to_h = geometry.bins_with(places // s.W % s.H, LEVEL[1], s.region[1])
    from_w, to_w = geometry.bins_with(places % s.W, LEVEL[2], s.region[2])
    most_h = geometry.most_bins(LEVEL[1], s.region[1])
    most_w = geometry.most_bins(LEVEL[2], s.region[2])
    for step_t in range(0, geometry.most_bins(LEVEL[0], s.region[0])):
        jt = from_t + step_t
        for step_h in range(0, most_h):
            jh = from_h + step_h
            inside_row = inside & (jt < to_t) & (jh < to_h)
            for step_w in range(0, most_w):
                jw = from_w + step_w
                bins = geometry.number(jt, jh, jw, k, s, P)
                mask_bin = inside_row & (jw < to_w)
                mask = mask_bin & mask_c
                if WINNERS:
                    base, offs = geometry.tape_at(b, bins, channels, k, s, P)
                    winner = tl.load(indices_ptr + base + offs, mask=mask, other=-1)
                    won = mask & (winner == places)
                    if pushed_ptr is None:
                        dx += _load_grad(grad_ptrs, b, bins, channels, won, 0, k, s, P, ACC)
                    else:
                        dx += tl.load(pushed_ptr + base + offs, mask=won, other=0.0)
                if MEANS:
                    start_t, end_t = geometry.elements(jt, LEVEL[0], s.region[0])
                    start_h, end_h = geometry.elements(jh, LEVEL[1], s.region[1])
                    start_w, end_w = geometry.elements(jw, LEVEL[2], s.region[2])
                    count = (end_t - start_t) * (end_h - start_h) * (end_w - start_w)
                    share = 1.0 / tl.where(mask_bin, count, 1).to(ACC)
                    grad = _load_grad(
                        grad_ptrs, b, bins, channels, mask, P.maxima + 0, k, s, P, ACC
                    )
                    dx += grad * share
    return dx


@triton.jit(do_not_specialize=["programs", "T", "H", "W"])
def _pyramid_pool_bwd_kernel(
    grad_ptrs,  # a tuple, as the results: [B, F], or the levels' maps; None where there is none
    pushed_ptr,  # as the indices: gradients of the winners; None where they are grad_ptrs' own
    indices_ptr,  # [B, C, columns], or [B, columns, C] where channels are inner; or None
    valid_ptr,  # [B, 3] or None
    dx_ptr,  # [B, C, T, H, W], or [B, T, H, W, C] where channels are inner
    programs, C, T, H, W, volume,
    P: tl.constexpr, WINNERS: tl.constexpr, MEANS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dx of a block of places, from the levels that have WINNERS, MEANS or both."""
    turn, first_channel, b = _share(programs, C, BLOCK_C)
    s = geometry.sizes(valid_ptr, b, C, T, H, W, P)
    places = turn.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = first_channel + tl.arange(0, BLOCK_C).to(INDEX)
    if P.inner:
        places, channels = places[:, None], channels[None, :]
        offs = places * C + channels
    else:
        places, channels = places[None, :], channels[:, None]
        offs = channels * volume + places
    mask_c, mask_p = channels < C, places < volume
    t, h, w = places // W // H, places // W % H, places % W
    inside = mask_p & (t < s.region[0]) & (h < s.region[1]) & (w < s.region[2])
    dx = (offs * 0).to(ACC)
    for k in tl.static_range(len(P.levels)):
        if WINNERS[k] or MEANS[k]:
            dx = _gather(
                dx, grad_ptrs, pushed_ptr, indices_ptr, b, places, channels, mask_c, inside,
                k, s, P, WINNERS[k], MEANS[k], ACC,
            )  # fmt: skip
    tl.store(dx_ptr + b * C * volume + offs, dx, mask=mask_c & mask_p)
