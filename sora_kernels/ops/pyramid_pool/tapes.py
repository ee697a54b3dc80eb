"""Tapes from the places of the maxima and back, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .layout import Form, children, empty_tapes, tape, volume
from .levels import Level, bins, plan


def pack(
    places: Sequence[Tensor], form: Form, like: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``indices`` and ``codes`` (see ``layout.Tape``) of int64 places ``[B, C, t, h, w]``, one a level."""
    found, source = tape(form, sizes), plan(form.levels, None).source
    indices, codes = empty_tapes(form, like, sizes)
    for k, at in enumerate(places):
        target, values = indices, at
        if found.coded[k]:
            block = children(form.levels[k], form.levels[source[k]])
            same = _blocks(places[source[k]], block) == at.unsqueeze(-1)
            target, values = codes, same.byte().argmax(-1)
        _columns(target, form, found.column[k], values.flatten(2).shape[2]).copy_(values.flatten(2))
    return indices, codes


def unpack(
    indices: Tensor, codes: Tensor, form: Form, sizes: Sequence[int]
) -> list[Tensor]:  # fmt: skip
    """The places that :func:`pack` was given."""
    found, (source, order) = tape(form, sizes), plan(form.levels, None)
    places: list[Tensor | None] = [None] * len(form.levels)
    for k in order:
        size = bins(form.levels[k], sizes)
        tensor = codes if found.coded[k] else indices
        values = _columns(tensor, form, found.column[k], volume(size)).long()
        values = values.unflatten(2, size)
        if found.coded[k]:
            finer = places[source[k]]
            assert finer is not None
            block = children(form.levels[k], form.levels[source[k]])
            values = _blocks(finer, block).gather(-1, values.unsqueeze(-1)).squeeze(-1)
        places[k] = values
    return places  # type: ignore[return-value]


def _columns(t: Tensor, form: Form, first: int, count: int) -> Tensor:
    """[B, C, count] of a tape."""
    t = t.transpose(1, 2) if form.inner else t
    return t.narrow(2, first, count)


def _blocks(fine: Tensor, block: Level) -> Tensor:
    """[B, C, t * kt, h * kh, w * kw] -> [B, C, t, h, w, kt * kh * kw]."""
    kt, kh, kw = block
    split = fine.unflatten(4, (-1, kw)).unflatten(3, (-1, kh)).unflatten(2, (-1, kt))
    return split.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5)
