"""Between maps ``[B, C', t, h, w]``, one a level, and what the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Form, shapes


class Result(NamedTuple):
    """What a backend's ``forward`` gives: contiguous results, and the tapes where they were to be kept."""

    results: list[Tensor]
    indices: Tensor | None
    codes: Tensor | None


def assemble(maps: Sequence[Tensor], form: Form) -> list[Tensor]:
    """The contiguous results."""
    if form.flat:
        return [torch.cat([m.flatten(1) for m in maps], 1)]
    return [(m.movedim(1, -1) if form.ndhwc else m).contiguous() for m in maps]


def channels_first(
    tensors: Sequence[Tensor | None], form: Form, shape: Sequence[int]
) -> list[Tensor | None]:
    """Results, or their gradients, as maps ``[B, C', t, h, w]``; ``shape`` is x's ``[B, C, T, H, W]``."""
    if not form.flat:
        return [t.movedim(-1, 1) if form.ndhwc and t is not None else t for t in tensors]
    vector = tensors[0]
    assert vector is not None
    each = shapes(form._replace(flat=False, ndhwc=False), shape[0], shape[1], shape[2:])
    split = vector.split([torch.Size(s[1:]).numel() for s in each], 1)
    return [part.reshape(s) for part, s in zip(split, each, strict=True)]
