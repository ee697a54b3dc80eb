"""The backend "reference": the definition of reference.py behind the interface of a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, tapes
from .layout import Form
from .results import Result, assemble, channels_first


def forward(x: Tensor, valid_size: Tensor | None, form: Form, keep: bool) -> Result:
    places = None
    if form.has_max:
        places = [reference.argmax(x, level, valid_size) for level in form.levels]
    maps = reference.maps(x, form.levels, form.mode, valid_size, places)
    indices = codes = None
    if keep and places is not None:
        indices, codes = tapes.pack(places, form, x, x.shape[2:])
    return Result(assemble(maps, form), indices, codes)


def backward(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes: Tensor | None,
    valid_size: Tensor | None, form: Form, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx ``[B, C, T, H, W]``, summed in fp32 or wider."""
    some = next(g for g in grads if g is not None)
    wide = torch.promote_types(some.dtype, torch.float32)
    places = None
    if indices is not None:
        assert codes is not None
        places = tapes.unpack(indices, codes, form, shape[2:])
    given = [None if g is None else g.to(wide) for g in channels_first(grads, form, shape)]
    dx = reference.maps_backward(given, places, form.levels, form.mode, valid_size, shape)
    return dx.to(some.dtype)
