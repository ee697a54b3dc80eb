"""The backend "triton": launches the kernels over the walks of a geometry. And what the audit and the tuner launch."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from ..._launches import Launch
from ..common import dtypes
from . import folds, walks
from .bias_kernels import (
    _neighborhood_attention_bias_fold_kernel,
    _neighborhood_attention_bias_sum_kernel,
)
from .kernels import (
    _neighborhood_attention_bwd_kv_kernel,
    _neighborhood_attention_bwd_q_kernel,
    _neighborhood_attention_fwd_kernel,
)
from .options import Options
from .tiling import WORD, packed_bits

if TYPE_CHECKING:
    from .backends import Facts

__all__ = ["WORD", "packed_bits"]

OP = "neighborhood_attention"
SHAPES = "neighborhood_attention3d"  # in benchmarks/shapes.yaml
FORWARD = "_neighborhood_attention_fwd_kernel"
BY_QUERY = "_neighborhood_attention_bwd_q_kernel"
BY_KEY = "_neighborhood_attention_bwd_kv_kernel"
FOLD = "_neighborhood_attention_bias_fold_kernel"
SUM = "_neighborhood_attention_bias_sum_kernel"
LOG2E = math.log2(math.e)
FILL = 1056  # programs: eight waves of a large GPU
SUMMED = 32  # entries of the bias table that a program sums up
WIDEST = (1 << 31) - (1 << 20)  # elements of a sample; beyond, offsets are int64


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """out as q, contiguous, and, if ``keep``, the log-sum-exp of every token's scores ``[B, heads, T * H * W]``."""
    q, k, v = _checked(q, k, v, table, options)
    config = _config(FORWARD, q)
    walk = walks.walk(_size(q), options, False, config["BLOCK_M"], config["BLOCK_N"], _tables_on(q))
    out = q.new_empty(q.shape)
    lse = _sums(q) if keep else None
    _neighborhood_attention_fwd_kernel[_grid(q, walk)](
        q, k, v, _bias(table, q), walk.rows, walk.tiles, walk.slots, out, lse, *_sizes(q, walk, options),
        options.scale * LOG2E, *_strides(q, k, v), **_constants(q, k, v), **config,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, out: Tensor, lse: Tensor,
    needs: Sequence[bool], options: Options,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dtable: a launch for the first, one for two, two for the last."""
    q, k, v = _checked(q, k, v, table, options)
    for name, t, shape in (
        ("dout", dout, q.shape),
        ("out", out, q.shape),
        ("lse", lse, _sums(q).shape),
    ):
        if t.shape != shape or t.device != q.device or not t.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {tuple(shape)}, got {tuple(t.shape)}, {t.stride()}"
            )
    bias, constants, strides = _bias(table, q), _constants(q, k, v), _strides(q, k, v)
    scale = options.scale * LOG2E
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    # dQ's kernel makes delta for the others, so it runs whatever is needed.
    config = _config(BY_QUERY, q)
    walk = walks.walk(_size(q), options, False, config["BLOCK_M"], config["BLOCK_N"], _tables_on(q))
    _neighborhood_attention_bwd_q_kernel[_grid(q, walk)](
        q, k, v, bias, out, dout, lse, walk.rows, walk.tiles, walk.slots, delta, dq, *_sizes(q, walk, options),
        scale, options.scale, *strides, **constants, **config,
    )  # fmt: skip
    dk = dv = dtable = None
    if needs[1] or needs[2]:
        dk, dv = q.new_empty(q.shape), q.new_empty(q.shape)
        config = _config(BY_KEY, q)
        walk = walks.walk(
            _size(q), options, True, config["BLOCK_M"], config["BLOCK_N"], _tables_on(q)
        )
        _neighborhood_attention_bwd_kv_kernel[_grid(q, walk)](
            q, k, v, bias, dout, lse, delta, walk.rows, walk.tiles, walk.slots, dk, dv, *_sizes(q, walk, options),
            scale, options.scale, *strides, **constants, **config,
        )  # fmt: skip
    if table is not None and needs[3]:
        dtable = _bias_gradient(dout, q, k, v, table, bias, lse, delta, options)
    return dq, dk, dv, dtable


def _bias_gradient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, bias: Tensor | None, lse: Tensor, delta: Tensor,
    options: Options,
) -> Tensor:  # fmt: skip
    B, T, H, W, heads, _ = q.shape
    config = _config(FOLD, q)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    fold = folds.fold(_size(q), options, block_m, block_n, -(-FILL // heads), _tables_on(q))
    parts, columns, rows = len(fold.parts), fold.columns.shape[1], fold.rows.shape[1]
    partial = torch.empty(heads, parts, block_m, block_n, dtype=lse.dtype, device=q.device)
    _neighborhood_attention_bias_fold_kernel[(parts * heads,)](
        q, k, v, bias, dout, lse, delta, fold.rows, fold.tiles, fold.columns, fold.bias, fold.pairs, fold.parts,
        partial, parts, columns, rows, B, fold.guards, heads, T * H * W, options.rows, options.scale * LOG2E,
        *_strides(q, k, v), **_constants(q, k, v), **config,
    )  # fmt: skip
    dtable = torch.empty(table.shape, dtype=table.dtype, device=q.device)
    _neighborhood_attention_bias_sum_kernel[(triton.cdiv(options.rows, SUMMED) * heads,)](
        partial, fold.sources, fold.first, dtable, parts, heads, options.rows, fold.most,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=SUMMED, ACC=_accumulator(q.dtype),
    )  # fmt: skip
    return dtable


def _checked(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The last look before pointers are taken; copies where tokens are not evenly spaced."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 6 or t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{name}: expected [B, T, H, W, heads, head_dim] as q, {q.dtype} {tuple(q.shape)} on {q.device}, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if q.dtype not in dtypes.DTYPES or q.numel() == 0:
        raise ValueError(
            f"q: expected fp16, bf16, fp32 or fp64 with elements, got {q.dtype} {tuple(q.shape)}"
        )
    if table is not None and (
        tuple(table.shape) != (options.rows, q.shape[4]) or table.device != q.device
    ):
        raise ValueError(
            f"bias_table: expected ({options.rows}, {q.shape[4]}) on {q.device}, "
            f"got {tuple(table.shape)} on {table.device}"
        )
    q, k, v = (x if _is_even(x) else x.contiguous() for x in (q, k, v))
    return q, k, v


def _is_even(x: Tensor) -> bool:
    """Whether one stride leads from each token to the next, and elements of a head are neighbours."""
    _, _, H, W, _, D = x.shape
    step = _token_stride(x)
    nested = all(
        n == 1 or x.stride(axis) == step * inner
        for axis, n, inner in ((1, x.shape[1], H * W), (2, H, W), (3, W, 1))
    )
    return nested and (D == 1 or x.stride(5) == 1)


def _token_stride(x: Tensor) -> int:
    _, T, H, W, _, _ = x.shape
    if W > 1:
        return x.stride(3)
    if H > 1:
        return x.stride(2)
    return x.stride(1) if T > 1 else 0


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of batch, token and head, each; of the output's tokens."""
    found = [s for x in (q, k, v) for s in (x.stride(0), _token_stride(x), x.stride(4))]
    return (*found, q.shape[4] * q.shape[5])


def _bias(table: Tensor | None, q: Tensor) -> Tensor | None:
    """[heads, rows], in units of the scores."""
    if table is None:
        return None
    return (table.t().to(torch.promote_types(q.dtype, torch.float32)) * LOG2E).contiguous()


def _sums(q: Tensor) -> Tensor:
    B, T, H, W, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty(B, heads, T * H * W, dtype=wide, device=q.device)


def _size(q: Tensor) -> tuple[int, int, int]:
    return tuple(q.shape[1:4])  # type: ignore[return-value]


def _tables_on(q: Tensor) -> torch.device:
    return q.device


def _grid(q: Tensor, walk: walks.Walk) -> tuple[int]:
    return (len(walk.tiles) * q.shape[0] * q.shape[4],)


def _sizes(q: Tensor, walk: walks.Walk, options: Options) -> tuple[int, ...]:
    _, T, H, W, heads, _ = q.shape
    return len(walk.tiles), walk.slots.shape[1], walk.guards, heads, T * H * W, options.rows


def _constants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    D = q.shape[5]
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    tokens = math.prod(q.shape[1:4])
    extent = max(tokens * max(_token_stride(x) for x in (q, k, v)), tokens * q.shape[4] * D)
    return {
        "D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "ACC": _accumulator(q.dtype),
        "INDEX": tl.int64 if extent >= WIDEST else tl.int32, "PRECISION": "tf32" if tf32 else "ieee",
    }  # fmt: skip


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _config(kernel: str, q: Tensor) -> dict[str, int]:
    key = (
        ("head_dim", max(16, triton.next_power_of_2(q.shape[5]))),
        ("itemsize", q.dtype.itemsize),
    )
    return _tuning.config(OP, kernel, arch_of(q.device), key)


@functools.lru_cache(maxsize=16)
def _arch_of(device: int) -> str:
    return _tuning.arch_of(torch.cuda.get_device_capability(device))


def arch_of(device: torch.device) -> str:
    return _arch_of(device.index or 0) if device.type == "cuda" else "default"


@contextlib.contextmanager
def as_on(arch: str) -> Iterator[None]:
    """Configs inside are those of ``arch`` (``"sm90"``), whatever device the tensors are on."""
    with mock.patch.object(sys.modules[__name__], "arch_of", lambda device: arch):
        yield


def forget_plans() -> None:
    """After a change of the configs: walks are kept by their tiles' sizes, so there is nothing to forget."""


def describe(facts: Facts) -> str:
    """The forward pass's config, for ``explain``."""
    q = torch.empty(facts.shape, dtype=facts.dtype, device="meta")
    with as_on(arch_of(facts.device)):
        config = _config(FORWARD, q)
    walk = walks.walk(
        _size(q), facts.options, False, config["BLOCK_M"], config["BLOCK_N"], torch.device("cpu")
    )
    t, h, w = walk.lengths
    return f"tiles of {t}x{h}x{w} x {config['BLOCK_N']} keys, {config['num_warps']} warps, {len(walk.tiles)} tiles"


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the test command compiles: each kernel at head_dim 64, with and without a bias.
GATED = {"gate": ("bf16, forward", "bf16, backward"), "plain": ("bf16, forward",)}


def launches(
    layer: str, shape: dict[str, Any], *, device: str, gated: bool = False
) -> Iterator[Launch]:
    """The launches of one row of ``shapes.yaml``.

    Args:
        device: ``"meta"`` or ``"cuda"``.
        gated: only those that the test command compiles.
    """
    options = options_of(shape)
    size = (shape["batch"], *shape["size"], shape["heads"], shape["head_dim"])
    for name, dtype in DTYPES.items():

        def made(dtype: torch.dtype = dtype) -> Tensor:
            x = torch.empty(size, dtype=dtype, device=device)
            return x if x.is_meta else x.normal_()

        q, k, v, dout = (made() for _ in range(4))
        table = None
        if shape.get("bias"):
            table = torch.zeros(options.rows, shape["heads"], device=device)
        key = {"head_dim": shape["head_dim"], "itemsize": dtype.itemsize}
        for variant, names, run in _variants(q, k, v, dout, table, options):
            label = f"{name}, {variant}"
            if not gated or label in GATED.get(layer, ()):
                yield Launch(f"{layer}, {label}", names, key, run)


def options_of(shape: dict[str, Any]) -> Options:
    """Of a row of ``shapes.yaml``."""
    window, stride, dilation = (
        tuple(shape.get(name, (1, 1, 1))) for name in ("window", "stride", "dilation")
    )
    return Options(window, stride, dilation, bool(shape.get("causal")), shape["head_dim"] ** -0.5)


def _variants(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, table: Tensor | None, options: Options
) -> Iterator[tuple[str, tuple[str, ...], Callable[[], tuple[Tensor | None, ...]]]]:
    yield "forward", (FORWARD,), lambda: forward(q, k, v, table, options, True)
    out, lse = (q, _sums(q)) if q.is_meta else forward(q, k, v, table, options, True)
    assert lse is not None
    names = (BY_QUERY, BY_KEY) if table is None else (BY_QUERY, BY_KEY, FOLD)
    needs = (True, True, True, True)
    yield "backward", names, lambda: backward(dout, q, k, v, table, out, lse, needs, options)
