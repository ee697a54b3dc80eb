"""``neighborhood_attention3d``: schema, gradient and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.autocast import autocast_dtype
from ..common.dtypes import DTYPES
from ..common.gradient import Pair, Tensors, differentiable
from ..common.schema import differentiate, register
from . import reference
from .backends import OPERATOR, Facts, facts_of
from .options import Options

_OPTIONS = "int[] window_size, int[] stride, int[] dilation, bool causal_t, float scale"
_ARGUMENTS = f"(Tensor q, Tensor k, Tensor v, Tensor? bias_table, {_OPTIONS}, str backend) -> "
_TENSORS = 4


def _parse(flags: Sequence[Any]) -> Options:
    window, stride, dilation, causal_t, scale = flags
    return Options(tuple(window), tuple(stride), tuple(dilation), causal_t, scale)


def _run_forward(keep: bool, args: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    q, k, v, table, *flags, backend = args
    if q.numel() == 0:
        return _fake_forward(keep, args)
    options = _parse(flags)
    facts = facts_of(q, options, table is not None, keep)
    return OPERATOR.select(backend, facts).impl.forward(q, k, v, table, options, keep)


def _fake_forward(keep: bool, args: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    q = args[0]
    B, T, H, W, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(B, heads, T * H * W, dtype=wide) if keep else None
    return q.new_empty(q.shape), lse


def _run_backward(dout, q, k, v, table, out, lse, *rest) -> Tensors:
    *flags, needs, backend = rest
    tensors = q, k, v, table
    if q.numel() == 0:
        return _wanted([None if t is None else torch.zeros_like(t) for t in tensors], needs, q)
    options = _parse(flags)
    impl = OPERATOR.select(backend, facts_of(q, options, table is not None, True)).impl
    found = impl.backward(dout.contiguous(), *tensors, out, lse, needs, options)
    return _wanted(found, needs, q)


def _wanted(found: Tensors, needs: Sequence[bool], like: Tensor) -> Tensors:
    """Gradients, contiguous; empty tensors where none is needed."""
    return tuple(
        like.new_empty(0) if g is None or not need else g.contiguous()
        for g, need in zip(found, needs, strict=True)
    )


def _fake_backward(dout, q, k, v, table, out, lse, *rest) -> Tensors:
    needs = rest[-2]
    return tuple(
        q.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((q, k, v, table), needs, strict=True)
    )


# Two schemas rather than an optional output: without a backward to come there is no tape to return.
_plain = register(
    f"neighborhood_attention3d{_ARGUMENTS}Tensor",
    lambda *args: _run_forward(False, args)[0],
    lambda *args: _fake_forward(False, args)[0],
)
_fwd = register(
    f"neighborhood_attention3d_fwd{_ARGUMENTS}(Tensor out, Tensor lse)",
    lambda *args: _run_forward(True, args),
    lambda *args: _fake_forward(True, args),
)
_bwd = register(
    "neighborhood_attention3d_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias_table, Tensor out, "
    f"Tensor lse, {_OPTIONS}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _forward(tensors: Tensors, flags: tuple, keep: bool, backend: str) -> Tensors:
    if keep:
        return _fwd(*tensors, *flags, backend)
    return (_plain(*tensors, *flags, backend),)


def _save(tensors: Tensors, results: Tensors, flags: tuple, backend: str) -> Tensors:
    return (*tensors, *results)


def _backward(
    grads: Tensors, saved: Tensors, needs: Sequence[bool], flags: tuple, backend: str
) -> Tensors:
    return _bwd(grads[0], *saved, *flags, list(needs), backend)


def _definition(tensors: Tensors, flags: tuple) -> Tensors:
    return (reference.neighborhood_attention3d(*tensors, _parse(flags)),)  # type: ignore[call-arg, arg-type]


def _recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
    tensors = saved[:_TENSORS]
    return _definition(tensors, flags), tensors


_call = differentiable(Pair(_forward, _save, _backward, _definition, _recompute, num_outputs=1))

differentiate(
    "neighborhood_attention3d",
    lambda *args: _call(args[:_TENSORS], args[_TENSORS:-1], args[-1])[0],
)


def neighborhood_attention3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal_t: bool = False,
    bias_table: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token of a video map to a window of tokens around it.

    Equivalent to, with ``seen`` [L, L] true where a query sees a key and ``row`` [L, L] the row of their offset::

        q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))              # [B, heads, L = T H W, head_dim]
        mask = bias_table[row].permute(2, 0, 1).masked_fill(~seen, -inf)
        F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)  # [B, L, heads, head_dim]

    A query sees a key where it does on each axis: of the coordinates that are a multiple of the dilation away, the
    window of ``window_size`` centred on the query (one more before than after if it is even), shifted to lie inside.

    Args:
        q, k, v: ``[B, T, H, W, heads, head_dim]``; fp16, bf16, fp32 or fp64, any strides (copied unless T, H and W are
            nested densely and the last axis has stride 1; views of one projection of q, k and v are not copied).
        window_size: int or (t, h, w). Where it is larger than there are coordinates it is clipped: all are seen.
        stride: int or (t, h, w), at most window_size: so many consecutive queries share the window of the one in
            their middle. As large as the window, windows part the map.
        dilation: int or (t, h, w): the step between the keys of a window.
        causal_t: along t the window ends at the query instead, and begins at the first frame at the earliest. With a
            stride it begins where that of the last query of the group does.
        bias_table: ``[(2 Wt - 1)(2 Wh - 1)(2 Ww - 1), heads]``, any of those dtypes, for window_size (Wt, Wh, Ww): what
            is added to a score, by query minus key in steps of the dilation. Row 0 is the offset -(W - 1) on each axis,
            w runs fastest, as in Swin. (NATTEN's tables went by key minus query: they are this one flipped.)
        scale: of the scores; None: head_dim ** -0.5.
        backend: "triton", "torch", "reference", or None for the fastest that can run.

    Returns:
        ``[B, T, H, W, heads, head_dim]``, contiguous, in q's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        BackendError: the named backend cannot run this call; the message says why.

    Scores, softmax and sums are fp32 (fp64 for fp64). Under autocast q, k and v are cast to its dtype; the table is
    read as it is. Gradients of q, k, v and bias_table are bitwise repeatable and of any order; inside ``torch.func``
    the reference runs.

    Source: Hassani et al., "Neighborhood Attention Transformer", 2023, "Dilated Neighborhood Attention Transformer",
    2022, and "Generalized Neighborhood Attention", 2025.
    """
    backend = OPERATOR.check_name(backend) if backend else ""
    q, k, v, options = _checked(q, k, v, window_size, stride, dilation, causal_t, bias_table, scale)
    return _call((q, k, v, bias_table), tuple(options), backend)[0]  # type: ignore[return-value]


