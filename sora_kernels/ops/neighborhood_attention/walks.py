"""What the Triton kernels are told of a geometry: tables of integers, so that they know no axes, windows or dilation.

A tile's *rows* are the tokens that a program owns (queries; keys for dK and dV), its *columns* the box of tokens that
they see, walked BLOCK_N at a time in the order (t, h, w). Whether a row sees a column is three range checks, and one
word does them all: a column's coordinates in the box lie in three fields of a word, each below a guard bit. With
``low`` = guards - first coordinate seen, and ``high`` = guards + last, field by field,

    ((column + low) & (high - column) & guards) == guards

for neither sum crosses a field, and a guard is lost exactly where its field falls below zero. A row whose ``low`` is 0
sees nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import Axis, Ints, Size3, Tile, turned
from .options import Options

WORD = 28  # bits of coordinates beside three guards, the sign left alone
TILE_COST = 96  # columns that a tile's prologue costs
FOLD_LEAST = 4  # tiles that are worth a part of their own

Axes = tuple[Axis, Axis, Axis]


class Fields(NamedTuple):
    """Where the coordinates t, h, w lie in a word."""

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


class Walk(NamedTuple):
    """Tiles of rows and the columns that they walk.

    Attributes:
        rows: int32 ``[4, tiles * BLOCK_M]``: token (-1 for a pad), low, high, bias.
        tiles: int32 ``[tiles, 3]``: first of its slots, number of columns, token of its box's corner.
        slots: int32 ``[3, slots]``: of a box's columns: word, token from the corner, bias. A box's slots are followed
            by pads, or by those of a larger box.
        guards: of the words.

    The bias of a row and a column is the bias table's row.
    """

    rows: Tensor
    tiles: Tensor
    slots: Tensor
    guards: int


class Fold(NamedTuple):
    """What the bias gradient walks: from a tile's first query on, offsets mean the same for every tile.

    A block is BLOCK_N offsets (a box of them); a program folds the scores of one block over tiles that reach it.

    Attributes:
        rows: int32 ``[3, tiles * BLOCK_M]``: token (any for a pad), low, high.
        tiles: int32 ``[tiles, 3]``: token of its first query, low, high of its box of keys.
        columns: int32 ``[3, blocks * BLOCK_N]``: word, token from a tile's first query, bias.
        bias: int32 ``[BLOCK_M]``: of the rows.
        pairs: int32: tiles, those that reach a block together.
        parts: int32 ``[parts, 3]``: block, first and end of a part's pairs.
        first: int32 ``[blocks + 1]``: of a block's parts.
        sources: int32 ``[table rows, BLOCK_M]``: for the column that a row sees at a table row's offset, its block's
            number times BLOCK_M * BLOCK_N, plus the score's place in it; -1 where there is none.
        most: parts of a block.
        guards: of the words.
    """

    rows: Tensor
    tiles: Tensor
    columns: Tensor
    bias: Tensor
    pairs: Tensor
    parts: Tensor
    first: Tensor
    sources: Tensor
    most: int
    guards: int


def packed_bits(size: Sequence[int], options: Options) -> int:
    """Bits of a word, whatever the tile: no box is larger than the map, no fold than a tile beside two windows."""
    reach = (min(2 * n, n + 2 * w) for n, w in zip(size, options.window, strict=True))
    return sum((r + 64).bit_length() for r in reach)


@functools.lru_cache(maxsize=64)
def walk(
    size: Size3, options: Options, by_key: bool, block_m: int, block_n: int, device: torch.device
) -> Walk:
    """Of queries, or ``by_key`` of keys."""
    axes = options.axes(size)
    if by_key:
        axes = tuple(turned(a) for a in axes)  # type: ignore[assignment]
    lengths = _lengths(axes, block_m)
    tiles = _tiles(axes, lengths)
    sign = -1 if by_key else 1  # of a row's place in its query minus key
    extents = [[t.high - t.low for t in own] for own in tiles]
    fields = Fields.of([max(e) for e in extents])

    slots, firsts = _slots(axes, size, extents, fields, options.steps, -sign, block_n)
    corner = [[t.low for t in own] for own in tiles]
    heads = np.stack(
        [
            np.array(
                [[[firsts[h, w] for w in extents[2]] for h in extents[1]] for _ in extents[0]]
            ),
            _outer([np.array(e) for e in extents], np.multiply),
            _outer(_tokens(axes, size, [np.array(c) for c in corner]), np.add),
        ],
        -1,
    )
    rows = np.full((4, math.prod(heads.shape[:3]), block_m), 0)
    token, low, high, bias = (
        _places(tiles, lengths, of) for of in _row_parts(axes, size, options, fields, sign)
    )
    rows[0] = -1
    count = token.shape[1]
    valid = _places(tiles, lengths, lambda axis, tile, at: np.where(at < tile.stop, 0, -1)) == 0
    rows[0, :, :count] = np.where(valid, token, -1)
    rows[1, :, :count] = np.where(valid, fields.guards - low, 0)
    rows[2, :, :count] = fields.guards + high
    rows[3, :, :count] = bias + options.middle
    return Walk(
        _int32(rows.reshape(4, -1), device), _int32(heads.reshape(-1, 3), device), _int32(slots, device),
        fields.guards,
    )  # fmt: skip


def _row_parts(axes: Axes, size: Size3, options: Options, fields: Fields, sign: int):
    """Of a position in a tile, summed over the axes: token, first and last seen, bias."""
    strides = size[1] * size[2], size[2], 1

    def seen(axis: int, tile: Tile, at: Ints) -> Ints:
        return axes[axis].place[at.clip(max=tile.stop - 1)] * strides[axis]

    def low(axis: int, tile: Tile, at: Ints) -> Ints:
        return (axes[axis].start[at.clip(max=tile.stop - 1)] - tile.low) << fields.shifts[axis]

    def high(axis: int, tile: Tile, at: Ints) -> Ints:
        return (axes[axis].end[at.clip(max=tile.stop - 1)] - 1 - tile.low) << fields.shifts[axis]

    def bias(axis: int, tile: Tile, at: Ints) -> Ints:
        return sign * (at - tile.low) * options.steps[axis]

    return seen, low, high, bias


def _places(tiles: Sequence[Sequence[Tile]], lengths: Size3, of) -> Ints:
    """``[tiles, rows]``: a tile's positions in the order (t, h, w), each the sum over the axes of ``of``."""
    parts = []
    for axis, (own, n) in enumerate(zip(tiles, lengths, strict=True)):
        values = np.stack([of(axis, tile, tile.first + np.arange(n)) for tile in own])
        shape = [1] * 6
        shape[axis], shape[axis + 3] = values.shape
        parts.append(values.reshape(shape))
    total = parts[0] + parts[1] + parts[2]
    return total.reshape(math.prod(total.shape[:3]), -1)


