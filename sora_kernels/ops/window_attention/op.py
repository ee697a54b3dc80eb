"""``window_attention3d``: schema, gradient and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.autocast import autocast_dtype, without_autocast
from ..common.dtypes import DTYPES
from ..common.gradient import Pair, Tensors, differentiable
from ..common.schema import differentiate, register
from . import reference
from .backends import OPERATOR, Facts, facts_of
from .options import Options, check_names, table_rows

_OPTIONS = (
    "int num_heads, int[] window_size, int[] shift_size, int[] table_window, str bias_index, str border, str pad, "
    "bool causal_t, float scale, float dropout_p"
)
_ARGUMENTS = (
    f"(Tensor qkv, Tensor? bias_table, Tensor? pad_kv, Tensor? seed, {_OPTIONS}, str backend) -> "
)
_TENSORS = 4


def _run_forward(keep: bool, args: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    qkv, table, pad_kv, seed, *flags, backend = args
    options = Options.of_schema(*flags)
    if qkv.numel() == 0:
        return _fake_forward(keep, args)
    facts = facts_of(qkv, options, table is not None, keep)
    impl = OPERATOR.select(backend, facts).impl
    with without_autocast(qkv):
        return impl.forward(qkv, table, pad_kv, seed, options, keep)


def _fake_forward(keep: bool, args: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    qkv, heads = args[0], args[_TENSORS]
    B, T, H, W, width = qkv.shape
    out = qkv.new_empty(B, T, H, W, width // 3)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return out, qkv.new_empty(B, heads, T * H * W, dtype=wide) if keep else None


def _run_backward(dout, qkv, table, pad_kv, seed, out, lse, *rest) -> Tensors:
    *flags, needs, backend = rest
    options = Options.of_schema(*flags)
    if qkv.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (qkv, table, pad_kv)]
        return _wanted(zeros, needs, qkv)
    facts = facts_of(qkv, options, table is not None, True)
    impl = OPERATOR.select(backend, facts).impl
    given = (dout.contiguous(), qkv, table, pad_kv, seed, out, lse)
    with without_autocast(qkv):
        return _wanted(impl.backward(*given, needs, options), needs, qkv)


def _wanted(found: Tensors, needs: Sequence[bool], like: Tensor) -> Tensors:
    """Gradients, contiguous; empty tensors where none is needed."""
    return tuple(
        like.new_empty(0) if g is None or not need else g.contiguous()
        for g, need in zip(found, needs, strict=True)
    )


def _fake_backward(dout, qkv, table, pad_kv, seed, out, lse, *rest) -> Tensors:
    needs = rest[-2]
    return tuple(
        qkv.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((qkv, table, pad_kv), needs, strict=True)
    )


# Two schemas rather than an optional output: without a backward to come there is no tape to return.
_plain = register(
    f"window_attention3d{_ARGUMENTS}Tensor",
    lambda *args: _run_forward(False, args)[0],
    lambda *args: _fake_forward(False, args)[0],
)
_fwd = register(
    f"window_attention3d_fwd{_ARGUMENTS}(Tensor out, Tensor lse)",
    lambda *args: _run_forward(True, args),
    lambda *args: _fake_forward(True, args),
)
_bwd = register(
    "window_attention3d_bwd(Tensor dout, Tensor qkv, Tensor? bias_table, Tensor? pad_kv, Tensor? seed, Tensor out, "
    f"Tensor lse, {_OPTIONS}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
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
    return (*_bwd(grads[0], *saved, *flags, list(needs[:3]), backend), None)


def _definition(tensors: Tensors, flags: tuple) -> Tensors:
    return (reference.window_attention3d(*tensors, Options.of_schema(*flags)),)  # type: ignore[call-arg, arg-type]


def _recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
    tensors = saved[:_TENSORS]
    return _definition(tensors, flags), tensors


_call = differentiable(Pair(_forward, _save, _backward, _definition, _recompute, num_outputs=1))

differentiate(
    "window_attention3d", lambda *args: _call(args[:_TENSORS], args[_TENSORS:-1], args[-1])[0]
)


def window_attention3d(
    qkv: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int] = (0, 0, 0),
    *,
    bias_table: Tensor | None = None,
    table_window: Sequence[int] | None = None,
    bias_index: str = "torchvision",
    border: str = "cyclic",
    pad: str = "kv",
    pad_kv: Tensor | None = None,
    causal_t: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Multi-head attention inside windows of a video map, shifted or not, straight from and to ``[B, T, H, W, ...]``.

    Equivalent to, for a map that the windows divide and no shift::

        q, k, v = windows(qkv).unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)   # windows: [B, nW, n, 3C]
        scores = scale * q @ k.mT + bias_table[index].permute(2, 0, 1)
        return merge((F.dropout(scores.softmax(-1), dropout_p, training) @ v).transpose(2, 3).flatten(3))

    Args:
        qkv: ``[B, T, H, W, 3 C]``, the last axis ordered ``[3, heads, head_dim]``; fp16, bf16, fp32 or fp64, any
            strides (copied unless T, H and W are nested densely and the last axis has stride 1).
        num_heads: divides C.
        window_size: tokens along (t, h, w). A window larger than the map is clipped to it. ``(T, 1, 1)`` and
            ``(1, H, W)`` are divided space-time attention, an axis of 1 more axial attention.
        shift_size: by which the windows are shifted, less than the window; ignored on axes that a window covers whole.
        bias_table: ``[(2 Wt - 1)(2 Wh - 1)(2 Ww - 1), heads]``, any of those dtypes: what is added to the score of a
            query and a key by their offset in a window of ``table_window`` (Wt, Wh, Ww; default: window_size).
        bias_index: of a clipped window: "torchvision" counts its slots as the full window's first, as the published
            models do; "exact" takes true offsets. They differ where H or W is clipped.
        border: "cyclic": the map is padded to whole windows and rolled by the shift, and what meets from two ends of
            an axis does not see each other (Swin). "ragged": windows end at the border instead. "grid": a window takes
            every n-th token, evenly over the map (MaxViT); no shift.
        pad: "kv": pads take part as keys and values ``pad_kv`` (torchvision's, whose pads are the projection's bias);
            "mask": they do not, which is also "ragged".
        pad_kv: ``[2, C]``, key and value of a pad; None: zeros.
        causal_t: a token sees no later frame.
        scale: of the scores; None: head_dim ** -0.5.
        dropout_p: of the attention weights where ``training``, in [0, 1).
        backend: "triton", "torch", "reference", or None for the fastest that can run.

    Returns:
        ``[B, T, H, W, C]``, contiguous, in qkv's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        BackendError: the named backend cannot run this call; the message says why.

    Scores, softmax and sums are fp32 (fp64 for fp64). Under autocast qkv and pad_kv are cast to its dtype; the table is
    read as it is. Gradients of qkv, bias_table and pad_kv are bitwise repeatable and of any order; inside
    ``torch.func`` the reference runs.

    Source: Liu et al., "Swin Transformer" and "Video Swin Transformer", 2021; the attention of ``pyramid_transformer``.
    """
    backend = OPERATOR.check_name(backend) if backend else ""
    qkv, pad_kv, options = _checked(
        qkv, num_heads, window_size, shift_size, bias_table, table_window, bias_index, border, pad, pad_kv,
        causal_t, scale, dropout_p if training else 0.0,
    )  # fmt: skip
    seed = None
    if options.dropout_p:
        seed = torch.randint(0, 2**63 - 1, (), device=qkv.device)
    return _call((qkv, bias_table, pad_kv, seed), tuple(options), backend)[0]  # type: ignore[return-value]


