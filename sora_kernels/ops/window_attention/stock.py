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

_aten = torch.ops.aten
_flash_cpu = _aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_cuda = _aten._scaled_dot_product_flash_attention.default
_flash_cuda_backward = _aten._scaled_dot_product_flash_attention_backward.default
# Scores of a head that backward holds at once: they are walked some eight times, from the cache.
_STEP = 1 << 17
_LOG2E = 1.4426950408889634
# Scores in all up to which one call for all heads is quicker than a call for each.
_FEW = 1 << 17


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
        q, k, v = _gather(flat, pad_kv, piece, s).transpose(1, 3).unbind(2)
        bias = _for_all(_bias(rows, piece, dtype), piece, s)
        if seed is not None:
            found, sums = _attend(q, k, v, bias, _kept(piece, s, seed, options.dropout_p), options)
        elif qkv.is_cpu:
            found, sums = _flash_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=options.scale)
        elif keep and bias is None and flash_can_run(q):
            found, sums, *_ = _flash_cuda(q, k, v, scale=options.scale)
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
        if lse is not None and sums is not None:
            sums = sums.view(s.B, piece.boxes, s.heads, piece.n).transpose(1, 2).flatten(2)
            if piece.real is not None:
                sums = sums.index_select(2, piece.real)
            lse.index_copy_(2, tokens, sums)
    return out.view(*qkv.shape[:-1], -1), lse


def flash_can_run(q: Tensor) -> bool:
    """On CUDA, without a bias, in both directions."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0


def _flash_backward(given: Tensor, do: Tensor, out: Tensor, sums: Tensor, scale: float) -> Tensor:
    """The gradient of a piece's rows, as ``given`` ``[m, n, 3, heads, dim]``; sums are ``[m, n, heads, 1]``."""
    q, k, v = given.transpose(1, 3).unbind(2)
    n, seed = given.shape[1], torch.empty(2, dtype=torch.uint64, device=given.device)
    lse = sums.squeeze(-1).transpose(1, 2).contiguous()
    found = _flash_cuda_backward(
        do.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, None, None, n, n, 0.0, False, seed, seed,
        scale=scale,
    )  # fmt: skip
    return torch.stack(found, 2).transpose(1, 3)


def _bias_dtype(qkv: Tensor) -> torch.dtype:
    """Of the bias that SDPA takes: fp32 beside 16 bits on the CPU, q's own elsewhere."""
    return torch.promote_types(qkv.dtype, torch.float32) if qkv.is_cpu else qkv.dtype


def _gather(qkv: Tensor, pad_kv: Tensor | None, piece: Piece, s: Sizes) -> Tensor:
    """The rows of a piece, ``[B * boxes, n, 3, heads, dim]``. A pad's q is zero."""
    rows = qkv.index_select(1, piece.tokens)
    if piece.pads is not None:
        rows[:, piece.pads] = 0
        if pad_kv is not None:
            rows[:, piece.pads, s.heads * s.dim :] = pad_kv.reshape(-1).to(rows.dtype)
    return rows.view(s.B * piece.boxes, piece.n, 3, s.heads, s.dim)


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
    weights = scores.sub_(sums.unsqueeze(-1)).mul_(_LOG2E).exp2_()
    if factor is not None:
        weights *= factor
    return (weights @ v.to(state)).to(q.dtype), sums


