"""Window attention's forward kernel. ``launches.py`` plans and launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import dot
from .kernels import (
    HIDDEN,
    LN2,
    LOG2E,
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
def _window_attention_fwd_kernel(
    qkv_ptr,  # [B, L, 3, heads, D], strides (stride_b, stride_l, heads * D, D, 1)
    pad_ptr,  # [2, heads, D] if PADS
    token_ptr,  # int32 [W, NP]
    kind_ptr,  # int32 [W]
    code_ptr,  # int32 [kinds, NP] if MASK is "code"
    ask_ptr,  # [kinds, NP, CLASSES] if MASK is "product"
    hide_ptr,  # as ask_ptr
    bounds_ptr,  # int32 [kinds, query tiles, 2] or None
    bias_ptr,  # BIAS "dense": [heads, tiles, tiles, BLOCK_M * BLOCK_N]; "gather": [heads, rows]; in units of 1 / SCALE
    place_ptr,  # int32 [NP] if BIAS is "gather"
    seed_ptr,  # int64 [] if THRESHOLD
    out_ptr,  # [B, L, heads, D]
    lse_ptr,  # [B, heads, L] or None
    stride_b, stride_l, L, W, heads, pairs, N, NP, span, rows, middle,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CLASSES: tl.constexpr, BIAS: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWS_INNER: tl.constexpr,
):  # fmt: skip
    """One program: a query tile of a head of a window. ``pairs`` is B * W."""
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
    q = _load_rows(q_ptr, None, token_q, stride_l, offs_d, DIM, BLOCK_D, False, INDEX)
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

    m = tl.full([BLOCK_M], HIDDEN * 1e9, ACC)
    l = tl.zeros([BLOCK_M], ACC)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
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
        highest = tl.maximum(m, tl.max(s, 1) * (SCALE * LOG2E))
        p = tl.exp2(s * (SCALE * LOG2E) - highest[:, None])
        shrunk = tl.exp2(m - highest)
        l = l * shrunk + tl.sum(p, 1)  # noqa: E741
        if THRESHOLD:
            p *= _kept(seed, row[:, None], offs_n[None, :], THRESHOLD, KEPT, ACC)
        acc = dot(_operand(p, v), v, acc * shrunk[:, None], PRECISION)
        m = highest
    out_ptr += (b * L * heads + head) * DIM
    _store_rows(out_ptr, acc / l[:, None], token_q, C, offs_d, DIM, BLOCK_D, INDEX)
    if lse_ptr is not None:
        lse_ptr += (b * heads + head) * L
        tl.store(lse_ptr + token_q, (m + tl.log2(l)) * LN2, mask=token_q >= 0)
