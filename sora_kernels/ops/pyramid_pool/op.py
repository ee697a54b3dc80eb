"""``pyramid_pool3d``: schemas, gradient and the public function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..common.dtypes import DTYPES
from ..common.gradient import Pair, Tensors, differentiable, transformed
from ..common.schema import differentiate, goes_straight, register
from . import layout, reference, tapes
from .backends import OPERATOR, Facts, facts_of
from .layout import Form
from .levels import Given, Level, parse
from .results import assemble

MODES = ("max", "avg", "maxavg")
OUTPUTS = ("flat", "maps")
DATA_FORMATS = ("NCDHW", "NDHWC")

_FORM = "int[] levels, str mode, bool flat, bool ndhwc, bool inner, bool codes, str backend"
_FORWARD = "(Tensor x, Tensor? valid_size, " + _FORM + ") -> "
_BACKWARD = (
    "(Tensor?[] grads, Tensor? indices, Tensor? codes_tape, Tensor? valid_size, SymInt[] shape, "
    + _FORM
    + ") -> Tensor"
)


@functools.lru_cache(maxsize=256)
def _form_of(levels: tuple[int, ...], *fields: Any) -> Form:
    triples: Any = tuple(levels[k : k + 3] for k in range(0, len(levels), 3))
    return Form(triples, *fields)


def form_of(levels: Sequence[int], *fields: Any) -> Form:
    """From the op's arguments."""
    return _form_of(tuple(levels), *fields)


def _flattened(form: Form) -> tuple[Any, ...]:
    """The op's arguments."""
    levels, *others = form
    return [o for level in levels for o in level], *others


def channels_first(x: Tensor, form: Form) -> Tensor:
    return x.movedim(-1, 1) if form.ndhwc else x


def _forward_impl(keep: bool, x: Tensor, valid_size: Tensor | None, *arguments: Any) -> Any:
    *fields, backend = arguments
    return _run(keep, x, valid_size, form_of(*fields), backend)


def _run(keep: bool, x: Tensor, valid_size: Tensor | None, form: Form, backend: str) -> Any:
    x = channels_first(x, form)
    if x.numel() == 0:
        results = _empty_results(x, form)
        indices, codes = layout.empty_tapes(form, x, x.shape[2:])
    else:
        facts = facts_of(x, form, valid_size, keep, x.shape)
        impl = OPERATOR.select(backend, facts).impl
        results, indices, codes = impl.forward(x, valid_size, form, keep)
    return (results, indices, codes) if keep else results


def _empty_results(x: Tensor, form: Form) -> list[Tensor]:
    return [x.new_empty(s) for s in layout.shapes(form, x.shape[0], x.shape[1], x.shape[2:])]


def _forward_fake(keep: bool, x: Tensor, valid_size: Tensor | None, *arguments: Any) -> Any:
    form = form_of(*arguments[:-1])
    x = channels_first(x, form)
    results = _empty_results(x, form)
    return (results, *layout.empty_tapes(form, x, x.shape[2:])) if keep else results


def _backward_impl(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes_tape: Tensor | None,
    valid_size: Tensor | None, shape: Sequence[int], *arguments: Any,
) -> Tensor:  # fmt: skip
    *fields, backend = arguments
    form = form_of(*fields)
    some = next(g for g in grads if g is not None)
    memory = torch.channels_last_3d if form.inner else torch.contiguous_format
    if 0 in shape:
        dx = some.new_empty(shape)
    else:
        facts = facts_of(some, form, valid_size, True, shape)
        impl = OPERATOR.select(backend, facts).impl
        given = [None if g is None else g.contiguous() for g in grads]
        dx = impl.backward(given, indices, codes_tape, valid_size, form, shape)
    dx = dx.contiguous(memory_format=memory)
    return dx.movedim(1, -1) if form.ndhwc else dx


def _backward_fake(grads, indices, codes_tape, valid_size, shape, *arguments) -> Tensor:
    form = form_of(*arguments[:-1])
    some = next(g for g in grads if g is not None)
    memory = torch.channels_last_3d if form.inner else torch.contiguous_format
    dx = some.new_empty(shape).contiguous(memory_format=memory)
    return dx.movedim(1, -1) if form.ndhwc else dx


