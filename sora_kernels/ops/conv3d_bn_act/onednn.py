"""Evaluation on the CPU without gradients: BatchNorm folded into the weights; bias, residual and activation inside
oneDNN's convolution, which ATen reaches at batch 1 on one thread only here.

Channels-last input takes weights that were put into oneDNN's own order once. Contiguous input keeps plain ones: with
ordered weights oneDNN would answer in channels-last. Both, and how a kind of call runs, are kept beside the weight
(kept.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kept
from .convolution import convolve, pad
from .folded import finish
from .options import Options
from .window import Window

# Of this library's activations: oneDNN's name for it.
_POST_OPS = {"": "none", "relu": "relu", "silu": "swish", "leaky_relu": "leaky_relu"}
# Below these, setting oneDNN up costs more than ATen's own loops or a plain GEMM do.
_SMALL = 3 << 20  # operations, of a contiguous x
_FEW = 1024  # pixels, of a channels-last x and a pointwise window
_LITTLE = 1 << 18  # elements of that x and its z


@functools.cache
def _available() -> bool:
    """The two ops are private: another torch may not have them."""
    try:
        ops = torch.ops.mkldnn
        return bool(
            torch.backends.mkldnn.is_available()
            and ops._convolution_pointwise.default
            and ops._convolution_pointwise_.binary
            and ops._reorder_convolution_weight.default
        )
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def _bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def takes(x: Tensor) -> bool:
    """Whether a convolution of x goes this way; under tracing x may be fake."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and bool(torch.backends.mkldnn.enabled)
        and _available()
        and (x.dtype == torch.float32 or _bf16())
    )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, window: Window, options: Options,
    memory_format: torch.memory_format,
) -> Tensor:  # fmt: skip
    """z in ``memory_format``; mean and variance None: no normalisation."""
    folded = kept.fold(weight, (bias, bn_weight, bn_bias, mean, variance), options.eps, window)
    kind = _kind(x, residual, window, options, memory_format)
    run = folded.plans.get(kind)
    if run is None:
        run = _plan(folded, x, residual is not None, window, options, memory_format)
        folded.add(kind, run)
    return run(x, residual)


def again(call: tuple[Hashable, ...], tensors: Sequence[Tensor | None]) -> Tensor | None:
    """z of a call that :func:`remember` has seen, None of any other.

    Args:
        call: whatever decides how a call runs, but for the tensors.
        tensors: as the registered op takes them; plain ones, of which no gradient is wanted.
    """
    x, weight, bias, residual, *norm = tensors
    folded = kept.find(weight)  # type: ignore[arg-type]
    if folded is None or not torch._C._get_mkldnn_enabled():
        return None
    try:
        run = folded.again((_form(x), _form(residual), call), weight, (bias, *norm))  # type: ignore[arg-type]
    except TypeError:  # a list is no key
        return None
    return None if run is None else run(x, residual)  # type: ignore[arg-type]


def remember(
    call: tuple[Hashable, ...], tensors: Sequence[Tensor | None], window: Window, options: Options,
    memory_format: torch.memory_format,
) -> None:  # fmt: skip
    """A call of :func:`forward`, for :func:`again`."""
    x, weight, bias, residual, *norm = tensors
    assert x is not None and weight is not None
    folded = kept.find(weight)
    if folded is None:
        return
    kind = _kind(x, residual, window, options, memory_format)
    with contextlib.suppress(TypeError):  # a list is no key
        folded.remember((_form(x), _form(residual), call), kind, (bias, *norm))


def _form(t: Tensor | None) -> Hashable:
    if t is None:
        return None
    return t.shape, t.stride() if t.layout is torch.strided else t.layout, t.dtype, t.is_cpu


def _kind(
    x: Tensor, residual: Tensor | None, window: Window, options: Options, memory_format: torch.memory_format
) -> Hashable:  # fmt: skip
    return x.shape, residual is None, window, options, memory_format


