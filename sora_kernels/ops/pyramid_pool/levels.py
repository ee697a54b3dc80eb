"""Levels of a pyramid: what a caller may write, the bins they mean, and which level follows from which."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch.compiler import is_dynamo_compiling

Given: TypeAlias = int | tuple[int | None, int | None, int | None]
Level: TypeAlias = tuple[int, int, int]  # bins of t, h, w

WHOLE = 0  # as a number of bins: one for every element of the axis


def parse(levels: Sequence[Given], output: str) -> tuple[Level, ...]:
    """The public argument; whole axes become ``WHOLE``."""
    if is_dynamo_compiling():
        return _parse(levels, output)
    try:
        return _known(levels, output)
    except TypeError:  # a list has no hash
        return _parse(levels, output)


def _parse(levels: Sequence[Given], output: str) -> tuple[Level, ...]:
    if isinstance(levels, (int, str)) or not isinstance(levels, Sequence) or not levels:
        raise ValueError(
            f"pyramid_pool3d: levels must be a non-empty sequence of ints or (t, h, w), got {levels!r}"
        )
    return tuple(_level(level, output) for level in levels)


_known = functools.lru_cache(maxsize=256)(_parse)


def _level(given: Given, output: str) -> Level:
    bins = (given,) * 3 if isinstance(given, int) else given
    if (
        not isinstance(bins, Sequence)
        or len(bins) != 3
        or any(o is not None and (not isinstance(o, int) or o < 1) for o in bins)
    ):
        raise ValueError(
            "pyramid_pool3d: each level must be a positive int or a (t, h, w) of positive ints or "
            f"None, got {given!r}"
        )
    if output == "flat" and None in bins:
        raise ValueError(
            "pyramid_pool3d: None keeps an axis whole and needs output='maps', "
            f"got {given!r} with output='flat'"
        )
    t, h, w = (WHOLE if o is None else int(o) for o in bins)
    return t, h, w


def bins(level: Level, sizes: Sequence[int]) -> Level:
    """The level's numbers of bins over T, H, W."""
    t, h, w = (n if o == WHOLE else o for o, n in zip(level, sizes, strict=True))
    return t, h, w


def span(i: int, o: int, n: int) -> tuple[int, int]:
    """Bin ``i`` of ``o`` over ``n`` elements: from, to (excluded). Neighbours may overlap."""
    return i * n // o, -(-(i + 1) * n // o)


class Plan(NamedTuple):
    """Where each level's maxima come from.

    Attributes:
        source: for each level the number of the level whose bins make up its own, or -1: x itself.
        order: the levels, each after its source.
    """

    source: tuple[int, ...]
    order: tuple[int, ...]


def plan(levels: Sequence[Level], sizes: Sequence[int] | None) -> Plan:
    """If a number of bins divides a finer one on every axis, a coarse bin is exactly the union of its fine
    ones, whether or not bins overlap: its maximum and the place of it follow from theirs.

    Args:
        levels: whole axes are ``WHOLE``.
        sizes: T, H, W; None where they differ from sample to sample or must not matter, and a whole
            axis then divides into nothing but itself.
    """
    counted = [level if sizes is None else bins(level, sizes) for level in levels]
    source: list[int] = []
    for k, own in enumerate(counted):
        finer = [
            (_volume(other), j)
            for j, other in enumerate(counted)
            if (j < k if other == own else _divides(own, other))
        ]
        source.append(min(finer)[1] if finer else -1)

    def depth(k: int) -> int:
        return 0 if source[k] < 0 else 1 + depth(source[k])

    return Plan(tuple(source), tuple(sorted(range(len(source)), key=depth)))


def _divides(level: Level, finer: Level) -> bool:
    return all(f == o if WHOLE in (o, f) else f % o == 0 for o, f in zip(level, finer, strict=True))


def _volume(level: Level) -> int:
    t, h, w = (o or 1 for o in level)  # whole axes are whole in all that are compared
    return t * h * w
