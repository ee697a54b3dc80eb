"""The fused Triton passes around ATen's convolution: backend ``hybrid``. Triton is imported by the first call."""

from __future__ import annotations

import torch


def forward(
    y, bias, residual, bn_weight, bn_bias, running_mean, running_var, *,
    batch_stats, activation, negative_slope, momentum, eps, tapes,
):  # fmt: skip
    """z, mean, invstd of a convolution output y that leaves its bias out, as ``stock.forward``."""
    from . import passes

    if batch_stats:
        # A bias before batch statistics moves nothing but the running mean.
        mean, invstd = passes.launch_stats(y, bias, running_mean, running_var, momentum, eps)
    else:
        mean, invstd = running_mean, running_var
        if bias is not None:
            mean = mean - bias
        if tapes:
            wide = passes.accumulator(y)
            mean = mean.to(wide, copy=True)
            invstd = torch.rsqrt(running_var.to(wide) + eps)
    z = passes.launch_fwd(
        y, residual, mean, invstd, bn_weight, bn_bias,
        eps=eps, invstd_is_var=not batch_stats and not tapes, activation=activation, negative_slope=negative_slope,
    )  # fmt: skip
    return z, mean, invstd


def backward(
    dz, y, z, residual, mean, invstd, bn_weight, bn_bias, *,
    batch_stats, activation, negative_slope, needs,
):  # fmt: skip
    """dy, dresidual, dweight, dbias (None where not needed), as ``stock.backward``."""
    from . import passes

    needs_dy, needs_dresidual, needs_dweight, needs_dbias = needs
    mask, other = "y", None
    if activation and residual is not None:
        mask, other = "residual", residual
    elif activation and z is not None:
        mask, other = "output", z
    return passes.launch_bwd(
        dz, y, other, mean, invstd, bn_weight, bn_bias,
        mask=mask, activation=activation, negative_slope=negative_slope, batch_stats=batch_stats,
        needs_dy=needs_dy, needs_dresidual=needs_dresidual, needs_parameters=needs_dweight or needs_dbias,
    )  # fmt: skip
