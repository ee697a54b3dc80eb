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
_SHAPES = 4  # of x, whose ordered weights are kept
_SAMPLE = 256  # elements of a weight that are compared


class _Folded(NamedTuple):
    form: tuple[Any, ...]  # the weight's version and whatever else is no tensor
    sample: Tensor
    vectors: tuple[Tensor | None, ...]  # as they were
    weight: Tensor | None  # None: as it is
    bias: Tensor | None
    ordered: dict[tuple[Any, ...], Tensor]  # by x's shape and the window

    def in_order(
        self, weight: Tensor, shape: torch.Size, window: Window, geometry: tuple[Any, ...]
    ) -> Tensor:
        """This weight in oneDNN's own order for an x of this shape."""
        key = (shape, window)
        found = self.ordered.get(key)
        if found is None:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            found = reorder(weight.detach(), *geometry, shape)
            while len(self.ordered) >= _SHAPES:
                self.ordered.pop(next(iter(self.ordered)), None)
            self.ordered[key] = found
        return found


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
    own = _fold(weight, bias, bn_weight, bn_bias, mean, variance, options.eps, window)
    if not window.symmetric:
        x, window = pad(x, window), window._replace(before=(0, 0, 0), after=(0, 0, 0))
    x = x.contiguous(memory_format=memory_format)
    w = weight if own.weight is None else own.weight
    if window.transposed or not (
        memory_format is torch.channels_last_3d or math.prod(window.kernel) > 1
    ):
        # ATen's pointwise convolution is a plain GEMM here, and faster.
        z = convolve(x, w, window, own.bias)
        return finish(z.contiguous(memory_format=memory_format), residual, options)
    geometry = ([*window.before], [*window.stride], [*window.dilation], window.groups)
    if memory_format is torch.channels_last_3d:
        w = own.in_order(w, x.shape, window, geometry)
    activation = options.activation
    if residual is None:
        slope = [options.negative_slope] if activation == "leaky_relu" else []
        return torch.ops.mkldnn._convolution_pointwise(
            x, w, own.bias, *geometry, _POST_OPS[activation], slope, ""
        )
    # Elsewhere this op is ATen's convolution and a sum that does not know bf16.
    if activation in ("", "relu") and window.groups == 1 and not x.is_contiguous():
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual.contiguous(memory_format=memory_format), w, own.bias, *geometry, "add", 1.0,
            activation or None, [], "",
        )  # fmt: skip
    z = torch.ops.mkldnn._convolution_pointwise(x, w, own.bias, *geometry, "none", [], "")
    return finish(z, residual, options)


def _fold(
    weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    mean: Tensor | None, variance: Tensor | None, eps: float, window: Window,
) -> _Folded:  # fmt: skip
    vectors = (bias, bn_weight, bn_bias, mean, variance)
    # A tensor made in inference mode counts no versions.
    version = -1 if weight.is_inference() else weight._version
    form = (version, eps, weight.dtype, window.transposed, window.groups)
    found = _FOLDED.get(weight)
    if found is not None and found.form == form and _same(found, weight, vectors):
        return found
    own = shift = None
    if mean is not None and variance is not None:
        scale, wide = scale_and_shift(bias, bn_weight, bn_bias, mean, variance, eps, torch.float32)
        own, shift = scaled(weight, scale, window).contiguous(), wide.to(weight.dtype)
    elif bias is not None:
        shift = bias.detach().clone()
    kept = tuple(None if v is None else v.clone() for v in vectors)
    folded = _Folded(form, _sample(weight).clone(), kept, own, shift, {})
    _FOLDED[weight] = folded
    return folded


def _same(found: _Folded, weight: Tensor, vectors: tuple[Tensor | None, ...]) -> bool:
    for v, was in zip(vectors, found.vectors, strict=True):
        if v is not was and (v is None or was is None or v.dtype != was.dtype or not v.equal(was)):
            return False
    return _sample(weight).equal(found.sample)


def _sample(weight: Tensor) -> Tensor:
    """Elements from all over it, in the order of its memory if that is dense."""
    w = weight.detach()
    flat = (w if w.is_contiguous() else w.permute(0, 2, 3, 4, 1)).flatten()
    return flat[:: -(-flat.numel() // _SAMPLE)]
