"""Window attention's backward kernel for windows that are one tile. ``launches.py`` plans and launches it."""

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
    _store_rows,
)


@triton.jit
def _window_attention_bwd_kernel(
    qkv_ptr,  # [B, L, 3, heads, D], strides (stride_b, stride_l, heads * D, D, 1)
    pad_ptr,  # [2, heads, D] if PADS
    token_ptr,  # int32 [W, NP]
    kind_ptr,  # int32 [W]
    code_ptr,  # int32 [kinds, NP] if MASK is "code"
    ask_ptr,  # [kinds, NP, CLASSES] if MASK is "product"
    hide_ptr,  # as ask_ptr
    bias_ptr,  # as in the forward kernel, a tile a head
    place_ptr,  # int32 [NP] if BIAS is "gather"
    seed_ptr,  # int64 [] if THRESHOLD
    out_ptr,  # [B, L, heads, D]
    dout_ptr,  # as out_ptr
    lse_ptr,  # [B, heads, L]
    dqkv_ptr,  # [B, L, 3, heads, D]
    dpad_ptr,  # [B, pads, 2, heads, D] or None
    part_ptr,  # [splits, heads, NP, NP] or None
    stride_b, stride_l, L, W, heads, pairs, N, NP, span, rows, middle, pads, share,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CLASSES: tl.constexpr, BIAS: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a head, in ``share`` of the windows of all samples, one after the other. Scores are made once for
    all gradients; the bias' stays in registers.
    """
    pid = tl.program_id(0)
    head, split = pid % heads, pid // heads
    C = heads * DIM

    offs = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
    if PADS:
        pad_k_ptr = pad_ptr + head * DIM
        pad_v_ptr = pad_k_ptr + C
    if THRESHOLD:
        seed = tl.load(seed_ptr)

    dbias = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    b, window = (split * share // W).to(tl.int64), split * share % W
    for _ in range(split * share, tl.minimum((split + 1) * share, pairs)):
        kind = tl.load(kind_ptr + window)
        token = tl.load(token_ptr + window.to(tl.int64) * NP + offs)
        q_ptr = qkv_ptr + b * stride_b + head * DIM
        o_offs = b * L * C + head * DIM
        q = _load_rows(q_ptr, None, token, stride_l, offs_d, DIM, BLOCK_D, False, INDEX)
        k = _load_rows(q_ptr + C, pad_k_ptr, token, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
        v = _load_rows(q_ptr + 2 * C, pad_v_ptr, token, stride_l, offs_d, DIM, BLOCK_D, PADS, INDEX)
        do = _load_rows(dout_ptr + o_offs, None, token, C, offs_d, DIM, BLOCK_D, False, INDEX)
        o = _load_rows(out_ptr + o_offs, None, token, C, offs_d, DIM, BLOCK_D, False, INDEX)
        lse = (
            tl.load(lse_ptr + (b * heads + head) * L + token, mask=token >= 0, other=UNSEEN) * LOG2E
        )
        delta = tl.sum(o.to(ACC) * do.to(ACC), 1)
        zero = (window >= W).to(tl.int32)  # see _window_attention_dbias_kernel
        if BIAS == "dense":
            s = _bias_tile(bias_ptr, head + zero, BLOCK_M, BLOCK_N)
        elif BIAS == "gather":
            place = tl.load(place_ptr + offs)
            own_ptr = bias_ptr + (head * rows + middle + zero)
            s = tl.load(own_ptr + (place[:, None] - place[None, :]))
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        s = dot(q, tl.trans(k), s, PRECISION)
        if MASK == "product":
            ask = _load_pair(ask_ptr, kind, offs, NP, CLASSES)
            hide = _load_pair(hide_ptr, kind, offs, NP, CLASSES)
            s = dot(ask, tl.trans(hide), s, PRECISION)
        elif MASK == "code":
            code = tl.load(code_ptr + kind * NP + offs)
            s = tl.where(_seen(code[:, None], code[None, :], span, CAUSAL), s, HIDDEN)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None])
        zeros = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        if THRESHOLD:
            row = (b * L + token) * heads + head
            kept = _kept(seed, row[:, None], offs[None, :], THRESHOLD, KEPT, ACC)
            dv = dot(tl.trans(_operand(p * kept, do)), do, zeros, PRECISION)
            dp *= kept
        else:
            dv = dot(tl.trans(_operand(p, do)), do, zeros, PRECISION)
        ds = p * (dp - delta[:, None])
        dbias += ds
        dq = dot(_operand(ds, k), k, zeros, PRECISION) * SCALE
        dk = dot(tl.trans(_operand(ds, q)), q, zeros, PRECISION) * SCALE
        dq_ptr = dqkv_ptr + 3 * o_offs - 2 * head * DIM
        _store_rows(dq_ptr, dq, token, 3 * C, offs_d, DIM, BLOCK_D, INDEX)
        _store_rows(dq_ptr + C, dk, token, 3 * C, offs_d, DIM, BLOCK_D, INDEX)
        _store_rows(dq_ptr + 2 * C, dv, token, 3 * C, offs_d, DIM, BLOCK_D, INDEX)
        if dpad_ptr is not None:
            pad = tl.where((token < 0) & (token > NOBODY), -1 - token, -1)
            dk_ptr = dpad_ptr + b * pads * 2 * C + head * DIM
            _store_rows(dk_ptr, dk, pad, 2 * C, offs_d, DIM, BLOCK_D, INDEX)
            _store_rows(dk_ptr + C, dv, pad, 2 * C, offs_d, DIM, BLOCK_D, INDEX)
        window += 1  # a division costs more
        b, window = tl.where(window == W, b + 1, b), tl.where(window == W, 0, window)
    if part_ptr is not None:
        part_ptr += (split.to(tl.int64) * heads + head) * NP * NP
        tl.store(part_ptr + offs[:, None] * NP + offs[None, :], dbias)
