"""What every kernel of the operator does to an element: normalise, activate, and the activation's derivative."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # not maximum: NaN must pass
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * SLOPE)
    return x


@triton.jit
def _activation_grad(g, x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """g * activation'(x), torch's choice at x = 0; x may be the output where only its sign is asked."""
    if ACTIVATION == "relu":
        g = tl.where(x <= 0, 0.0, g)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        g = g * s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "leaky_relu":
        g = tl.where(x > 0, g, g * SLOPE)
    return g


@triton.jit
def _affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, mask_c, EPS: tl.constexpr,
            INVSTD_IS_VAR: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """mean, invstd, weight and bias of these channels; ones and zeros where there is none."""
    if mean_ptr is None:
        mean = tl.full(channels.shape, 0.0, dtype=ACC)
        invstd = tl.full(channels.shape, 1.0, dtype=ACC)
    else:
        mean = tl.load(mean_ptr + channels, mask=mask_c, other=0.0).to(ACC)
        invstd = tl.load(invstd_ptr + channels, mask=mask_c, other=1.0).to(ACC)
        if INVSTD_IS_VAR:
            invstd = 1.0 / tl.sqrt(invstd + EPS)
    weight = tl.full(channels.shape, 1.0, dtype=ACC)
    bias = tl.full(channels.shape, 0.0, dtype=ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channels, mask=mask_c, other=1.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=mask_c, other=0.0).to(ACC)
    return mean[None, :], invstd[None, :], weight[None, :], bias[None, :]
