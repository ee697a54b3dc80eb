"""The passes around the convolution as stock ATen ops: backend ``torch``, and what every machine can run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import folded, reference
from .convolution import convolve, convolve_backward, layout
from .options import BATCH, NONE, Options
from .window import Window

__all__ = [
    "backward",
    "composed",
    "convolve_backward",
    "forward",
    "fused",
    "masked",
    "normalise",
]

aten = torch.ops.aten
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


with torch.inference_mode(False):  # whoever imports this
    _NEVER = torch.tensor(False)


def _widened(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, window: Window, options: Options,
    memory_format: torch.memory_format, tapes: bool,
) -> Tensor:  # fmt: skip
    """z without y: the passes, in place where they can be. (Without tapes on the CPU: onednn.py. With them the weight
    is about to change, and folding and ordering it would be for this call alone.)
    """
    if options.norm == NONE:
        z = convolve(x, weight, window, bias)
        return folded.finish(z, residual, options)
    # With its bias, as the modules do it: y is rounded once, at the same magnitude.
    y = convolve(x, weight, window, bias)
    return _after(y, None, residual, bn_weight, bn_bias, mean, variance, options)[0]


def composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, window: Window,
    options: Options,
) -> Tensor:  # fmt: skip
    """z by ops that autograd knows, where :func:`run.is_composed`: it keeps x, the weight, y and z, as we would.

    A bias before batch statistics moves the running mean alone. Its gradient is exactly zero.
    """
    if options.norm != BATCH:
        return folded.finish(convolve(x, weight, window, bias), residual, options)
    if bias is not None:
        assert bn_bias is not None
        bn_bias = torch.where(_NEVER, bias, bn_bias)
    y = convolve(x, weight, window)
    z = torch.native_batch_norm(
        y, bn_weight, bn_bias, running_mean, running_var, True, options.momentum, options.eps
    )[0]
    if bias is not None and running_mean is not None:
        # As native_batch_norm writes it: counting no version, for autograd has the buffer saved.
        running_mean.data.add_(bias.detach(), alpha=options.momentum)
    return folded.finish(z, residual, options)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, window: Window,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """z, y, mean, invstd; y leaves the bias out."""
    y = convolve(x, weight, window)
    residual = None if residual is None else residual.contiguous(memory_format=layout(y))
    z, mean, invstd = _after(
        y, bias, residual, bn_weight, bn_bias, running_mean, running_var, options
    )
    return z, y, mean, invstd


def _after(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z, mean, invstd, as :func:`reference.after`."""
    if options.norm == NONE or options.group:
        return reference.after(
            y, bias, residual, bn_weight, bn_bias, running_mean, running_var, options
        )
    wide, batch = _WIDE[y.dtype], options.norm == BATCH
    # fp32 parameters make ATen keep fp32 statistics for 16-bit y; without any it would not.
    weight = y.new_ones(y.shape[1], dtype=wide) if bn_weight is None else _widened(bn_weight, wide)
    shift = _widened(bn_bias, wide)
    mean, variance = _widened(running_mean, wide), _widened(running_var, wide)
    if bias is not None and not batch:
        assert mean is not None
        mean = mean - bias
    out, batch_mean, invstd = torch.native_batch_norm(
        y, weight, shift, mean, variance, batch, options.momentum, options.eps
    )
    if batch:
        if running_mean is not None and running_var is not None:
            assert mean is not None and variance is not None
            if mean is not running_mean:
                running_mean.copy_(mean)
                running_var.copy_(variance)
            if bias is not None:
                running_mean.add_(bias, alpha=options.momentum)
        mean = batch_mean
    else:
        assert mean is not None and variance is not None
        mean = mean.clone() if mean is running_mean else mean
        invstd = torch.rsqrt(variance + options.eps)
    if residual is not None:
        out = out + residual
    return folded.activate(out, options), mean, invstd


def backward(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    options: Options,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy, dresidual, dweight, dbias for ``needs`` of the same order (None where not needed)."""
    # By running statistics it comes here for SiLU alone, and ATen sums a channels-last tensor in a plain loop.
    if mean is None or invstd is None or options.norm != BATCH or options.group:
        return reference.backward(
            dz, y, z, residual, mean, invstd, bn_weight, bn_bias, options, needs
        )
    if z is None and options.activation:
        wide = y.to(mean.dtype)
        z = reference.pre_activation(wide, residual, mean, invstd, bn_weight, bn_bias)
        z = z.to(y.dtype)
    da = _before_activation(dz, z, options)
    needs_dy, needs_dresidual, needs_dweight, needs_dbias = needs
    dy = dweight = dbias = None
    if needs_dy or needs_dweight or needs_dbias:
        weight = torch.ones_like(mean) if bn_weight is None else bn_weight.to(mean.dtype)
        dy, dweight, dbias = aten.native_batch_norm_backward(
            da,
            y,
            weight,
            None,
            None,
            mean,
            invstd,
            True,
            0.0,
            [needs_dy, needs_dweight, needs_dbias],
        )
        if bn_weight is not None and dweight is not None:
            dweight = dweight.to(bn_weight.dtype)
        if bn_bias is not None and dbias is not None:
            dbias = dbias.to(bn_bias.dtype)
    return dy, da if needs_dresidual else None, dweight, dbias


def masked(dz: Tensor, z: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """da and its sum a channel, as :func:`reference.masked`."""
    da = _before_activation(dz, z, options)
    return da, da.sum((0, 2, 3, 4), dtype=_WIDE[da.dtype])


def normalise(
    y: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """z, as :func:`reference.apply_statistics`."""
    wide = _WIDE[y.dtype]
    weight = y.new_ones(y.shape[1], dtype=wide) if bn_weight is None else _widened(bn_weight, wide)
    variance = invstd.square().reciprocal()
    out = torch.native_batch_norm(
        y, weight, _widened(bn_bias, wide), mean, variance, False, 0.0, 0.0
    )[0]
    return folded.activate(out, options)


def _before_activation(dz: Tensor, z: Tensor | None, options: Options) -> Tensor:
    """dz times the activation's derivative; z is what went into SiLU, else either side of the activation."""
    if not options.activation:
        return dz
    if options.activation == "relu":
        return aten.threshold_backward(dz, z, 0)
    if options.activation == "silu":
        return aten.silu_backward(dz, z)
    return aten.leaky_relu_backward(dz, z, options.negative_slope, False)
