"""The backend "triton": plans and launches. And what the audit and the tuner launch."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from ... import _tuning
from ..._launches import Launch
from ..common.dtypes import DTYPES
from . import plans
from .backends import takes
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
from .plans import DBIAS, DELTA, DKV, DQ, DTABLE, FORWARD, SMALL, Key, Step, plan_step
from .small_kernels import _window_attention_bwd_kernel

if TYPE_CHECKING:
    from .backends import Facts

OP = plans.OP
SHAPES = "window_attention3d"  # in benchmarks/shapes.yaml


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
    verdict = takes(C // heads)
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
    stride = plans.token_stride(qkv)
    if stride is None:
        qkv = qkv.contiguous()
        stride = width
    if table is not None:
        table = table.contiguous()
    if pad_kv is not None:
        pad_kv = pad_kv.to(qkv.dtype).contiguous()
    if not plans.is_plain(options.scale):
        qkv = torch.cat((qkv[..., :C] * options.scale, qkv[..., C:]), -1)
        options, stride = options._replace(scale=1.0), width
    strides = (qkv.stride(0) if B > 1 else 0, stride)
    dense = plans.is_dense(heads, options.plan((T, H, W)).tokens)
    key = Key(
        arch_of(qkv.device), options, tuple(qkv.shape), strides, qkv.dtype, qkv.device,
        table is not None, dense, pad_kv is not None, seed is not None, plans.precision(qkv.dtype),
    )  # fmt: skip
    return qkv, table, pad_kv, key


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
        qkv,
        pad_kv,
        *step.slots,
        step.bounds,
        bias,
        places,
        seed,
        out,
        lse,
        *step.sizes,
        **step.constants,
    )
    return out, lse


def backward(
    dout: Tensor, qkv: Tensor, table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, out: Tensor,
    lse: Tensor, needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dqkv, dtable, dpad_kv for ``needs`` (of qkv, table, pad_kv)."""
    given_pad = pad_kv
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
    one_tile = options.plan((T, H, W)).tokens <= plans.ONE_TILE
    lost, dtable = _backward_small(found) if one_tile else _backward_tiled(found)
    dpad = None
    if found.needs_pad:
        assert given_pad is not None
        dpad = torch.zeros_like(given_pad) if lost is None else lost.sum((0, 1)).to(given_pad)
    if found.needs_qkv and not plans.is_plain(options.scale):
        dqkv[..., :C] *= options.scale
    return dqkv if found.needs_qkv else None, dtable, dpad


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
        **step.constants,
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
            g.qkv,
            g.pad_kv,
            *step.slots,
            bias,
            places,
            g.seed,
            g.dout,
            sums,
            part,
            *step.sizes,
            **step.constants,
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


def describe(facts: Facts) -> str:
    """The forward pass's config, for ``explain``."""
    heads, size = facts.options.num_heads, facts.shape[1:4]
    tokens = facts.options.plan(size).tokens
    key = plans.config_key(facts.shape[4] // 3 // heads, facts.dtype, tokens)
    config = _tuning.config(OP, FORWARD, arch_of(facts.device), key)
    tile = (
        f"{config['BLOCK_M']} x {config['BLOCK_N']} of {tokens} tokens, {config['num_warps']} warps"
    )
    if not facts.bias:
        return tile
    return f"{tile}, {'dense' if plans.is_dense(heads, tokens) else 'gathered'} bias"


# Configs that ``tune`` tries.
CANDIDATES: dict[str, dict[str, Sequence[int]]] = {
    "windows": {
        "BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "WINDOWS_INNER": (0, 1), "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
}  # fmt: skip
_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the test command compiles: every kernel, every form of mask and bias.
GATED = {
    "swin_t32.stage1.shifted": (
        "bf16, forward", "bf16, forward, gathered", "bf16, forward, no bias", "bf16, backward", "fp32, forward",
    ),
    "swin_t32.stage1": ("bf16, forward",),
    "n49.shifted": ("bf16, backward",),
}  # fmt: skip


def launches(
    layer: str, shape: dict[str, Any], *, device: str, gated: bool = False
) -> Iterator[Launch]:
    """The launches of one row of ``shapes.yaml``.

    Args:
        device: ``"meta"`` or ``"cuda"``.
        gated: only those that the test command compiles.
    """
    heads, dim = shape["heads"], shape["head_dim"]
    window = tuple(shape["window"])
    shift = tuple(shape.get("shift", (0, 0, 0)))
    options = Options(
        heads, window, shift, window, "torchvision", "cyclic", "kv", False, dim**-0.5, 0.0
    )
    rows = math.prod(2 * n - 1 for n in window)
    size = shape["batch"], *shape["input"]
    tokens = options.plan(size[1:]).tokens
    for name, dtype in _TYPES.items():
        qkv = torch.empty(*size, 3 * heads * dim, dtype=dtype, device=device)
        table = torch.empty(rows, heads, device=device)
        pad_kv = torch.empty(2, heads * dim, dtype=dtype, device=device)
        if device != "meta":
            qkv.normal_(), table.normal_(), pad_kv.normal_()
        for variant, kernels, run in _variants(qkv, table, pad_kv, options, tokens):
            label = f"{name}, {variant}"
            if not gated or label in GATED.get(layer, ()):
                key = dict(plans.config_key(dim, dtype, tokens))
                yield Launch(f"{layer}, {label}", kernels, key, run)


_Run = Callable[[], tuple[Tensor | None, ...]]


def _variants(
    qkv: Tensor, table: Tensor, pad_kv: Tensor, options: Options, tokens: int
) -> Iterator[tuple[str, tuple[str, ...], _Run]]:
    def fwd(bias: Tensor | None, dense: bool = True) -> tuple[Tensor | None, ...]:
        limit = plans.DENSE_BYTES if dense else 0
        with mock.patch.object(plans, "DENSE_BYTES", limit):
            return forward(qkv, bias, pad_kv, None, options, True)

    yield "forward", (FORWARD,), lambda: fwd(table)
    yield "forward, gathered", (FORWARD,), lambda: fwd(table, False)
    yield "forward, no bias", (FORWARD,), lambda: fwd(None)
    out, lse = fwd(table) if qkv.device.type != "meta" else _empty_like(qkv, options)
    assert out is not None and lse is not None
    dout = torch.empty_like(out) if out.is_meta else torch.randn_like(out)
    tiled = DELTA, DKV, DQ, DBIAS, DTABLE
    yield (
        "backward",
        (SMALL, DTABLE) if tokens <= plans.ONE_TILE else tiled,
        lambda: backward(dout, qkv, table, pad_kv, None, out, lse, (True, True, True), options),
    )


def _empty_like(qkv: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    *size, width = qkv.shape
    lse = qkv.new_empty(size[0], options.num_heads, math.prod(size[1:]), dtype=_state(qkv.dtype))
    return qkv.new_empty(*size, width // 3), lse
