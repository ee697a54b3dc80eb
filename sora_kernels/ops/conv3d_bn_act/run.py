"""What the registered ops do: one call through the backend that it takes, and what a call on fake tensors gives.

Two ways, by the flags alone (:attr:`Options.keeps_y`). With y: the convolution, then the passes; backward reads y.
Without: y is never kept, the passes may be inside the convolution or in place, and backward needs z's sign and the
weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, convolution, folded, onednn, reference, sync
from .backends import memory_format
from .convolution import convolve, layout
from .options import BATCH, NONE, RUNNING, Options
from .window import Window


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _select(
    backend: str, x: Tensor, wanted: torch.memory_format, shape: Any, window: Window, options: Options,
    residual: Any,
) -> Any:  # fmt: skip
    channels_last = wanted is torch.channels_last_3d
    return backends.select(
        backend, x.device, x.dtype, x.shape[1], tuple(shape), window, options, residual is not None,
        channels_last,
    )  # fmt: skip


def _by_onednn(tapes: bool, x: Tensor, options: Options, chosen: str) -> bool:
    """Whether a call is one convolution by oneDNN: evaluation on the CPU by backend "torch"."""
    return not tapes and options.norm != BATCH and chosen == "torch" and onednn.takes(x)


def forward(
    tapes, x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, window, options, backend
):  # fmt: skip
    """z, y, mean, invstd; y is empty where it is not kept, the last two without ``tapes`` or statistics.

    The passes run in the layout that the convolution chose for y: it is free, and ATen's channels-last statistics on
    the CPU lose two digits. z is laid out as promised but for that: on the CPU, where ATen's small convolutions answer
    channels-last input contiguously, z stays so where ATen computes it, as in the modules that this replaces.
    """
    wanted = memory_format(x, weight)
    output = (x.shape[0], window.filters(weight.shape), *window.output(x.shape[2:]))
    chosen = _select(backend, x, wanted, output, window, options, residual)
    by_onednn = _by_onednn(tapes, x, options, chosen.name)
    if by_onednn and x.shape[0]:  # first, for most of a small call is its way through here
        z = onednn.forward(
            x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, window, options, wanted
        )  # fmt: skip
        return z, None, None, None
    promised = by_onednn or not x.is_cpu
    if options.norm == BATCH and not options.group and output[0] * _volume(output) == 1:
        raise ValueError(
            "conv3d_bn_act: expected more than 1 value per channel for batch statistics, "
            f"got a convolution output of {output}"
        )
    if output[0] * output[1] == 0:
        z, *rest = _empty(x, weight, bias, bn_weight, running_mean, running_var, window, options)
        return z.contiguous(memory_format=wanted) if promised else z, *rest
    impl, mean, invstd = chosen.impl, None, None
    if options.keeps_y and (tapes or options.norm == BATCH):
        if options.norm == NONE:
            bias, bn_bias = None, bias
        z, y, mean, invstd = impl.forward(
            x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, window, options
        )  # fmt: skip
    else:
        y = None
        z = impl.fused(
            x, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, window, options,
            wanted, tapes,
        )  # fmt: skip
        if tapes and options.norm == RUNNING:
            wide = _statistics_dtype(x)
            mean, invstd = reference.frozen(bias, running_mean, running_var, options.eps, wide)
    if promised:
        z = z.contiguous(memory_format=wanted)
    if not tapes:
        return z, None, None, None
    none = x.new_empty(0)
    return (
        z,
        none if y is None else y,
        none if mean is None else mean,
        none if mean is None else invstd,
    )


def is_composed(
    tensors: Sequence[Tensor | None], shape: Sequence[int], window: Window, options: Options, backend: str
) -> bool:  # fmt: skip
    """Whether autograd's own way through ATen's ops gives what :func:`forward` and :func:`backward` do on the CPU and
    keeps no more: then it is taken, for it costs a fraction on the host.
    """
    x, weight, bias, _, *vectors = tensors
    assert x is not None and weight is not None
    linked = (
        bias is None or vectors[1] is not None
    )  # a bias before batch statistics, to the graph: see stock.composed
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and options.activation in ("", "relu")
        and (options.norm == NONE or (options.norm == BATCH and linked))
        and not options.group
        and all(v is None or v.dtype is x.dtype for v in vectors)
        and window.symmetric
        and not convolution.is_misread(x, window)
        and shape[1] > 0
        and shape[0] * _volume(shape) > 1
        and not _hooked()
        # By itself the CPU takes no other.
        and backends.requested(backend, window, options) in ("", "torch")
    )


def _hooked() -> bool:
    """Whether somebody packs saved tensors: ``save_memory()``, or a checkpoint, which has to find the same ones again
    when it repeats the call, even if a profiler or a mode has gone by then.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def remember(
    call: tuple[Hashable, ...], tensors: Sequence[Tensor | None], shape: Sequence[int], window: Window,
    options: Options, backend: str,
) -> None:  # fmt: skip
    """A call without tapes that gave a z of ``shape``, for :func:`onednn.again` if oneDNN made it."""
    x, weight, _, residual, *_ = tensors
    assert x is not None and weight is not None
    wanted = memory_format(x, weight)
    chosen = _select(backend, x, wanted, shape, window, options, residual)
    if _by_onednn(False, x, options, chosen.name):
        onednn.remember(call, tensors, window, options, wanted)


