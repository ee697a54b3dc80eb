"""Backend "reference": the definition, and its gradient by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .options import Options
from .reference import attention_and_sums, neighborhood_attention3d


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:
    out, sums = attention_and_sums(q, k, v, table, options)
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, sums.to(wide).contiguous() if keep else None


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, out: Tensor, lse: Tensor,
    needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    with torch.enable_grad():
        inputs = [t if t is None else t.detach().requires_grad_() for t in (q, k, v, table)]
        again = neighborhood_attention3d(*inputs, options)  # type: ignore[call-arg, arg-type]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(again, wanted, dout))
    return tuple(
        next(found) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    )
