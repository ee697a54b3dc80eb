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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference

# Of this library's activations: oneDNN's name for it.
_POST_OPS = {"": "none", "relu": "relu", "silu": "swish", "leaky_relu": "leaky_relu"}
_SHAPES = 4  # of x, whose ordered weights are kept
_SAMPLE = 256  # elements of a weight that are compared


class _Folded(NamedTuple):
    version: int
    eps: float
    sample: Tensor
    vectors: tuple[Tensor | None, ...]  # as they were
    weight: Tensor
    bias: Tensor
    ordered: dict[tuple[Any, ...], Tensor]  # by x's shape and the geometry


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
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    activation: str, negative_slope: float, eps: float, memory_format: torch.memory_format,
) -> Tensor:  # fmt: skip
    """z in ``memory_format``."""
    folded = _fold(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    x = x.contiguous(memory_format=memory_format)
    own, shift = folded.weight, folded.bias
    geometry = (list(padding), list(stride), list(dilation), groups)
    if memory_format is torch.channels_last_3d:
        key = (x.shape, *map(tuple, geometry[:3]), groups)
        ordered = folded.ordered.get(key)
        if ordered is None:
            ordered = torch.ops.mkldnn._reorder_convolution_weight(own, *geometry, x.shape)
            while len(folded.ordered) >= _SHAPES:
                folded.ordered.pop(next(iter(folded.ordered)), None)
            folded.ordered[key] = ordered
        own = ordered
    elif weight.shape[2:].numel() == 1:
        # ATen's pointwise convolution is a plain GEMM here, and faster.
        z = torch.convolution(x, own, shift, stride, padding, dilation, False, [0, 0, 0], groups)
        return _finish(z, residual, activation, negative_slope)
    if residual is None:
        slope = [negative_slope] if activation == "leaky_relu" else []
        return torch.ops.mkldnn._convolution_pointwise(
            x, own, shift, *geometry, _POST_OPS[activation], slope, ""
        )
    # Elsewhere this op is ATen's convolution and a sum that does not know bf16.
    if activation in ("", "relu") and groups == 1 and not x.is_contiguous():
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual.contiguous(memory_format=memory_format), own, shift, *geometry, "add", 1.0,
            activation or None, [], "",
        )  # fmt: skip
    z = torch.ops.mkldnn._convolution_pointwise(x, own, shift, *geometry, "none", [], "")
    return _finish(z, residual, activation, negative_slope)


def _finish(z: Tensor, residual: Tensor | None, activation: str, negative_slope: float) -> Tensor:
    if residual is not None:
        z = z.add_(residual)
    if activation == "relu":
        return z.relu_()
    return reference.activate(z, activation, negative_slope) if activation else z


def _fold(
    weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    mean: Tensor, variance: Tensor, eps: float,
) -> _Folded:  # fmt: skip
    vectors = (bias, bn_weight, bn_bias, mean, variance)
    # A tensor made in inference mode counts no versions.
    version = -1 if weight.is_inference() else weight._version
    found = _FOLDED.get(weight)
    if found is not None and _same(found, version, eps, weight, vectors):
        return found
    scale = torch.rsqrt(variance.float() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.float()
    shift = -mean.float() if bias is None else bias.float() - mean.float()
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.float()
    own = (weight.float() * scale.view(-1, 1, 1, 1, 1)).to(weight.dtype).contiguous()
    kept = tuple(None if v is None else v.clone() for v in vectors)
    folded = _Folded(version, eps, _sample(weight).clone(), kept, own, shift.to(weight.dtype), {})
    _FOLDED[weight] = folded
    return folded


def _same(
    found: _Folded, version: int, eps: float, weight: Tensor, vectors: tuple[Tensor | None, ...]
) -> bool:
    if found.version != version or found.eps != eps or found.weight.dtype != weight.dtype:
        return False
    for v, was in zip(vectors, found.vectors, strict=True):
        if v is not was and (v is None or was is None or v.dtype != was.dtype or not v.equal(was)):
            return False
    return _sample(weight).equal(found.sample)


def _sample(weight: Tensor) -> Tensor:
    """Elements from all over it, in the order of its memory if that is dense."""
    w = weight.detach()
    flat = (w if w.is_contiguous() else w.permute(0, 2, 3, 4, 1)).flatten()
    return flat[:: -(-flat.numel() // _SAMPLE)]
