"""Which keys a query sees on one axis, and tiles of queries with the boxes of keys that they need. Integers alone.

Dilation d parts an axis into d residue classes that do not see each other. Positions are counted class after class, so
that a class is a range, and windows are ranges of positions whatever the dilation. Their starts and ends do not fall
as the query's position grows: a tile of consecutive queries needs the keys from its first start to its last end, and
the queries that see a key are a range as well (:func:`turned`), so backward walks what forward walks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Size3 = tuple[int, int, int]
Ints = NDArray[np.int64]


class Tile(NamedTuple):
    """Consecutive positions ``first .. stop`` of a class, and the box ``low .. high`` of what they see."""

    first: int
    stop: int
    low: int
    high: int


class Axis:
    """Attributes:
    place: int64 ``[n]``: the coordinate at a position.
    start, end: int64 ``[n]``: the positions that the one at a position sees.
    cuts: where classes begin, and n.
    dilation: the step between neighbours of a class.
    """

    def __init__(self, place: Ints, start: Ints, end: Ints, cuts: Ints, dilation: int) -> None:
        self.place, self.start, self.end = place, start, end
        self.cuts, self.dilation = cuts, dilation

    def tiles(self, length: int) -> list[Tile]:
        """Of at most ``length`` positions; none spans two classes."""
        return _tiles(self, length)


@functools.lru_cache(maxsize=1024)
def _tiles(axis: Axis, length: int) -> list[Tile]:
    found = []
    for low, high in zip(axis.cuts[:-1].tolist(), axis.cuts[1:].tolist(), strict=True):
        for first in range(low, high, length):
            stop = min(first + length, high)
            found.append(Tile(first, stop, int(axis.start[first]), int(axis.end[stop - 1])))
    return found


@functools.lru_cache(maxsize=1024)
def axis(size: int, window: int, stride: int, dilation: int, causal: bool) -> Axis:
    """Of ``size`` coordinates; NATTEN's windows, clipped where a class is shorter."""
    lengths = [-(-(size - r) // dilation) for r in range(min(dilation, size))]
    cuts = np.cumsum([0, *lengths])
    place, start, end = [], [], []
    for r, n in enumerate(lengths):
        i = np.arange(n)
        w = min(window, n)
        if causal:
            leader = np.minimum(i // stride * stride + stride - 1, n - 1)
            low, high = np.maximum(leader - w + 1, 0), i + 1
        else:
            leader = np.minimum(i // stride * stride + stride // 2, n - 1)
            low = np.clip(leader - w // 2, 0, n - w)
            high = low + w
        place.append(r + i * dilation)
        start.append(cuts[r] + low)
        end.append(cuts[r] + high)
    return Axis(np.concatenate(place), np.concatenate(start), np.concatenate(end), cuts, dilation)


@functools.lru_cache(maxsize=1024)
def turned(axis: Axis) -> Axis:
    """Seen from the keys: ``start .. end`` are the queries that see the key at a position."""
    keys = np.arange(len(axis.place))
    first = np.searchsorted(axis.end, keys, side="right")
    last = np.searchsorted(axis.start, keys, side="right")
    return Axis(axis.place, first, last, axis.cuts, axis.dilation)
