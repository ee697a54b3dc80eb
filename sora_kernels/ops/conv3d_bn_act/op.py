"""``conv3d_bn_act``: schema, backends, gradient and the public function.

The convolution is ATen's (cuDNN, oneDNN) in every backend so far; a backend is what runs the passes around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..._dispatch import YES, Backend, Operator, Verdict
from ..common import triton_backend
from ..common.gradient import Pair, Tensors, differentiable
from ..common.schema import differentiate, register
from . import arguments, hybrid, onednn, reference, stock

# Where torch has a binding of its own, as for torch.convolution, it is several us faster than torch.ops.aten's.
_convolution_backward = torch.ops.aten.convolution_backward.default


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the convolution's output [N, K, T, H, W]
    has_residual: bool
    batch_stats: bool


def _hybrid_can_run(facts: Facts) -> Verdict:
    return triton_backend.can_run(facts.device, facts.dtype)


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of the forward passes over y: read twice and written, once read in evaluation."""
    passes = 2 + facts.batch_stats + facts.has_residual
    elements = 1
    for size in facts.shape:
        elements *= size
    return passes * elements * facts.dtype.itemsize


def _hybrid_config(facts: Facts) -> str:
    from . import passes

    n, c, t, h, w = facts.shape
    arch = passes.arch_of(facts.device)
    plan = passes.plan("_bn_act_fwd_kernel", arch, n, c, t * h * w, True, facts.dtype)
    return f"{plan.tile['BLOCK_M']}x{plan.tile['BLOCK_C']}, {plan.tile['num_warps']} warps"


OPERATOR = Operator(
    "conv3d_bn_act",
    [
        Backend("hybrid", _hybrid_can_run, hybrid, config=_hybrid_config, floor_bytes=_floor_bytes),
        Backend("torch", lambda facts: YES, stock),
        Backend("reference", lambda facts: YES, reference),
    ],
    prefer=lambda facts: ("hybrid", "torch") if facts.device.type == "cuda" else ("torch",),
    facts=lambda *args, **kwargs: _facts_of_call(*args, **kwargs),
)


def _facts_of_call(
    x, weight, bn_weight, bn_bias, running_mean, running_var, *, residual=None, stride=1, padding=0,
    padding_mode="zeros", dilation=1, groups=1, training=False, **_,
) -> Facts:  # fmt: skip
    """The public arguments -> facts, for ``explain``."""
    shapes = arguments.geometry(
        x.shape, weight.shape, stride, padding, padding_mode, dilation, groups
    )
    batch_stats = training or running_mean is None
    return Facts(x.device, x.dtype, tuple(shapes.output), residual is not None, batch_stats)


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Channels-last where x or weight is (and is not plain contiguous too), else contiguous."""
    for t in (x, weight):
        if t.is_contiguous(memory_format=torch.channels_last_3d) and not t.is_contiguous():
            return torch.channels_last_3d
    return torch.contiguous_format


def _layout(y: Tensor) -> torch.memory_format:
    """The layout of a convolution's output, which is dense in one of the two."""
    return torch.contiguous_format if y.is_contiguous() else torch.channels_last_3d


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _folds(x: Tensor, has_residual: bool, batch_stats: bool, backend: str) -> bool:
    """Whether a call without gradients is one convolution by oneDNN: backend "torch" in evaluation on the CPU."""
    if batch_stats or not onednn.takes(x):
        return False
    facts = Facts(x.device, x.dtype, tuple(x.shape), has_residual, batch_stats)
    return OPERATOR.select(backend, facts).name == "torch"


