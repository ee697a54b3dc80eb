"""Window attention's backward kernels, from the scores again. ``launches.py`` plans and launches them.

Three walk the same scores, each with its sum in registers: over query tiles for dK and dV, over key tiles for dQ, over
windows for the bias. So nothing is added atomically, and none waits for another. A weight is p = exp(score - lse), and
dS = p * (dP - delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .kernels import (
    HIDDEN,
    LOG2E,
    NOBODY,
    UNSEEN,
    _bias_tile,
    _kept,
    _load_pair,
    _load_rows,
    _operand,
    _seen,
    _share,
    _store_rows,
)


@triton.jit
def _window_attention_delta_kernel(
    token_ptr,  # int32 [W, NP]
    out_ptr,  # [B, L, heads, D]
    dout_ptr,  # as out_ptr
    lse_ptr,  # [B, heads, L]
    sums_ptr,  # [B, W, heads, 2, NP]
    L, W, heads, NP,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the other kernels want of queries, in the order of slots: the log-sum-exp in units of log 2, and delta, the
    sum of dO * O, which is the sum of p * dP. Of slots without a query, UNSEEN and 0.
    """
    pid = tl.program_id(0)
    tiles = NP // BLOCK_M
    pid_m, head, pid_w = pid % tiles, pid // tiles % heads, pid // tiles // heads
    b, window = (pid_w // W).to(tl.int64), pid_w % W
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token = tl.load(token_ptr + window.to(tl.int64) * NP + offs_m)
    at = (b * L * heads + head) * DIM
    stride = heads * DIM
    out = _load_rows(out_ptr + at, None, token, stride, offs_d, DIM, BLOCK_D, False, INDEX)
    dout = _load_rows(dout_ptr + at, None, token, stride, offs_d, DIM, BLOCK_D, False, INDEX)
    lse_ptr += (b * heads + head) * L
    lse = tl.load(lse_ptr + token, mask=token >= 0, other=UNSEEN) * LOG2E
    sums_ptr += (pid_w.to(tl.int64) * heads + head) * 2 * NP
    tl.store(sums_ptr + offs_m, lse)
    tl.store(sums_ptr + NP + offs_m, tl.sum(out.to(ACC) * dout.to(ACC), 1))


@triton.jit
def _window_attention_dq_kernel(
    qkv_ptr,  # [B, L, 3, heads, D], strides (stride_b, stride_l, heads * D, D, 1)
    pad_ptr,  # [2, heads, D] if PADS
    token_ptr,  # int32 [W, NP]
    kind_ptr,  # int32 [W]
    code_ptr,  # int32 [kinds, NP] if MASK is "code"
    ask_ptr,  # [kinds, NP, CLASSES] if MASK is "product"
    hide_ptr,  # as ask_ptr
    bounds_ptr,  # int32 [kinds, query tiles, 2] or None
    bias_ptr,  # as in the forward kernel
    place_ptr,  # int32 [NP] if BIAS is "gather"
    seed_ptr,  # int64 [] if THRESHOLD
    dout_ptr,  # [B, L, heads, D]
    sums_ptr,  # [B, W, heads, 2, NP]: log-sum-exp and delta, see _window_attention_delta_kernel
    dqkv_ptr,  # [B, L, 3, heads, D]
    stride_b, stride_l, L, W, heads, pairs, N, NP, span, rows, middle,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CLASSES: tl.constexpr, BIAS: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWS_INNER: tl.constexpr,
):  # fmt: skip
    """One program: a query tile of a head of a window."""
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, head, pid_w = _share(pairs, tiles_m, heads, WINDOWS_INNER)
    b, window = (pid_w // W).to(tl.int64), pid_w % W
    kind = tl.load(kind_ptr + window)
    C = heads * DIM

    offs_d = tl.arange(0, BLOCK_D)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token_ptr += window.to(tl.int64) * NP
    token_q = tl.load(token_ptr + offs_m)
    q_ptr = qkv_ptr + b * stride_b + head * DIM
    k_ptr, v_ptr = q_ptr + C, q_ptr + 2 * C
    pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
    if PADS:
        pad_k_ptr = pad_ptr + head * DIM
        pad_v_ptr = pad_k_ptr + C
    dout_ptr += b * L * C + head * DIM
    q = _load_rows(q_ptr, None, token_q, stride_l, offs_d, DIM, BLOCK_D, False, INDEX)
    do = _load_rows(dout_ptr, None, token_q, C, offs_d, DIM, BLOCK_D, False, INDEX)
    sums_ptr += (pid_w.to(tl.int64) * heads + head) * 2 * NP
    lse, delta = tl.load(sums_ptr + offs_m), tl.load(sums_ptr + NP + offs_m)
    if MASK == "product":
        ask = _load_pair(ask_ptr, kind, offs_m, NP, CLASSES)
    elif MASK == "code":
        code_q = tl.load(code_ptr + kind * NP + offs_m)
    if BIAS == "gather":
        row_q = tl.load(place_ptr + offs_m) + middle
        bias_ptr += head * rows
    if THRESHOLD:
        seed = tl.load(seed_ptr)
        row = (b * L + token_q) * heads + head

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    first, end = 0, tiles_n
    if bounds_ptr is not None:
        ptr = bounds_ptr + (kind * tiles_m + pid_m) * 2
        first, end = tl.load(ptr), tl.load(ptr + 1)
    for tile in range(first, end):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        token_k = tl.load(token_ptr + offs_n)
        k = _load_rows(k_ptr, pad_k_ptr, token_k, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
        v = _load_rows(v_ptr, pad_v_ptr, token_k, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
        if BIAS == "dense":
            s = _bias_tile(bias_ptr, (head * tiles_m + pid_m) * tiles_n + tile, BLOCK_M, BLOCK_N)
        elif BIAS == "gather":
            place_k = tl.load(place_ptr + offs_n)
            s = tl.load(bias_ptr + (row_q[:, None] - place_k[None, :]))
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        s = dot(q, tl.trans(k), s, PRECISION)
        if MASK == "product":
            hide = _load_pair(hide_ptr, kind, offs_n, NP, CLASSES)
            s = dot(ask, tl.trans(hide), s, PRECISION)
        elif MASK == "code":
            code_k = tl.load(code_ptr + kind * NP + offs_n)
            s = tl.where(_seen(code_q[:, None], code_k[None, :], span, CAUSAL), s, HIDDEN)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None])
        if THRESHOLD:
            dp *= _kept(seed, row[:, None], offs_n[None, :], THRESHOLD, KEPT, ACC)
        ds = p * (dp - delta[:, None])
        dq = dot(_operand(ds, k), k, dq, PRECISION)
    dqkv_ptr += b * L * 3 * C + head * DIM
    _store_rows(dqkv_ptr, dq * SCALE, token_q, 3 * C, offs_d, DIM, BLOCK_D, INDEX)


@triton.jit
def _window_attention_dkv_kernel(
    qkv_ptr, pad_ptr, token_ptr, kind_ptr, code_ptr, ask_ptr, hide_ptr,  # as above
    bounds_ptr,  # int32 [kinds, key tiles, 2] or None
    bias_ptr,  # as above; tiles of a dense one are [keys, queries]
    place_ptr, seed_ptr, dout_ptr, sums_ptr, dqkv_ptr,  # as above
    dpad_ptr,  # [B, pads, 2, heads, D] or None
    stride_b, stride_l, L, W, heads, pairs, N, NP, span, rows, middle, pads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CLASSES: tl.constexpr, BIAS: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWS_INNER: tl.constexpr,
):  # fmt: skip
    """One program: a key tile of a head of a window. Scores are ``[keys, queries]``, so that weights and dS go from
    registers to the tensor cores as they are.
    """
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_n, head, pid_w = _share(pairs, tiles_n, heads, WINDOWS_INNER)
    b, window = (pid_w // W).to(tl.int64), pid_w % W
    kind = tl.load(kind_ptr + window)
    C = heads * DIM

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token_ptr += window.to(tl.int64) * NP
    token_k = tl.load(token_ptr + offs_n)
    q_ptr = qkv_ptr + b * stride_b + head * DIM
    k_ptr, v_ptr = q_ptr + C, q_ptr + 2 * C
    pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
    if PADS:
        pad_k_ptr = pad_ptr + head * DIM
        pad_v_ptr = pad_k_ptr + C
    dout_ptr += b * L * C + head * DIM
    k = _load_rows(k_ptr, pad_k_ptr, token_k, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
    v = _load_rows(v_ptr, pad_v_ptr, token_k, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
    sums_ptr += (pid_w.to(tl.int64) * heads + head) * 2 * NP
    if MASK == "product":
        hide = _load_pair(hide_ptr, kind, offs_n, NP, CLASSES)
    elif MASK == "code":
        code_k = tl.load(code_ptr + kind * NP + offs_n)
    if BIAS == "gather":
        row_k = tl.load(place_ptr + offs_n) - middle
        bias_ptr += head * rows
    if THRESHOLD:
        seed = tl.load(seed_ptr)

    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    first, end = 0, tiles_m
    if bounds_ptr is not None:
        ptr = bounds_ptr + (kind * tiles_n + pid_n) * 2
        first, end = tl.load(ptr), tl.load(ptr + 1)
    for tile in range(first, end):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token_q = tl.load(token_ptr + offs_m)
        q = _load_rows(q_ptr, None, token_q, stride_l, offs_d, DIM, BLOCK_D, False, INDEX)
        do = _load_rows(dout_ptr, None, token_q, C, offs_d, DIM, BLOCK_D, False, INDEX)
        lse, delta = tl.load(sums_ptr + offs_m), tl.load(sums_ptr + NP + offs_m)
        if BIAS == "dense":
            s = _bias_tile(bias_ptr, (head * tiles_n + pid_n) * tiles_m + tile, BLOCK_N, BLOCK_M)
        elif BIAS == "gather":
            place_q = tl.load(place_ptr + offs_m)
            s = tl.load(bias_ptr + (place_q[None, :] - row_k[:, None]))
        else:
            s = tl.zeros([BLOCK_N, BLOCK_M], ACC)
        s = dot(k, tl.trans(q), s, PRECISION)
        if MASK == "product":
            ask = _load_pair(ask_ptr, kind, offs_m, NP, CLASSES)
            s = dot(hide, tl.trans(ask), s, PRECISION)
        elif MASK == "code":
            code_q = tl.load(code_ptr + kind * NP + offs_m)
            s = tl.where(_seen(code_q[None, :], code_k[:, None], span, CAUSAL), s, HIDDEN)
        dp = dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], ACC), PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - lse[None, :])
        if THRESHOLD:
            row = (b * L + token_q) * heads + head
            kept = _kept(seed, row[None, :], offs_n[:, None], THRESHOLD, KEPT, ACC)
            dv = dot(_operand(p * kept, do), do, dv, PRECISION)
            dp *= kept
        else:
            dv = dot(_operand(p, do), do, dv, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(_operand(ds, q), q, dk, PRECISION)
    dk *= SCALE
    dk_ptr = dqkv_ptr + b * L * 3 * C + C + head * DIM
    _store_rows(dk_ptr, dk, token_k, 3 * C, offs_d, DIM, BLOCK_D, INDEX)
    _store_rows(dk_ptr + C, dv, token_k, 3 * C, offs_d, DIM, BLOCK_D, INDEX)
    if dpad_ptr is not None:
        pad = tl.where((token_k < 0) & (token_k > NOBODY), -1 - token_k, -1)
        dpad_ptr += b * pads * 2 * C + head * DIM
        _store_rows(dpad_ptr, dk, pad, 2 * C, offs_d, DIM, BLOCK_D, INDEX)
        _store_rows(dpad_ptr + C, dv, pad, 2 * C, offs_d, DIM, BLOCK_D, INDEX)


@triton.jit
def _window_attention_dbias_kernel(
    qkv_ptr, pad_ptr, token_ptr, kind_ptr, code_ptr, ask_ptr, hide_ptr,  # as above
    bias_ptr, place_ptr, seed_ptr, dout_ptr, sums_ptr,  # as above
    part_ptr,  # [splits, heads, NP, NP]
    stride_b, stride_l, L, W, heads, pairs, N, NP, span, rows, middle, share,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CLASSES: tl.constexpr, BIAS: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a query tile and a key tile of a head, summed over ``share`` of the windows of all samples."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_n, pid_m = pid % tiles_n, pid // tiles_n % tiles_m
    head, split = pid // tiles_n // tiles_m % heads, pid // tiles_n // tiles_m // heads
    C = heads * DIM

    offs_d = tl.arange(0, BLOCK_D)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
    if PADS:
        pad_k_ptr = pad_ptr + head * DIM
        pad_v_ptr = pad_k_ptr + C
    if THRESHOLD:
        seed = tl.load(seed_ptr)

    dbias = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    b, window = (split * share // W).to(tl.int64), split * share % W
    sums_ptr += ((split * share).to(tl.int64) * heads + head) * 2 * NP
    for _ in range(split * share, tl.minimum((split + 1) * share, pairs)):
        kind = tl.load(kind_ptr + window)
        at = window.to(tl.int64) * NP
        token_q, token_k = tl.load(token_ptr + at + offs_m), tl.load(token_ptr + at + offs_n)
        q_ptr = qkv_ptr + b * stride_b + head * DIM
        q = _load_rows(q_ptr, None, token_q, stride_l, offs_d, DIM, BLOCK_D, False, INDEX)
        k = _load_rows(q_ptr + C, pad_k_ptr, token_k, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
        v = _load_rows(
            q_ptr + 2 * C, pad_v_ptr, token_k, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX
        )
        do_ptr = dout_ptr + b * L * C + head * DIM
        do = _load_rows(do_ptr, None, token_q, C, offs_d, DIM, BLOCK_D, False, INDEX)
        lse, delta = tl.load(sums_ptr + offs_m), tl.load(sums_ptr + NP + offs_m)
        # Again for every window, from the cache: kept in registers, it would be copied to where sums start. The zero
        # keeps the compiler from keeping it.
        zero = (window >= W).to(tl.int32)
        if BIAS == "dense":
            tile = (head * tiles_m + pid_m) * tiles_n + pid_n + zero
            bias = _bias_tile(bias_ptr, tile, BLOCK_M, BLOCK_N)
        else:
            place_q, place_k = tl.load(place_ptr + offs_m) + middle, tl.load(place_ptr + offs_n)
            own_ptr = bias_ptr + (head * rows + zero)
            bias = tl.load(own_ptr + (place_q[:, None] - place_k[None, :]))
        s = dot(q, tl.trans(k), bias, PRECISION)
        if MASK == "product":
            ask = _load_pair(ask_ptr, kind, offs_m, NP, CLASSES)
            hide = _load_pair(hide_ptr, kind, offs_n, NP, CLASSES)
            s = dot(ask, tl.trans(hide), s, PRECISION)
        elif MASK == "code":
            code_q = tl.load(code_ptr + kind * NP + offs_m)
            code_k = tl.load(code_ptr + kind * NP + offs_n)
            s = tl.where(_seen(code_q[:, None], code_k[None, :], span, CAUSAL), s, HIDDEN)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None])
        if THRESHOLD:
            row = (b * L + token_q) * heads + head
            dp *= _kept(seed, row[:, None], offs_n[None, :], THRESHOLD, KEPT, ACC)
        dbias += p * (dp - delta[:, None])
        sums_ptr += heads * 2 * NP
        window += 1  # a division costs more
        b, window = tl.where(window == W, b + 1, b), tl.where(window == W, 0, window)
    part_ptr += (split.to(tl.int64) * heads + head) * NP * NP
    tl.store(part_ptr + offs_m[:, None] * NP + offs_n[None, :], dbias)
