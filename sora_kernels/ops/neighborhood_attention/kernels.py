"""Triton kernels: forward, dQ, dK and dV. What they walk is ``walks.Walk``; scores are in units of log 2."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import INTERPRETING, dot

MASKED = tl.constexpr(-1e9)  # finite: minus infinity less itself is no number
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def program(tiles, heads):
    """Tile, batch times heads plus head, batch and head of this program: tiles of a head are neighbours."""
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    return pid % tiles, bh, bh // heads, bh % heads


@triton.jit
def load_rows(rows_ptr, tile, tiles, BLOCK_M: tl.constexpr):
    """Token, low, high, bias of a tile's rows (``Walk.rows``)."""
    offs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    step = tiles * BLOCK_M
    token = tl.load(rows_ptr + offs)
    low = tl.load(rows_ptr + step + offs)
    high = tl.load(rows_ptr + 2 * step + offs)
    bias = tl.load(rows_ptr + 3 * step + offs)
    return token, low, high, bias


@triton.jit
def load_columns(slots_ptr, slots, first, start, columns, corner, BLOCK_N: tl.constexpr):
    """Word, token, bias of BLOCK_N of a box's columns (``Walk.slots``). Beyond its end, where no row sees anything,
    tokens are the corner's.
    """
    at = start + tl.arange(0, BLOCK_N)
    offs = first + at
    word = tl.load(slots_ptr + offs)
    token = corner + tl.where(at < columns, tl.load(slots_ptr + slots + offs), 0)
    bias = tl.load(slots_ptr + 2 * slots + offs)
    return word, token, bias


@triton.jit
def sees(low, high, word, guards):
    """Which rows see which columns, ``[BLOCK_M, BLOCK_N]``: see walks.py."""
    return ((word[None, :] + low[:, None]) & (high[:, None] - word[None, :]) & guards) == guards