def _run_forward(
    tapes, x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, stride, padding,
    dilation, groups, activation, negative_slope, batch_stats, momentum, eps, backend,
):  # fmt: skip
    """z, y, mean, invstd; the last two only where ``tapes``.

    Evaluation on the CPU without tapes may be one convolution (onednn.py). Otherwise the passes run in the layout that
    the convolution chose for y: it is free, and ATen's channels-last statistics on the CPU lose two digits. On a GPU z
    is laid out as promised last; on the CPU, where ATen's small convolutions
    answer channels-last input contiguously, it stays so, as in the modules that this replaces.
    """
    folds = not tapes and _folds(x, residual is not None, batch_stats, backend)
    if folds and x.numel():
        z = onednn.forward(
            x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, stride, padding,
            dilation, groups, activation, negative_slope, eps, _format(x, weight),
        )  # fmt: skip
        return z, z, z, z  # no tapes were asked for
    y = torch.convolution(x, weight, None, stride, padding, dilation, False, _NO_PADDING, groups)
    if batch_stats and reference.count(y) == 1:
        raise ValueError(
            "conv3d_bn_act: expected more than 1 value per channel for batch statistics, "
            f"got a convolution output of {tuple(y.shape)}"
        )
    if y.numel() == 0:
        mean = y.new_zeros(y.shape[1], dtype=_statistics_dtype(x))
        z = torch.empty_like(y)
        if folds:
            z = z.contiguous(memory_format=_format(x, weight))
        return z, y, mean, torch.ones_like(mean)
    if residual is not None:
        residual = residual.contiguous(memory_format=_layout(y))
    facts = Facts(y.device, y.dtype, y.shape, residual is not None, batch_stats)
    z, mean, invstd = OPERATOR.select(backend, facts).impl.forward(
        y, bias, residual, bn_weight, bn_bias, running_mean, running_var, batch_stats=batch_stats,
        activation=activation, negative_slope=negative_slope, momentum=momentum, eps=eps, tapes=tapes,
    )  # fmt: skip
    if not (x.is_cpu or (x.is_contiguous() and weight.is_contiguous())):
        z = z.contiguous(memory_format=_format(x, weight))
    return z, y, mean, invstd


_NO_PADDING = [0, 0, 0]


def _plain_impl(*args: Any) -> Tensor:
    return _run_forward(False, *args)[0]


def _fwd_impl(*args: Any) -> Tensors:
    return _run_forward(True, *args)