def _volume(shape: Any) -> int:
    n = 1
    for size in shape[2:]:
        n = n * size
    return n


def _empty(x, weight, bias, bn_weight, running_mean, running_var, window, options):
    """Of a call without values, which a group's other ranks may wait for."""
    y = convolve(x, weight, window)
    wide, none = _statistics_dtype(x), x.new_empty(0)
    mean = y.new_zeros(y.shape[1], dtype=wide)
    invstd = torch.ones_like(mean)
    if options.norm == BATCH and options.group:
        mean, variance, n = sync.merge(mean, torch.zeros_like(mean), 0, options.group)
        if running_mean is not None:
            seen = mean if bias is None else mean + bias
            reference.update_running(running_mean, running_var, seen, variance, n, options.momentum)
        invstd = torch.rsqrt(variance + options.eps)
    if options.norm == NONE:
        mean, invstd = none, none
    return torch.empty_like(y), y if options.keeps_y else none, mean, invstd


def backward(
    dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, window, options, needs, backend
):  # fmt: skip
    """dx, dweight, dbias, dresidual, dbn_weight, dbn_bias for ``needs``; empty tensors where not needed."""
    if dz.numel() == 0:
        found = _empty_backward(dz, x, weight, mean, bias, bn_weight, bn_bias, options)
    else:
        wanted = memory_format(x, weight)
        impl = _select(backend, x, wanted, dz.shape, window, options, residual).impl
        if mean.numel() == 0:
            mean = invstd = None
        way = _backward_with_y if options.keeps_y else _backward_without_y
        found = way(
            impl, dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, window, options, needs
        )  # fmt: skip
    promised = _promises_gradients(x, window, options, backend)
    return tuple(
        x.new_empty(0) if g is None or not n else _laid_out(g, x, weight, promised)
        for g, n in zip(found, needs, strict=True)
    )


