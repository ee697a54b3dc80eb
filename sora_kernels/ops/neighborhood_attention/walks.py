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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import Ints, Size3
from .options import Options
from .tiling import Fields, Tiling, int32, outer


class Walk(NamedTuple):
    """Tiles of rows and the columns that they walk.

    Attributes:
        rows: int32 ``[4, tiles * BLOCK_M]``: token (-1 for a pad), low, high, bias.
        tiles: int32 ``[tiles, 3]``: first of its slots, number of columns, token of its box's corner.
        slots: int32 ``[3, slots]``: of a box's columns: word, token from the corner, bias. A box's slots are followed
            by pads, or by those of a larger box.
        guards: of the words.
        lengths: rows of a tile along t, h, w.

    The bias of a row and of a column make the bias table's row.
    """

    rows: Tensor
    tiles: Tensor
    slots: Tensor
    guards: int
    lengths: Size3


@functools.lru_cache(maxsize=64)
def walk(
    size: Size3, options: Options, by_key: bool, block_m: int, block_n: int, device: torch.device
) -> Walk:
    """Of queries, or ``by_key`` of keys."""
    tiling = Tiling(size, options, by_key, block_m)
    extents = [own[:, 3] - own[:, 2] for own in tiling.tiles]
    fields = Fields.of([int(e.max()) for e in extents])
    steps = [-s if by_key else s for s in options.steps]  # of the table's rows, as the row goes on
    slots, firsts = _slots(tiling, extents, fields, steps, block_n)
    t, h, w = extents
    tiles = np.stack(
        [
            np.broadcast_to(firsts, (len(t), *firsts.shape)).reshape(-1),
            (t[:, None, None] * h[:, None] * w).reshape(-1),
            tiling.corners(2),
        ],
        -1,
    )
    low, high = tiling.windows([own[:, 2] for own in tiling.tiles], fields)
    bias = tiling.rows(
        [
            (own[:, :1] - own[:, 2:3] + np.arange(n)) * s
            for own, n, s in zip(tiling.tiles, tiling.lengths, steps, strict=True)
        ]
    )
    token = np.where(tiling.valid, tiling.tokens(), -1)
    rows = np.stack([token, low, high, bias + options.middle]).reshape(4, -1)
    return Walk(
        int32(rows, device), int32(tiles, device), int32(slots, device), fields.guards, tiling.lengths
    )  # fmt: skip


def _slots(
    tiling: Tiling, extents: Sequence[Ints], fields: Fields, steps: Sequence[int], block_n: int
) -> tuple[Ints, Ints]:
    """``Walk.slots``, and where those of the tiles (h, w) begin: boxes that differ along t alone share them."""
    t, h, w = extents
    found, total = [], 0
    firsts = np.zeros((len(h), len(w)), dtype=np.int64)
    for extent in itertools.product(np.unique(h), np.unique(w)):
        places = [np.arange(n) for n in (t.max(), *extent)]
        columns = np.stack(
            [
                outer(fields.word(places)),
                outer(tiling.column_tokens(places)),
                outer([-p * s for p, s in zip(places, steps, strict=True)]),
            ]
        ).reshape(3, -1)
        pads = np.zeros((3, -columns.shape[1] % block_n), dtype=np.int64)
        pads[0] = fields.pad
        firsts[(h[:, None] == extent[0]) & (w == extent[1])] = total
        total += columns.shape[1] + pads.shape[1]
        found += [columns, pads]
    return np.concatenate(found, 1), firsts
