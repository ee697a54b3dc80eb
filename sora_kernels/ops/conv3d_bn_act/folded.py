"""Algebra of normalisation by running statistics: it is linear, so it can be part of the convolution.

With s = bn_weight * invstd, ``BN(conv(x, w) + b) = conv(x, s w) + bn_bias + (b - mean) s``. Backward then needs neither
y nor xhat: ``sum(da * y)`` over a channel's positions is ``sum(dw * w)`` over its weights, where dw is the gradient of
the convolution by w for da, so the gradients of bn_weight and w come from the same dw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .options import Options
from .window import Window

Gradients = tuple[Tensor | None, ...]


def scaled(weight: Tensor, scale: Tensor, window: Window) -> Tensor:
    """The weight with every filter times its own scale ``[K]``, computed in scale's dtype."""
    return (weight.to(scale.dtype) * _per_filter(scale, weight, window)).to(weight.dtype)


def _per_filter(v: Tensor, weight: Tensor, window: Window) -> Tensor:
    """``[K]`` -> what broadcasts over the weight; a transposed one holds its filters group by group."""
    if not window.transposed:
        return v.view(-1, 1, 1, 1, 1)
    each = v.view(window.groups, 1, weight.shape[1], 1, 1, 1)
    inputs = weight.shape[0] // window.groups
    return each.expand(-1, inputs, -1, -1, -1, -1).reshape(
        weight.shape[0], weight.shape[1], 1, 1, 1
    )


def _inner(a: Tensor, b: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """``sum(a * b)`` of every filter, ``[K]``."""
    product = a.to(dtype) * b.to(dtype)
    if not window.transposed:
        return product.sum((1, 2, 3, 4))
    inputs, filters = product.shape[0] // window.groups, product.shape[1]
    grouped = product.view(window.groups, inputs, filters, math.prod(product.shape[2:]))
    return grouped.sum((1, 3)).flatten()


def scale_and_shift(
    bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s and the bias of the folded convolution."""
    scale = torch.rsqrt(variance.to(dtype) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight
    shift = -mean.to(dtype) if bias is None else bias.to(dtype) - mean
    shift = shift * scale
    return scale, shift if bn_bias is None else shift + bn_bias


def finish(z: Tensor, residual: Tensor | None, options: Options) -> Tensor:
    """Residual and activation, in place."""
    return activate(z if residual is None else z.add_(residual), options)


def activate(z: Tensor, options: Options) -> Tensor:
    """The activation, in place where torch can."""
    if options.activation == "relu":
        return z.relu_()
    if not options.activation:
        return z
    return reference.activate(z, options.activation, options.negative_slope)


def backward(
    da: Tensor, sum_da: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, invstd: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, window: Window, needs: Sequence[bool],
    convolve_backward: Callable[..., Gradients],
) -> Gradients:  # fmt: skip
    """dx, dweight, dbias, dresidual, dbn_weight, dbn_bias (None where not needed) without y.

    Args:
        da, sum_da: the gradient before the activation, and its sums ``[K]``.
        mean, invstd: of y without its bias; None without normalisation.
    """
    needs_dx, needs_dw, needs_dbias, needs_dresidual, needs_dbn_weight, needs_dbn_bias = needs
    wide, scale = sum_da.dtype, invstd
    if invstd is not None and bn_weight is not None:
        scale = invstd * bn_weight
    needs_raw = needs_dw or needs_dbn_weight
    dx = raw = None
    if needs_dx or needs_raw:
        own = weight if scale is None or not needs_dx else scaled(weight, scale, window)
        dx, raw, _ = convolve_backward(da, x, own, window, (needs_dx, needs_raw, False))
    dw = raw
    if raw is not None and scale is not None:
        dw = scaled(raw, scale, window)
    dbn_weight = None
    if needs_dbn_weight and mean is not None and invstd is not None:
        assert raw is not None and bn_weight is not None
        sum_da_y = _inner(raw, weight, window, wide)
        dbn_weight = ((sum_da_y - mean * sum_da) * invstd).to(bn_weight.dtype)
    dbn_bias = None if bn_bias is None else sum_da.to(bn_bias.dtype)
    dbias = sum_da if scale is None else sum_da * scale
    return (
        dx,
        dw if needs_dw else None,
        dbias.to(weight.dtype) if needs_dbias else None,
        da if needs_dresidual else None,
        dbn_weight,
        dbn_bias if needs_dbn_bias else None,
    )
