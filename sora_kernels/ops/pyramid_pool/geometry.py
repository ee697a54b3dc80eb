"""Bins, elements and offsets in the Triton kernels: what ``levels.py`` and ``layout.py`` say of tiles of numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import levels
from .levels import Level

WHOLE = tl.constexpr(levels.WHOLE)


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


class Sizes(NamedTuple):
    """A sample's sizes and what follows from them, made by each program.

    Attributes:
        region: how much of T, H and W counts.
        bins: of every level.
        before: bins of the levels before it; of its column in its tape, those of the same tape.
        total, indices, codes: bins of all levels, of those with indices, of those with codes.
    """

    C: Any
    T: Any
    H: Any
    W: Any
    region: tuple
    bins: tuple
    before: tuple
    column: tuple
    total: Any
    indices: Any
    codes: Any


@triton.jit
def sizes(valid_ptr, b, C, T, H, W, P: tl.constexpr):
    t, h, w = T, H, W
    if valid_ptr is not None:
        t = tl.minimum(tl.maximum(tl.load(valid_ptr + b * 3), 0), T).to(tl.int32)
        h = tl.minimum(tl.maximum(tl.load(valid_ptr + b * 3 + 1), 0), H).to(tl.int32)
        w = tl.minimum(tl.maximum(tl.load(valid_ptr + b * 3 + 2), 0), W).to(tl.int32)
    bins, before, column = (), (), ()
    indices, codes = T * 0, T * 0
    for k in tl.static_range(len(P.levels)):
        ot = T if P.levels[k][0] == WHOLE else P.levels[k][0]
        oh = H if P.levels[k][1] == WHOLE else P.levels[k][1]
        ow = W if P.levels[k][2] == WHOLE else P.levels[k][2]
        count = T * 0 + ot * oh * ow
        bins += (count,)  # type: ignore[assignment]
        before += (indices + codes,)  # type: ignore[assignment]
        if P.source[k] < 0:
            column += (indices,)  # type: ignore[assignment]
            indices += count
        else:
            column += (codes,)  # type: ignore[assignment]
            codes += count
    return Sizes(C, T, H, W, (t, h, w), bins, before, column, indices + codes, indices, codes)


# Bins and elements. Bin i of o over n is [i n // o, ceil((i + 1) n / o)), and element p is in the bins
# [p o // n, ceil((p + 1) o / n)): the same with o and n changed about.


@triton.jit
def elements(i, BINS: tl.constexpr, n):
    """Of bin i: from, to (excluded). Those of a whole axis that lie beyond its n elements are empty."""
    if BINS == WHOLE:
        return i, tl.minimum(i + 1, n)
    else:
        return i * n // BINS, ((i + 1) * n + BINS - 1) // BINS


@triton.jit
def bins_with(p, BINS: tl.constexpr, n):
    """The bins that element p is in: from, to (excluded)."""
    if BINS == WHOLE:
        return p, p + 1
    else:
        n = tl.maximum(n, 1)
        return p * BINS // n, ((p + 1) * BINS + n - 1) // n


@triton.jit
def most_elements(BINS: tl.constexpr, n):
    """Of a bin."""
    if BINS == WHOLE:
        return tl.minimum(n, 1)
    else:
        rest = n % BINS
        return n // BINS + tl.where(rest > 0, 1, 0) + tl.where(BINS % tl.maximum(rest, 1) > 0, 1, 0)


@triton.jit
def most_bins(BINS: tl.constexpr, n):
    """That an element is in."""
    if BINS == WHOLE:
        return tl.minimum(n, 1)
    else:
        n = tl.maximum(n, 1)
        rest = BINS % n
        return BINS // n + tl.where(rest > 0, 1, 0) + tl.where(n % tl.maximum(rest, 1) > 0, 1, 0)


@triton.jit
def coordinates(bins, k: tl.constexpr, s, P: tl.constexpr):
    """t, h and w of bins numbered in this order."""
    oh = s.H if P.levels[k][1] == WHOLE else P.levels[k][1]
    ow = s.W if P.levels[k][2] == WHOLE else P.levels[k][2]
    return bins // ow // oh, bins // ow % oh, bins % ow


@triton.jit
def number(t, h, w, k: tl.constexpr, s, P: tl.constexpr):
    """Of the bin at t, h and w."""
    oh = s.H if P.levels[k][1] == WHOLE else P.levels[k][1]
    ow = s.W if P.levels[k][2] == WHOLE else P.levels[k][2]
    return (t * oh + h) * ow + w


# Where numbers lie (layout.py): of sample b's first, and within the sample


@triton.jit
def result_at(b, bins, channels, PART: tl.constexpr, k: tl.constexpr, s, P: tl.constexpr):
    """Of level k's maxima, or means where PART is the second of two; and of their gradients."""
    PARTS: tl.constexpr = P.maxima + P.means
    if P.flat:
        first = (b * s.total + s.before[k]) * PARTS * s.C
    else:
        first = b * s.bins[k] * PARTS * s.C
    if P.ndhwc and not P.flat:
        return first, (bins * PARTS + PART) * s.C + channels
    else:
        return first, (PART * s.C + channels) * s.bins[k] + bins


@triton.jit
def tape_at(b, bins, channels, k: tl.constexpr, s, P: tl.constexpr):
    """Of level k's codes, or of its indices where it has none."""
    total = s.indices if P.source[k] < 0 else s.codes
    if P.inner:
        return b * total * s.C, (s.column[k] + bins) * s.C + channels
    else:
        return b * total * s.C, channels * total + s.column[k] + bins
