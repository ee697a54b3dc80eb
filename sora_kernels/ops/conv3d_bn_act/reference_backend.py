"""Backend ``reference``: the definition, in the form that backends have."""

from __future__ import annotations

import torch
from torch import Tensor

from .convolution import convolve_backward, layout
from .options import NONE, Options
from .reference import after, backward, convolve, masked
from .reference import apply_statistics as normalise
from .window import Window

__all__ = [
    "backward",
    "convolve_backward",
    "forward",
    "fused",
    "masked",
    "normalise",
]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, window: Window,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """z, y, mean, invstd; y leaves the bias out."""
    y = convolve(x, weight, window)
    residual = None if residual is None else residual.contiguous(memory_format=layout(y))
    z, mean, invstd = after(
        y, bias, residual, bn_weight, bn_bias, running_mean, running_var, options
    )
    return z, y, mean, invstd


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, window: Window, options: Options,
    memory_format: torch.memory_format, tapes: bool,
) -> Tensor:  # fmt: skip
    """z, of which backward needs no more than its sign."""
    if options.norm == NONE:
        bn_bias, bias = bias, None
    y = convolve(x, weight, window)
    return after(y, bias, residual, bn_weight, bn_bias, mean, variance, options)[0]