_plain = register(
    "pyramid_pool3d" + _FORWARD + "Tensor[]",
    lambda *args: _forward_impl(False, *args),
    lambda *args: _forward_fake(False, *args),
)
_fwd = register(
    "pyramid_pool3d_fwd" + _FORWARD + "(Tensor[] results, Tensor indices, Tensor codes)",
    lambda *args: _forward_impl(True, *args),
    lambda *args: _forward_fake(True, *args),
)
_bwd = register("pyramid_pool3d_bwd" + _BACKWARD, _backward_impl, _backward_fake)

_TAPES = 2


def _forward(tensors: Tensors, flags: tuple, keep: bool, backend: str) -> Tensors:
    form = flags[0]
    x, valid_size = tensors
    if keep and form.has_max:
        results, indices, codes = _fwd(x, valid_size, *_flattened(form), backend)
        return (*results, indices, codes)
    return (*_plain(x, valid_size, *_flattened(form), backend), None, None)


def _save(tensors: Tensors, results: Tensors, flags: tuple, backend: str) -> Tensors:
    # Of x nothing but the sizes is wanted again. Dynamo's are symbols, which flags cannot carry into backward; what
    # it saves for them is not x.
    x, valid_size = tensors
    return (x if flags[1] is None else None, valid_size, *results[-_TAPES:])


def _shape(saved: Tensors, flags: tuple) -> Sequence[int]:
    """x's ``[B, C, T, H, W]``."""
    form, shape, _, _ = flags
    return channels_first(saved[0], form).shape if shape is None else shape  # type: ignore[arg-type]


def _backward(
    grads: Tensors, saved: Tensors, needs: Sequence[bool], flags: tuple, backend: str
) -> Tensors:
    _, valid_size, indices, codes = saved
    shape = _shape(saved, flags)
    dx = _bwd(list(grads), indices, codes, valid_size, shape, *_flattened(flags[0]), backend)
    return (dx, None)


def _definition(tensors: Tensors, flags: tuple) -> Tensors:
    x, valid_size = tensors
    form: Form = flags[0]
    assert x is not None
    found = reference.maps(channels_first(x, form), form.levels, form.mode, valid_size)
    return assemble(found, form)


def _recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
    """The pool is linear once the places of the maxima are known: any x will do."""
    form, _, dtype, device = flags
    _, valid_size, indices, codes = saved
    B, C, *sizes = _shape(saved, flags)
    given = (B, *sizes, C) if form.ndhwc else (B, C, *sizes)
    stand_in = torch.zeros((), dtype=dtype, device=device).expand(given).requires_grad_()
    places = None
    if indices is not None:
        assert codes is not None
        places = tapes.unpack(indices, codes, form, sizes)
    x = channels_first(stand_in, form)
    found = reference.maps(x, form.levels, form.mode, valid_size, places)
    return assemble(found, form), (stand_in, None)


_call = differentiable(
    Pair(_forward, _save, _backward, _definition, _recompute, num_outputs=-_TAPES)
)


def _call_form(x: Tensor, valid_size: Tensor | None, form: Form, backend: str) -> list[Tensor]:
    shape = None
    if not is_dynamo_compiling():
        # Inference needs nothing of the dispatcher, nor of autograd.
        if not (torch.is_grad_enabled() and x.requires_grad):
            if goes_straight(x, valid_size) and not transformed((x,)):
                return _run(False, x, valid_size, form, backend)
        shape = tuple(channels_first(x, form).shape)
    return list(_call((x, valid_size), (form, shape, x.dtype, x.device), backend))  # type: ignore[arg-type]


differentiate(
    "pyramid_pool3d",
    lambda x, valid_size, *fields: _call_form(x, valid_size, form_of(*fields[:-1]), fields[-1]),
)


