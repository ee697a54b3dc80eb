"""Tensors as the addresses that ``sora_kernels._C`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given", bound=Tensor | None)


def pointable(like: Tensor, t: Given) -> Given:
    """``t`` as memory that a kernel may read beside ``like``: the last check before pointers."""
    if t is None:
        return t
    if t.dtype != like.dtype or t.device != like.device:
        raise ValueError(
            f"expected every tensor to be {like.dtype} on {like.device}, got {t.dtype} on {t.device}"
        )
    return t if t.is_contiguous() else t.contiguous()  # type: ignore[return-value]


def all_pointable(like: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    dtype, device = like.dtype, like.device
    for t in tensors:
        if t.dtype != dtype or t.device != device or not t.is_contiguous():
            return [pointable(like, t) for t in tensors]
    return tensors


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def stream(t: Tensor) -> tuple[int, int]:
    """Device index (-1 for the CPU) and raw handle of the current stream."""
    if not t.is_cuda:
        return -1, 0
    index = t.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)
