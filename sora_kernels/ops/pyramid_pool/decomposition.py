"""The op in slices, maxima and means, for formats that have no adaptive pools of any size (ONNX)::

program = torch.export.export(model, (x,)).run_decompositions(DECOMPOSITIONS)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .levels import WHOLE, span
from .op import channels_first, form_of
from .results import assemble


def decompose(x: Tensor, valid_size: Tensor | None, *arguments: Any) -> list[Tensor]:
    """As ``torch.ops.sora_kernels.pyramid_pool3d``, axis after axis."""
    form = form_of(*arguments[:-1])
    if valid_size is not None:
        raise ValueError(
            "pyramid_pool3d: expected valid_size=None for a decomposition, got a tensor"
        )
    x = channels_first(x, form)
    maps = []
    for level in form.levels:
        parts = []
        if form.has_max:
            parts.append(_pooled(x, level, torch.amax))
        if form.has_avg:
            parts.append(_pooled(x, level, torch.mean))
        maps.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return assemble(maps, form)


def _pooled(x: Tensor, level: Sequence[int], reduce: Callable[..., Tensor]) -> Tensor:
    for axis, o in zip((4, 3, 2), reversed(level), strict=True):
        if o == WHOLE:
            continue
        n, bins = x.shape[axis], []
        for i in range(o):
            begin, end = span(i, o, n)
            bins.append(reduce(x.narrow(axis, begin, end - begin), dim=axis, keepdim=True))
        x = torch.cat(bins, axis)
    return x


DECOMPOSITIONS = {torch.ops.sora_kernels.pyramid_pool3d.default: decompose}
