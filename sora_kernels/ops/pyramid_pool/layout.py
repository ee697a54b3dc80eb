"""Where a pyramid's numbers lie: outputs, their gradients and the tapes, as offsets and strides for a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .levels import WHOLE, Level, bins, plan


class Form(NamedTuple):
    """What a call asks for, beside its tensors. All of it is known without looking at sizes.

    Attributes:
        levels: bins of t, h, w; ``WHOLE`` keeps an axis.
        mode: "max", "avg" or "maxavg".
        flat: one ``[B, F]`` rather than a map a level.
        ndhwc: x and the maps have their channels last.
        inner: channels are innermost in x's memory, and so in the tapes and in dx.
        codes: of a level that follows from another, the tape is one byte a bin: which child won.
    """

    levels: tuple[Level, ...]
    mode: str
    flat: bool
    ndhwc: bool
    inner: bool
    codes: bool

    @property
    def has_max(self) -> bool:
        return self.mode != "avg"

    @property
    def has_avg(self) -> bool:
        return self.mode != "max"

    @property
    def parts(self) -> int:
        """Values a bin and channel."""
        return 2 if self.mode == "maxavg" else 1


class Part(NamedTuple):
    """One level's maxima or means: element (b, c, bin) of ``tensor`` is ``offset`` and strides away from its
    first; bins are flattened t, h, w.
    """

    level: int
    kind: str  # "max" or "avg"
    tensor: Tensor
    offset: int
    batch_stride: int
    channel_stride: int
    bin_stride: int


def volume(level: Level) -> int:
    t, h, w = level
    return t * h * w


def shapes(form: Form, batch: int, channels: int, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Of the results: one ``[B, F]``, or a map a level."""
    width = channels * form.parts
    counted = [bins(level, sizes) for level in form.levels]
    if form.flat:
        return [(batch, width * sum(map(volume, counted)))]
    return [(batch, *o, width) if form.ndhwc else (batch, width, *o) for o in counted]


def parts(form: Form, results: Sequence[Tensor], channels: int, sizes: Sequence[int]) -> list[Part]:
    """``results``: contiguous tensors of :func:`shapes`, or their gradients."""
    kinds = ("max", "avg") if form.mode == "maxavg" else (form.mode,)
    found, start = [], 0
    for k, level in enumerate(form.levels):
        count = volume(bins(level, sizes))
        block = channels * count
        for n, kind in enumerate(kinds):
            if form.flat:
                tensor, strides = results[0], (results[0].shape[1], count, 1)
                offset, start = start, start + block
            elif form.ndhwc:
                tensor, strides = results[k], (len(kinds) * block, 1, len(kinds) * channels)
                offset = n * channels
            else:
                tensor, strides = results[k], (len(kinds) * block, count, 1)
                offset = n * block
            found.append(Part(k, kind, tensor, offset, *strides))
    return found


class Tape(NamedTuple):
    """Which columns of the tapes belong to which level.

    ``indices`` (int32: place in the flattened T, H, W) and ``codes`` (uint8: place in the flattened block of
    children) are ``[B, C, columns]``, or ``[B, columns, C]`` where channels are inner. ``column[k]`` is level
    k's first, in codes if ``coded[k]``.
    """

    coded: tuple[bool, ...]
    column: tuple[int, ...]
    indices: int
    codes: int


def tape(form: Form, sizes: Sequence[int]) -> Tape:
    source = plan(form.levels, None).source if form.codes else (-1,) * len(form.levels)
    counts, column, coded = [0, 0], [], []
    for level, s in zip(form.levels, source, strict=True):
        is_coded = s >= 0 and volume(children(level, form.levels[s])) <= MAX_CHILDREN
        coded.append(is_coded)
        column.append(counts[is_coded])
        counts[is_coded] += volume(bins(level, sizes))
    return Tape(tuple(coded), tuple(column), counts[0], counts[1])


MAX_CHILDREN = 256


def children(level: Level, source: Level) -> Level:
    """How many of the source's bins make up one of the level's, an axis."""
    t, h, w = (1 if o == WHOLE else f // o for o, f in zip(level, source, strict=True))
    return t, h, w


def empty_tapes(form: Form, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x is ``[B, C, T, H, W]``, whatever its strides."""
    found = tape(form, sizes)
    B, C = x.shape[:2]

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        shape = (B, columns, C) if form.inner else (B, C, columns)
        return x.new_empty(shape, dtype=dtype)

    return empty(found.indices, torch.int32), empty(found.codes, torch.uint8)
