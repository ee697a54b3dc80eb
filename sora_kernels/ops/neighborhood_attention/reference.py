"""The definition in plain torch: dense attention under a mask made axis by axis. Differentiable, any device, fp64 too.

Nothing here uses tiles or ``geometry.py``: it is what they are checked against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    scores = _scores(q, k, bias_table, options)
    weights = scores.softmax(-1)
    out = torch.einsum("bnqk,bknd->bqnd", weights, v.flatten(1, 3).to(weights.dtype))
    return out.unflatten(1, q.shape[1:4]).to(q.dtype).contiguous(), scores.logsumexp(-1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dtable: the derivative of the definition, by hand, in fp32 or wider."""
    wide, size = torch.promote_types(q.dtype, torch.float32), q.shape[1:4]
    q_, k_, v_, dout = (x.to(wide) for x in (q, k, v, dout))
    table = None if bias_table is None else bias_table.to(wide)
    weights = _scores(q_, k_, table, options).softmax(-1)
    q_, k_, v_, dout = (x.flatten(1, 3) for x in (q_, k_, v_, dout))
    dv = torch.einsum("bnqk,bqnd->bknd", weights, dout)
    dweights = torch.einsum("bqnd,bknd->bnqk", dout, v_)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = torch.einsum("bnqk,bknd->bqnd", dscores, k_) * options.scale
    dk = torch.einsum("bnqk,bqnd->bknd", dscores, q_) * options.scale
    dtable = None
    if bias_table is not None:
        dtable = torch.zeros_like(bias_table, dtype=wide)
        rows = table_rows(size, options, q.device)
        dtable.index_put_((rows,), dscores.sum(0).permute(1, 2, 0), accumulate=True)
        dtable = dtable.to(bias_table.dtype)
    dq, dk, dv = (x.unflatten(1, size).to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dtable


def _scores(q: Tensor, k: Tensor, bias_table: Tensor | None, options: Options) -> Tensor:
    """``[B, heads, queries, keys]``, with the bias, the least number where a query does not see a key."""
    size, device, count = q.shape[1:4], q.device, math.prod(q.shape[1:4])
    axes = [
        allowed(n, w, s, d, options.causal_t and axis == 0, device)
        for axis, (n, w, s, d) in enumerate(
            zip(size, options.window, options.stride, options.dilation, strict=True)
        )
    ]
    t, h, w = (_spread(seen, axis) for axis, seen in enumerate(axes))
    seen = (t & h & w).reshape(count, count)
    scores = torch.einsum("bqnd,bknd->bnqk", q.flatten(1, 3) * options.scale, k.flatten(1, 3))
    if bias_table is not None:
        scores = scores + bias_table[table_rows(size, options, device)].permute(2, 0, 1)
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


def table_rows(size: Sequence[int], options: Options, device: torch.device) -> Tensor:
    """The bias table's row of every pair, int64 ``[queries, keys]``; any where a query does not see a key."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, (n, window, dilation) in enumerate(
        zip(size, options.window, options.dilation, strict=True)
    ):
        at = torch.arange(n, device=device) // dilation
        offset = (at[:, None] - at[None, :]).clamp(1 - window, window - 1)
        index = index * (2 * window - 1) + _spread(offset + window - 1, axis)
    return index.reshape(math.prod(size), -1)


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