def _checked(
    q: Tensor, k: Tensor, v: Tensor, window_size: Any, stride: Any, dilation: Any, causal_t: bool,
    bias_table: Tensor | None, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Options]:  # fmt: skip
    """q, k and v as autocast wants them, and the rest."""
    options = check_window(window_size, stride, dilation, causal_t)
    if q.dim() != 6:
        raise _error(f"q must be [B, T, H, W, heads, head_dim], got {tuple(q.shape)}")
    if q.dtype not in DTYPES:
        raise _error(f"q must be fp16, bf16, fp32 or fp64, got {q.dtype}")
    _, T, H, W, heads, dim = q.shape
    if T < 1 or H < 1 or W < 1 or heads < 1 or dim < 1:  # min() would compare symbols
        raise _error(f"q must have elements on T, H, W, heads and head_dim, got {tuple(q.shape)}")
    if T * H * W >= 1 << 31:
        raise _error(f"q must have less than 2^31 tokens a sample, got {tuple(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            raise _error(
                f"{name} must be as q, {q.dtype} {tuple(q.shape)} on {q.device}, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    options = options._replace(scale=dim**-0.5 if scale is None else float(scale))
    if bias_table is not None and (
        tuple(bias_table.shape) != (options.rows, heads)
        or bias_table.dtype not in DTYPES
        or bias_table.device != q.device
    ):
        raise _error(
            f"bias_table must be floating point ({options.rows}, {heads}) on {q.device}, "
            f"got {bias_table.dtype} {tuple(bias_table.shape)} on {bias_table.device}"
        )
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v, options


def check_window(window_size: Any, stride: Any, dilation: Any, causal_t: bool) -> Options:
    """Of public arguments, without the scale."""
    window = _triple("window_size", window_size)
    strides, dilations = _triple("stride", stride), _triple("dilation", dilation)
    if any(s > w for s, w in zip(strides, window, strict=True)):
        raise _error(f"stride must be at most window_size {window}, got {strides}")
    return Options(window, strides, dilations, bool(causal_t), 1.0)


def _triple(name: str, value: Any) -> tuple[int, int, int]:
    """Of a public argument."""
    given = (value,) * 3 if isinstance(value, int) else value
    try:
        t, h, w = (int(n) for n in given)
    except (TypeError, ValueError):
        raise _error(f"{name} must be an int or three (t, h, w), got {value!r}") from None
    if min(t, h, w) < 1:
        raise _error(f"{name} must be at least 1 on every axis, got {value!r}")
    return t, h, w


def _error(text: str) -> ValueError:
    return ValueError(f"neighborhood_attention3d: {text}")


def facts_of_call(
    q: Tensor, k: Tensor, v: Tensor, window_size: Any, *, stride: Any = 1, dilation: Any = 1, causal_t: bool = False,
    bias_table: Tensor | None = None, scale: float | None = None, **_: Any,
) -> Facts:  # fmt: skip
    """The public function's arguments -> facts, for ``explain``."""
    q, k, v, options = _checked(q, k, v, window_size, stride, dilation, causal_t, bias_table, scale)
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, bias_table)
    )
    return facts_of(q, options, bias_table is not None, grad)