def _backward_with_y(
    impl, dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, window, options, needs
):  # fmt: skip
    needs_dx, needs_dw, needs_dbias, needs_dresidual, needs_dbn_weight, needs_dbn_bias = needs
    own, batch = layout(y), options.norm == BATCH
    if options.norm == NONE:
        bn_bias, needs_dbn_bias = bias, needs_dbias
    # Batch statistics take any bias away again: its gradient is exactly zero.
    sums_bias = needs_dbias and options.norm == RUNNING
    needs_dy = needs_dx or needs_dw or sums_bias
    dy, dresidual, dbn_weight, dbn_bias = impl.backward(
        dz.contiguous(memory_format=own), y, _like(z, own), _like(residual, own), mean, invstd, bn_weight,
        bn_bias, options, (needs_dy, needs_dresidual, needs_dbn_weight, needs_dbn_bias),
    )  # fmt: skip
    dx = dw = dbias = None
    if needs_dy:
        dx, dw, dbias = impl.convolve_backward(
            dy, x, weight, window, (needs_dx, needs_dw, sums_bias)
        )
    if options.norm == NONE:
        dbias, dbn_bias = dbn_bias, None
    elif needs_dbias and batch:
        dbias = weight.new_zeros(window.filters(weight.shape))
    return dx, dw, dbias, dresidual, dbn_weight, dbn_bias


def _backward_without_y(
    impl, dz, x, weight, y, mean, invstd, z, residual, bias, bn_weight, bn_bias, window, options, needs
):  # fmt: skip
    own = layout(dz if z is None else z)
    dense = dz.contiguous(memory_format=own)
    da, sum_da = impl.masked(dense, z, options)
    return folded.backward(
        da,
        sum_da,
        x,
        weight,
        mean,
        invstd,
        bn_weight,
        bn_bias,
        window,
        needs,
        impl.convolve_backward,
    )


def _like(t: Tensor | None, own: torch.memory_format) -> Tensor | None:
    return None if t is None else t.contiguous(memory_format=own)


def _empty_backward(dz, x, weight, mean, bias, bn_weight, bn_bias, options):
    if options.norm == BATCH and options.group:
        sync.mean_of_sums(mean.new_zeros(2, mean.shape[0]), 0, options.group)
    like = (x, weight, bias, dz, bn_weight, bn_bias)
    return tuple(None if t is None else torch.zeros_like(t) for t in like)


def _promises_gradients(x: Tensor, window: Window, options: Options, backend: str) -> bool:
    """Whether gradients are in the result's layout: not where they are ATen's on the CPU."""
    return not x.is_cpu or backends.requested(backend, window, options) == "triton"


def _laid_out(g: Tensor, x: Tensor, weight: Tensor, promised: bool) -> Tensor:
    """A gradient in the result's layout, or as ATen gave it on the CPU."""
    if not promised or g.dim() != 5:
        return g
    return g.contiguous(memory_format=memory_format(x, weight))


def fake_forward(tapes, x, weight, residual, window, options, backend):
    """As :func:`forward`: y as ATen lays it out, z of the same sizes."""
    y = convolve(x, weight, window)
    if backends.requested(backend, window, options) == "triton":
        y = y.contiguous(memory_format=torch.channels_last_3d)
    z, wanted, promised = torch.empty_like(y), memory_format(x, weight), not x.is_cpu
    if x.is_cpu:
        chosen = _select(backend, x, wanted, y.shape, window, options, residual).name
        promised = _by_onednn(tapes, x, options, chosen)
    z = z.contiguous(memory_format=wanted) if promised else z
    none = x.new_empty(0)
    vector = none if options.norm == NONE else x.new_empty(y.shape[1], dtype=_statistics_dtype(x))
    return z, y if options.keeps_y else none, vector, torch.empty_like(vector)


def fake_backward(dz, x, weight, y, z, bias, bn_weight, bn_bias, window, options, needs, backend):
    """As :func:`backward`."""
    dy = y if options.keeps_y else z
    if dy is None:
        dy = dz.contiguous(memory_format=layout(dz))
    dx, dw, _ = convolution.gradients(dy, x, weight, window, (needs[0], needs[1], False))
    like = (dx, dw, bias, dy, bn_weight, bn_bias)
    promised = _promises_gradients(x, window, options, backend)
    return tuple(
        _laid_out(torch.empty_like(t), x, weight, promised)
        if n and t is not None
        else x.new_empty(0)
        for t, n in zip(like, needs, strict=True)
    )