def _plan(
    folded: kept.Folded, x: Tensor, has_residual: bool, window: Window, options: Options,
    memory_format: torch.memory_format,
) -> kept.Run:  # fmt: skip
    """How calls of one kind run."""
    if not window.symmetric:
        unpadded = window._replace(before=(0, 0, 0), after=(0, 0, 0), replicate=False)
        run = _plan(folded, pad(x, window), has_residual, unpadded, options, memory_format)
        return lambda x, residual: run(pad(x, window), residual)
    w, bias, shape = folded.weight, folded.bias, x.shape
    channels_last = memory_format is torch.channels_last_3d
    pixels = shape[0] * math.prod(window.output(shape[2:]))
    pointwise = math.prod(window.kernel) == 1
    small = 2 * pixels * w.numel() < _SMALL
    # For contiguous x ATen's pointwise convolution is a plain GEMM.
    turned = not channels_last and window.groups > 1 and not window.transposed and not has_residual
    by_aten = pointwise or small or window.groups > 1
    if window.transposed or (not channels_last and by_aten and not turned):
        # Its GEMM takes a bias by writing that everywhere first.
        after = pointwise and not channels_last and not window.transposed and bias is not None
        return _aten(w, bias, after, window, options, memory_format)
    still = max(window.stride) == 1 and not any(window.before)
    few = pixels < _FEW or pixels * sum(w.shape[:2]) < _LITTLE
    if channels_last and pointwise and still and window.groups == 1 and few:
        return _gemm(w.flatten(1).t().contiguous(), bias, shape, options)
    geometry = ([*window.before], [*window.stride], [*window.dilation], window.groups)
    if channels_last or turned:
        w = torch.ops.mkldnn._reorder_convolution_weight(w, *geometry, shape)
    if not has_residual:
        inner = torch.channels_last_3d if turned else memory_format
        return _pointwise(w, bias, geometry, options, inner, memory_format)
    # Elsewhere the op with a residual is ATen's convolution and a sum that does not know bf16.
    either = math.prod(shape[1:]) == max(shape[1], math.prod(shape[2:]))  # dense in both layouts
    if options.activation in ("", "relu") and window.groups == 1 and channels_last and not either:
        return _summed(w, bias, geometry, options, memory_format)
    return _plain(w, bias, geometry, options, memory_format)


def _pointwise(
    w: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], options: Options, inner: torch.memory_format,
    memory_format: torch.memory_format,
) -> kept.Run:  # fmt: skip
    """oneDNN with the activation inside, on x in the format ``inner``."""
    op = torch.ops.mkldnn._convolution_pointwise.default
    slope = [options.negative_slope] if options.activation == "leaky_relu" else []
    rest = (w, bias, *geometry, _POST_OPS[options.activation], slope, "")

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        return op(x.contiguous(memory_format=inner), *rest).contiguous(memory_format=memory_format)

    return run


def _summed(
    w: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], options: Options,
    memory_format: torch.memory_format,
) -> kept.Run:  # fmt: skip
    """oneDNN with the residual and the activation inside, written over a copy of the residual: sooner done than with
    the residual as a second operand.
    """
    op = torch.ops.mkldnn._convolution_pointwise_.binary
    rest = (w, bias, *geometry, "add", 1.0, options.activation or None, [], "")

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is not None
        z = residual.clone(memory_format=memory_format)
        return op(z, x.contiguous(memory_format=memory_format), *rest)

    return run


def _plain(
    w: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], options: Options,
    memory_format: torch.memory_format,
) -> kept.Run:  # fmt: skip
    """oneDNN, the rest after it."""
    op = torch.ops.mkldnn._convolution_pointwise.default
    rest = (w, bias, *geometry, "none", [], "")

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        return finish(op(x.contiguous(memory_format=memory_format), *rest), residual, options)

    return run


def _gemm(w: Tensor, bias: Tensor | None, shape: Sequence[int], options: Options) -> kept.Run:
    """A pointwise window over channels-last x of ``shape``; w is [C, K]."""
    n, c, *sizes = shape
    k, pixels = w.shape[1], math.prod(sizes)
    z_shape = (n, k, *sizes)
    z_strides = (pixels * k, 1, sizes[1] * sizes[2] * k, sizes[2] * k, k)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        rows = x.as_strided((n * pixels, c), (c, 1))
        z = rows.mm(w) if bias is None else torch.addmm(bias, rows, w)
        return finish(z.as_strided(z_shape, z_strides), residual, options)

    return run


def _aten(
    w: Tensor, bias: Tensor | None, bias_after: bool, window: Window, options: Options,
    memory_format: torch.memory_format,
) -> kept.Run:  # fmt: skip
    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=memory_format)
        if bias_after:
            assert bias is not None
            z = convolve(x, w, window).add_(bias.view(-1, 1, 1, 1))
        else:
            z = convolve(x, w, window, bias).contiguous(memory_format=memory_format)
        return finish(z, residual, options)

    return run
