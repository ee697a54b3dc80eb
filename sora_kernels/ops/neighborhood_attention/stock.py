"""Backend "torch": tiles of queries against the boxes of keys that they need, by SDPA; backward from the scores again.

Tiles that see their boxes in the same way make one batch with one mask (``groups.py``). SDPA computes no gradient for a
bias, and leaves its fast path where the mask wants one: forward takes the bias as it is, and its backward is by hand.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import Group, groups
from .options import Options

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_STEP = (
    1 << 19
)  # scores that backward holds at once: they are walked some eight times, from the cache
_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_COPIED = 1 << 21  # elements of k that are copied at once


class Sizes(NamedTuple):
    """Of q: batch, tokens, heads, head_dim."""

    B: int
    L: int
    heads: int
    dim: int


def _sizes(q: Tensor) -> Sizes:
    B, T, H, W, heads, dim = q.shape
    return Sizes(B, T * H * W, heads, dim)


def _groups(q: Tensor, table: Tensor | None, options: Options) -> list[Group]:
    return groups(tuple(q.shape[1:4]), options, table is not None, q.device)


def _whole(q: Tensor, table: Tensor | None, options: Options) -> bool:
    """Attention as torch's own kernels on a GPU take it, in both directions."""
    return q.is_cuda and table is None and options.sees_all(q.shape[1:4])


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _above_autograd() -> contextlib.AbstractContextManager:
    """Where the dispatcher calls, autograd's keys are off."""
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        off = off - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off)


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """out as q, contiguous, and, if ``keep``, the log-sum-exp of every token's scores ``[B, heads, T * H * W]``."""
    s = _sizes(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    if _whole(q, table, options):
        # Backward takes SDPA's forward again, and no sums.
        found = _attention(q, k, v, options.scale).contiguous().view(q.shape)
        return found, q.new_zeros(s.B, s.heads, s.L, dtype=wide) if keep else None
    flat = [x.flatten(1, 3) for x in (q, k, v)]
    out = q.new_empty(s.B, s.L, s.heads, s.dim)
    lse = q.new_empty(s.B, s.heads, s.L, dtype=wide) if keep else None
    dtype = wide if q.is_cpu else q.dtype  # of the bias that SDPA takes
    rows = None if table is None else table.t().to(dtype).contiguous()
    for group in _groups(q, table, options):
        bias = _bias(rows, group, dtype)
        for part in _parts(group, s, _COPIED if q.is_cpu or not keep else _STEP):
            rq = _gather(flat[0], part.queries)
            rk, rv = (_gather(x, part.keys) for x in flat[1:])
            own = None if bias is None else bias.expand(len(rq), s.heads, -1, -1)
            if q.is_cpu:
                found, sums = _flash(rq, rk, rv, 0.0, False, attn_mask=own, scale=options.scale)
            elif keep:
                found, sums = _attend(rq, rk, rv, own, options.scale)
            else:
                found = F.scaled_dot_product_attention(
                    rq, rk, rv, attn_mask=own, scale=options.scale
                )
            tokens = part.queries.reshape(-1)
            found = found.transpose(1, 2).reshape(s.B, -1, s.heads, s.dim)
            out.index_copy_(1, tokens, found)
            if lse is not None:
                sums = sums.reshape(s.B, -1, s.heads, part.queries.shape[1]).transpose(1, 2)
                lse.index_copy_(2, tokens, sums.flatten(2))
    return out.view(q.shape), lse


def _parts(group: Group, s: Sizes, most: int) -> Iterator[Group]:
    """A group's tiles, as many at once as copy at most so many elements of k."""
    (tiles, n), m = group.keys.shape, group.queries.shape[1]
    each = s.B * s.heads * (n * s.dim if most == _COPIED else n * m)
    step = max(1, most // each)
    for first in range(0, tiles, step):
        own = slice(first, first + step)
        yield group._replace(
            queries=group.queries[own], keys=group.keys[own], boxes=group.boxes[own]
        )


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """``[B, tokens, heads, dim]`` -> ``[B * tiles, heads, n, dim]``."""
    tiles, n = tokens.shape
    rows = x.index_select(1, tokens.reshape(-1))
    return rows.view(-1, n, *x.shape[2:]).transpose(1, 2)


def _bias(rows: Tensor | None, group: Group, dtype: torch.dtype) -> Tensor | None:
    """What is added to a group's scores: ``[1, heads or 1, m, n]``."""
    m, n = group.queries.shape[1], group.keys.shape[1]
    mask = None if group.mask is None else group.mask.to(dtype)
    if rows is None:
        return None if mask is None else mask.view(1, 1, m, n)
    assert group.rows is not None
    bias = rows.index_select(1, group.rows).view(1, -1, m, n)
    return bias if mask is None else bias + mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """By hand, where no fused attention gives the sums."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    if bias is not None:
        scores += bias
    sums = scores.logsumexp(-1)
    weights = scores.sub_(sums.unsqueeze(-1)).exp_()
    return (weights @ v.to(wide)).to(q.dtype), sums


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, out: Tensor, lse: Tensor,
    needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dtable. By torch's own backward where there is one (fp32 and fp64 on the CPU, no gradient of a bias),
    else by hand: a column more in the products subtracts from every score its log-sum-exp, and from every dP its delta.
    """
    if _whole(q, table, options):
        with _above_autograd(), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again = _attention(*inputs, options.scale)  # type: ignore[call-arg, arg-type]
            return (*torch.autograd.grad(again, inputs, dout.reshape(again.shape)), None)
    s, wide = _sizes(q), lse.dtype
    dq, dk, dv = (torch.zeros(q.shape, dtype=wide, device=q.device) for _ in range(3))
    rows = dtable = None
    if table is not None:
        rows = table.t().to(wide).contiguous()
        dtable = torch.zeros_like(rows) if needs[3] else None
    fused = q.is_cpu and q.dtype == wide and dtable is None
    if rows is not None and not fused:
        rows = rows * _LOG2E
    flat = [x.flatten(1, 3) for x in (q, dout, out, k, v)]
    for group in _groups(q, table, options):
        bias = _bias(rows, group, wide)
        m, n = group.queries.shape[1], group.keys.shape[1]
        dbias = None if dtable is None else lse.new_zeros(s.heads, m, n)
        for part in _parts(group, s, _COPIED if fused else _STEP):
            tokens = part.queries.reshape(-1)
            rq, rdo, rout = (_gather(x, part.queries).to(wide) for x in flat[:3])
            rk, rv = (_gather(x, part.keys).to(wide) for x in flat[3:])
            sums = lse.index_select(2, tokens).view(s.B, s.heads, -1, m).transpose(1, 2)
            sums = sums.reshape(rq.shape[:-1])
            if fused:
                own = None if bias is None else bias.expand(len(rq), s.heads, -1, -1)
                pq, pk, pv = _flash_backward(
                    rdo, rq, rk, rv, rout, sums, 0.0, False, attn_mask=own, scale=options.scale
                )
            else:
                delta = (rdo * rout).sum(-1)
                pq, pk, pv = _gradients(
                    _widened(rq * (options.scale * _LOG2E), sums * -_LOG2E), _widened(rk, 1), _widened(rv, 1),
                    _widened(rdo, -delta), bias, dbias, s.heads,
                )  # fmt: skip
                pq, pk = pq.mul_(options.scale), pk.mul_(_LN2)
            pq = pq.reshape(-1, s.heads, m, s.dim).transpose(1, 2)
            dq.view(s.B, s.L, s.heads, s.dim).index_copy_(
                1, tokens, pq.reshape(s.B, -1, s.heads, s.dim)
            )
            for total, own in ((dk, pk), (dv, pv)):
                own = own.reshape(s.B, -1, s.heads, *group.extent, s.dim)
                for tile, box in enumerate(part.boxes):
                    total[(slice(None), *box)] += own[:, tile].permute(0, 2, 3, 4, 1, 5)
        if dtable is not None and dbias is not None:
            assert group.rows is not None
            _add_columns(dtable, group.rows, dbias.flatten(1))
    dtable = None if dtable is None or table is None else dtable.t().to(table.dtype)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dtable


def _widened(x: Tensor, column: Tensor | float) -> Tensor:
    """``[tiles, heads, n, dim]`` -> ``[tiles * heads, n, dim + 1]``."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    wide[..., :-1] = x
    wide[..., -1] = column
    return wide.flatten(0, 1)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, bias: Tensor | None, dbias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (but for the scale), dk (times log2 e), dv of widened products ``[tiles * heads, n, dim + 1]``; adds to dbias.

    Scores are in units of log 2: of what is masked, exp takes 37 times as long as of other numbers, exp2 no longer.
    """
    pairs, m, wide = q.shape
    n = k.shape[1]
    step = min(pairs, _step(m * n, heads))
    if bias is not None:
        bias = bias.expand(-(-step // heads), heads, -1, -1).reshape(-1, m, n)
    dq, dk, dv = (x.new_empty(pairs, x.shape[1], wide - 1) for x in (q, k, v))
    weights, ds = (q.new_empty(step, m, n) for _ in range(2))
    for first in range(0, pairs, step):
        e = slice(first, min(first + step, pairs))
        count = e.stop - first
        p, d = weights[:count], ds[:count]
        if bias is None:
            torch.bmm(q[e], k[e].transpose(1, 2), out=p)
        else:
            start = first % bias.shape[0]
            torch.baddbmm(bias[start : start + count], q[e], k[e].transpose(1, 2), out=p)
        torch.exp2(p, out=p)
        torch.bmm(p.transpose(1, 2), do[e, :, :-1], out=dv[e])
        torch.bmm(do[e], v[e].transpose(1, 2), out=d)
        d.mul_(p)
        if dbias is not None:
            if count < heads:
                dbias[first % heads : first % heads + count] += d
            else:
                dbias += d.view(-1, heads, m, n).sum(0) if count > heads else d
        torch.bmm(d, k[e, :, :-1], out=dq[e])
        torch.bmm(d.transpose(1, 2), q[e, :, :-1], out=dk[e])
    return dq, dk, dv


def _step(scores: int, heads: int) -> int:
    """Pairs (tile, head) in a step: a divisor of the heads, or a multiple."""
    most = max(1, _STEP // scores)
    if most >= heads:
        return most // heads * heads
    return max(d for d in range(1, most + 1) if heads % d == 0)


def _add_columns(total: Tensor, columns: Tensor, values: Tensor) -> None:
    """``total[:, columns] += values``, repeatable on every device."""
    if total.is_cpu:
        total.scatter_add_(1, columns.expand_as(values), values)
    else:
        for row, own in zip(total, values, strict=True):
            row.index_put_((columns,), own, accumulate=True)
