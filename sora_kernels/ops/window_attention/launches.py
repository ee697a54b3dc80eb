"""The backend "triton": plans and launches. And what the audit and the tuner launch."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from ..._dispatch import YES, Verdict, no
from ..._launches import Launch
from ..common.dtypes import DTYPES
from . import slots as slots_of
from .bias_kernels import (
    _window_attention_bias_kernel,
    _window_attention_dtable_kernel,
    _window_attention_table_kernel,
)
from .bwd_kernels import (
    _window_attention_dbias_kernel,
    _window_attention_delta_kernel,
    _window_attention_dkv_kernel,
    _window_attention_dq_kernel,
)
from .fwd_kernels import _window_attention_fwd_kernel
from .options import Options
from .small_kernels import _window_attention_bwd_kernel

OP = "window_attention"
SHAPES = "window_attention3d"  # in benchmarks/shapes.yaml
FORWARD = "_window_attention_fwd_kernel"
DELTA, DQ = "_window_attention_delta_kernel", "_window_attention_dq_kernel"
DKV, DBIAS = "_window_attention_dkv_kernel", "_window_attention_dbias_kernel"
SMALL = "_window_attention_bwd_kernel"
DTABLE = "_window_attention_dtable_kernel"

_DELTA_CONSTANTS = ("DIM", "BLOCK_D", "ACC", "INDEX", "BLOCK_M", "num_warps")
ONE_TILE = 64  # tokens of a window whose backward is one kernel
DIMS = (16, 128)
LEAST_SCALE = 1e-6  # below, a hidden score could be seen
FILL = 1056  # programs: two waves of four on a large GPU
WIDEST_TILE = 128  # slots: what windows are padded to, so that tiles of all kernels divide it
WIDEST = (1 << 31) - (1 << 20)  # beyond, offsets within a sample are int64; the rest is room for a tile
DENSE_BYTES = 1 << 30  # of a dense bias; a larger one is gathered from the table


def can_run(head_dim: int, scale: float) -> Verdict:
    """Whether the kernels take such heads; devices and dtypes are ``triton_backend.can_run``'s."""
    if not DIMS[0] <= head_dim <= DIMS[1]:
        return no(f"head_dim is {head_dim}; the kernels take {DIMS[0]} to {DIMS[1]}")
    if not LEAST_SCALE <= scale < math.inf:
        return no(f"scale is {scale}; the kernels take {LEAST_SCALE} and more")
    return YES


