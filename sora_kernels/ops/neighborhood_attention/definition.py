"""Backend "reference": the definition, and its derivative by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .options import Options


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:
    out, sums = reference.attention_and_sums(q, k, v, table, options)
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, sums.to(wide).contiguous() if keep else None


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, out: Tensor, lse: Tensor,
    needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return reference.backward(dout, q, k, v, table, options)
