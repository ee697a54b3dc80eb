"""The backend "triton": plans and launches. And what the audit and the tuner launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from ..common.dtypes import DTYPES
from . import slots as slots_of
from .bias_kernels import (
    _window_attention_bias_kernel,
    _window_attention_dtable_kernel,
    _window_attention_table_kernel,
)
from .fwd_kernels import _window_attention_fwd_kernel
from .geometry import WindowPlan
from .options import Options

OP = "window_attention"
SHAPES = "window_attention3d"  # in benchmarks/shapes.yaml
FORWARD = "_window_attention_fwd_kernel"


def _arch_of(device):
    return "sm90"


def precision(dtype):
    return "ieee"


class Call(NamedTuple):
    B: int
    L: int
    heads: int
    dim: int
    plan: WindowPlan


def forward(qkv, table, pad_kv, seed, options, keep, config=None):
    B, T, H, W, width = qkv.shape
    L = T * H * W
    heads = options.num_heads
    C = width // 3
    plan = options.plan((T, H, W))
    dim = C // heads
    config = dict(config or CONFIG)
    bias_mode = config.pop("BIAS")
    if table is None: bias_mode = ""
    BM, BN = config["BLOCK_M"], config["BLOCK_N"]
    key = (plan, options.pads_take_part, options.causal_t)
    dev = qkv.device
    s = slots_of.slots(*key, max(BM, BN), dev)
    k = slots_of.kinds(*key)
    acc = tl.float64 if qkv.dtype == torch.float64 else tl.float32
    accd = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    mask = ""
    if k.mixed or (plan.tokens % BN and bias_mode != "dense"):
        mask = "product" if qkv.dtype.itemsize == 2 and k.classes <= 32 else "code"
    mask = config.pop("MASK", mask)
    pair = slots_of.pair(*key, max(BM, BN), qkv.dtype, dev) if mask == "product" else None
    bounds = slots_of.bounds(*key, BM, BN, False, dev)
    out = qkv.new_empty(B, T, H, W, C)
    lse = qkv.new_empty(B, heads, L, dtype=accd) if keep else None
    bias = places = None
    rows = middle = 0
    if table is not None:
        places = slots_of.places(options, plan, max(BM, BN), dev)
        rows, middle = places.rows, places.middle
        tm, tn = triton.cdiv(plan.tokens, BM), triton.cdiv(plan.tokens, BN)
        if bias_mode == "dense":
            bias = qkv.new_empty(heads, tm, tn, BM * BN, dtype=accd)
            _window_attention_bias_kernel[(heads * tm * tn,)](
                table, places.code, bias, heads, plan.tokens, middle, ROWS=BM, COLUMNS=BN, KEYS_FIRST=False, SCALE=options.scale)
        else:
            bias = qkv.new_empty(heads, rows, dtype=accd)
            _window_attention_table_kernel[(triton.cdiv(rows, 256), heads)](table, bias, heads, rows, BLOCK=256, SCALE=options.scale)
    pads = plan.pads > 0 and options.pads_take_part and pad_kv is not None
    grid = (B * plan.windows * heads * triton.cdiv(plan.tokens, BM),)
    _window_attention_fwd_kernel[grid](
        qkv, pad_kv if pads else None, s.token, s.kind, s.code if mask == "code" else None,
        pair.ask if pair else None, pair.hide if pair else None, bounds, bias, places.code if bias_mode == "gather" else None,
        seed, out, lse,
        qkv.stride(0), qkv.stride(3), L, plan.windows, heads, B * plan.windows, plan.tokens, s.padded, s.span, rows, middle,
        DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), PADS=pads, MASK=mask, CAUSAL=options.causal_t,
        CLASSES=pair.ask.shape[-1] if pair else 0, BIAS=bias_mode, THRESHOLD=int(options.dropout_p * 2**32) if seed is not None else 0,
        SCALE=options.scale, ACC=acc, PRECISION=precision(qkv.dtype), **config)
    return out, lse


CONFIG = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2, BIAS="dense", WINDOWS_INNER=True)
