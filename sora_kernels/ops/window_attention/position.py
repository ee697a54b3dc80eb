"""Relative position: which row of the bias table belongs to a pair of slots.

The row is separable, ``code[i] - code[j] + middle``: a kernel subtracts two integers a score.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from .geometry import Ints
from .options import Size3, table_rows


class Codes(NamedTuple):
    """Of the slots of a window in a table.

    Attributes:
        code: int64 ``[tokens]``; different slots have different codes.
        middle: the row of offset zero.
        rows: of the table.
    """

    code: Ints
    middle: int
    rows: int

    def pairs(self) -> Ints:
        """The table's row for every pair (query slot, key slot), int64 ``[tokens, tokens]``."""
        return self.code[:, None] - self.code[None, :] + self.middle


@functools.lru_cache(maxsize=64)
def codes(window: Size3, table_window: Size3, index: str) -> Codes:
    """Codes of ``window``'s slots in a table for ``table_window``.

    Args:
        index: "exact" takes a slot's true place. "torchvision" takes that of the slot of the same number in the table's
            own window, as the published models do: the same unless the window is clipped in H or W.
    """
    _, h, w = table_window if index == "torchvision" else window
    slot = np.arange(math.prod(window))
    place = slot // (h * w), slot // w % h, slot % w
    code, middle = np.zeros_like(slot), 0
    for at, n in zip(place, table_window, strict=True):
        code, middle = code * (2 * n - 1) + at, middle * (2 * n - 1) + n - 1
    return Codes(code, middle, table_rows(table_window))
