"""Backend "reference": the definition of reference.py behind the interface of a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .options import Options


def forward(
    qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out, sums = reference.attention_and_sums(qkv, table, pad_kv, seed, options)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return out, sums.to(wide).contiguous() if keep else None


def backward(
    dout: Tensor, qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, out: Tensor,
    lse: Tensor, needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return reference.backward(dout, qkv, table, pad_kv, seed, options)