def _fake_convolution(x, weight, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    """y as ATen lays it out, and an empty z of the same sizes."""
    y = torch.convolution(x, weight, None, stride, padding, dilation, False, _NO_PADDING, groups)
    z = torch.empty_like(y)
    return y, z if x.is_cpu else z.contiguous(memory_format=_format(x, weight))


def _plain_fake(
    x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, groups,
    activation, negative_slope, batch_stats, momentum, eps, backend,
):  # fmt: skip
    z = _fake_convolution(x, weight, stride, padding, dilation, groups)[1]
    if _folds(x, residual is not None, batch_stats, backend):
        z = z.contiguous(memory_format=_format(x, weight))
    return z


def _fwd_fake(
    x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, groups, *_
):  # fmt: skip
    y, z = _fake_convolution(x, weight, stride, padding, dilation, groups)
    channels = z.new_empty(weight.shape[0], dtype=_statistics_dtype(x))
    return z, y, channels, torch.empty_like(channels)


def _bwd_impl(
    dz, x, weight, y, mean, invstd, z, residual, bn_weight, bn_bias, stride, padding, dilation,
    groups, activation, negative_slope, batch_stats, needs, backend,
):  # fmt: skip
    needs_dx, needs_dw, needs_dbias, needs_dresidual, needs_dbn_weight, needs_dbn_bias = needs
    needs_dy = needs_dx or needs_dw or (needs_dbias and not batch_stats)
    if y.numel() == 0:
        like = (x, weight, weight.new_empty(weight.shape[0]), y, bn_weight, bn_bias)
        return tuple(
            torch.zeros_like(t) if n and t is not None else x.new_empty(0)
            for t, n in zip(like, needs, strict=True)
        )
    facts = Facts(y.device, y.dtype, tuple(y.shape), residual is not None, batch_stats)
    own = _layout(y)
    z = None if z is None else z.contiguous(memory_format=own)
    residual = None if residual is None else residual.contiguous(memory_format=own)
    dy, dresidual, dbn_weight, dbn_bias = OPERATOR.select(backend, facts).impl.backward(
        dz.contiguous(memory_format=own), y, z, residual, mean, invstd, bn_weight, bn_bias,
        batch_stats=batch_stats, activation=activation, negative_slope=negative_slope,
        needs=(needs_dy, needs_dresidual, needs_dbn_weight, needs_dbn_bias),
    )  # fmt: skip
    dx = dw = dbias = None
    if needs_dy:
        # Batch statistics take any bias away again: its gradient is exactly zero.
        dx, dw, dbias = _convolution_backward(
            dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, _NO_PADDING, groups,
            [needs_dx, needs_dw, needs_dbias and not batch_stats],
        )  # fmt: skip
    if needs_dbias and batch_stats:
        dbias = weight.new_zeros(weight.shape[0])
    grads = (dx, dw, dbias, dresidual, dbn_weight, dbn_bias)
    return tuple(
        x.new_empty(0) if g is None or not n else _laid_out(g, x, weight)
        for g, n in zip(grads, needs, strict=True)
    )


def _laid_out(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A gradient as promised on a GPU, as ATen gave it on the CPU."""
    return g if x.is_cpu or g.dim() != 5 else g.contiguous(memory_format=_format(x, weight))


def _bwd_fake(
    dz, x, weight, y, mean, invstd, z, residual, bn_weight, bn_bias, stride, padding, dilation,
    groups, activation, negative_slope, batch_stats, needs, backend,
):  # fmt: skip
    dx, dw, dbias = _convolution_backward(
        y, x, weight, [weight.shape[0]], stride, padding, dilation, False, _NO_PADDING, groups, list(needs[:3])
    )  # fmt: skip
    like = (dx, dw, dbias, y, bn_weight, bn_bias)
    return tuple(
        _laid_out(torch.empty_like(t), x, weight) if n and t is not None else x.new_empty(0)
        for t, n in zip(like, needs, strict=True)
    )


_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation, float negative_slope, bool batch_stats, float momentum, float eps, "
    "str backend) -> "
)
# Two schemas rather than optional outputs: without a backward to come there are no tapes to return.
_plain = register("conv3d_bn_act" + _ARGUMENTS + "Tensor", _plain_impl, _plain_fake)
_fwd = register(
    "conv3d_bn_act_fwd" + _ARGUMENTS + "(Tensor z, Tensor y, Tensor mean, Tensor invstd)",
    _fwd_impl,
    _fwd_fake,
)
_bwd = register(
    "conv3d_bn_act_bwd(Tensor dz, Tensor x, Tensor weight, Tensor y, Tensor mean, Tensor invstd, "
    "Tensor? z, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation, float negative_slope, bool batch_stats, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_impl,
    _bwd_fake,
)


def _forward(tensors: Tensors, flags: tuple, tapes: bool, backend: str) -> Tensors:
    if tapes:
        return _fwd(*tensors, *flags, backend)
    return (_plain(*tensors, *flags, backend),)


def _save(tensors: Tensors, results: Tensors, flags: tuple) -> Tensors:
    x, weight, bias, residual, bn_weight, bn_bias, _, _ = tensors
    z, y, mean, invstd = results
    assert z is not None
    activation, negative_slope = flags[4], flags[5]
    # The output tells which side of a kink its input was on; SiLU's derivative needs the input itself.
    signed = activation == "relu" or (activation == "leaky_relu" and negative_slope > 0)
    keep_z = signed and (residual is not None or not z.is_cuda)
    return (
        x, weight, bias, None if signed or not activation else residual, bn_weight, bn_bias, None, None,
        y, mean, invstd, z if keep_z else None,
    )  # fmt: skip


def _backward(
    grads: Tensors, saved: Tensors, needs: Sequence[bool], flags: tuple, backend: str
) -> Tensors:
    x, weight, _, residual, bn_weight, bn_bias, _, _, y, mean, invstd, z = saved
    stride, padding, dilation, groups, activation, negative_slope, batch_stats, _, _ = flags
    found = _bwd(
        grads[0], x, weight, y, mean, invstd, z, residual, bn_weight, bn_bias, stride, padding,
        dilation, groups, activation, negative_slope, batch_stats, needs[:6], backend,
    )  # fmt: skip
    return (*found, None, None)


def _keywords(flags: tuple) -> dict[str, Any]:
    names = (
        "stride", "padding", "dilation", "groups", "activation", "negative_slope", "training", "momentum", "eps"
    )  # fmt: skip
    call = dict(zip(names, flags, strict=True))
    call["activation"] = call["activation"] or None
    return call


def _reference(tensors: Tensors, flags: tuple) -> Tensors:
    x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var = tensors
    assert x is not None and weight is not None
    z = reference.conv3d_bn_act(
        x, weight, bn_weight, bn_bias, running_mean, running_var, bias=bias, residual=residual, **_keywords(flags)
    )  # fmt: skip
    return (z,)


def _recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
    """z from the saved inputs. A residual that was not kept moves nothing but the kink, which z knows."""
    x, weight, bias, residual, bn_weight, bn_bias, _, _, y, mean, invstd, z = saved
    assert x is not None and weight is not None and y is not None
    assert mean is not None and invstd is not None
    call = _keywords(flags)
    if residual is None:
        residual = torch.zeros_like(y, requires_grad=True)
    out = F.conv3d(
        x, weight, bias, call["stride"], call["padding"], call["dilation"], call["groups"]
    ).to(mean.dtype)  # fmt: skip
    if call["training"]:
        mean, variance = reference.statistics(out)
        invstd = torch.rsqrt(variance + call["eps"])
    elif bias is not None:
        mean = mean + bias.detach()
    out = reference.normalise(out, mean, invstd, bn_weight, bn_bias) + residual
    out = reference.activate_like(out, z, call["activation"], call["negative_slope"])
    inputs = (x, weight, bias, residual, bn_weight, bn_bias, None, None)
    return (out.to(x.dtype),), inputs


_call = differentiable(
    Pair(_forward, _save, _backward, _reference, _recompute, num_outputs=1)
)  # fmt: skip

differentiate("conv3d_bn_act", lambda *args: _call(args[:8], args[8:-1], args[-1])[0])


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
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Sequence[Sequence[int]] = 0,
    padding_mode: str = "zeros",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """3D convolution, batch normalisation, residual sum and activation as one operator.

    Equivalent to::

        y = F.batch_norm(F.conv3d(x, weight, bias, stride, padding, dilation, groups),
                         running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        return F.relu(y + residual)

    Args:
        x: ``[N, C, T, H, W]``; fp16, bf16, fp32 or fp64; contiguous or channels_last_3d (others are copied).
        weight: ``[K, C / groups, kt, kh, kw]``, x's dtype.
        bn_weight, bn_bias: ``[K]`` or None; x's dtype or fp32.
        running_mean, running_var: ``[K]``, updated in place where ``training``. None (both): batch statistics always.
        bias: the convolution's, ``[K]``, x's dtype.
        residual: added before the activation; the output's shape and x's dtype.
        activation: "relu", "silu", "leaky_relu" (with ``negative_slope``) or None.
        stride, dilation: int or (t, h, w).
        padding: int, (t, h, w) or ((t0, t1), (h0, h1), (w0, w1)), of zeros or, with ``padding_mode="replicate"``,
            of the border's values.
        momentum: weight of the new batch in the running statistics, a float. The variance enters unbiased.
        backend: "hybrid" (ATen's convolution, fused Triton passes), "torch", "reference"; None takes the fastest.

    Returns:
        ``[N, K, T', H', W']`` in x's dtype; channels_last_3d if x or weight is, else contiguous. On the CPU with
        gradients or batch statistics in the layout that ATen's convolution chooses, which for small channels-last
        input is contiguous.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off, or batch statistics of one value a channel.
        BackendError: the named backend cannot run this call; the message says why.

    Statistics, sums and the normalisation are computed in fp32 (fp64 for fp64). Under autocast x, weight, bias and
    residual are cast to its dtype. Gradients of any order exist; inside ``torch.func`` the reference runs.
    """
    backend = OPERATOR.check_name(backend) if backend else ""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {reference.ACTIVATIONS}, got {activation!r}")
    if (
        torch._C._is_any_autocast_enabled()
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype is not torch.float64
    ):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    window = (x.shape, weight.shape, stride, padding, padding_mode, dilation, groups)
    if is_dynamo_compiling():
        shapes = arguments.geometry(*window)
    else:
        try:
            shapes = arguments.cached_geometry(*window)
        except TypeError:  # a list, or a symbolic size: no key for a cache
            shapes = arguments.geometry(*window)
    tensors = (x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var)
    arguments.check_tensors(*tensors, shapes.output)
    if shapes.pad is not None:
        tensors = (arguments.pad(x, *shapes.pad, padding_mode), *tensors[1:])
    flags = (
        shapes.stride, shapes.padding, shapes.dilation, groups, activation or "", negative_slope,
        training or running_mean is None, momentum, eps,
    )  # fmt: skip
    return _call(tensors, flags, backend)[0]  # type: ignore[return-value]
