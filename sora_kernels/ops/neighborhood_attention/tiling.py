"""Tiles of a map for the Triton kernels, and words that hold coordinates."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .geometry import Axis, Ints, Size3, turned
from .options import Options

WORD = 28  # bits of coordinates beside three guards, the sign left alone
TILE_COST = 96  # columns that a tile's prologue costs
SLACK = 128  # by which whole blocks may pass a fold's ends

Axes = tuple[Axis, Axis, Axis]


class Fields(NamedTuple):
    """Where the coordinates t, h, w lie in a word: each below a guard bit."""

    shifts: Size3
    bits: Size3

    @classmethod
    def of(cls, extents: Sequence[int]) -> Fields:
        t, h, w = (e.bit_length() for e in extents)  # all ones, the pad, is no coordinate
        return cls((h + w + 2, w + 1, 0), (t, h, w))

    @property
    def guards(self) -> int:
        return sum(1 << (s + b) for s, b in zip(self.shifts, self.bits, strict=True))

    @property
    def pad(self) -> int:
        """A column that no row sees."""
        return sum(((1 << b) - 1) << s for s, b in zip(self.shifts, self.bits, strict=True))

    def word(self, places: Sequence[Ints]) -> list[Ints]:
        """Coordinates of each axis where they lie in a word."""
        return [p << s for p, s in zip(places, self.shifts, strict=True)]


class Tiling:
    """Tiles of at most ``most`` rows (queries, or ``by_key`` keys), numbered by (t, h, w), and so are a tile's rows.

    Attributes:
        axes: seen from the rows.
        lengths: of a tile along t, h, w; at a class's end it has fewer rows.
        tiles: of each axis: int64 ``[tiles, 4]``, as ``geometry.Tile``.
        strides: from a token to the next along t, h, w.
        valid: ``[tiles, most]``: rows that are there.
    """

    def __init__(self, size: Size3, options: Options, by_key: bool, most: int) -> None:
        axes = options.axes(size)
        self.axes: Axes = tuple(turned(a) for a in axes) if by_key else axes  # type: ignore[assignment]
        self.lengths, self.most = tile_lengths(self.axes, most), most
        self.tiles = [
            np.array(axis.tiles(n)) for axis, n in zip(self.axes, self.lengths, strict=True)
        ]
        self.strides: Size3 = (size[1] * size[2], size[2], 1)
        places = [
            own[:, :1] + np.arange(n) for own, n in zip(self.tiles, self.lengths, strict=True)
        ]
        beyond = [at >= own[:, 1:2] for at, own in zip(places, self.tiles, strict=True)]
        self._places = [
            np.minimum(at, own[:, 1:2] - 1) for at, own in zip(places, self.tiles, strict=True)
        ]
        self.valid: NDArray[np.bool_] = self.rows([~b * 1 for b in beyond]) == 3

    def rows(self, values: Sequence[Ints]) -> Ints:
        """``[tiles, length]`` of each axis -> their sums ``[tiles, most]``, 0 beyond a tile."""
        spread = []
        for axis, of_axis in enumerate(values):
            shape = [1] * 6
            shape[axis], shape[axis + 3] = of_axis.shape
            spread.append(of_axis.reshape(shape))
        total = spread[0] + spread[1] + spread[2]
        total = total.reshape(math.prod(total.shape[:3]), -1)
        return np.pad(total, ((0, 0), (0, self.most - total.shape[1])))

    def tokens(self) -> Ints:
        """``[tiles, most]``; of rows that are not there, any."""
        return self.rows(
            self._steps([a.place[p] for a, p in zip(self.axes, self._places, strict=True)])
        )

    def corners(self, first: int) -> Ints:
        """The tokens where tiles begin (``first`` 0) or their boxes do (2), ``[tiles]``."""
        places = [a.place[own[:, first]] for a, own in zip(self.axes, self.tiles, strict=True)]
        return outer(self._steps(places)).reshape(-1)

    def windows(self, origins: Sequence[Ints], fields: Fields) -> tuple[Ints, Ints]:
        """``low`` and ``high`` of rows (see walks.py) ``[tiles, most]``, their coordinates from each tile's origin."""
        low, high = (
            self.rows(fields.word([b[p] - o[:, None] for b, p, o in zip(bounds, self._places, origins, strict=True)]))
            for bounds in ([a.start for a in self.axes], [a.end - 1 for a in self.axes])
        )  # fmt: skip
        return np.where(self.valid, fields.guards - low, 0), fields.guards + high

    def _steps(self, places: Sequence[Ints]) -> list[Ints]:
        return [p * s for p, s in zip(places, self.strides, strict=True)]

    def column_tokens(self, places: Sequence[Ints]) -> list[Ints]:
        """Tokens from a corner, for places counted from it."""
        return [p * s * a.dilation for p, s, a in zip(places, self.strides, self.axes, strict=True)]


def outer(parts: Sequence[Ints]) -> Ints:
    """Sums ``[t, h, w]``."""
    t, h, w = parts
    return t[:, None, None] + h[None, :, None] + w[None, None, :]


def packed_bits(size: Sequence[int], options: Options) -> int:
    """That coordinates take at most: a fold's, as far as two windows beside a tile."""
    reach = (min(2 * n, 2 * w + SLACK // 2) for n, w in zip(size, options.window, strict=True))
    return sum((r + SLACK).bit_length() for r in reach)


@functools.lru_cache(maxsize=256)
def tile_lengths(axes: Axes, most: int) -> Size3:
    """Of a tile of at most ``most`` rows: the fewest columns to walk, over all tiles."""
    found: list[dict[int, tuple[int, int]]] = []
    for axis in axes:
        of_count: dict[int, int] = {}
        for n in range(min(int(np.diff(axis.cuts).max()), most), 0, -1):
            of_count[len(axis.tiles(n))] = n  # the shortest of as many tiles
        found.append(
            {
                n: (sum(t.high - t.low for t in axis.tiles(n)), count)
                for count, n in of_count.items()
            }
        )

    def cost(lengths: Sequence[int]) -> int:
        columns = tiles = 1
        for of_axis, n in zip(found, lengths, strict=True):
            columns, tiles = columns * of_axis[n][0], tiles * of_axis[n][1]
        return columns + TILE_COST * tiles

    return min((b for b in itertools.product(*found) if math.prod(b) <= most), key=cost)  # type: ignore[return-value]


def int32(values: Ints, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives this call
        return torch.as_tensor(np.ascontiguousarray(values, dtype=np.int32), device=device)
