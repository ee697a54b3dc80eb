"""``conv3d_bn_act``, ``conv3d_act`` and ``conv_transpose3d_bn_act``: schema, gradient and the public functions.

One registered op serves all three: they differ in the window and in what normalises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ... import _env
from ..common.autocast import autocast_dtype
from ..common.gradient import Pair, Tensors, differentiable, transformed
from ..common.schema import differentiate, goes_straight, register
from . import arguments, onednn, recipes, reference, run, stock, sync
from .backends import CONV_ACT, CONV_BN_ACT, CONV_TRANSPOSE_BN_ACT
from .options import BATCH, NONE, RUNNING, Options
from .window import of_schema

_WINDOW = (
    "int[] stride, int[] padding, bool replicate, int[] dilation, int groups, bool transposed, "
    "int[] output_padding"
)
_OPTIONS = (
    "str norm, str activation, float negative_slope, float momentum, float eps, str process_group"
)
_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, "
    f"Tensor(a!)? running_mean, Tensor(b!)? running_var, {_WINDOW}, {_OPTIONS}, str backend) -> "
)
_TENSORS, _SIZES = 8, 7  # of the arguments; what follows is Options


def _parse(weight: Any, flags: Sequence[Any]) -> tuple[Any, Options]:
    return of_schema(weight.shape, *flags[:_SIZES]), Options(*flags[_SIZES:])


def _run_forward(tapes: bool, args: Sequence[Any]) -> Tensors:
    tensors, flags, backend = args[:_TENSORS], args[_TENSORS:-1], args[-1]
    window, options = _parse(tensors[1], flags)
    return run.forward(tapes, *tensors, window, options, backend)  # type: ignore[call-arg]


def _fake_forward(tapes: bool, args: Sequence[Any]) -> Tensors:
    x, weight, _, residual, *_ = args
    window, options = _parse(weight, args[_TENSORS:-1])
    return run.fake_forward(tapes, x, weight, residual, window, options, args[-1])


def _run_backward(
    dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, *rest
) -> Tensors:
    *flags, needs, backend = rest
    return run.backward(
        dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, *_parse(weight, flags),
        needs, backend,
    )  # fmt: skip


def _fake_backward(
    dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, *rest
) -> Tensors:
    *flags, needs, backend = rest
    window, options = _parse(weight, flags)
    return run.fake_backward(
        dz, x, weight, y, z, bias, bn_weight, bn_bias, window, options, needs, backend
    )


# Two schemas rather than optional outputs: without a backward to come there are no tapes to return.
_plain = register(
    f"conv3d_bn_act{_ARGUMENTS}Tensor",
    lambda *args: _run_forward(False, args)[0],
    lambda *args: _fake_forward(False, args)[0],
)
_fwd = register(
    f"conv3d_bn_act_fwd{_ARGUMENTS}(Tensor z, Tensor y, Tensor mean, Tensor invstd)",
    lambda *args: _run_forward(True, args),
    lambda *args: _fake_forward(True, args),
)
_bwd = register(
    "conv3d_bn_act_bwd(Tensor dz, Tensor x, Tensor weight, Tensor y, Tensor mean, Tensor invstd, Tensor? z, "
    f"Tensor? residual, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, {_WINDOW}, {_OPTIONS}, bool[] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _forward(tensors: Tensors, flags: tuple, tapes: bool, backend: str) -> Tensors:
    if tapes:
        return _fwd(*tensors, *flags, backend)
    return (_plain(*tensors, *flags, backend),)


def _save(tensors: Tensors, results: Tensors, flags: tuple, backend: str) -> Tensors:
    x, weight, bias, residual, bn_weight, bn_bias, _, _ = tensors
    z, y, mean, invstd = results
    assert z is not None
    options = Options(*flags[_SIZES:])
    # The output tells which side of a kink its input was on; with y alone, the derivative is taken from y again.
    by_sign = options.signed and bool(options.activation)
    keep_z = by_sign and (not options.keeps_y or residual is not None or not z.is_cuda)
    if not is_dynamo_compiling() and recipes.wanted(residual is not None, options):
        assert y is not None and mean is not None and invstd is not None
        window, _ = _parse(weight, flags)
        recipes.remember(
            recipes.Recipe(z, y, mean, invstd, bn_weight, bn_bias, window, options, backend)
        )
    return (
        x, weight, bias, None if options.signed else residual, bn_weight, bn_bias, None, None,
        y, mean, invstd, z if keep_z else None,
    )  # fmt: skip


def _backward(
    grads: Tensors, saved: Tensors, needs: Sequence[bool], flags: tuple, backend: str
) -> Tensors:
    x, weight, bias, residual, bn_weight, bn_bias, _, _, y, mean, invstd, z = saved
    found = _bwd(
        grads[0], x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, *flags,
        list(needs[:6]), backend,
    )  # fmt: skip
    return (*found, None, None)


def _reference(tensors: Tensors, flags: tuple) -> Tensors:
    weight = tensors[1]
    assert weight is not None
    window, options = _parse(weight, flags)
    _check_alone(options)
    return (reference.conv3d_bn_act(*tensors, window, options),)  # type: ignore[arg-type, call-arg]


def _recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
    """z from the saved inputs. A residual that was not kept moves nothing but the kink, which z knows."""
    x, weight, bias, residual, bn_weight, bn_bias, _, _, _, mean, invstd, z = saved
    assert x is not None and weight is not None
    window, options = _parse(weight, flags)
    _check_alone(options)
    out = reference.convolve(x, weight, window, bias)
    out = out.to(torch.promote_types(x.dtype, torch.float32))
    if residual is None:
        residual = torch.zeros_like(out, dtype=x.dtype, requires_grad=True)
    if options.norm == BATCH:
        mean, variance, _ = reference.statistics(out)
        invstd = torch.rsqrt(variance + options.eps)
    elif options.norm == NONE:
        mean = invstd = None
    elif bias is not None:
        mean = mean + bias.detach()  # type: ignore[operator]
    out = reference.pre_activation(out, residual, mean, invstd, bn_weight, bn_bias)
    out = reference.activate_like(out, z, options.activation, options.negative_slope)
    inputs = (x, weight, bias, residual, bn_weight, bn_bias, None, None)
    return (out.to(x.dtype),), inputs


def _check_alone(options: Options) -> None:
    if options.group:
        raise NotImplementedError(
            "process_group: expected None inside torch.func and for gradients of gradients, which no collective of "
            f"torch.distributed has, got {options.group!r}"
        )


_call = differentiable(Pair(_forward, _save, _backward, _reference, _recompute, num_outputs=1))

differentiate("conv3d_bn_act", lambda *args: _call(args[:_TENSORS], args[_TENSORS:-1], args[-1])[0])


def _normalised(
    training: bool, running_mean: Tensor | None, activation: str | None, negative_slope: float, momentum: float,
    eps: float, process_group: torch.distributed.ProcessGroup | None,
) -> Options:  # fmt: skip
    """Batch statistics in training and where there are no running ones; only those are shared."""
    norm = BATCH if training or running_mean is None else RUNNING
    group = "" if process_group is None or norm == RUNNING else sync.name_of(process_group)
    return Options(norm, activation or "", negative_slope, momentum, eps, group)


def _enter(
    tensors: tuple[Tensor | None, ...], stride: Any, padding: Any, padding_mode: str, dilation: Any,
    groups: int, transposed: bool, output_padding: Any, options: Options, backend: str,
) -> Tensor:  # fmt: skip
    """Checks, casts for autocast, and calls."""
    plain = _is_plain(tensors)
    graded = (
        plain
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
    )
    call: tuple[Any, ...] | None = None
    if plain and not graded and options.norm != BATCH:
        call = (
            stride, padding, padding_mode, dilation, groups, transposed, output_padding, options, backend,
            _env.backend_variable(),
        )  # fmt: skip
        if (z := onednn.again(call, tensors)) is not None:
            return z
    x, weight, bias, residual, *vectors = tensors
    assert x is not None and weight is not None
    if options.activation not in reference.ACTIVATIONS and options.activation != "":
        raise ValueError(
            f"activation: expected one of {reference.ACTIVATIONS}, got {options.activation!r}"
        )
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    arguments_of_window = (
        x.shape, weight.shape, stride, padding, padding_mode, dilation, groups, transposed, output_padding
    )  # fmt: skip
    if is_dynamo_compiling():
        found = arguments.geometry(*arguments_of_window)
    else:
        try:
            found = arguments.cached_geometry(*arguments_of_window)
        except TypeError:  # a list, or a symbolic size: no key for a cache
            found = arguments.geometry(*arguments_of_window)
    tensors = (x, weight, bias, residual, *vectors)
    arguments.check_tensors(*tensors, found.output)  # type: ignore[call-arg, arg-type]
    if graded and run.is_composed(tensors, found.output, found.window, options, backend):
        return stock.composed(*tensors, found.window, options)  # type: ignore[arg-type, call-arg]
    z = _call(tensors, (*found.flags, *options), backend)[0]
    if call is not None:
        run.remember(call, tensors, found.output, found.window, options, backend)
    return z  # type: ignore[return-value]


def _is_plain(tensors: Tensors) -> bool:
    """Whether nobody looks on: no compiler, transform, trace, mode or autocast."""
    return (
        goes_straight(*tensors)
        and not transformed(tensors)
        and not torch._C._is_any_autocast_enabled()
    )


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
    process_group: torch.distributed.ProcessGroup | None = None,
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
        process_group: its ranks share their batch statistics, as in ``nn.SyncBatchNorm``; batches may differ in size.
        backend: "hybrid" (ATen's convolution, fused Triton passes), "torch", "reference"; None takes the fastest.

    Returns:
        ``[N, K, T', H', W']`` in x's dtype; channels_last_3d if x or weight is, else contiguous. On the CPU with
        gradients or batch statistics in the layout that ATen's convolution chooses, which for small channels-last
        input is contiguous.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off, or batch statistics of one value a channel.
        BackendError: the named backend cannot run this call; the message says why.
        NotImplementedError: ``process_group`` inside ``torch.func`` or for a gradient of a gradient.

    Statistics, sums and the normalisation are computed in fp32 (fp64 for fp64). Under autocast x, weight, bias and
    residual are cast to its dtype. Gradients of any order exist; inside ``torch.func`` the reference runs.
    """
    options = _normalised(
        training, running_mean, activation, negative_slope, momentum, eps, process_group
    )
    return _enter(
        (x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var), stride, padding,
        padding_mode, dilation, groups, False, 0, options, CONV_BN_ACT.check_name(backend),
    )  # fmt: skip