def _slots(
    axes: Axes, size: Size3, extents: Sequence[Sequence[int]], fields: Fields, steps: Size3, sign: int, block_n: int,
) -> tuple[Ints, dict[tuple[int, int], int]]:  # fmt: skip
    """``Walk.slots``, and where each (h, w) extent's begin: boxes that differ along t alone share them."""
    strides = [a.dilation * s for a, s in zip(axes, (size[1] * size[2], size[2], 1), strict=True)]
    t = max(extents[0])
    found, firsts, total = [], {}, 0
    for h, w in itertools.product(sorted(set(extents[1])), sorted(set(extents[2]))):
        places = [np.arange(n) for n in (t, h, w)]
        columns = np.stack(
            [
                _outer([p << s for p, s in zip(places, fields.shifts, strict=True)], np.add),
                _outer([p * s for p, s in zip(places, strides, strict=True)], np.add),
                _outer([p * s * sign for p, s in zip(places, steps, strict=True)], np.add),
            ]
        ).reshape(3, -1)
        pads = np.zeros((3, -columns.shape[1] % block_n), dtype=np.int64)
        pads[0] = fields.pad
        firsts[h, w] = total
        total += columns.shape[1] + pads.shape[1]
        found += [columns, pads]
    return np.concatenate(found, 1), firsts


def _outer(parts: Sequence[Ints], join: np.ufunc) -> Ints:
    t, h, w = parts
    return join(join(t[:, None, None], h[None, :, None]), w[None, None, :])


def _tokens(axes: Axes, size: Size3, places: Sequence[Ints]) -> list[Ints]:
    strides = size[1] * size[2], size[2], 1
    return [a.place[p] * s for a, p, s in zip(axes, places, strides, strict=True)]


def _tiles(axes: Axes, lengths: Size3) -> list[list[Tile]]:
    return [axis.tiles(n) for axis, n in zip(axes, lengths, strict=True)]


