"""Triton kernels of the bias gradient, without atomics: scores folded over tiles in registers, then over offsets.

What they walk is ``folds.Fold``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .kernels import LOG2E, load_tokens, scores, sees


@triton.jit(
    do_not_specialize=[
        "parts",
        "columns",
        "rows",
        "batch",
        "guards",
        "heads",
        "tokens",
        "bias_rows",
    ]
)
def _neighborhood_attention_bias_fold_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, tokens, heads, D], D innermost
    bias_ptr,  # [heads, bias_rows] in ACC, times log2 e
    dout_ptr,  # [B, tokens, heads, D], contiguous
    lse_ptr, delta_ptr,  # [B, heads, tokens] in ACC
    rows_ptr,  # [3, rows]
    tiles_ptr,  # [tiles, 3]
    columns_ptr,  # [3, columns]
    row_bias_ptr,  # [BLOCK_M]
    pairs_ptr,  # tiles
    parts_ptr,  # [parts, 3]
    partial_ptr,  # [heads, parts, BLOCK_M, BLOCK_N] in ACC; written
    parts, columns, rows, batch, guards, heads, tokens, bias_rows, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_on,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of scores, summed over a part's tiles and the batch."""
    pid = tl.program_id(0)
    part, h = pid % parts, (pid // parts).to(tl.int64)
    block = tl.load(parts_ptr + part * 3)
    first = tl.load(parts_ptr + part * 3 + 1)
    end = tl.load(parts_ptr + part * 3 + 2)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = block * BLOCK_N + offs_n
    word = tl.load(columns_ptr + at)
    step = tl.load(columns_ptr + columns + at)
    column_bias = tl.load(columns_ptr + 2 * columns + at)
    row_bias = tl.load(row_bias_ptr + offs_m)
    q_ptr += h * stride_qh
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    dout_ptr += h * D
    bias_ptr += h * bias_rows
    index = row_bias[:, None] + column_bias[None, :]
    inside = (index >= 0) & (index < bias_rows)
    bias = tl.load(bias_ptr + index, mask=inside, other=0.0)

    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for turn in tl.range(first * batch, end * batch, num_stages=STAGES):
        tile = tl.load(pairs_ptr + turn // batch)
        b = (turn % batch).to(tl.int64)
        at_m = tile * BLOCK_M + offs_m
        token = tl.load(rows_ptr + at_m)
        low = tl.load(rows_ptr + rows + at_m)
        high = tl.load(rows_ptr + 2 * rows + at_m)
        lowest = tl.load(tiles_ptr + tile * 3 + 1)
        highest = tl.load(tiles_ptr + tile * 3 + 2)
        mask_n = ((word + lowest) & (highest - word) & guards) == guards
        key = tl.load(tiles_ptr + tile * 3) + tl.where(mask_n, step, 0)  # one that is there
        q = load_tokens(q_ptr + b * stride_qb, token, stride_qn, None, D, BLOCK_D, INDEX)
        dout = load_tokens(
            dout_ptr + b * tokens * stride_on, token, stride_on, None, D, BLOCK_D, INDEX
        )
        k = load_tokens(k_ptr + b * stride_kb, key, stride_kn, None, D, BLOCK_D, INDEX)
        v = load_tokens(v_ptr + b * stride_vb, key, stride_vn, None, D, BLOCK_D, INDEX)
        sums = (b * heads + h) * tokens + token
        lse = tl.load(lse_ptr + sums) * LOG2E
        delta = tl.load(delta_ptr + sums)
        seen = sees(low, high, word, guards)
        s = scores(q, k, None, row_bias, column_bias, seen, scale, ACC, PRECISION) + bias
        p = tl.math.exp2(s - lse[:, None])
        dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        total += p * (dp - delta[:, None])
    place = (h * parts + part) * (BLOCK_M * BLOCK_N) + offs_m[:, None] * BLOCK_N + offs_n[None, :]
    tl.store(partial_ptr + place, total)


@triton.jit(do_not_specialize=["parts", "heads", "bias_rows", "most"])
def _neighborhood_attention_bias_sum_kernel(
    partial_ptr,  # [heads, parts, BLOCK_M, BLOCK_N] in ACC
    sources_ptr,  # [bias_rows, BLOCK_M]
    first_ptr,  # [blocks + 1]
    dbias_ptr,  # [bias_rows, heads]; written
    parts, heads, bias_rows, most,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_R entries of a head: over a tile's rows, and the parts of the block that each lies in."""
    AREA: tl.constexpr = BLOCK_M * BLOCK_N
    blocks = tl.cdiv(bias_rows, BLOCK_R)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    offs_r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < bias_rows
    offs = offs_r[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    source = tl.load(sources_ptr + offs, mask=mask_r[:, None], other=-1)
    mask = source >= 0
    block = tl.where(mask, source // AREA, 0)
    first, end = tl.load(first_ptr + block), tl.load(first_ptr + block + 1)
    place = tl.where(mask, source % AREA, 0)
    total = tl.zeros([BLOCK_R, BLOCK_M], ACC)
    for k in range(0, most):
        part = first + k
        at = (h * parts + part) * AREA + place
        total += tl.load(partial_ptr + at, mask=mask & (part < end), other=0.0)
    dbias = tl.sum(total, 1).to(dbias_ptr.dtype.element_ty)
    tl.store(dbias_ptr + offs_r * heads + h, dbias, mask=mask_r)
