"""Means as one matrix product: x ``[B*C, T*H*W]`` times a matrix of zeros and ones, one column a bin.

0 and 1 are exact in every dtype; sums are divided by the bins' sizes afterwards. Zero times NaN or infinity is NaN:
one of them reaches every bin of its channel, which is why this runs only when named.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Form, volume
from .levels import Level, bins, span
from .results import Result, assemble, channels_first


def forward(x: Tensor, valid_size: Tensor | None, form: Form, keep: bool) -> Result:
    sizes = tuple(x.shape[2:])
    matrix, counts = _matrix(form.levels, sizes, x.device, _operand_dtype(x))
    means = _product(x.flatten(2), matrix).div_(counts)
    counted = [bins(level, sizes) for level in form.levels]
    maps = [
        part.unflatten(2, o).to(x.dtype)
        for part, o in zip(means.split([volume(o) for o in counted], 2), counted, strict=True)
    ]
    return Result(assemble(maps, form), None, None)


def backward(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes: Tensor | None,
    valid_size: Tensor | None, form: Form, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx ``[B, C, T, H, W]``."""
    given = channels_first(grads, form, shape)
    some = next(g for g in given if g is not None)
    sizes = tuple(shape[2:])
    matrix, counts = _matrix(form.levels, sizes, some.device, _operand_dtype(some))
    counted = [bins(level, sizes) for level in form.levels]
    columns = [
        some.new_zeros(*shape[:2], volume(o)) if g is None else g.flatten(2)
        for g, o in zip(given, counted, strict=True)
    ]
    scaled = (torch.cat(columns, 2) / counts).to(matrix.dtype)
    return _product(scaled, matrix.t()).to(some.dtype).view(tuple(shape))


def _operand_dtype(x: Tensor) -> torch.dtype:
    """16-bit products with fp32 results are CUDA's alone."""
    return x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """[B, C, V] times [V, N] with sums in fp32 or wider."""
    B, C, _ = x.shape
    if x.is_cuda and x.element_size() == 2:
        return torch.mm(x.flatten(0, 1), matrix, out_dtype=torch.float32).unflatten(0, (B, C))
    return torch.matmul(x.to(matrix.dtype), matrix)


@functools.lru_cache(maxsize=32)
def _matrix(
    levels: tuple[Level, ...], sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[T*H*W, bins] of zeros and ones, and each bin's number of elements."""
    columns = []
    for level in levels:
        t, h, w = (_membership(o, n) for o, n in zip(bins(level, sizes), sizes, strict=True))
        block = torch.einsum("at,bh,cw->abcthw", t, h, w)
        columns.append(block.flatten(3).flatten(0, 2))
    matrix = torch.cat(columns, 1)
    counts = matrix.sum(0)
    wide = torch.promote_types(dtype, torch.float32)
    return matrix.to(device, dtype), counts.to(device, wide)


def _membership(o: int, n: int) -> Tensor:
    """[n, o]: whether an element is in a bin."""
    member = torch.zeros(n, o, dtype=torch.float64)
    for i in range(o):
        begin, end = span(i, o, n)
        member[begin:end, i] = 1
    return member