def _checked(
    qkv: Tensor, num_heads: int, window_size: Any, shift_size: Any, bias_table: Tensor | None, table_window: Any,
    bias_index: str, border: str, pad: str, pad_kv: Tensor | None, causal_t: bool, scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Options]:  # fmt: skip
    """qkv and pad_kv as autocast wants them, and the rest."""
    window = triple("window_size", window_size, 1)
    shift = triple("shift_size", shift_size, 0)
    table = window if table_window is None else triple("table_window", table_window, 1)
    check_names(bias_index, border, pad)
    check_shift(window, shift, border)
    if qkv.dim() != 5 or qkv.shape[-1] % (3 * max(num_heads, 1)) or num_heads < 1:
        raise _error(
            f"qkv must be [B, T, H, W, 3 * {num_heads} heads * head_dim], got {tuple(qkv.shape)}"
        )
    if qkv.dtype not in DTYPES:
        raise _error(f"qkv must be fp16, bf16, fp32 or fp64, got {qkv.dtype}")
    _, T, H, W, width = qkv.shape
    if T < 1 or H < 1 or W < 1 or width < 1:
        raise _error(f"qkv must have elements on T, H, W and channels, got {tuple(qkv.shape)}")
    if T * H * W >= 1 << 31:
        raise _error(f"qkv must have less than 2^31 tokens a sample, got {tuple(qkv.shape)}")
    if bias_table is not None:
        if any(w > t for w, t in zip(window, table, strict=True)):
            raise _error(f"table_window must be at least window_size {window}, got {table}")
        _check_tensor("bias_table", bias_table, (table_rows(table), num_heads), qkv.device)
    if pad_kv is not None:
        _check_tensor("pad_kv", pad_kv, (2, width // 3), qkv.device)
    if not 0 <= dropout_p < 1:
        raise _error(f"dropout_p must be in [0, 1), got {dropout_p}")
    if (dtype := autocast_dtype(qkv)) is not None:
        qkv = qkv.to(dtype)
    if pad_kv is not None:
        pad_kv = pad_kv.to(qkv.dtype)
    scale = (width // 3 // num_heads) ** -0.5 if scale is None else float(scale)
    options = Options(
        num_heads, window, shift, table, bias_index, border, pad, causal_t, scale, float(dropout_p)
    )
    return qkv, pad_kv, options


def triple(name: str, value: Any, least: int) -> tuple[int, int, int]:
    """Of a public argument."""
    try:
        t, h, w = (int(n) for n in value)
    except (TypeError, ValueError):
        raise _error(f"{name} must be three ints (t, h, w), got {value!r}") from None
    if min(t, h, w) < least:
        raise _error(f"{name} must be at least {least} on every axis, got {value!r}")
    return t, h, w


def check_shift(window: Sequence[int], shift: Sequence[int], border: str) -> None:
    if any(s >= w and s for w, s in zip(window, shift, strict=True)):
        raise _error(
            f"shift_size must be less than window_size {tuple(window)}, got {tuple(shift)}"
        )
    if border == "grid" and any(shift):
        raise _error(f"shift_size must be (0, 0, 0) with border 'grid', got {tuple(shift)}")


def _check_tensor(name: str, t: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if tuple(t.shape) != shape or t.dtype not in DTYPES or t.device != device:
        raise _error(
            f"{name} must be floating point {shape} on {device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
        )


def _error(text: str) -> ValueError:
    return ValueError(f"window_attention3d: {text}")


def facts_of_call(
    qkv: Tensor, num_heads: int, window_size: Any, shift_size: Any = (0, 0, 0), *, bias_table: Tensor | None = None,
    table_window: Any = None, bias_index: str = "torchvision", border: str = "cyclic", pad: str = "kv",
    pad_kv: Tensor | None = None, causal_t: bool = False, scale: float | None = None, dropout_p: float = 0.0,
    training: bool = False, **_: Any,
) -> Facts:  # fmt: skip
    """The public function's arguments -> facts, for ``explain``."""
    qkv, pad_kv, options = _checked(
        qkv, num_heads, window_size, shift_size, bias_table, table_window, bias_index, border, pad, pad_kv,
        causal_t, scale, dropout_p if training else 0.0,
    )  # fmt: skip
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (qkv, bias_table, pad_kv)
    )
    return facts_of(qkv, options, bias_table is not None, grad)
