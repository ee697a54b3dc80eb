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
    size = module.lstm_int8_bytes_cpu(cell.code, H, P)
    packed = torch.empty(size, dtype=torch.int8, device=w.device)
    module.lstm_pack_int8_cpu(cell.code, H, P, whole.contiguous().data_ptr(), packed.data_ptr())
    return Int8Weights(packed, scale)


class Int8Cache:
    """A module's int8 weights, made again when a ``w_hh`` was replaced or written to in place. (A
    write through ``.data`` goes unseen, as by autograd.)
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []
        self._made: list[Int8Weights] = []

    def of(self, cell: Cell, w_hh: Sequence[Tensor]) -> list[Int8Weights]:
        """Of every layer and direction."""
        if len(w_hh) != len(self._seen) or not all(map(_unchanged, w_hh, self._seen)):
            self._made = [quantise(cell, w) for w in w_hh]
            # An alias keeps the memory, whose address another weight would else be given.
            self._seen = [(w.detach(), _version(w)) for w in w_hh]
        return self._made


def _unchanged(w: Tensor, seen: tuple[Tensor, int]) -> bool:
    was, version = seen
    # A tensor made in inference mode counts no versions: it is quantised anew each time.
    return w.data_ptr() == was.data_ptr() and version == _version(w) >= 0


def _version(w: Tensor) -> int:
    return -1 if w.is_inference() else w._version
