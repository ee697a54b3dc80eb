"""Backend "torch": windows of one make together, by SDPA; backward from the scores again. Any device.

A window whose regions must not see each other is cut into them (``WindowPlan.pieces``): no score is computed to be
masked, and the bias is the only thing added to one. SDPA computes no gradient for a bias (and leaves its fast path
where the mask wants one), so forward takes the bias as it is, and backward is by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import Options
from .pieces import Piece, pieces
from .reference import kept

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Scores that a step of backward holds at once: they are walked some eight times, from the cache.
_STEP = 1 << 19


class Sizes(NamedTuple):
    """Of qkv: batch, tokens, heads, head_dim."""

    B: int
    L: int
    heads: int
    dim: int


def _sizes(qkv: Tensor, options: Options) -> Sizes:
    B, T, H, W, width = qkv.shape
    return Sizes(B, T * H * W, options.num_heads, width // 3 // options.num_heads)


def _pieces_of(qkv: Tensor, options: Options) -> list[Piece]:
    rows = qkv.shape[0] * options.num_heads
    return pieces(
        options.plan(qkv.shape[1:4]), options.pads_take_part, options.causal_t, options.table_window,
        options.bias_index, rows, qkv.device,
    )  # fmt: skip


def forward(
    qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out ``[B, T, H, W, C]`` and, if ``keep``, the log-sum-exp of every token's scores ``[B, heads, tokens]``."""
    s = _sizes(qkv, options)
    flat = qkv.reshape(s.B, s.L, -1)
    out = qkv.new_empty(s.B, s.L, s.heads * s.dim)
    lse = None
    if keep:
        lse = qkv.new_empty(s.B, s.heads, s.L, dtype=torch.promote_types(qkv.dtype, torch.float32))
    dtype = _bias_dtype(qkv)
    rows = None if table is None else table.t().to(dtype).contiguous()
    for piece in _pieces_of(qkv, options):
        q, k, v = _gather(flat, pad_kv, piece, s)
        bias = _for_all(_bias(rows, piece, dtype), piece, s)
        if seed is not None:
            found, sums = _attend(q, k, v, bias, _kept(piece, s, seed, options.dropout_p), options)
        elif qkv.is_cpu:
            found, sums = _flash(q, k, v, 0.0, False, attn_mask=bias, scale=options.scale)
        elif keep:
            found, sums = _attend(q, k, v, bias, None, options)
        else:
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=options.scale)
            sums = None
        found = found.transpose(1, 2).reshape(s.B, -1, s.heads * s.dim)
        tokens = piece.tokens
        if piece.real is not None:
            found, tokens = found.index_select(1, piece.real), piece.real_tokens
        out.index_copy_(1, tokens, found)
        if lse is not None:
            sums = sums.view(s.B, piece.boxes, s.heads, piece.n).transpose(1, 2).flatten(2)
            if piece.real is not None:
                sums = sums.index_select(2, piece.real)
            lse.index_copy_(2, tokens, sums)
    return out.view(*qkv.shape[:-1], -1), lse


def _bias_dtype(qkv: Tensor) -> torch.dtype:
    """Of the bias that SDPA takes: fp32 beside 16 bits on the CPU, q's own elsewhere."""
    return torch.promote_types(qkv.dtype, torch.float32) if qkv.is_cpu else qkv.dtype


def _gather(qkv: Tensor, pad_kv: Tensor | None, piece: Piece, s: Sizes) -> tuple[Tensor, ...]:
    """q, k and v of a piece, ``[B * boxes, heads, n, dim]`` each. A pad's q is zero."""
    rows = qkv.index_select(1, piece.tokens)
    if piece.pads is not None:
        rows[:, piece.pads] = 0
        if pad_kv is not None:
            rows[:, piece.pads, s.heads * s.dim :] = pad_kv.reshape(-1).to(rows.dtype)
    rows = rows.view(s.B * piece.boxes, piece.n, 3, s.heads, s.dim)
    return rows.permute(2, 0, 3, 1, 4).unbind(0)


def _bias(rows: Tensor | None, piece: Piece, dtype: torch.dtype) -> Tensor | None:
    """What is added to a piece's scores: ``[1 or boxes, heads or 1, n, n]``."""
    mask = None if piece.mask is None else piece.mask.to(dtype)
    if rows is None:
        return mask
    bias = rows.index_select(1, piece.rows()).view(1, -1, piece.n, piece.n)
    return bias if mask is None else bias + mask


