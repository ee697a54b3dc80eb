"""The best stock composition: one adaptive pool a level, by ATen. No valid sizes, no codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tapes
from .layout import Form
from .levels import bins
from .results import Result, assemble, channels_first

_aten = torch.ops.aten
_mean_backward = _aten._adaptive_avg_pool3d_backward.default
_max_backward = _aten.adaptive_max_pool3d_backward.default


def forward(x: Tensor, valid_size: Tensor | None, form: Form, keep: bool) -> Result:
    x = x.contiguous()  # once, where each of ATen's pools would do it again
    maps, places = [], []
    for level in form.levels:
        size, parts = bins(level, x.shape[2:]), []
        if form.has_max:
            values, at = F.adaptive_max_pool3d(x, size, return_indices=True)
            parts.append(values)
            places.append(at)
        if form.has_avg:
            parts.append(F.adaptive_avg_pool3d(x, size))
        maps.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    indices = codes = None
    if keep:
        indices, codes = tapes.pack(places, form, x, x.shape[2:])
    return Result(assemble(maps, form), indices, codes)


def backward(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes: Tensor | None,
    valid_size: Tensor | None, form: Form, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx ``[B, C, T, H, W]``."""
    given = channels_first(grads, form, shape)
    some: Any = next(g for g in given if g is not None)
    like = some.new_empty(1).expand(shape)  # ATen asks for x's sizes, not for its values
    places = None
    if indices is not None:
        assert codes is not None
        places = tapes.unpack(indices, codes, form, shape[2:])
    dx: Tensor | None = None
    for k, g in enumerate(given):
        if g is None:
            continue
        parts = g.chunk(form.parts, 1)
        if places is not None:
            dx = _sum(dx, _max_backward(parts[0].contiguous(), like, places[k].contiguous()))
        if form.has_avg:
            dx = _sum(dx, _mean_backward(parts[-1].contiguous(), like))
    assert dx is not None
    return dx


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