def backward(
    dout: Tensor, qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, out: Tensor,
    lse: Tensor, needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dqkv, dtable, dpad_kv for ``needs`` (of qkv, table, pad_kv)."""
    s = _sizes(qkv, options)
    state = lse.dtype
    flat, dflat = qkv.reshape(s.B, s.L, -1), dout.reshape(s.B, s.L, -1)
    delta = (dflat.to(state) * out.reshape(dflat.shape)).view(s.B, s.L, s.heads, s.dim).sum(-1)
    # Base 2, for exp of what underflows (masked scores, sharp softmaxes) takes the CPU's slow path, 20 to 200 times.
    sums = lse.transpose(1, 2) * _LOG2E
    dqkv = torch.empty_like(flat, memory_format=torch.contiguous_format)
    dtable, dpad = (
        torch.zeros_like(t, dtype=state, memory_format=torch.contiguous_format)
        if t is not None and need
        else None
        for t, need in ((table, needs[1]), (pad_kv, needs[2]))
    )
    rows = None if table is None else table.t().to(state).contiguous()
    for piece in _pieces_of(qkv, options):
        bias = _bias(rows, piece, state)
        bias = None if bias is None else bias * _LOG2E
        dbias = None if dtable is None else lse.new_zeros(s.heads, piece.n, piece.n)
        at_once = max(1, _STEP // (s.B * piece.n**2))
        for first in range(0, piece.boxes, at_once):
            part = piece.part(first, min(first + at_once, piece.boxes))
            given = _gather(flat, pad_kv, part, s)
            do, minus, own_sums = (
                x.index_select(1, part.tokens).view(s.B * part.boxes, part.n, s.heads, -1)
                for x in (dflat, delta, sums)
            )
            if part.pads is not None:  # nobody's gradient depends on what a pad sees
                do.view(s.B, -1, s.heads * s.dim)[:, part.pads] = 0
                own_sums.view(s.B, -1, s.heads)[:, part.pads] = torch.inf
            if bias is None and seed is None and flash_can_run(given):
                own_out = out.reshape(dflat.shape).index_select(1, part.tokens).view(do.shape)
                found = _flash_backward(given, do, own_out, own_sums / _LOG2E, options.scale)
            else:
                own = bias
                if bias is not None and bias.shape[0] > 1:
                    own = bias[first : first + part.boxes]
                factor = None if seed is None else _kept(part, s, seed, options.dropout_p)
                found = _gradients(
                    given.to(state),
                    do.to(state),
                    own,
                    own_sums,
                    minus,
                    factor,
                    dbias,
                    options.scale,
                )
            found = found.reshape(s.B, part.boxes * part.n, -1)
            if part.pads is not None and part.real is not None:
                if dpad is not None:
                    dpad += found[:, part.pads, s.heads * s.dim :].sum((0, 1)).view(dpad.shape)
                found = found.index_select(1, part.real)
            dqkv.index_copy_(1, part.real_tokens, found.to(dqkv.dtype))
        if dtable is not None and dbias is not None:
            _add_rows(dtable, piece.rows(), dbias.permute(1, 2, 0).reshape(-1, s.heads))
    return (
        dqkv.view(qkv.shape) if needs[0] else None,
        None if table is None or dtable is None else dtable.to(table.dtype),
        None if pad_kv is None or dpad is None else dpad.to(pad_kv.dtype),
    )


def _gradients(
    qkv: Tensor, do: Tensor, bias: Tensor | None, lse: Tensor, delta: Tensor, factor: Tensor | None,
    dbias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """As qkv ``[m, n, 3, heads, dim]``; do, lse and delta are ``[m, n, heads, ...]``. Adds to dbias."""
    m, n, _, heads, dim = qkv.shape
    if bias is not None:
        bias = bias.expand(bias.shape[0], heads, n, n)
        if bias.shape[0] > 1:
            bias = bias.repeat(m // bias.shape[0], 1, 1, 1)
    if m * heads * n * n <= _FEW:
        batch = m * heads
        rows = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch, n, dim)
        found = torch.empty_like(rows)
        if bias is not None:
            bias = bias.expand(m, heads, n, n).reshape(batch, n, n)
        do, lse, delta = (x.transpose(1, 2).reshape(batch, n, -1) for x in (do, lse, delta))
        factor = None if factor is None else factor.flatten(0, 1)
        ds = _attend_backward(rows.unbind(0), do, bias, lse, delta, factor, scale, found)
        if dbias is not None:
            dbias += ds.view(m, heads, n, n).sum(0)
        return found.view(3, m, heads, n, dim).permute(1, 3, 0, 2, 4)
    # Head by head: the products read rows where they lie. What they write has to be dense to be made together.
    found, own = torch.empty_like(qkv), qkv.new_empty(3, m, n, dim)
    for h in range(heads):
        ds = _attend_backward(
            qkv[:, :, :, h].unbind(2), do[:, :, h], None if bias is None else bias[:, h], lse[:, :, h],
            delta[:, :, h], None if factor is None else factor[:, h], scale, own,
        )  # fmt: skip
        found[:, :, :, h] = own.permute(1, 2, 0, 3)
        if dbias is not None:
            dbias[h] += ds[0] if m == 1 else ds.sum(0)
    return found


def _attend_backward(
    qkv: Sequence[Tensor], do: Tensor, bias: Tensor | None, lse: Tensor, delta: Tensor, factor: Tensor | None,
    scale: float, grads: Tensor,
) -> Tensor:  # fmt: skip
    """Writes dq, dk, dv ``[3, b, n, dim]`` and gives back the gradient of the scores ``[b, n, n]``. Bias and lse are in
    base 2.

    What is to be added to a product is there before it, and so costs no pass of its own.
    """
    q, k, v = qkv
    dq, dk, dv = grads.unbind(0)
    weights = -lse.expand(*q.shape[:2], q.shape[1]) if bias is None else bias - lse
    weights.baddbmm_(q, k.transpose(1, 2), alpha=scale * _LOG2E).exp2_()
    if factor is None:
        torch.bmm(weights.transpose(1, 2), do, out=dv)
        ds = torch.baddbmm(delta, do, v.transpose(1, 2), beta=-1)
    else:
        factor = factor.to(weights.dtype)
        torch.bmm((weights * factor).transpose(1, 2), do, out=dv)
        ds = torch.bmm(do, v.transpose(1, 2)).mul_(factor).sub_(delta)
    ds *= weights
    torch.baddbmm(dq, ds, k, beta=0, alpha=scale, out=dq)
    torch.baddbmm(dk, ds.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
    return ds


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Repeatable on every device."""
    if total.is_cpu:
        total.index_add_(0, rows, values)
    else:
        total.index_put_((rows,), values, accumulate=True)