def pyramid_pool3d(
    x: Tensor,
    levels: Sequence[Given] = (1, 2, 4),
    *,
    mode: str = "max",
    output: str = "flat",
    data_format: str = "NCDHW",
    valid_size: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Adaptive pools of several levels over time, height and width, from one read of x.

    Equivalent to, with ``pool = F.adaptive_max_pool3d`` or ``F.adaptive_avg_pool3d``::

        torch.cat([pool(x, level).flatten(1) for level in levels], 1)

    Args:
        x: ``[B, C, T, H, W]``, or ``[B, T, H, W, C]`` for "NDHWC"; fp16, bf16, fp32 or fp64, any strides.
        levels: each an int k for (k, k, k) or a (t, h, w) of numbers of bins. Bin i of o over n elements is
            ``[floor(i n / o), ceil((i + 1) n / o))``: neighbours overlap where o does not divide n, and there may
            be more bins than elements. None keeps an axis whole, one bin an element; for "maps" alone.
        mode: "max", "avg" or "maxavg": of each level the maxima, then the means.
        output: "flat" is ``[B, F]``, levels one after another, each in the order of ``[C, t, h, w]`` for both data
            formats; "maps" is a list of one map a level in data_format, for "maxavg" with 2 C channels.
        data_format: "NCDHW" or "NDHWC", of x and of the maps.
        valid_size: int32 or int64 ``[B, 3]``: bins lie over the first ``valid_size[b]`` elements of sample b's T, H
            and W (clamped to 0..n). What lies beyond does not matter and has zero gradient; whole axes are 0
            there, and a sample with an empty region is 0 throughout.
        backend: "triton", "native", "gemm" (means of up to 128 bins), "torch", "reference", or None for the
            fastest that can run.

    Returns:
        ``[B, F]`` or a list of maps, contiguous, in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        BackendError: the named backend cannot run this call; the message says why.

    Sums are kept in fp32 (fp64 for fp64). NaN wins over every number; the gradient of a maximum goes to the first of
    equal elements (to the last NaN), as in PyTorch. Gradients are bitwise repeatable and of any order; inside
    ``torch.func`` the reference runs.

    Source: spatial pyramid pooling (He et al., 2014) over the bins of ``F.adaptive_max_pool3d``; the pooling of the
    model ``pyramid_transformer``.
    """
    backend = OPERATOR.check_name(backend) if backend else ""
    form = _checked(x, levels, mode, output, data_format, valid_size)
    found = _call_form(x, valid_size, form, backend)
    return found[0] if form.flat else found


def _checked(
    x: Tensor, levels: Sequence[Given], mode: str, output: str, data_format: str,
    valid_size: Tensor | None,
) -> Form:  # fmt: skip
    check_names(mode, output, data_format)
    parsed: tuple[Level, ...] = parse(levels, output)
    ndhwc = data_format == "NDHWC"
    if x.dim() != 5:
        axes = "[B, T, H, W, C]" if ndhwc else "[B, C, T, H, W]"
        raise _error(f"x must be {axes}, got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise _error(f"x must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    view = x.movedim(-1, 1) if ndhwc else x
    B, _, T, H, W = view.shape
    if T < 1 or H < 1 or W < 1:
        raise _error(f"x must have elements on T, H and W, got {tuple(x.shape)}")
    if T * H * W >= 1 << 31:
        raise _error(f"x must have less than 2^31 elements a channel, got {tuple(x.shape)}")
    if valid_size is not None and (
        valid_size.shape != (B, 3)
        or valid_size.dtype not in (torch.int32, torch.int64)
        or valid_size.device != x.device
    ):
        raise _error(
            f"valid_size must be int32 or int64 ({B}, 3) on {x.device}, "
            f"got {valid_size.dtype} {tuple(valid_size.shape)} on {valid_size.device}"
        )
    inner = True if view.stride(1) < view.stride(4) else False  # a bool even of symbols
    return Form(parsed, mode, output == "flat", ndhwc, inner, x.is_cuda and mode != "avg")


def check_names(mode: str, output: str, data_format: str) -> None:
    for name, value, known in (
        ("mode", mode, MODES), ("output", output, OUTPUTS), ("data_format", data_format, DATA_FORMATS)
    ):  # fmt: skip
        if value not in known:
            raise _error(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _error(text: str) -> ValueError:
    return ValueError(f"pyramid_pool3d: {text}")


def facts_of_call(
    x: Tensor, levels: Sequence[Given] = (1, 2, 4), *, mode: str = "max", output: str = "flat",
    data_format: str = "NCDHW", valid_size: Tensor | None = None, **_: Any,
) -> Facts:  # fmt: skip
    """The public function's arguments -> facts, for ``explain``."""
    form = _checked(x, levels, mode, output, data_format, valid_size)
    shape = channels_first(x, form).shape
    return facts_of(x, form, valid_size, x.requires_grad and torch.is_grad_enabled(), shape)
