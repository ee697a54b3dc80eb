"""Evaluation on the CPU without gradients: BatchNorm folded into the weights; bias, residual and activation inside
oneDNN's convolution, which ATen reaches at batch 1 on one thread only here.

Channels-last input takes weights that were put into oneDNN's own order once. Contiguous input keeps plain ones: with
ordered weights oneDNN would answer in channels-last. What is folded is kept beside the weight, as long as that lives.
Every call looks whether it is still true: statistics and vectors are compared value by value, for ``nn.BatchNorm3d``
writes its own without counting a version; the weight by version and by a sample, for a write through ``.data``, as
moving averages do it, counts none either.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .convolution import convolve, pad
from .folded import finish, scale_and_shift, scaled
from .options import Options
from .window import Window

# Of this library's activations: oneDNN's name for it.
_POST_OPS = {"": "none", "relu": "relu", "silu": "swish", "leaky_relu": "leaky_relu"}
_PLANS = 4  # kinds of call whose ordered weights are kept
_SAMPLE = 256  # elements of a weight that are compared
# Below these, setting oneDNN up costs more than ATen's own loops or a plain GEMM do.
_SMALL = 3 << 20  # operations, of a contiguous x
_FEW = 1024  # pixels, of a channels-last x and a pointwise window


class _Plan(NamedTuple):
    """How one kind of call runs."""

    # Of oneDNN "pointwise", "turned" (to channels-last and back), "binary" (the residual inside), "plain" (passes
    # after); else "gemm", "aten", "bias after".
    way: str
    weight: Tensor | None  # in oneDNN's own order, or [C, K]; None: as it was folded
    geometry: tuple[Any, ...]  # of oneDNN's ops
    window: Window
    activation: str | None
    slope: list[float]


class _Folded(NamedTuple):
    form: tuple[Any, ...]  # the weight's version, address and whatever else is no tensor
    sampled: Tensor | None  # elements of the weight itself, where they are one view of it
    sample: Tensor  # what they were
    vectors: tuple[Tensor | None, ...]  # as they were
    weight: Tensor | None  # None: as it is
    bias: Tensor | None
    plans: dict[tuple[Any, ...], _Plan]


_FOLDED = WeakTensorKeyDictionary()


@functools.cache
def _available() -> bool:
    """The two ops are private: another torch may not have them."""
    try:
        ops = torch.ops.mkldnn
        return bool(
            torch.backends.mkldnn.is_available()
            and ops._convolution_pointwise.default
            and ops._convolution_pointwise.binary
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
    own = _fold(weight, (bias, bn_weight, bn_bias, mean, variance), options.eps, window)
    key = (x.shape, window, options, residual is None, memory_format)
    plan = own.plans.get(key)
    if plan is None:
        plan = _plan(own, x, weight, residual is not None, window, options, memory_format)
        while len(own.plans) >= _PLANS:
            own.plans.pop(next(iter(own.plans)), None)
        own.plans[key] = plan
    if window is not plan.window:
        x = pad(x, window)
    x = x.contiguous(memory_format=memory_format)
    w = plan.weight if plan.weight is not None else weight if own.weight is None else own.weight
    if plan.way in ("pointwise", "turned"):
        if plan.way == "turned":
            x = x.contiguous(memory_format=torch.channels_last_3d)
        z = torch.ops.mkldnn._convolution_pointwise(
            x, w, own.bias, *plan.geometry, plan.activation, plan.slope, ""
        )
        return z.contiguous(memory_format=memory_format)
    if plan.way == "binary":
        assert residual is not None
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual.contiguous(memory_format=memory_format), w, own.bias, *plan.geometry, "add", 1.0,
            plan.activation, [], "",
        )  # fmt: skip
    if plan.way == "gemm":
        assert plan.weight is not None
        pixels = x.permute(0, 2, 3, 4, 1)
        rows = pixels.reshape(-1, pixels.shape[-1])
        z = rows.mm(plan.weight) if own.bias is None else torch.addmm(own.bias, rows, plan.weight)
        z = z.view(*pixels.shape[:-1], -1).permute(0, 4, 1, 2, 3)
    elif plan.way == "plain":
        z = torch.ops.mkldnn._convolution_pointwise(x, w, own.bias, *plan.geometry, "none", [], "")
    elif plan.way == "bias after":
        assert own.bias is not None
        z = convolve(x, w, plan.window).add_(own.bias.view(-1, 1, 1, 1))
    else:
        z = convolve(x, w, plan.window, own.bias).contiguous(memory_format=memory_format)
    return finish(z, residual, options)


def _plan(
    own: _Folded, x: Tensor, weight: Tensor, has_residual: bool, window: Window, options: Options,
    memory_format: torch.memory_format,
) -> _Plan:  # fmt: skip
    channels_last = memory_format is torch.channels_last_3d
    if not window.symmetric:
        shape = pad(x, window).shape
        window = window._replace(before=(0, 0, 0), after=(0, 0, 0), replicate=False)
    else:
        shape = x.shape
    geometry = ([*window.before], [*window.stride], [*window.dilation], window.groups)
    slope = [options.negative_slope] if options.activation == "leaky_relu" else []
    plan = _Plan("pointwise", None, geometry, window, _POST_OPS[options.activation], slope)
    pixels = shape[0] * math.prod(window.output(shape[2:]))
    pointwise = math.prod(window.kernel) == 1
    small = 2 * pixels * weight.numel() < _SMALL
    # For contiguous x ATen's pointwise convolution is a plain GEMM.
    turned = not channels_last and window.groups > 1 and not window.transposed and not has_residual
    by_aten = pointwise or small or window.groups > 1
    if window.transposed or (not channels_last and by_aten and not turned):
        # Its GEMM takes a bias by writing that everywhere first.
        after = pointwise and not channels_last and not window.transposed and own.bias is not None
        return plan._replace(way="bias after" if after else "aten")
    if channels_last or turned:
        w = weight.detach() if own.weight is None else own.weight
        still = max(window.stride) == 1 and not any(window.before)
        if channels_last and pointwise and still and window.groups == 1 and pixels < _FEW:
            return plan._replace(way="gemm", weight=w.reshape(w.shape[:2]).t().contiguous())
        ordered = torch.ops.mkldnn._reorder_convolution_weight(w, *geometry, shape)
        plan = plan._replace(weight=ordered)
    if turned:
        return plan._replace(way="turned")
    if not has_residual:
        return plan
    # Elsewhere the op with a residual is ATen's convolution and a sum that does not know bf16.
    either = math.prod(shape[1:]) == max(shape[1], math.prod(shape[2:]))  # dense in both layouts
    if options.activation in ("", "relu") and window.groups == 1 and channels_last and not either:
        return plan._replace(way="binary", activation=options.activation or None)
    return plan._replace(way="plain")


def _fold(
    weight: Tensor, vectors: tuple[Tensor | None, ...], eps: float, window: Window
) -> _Folded:
    # A tensor made in inference mode counts no versions.
    version = -1 if weight.is_inference() else weight._version
    form = (version, weight.data_ptr(), eps, weight.dtype, window.transposed, window.groups)
    found = _FOLDED.get(weight)
    if found is not None and found.form == form and _same(found, weight, vectors):
        return found
    bias, bn_weight, bn_bias, mean, variance = vectors
    own = shift = None
    if mean is not None and variance is not None:
        scale, wide = scale_and_shift(bias, bn_weight, bn_bias, mean, variance, eps, torch.float32)
        own, shift = scaled(weight, scale, window).contiguous(), wide.to(weight.dtype)
    elif bias is not None:
        shift = bias.detach().clone()
    kept = tuple(None if v is None else v.clone() for v in vectors)
    sample = _sample(weight)
    sampled = sample if sample.untyped_storage().data_ptr() == form[1] else None
    folded = _Folded(form, sampled, sample.clone(), kept, own, shift, {})
    _FOLDED[weight] = folded
    return folded


def _same(found: _Folded, weight: Tensor, vectors: tuple[Tensor | None, ...]) -> bool:
    for v, was in zip(vectors, found.vectors, strict=True):
        if v is not was and (v is None or was is None or v.dtype != was.dtype or not v.equal(was)):
            return False
    sampled = _sample(weight) if found.sampled is None else found.sampled
    return sampled.equal(found.sample)


def _sample(weight: Tensor) -> Tensor:
    """Elements from all over it: where it is dense a view, which keeps its memory alive and not the tensor."""
    w = weight.data
    flat = (w if w.is_contiguous() else w.permute(0, 2, 3, 4, 1)).flatten()
    return flat[:: -(-flat.numel() // _SAMPLE)]