def conv3d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Sequence[Sequence[int]] = 0,
    padding_mode: str = "zeros",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """3D convolution, residual sum and activation as one operator: :func:`conv3d_bn_act` without normalisation.

    Equivalent to::

        F.relu(F.conv3d(x, weight, bias, stride, padding, dilation, groups) + residual)

    Arguments, result and errors are those of :func:`conv3d_bn_act`.
    """
    options = Options(NONE, activation or "", negative_slope, 0.0, 0.0)
    return _enter(
        (x, weight, bias, residual, None, None, None, None), stride, padding, padding_mode, dilation,
        groups, False, 0, options, CONV_ACT.check_name(backend),
    )  # fmt: skip


def conv_transpose3d_bn_act(
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
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Transposed 3D convolution, batch normalisation, residual sum and activation as one operator.

    Equivalent to::

        y = F.batch_norm(F.conv_transpose3d(x, weight, bias, stride, padding, output_padding, groups, dilation),
                         running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        return F.relu(y + residual)

    Args:
        weight: ``[C, K / groups, kt, kh, kw]``, x's dtype.
        stride, padding, output_padding, dilation: int or (t, h, w), as in ``F.conv_transpose3d``.

    The other arguments, the result and the errors are those of :func:`conv3d_bn_act`.
    """
    options = _normalised(
        training, running_mean, activation, negative_slope, momentum, eps, process_group
    )
    return _enter(
        (x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var), stride, padding, "zeros",
        dilation, groups, True, output_padding, options, CONV_TRANSPOSE_BN_ACT.check_name(backend),
    )  # fmt: skip
