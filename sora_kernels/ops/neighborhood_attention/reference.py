"""The definition in plain torch: dense attention under a mask made axis by axis. Differentiable, any device, fp64 too.

Nothing here uses tiles or ``geometry.py``: it is what they are checked against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .options import Options


def neighborhood_attention3d(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, options: Options
) -> Tensor:
    """``[B, T, H, W, heads, head_dim]``; arguments as the public function's."""
    return attention_and_sums(q, k, v, bias_table, options)[0]


def attention_and_sums(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Also the log-sum-exp of every token's scores ``[B, heads, T * H * W]``."""
    size, device = q.shape[1:4], q.device
    axes = [
        allowed(n, w, s, d, options.causal_t and axis == 0, device)
        for axis, (n, w, s, d) in enumerate(
            zip(size, options.window, options.stride, options.dilation, strict=True)
        )
    ]
    t, h, w = (_spread(seen, axis) for axis, seen in enumerate(axes))
    count = math.prod(size)
    seen = (t & h & w).reshape(count, count)
    q, k, v = (x.flatten(1, 3) for x in (q, k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q * options.scale, k)
    if bias_table is not None:
        index = torch.zeros((), dtype=torch.int64, device=device)
        for axis, (n, window, dilation) in enumerate(
            zip(size, options.window, options.dilation, strict=True)
        ):
            at = torch.arange(n, device=device) // dilation
            offset = (at[:, None] - at[None, :]).clamp(1 - window, window - 1)  # beyond: not seen
            index = index * (2 * window - 1) + _spread(offset + window - 1, axis)
        scores = scores + bias_table[index.reshape(count, count)].permute(2, 0, 1)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    out = torch.einsum("bnqk,bknd->bqnd", weights, v.to(weights.dtype))
    return out.unflatten(1, size).to(q.dtype).contiguous(), scores.logsumexp(-1)


def allowed(
    size: int, window: int, stride: int, dilation: int, causal: bool, device: torch.device | None = None
) -> Tensor:  # fmt: skip
    """bool ``[query, key]`` of one axis."""
    at = torch.arange(size, device=device)
    own, i = at % dilation, at // dilation
    n = (size - own + dilation - 1) // dilation  # positions of each coordinate's class
    w = n.clamp(max=window)
    if causal:
        leader = torch.minimum(i // stride * stride + stride - 1, n - 1)
        start, end = (leader - w + 1).clamp(min=0), i + 1
    else:
        leader = torch.minimum(i // stride * stride + stride // 2, n - 1)
        start = torch.minimum((leader - w // 2).clamp(min=0), n - w)
        end = start + w
    same = own[:, None] == own[None, :]
    return same & (start[:, None] <= i[None, :]) & (i[None, :] < end[:, None])


def _spread(pairs: Tensor, axis: int) -> Tensor:
    """``[query, key]`` of an axis, as it broadcasts over queries (t, h, w) and keys (t, h, w)."""
    shape = [1] * 6
    shape[axis], shape[axis + 3] = pairs.shape
    return pairs.reshape(shape)
