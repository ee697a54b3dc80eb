"""The backends of the convolution operators, what they can run, and which is taken."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _env
from ..._dispatch import YES, Backend, Operator, Verdict
from ..common import triton_backend
from . import arguments, choice, hybrid, own, reference_backend, stock
from .convolution import layout
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
    channels_last: bool  # of what is promised for the result


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of the result: channels-last where x or weight is (and is not plain contiguous too), else contiguous."""
    found = layout(x)
    return layout(weight) if found is torch.contiguous_format else found


def _hybrid_can_run(facts: Facts) -> Verdict:
    return triton_backend.can_run(facts.device, facts.dtype)


def _triton_can_run(facts: Facts) -> Verdict:
    verdict = triton_backend.can_run(facts.device, facts.dtype)
    if not verdict.ok:
        return verdict
    return choice.can_run(facts.window, facts.channels, facts.shape, facts.dtype)


def _triton_config(facts: Facts) -> str:
    found = choice.kernels(facts.window, facts.channels, facts.shape[1], facts.dtype)
    return f"{found.__name__.rpartition('.')[2]} kernels"


def _triton_floor_bytes(facts: Facts) -> int:
    """As below, but for the read that the convolution's epilogue saves."""
    return _floor_bytes(facts) - math.prod(facts.shape) * facts.dtype.itemsize


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
    Backend("triton", _triton_can_run, own, config=_triton_config, floor_bytes=_triton_floor_bytes),
    Backend("hybrid", _hybrid_can_run, hybrid, config=_hybrid_config, floor_bytes=_floor_bytes),
    Backend("torch", lambda facts: YES, stock),
    Backend("reference", lambda facts: YES, reference_backend),
]


def _prefer(facts: Facts) -> tuple[str, ...]:
    if facts.device.type != "cuda":
        return ("torch",)
    if facts.channels_last and not facts.window.transposed and triton_backend.installed():
        table = choice.table(
            facts.device, facts.window, facts.channels, facts.shape[1], facts.dtype
        )
        if table["forward"] == "triton":
            return ("triton", "hybrid", "torch")
    return ("hybrid", "torch")


def _facts(
    x, weight, stride, padding, padding_mode, dilation, groups, norm, residual, transposed=False, output_padding=0
) -> Facts:  # fmt: skip
    found = arguments.geometry(
        x.shape, weight.shape, stride, padding, padding_mode, dilation, groups, transposed, output_padding
    )  # fmt: skip
    return Facts(
        x.device, x.dtype, x.shape[1], tuple(found.output), found.window, norm, residual is not None,
        memory_format(x, weight) is torch.channels_last_3d,
    )  # fmt: skip


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
    window: Window, options: Options, has_residual: bool, channels_last: bool,
) -> Backend:  # fmt: skip
    """The backend of a call, by the operator that it belongs to."""
    facts = Facts(device, dtype, channels, shape, window, options.norm, has_residual, channels_last)
    return _operator(window, options).select(requested, facts)


def requested(backend: str, window: Window, options: Options) -> str:
    """The backend that the call or the environment names, "" for none. Asks no device."""
    operator = _operator(window, options)
    return backend or _env.requested_backend(operator.name, operator.backends) or ""


def _operator(window: Window, options: Options) -> Operator:
    if window.transposed:
        return CONV_TRANSPOSE_BN_ACT
    return CONV_ACT if options.norm == NONE else CONV_BN_ACT


def normalise(
    y: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, window: Window,
    options: Options, requested: str,
) -> Tensor:  # fmt: skip
    """z of y by statistics that are known, by the passes of the backend that a call would take."""
    impl = select(
        requested, y.device, y.dtype, y.shape[1], tuple(y.shape), window, options, False, False
    ).impl
    return impl.normalise(y, mean, invstd, bn_weight, bn_bias, options)
