"""Convolution -> batch normalisation -> (+residual) -> activation in plain torch: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sync
from .options import BATCH, RUNNING, Options
from .window import Window

ACTIVATIONS = ("relu", "silu", "leaky_relu", None)


def convolve(x: Tensor, weight: Tensor, window: Window, bias: Tensor | None = None) -> Tensor:
    """x ``[N, C, T, H, W]`` -> y ``[N, K, T', H', W']``."""
    padding: Sequence[int] = window.before
    if not window.symmetric:
        sides = [
            s for b, a in zip(window.before[::-1], window.after[::-1], strict=True) for s in (b, a)
        ]
        x = F.pad(x, sides, "replicate" if window.replicate else "constant")
        padding = (0, 0, 0)
    if window.transposed:
        return F.conv_transpose3d(
            x, weight, bias, window.stride, padding, window.output_padding, window.groups, window.dilation
        )  # fmt: skip
    return F.conv3d(x, weight, bias, window.stride, padding, window.dilation, window.groups)


def conv3d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    window: Window,
    options: Options,
) -> Tensor:
    """x ``[N, C, T, H, W]``, the vectors ``[K]`` -> z ``[N, K, T', H', W']``.

    Running statistics are updated in place with those of the batch. Statistics are taken in fp32 at least; the result
    has x's dtype.
    """
    y = convolve(x, weight, window, bias)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    mean, invstd = None, None
    if options.norm == BATCH:
        mean, variance, n = statistics(wide, options.group)
        if running_mean is not None and running_var is not None:
            update_running(running_mean, running_var, mean, variance, n, options.momentum)
        invstd = torch.rsqrt(variance + options.eps)
    elif options.norm == RUNNING:
        assert running_mean is not None and running_var is not None
        mean, invstd = running_mean, torch.rsqrt(running_var + options.eps)
    out = pre_activation(wide, residual, mean, invstd, bn_weight, bn_bias)
    return activate(out, options.activation, options.negative_slope).to(x.dtype)


def activate(x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """``activation(x)``; None is the identity."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return x


def statistics(y: Tensor, group: str = "") -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance over all axes but the channel's, ``[K]`` each, and the count of values a channel."""
    variance, mean = torch.var_mean(y, dim=(0, 2, 3, 4), correction=0)
    if group:
        return sync.merge(mean, variance, count(y), group)
    return mean, variance, count(y)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: Tensor | int,
    momentum: float,
) -> None:  # fmt: skip
    """``running = (1 - momentum) * running + momentum * batch``, the variance unbiased."""
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    others = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
    unbiased = variance.detach() * (count / others)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def normalise(
    y: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
) -> Tensor:
    """``(y - mean) * invstd * bn_weight + bn_bias``, all but y ``[K]``; mean and invstd None: ``y + bn_bias``."""
    if mean is not None and invstd is not None:
        scale = invstd if bn_weight is None else invstd * bn_weight
        y = (y - _per_channel(mean)) * _per_channel(scale)
    return y if bn_bias is None else y + _per_channel(bn_bias)


def pre_activation(
    y: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
) -> Tensor:
    """What the activation sees: y normalised, plus the residual."""
    out = normalise(y, mean, invstd, bn_weight, bn_bias)
    return out if residual is None else out + residual


def after(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The passes after the convolution, as the backends give them: z, mean, invstd of a y that leaves its bias out.

    Batch statistics take any bias away again, so it moves the running mean only; running ones have it in the mean.
    Without normalisation ``bn_bias`` is the bias, and mean and invstd are None.
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    mean = invstd = None
    if options.norm == BATCH:
        mean, variance, n = statistics(wide, options.group)
        if running_mean is not None and running_var is not None:
            seen = mean if bias is None else mean + bias
            update_running(running_mean, running_var, seen, variance, n, options.momentum)
        invstd = torch.rsqrt(variance + options.eps)
    elif options.norm == RUNNING:
        assert running_mean is not None and running_var is not None
        mean, invstd = frozen(bias, running_mean, running_var, options.eps, wide.dtype)
    out = pre_activation(wide, residual, mean, invstd, bn_weight, bn_bias)
    return activate(out, options.activation, options.negative_slope).to(y.dtype), mean, invstd


def frozen(
    bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and invstd of a y that leaves its bias out, under running statistics; copies."""
    mean = running_mean.to(dtype, copy=True)
    return mean if bias is None else mean - bias, torch.rsqrt(running_var.to(dtype) + eps)


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
    """dy, dresidual, dweight, dbias for ``needs``, by hand; the README derives it, the tests hold it against autograd.

    With da the gradient before the activation and xhat the normalised y, over the n values of a channel::

        dbias = sum(da)    dweight = sum(da * xhat)    dy = invstd * weight * (da - dbias / n - xhat * dweight / n)
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    pre = z
    if z is None or options.activation == "silu":
        pre = pre_activation(wide, residual, mean, invstd, bn_weight, bn_bias)
    da = activation_grad(dz.to(wide.dtype), pre, options.activation, options.negative_slope)
    sum_da = da.sum((0, 2, 3, 4))
    dy, dweight = da, None
    if mean is not None and invstd is not None:
        xhat = normalise(wide, mean, invstd, None, None)
        sum_da_xhat = (da * xhat).sum((0, 2, 3, 4))
        dweight = None if bn_weight is None else sum_da_xhat.to(bn_weight.dtype)
        if options.norm == BATCH:
            means = torch.stack([sum_da, sum_da_xhat])
            if options.group:
                means = sync.mean_of_sums(means, count(y), options.group)
            else:
                means = means / count(y)
            dy = da - _per_channel(means[0]) - xhat * _per_channel(means[1])
        scale = invstd if bn_weight is None else invstd * bn_weight
        dy = dy * _per_channel(scale)
    dbias = None if bn_bias is None else sum_da.to(bn_bias.dtype)
    needs_dy, needs_dresidual, needs_dweight, needs_dbias = needs
    return (
        dy.to(y.dtype) if needs_dy else None,
        da.to(y.dtype) if needs_dresidual else None,
        dweight if needs_dweight else None,
        dbias if needs_dbias else None,
    )


def apply_statistics(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    options: Options,
) -> Tensor:
    """z of y by statistics that are known."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    out = normalise(wide, mean, invstd, bn_weight, bn_bias)
    return activate(out, options.activation, options.negative_slope).to(y.dtype)


def masked(dz: Tensor, z: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """da and its sum a channel (fp32 at least), from z's sign alone."""
    wide = dz.to(torch.promote_types(dz.dtype, torch.float32))
    da = activation_grad(wide, z, options.activation, options.negative_slope)
    return da.to(dz.dtype), da.sum((0, 2, 3, 4))


def activation_grad(
    g: Tensor, x: Tensor | None, activation: str | None, negative_slope: float
) -> Tensor:
    """``g * activation'(x)``, torch's choice at a kink; no x is needed for the identity."""
    if not activation:
        return g
    assert x is not None
    if activation == "relu":
        return torch.where(x <= 0, 0.0, g)
    if activation == "leaky_relu":
        return torch.where(x > 0, g, g * negative_slope)
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


def activate_like(
    x: Tensor, z: Tensor | None, activation: str | None, negative_slope: float
) -> Tensor:
    """``activation(x)`` on the side of the kink where the output z was; z None: on x's own side."""
    if z is None or activation not in ("relu", "leaky_relu"):
        return activate(x, activation, negative_slope)
    return torch.where(z > 0, x, x * (negative_slope if activation == "leaky_relu" else 0.0))


def count(y: Tensor) -> int:
    """Values a channel."""
    return y.numel() // (y.shape[1] or 1)


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1, 1)