def _for_all(bias: Tensor | None, piece: Piece, s: Sizes) -> Tensor | None:
    """``[B * boxes, heads, n, n]``, by strides unless the boxes differ."""
    if bias is not None and bias.shape[0] > 1 and s.B > 1:
        bias = bias.repeat(s.B, 1, 1, 1)
    return None if bias is None else bias.expand(s.B * piece.boxes, s.heads, -1, -1)


def _kept(piece: Piece, s: Sizes, seed: Tensor, p: float) -> Tensor:
    """Factors of the attention weights, ``[B * boxes, heads, n, n]``."""
    batch = torch.arange(s.B, device=seed.device).view(-1, 1, 1, 1, 1)
    query = batch * s.L + piece.tokens.view(1, piece.boxes, 1, -1, 1)
    head = torch.arange(s.heads, device=seed.device).view(-1, 1, 1)
    return kept(query * s.heads + head, piece.slots, seed, p).flatten(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factor: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By hand, where no fused attention has the dropout or gives the sums."""
    state = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(state) * options.scale) @ k.to(state).transpose(-2, -1)
    if bias is not None:
        scores += bias
    sums = scores.logsumexp(-1)
    weights = scores.sub_(sums.unsqueeze(-1)).exp_()
    if factor is not None:
        weights *= factor
    return (weights @ v.to(state)).to(q.dtype), sums


def backward(
    dout: Tensor, qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, out: Tensor,
    lse: Tensor, needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dqkv, dtable, dpad_kv for ``needs`` (of qkv, table, pad_kv).

    A column more in the products subtracts from every score its log-sum-exp, and from every dP its delta: both
    come out of the GEMM as they are wanted.
    """
    s = _sizes(qkv, options)
    state = lse.dtype
    flat, dflat = qkv.reshape(s.B, s.L, -1), dout.reshape(s.B, s.L, -1)
    delta = (dflat.to(state) * out.reshape(dflat.shape)).view(s.B, s.L, s.heads, s.dim).sum(-1)
    dqkv = torch.empty_like(flat, memory_format=torch.contiguous_format)
    rows = None if table is None else table.t().to(state).contiguous()
    dtable = dpad = None
    if table is not None and needs[1]:
        dtable = torch.zeros_like(table, dtype=state, memory_format=torch.contiguous_format)
    if pad_kv is not None and needs[2]:
        dpad = torch.zeros_like(pad_kv, dtype=state, memory_format=torch.contiguous_format)
    for piece in _pieces_of(qkv, options):
        bias = _bias(rows, piece, state)
        dbias = None if dtable is None else lse.new_zeros(s.heads, piece.n, piece.n)
        at_once = max(1, _STEP // (s.B * s.heads * piece.n**2))
        for first in range(0, piece.boxes, at_once):
            part = _part(piece, first, min(first + at_once, piece.boxes))
            own = bias if bias is None or bias.shape[0] == 1 else bias[first : first + part.boxes]
            factor = None if seed is None else _kept(part, s, seed, options.dropout_p).flatten(0, 1)
            q, k, v = _gather(flat, pad_kv, part, s)
            do = dflat.index_select(1, part.tokens).view(-1, part.n, s.heads, s.dim).transpose(1, 2)
            sums = (
                lse.index_select(2, part.tokens).view(s.B, s.heads, part.boxes, -1).transpose(1, 2)
            )
            minus = delta.index_select(1, part.tokens).view(-1, part.n, s.heads).transpose(1, 2)
            sums = sums.reshape(minus.shape)
            if part.pads is not None:  # nobody's gradient depends on what a pad sees
                box, slot = part.pads // part.n, part.pads % part.n
                do, sums = do.clone(), sums.clone()
                for b in range(s.B):
                    do[b * part.boxes + box, :, slot] = 0
                    sums[b * part.boxes + box, :, slot] = torch.inf
            products = (
                _widened(q.to(state) * options.scale, -sums), _widened(k.to(state), 1),
                _widened(v.to(state), 1), _widened(do.to(state), -minus),
            )  # fmt: skip
            dq, dk, dv = _gradients(*products, own, factor, dbias, s.heads)
            found = torch.stack((dq * options.scale, dk, dv))  # [3, B * boxes * heads, n, dim]
            found = found.view(3, s.B, part.boxes, s.heads, part.n, s.dim).permute(1, 2, 4, 0, 3, 5)
            found = found.reshape(s.B, part.boxes * part.n, -1)
            if part.pads is not None:
                if dpad is not None:
                    lost = found[:, part.pads, s.heads * s.dim :]
                    dpad += lost.sum((0, 1)).view(dpad.shape)
                found = found.index_select(1, part.real)
            dqkv.index_copy_(1, part.real_tokens, found.to(dqkv.dtype))
        if dbias is not None:
            dbias = dbias.permute(1, 2, 0).reshape(-1, s.heads)
            _add_rows(dtable, piece.rows(), dbias)
    return (
        dqkv.view(qkv.shape) if needs[0] else None,
        None if dtable is None else dtable.to(table.dtype),
        None if dpad is None else dpad.to(pad_kv.dtype),
    )


def _part(piece: Piece, first: int, end: int) -> Piece:
    """Some of a piece's boxes; their masks stay with the whole."""
    if end - first == piece.boxes:
        return piece
    low, high = first * piece.n, end * piece.n
    pads, real = piece.pads, piece.real
    if pads is not None and real is not None:
        pads = pads[(pads >= low) & (pads < high)] - low
        real = real[(real >= low) & (real < high)] - low
        if pads.numel() == 0:
            pads = real = None
    return piece._replace(boxes=end - first, tokens=piece.tokens[low:high], pads=pads, real=real)


def _widened(x: Tensor, column: Tensor | float) -> Tensor:
    """``[m, heads, n, dim]`` -> ``[m * heads, n, dim + 1]``."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    wide[..., :-1] = x
    wide[..., -1] = column
    return wide.flatten(0, 1)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, bias: Tensor | None, factor: Tensor | None, dbias: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (of the scaled q), dk, dv of widened products ``[m * heads, n, dim + 1]``, a step at a time; adds to dbias."""
    pairs, n, wide = q.shape
    step = _step(n, heads)
    if bias is not None:
        if bias.shape[0] > 1:
            bias = bias.repeat(pairs // heads // bias.shape[0], 1, 1, 1).expand(-1, heads, -1, -1)
            bias = bias.reshape(pairs, n, n)
        else:
            bias = bias.expand(-(-step // heads), heads, -1, -1).reshape(-1, n, n)
    dq, dk, dv = (x.new_empty(pairs, n, wide - 1) for x in (q, k, v))
    weights, ds = (q.new_empty(min(step, pairs), n, n) for _ in range(2))
    for first in range(0, pairs, step):
        e = slice(first, min(first + step, pairs))
        m = e.stop - first
        p, d = weights[:m], ds[:m]
        if bias is None:
            torch.bmm(q[e], k[e].transpose(1, 2), out=p)
        else:
            start = first % bias.shape[0]
            torch.baddbmm(bias[start : start + m], q[e], k[e].transpose(1, 2), out=p)
        p.exp_()
        if factor is None:
            torch.bmm(p.transpose(1, 2), do[e, :, :-1], out=dv[e])
            torch.bmm(do[e], v[e].transpose(1, 2), out=d)
        else:
            own = factor[e].to(p.dtype)
            torch.bmm((p * own).transpose(1, 2), do[e, :, :-1], out=dv[e])
            torch.bmm(do[e, :, :-1], v[e, :, :-1].transpose(1, 2), out=d)
            d.mul_(own).add_(do[e, :, -1:])
        d.mul_(p)
        if dbias is not None:
            if m < heads:
                dbias[first % heads : first % heads + m] += d
            else:
                dbias += d.view(-1, heads, n, n).sum(0) if m > heads else d
        torch.bmm(d, k[e, :, :-1], out=dq[e])
        torch.bmm(d.transpose(1, 2), q[e, :, :-1], out=dk[e])
    return dq, dk, dv


def _step(n: int, heads: int) -> int:
    """Pairs (window, head) in a step: a divisor of the heads, or a multiple."""
    most = max(1, _STEP // n**2)
    if most >= heads:
        return most // heads * heads
    return max(d for d in range(1, most + 1) if heads % d == 0)


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Repeatable on every device."""
    if total.is_cpu:
        total.index_add_(0, rows, values)
    else:
        total.index_put_((rows,), values, accumulate=True)
