"""Convolutions of our own, with the passes inside where they can be: backend ``triton``.

Triton is imported by the first call. Everything is channels-last in here; an input in another layout is copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import choice, convolution
from .hybrid import after, backward, masked, normalise
from .options import BATCH, Options
from .window import Window

__all__ = ["backward", "convolve_backward", "forward", "fused", "masked", "normalise"]


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, window: Window, options: Options,
    memory_format: torch.memory_format, tapes: bool,
) -> Tensor:  # fmt: skip
    """z without y, in one launch."""
    return _kernels(x, weight, window).forward(
        _channels_last(x), weight, window, bias=bias, mean=mean, variance=variance, bn_weight=bn_weight,
        bn_bias=bn_bias, eps=options.eps, residual=None if residual is None else _channels_last(residual),
        activation=options.activation, negative_slope=options.negative_slope,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, window: Window,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """z, y, mean, invstd; y leaves the bias out. Batch statistics are taken where y is made."""
    kernels, partials = _kernels(x, weight, window), None
    if options.norm == BATCH:
        y, *partials = kernels.forward_with_statistics(_channels_last(x), weight, window)
    else:
        y = kernels.forward(_channels_last(x), weight, window)
    return after(
        y, partials, bias, residual, bn_weight, bn_bias, running_mean, running_var, options
    )


def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, window: Window, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias for ``needs``, each from where the table says."""
    from . import depthwise, gemm

    needs_dx, needs_dw, needs_dbias = needs
    filters = window.filters(weight.shape)
    table = choice.table(dy.device, window, x.shape[1], filters, dy.dtype)
    own = depthwise if choice.is_depthwise(window, x.shape[1], filters) else gemm
    own_dx = (
        needs_dx and table["dgrad"] == "triton" and choice.has_dgrad(window, x.shape[1], filters)
    )
    own_dw = needs_dw and table["wgrad"] == "triton"
    dy = _channels_last(dy)
    dx = own.dgrad(dy, weight, window, x.shape[2:]) if own_dx else None
    dw = own.wgrad(_channels_last(x), dy, window) if own_dw else None
    rest = (needs_dx and not own_dx, needs_dw and not own_dw, needs_dbias)
    if any(rest):
        found = convolution.convolve_backward(dy, x, weight, window, rest)
        dx, dw, dbias = (a if b is None else b for a, b in zip((dx, dw, None), found, strict=True))
        return dx, dw, dbias
    return dx, dw, None


def _kernels(x: Tensor, weight: Tensor, window: Window) -> Any:
    """The module whose kernels make y."""
    return choice.kernels(window, x.shape[1], window.filters(weight.shape), x.dtype)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)