class Key(NamedTuple):
    """What a plan depends on."""

    arch: str
    options: Options
    shape: tuple[int, ...]  # of qkv
    strides: tuple[int, int]  # batch, token
    dtype: torch.dtype
    device: torch.device
    bias: bool
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
    config = dict(
        _tuning.config(
            OP, kernel, key.arch,
            (("head_dim", dim), ("itemsize", key.dtype.itemsize), ("tokens", N)),
        )
    )  # fmt: skip
    if kernel == SMALL:
        config["BLOCK_M"] = config["BLOCK_N"] = max(16, triton.next_power_of_2(N))
    block_m, block_n = config["BLOCK_M"], config.get("BLOCK_N", 1)
    multiple, who = WIDEST_TILE, (plan, options.pads_take_part, options.causal_t)
    found = slots_of.slots(*who, multiple, key.device)
    kinds = slots_of.kinds(*who)
    dense = 4 * heads * found.padded**2 <= DENSE_BYTES
    mask = ""
    if kinds.mixed or (N % block_n and not (key.bias and dense)):
        product = key.dtype.itemsize == 2 and kinds.classes <= slots_of.CLASSES
        mask = "product" if product else "code"
    pair = slots_of.pair(*who, multiple, key.dtype, key.device) if mask == "product" else None
    places = bias = None
    if key.bias:
        places = slots_of.places(options, plan, multiple, key.device)
        keys_first = kernel == DKV
        tile = (block_n, block_m) if keys_first else (block_m, block_n)
        bias = Bias(dense, *tile, keys_first, places)
    bounds = None
    if kernel not in (DBIAS, SMALL):
        bounds = slots_of.bounds(*who, block_m, block_n, kernel == DKV, key.device)
    pairs = B * plan.windows
    tiles_m, tiles_n = triton.cdiv(N, block_m), triton.cdiv(N, block_n)
    rows, middle = (places.rows, places.middle) if places else (0, 0)
    sizes = [*key.strides, L, plan.windows, heads, pairs, N, found.padded, found.span, rows, middle]
    if kernel in (DKV, SMALL):
        sizes.append(plan.pads)
    if kernel in (DBIAS, SMALL):
        tiles = heads * tiles_m * tiles_n
        share = triton.cdiv(pairs, min(pairs, triton.cdiv(FILL, tiles)))
        sizes.append(share)
        programs = tiles * triton.cdiv(pairs, share)
    else:
        tiles = {DKV: tiles_n, DELTA: found.padded // block_m}.get(kernel, tiles_m)
        programs = pairs * heads * tiles
    constants = {
        "DIM": dim, "BLOCK_D": block_d(dim), "PADS": key.pads and options.pads_take_part and plan.pads > 0,
        "MASK": mask, "CAUSAL": options.causal_t, "CLASSES": pair.ask.shape[2] if pair else 0,
        "BIAS": "" if bias is None else "dense" if dense else "gather",
        "THRESHOLD": int(options.dropout_p * 2**32) if key.dropout else 0, "SCALE": options.scale,
        "ACC": tl.float64 if key.dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if is_wide(max(L, plan.pads), key.strides[1], width) else tl.int32, "PRECISION": key.precision, **config,
    }  # fmt: skip
    slots = (
        found.token, found.kind, found.code if mask == "code" else None, *(pair or (None, None)),
    )  # fmt: skip
    return Step(programs, slots, bounds, bias, tuple(sizes), constants)


def is_wide(tokens: int, stride: int, width: int) -> bool:
    """Whether an offset within a sample of qkv or of its gradient passes int32."""
    return tokens * max(stride, width) >= WIDEST


def block_d(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _prepare(
    qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None, Key]:
    """The last look before pointers are taken: qkv, table and pad_kv as kernels read them."""
    heads = options.num_heads
    if qkv.dim() != 5 or qkv.dtype not in DTYPES or qkv.numel() == 0 or qkv.shape[4] % (3 * heads):
        raise ValueError(
            f"qkv: expected [B, T, H, W, 3 * {heads} * head_dim] of fp16, bf16, fp32 or fp64 with elements, "
            f"got {qkv.dtype} {tuple(qkv.shape)}"
        )
    B, T, H, W, width = qkv.shape
    C = width // 3
    verdict = can_run(C // heads, options.scale)
    if not verdict.ok:
        raise ValueError(verdict.why)
    rows = math.prod(2 * n - 1 for n in options.table_window)
    for name, t, shape in (("bias_table", table, (rows, heads)), ("pad_kv", pad_kv, (2, C))):
        if t is not None and (
            tuple(t.shape) != shape or t.dtype not in DTYPES or t.device != qkv.device
        ):
            raise ValueError(
                f"{name}: expected {shape} on {qkv.device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if seed is not None and (
        seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != qkv.device
    ):
        raise ValueError(
            f"seed: expected one int64 on {qkv.device}, got {tuple(seed.shape)} {seed.dtype}"
        )
    stride = token_stride(qkv)
    if stride is None:
        qkv = qkv.contiguous()
        stride = width
    if table is not None:
        table = table.contiguous()
    if pad_kv is not None:
        pad_kv = pad_kv.to(qkv.dtype).contiguous()
    strides = (qkv.stride(0) if B > 1 else 0, stride)
    key = Key(
        arch_of(qkv.device), options, tuple(qkv.shape), strides, qkv.dtype, qkv.device,
        table is not None, pad_kv is not None, seed is not None, precision(qkv.dtype),
    )  # fmt: skip
    return qkv, table, pad_kv, key


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
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def _state(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _bias(step: Step, table: Tensor | None, key: Key) -> tuple[Tensor | None, Tensor | None]:
    """The bias as a kernel reads it, and the slots' places if it gathers."""
    if table is None or step.bias is None:
        return None, None
    dense, rows, columns, keys_first, places = step.bias
    heads, scale = key.options.num_heads, key.options.scale
    if not dense:
        turned = table.new_empty(heads, places.rows, dtype=_state(key.dtype))
        _window_attention_table_kernel[(triton.cdiv(places.rows, 1024), heads)](
            table, turned, heads, places.rows, BLOCK=1024, SCALE=scale
        )
        return turned, places.code
    N = step.sizes[6]
    tiles = triton.cdiv(N, rows), triton.cdiv(N, columns)
    bias = table.new_empty(heads, *tiles, rows * columns, dtype=_state(key.dtype))
    _window_attention_bias_kernel[(heads * tiles[0] * tiles[1],)](
        table, places.code, bias, heads, N, places.middle,
        ROWS=rows, COLUMNS=columns, KEYS_FIRST=keys_first, SCALE=scale,
    )  # fmt: skip
    return bias, None


def forward(
    qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out ``[B, T, H, W, C]`` and, if ``keep``, the log-sum-exp of every token's scores ``[B, heads, tokens]``."""
    qkv, table, pad_kv, key = _prepare(qkv, table, pad_kv, seed, options)
    B, T, H, W, width = qkv.shape
    step = plan_step(FORWARD, key)
    out = qkv.new_empty(B, T, H, W, width // 3)
    lse = None
    if keep:
        lse = qkv.new_empty(B, options.num_heads, T * H * W, dtype=_state(qkv.dtype))
    bias, places = _bias(step, table, key)
    _window_attention_fwd_kernel[(step.programs,)](
        qkv, pad_kv, *step.slots, step.bounds, bias, places, seed, out, lse, *step.sizes, **step.constants
    )
    return out, lse


def backward(
    dout: Tensor, qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, out: Tensor,
    lse: Tensor, needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dqkv, dtable, dpad_kv for ``needs`` (of qkv, table, pad_kv)."""
    given_table, given_pad = table, pad_kv
    qkv, table, pad_kv, key = _prepare(qkv, table, pad_kv, seed, options)
    B, T, H, W, width = qkv.shape
    heads, L, C = options.num_heads, T * H * W, width // 3
    state = _state(qkv.dtype)
    for name, t, shape, dtype in (
        ("dout", dout, (B, T, H, W, C), qkv.dtype), ("out", out, (B, T, H, W, C), qkv.dtype),
        ("lse", lse, (B, heads, L), state),
    ):  # fmt: skip
        if tuple(t.shape) != shape or t.dtype != dtype or t.device != qkv.device:
            raise ValueError(
                f"{name}: expected {dtype} {shape} on {qkv.device}, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    dqkv = torch.empty(B, T, H, W, width, dtype=qkv.dtype, device=qkv.device)
    found = _Gradients(
        qkv, table, pad_kv, seed, out, dout, lse, dqkv, bool(needs[0]), bool(needs[1] and table is not None),
        bool(needs[2] and pad_kv is not None), key,
    )  # fmt: skip
    one_tile = options.plan((T, H, W)).tokens <= ONE_TILE
    lost, dtable = _backward_small(found) if one_tile else _backward_tiled(found)
    dpad = None
    if found.needs_pad:
        assert given_pad is not None
        dpad = torch.zeros_like(given_pad) if lost is None else lost.sum((0, 1)).to(given_pad)
    if dtable is not None and given_table is not None:
        dtable = dtable.to(given_table.dtype)
    return dqkv if needs[0] else None, dtable, dpad


class _Gradients(NamedTuple):
    """A backward call: tensors as kernels read them."""

    qkv: Tensor
    table: Tensor | None
    pad_kv: Tensor | None
    seed: Tensor | None
    out: Tensor
    dout: Tensor
    lse: Tensor
    dqkv: Tensor
    needs_qkv: bool
    needs_table: bool
    needs_pad: bool
    key: Key

    def lost(self, step: Step, pads: int) -> Tensor | None:
        """Room for the gradients of pads ``[B, pads, 2, C]``."""
        if not (self.needs_pad and step.constants["PADS"]):
            return None
        return self.lse.new_empty(self.qkv.shape[0], pads, 2, self.out.shape[-1])


def _backward_small(g: _Gradients) -> tuple[Tensor | None, Tensor | None]:
    """Fills ``g.dqkv``; the gradients of pads and of the table."""
    step = plan_step(SMALL, g.key)
    pads, share = step.sizes[-2:]
    lost, part = g.lost(step, pads), None
    if g.needs_table:
        part = _room(g, step, share)
    bias, places = _bias(step, g.table, g.key)
    _window_attention_bwd_kernel[(step.programs,)](
        g.qkv, g.pad_kv, *step.slots, bias, places, g.seed, g.out, g.dout, g.lse, g.dqkv, lost, part,
        *step.sizes, **step.constants,
    )  # fmt: skip
    return lost, None if part is None else _dtable(g, step, part)


def _backward_tiled(g: _Gradients) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`_backward_small`."""
    step = plan_step(DELTA, g.key)
    L, windows, heads, pairs, NP = (step.sizes[n] for n in (2, 3, 4, 5, 7))
    sums = g.lse.new_empty(pairs, heads, 2, NP)
    _window_attention_delta_kernel[(step.programs,)](
        step.slots[0], g.out, g.dout, g.lse, sums, L, windows, heads, NP,
        **{name: value for name, value in step.constants.items() if name in _DELTA_CONSTANTS},
    )  # fmt: skip
    lost = dtable = None
    if g.needs_qkv or g.needs_pad:
        step = plan_step(DKV, g.key)
        lost = g.lost(step, step.sizes[-1])
        bias, places = _bias(step, g.table, g.key)
        _window_attention_dkv_kernel[(step.programs,)](
            g.qkv, g.pad_kv, *step.slots, step.bounds, bias, places, g.seed, g.dout, sums, g.dqkv, lost,
            *step.sizes, **step.constants,
        )  # fmt: skip
    if g.needs_qkv:
        step = plan_step(DQ, g.key)
        bias, places = _bias(step, g.table, g.key)
        _window_attention_dq_kernel[(step.programs,)](
            g.qkv, g.pad_kv, *step.slots, step.bounds, bias, places, g.seed, g.dout, sums, g.dqkv,
            *step.sizes, **step.constants,
        )  # fmt: skip
    if g.needs_table:
        step = plan_step(DBIAS, g.key)
        part = _room(g, step, step.sizes[-1])
        bias, places = _bias(step, g.table, g.key)
        _window_attention_dbias_kernel[(step.programs,)](
            g.qkv, g.pad_kv, *step.slots, bias, places, g.seed, g.dout, sums, part, *step.sizes, **step.constants
        )
        dtable = _dtable(g, step, part)
    return lost, dtable


def _room(g: _Gradients, step: Step, share: int) -> Tensor:
    """For the bias' gradient, a part for every share of the windows ``[splits, heads, NP, NP]``."""
    heads, pairs, _, NP = step.sizes[4:8]
    return g.lse.new_empty(triton.cdiv(pairs, share), heads, NP, NP)


def _dtable(g: _Gradients, step: Step, part: Tensor) -> Tensor:
    """From parts of the bias' gradient."""
    assert step.bias is not None and g.table is not None
    found, N = step.bias.places, step.sizes[6]
    splits, heads, NP, _ = part.shape
    dtable = torch.empty_like(g.table, memory_format=torch.contiguous_format)
    config = _tuning.config(OP, DTABLE, g.key.arch, ())
    grid = (triton.cdiv(found.rows, config["BLOCK_T"]), heads)
    _window_attention_dtable_kernel[grid](
        part, found.code, found.slot, dtable, heads, N, NP, splits, found.rows, found.middle, found.slot.numel(),
        ACC=step.constants["ACC"], **config,
    )  # fmt: skip
    return dtable


@functools.lru_cache(maxsize=16)
def _arch_of(device: int) -> str:
    return _tuning.arch_of(torch.cuda.get_device_capability(device))


def arch_of(device: torch.device) -> str:
    return _arch_of(device.index) if device.type == "cuda" else "default"


@contextlib.contextmanager
def as_on(arch: str) -> Iterator[None]:
    """Plans inside are those of ``arch`` (``"sm90"``), whatever device the tensors are on."""
    with mock.patch.object(sys.modules[__name__], "arch_of", lambda device: arch):
        yield


def forget_plans() -> None:
    """After a change of the configs."""
    plan_step.cache_clear()
