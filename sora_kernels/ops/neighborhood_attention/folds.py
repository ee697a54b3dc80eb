"""What the kernels of the bias gradient walk. Counted from a tile's first query, a key's place says its offset for
every row of the tile, and so the row of the bias table, whichever tile it is.

A block is a box of BLOCK_N such places. A program adds up the gradients of one block's scores over tiles that reach it;
then each entry of the table gathers the BLOCK_M scores that have its offset.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import Ints, Size3
from .options import Options
from .tiling import Fields, Tiling, int32, outer

LEAST = 4  # tiles that are worth a part of their own
_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64)


class Fold(NamedTuple):
    """Attributes:
    rows: int32 ``[3, tiles * BLOCK_M]``: token (any for a pad), low, high.
    tiles: int32 ``[tiles, 3]``: token of its first query, low, high of its box of keys.
    columns: int32 ``[3, blocks * BLOCK_N]``: word, token from a tile's first query, bias.
    bias: int32 ``[BLOCK_M]``: of the rows.
    pairs: int32: tiles, those that reach a block together.
    parts: int32 ``[parts, 3]``: block, first and end of a part's pairs.
    first: int32 ``[blocks + 1]``: of a block's parts.
    sources: int32 ``[table rows, BLOCK_M]``: for the column that a row sees at a table row's offset, its block's number
        times BLOCK_M * BLOCK_N, plus the score's place in it; -1 where there is none.
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


class _Blocks:
    """Along one axis: blocks of ``length`` places, from place ``base`` on.

    Attributes:
        boxes: int64 ``[tiles, 2]``: a tile's box of keys, from ``base``.
        count: blocks that reach as far as any box.
    """

    def __init__(self, tiles: Ints, length: int) -> None:
        boxes = tiles[:, 2:] - tiles[:, :1]
        corners, counts = np.unique(boxes[:, 0], return_counts=True)
        usual = int(corners[counts.argmax()])  # where most boxes begin, a block does
        self.base = usual - -(-(usual - int(corners[0])) // length) * length
        self.length, self.boxes = length, boxes - self.base
        self.count = -(-int(self.boxes[:, 1].max()) // length)
        self.extent = self.count * length

    def tiles_of(self, block: int) -> Ints:
        low, high = self.boxes.T
        return np.flatnonzero((low < (block + 1) * self.length) & (high > block * self.length))

    def pairs(self) -> int:
        low, high = self.boxes.T
        return int(((high - 1) // self.length - low // self.length + 1).sum())


@functools.lru_cache(maxsize=64)
def fold(
    size: Size3, options: Options, block_m: int, block_n: int, target: int, device: torch.device
) -> Fold:
    """In about ``target`` parts, if there are as many pairs of a tile and a block."""
    tiling = Tiling(size, options, False, block_m)
    axes = _blocks(tiling, block_n)
    fields = Fields.of([a.extent for a in axes])
    low, high = tiling.windows(
        [own[:, 0] + a.base for own, a in zip(tiling.tiles, axes, strict=True)], fields
    )
    rows = np.stack([tiling.tokens(), low, high]).reshape(3, -1)
    lowest, highest = (
        outer(fields.word([a.boxes[:, end] - end for a in axes])).reshape(-1) for end in (0, 1)
    )
    tiles = np.stack([tiling.corners(0), fields.guards - lowest, fields.guards + highest], -1)
    local = [np.arange(n) * s for n, s in zip(tiling.lengths, options.steps, strict=True)]
    bias = outer(local).reshape(-1) + options.middle
    columns, places = _columns(tiling, axes, fields, options, block_n)
    pairs, parts, first = _parts(tiling, axes, target)
    sources = _sources(tiling, axes, options, places, block_n)
    bias = np.pad(bias, (0, block_m - len(bias)))
    on = functools.partial(int32, device=device)
    return Fold(
        on(rows), on(tiles), on(columns), on(bias), on(pairs), on(parts), on(first), on(sources),
        int(np.diff(first).max()), fields.guards,
    )  # fmt: skip


def _blocks(tiling: Tiling, most: int) -> list[_Blocks]:
    """Of at most ``most`` places, with the fewest pairs of a tile and a block that it reaches."""
    choices = [[_Blocks(own, n) for n in _LENGTHS if n <= most] for own in tiling.tiles]
    fitting = (c for c in itertools.product(*choices) if math.prod(a.length for a in c) <= most)
    return list(min(fitting, key=lambda c: math.prod(a.pairs() for a in c)))


def _columns(
    tiling: Tiling, axes: Sequence[_Blocks], fields: Fields, options: Options, block_n: int
) -> tuple[Ints, Ints]:
    """``Fold.columns``, and where the places (t, h, w) from the bases lie among them."""
    blocks = list(itertools.product(*(range(a.count) for a in axes)))
    columns = np.zeros((3, len(blocks), block_n), dtype=np.int64)
    columns[0] = fields.pad
    found = np.zeros([a.extent for a in axes], dtype=np.int64)
    for number, block in enumerate(blocks):
        own = [b * a.length + np.arange(a.length) for b, a in zip(block, axes, strict=True)]
        from_tile = [p + a.base for p, a in zip(own, axes, strict=True)]
        bias = [-p * s for p, s in zip(from_tile, options.steps, strict=True)]
        values = [outer(x) for x in (fields.word(own), tiling.column_tokens(from_tile), bias)]
        count = values[0].size
        columns[:, number, :count] = np.stack(values).reshape(3, -1)
        found[np.ix_(*own)] = number * block_n + np.arange(count).reshape(values[0].shape)
    return columns.reshape(3, -1), found


def _parts(tiling: Tiling, axes: Sequence[_Blocks], target: int) -> tuple[Ints, Ints, Ints]:
    """``Fold.pairs``, ``Fold.parts`` and ``Fold.first``."""
    _, h, w = (len(own) for own in tiling.tiles)
    reached = [[a.tiles_of(b) for b in range(a.count)] for a in axes]
    lists = [
        outer([t * h * w, y * w, x]).reshape(-1) for t, y, x in itertools.product(*reached)
    ]  # fmt: skip
    chunk = max(LEAST, -(-sum(map(len, lists)) // target))
    parts, first, at = [], [0], 0
    for block, own in enumerate(lists):
        ends = [*range(chunk, len(own), chunk), len(own)] if len(own) else []
        parts += [(block, at + end - (end - 1) % chunk - 1, at + end) for end in ends]
        first.append(len(parts))
        at += len(own)
    return np.concatenate(lists), np.array(parts), np.array(first)


def _sources(
    tiling: Tiling, axes: Sequence[_Blocks], options: Options, places: Ints, block_n: int
) -> Ints:
    """``Fold.sources``."""
    ats, oks = [], []
    for axis, (a, w, n) in enumerate(zip(axes, options.window, tiling.lengths, strict=True)):
        offset = np.arange(1 - w, w)  # query minus key
        at = np.arange(n) - offset[:, None] - a.base  # the key's place
        shape = [1] * 6
        shape[axis], shape[axis + 3] = at.shape
        oks.append(((at >= 0) & (at < a.extent)).reshape(shape))
        ats.append(at.clip(0, a.extent - 1).reshape(shape))
    column = places[tuple(ats)].reshape(options.rows, -1)
    ok = (oks[0] & oks[1] & oks[2]).reshape(options.rows, -1)
    row = np.arange(column.shape[1])
    block, at = column // block_n, column % block_n
    source = (block * tiling.most + row) * block_n + at
    found = np.where(ok, source, -1)
    return np.pad(found, ((0, 0), (0, tiling.most - found.shape[1])), constant_values=-1)
