"""The backends of the convolution operators, what they can run, and which is taken."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._dispatch import YES, Backend, Operator, Verdict
from ..common import triton_backend
from . import arguments, hybrid, reference_backend, stock
from .options import BATCH, NONE, RUNNING, Options
from .window import Window


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    channels: int
    shape: tuple[int, ...]  # of the result [N, K, T', H', W']
    window: Window
    norm: str
    has_residual: bool


def _hybrid_can_run(facts: Facts) -> Verdict:
    return triton_backend.can_run(facts.device, facts.dtype)


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of the forward passes over y: read twice and written, once read without batch statistics."""
    passes = 2 + (facts.norm == BATCH) + facts.has_residual
    return passes * math.prod(facts.shape) * facts.dtype.itemsize


def _hybrid_config(facts: Facts) -> str:
    from . import passes

    n, c, t, h, w = facts.shape
    arch = passes.arch_of(facts.device)
    plan = passes.plan("_bn_act_fwd_kernel", arch, n, c, t * h * w, True, facts.dtype)
    return f"{plan.tile['BLOCK_M']}x{plan.tile['BLOCK_C']}, {plan.tile['num_warps']} warps"


_BACKENDS = [
    Backend("hybrid", _hybrid_can_run, hybrid, config=_hybrid_config, floor_bytes=_floor_bytes),
    Backend("torch", lambda facts: YES, stock),
    Backend("reference", lambda facts: YES, reference_backend),
]


def _prefer(facts: Facts) -> tuple[str, ...]:
    return ("hybrid", "torch") if facts.device.type == "cuda" else ("torch",)


def _facts(
    x, weight, stride, padding, padding_mode, dilation, groups, norm, residual, transposed=False, output_padding=0
) -> Facts:  # fmt: skip
    found = arguments.geometry(
        x.shape, weight.shape, stride, padding, padding_mode, dilation, groups, transposed, output_padding
    )  # fmt: skip
    return Facts(
        x.device, x.dtype, x.shape[1], tuple(found.output), found.window, norm, residual is not None
    )


def _of_bn_act(
    x, weight, bn_weight, bn_bias, running_mean, running_var, *, residual=None, stride=1, padding=0,
    padding_mode="zeros", dilation=1, groups=1, training=False, **_,
) -> Facts:  # fmt: skip
    norm = BATCH if training or running_mean is None else RUNNING
    return _facts(x, weight, stride, padding, padding_mode, dilation, groups, norm, residual)


def _of_transpose(
    x, weight, bn_weight, bn_bias, running_mean, running_var, *, residual=None, stride=1, padding=0,
    output_padding=0, dilation=1, groups=1, training=False, **_,
) -> Facts:  # fmt: skip
    norm = BATCH if training or running_mean is None else RUNNING
    return _facts(
        x, weight, stride, padding, "zeros", dilation, groups, norm, residual, True, output_padding
    )


def _of_act(
    x, weight, bias=None, *, residual=None, stride=1, padding=0, padding_mode="zeros", dilation=1, groups=1, **_
) -> Facts:  # fmt: skip
    return _facts(x, weight, stride, padding, padding_mode, dilation, groups, NONE, residual)


CONV_BN_ACT = Operator("conv3d_bn_act", _BACKENDS, _prefer, _of_bn_act)
CONV_ACT = Operator("conv3d_act", _BACKENDS, _prefer, _of_act)
CONV_TRANSPOSE_BN_ACT = Operator("conv_transpose3d_bn_act", _BACKENDS, _prefer, _of_transpose)


def select(
    requested: str, device: torch.device, dtype: torch.dtype, channels: int, shape: tuple[int, ...],
    window: Window, options: Options, has_residual: bool,
) -> Backend:  # fmt: skip
    """The backend of a call, by the operator that it belongs to."""
    facts = Facts(device, dtype, channels, shape, window, options.norm, has_residual)
    if window.transposed:
        return CONV_TRANSPOSE_BN_ACT.select(requested, facts)
    return (CONV_ACT if options.norm == NONE else CONV_BN_ACT).select(requested, facts)


def normalise(
    y: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, window: Window,
    options: Options, requested: str,
) -> Tensor:  # fmt: skip
    """z of y by statistics that are known, by the passes of the backend that a call would take."""
    impl = select(
        requested, y.device, y.dtype, y.shape[1], tuple(y.shape), window, options, False
    ).impl
    return impl.normalise(y, mean, invstd, bn_weight, bn_bias, options)
