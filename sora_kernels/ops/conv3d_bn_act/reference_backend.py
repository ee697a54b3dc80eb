"""Backend ``reference``: the definition, in the form that backends have."""

from __future__ import annotations

import torch
from torch import Tensor

from .convolution import convolve_backward
from .options import NONE, Options
from .reference import apply_statistics as normalise
from .reference import backward, convolve, forward, masked
from .window import Window

__all__ = [
    "backward",
    "convolve",
    "convolve_backward",
    "forward",
    "fused",
    "masked",
    "normalise",
]


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, window: Window, options: Options,
    memory_format: torch.memory_format, tapes: bool,
) -> Tensor:  # fmt: skip
    """z, of which backward needs no more than its sign."""
    if options.norm == NONE:
        bn_bias, bias = bias, None
    y = convolve(x, weight, window)
    return forward(y, bias, residual, bn_weight, bn_bias, mean, variance, options)[0]
