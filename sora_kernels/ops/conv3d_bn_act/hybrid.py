"""Fused Triton passes around ATen's convolution: backend ``hybrid``. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, sync
from .convolution import convolve, convolve_backward, layout
from .options import BATCH, NONE, RUNNING, Options
from .window import Window

__all__ = [
    "backward",
    "after",
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
    """z without y: one pass over the convolution's result, in place."""
    from . import passes

    y = convolve(x, weight, window)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout(y))
    if options.norm == NONE:
        bn_bias = bias
    elif bias is not None:
        assert mean is not None
        mean = mean - bias
    return passes.launch_fwd(
        y, residual, mean, variance, bn_weight, bn_bias, eps=options.eps, invstd_is_var=True,
        activation=options.activation, negative_slope=options.negative_slope, out=y,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, window: Window,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """z, y, mean, invstd; y leaves the bias out."""
    y = convolve(x, weight, window)
    return after(y, None, bias, residual, bn_weight, bn_bias, running_mean, running_var, options)


def after(
    y: Tensor, partials: tuple[Tensor, int] | None, bias: Tensor | None, residual: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """z, y, mean, invstd, as :func:`reference.after`.

    Args:
        partials: y's statistics where a convolution's kernel has taken them: tiles ``[tiles, 3, K]`` and a tile's rows.
    """
    from . import passes

    if residual is not None:
        residual = residual.contiguous(memory_format=layout(y))
    mean = invstd = None
    if options.norm == RUNNING:
        assert running_mean is not None and running_var is not None
        wide = passes.accumulator(y)
        mean, invstd = reference.frozen(bias, running_mean, running_var, options.eps, wide)
    elif options.norm == BATCH and options.group:
        # With eps 0, 1/std holds the variance to the last digits.
        mean, invstd = passes.launch_stats(y, None, None, None, 0.0, 0.0, partials)
        variance = invstd.square().reciprocal()
        mean, variance, n = sync.merge(mean, variance, reference.count(y), options.group)
        if running_mean is not None and running_var is not None:
            seen = mean if bias is None else mean + bias
            reference.update_running(running_mean, running_var, seen, variance, n, options.momentum)
        invstd = torch.rsqrt(variance + options.eps)
    elif options.norm == BATCH:
        # A bias before batch statistics moves nothing but the running mean.
        mean, invstd = passes.launch_stats(
            y, bias, running_mean, running_var, options.momentum, options.eps, partials
        )
    z = passes.launch_fwd(
        y, residual, mean, invstd, bn_weight, bn_bias, eps=options.eps, invstd_is_var=False,
        activation=options.activation, negative_slope=options.negative_slope,
    )  # fmt: skip
    return z, y, mean, invstd


def backward(
    dz: Tensor, y: Tensor, z: Tensor | None, residual: Tensor | None, mean: Tensor | None,
    invstd: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, options: Options,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy, dresidual, dweight, dbias, as :func:`reference.backward`."""
    from . import passes

    needs_dy, needs_dresidual, needs_dweight, needs_dbias = needs
    mask, other = "y", None
    if options.activation and residual is not None:
        mask, other = "residual", residual
    elif options.activation and z is not None:
        mask, other = "output", z
    n, batch = reference.count(y), options.norm == BATCH
    share = None
    if batch and options.group:

        def share(sums: Tensor) -> Tensor:
            return sync.mean_of_sums(sums, n, options.group) * n

    return passes.launch_bwd(
        dz, y, other, mean, invstd, bn_weight, bn_bias, mask=mask, activation=options.activation,
        negative_slope=options.negative_slope, batch_stats=batch, needs_dy=needs_dy,
        needs_dresidual=needs_dresidual, needs_parameters=needs_dweight or needs_dbias, share=share,
    )  # fmt: skip


def masked(dz: Tensor, z: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """da and its sum a channel, as :func:`reference.masked`."""
    from . import passes

    return passes.launch_masked(
        dz, z, activation=options.activation, negative_slope=options.negative_slope
    )


def normalise(
    y: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """z, as :func:`reference.apply_statistics`: the pass of the forward again, bit for bit."""
    from . import passes

    return passes.launch_fwd(
        y, None, mean, invstd, bn_weight, bn_bias, eps=0.0, invstd_is_var=False,
        activation=options.activation, negative_slope=options.negative_slope,
    )  # fmt: skip
