"""Backend "reference": the definition, and its gradient by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .options import Options
from .reference import attention_and_sums, window_attention3d


def forward(
    qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out, sums = attention_and_sums(qkv, table, pad_kv, seed, options)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return out, sums.to(wide).contiguous() if keep else None


def backward(
    dout: Tensor, qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, out: Tensor,
    lse: Tensor, needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    with torch.enable_grad():
        inputs = [t if t is None else t.detach().requires_grad_() for t in (qkv, table, pad_kv)]
        again = window_attention3d(*inputs, seed, options)  # type: ignore[call-arg, arg-type]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(again, wanted, dout, allow_unused=True))
    dqkv, dtable, dpad = (
        next(found) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    )
    if dpad is None and pad_kv is not None:
        dpad = torch.zeros_like(pad_kv)
    return dqkv, dtable, dpad
