"""conv3d -> BatchNorm3d -> (+residual) -> activation in plain torch: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "silu", "leaky_relu", None)


def activate(x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """``activation(x)``; None is the identity."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return x


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all axes but the channel's, ``[K]`` each."""
    variance, mean = torch.var_mean(y, dim=(0, 2, 3, 4), correction=0)
    return mean, variance


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: int, momentum: float
) -> None:  # fmt: skip
    """``running = (1 - momentum) * running + momentum * batch``, the variance unbiased."""
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    unbiased = variance.detach() * (count / max(count - 1, 1))
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def normalise(
    y: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None
) -> Tensor:
    """``(y - mean) * invstd * bn_weight + bn_bias``, all but y ``[K]``."""
    scale = invstd if bn_weight is None else invstd * bn_weight
    out = (y - _per_channel(mean)) * _per_channel(scale)
    return out if bn_bias is None else out + _per_channel(bn_bias)


def pre_activation(
    y: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
) -> Tensor:
    """What the activation sees: y normalised, plus the residual."""
    out = normalise(y, mean, invstd, bn_weight, bn_bias)
    return out if residual is None else out + residual


def conv3d_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """x ``[N, C, T, H, W]``, weight ``[K, C/groups, kt, kh, kw]``, the rest ``[K]`` -> ``[N, K, T', H', W']``.

    Batch statistics where ``training`` or where there are no running ones; running statistics are updated in
    place where ``training``. Statistics are taken in fp32 at least; the result has x's dtype.
    """
    y = F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if training or running_mean is None or running_var is None:
        mean, variance = statistics(wide)
        if training and running_mean is not None and running_var is not None:
            update_running(running_mean, running_var, mean, variance, count(y), momentum)
    else:
        mean, variance = running_mean, running_var
    out = pre_activation(wide, residual, mean, torch.rsqrt(variance + eps), bn_weight, bn_bias)
    return activate(out, activation, negative_slope).to(x.dtype)


def forward(
    y: Tensor, bias, residual, bn_weight, bn_bias, running_mean, running_var, *,
    batch_stats, activation, negative_slope, momentum, eps, tapes,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The passes after the convolution, as the backends give them: z, mean, invstd."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if batch_stats:
        mean, variance = statistics(wide)
        if running_mean is not None:
            seen = mean if bias is None else mean + bias
            update_running(running_mean, running_var, seen, variance, count(y), momentum)
    else:
        mean = running_mean.to(wide.dtype, copy=True)
        mean, variance = mean if bias is None else mean - bias, running_var.to(wide.dtype)
    invstd = torch.rsqrt(variance + eps)
    out = pre_activation(wide, residual, mean, invstd, bn_weight, bn_bias)
    return activate(out, activation, negative_slope).to(y.dtype), mean, invstd


def backward(
    dz: Tensor, y: Tensor, z, residual, mean, invstd, bn_weight, bn_bias, *,
    batch_stats, activation, negative_slope, needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dy, dresidual, dweight, dbias, by hand; the README derives it, the tests hold it against autograd.

    With da the gradient before the activation and xhat the normalised y, over the n values of a channel::

        dbias = sum(da)    dweight = sum(da * xhat)    dy = invstd * weight * (da - dbias / n - xhat * dweight / n)
    """
    xhat = normalise(y.to(mean.dtype), mean, invstd, None, None)
    pre = z
    if z is None or activation == "silu":
        pre = pre_activation(y.to(mean.dtype), residual, mean, invstd, bn_weight, bn_bias)
    da = activation_grad(dz.to(mean.dtype), pre, activation, negative_slope)
    sum_da, sum_da_xhat = da.sum((0, 2, 3, 4)), (da * xhat).sum((0, 2, 3, 4))
    dy = da
    if batch_stats:
        n = count(y)
        dy = da - _per_channel(sum_da / n) - xhat * _per_channel(sum_da_xhat / n)
    scale = invstd if bn_weight is None else invstd * bn_weight
    dy = (dy * _per_channel(scale)).to(y.dtype)
    dweight = None if bn_weight is None else sum_da_xhat.to(bn_weight.dtype)
    dbias = None if bn_bias is None else sum_da.to(bn_bias.dtype)
    found = (dy, da.to(y.dtype), dweight, dbias)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def activation_grad(g: Tensor, x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """``g * activation'(x)``, torch's choice at a kink."""
    if activation == "relu":
        return torch.where(x <= 0, 0.0, g)
    if activation == "leaky_relu":
        return torch.where(x > 0, g, g * negative_slope)
    if activation == "silu":
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))
    return g


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
