"""A plan's windows as backend "torch" computes them: cut into pieces, or whole and masked, as index tensors."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import Ints, Size3, WindowPlan
from .position import codes

# What a piece of its own costs the host, in scores that are computed meanwhile.
CALL = 1 << 15
MASKED = -1e9  # finite: of a pad that sees nothing, a row of -inf would make NaN
_KEPT = 1 << 22  # pairs whose indices are kept


class Piece(NamedTuple):
    """Windows, or the same part of several, that are computed together.

    Attributes:
        boxes, n: how many, and of how many slots each.
        slots: int64 ``[n]``: which of a window's.
        tokens: int64 ``[boxes * n]``: the token in each, 0 for a pad.
        pads, real: int64: where among these the pads are, and the others; None without pads.
        mask: fp32 ``[boxes or 1, 1, n, n]``, 0 or ``MASKED``, to be added to the scores; None without.
        code, middle: int64 ``[n]``: a pair's row in the bias table is ``code[i] - code[j] + middle``.
        kept_rows: int64 ``[n * n]``: those rows; None where there are too many to keep.
        host_pads: pads again, where the host reads them.
    """

    boxes: int
    n: int
    slots: Tensor
    tokens: Tensor
    pads: Tensor | None
    real: Tensor | None
    mask: Tensor | None
    code: Tensor
    middle: int
    kept_rows: Tensor | None
    host_pads: Ints

    def rows(self) -> Tensor:
        """Of the bias table, for each pair of slots: int64 ``[n * n]``."""
        return self.kept_rows if self.kept_rows is not None else _rows(self.code, self.middle)

    def part(self, first: int, end: int) -> Piece:
        """Some of the boxes; masks stay with the whole."""
        if end - first == self.boxes:
            return self
        low, high = first * self.n, end * self.n
        pads, real = self.pads, self.real
        if pads is not None and real is not None:
            before, within = np.searchsorted(self.host_pads, (low, high)).tolist()
            pads = pads[before:within] - low
            real = real[low - before : high - within] - low
        return self._replace(boxes=end - first, tokens=self.tokens[low:high], pads=pads, real=real)

    @property
    def real_tokens(self) -> Tensor:
        return self.tokens if self.real is None else self.tokens[self.real]


def _rows(code: Tensor, middle: int) -> Tensor:
    return (code[:, None] - (code - middle)[None, :]).reshape(-1)


@functools.lru_cache(maxsize=64)
def pieces(
    plan: WindowPlan, pads_take_part: bool, causal_t: bool, table_window: Size3, bias_index: str, rows: int,
    device: torch.device,
) -> list[Piece]:  # fmt: skip
    """For ``rows`` = batch times heads: the windows cut where regions meet, or whole if that is less work."""
    cut = plan.pieces(pads_take_part)
    scores = sum(piece.token.size * len(piece.slots) for piece in cut)
    whole = plan.windows * plan.tokens**2
    given = [(p.slots, p.token, None) for p in cut]
    if CALL * (len(cut) - 1) > rows * (whole - scores):
        seen = plan.region[:, :, None] == plan.region[:, None, :]
        if not pads_take_part:
            seen &= (plan.token >= 0)[:, None, :]
        given = [(np.arange(plan.tokens), plan.token, None if seen.all() else seen)]
    code, middle, _ = codes(plan.window, table_window, bias_index)

    def tensor(values) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), device=device)

    def piece(slots, token, seen) -> Piece:
        boxes, n = token.shape
        if causal_t:
            frame = slots // math.prod(plan.window[1:])
            past = (frame[None, :] <= frame[:, None])[None]
            seen = past if seen is None else seen & past
        flat = token.reshape(-1)
        pads = real = mask = None
        host_pads = np.flatnonzero(flat < 0)
        if len(host_pads):
            pads, real = tensor(host_pads), tensor(np.flatnonzero(flat >= 0))
        if seen is not None:
            mask = tensor(np.where(seen, np.float32(0), np.float32(MASKED))[:, None])
        own = tensor(code[slots])
        index = _rows(own, middle) if n * n <= _KEPT else None
        tokens = tensor(np.maximum(flat, 0))
        return Piece(
            boxes, n, tensor(slots), tokens, pads, real, mask, own, middle, index, host_pads
        )

    with torch.inference_mode(False):  # they outlive this call
        return [piece(*p) for p in given]
