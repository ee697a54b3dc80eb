"""``pyramid_pool3d`` through ``sora_kernels._C``: the CPU kernels of csrc/pyramid_pool."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..common.dtypes import CPU_DTYPES, DTYPE_CODES
from . import layout
from .layout import Form, Part, parts, tape
from .levels import bins
from .levels import plan as plan_levels
from .results import Result


class _Plan(NamedTuple):
    """What calls of one form and size have in common.

    Attributes:
        shapes: of the results, without the batch.
        columns: bins of all levels.
        levels: PyramidLevel of csrc/pyramid_pool/pyramid_pool.h, one after another.
        address: of ``levels``.
    """

    shapes: tuple[tuple[int, ...], ...]
    columns: int
    levels: array[int]
    address: int


_NO_PART = (-1, 0, 0, 0, 0)


@functools.lru_cache(maxsize=1024)
def _plan(form: Form, channels: int, sizes: tuple[int, int, int], valid: bool) -> _Plan:
    shapes = layout.shapes(form, 1, channels, sizes)
    results = [torch.empty(s, device="meta") for s in shapes]
    numbers = {id(t): k for k, t in enumerate(results)}

    def row(part: Part | None) -> tuple[int, ...]:
        if part is None:
            return _NO_PART
        strides = (part.batch_stride, part.channel_stride, part.bin_stride)
        return (numbers[id(part.tensor)], part.offset, *strides)

    found = {(part.level, part.kind): part for part in parts(form, results, channels, sizes)}
    columns = tape(form, sizes)
    source, order = plan_levels(form.levels, None if valid else sizes)
    place = {level: n for n, level in enumerate(order)} | {-1: -1}
    levels = array("q")
    for k in order:
        level = form.levels[k] if valid else bins(form.levels[k], sizes)
        levels.extend((*level, columns.column[k], place[source[k]]))
        for kind in ("max", "avg"):
            levels.extend(row(found.get((k, kind))))
    address = levels.buffer_info()[0]
    return _Plan(tuple(s[1:] for s in shapes), columns.indices, levels, address)


def _check(form: Form, dtype: torch.dtype, *tensors: Tensor | None) -> None:
    """The last one before pointers."""
    if form.codes:
        raise ValueError("pyramid_pool3d: the native kernels keep indices, not codes")
    if dtype not in CPU_DTYPES:
        raise ValueError(
            f"pyramid_pool3d: the native kernels take fp32, fp64 and bf16, got {dtype}"
        )
    for t in tensors:
        if t is not None and not t.is_cpu:
            raise ValueError(f"pyramid_pool3d: the native kernels run on the CPU, got {t.device}")


def _pool(x_shape: Sequence[int], plan: _Plan, regions: Tensor | None, form: Form) -> tuple:
    """PyramidPool of csrc/pyramid_pool/pyramid_pool.h."""
    valid = 0 if regions is None else regions.data_ptr()
    return (*x_shape, valid, plan.address, len(form.levels), plan.columns, form.inner)


def _regions(valid_size: Tensor | None) -> Tensor | None:
    return None if valid_size is None else valid_size.to(torch.int64).contiguous()


def forward(x: Tensor, valid_size: Tensor | None, form: Form, keep: bool) -> Result:
    _check(form, x.dtype, x, valid_size)
    B, C, T, H, W = shape = x.shape
    plan, regions = _plan(form, C, (T, H, W), valid_size is not None), _regions(valid_size)
    results = [x.new_empty((B, *s)) for s in plan.shapes]
    indices = codes = None
    if keep and form.has_max:
        # layout.empty_tapes, without finding out again what the plan knows.
        columns = plan.columns
        tape_shape = (B, columns, C) if form.inner else (B, C, columns)
        indices, codes = (
            x.new_empty(tape_shape, dtype=torch.int32),
            x.new_empty((B, 0, C) if form.inner else (B, C, 0), dtype=torch.uint8),
        )
    _native.module().pyramid_pool_forward_cpu(
        DTYPE_CODES[x.dtype], _pool(shape, plan, regions, form), x.data_ptr(), x.stride(),
        [t.data_ptr() for t in results], 0 if indices is None else indices.data_ptr(),
        _native.num_threads(),
    )  # fmt: skip
    return Result(results, indices, codes)


def backward(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes: Tensor | None,
    valid_size: Tensor | None, form: Form, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx ``[B, C, T, H, W]``."""
    some = next(g for g in grads if g is not None)
    _check(form, some.dtype, *grads, indices, valid_size)
    B, C, T, H, W = shape
    plan, regions = _plan(form, C, (T, H, W), valid_size is not None), _regions(valid_size)
    for g, s in zip(grads, plan.shapes, strict=True):
        if g is not None and (g.shape != (B, *s) or g.dtype != some.dtype):
            raise ValueError(
                f"pyramid_pool3d: expected a gradient {(B, *s)} {some.dtype}, "
                f"got {tuple(g.shape)} {g.dtype}"
            )
    given = [None if g is None else g.contiguous() for g in grads]
    places = _indices(indices, (B, plan.columns, C) if form.inner else (B, C, plan.columns), form)
    memory = torch.channels_last_3d if form.inner else torch.contiguous_format
    dx = torch.empty((B, C, T, H, W), dtype=some.dtype, device=some.device, memory_format=memory)
    _native.module().pyramid_pool_backward_cpu(
        DTYPE_CODES[some.dtype], _pool((B, C, T, H, W), plan, regions, form),
        [0 if g is None else g.data_ptr() for g in given],
        0 if places is None else places.data_ptr(), dx.data_ptr(), _native.num_threads(),
    )  # fmt: skip
    return dx


def _indices(indices: Tensor | None, shape: tuple[int, ...], form: Form) -> Tensor | None:
    if not form.has_max:
        return None
    if indices is None or indices.shape != shape or indices.dtype != torch.int32:
        got = indices if indices is None else f"{tuple(indices.shape)} {indices.dtype}"
        raise ValueError(f"pyramid_pool3d: expected int32 indices {shape}, got {got}")
    return indices.contiguous()
