"""Where windows lie on a map: which token is in which slot of which window, and which slots see each other.

All of it follows from integers, is built once a geometry, and holds no tensor: :func:`plan`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .options import Size3, fit

Ints = NDArray[np.int64]


class Axis(NamedTuple):
    """One axis: windows side by side, each a row of slots.

    Attributes:
        place: ``[windows, slots]``: the coordinate in a slot; from the map's size on, a pad.
        wrapped: ``[windows, slots]``: whether the shift brought it round from the other end.
    """

    place: Ints
    wrapped: NDArray[np.bool_]


def _axis(size: int, window: int, shift: int, border: str) -> Axis:
    count = -(-size // window)
    number = np.arange(count * window)
    if border == "grid":
        place = number.reshape(window, count).T
        return Axis(place, np.zeros_like(place, dtype=bool))
    place = number.reshape(count, window)
    return Axis((place + shift) % (count * window), place >= count * window - shift)


class Piece(NamedTuple):
    """Boxes of equal slots, in several windows, whose tokens see each other and nothing else.

    Attributes:
        slots: int64 ``[n]``: which of a window's slots.
        token: int64 ``[boxes, n]``: as :attr:`WindowPlan.token`; pads are at the same places in every box.
    """

    slots: Ints
    token: Ints


class WindowPlan:
    """Windows of one size over a map ``(T, H, W)``.

    Windows are numbered by (t, h, w), the ``tokens`` slots of each by (t, h, w) inside it. A window larger than the map
    is clipped to it and not shifted; elsewhere the map is padded at its end to whole windows.

    Attributes:
        size, window, shift, border: the geometry, window and shift as they are used.
        grid: windows along t, h and w; ``windows`` in all.
        token: int64 ``[windows, tokens]``: t H W + h W + w; of pad number p, -1 - p.
        region: int64 ``[windows, tokens]``: slots with different codes do not see each other.
        frame: int64 ``[windows, tokens]``: t, from T on for pads past the end.
        pads: their number.
    """

    def __init__(
        self, size: Sequence[int], window: Sequence[int], shift: Sequence[int], border: str
    ) -> None:
        self.size: Size3 = tuple(size)  # type: ignore[assignment]
        self.window, self.shift = fit(size, window, shift)
        self.border = border
        self._axes = [
            _axis(n, w, s, border)
            for n, w, s in zip(self.size, self.window, self.shift, strict=True)
        ]
        self.grid: Size3 = tuple(axis.place.shape[0] for axis in self._axes)
        self.windows, self.tokens = math.prod(self.grid), math.prod(self.window)
        t, h, w = (self._spread(axis.place, k) for k, axis in enumerate(self._axes))
        (_, H, W) = self.size
        is_pad = (t >= self.size[0]) | (h >= H) | (w >= W)
        is_pad, t, h, w = np.broadcast_arrays(is_pad, t, h, w)
        pad = np.cumsum(is_pad).reshape(is_pad.shape)
        self.pads = int(is_pad.sum())
        shape = (self.windows, self.tokens)
        self.token: Ints = np.where(is_pad, np.negative(pad), (t * H + h) * W + w).reshape(shape)
        self.frame: Ints = t.copy().reshape(shape)
        codes = [self._spread(axis.wrapped, k) for k, axis in enumerate(self._axes)]
        region = 4 * codes[0] + 2 * codes[1] + codes[2]
        self.region: Ints = np.broadcast_to(region, is_pad.shape).copy().reshape(shape)

    @staticmethod
    def _spread(values: np.ndarray, axis: int) -> np.ndarray:
        """``[windows, slots]`` of an axis, as it broadcasts over windows (t, h, w) and slots (t, h, w)."""
        shape = [1] * 6
        shape[axis], shape[axis + 3] = values.shape
        return values.reshape(shape)

    @property
    def mixed(self) -> bool:
        """Whether some window holds tokens that must not see each other."""
        return any(self.shift)

    def pieces(self, pads_take_part: bool) -> list[Piece]:
        """The windows cut where regions meet, boxes of the same slots together; pads, if they take no part, cut off."""
        return _pieces(self, pads_take_part)

    def __repr__(self) -> str:
        return (
            f"WindowPlan(size={self.size}, window={self.window}, shift={self.shift}, border={self.border!r}): "
            f"{self.windows} windows of {self.tokens} tokens, {self.pads} pads"
        )


@functools.lru_cache(maxsize=64)
def plan(size: Size3, window: Size3, shift: Size3, border: str) -> WindowPlan:
    """The plan of a geometry, kept."""
    return WindowPlan(size, window, shift, border)


@functools.lru_cache(maxsize=64)
def _pieces(plan: WindowPlan, pads_take_part: bool) -> list[Piece]:
    cuts = [
        _cuts(axis, size, pads_take_part) for axis, size in zip(plan._axes, plan.size, strict=True)
    ]
    slots = np.arange(plan.tokens).reshape(plan.window)
    token = plan.token.reshape(*plan.grid, *plan.window)
    found = []
    for boxes in itertools.product(*(cut.items() for cut in cuts)):
        ranges = [range(low, high) for (low, high, _), _ in boxes]
        windows = [numbers for _, numbers in boxes]
        own = slots[np.ix_(*ranges)].reshape(-1)
        found.append(Piece(own, token[np.ix_(*windows, *ranges)].reshape(-1, len(own))))
    return found


def _cuts(axis: Axis, size: int, pads_take_part: bool) -> dict[tuple[int, int, int], list[int]]:
    """(first slot, end, first pad) of each part of an axis' windows -> the windows that have it. A part of pads alone
    is left out: nobody asks what they see.
    """
    found = defaultdict(list)
    for number, (place, wrapped) in enumerate(zip(axis.place, axis.wrapped, strict=True)):
        whole = len(place)
        middle = whole - int(wrapped.sum())
        for low, high in ((0, middle), (middle, whole)):
            end = low + int((place[low:high] < size).sum())
            if end > low:
                found[low, high if pads_take_part else end, end].append(number)
    return found
