"""Recurrent weights as int8 numbers, for inference on the CPU.

A step of a few rows reads all of ``w_hh`` and does little with it: a quarter of the bytes is most of
the time saved. Activations, sums and all other weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native
from .cells import Cell

MAX_BATCH = 8  # with more rows the weights are read once for many sums, and int8 gains nothing


class Int8Weights(NamedTuple):
    """One direction's ``w_hh``: row r is ``packed`` numbers times ``scale[r]``.

    Attributes:
        packed: int8, in the order that this machine's kernels read.
        scale: fp32 [G*H].
    """

    packed: Tensor
    scale: Tensor


def quantise(cell: Cell, w_hh: Tensor) -> Int8Weights:
    """``w_hh`` [G*H, P] on the CPU, to the nearest of 255 values a row. A row with a NaN or an
    infinity becomes NaN.
    """
    w = w_hh.detach().float()
    scale = w.abs().amax(1) / 127
    whole = (w / scale.where(scale != 0, 1)[:, None]).round().nan_to_num(0).to(torch.int8)
    scale = torch.where(scale.isinf(), float("nan"), scale)
    module, H, P = _native.module(), len(w) // cell.gates, w.shape[1]
    packed = torch.empty(module.lstm_int8_bytes_cpu(cell.code, H, P), dtype=torch.int8)
    module.lstm_pack_int8_cpu(cell.code, H, P, whole.contiguous().data_ptr(), packed.data_ptr())
    return Int8Weights(packed, scale)


class Int8Cache:
    """A module's int8 weights, made again when a ``w_hh`` was replaced or written to in place. (A
    write through ``.data`` goes unseen, as by autograd.)
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._made: list[Int8Weights] = []

    def of(self, cell: Cell, w_hh: Sequence[Tensor]) -> list[Int8Weights]:
        """Of every layer and direction."""
        seen = [(w.data_ptr(), w._version) for w in w_hh]
        if seen != self._seen:
            self._made = [quantise(cell, w) for w in w_hh]
            self._seen = seen
        return self._made