@functools.lru_cache(maxsize=64)
def fold(
    size: Size3, options: Options, block_m: int, block_n: int, target: int, device: torch.device
) -> Fold:
    """In about ``target`` parts, if there are as many pairs of a tile and a block."""
    axes = options.axes(size)
    lengths = _lengths(axes, block_m)
    tiles = _tiles(axes, lengths)
    blocks = _block(tiles, block_n)
    base = [_aligned(own, n) for own, n in zip(tiles, blocks, strict=True)]
    # [low, high) of a tile's box and the blocks that it reaches, from the lowest block's corner.
    boxes = [
        [(t.low - t.first - b, t.high - t.first - b) for t in own]
        for own, b in zip(tiles, base, strict=True)
    ]
    count = [-(-max(high for _, high in own) // n) for own, n in zip(boxes, blocks, strict=True)]
    fields = Fields.of([c * n for c, n in zip(count, blocks, strict=True)])

    reached: list[list[Ints]] = []
    for own, n, c in zip(boxes, blocks, count, strict=True):
        of_axis = [
            np.flatnonzero([low < (b + 1) * n and high > b * n for low, high in own])
            for b in range(c)
        ]
        reached.append(of_axis)
    numbers = [len(own) for own in tiles]
    lists = [
        (
            (t[:, None, None] * numbers[1] + h[None, :, None]) * numbers[2] + w[None, None, :]
        ).reshape(-1)
        for t, h, w in itertools.product(*reached)
    ]
    total = sum(map(len, lists))
    chunk = max(FOLD_LEAST, -(-total // target))
    parts, first, at = [], [0], 0
    for block, own in enumerate(lists):
        parts += [(block, at + i, at + min(i + chunk, len(own))) for i in range(0, len(own), chunk)]
        first.append(len(parts))
        at += len(own)

    # Columns of the blocks, one block after another.
    strides = [a.dilation * s for a, s in zip(axes, (size[1] * size[2], size[2], 1), strict=True)]
    columns = np.zeros((3, math.prod(count), block_n), dtype=np.int64)
    columns[0] = fields.pad
    slot = np.full((math.prod(c * n for c, n in zip(count, blocks, strict=True)),), -1)
    for k, block in enumerate(itertools.product(*(range(c) for c in count))):
        places = [b * n + np.arange(n) for b, n in zip(block, blocks, strict=True)]
        values = [
            [p << s for p, s in zip(places, fields.shifts, strict=True)],
            [(p + b) * s for p, b, s in zip(places, base, strides, strict=True)],
            [-(p + b) * s for p, b, s in zip(places, base, options.steps, strict=True)],
        ]
        for row, parts_of in enumerate(values):
            own = _outer(parts_of, np.add).reshape(-1)
            columns[row, k, : len(own)] = own
        extent = [c * n for c, n in zip(count, blocks, strict=True)]
        flat = _outer(
            [p * s for p, s in zip(places, (extent[1] * extent[2], extent[2], 1), strict=True)],
            np.add,
        )
        slot[flat.reshape(-1)] = k * block_m * block_n + np.arange(flat.size)

    seen, low, high, _ = _row_parts(axes, size, options, fields, 1)
    moved = [[t._replace(low=t.first + b) for t in own] for own, b in zip(tiles, base, strict=True)]
    token, low_, high_ = (_places(moved, lengths, of) for of in (seen, low, high))
    valid = _places(moved, lengths, lambda axis, tile, at: np.where(at < tile.stop, 0, -1)) == 0
    own = token.shape[1]
    rows = np.zeros((3, token.shape[0], block_m), dtype=np.int64)
    rows[0, :, :own] = token
    rows[1, :, :own] = np.where(valid, fields.guards - low_, 0)
    rows[2, :, :own] = fields.guards + high_
    heads = np.stack(
        [
            _outer(
                _tokens(axes, size, [np.array([t.first for t in own]) for own in tiles]), np.add
            ),
            fields.guards
            - _outer(
                [
                    np.array([low for low, _ in own]) << s
                    for own, s in zip(boxes, fields.shifts, strict=True)
                ],
                np.add,
            ),
            fields.guards
            + _outer(
                [
                    np.array([high - 1 for _, high in own]) << s
                    for own, s in zip(boxes, fields.shifts, strict=True)
                ],
                np.add,
            ),
        ],
        -1,
    )
    local = [np.arange(n) for n in lengths]
    bias = np.zeros(block_m, dtype=np.int64)
    own = _outer([p * s for p, s in zip(local, options.steps, strict=True)], np.add).reshape(-1)
    bias[: len(own)] = own + options.middle
    sources = _sources(
        options.window,
        lengths,
        base,
        [c * n for c, n in zip(count, blocks, strict=True)],
        slot,
        block_m,
        block_n,
    )
    return Fold(
        _int32(rows.reshape(3, -1), device), _int32(heads.reshape(-1, 3), device),
        _int32(columns.reshape(3, -1), device), _int32(bias, device),
        _int32(np.concatenate(lists), device), _int32(np.array(parts), device),
        _int32(np.array(first), device), _int32(sources, device),
        int(np.diff(first).max()), fields.guards,
    )  # fmt: skip


def _sources(
    window: Size3, lengths: Size3, base: Sequence[int], extent: Sequence[int], slot: Ints, block_m: int, block_n: int
) -> Ints:  # fmt: skip
    """``Fold.sources``."""
    inside, place = [], []
    strides = extent[1] * extent[2], extent[2], 1
    for axis, (w, n, b, e, s) in enumerate(
        zip(window, lengths, base, extent, strides, strict=True)
    ):
        offset = np.arange(1 - w, w)  # query minus key
        at = np.arange(n)[None, :] - offset[:, None] - b  # the key's place in the fold
        shape = [1] * 6
        shape[axis], shape[axis + 3] = at.shape
        inside.append(((at >= 0) & (at < e)).reshape(shape))
        place.append((at * s).reshape(shape))
    rows = math.prod(2 * w - 1 for w in window)
    ok = (inside[0] & inside[1] & inside[2]).reshape(rows, -1)
    at = (place[0] + place[1] + place[2]).reshape(rows, -1)
    found = np.full((rows, block_m), -1)
    own = slot[np.where(ok, at, 0)] + np.arange(at.shape[1]) * block_n
    found[:, : at.shape[1]] = np.where(ok, own, -1)
    return found


def _aligned(tiles: Sequence[Tile], block: int) -> int:
    """Where blocks begin, from a tile's first query: at the corner that most boxes have, or whole blocks before."""
    corners = [t.low - t.first for t in tiles]
    usual = max(set(corners), key=lambda c: (corners.count(c), c))
    return usual - -(-(usual - min(corners)) // block) * block


def _block(tiles: Sequence[Sequence[Tile]], most: int) -> Size3:
    """The box of at most ``most`` offsets with the fewest pairs of a tile and a block that it reaches."""

    def reached(own: Sequence[Tile], n: int) -> int:
        base = _aligned(own, n)
        return sum(
            (t.high - 1 - t.first - base) // n - (t.low - t.first - base) // n + 1 for t in own
        )

    lengths = [
        sorted(
            {*range(1, most + 1)}
            & {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64, 128}
        )
        for _ in tiles
    ]
    counts = [{n: reached(own, n) for n in ns} for own, ns in zip(tiles, lengths, strict=True)]
    boxes = (b for b in itertools.product(*counts) if math.prod(b) <= most)
    return min(boxes, key=lambda b: (math.prod(c[n] for c, n in zip(counts, b, strict=True)), b))


@functools.lru_cache(maxsize=256)
def _lengths(axes: Axes, most: int) -> Size3:
    """Of a tile of at most ``most`` rows: the fewest columns to walk, over all tiles."""
    options = []
    for axis in axes:
        longest = int(np.diff(axis.cuts).max())
        found: dict[int, tuple[int, int]] = {}
        by_count: dict[int, int] = defaultdict(lambda: most + 1)
        for n in range(1, min(longest, most) + 1):
            tiles = axis.tiles(n)
            if n < by_count[len(tiles)]:  # the shortest of as many tiles
                by_count[len(tiles)] = n
                found[n] = (sum(t.high - t.low for t in tiles), len(tiles))
        options.append(found)

    def cost(lengths: Size3) -> int:
        columns, tiles = 1, 1
        for found, n in zip(options, lengths, strict=True):
            columns, tiles = columns * found[n][0], tiles * found[n][1]
        return columns + TILE_COST * tiles

    boxes = (b for b in itertools.product(*options) if math.prod(b) <= most)
    return min(boxes, key=cost)  # type: ignore[arg-type, return-value]


def _int32(values: np.ndarray, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives this call
        return torch.as_tensor(np.ascontiguousarray(values, dtype=np.int32), device=device)


def tile_lengths(size: Size3, options: Options, block_m: int) -> Size3:
    """Queries of a tile along t, h and w."""
    return _lengths(options.axes(size), block_m)
