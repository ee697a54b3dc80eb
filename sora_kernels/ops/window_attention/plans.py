"""What the Triton backend launches for a call: slots, tiles, grids, configs. No tensor of a call is looked at."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from . import slots as slots_of
from .options import Options

OP = "window_attention"
FORWARD = "_window_attention_fwd_kernel"
DELTA, DQ = "_window_attention_delta_kernel", "_window_attention_dq_kernel"
DKV, DBIAS = "_window_attention_dkv_kernel", "_window_attention_dbias_kernel"
SMALL = "_window_attention_bwd_kernel"
DTABLE = "_window_attention_dtable_kernel"

ONE_TILE = 64  # tokens of a window whose backward is one kernel
LEAST_SCALE = 1e-6  # below, a hidden score could be seen
FILL = 1056  # programs: two waves of four on a large GPU
WIDEST_TILE = 128  # slots: what windows are padded to, so that tiles of all kernels divide it
# Beyond, offsets within a sample are int64; the rest is room for a tile.
WIDEST = (1 << 31) - (1 << 20)
DENSE_BYTES = 1 << 30  # of a dense bias; a larger one is gathered from the table
# What configs and constants a kernel does not take, beside those that all do.
_WITHOUT = {
    DELTA: (
        "PADS", "MASK", "CAUSAL", "CLASSES", "BIAS", "THRESHOLD", "KEPT", "SCALE", "PRECISION", "BLOCK_N",
        "WINDOWS_INNER",
    ),
    DBIAS: ("WINDOWS_INNER",),
    SMALL: ("WINDOWS_INNER",),
}  # fmt: skip


class Key(NamedTuple):
    """What a plan depends on."""

    arch: str
    options: Options
    shape: tuple[int, ...]  # of qkv
    strides: tuple[int, int]  # batch, token
    dtype: torch.dtype
    device: torch.device
    bias: bool
    dense: bool  # the bias is expanded, not gathered
    pads: bool  # pad_kv was given
    dropout: bool
    precision: str


class Bias(NamedTuple):
    """How a kernel has its bias: tiles (rows, columns), or the table turned."""

    dense: bool
    rows: int
    columns: int
    keys_first: bool
    places: slots_of.Places


class Step(NamedTuple):
    """One launch: all of it that is not a tensor of the call."""

    programs: int
    slots: tuple[Tensor | None, ...]  # token, kind, code, ask, hide
    bounds: Tensor | None
    bias: Bias | None
    sizes: tuple[int, ...]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def plan_step(kernel: str, key: Key) -> Step:
    options, (B, *size, width) = key.options, key.shape
    heads, L, plan = options.num_heads, math.prod(size), options.plan(size)
    dim, N = width // 3 // heads, plan.tokens
    config = dict(_tuning.config(OP, kernel, key.arch, config_key(dim, key.dtype, N)))
    if kernel == SMALL:
        config["BLOCK_M"] = config["BLOCK_N"] = max(16, triton.next_power_of_2(N))
    block_m, block_n = config["BLOCK_M"], config.get("BLOCK_N", 1)

    who = plan, options.pads_take_part, options.causal_t
    found = slots_of.slots(*who, WIDEST_TILE, key.device)
    kinds = slots_of.kinds(*who)
    mask, pair, bounds, bias = "", None, None, None
    if kinds.mixed or (N % block_n and not (key.bias and key.dense)):
        product = key.dtype.itemsize == 2 and kinds.classes <= slots_of.CLASSES
        mask = "product" if product else "code"
    if mask == "product":
        pair = slots_of.pair(*who, WIDEST_TILE, key.dtype, key.device)
    if kernel in (FORWARD, DQ, DKV):
        bounds = slots_of.bounds(*who, block_m, block_n, kernel == DKV, key.device)
    rows = middle = 0
    if key.bias:
        places = slots_of.places(options, plan, WIDEST_TILE, key.device)
        rows, middle = places.rows, places.middle
        tile = (block_n, block_m) if kernel == DKV else (block_m, block_n)
        bias = Bias(key.dense, *tile, kernel == DKV, places)

    pairs = B * plan.windows
    tiles_m, tiles_n = triton.cdiv(N, block_m), triton.cdiv(N, block_n)
    sizes = [*key.strides, L, plan.windows, heads, pairs, N, found.padded, found.span, rows, middle]
    if kernel in (DKV, SMALL):
        sizes.append(plan.pads)
    if kernel in (DBIAS, SMALL):
        tiles = heads * tiles_m * tiles_n
        share = triton.cdiv(pairs, min(pairs, triton.cdiv(FILL, tiles)))
        sizes.append(share)
        programs = tiles * triton.cdiv(pairs, share)
    else:
        count = {DKV: tiles_n, DELTA: found.padded // block_m}.get(kernel, tiles_m)
        programs = pairs * heads * count
    wide = is_wide(max(L, plan.pads), key.strides[1], width)
    constants = {
        "DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "PADS": key.pads and options.pads_take_part and plan.pads > 0,
        "MASK": mask, "CAUSAL": options.causal_t, "CLASSES": pair.ask.shape[2] if pair else 0,
        "BIAS": ("dense" if key.dense else "gather") if key.bias else "",
        "THRESHOLD": int(options.dropout_p * 2**32) if key.dropout else 0, "SCALE": options.scale,
        "KEPT": 1 / (1 - options.dropout_p) if key.dropout and options.dropout_p < 1 else 0.0,
        "ACC": tl.float64 if key.dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if wide else tl.int32, "PRECISION": key.precision, **config,
    }  # fmt: skip
    without = _WITHOUT.get(kernel, ())
    constants = {name: value for name, value in constants.items() if name not in without}
    code = found.code if mask == "code" else None
    slots = found.token, found.kind, code, *(pair or (None, None))
    return Step(programs, slots, bounds, bias, tuple(sizes), constants)


def config_key(dim: int, dtype: torch.dtype, tokens: int) -> _tuning.Key:
    return (
        ("head_dim", dim),
        ("itemsize", dtype.itemsize),
        ("layout", "windows"),
        ("tokens", tokens),
    )


def is_dense(heads: int, tokens: int) -> bool:
    padded = triton.cdiv(tokens, WIDEST_TILE) * WIDEST_TILE
    return 4 * heads * padded**2 <= DENSE_BYTES


def is_wide(tokens: int, stride: int, width: int) -> bool:
    """Whether an offset within a sample of qkv or of its gradient passes int32."""
    return tokens * max(stride, width) >= WIDEST


def is_plain(scale: float) -> bool:
    """Whether kernels may count scores in units of 1 / scale; else q is scaled before."""
    return LEAST_SCALE <= scale < math.inf


def token_stride(x: Tensor) -> int | None:
    """Elements from a token of ``[B, T, H, W, channels]`` to the next; None where they are not evenly spaced."""
    _, *size, width = x.shape
    found, inner = None, 1
    even = x.stride(4) == 1 or width == 1
    for axis in (3, 2, 1):  # a size-1 axis may carry any stride
        if x.shape[axis] > 1:
            found = x.stride(axis) // inner if found is None else found
            even = even and x.stride(axis) == found * inner
        inner *= x.shape[axis]
    found = width if found is None else found
    return found if even and found >= width else None


def precision(dtype: torch.dtype) -> str:
    """tl.dot's ``input_precision``: TF32 only where torch's own matrix products may take it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
