"""A map cut into tiles of queries for backend "torch": tiles whose queries see their boxes in the same way together."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .geometry import Axis, Ints, Size3, Tile
from .options import Options

# What a tile costs beside its scores, in queries more (its keys are copied), and a group, in scores.
COPY = 32
CALL = 1 << 16
MOST = 1 << 20  # scores of a tile: some eight passes of backward go over them
MASKED = -1e9
_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 256, 512, 1024)


class Group(NamedTuple):
    """Tiles of m queries, each with a box of n keys.

    Attributes:
        queries, keys: int64 ``[tiles, m]`` and ``[tiles, n]``: tokens ``t H W + h W + w``.
        boxes: where a tile's keys lie on the map: a slice along t, h and w.
        extent: of a box.
        mask: fp32 ``[m, n]``, 0 or ``MASKED``; None where all of a box is seen.
        rows: int64 ``[m * n]``: of the bias table (any where not seen); None without a bias.
    """

    queries: Tensor
    keys: Tensor
    boxes: list[tuple[slice, slice, slice]]
    extent: Size3
    mask: Tensor | None
    rows: Tensor | None


class _Kind(NamedTuple):
    """Tiles of one axis that look alike from inside: sizes, windows within the box, the box's place."""

    tiles: list[Tile]
    queries: Ints  # coordinates [tiles, m]
    keys: Ints  # [tiles, n]
    seen: NDArray[np.bool_]  # [m, n]
    offset: Ints  # query - key [m, n]


@functools.lru_cache(maxsize=64)
def groups(size: Size3, options: Options, bias: bool, device: torch.device) -> list[Group]:
    axes = options.axes(size)
    kinds = [_kinds(axis, n) for axis, n in zip(axes, _lengths(axes), strict=True)]
    _, H, W = size
    found = []
    with torch.inference_mode(False):  # they outlive this call
        for t, h, w in itertools.product(*kinds):
            token = [
                _join(t_ * H * W, h_ * W, w_)
                for t_, h_, w_ in ((t.queries, h.queries, w.queries), (t.keys, h.keys, w.keys))
            ]
            queries, keys = (torch.as_tensor(x, device=device) for x in token)
            boxes = [
                (_slice(axes[0], a), _slice(axes[1], b), _slice(axes[2], c))
                for a in t.tiles
                for b in h.tiles
                for c in w.tiles
            ]
            seen = _pairs(t.seen, h.seen, w.seen, join=np.logical_and)
            mask = rows = None
            if not seen.all():
                mask = torch.as_tensor(
                    np.where(seen, np.float32(0), np.float32(MASKED)), device=device
                )
            if bias:
                offsets = zip((t, h, w), options.window, options.steps, strict=True)
                parts = [np.clip(kind.offset, 1 - n, n - 1) * s for kind, n, s in offsets]
                row = _pairs(*parts, join=np.add) + options.middle
                rows = torch.as_tensor(row.reshape(-1), device=device)
            extent = t.keys.shape[1], h.keys.shape[1], w.keys.shape[1]
            found.append(Group(queries, keys, boxes, extent, mask, rows))
    return found


def _join(t: Ints, h: Ints, w: Ints) -> Ints:
    """``[tiles, slots]`` of the axes -> their sums, ``[tiles, slots]`` in the order (t, h, w)."""
    total = (
        t[:, None, None, :, None, None] + h[None, :, None, None, :, None] + w[None, None, :, None, None, :]
    )  # fmt: skip
    return total.reshape(len(t) * len(h) * len(w), -1)


def _pairs(t: np.ndarray, h: np.ndarray, w: np.ndarray, *, join: np.ufunc) -> np.ndarray:
    """``[queries, keys]`` of the axes -> joined, ``[queries, keys]``."""
    total = join(
        join(t[:, None, None, :, None, None], h[None, :, None, None, :, None]), w[None, None, :, None, None, :]
    )  # fmt: skip
    return total.reshape(len(t) * len(h) * len(w), -1)


def _slice(axis: Axis, tile: Tile) -> slice:
    first, last = axis.place[tile.low], axis.place[tile.high - 1]
    return slice(int(first), int(last) + 1, axis.dilation)


def _kinds(axis: Axis, length: int) -> list[_Kind]:
    alike = defaultdict(list)
    for tile in axis.tiles(length):
        own = slice(tile.first, tile.stop)
        windows = *(axis.start[own] - tile.low), *(axis.end[own] - tile.low)
        alike[windows, tile.high - tile.low, tile.first - tile.low].append(tile)
    found = []
    for tiles in alike.values():
        tile = tiles[0]
        queries, keys = np.arange(tile.first, tile.stop), np.arange(tile.low, tile.high)
        seen = (axis.start[queries, None] <= keys) & (keys < axis.end[queries, None])
        found.append(
            _Kind(
                tiles,
                np.stack([axis.place[t.first : t.stop] for t in tiles]),
                np.stack([axis.place[t.low : t.high] for t in tiles]),
                seen,
                queries[:, None] - keys[None, :],
            )
        )
    return found


def _lengths(axes: tuple[Axis, Axis, Axis]) -> Size3:
    """Of a tile: the least work, of the scores and of copying keys."""

    class Cost(NamedTuple):
        scores: int  # of queries times keys, over the tiles
        keys: int
        kinds: int
        queries: int  # of a tile, at most
        extent: int

    costs = []
    for axis in axes:
        n = len(axis.place)
        of_axis = {}
        for length in {min(x, n) for x in (*_LENGTHS, n)}:
            tiles = axis.tiles(length)
            of_axis[length] = Cost(
                sum((t.stop - t.first) * (t.high - t.low) for t in tiles),
                sum(t.high - t.low for t in tiles),
                len({(t.stop - t.first, t.high - t.low, t.first - t.low) for t in tiles}),
                max(t.stop - t.first for t in tiles),
                max(t.high - t.low for t in tiles),
            )
        costs.append(of_axis)

    def work(lengths: Size3) -> tuple[bool, int]:
        scores = keys = kinds = most = 1
        for of_axis, length in zip(costs, lengths, strict=True):
            cost = of_axis[length]
            scores, keys, kinds = scores * cost.scores, keys * cost.keys, kinds * cost.kinds
            most *= cost.queries * cost.extent
        return most > MOST, scores + COPY * keys + CALL * kinds

    return min(itertools.product(*costs), key=work)  # type: ignore[arg-type, return-value]
