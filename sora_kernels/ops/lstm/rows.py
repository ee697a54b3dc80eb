"""Which rows of a batch run at which step, as the CPU kernels want it (LstmShape in csrc/lstm)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import packed_sizes


class Rows(NamedTuple):
    """Where the (row, step) pairs of one layer lie.

    The kernels' own arrays have one row a pair, in the order of ``PackedSequence``; x, y and what is
    saved have it only where the caller gave ``batch_sizes``, else they are [T, B, ...].

    Attributes:
        shape: of x without its last axis: (T, B), or (N,) if packed.
        N: pairs.
        batch_sizes, order: int64 on the CPU, or None; batch_sizes do not increase, and row b of them
            is the batch's row order[b].
        places: int64 [N]: each pair's row in a flat [T*B] array, or None where they are the same.
    """

    shape: tuple[int, ...]
    T: int
    B: int
    N: int
    batch_sizes: Tensor | None = None
    order: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(
        cls, x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None
    ) -> Rows:
        if batch_sizes is not None:
            sizes = packed_sizes(batch_sizes, x)
            if h0 is None or h0.shape[1] != sizes[0]:
                got = "None" if h0 is None else f"{h0.shape[1]} rows"
                raise ValueError(f"h0: expected {sizes[0]} rows as batch_sizes has, got {got}")
            return cls((len(x),), len(sizes), sizes[0], len(x), batch_sizes.contiguous())
        T, B = x.shape[:2]
        if lengths is None:
            return cls((T, B), T, B, T * B)
        return _by_lengths(T, lengths.to("cpu", torch.int64))

    def packed(self, t: Tensor) -> Tensor:
        """[*shape, I] -> [N, I]."""
        flat = t.flatten(0, 1) if len(self.shape) == 2 else t
        return flat if self.places is None else flat.index_select(0, self.places)

    def given(self, t: Tensor) -> Tensor:
        """[N, I] -> [*shape, I], 0 past a row's length."""
        if self.places is not None:
            t = t.new_zeros(self.T * self.B, t.shape[-1]).index_copy_(0, self.places, t)
        return t.view(*self.shape, t.shape[-1])

    def empty(self, like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[*shape, width] for a kernel to fill, 0 where it will not."""
        make = like.new_empty if self.places is None else like.new_zeros
        return make(*self.shape, width) if dtype is None else make(*self.shape, width, dtype=dtype)


_LAST: tuple[Tensor, Rows] | None = None  # every layer asks again, and backward


def _by_lengths(T: int, lengths: Tensor) -> Rows:
    global _LAST
    last = _LAST
    if last is not None and last[1].T == T and last[0].equal(lengths):
        return last[1]
    longest_first, order = lengths.sort(descending=True, stable=True)
    step, B = torch.arange(T, device="cpu")[:, None], len(lengths)
    live = step < longest_first
    places = (step * B + order)[live]
    rows = Rows((T, B), T, B, len(places), live.sum(1), order, places)
    _LAST = (lengths.clone(), rows)
    return rows