@triton.jit
def load_tokens(
    x_ptr, token, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr
):
    """``[tokens, BLOCK_D]`` of a head; zeros where masked, and beyond D. ``mask`` is None where all are there."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + token.to(INDEX)[:, None] * stride + offs_d[None, :]
    if mask is None and D == BLOCK_D:
        return tl.load(ptrs)
    elif mask is None:
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs, mask=mask[:, None] & (offs_d[None, :] < D), other=0.0)


@triton.jit
def store_tokens(
    x_ptr, token, stride, mask, values, D: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr
):
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + token.to(INDEX)[:, None] * stride + offs_d[None, :]
    values = values.to(x_ptr.dtype.element_ty)
    tl.store(ptrs, values, mask=mask[:, None] & (offs_d[None, :] < D))


@triton.jit
def gather(x_ptr, index, mask):
    """``x[index]``, MASKED where masked. As one instruction of PTX it stays in the layout of its operands, the scores';
    as ``tl.load`` it would be pipelined through shared memory, an element a copy, with addresses and mask made again
    in the copies' layout.
    """
    if INTERPRETING or x_ptr.dtype.element_ty == tl.float64:
        return tl.load(x_ptr + index, mask=mask, other=MASKED)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $2, 0;
            mov.b32 $0, 0xce6e6b28;
            @p ld.global.nc.f32 $0, [$1];
            }""",
            "=r,l,r",
            [(x_ptr + index).to(tl.int64), mask.to(tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def scores(
    rows, columns, bias_ptr, row_bias, column_bias, seen, scale, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """``rows @ columns.T`` scaled, with their bias, MASKED where not seen."""
    s = tl.zeros([rows.shape[0], columns.shape[0]], ACC)
    s = dot(rows, tl.trans(columns), s, PRECISION) * scale
    if bias_ptr is not None:
        return s + gather(bias_ptr, row_bias[:, None] + column_bias[None, :], seen)
    else:
        return tl.where(seen, s, MASKED)


@triton.jit(do_not_specialize=["tiles", "slots", "guards", "heads", "tokens", "bias_rows"])
def _neighborhood_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, tokens, heads, D], D innermost
    bias_ptr,  # [heads, bias_rows] in ACC, times log2 e; or None
    rows_ptr,  # [4, tiles * BLOCK_M]
    tiles_ptr,  # [tiles, 3]
    slots_ptr,  # [3, slots]
    out_ptr,  # [B, tokens, heads, D], contiguous
    lse_ptr,  # [B, heads, tokens] in ACC, natural; or None
    tiles, slots, guards, heads, tokens, bias_rows, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_on,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the columns of a tile of queries."""
    tile, bh, b, h = program(tiles, heads)
    token, low, high, row_bias = load_rows(rows_ptr, tile, tiles, BLOCK_M)
    mask_m = token >= 0
    q = load_tokens(
        q_ptr + b * stride_qb + h * stride_qh, token, stride_qn, mask_m, D, BLOCK_D, INDEX
    )
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if bias_ptr is not None:
        bias_ptr += h * bias_rows
    first = tl.load(tiles_ptr + tile * 3)
    columns = tl.load(tiles_ptr + tile * 3 + 1)
    corner = tl.load(tiles_ptr + tile * 3 + 2)

    largest = tl.full([BLOCK_M], MASKED, ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in tl.range(0, columns, BLOCK_N, num_stages=STAGES):
        word, at, column_bias = load_columns(
            slots_ptr, slots, first, start, columns, corner, BLOCK_N
        )
        k = load_tokens(k_ptr, at, stride_kn, None, D, BLOCK_D, INDEX)
        v = load_tokens(v_ptr, at, stride_vn, None, D, BLOCK_D, INDEX)
        seen = sees(low, high, word, guards)
        s = scores(q, k, bias_ptr, row_bias, column_bias, seen, scale, ACC, PRECISION)
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.math.exp2(s - new[:, None])
        shrunk = tl.math.exp2(largest - new)
        total = total * shrunk + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrunk[:, None], PRECISION)
        largest = new
    acc = acc / total[:, None]
    out_ptr += (b * tokens * heads + h) * D
    store_tokens(out_ptr, token, stride_on, mask_m, acc, D, BLOCK_D, INDEX)
    if lse_ptr is not None:
        lse = (largest + tl.math.log2(total)) * LN2
        tl.store(lse_ptr + bh * tokens + token, lse, mask=mask_m)


@triton.jit(do_not_specialize=["tiles", "slots", "guards", "heads", "tokens", "bias_rows"])
def _neighborhood_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, tokens, heads, D], D innermost
    bias_ptr,  # [heads, bias_rows] in ACC, times log2 e; or None
    out_ptr, dout_ptr,  # [B, tokens, heads, D], contiguous
    lse_ptr,  # [B, heads, tokens] in ACC, natural
    rows_ptr,  # [4, tiles * BLOCK_M]
    tiles_ptr,  # [tiles, 3]
    slots_ptr,  # [3, slots]
    delta_ptr,  # as lse; written: the sum of out times dout
    dq_ptr,  # as out
    tiles, slots, guards, heads, tokens, bias_rows, scale, score_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_on,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries, and delta for the kernels that follow.

    scale: of the scores, times log2 e; score_scale: without.
    """
    tile, bh, b, h = program(tiles, heads)
    token, low, high, row_bias = load_rows(rows_ptr, tile, tiles, BLOCK_M)
    mask_m = token >= 0
    q = load_tokens(
        q_ptr + b * stride_qb + h * stride_qh, token, stride_qn, mask_m, D, BLOCK_D, INDEX
    )
    own = (b * tokens * heads + h) * D
    dout = load_tokens(dout_ptr + own, token, stride_on, mask_m, D, BLOCK_D, INDEX)
    out = load_tokens(out_ptr + own, token, stride_on, mask_m, D, BLOCK_D, INDEX)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), 1)
    tl.store(delta_ptr + bh * tokens + token, delta, mask=mask_m)
    lse = tl.load(lse_ptr + bh * tokens + token, mask=mask_m, other=0.0) * LOG2E
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if bias_ptr is not None:
        bias_ptr += h * bias_rows
    first = tl.load(tiles_ptr + tile * 3)
    columns = tl.load(tiles_ptr + tile * 3 + 1)
    corner = tl.load(tiles_ptr + tile * 3 + 2)

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in tl.range(0, columns, BLOCK_N, num_stages=STAGES):
        word, at, column_bias = load_columns(
            slots_ptr, slots, first, start, columns, corner, BLOCK_N
        )
        k = load_tokens(k_ptr, at, stride_kn, None, D, BLOCK_D, INDEX)
        v = load_tokens(v_ptr, at, stride_vn, None, D, BLOCK_D, INDEX)
        seen = sees(low, high, word, guards)
        s = scores(q, k, bias_ptr, row_bias, column_bias, seen, scale, ACC, PRECISION)
        p = tl.math.exp2(s - lse[:, None])
        dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    store_tokens(dq_ptr + own, token, stride_on, mask_m, dq * score_scale, D, BLOCK_D, INDEX)


