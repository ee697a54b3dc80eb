"""The passes around the convolution as stock ATen ops: backend ``torch``, and what every machine can run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

aten = torch.ops.aten
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def _widened(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def forward(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    batch_stats: bool,
    activation: str,
    negative_slope: float,
    momentum: float,
    eps: float,
    tapes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean, invstd of a convolution output y that leaves its bias out.

    Batch statistics take any bias away again, so it moves the running mean only; in evaluation it moves the mean.
    """
    wide = _WIDE[y.dtype]
    # fp32 parameters make ATen keep fp32 statistics for 16-bit y; without any it would not.
    weight = y.new_ones(y.shape[1], dtype=wide) if bn_weight is None else _widened(bn_weight, wide)
    shift = _widened(bn_bias, wide)
    mean, variance = _widened(running_mean, wide), _widened(running_var, wide)
    if bias is not None and not batch_stats:
        assert mean is not None
        mean = mean - bias
    out, batch_mean, invstd = torch.native_batch_norm(
        y, weight, shift, mean, variance, batch_stats, momentum, eps
    )
    if batch_stats:
        if running_mean is not None and running_var is not None:
            assert mean is not None and variance is not None
            if mean is not running_mean:
                running_mean.copy_(mean)
                running_var.copy_(variance)
            if bias is not None:
                running_mean.add_(bias, alpha=momentum)
        mean = batch_mean
    elif tapes:
        assert mean is not None and variance is not None
        mean = mean.clone() if mean is running_mean else mean
        invstd = torch.rsqrt(variance + eps)
    else:
        mean = invstd  # neither is asked for
    if residual is not None:
        out = out + residual
    if activation == "relu":
        out = out.relu_()
    elif activation:
        out = reference.activate(out, activation, negative_slope)
    return out, mean, invstd


def backward(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    batch_stats: bool,
    activation: str,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy, dresidual, dweight, dbias for ``needs`` of the same order (None where not needed)."""
    da = dz
    if activation:
        if z is None:
            wide = y.to(mean.dtype)
            z = reference.pre_activation(wide, residual, mean, invstd, bn_weight, bn_bias)
            z = z.to(y.dtype)
        if activation == "relu":
            da = aten.threshold_backward(dz, z, 0)
        elif activation == "silu":
            da = aten.silu_backward(dz, z)
        else:
            da = aten.leaky_relu_backward(dz, z, negative_slope, False)
    needs_dy, needs_dresidual, needs_dweight, needs_dbias = needs
    dy = dweight = dbias = None
    if needs_dy or needs_dweight or needs_dbias:
        # In evaluation the op rebuilds 1/std from the variance and eps: give it back ours.
        running = (None, None) if batch_stats else (mean, invstd.square().reciprocal())
        weight = torch.ones_like(mean) if bn_weight is None else bn_weight.to(mean.dtype)
        dy, dweight, dbias = aten.native_batch_norm_backward(
            da,
            y,
            weight,
            *running,
            mean,
            invstd,
            batch_stats,
            0.0,
            [needs_dy, needs_dweight, needs_dbias],
        )
        if bn_weight is not None and dweight is not None:
            dweight = dweight.to(bn_weight.dtype)
        if bn_bias is not None and dbias is not None:
            dbias = dbias.to(bn_bias.dtype)
    return dy, da if needs_dresidual else None, dweight, dbias