@triton.jit(do_not_specialize=["tiles", "slots", "guards", "heads", "tokens", "bias_rows"])
def _neighborhood_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, tokens, heads, D], D innermost
    bias_ptr,  # [heads, bias_rows] in ACC, times log2 e; or None
    dout_ptr,  # [B, tokens, heads, D], contiguous
    lse_ptr, delta_ptr,  # [B, heads, tokens] in ACC
    rows_ptr,  # [4, tiles * BLOCK_M]: keys
    tiles_ptr,  # [tiles, 3]
    slots_ptr,  # [3, slots]: queries
    dk_ptr, dv_ptr,  # as dout
    tiles, slots, guards, heads, tokens, bias_rows, scale, score_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_on,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, from the box of queries that see them: scores lie transposed."""
    tile, bh, b, h = program(tiles, heads)
    token, low, high, row_bias = load_rows(rows_ptr, tile, tiles, BLOCK_M)
    mask_m = token >= 0
    k = load_tokens(
        k_ptr + b * stride_kb + h * stride_kh, token, stride_kn, mask_m, D, BLOCK_D, INDEX
    )
    v = load_tokens(
        v_ptr + b * stride_vb + h * stride_vh, token, stride_vn, mask_m, D, BLOCK_D, INDEX
    )
    own = (b * tokens * heads + h) * D
    q_ptr += b * stride_qb + h * stride_qh
    dout_ptr += own
    lse_ptr += bh * tokens
    delta_ptr += bh * tokens
    if bias_ptr is not None:
        bias_ptr += h * bias_rows
    first = tl.load(tiles_ptr + tile * 3)
    columns = tl.load(tiles_ptr + tile * 3 + 1)
    corner = tl.load(tiles_ptr + tile * 3 + 2)

    dk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in tl.range(0, columns, BLOCK_N, num_stages=STAGES):
        word, at, column_bias = load_columns(
            slots_ptr, slots, first, start, columns, corner, BLOCK_N
        )
        q = load_tokens(q_ptr, at, stride_qn, None, D, BLOCK_D, INDEX)
        dout = load_tokens(dout_ptr, at, stride_on, None, D, BLOCK_D, INDEX)
        lse = tl.load(lse_ptr + at) * LOG2E
        delta = tl.load(delta_ptr + at)
        seen = sees(low, high, word, guards)
        s = scores(k, q, bias_ptr, row_bias, column_bias, seen, scale, ACC, PRECISION)
        p = tl.math.exp2(s - lse[None, :])
        dv = dot(p.to(dout.dtype), dout, dv, PRECISION)
        dp = dot(v, tl.trans(dout), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    store_tokens(dk_ptr + own, token, stride_on, mask_m, dk * score_scale, D, BLOCK_D, INDEX)
    store_tokens(dv_ptr + own, token, stride_on, mask_m, dv, D, BLOCK_D, INDEX)
