"""Host time of an op call above its kernels, on inputs so small that the kernels are almost free.

*Direct* is what no implementation can avoid: the same ATen ops, extension calls and Triton
launches, in the same order, on the same tensors, called from Python with nothing around them. The
overhead is the median over interleaved rounds of (op - direct); how far direct differs from itself
and the spread of the differences say how well it is known. The clock is the calling thread's CPU
time: what a call costs the host, whoever else uses the machine. On a GPU nothing is waited for
inside a sample. The gate: under 15 us for each call of an op, on a host where ``torch.add`` of two
small tensors takes 1.09 us; that same call is timed in the same rounds (``torch_add_us``), and a
slower host's limit (``gate_us``) grows with it.

Rows with gradients are reported and not gated: a Python ``autograd.Function`` of this many tensors
takes most of the limit by itself. ``backward`` runs ``torch.autograd.grad``; its direct call
includes one empty ``autograd.Function``, because entering the engine is autograd's price for any
op, and is reported on its own (``engine_us``). ``forward`` is above the bare kernels;
``function_us`` says what of it an empty ``autograd.Function`` costs.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels import _launches, _native
from sora_kernels.ops.lstm import lstm

from . import cases, timers

GATE, GATE_ADD = 15e-6, 1.09e-6
WORTH = 3e-6  # an overhead known less well than this is void
aten = torch.ops.aten


class Pair(NamedTuple):
    op: timers.Call
    direct: timers.Call


def conv3d_bn_act(mode: str, device: str, dtype: torch.dtype) -> Pair:
    x = torch.randn(2, 4, 2, 4, 4, device=device).to(dtype)
    if device == "cuda":  # where cuDNN keeps that layout; ATen's own small convolution does not
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(4, 4, 1, 1, 1, device=device).to(dtype).requires_grad_(mode != "inference")
    bn_weight, bn_bias = (
        torch.rand(4, device=device, requires_grad=mode != "inference") for _ in range(2)
    )
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    arguments = (x, weight, bn_weight, bn_bias, *running)
    convolution = ([1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1)

    def op() -> Tensor:
        return sk.conv3d_bn_act(*arguments, training=mode != "inference")

    if device == "cuda":
        return _from_launches(op, mode, (weight, bn_weight, bn_bias), x, convolution)

    def forward(training: bool) -> tuple[Tensor, ...]:
        y = torch.convolution(x, weight, None, *convolution)
        z, mean, invstd = torch.native_batch_norm(
            y, bn_weight, bn_bias, *running, training, 0.1, 1e-5
        )
        return z.relu_(), y, mean, invstd

    if mode == "inference":
        return Pair(_no_grad(op), _no_grad(lambda: forward(False)))
    if mode == "forward":
        return Pair(op, _no_grad(lambda: forward(True)))
    with torch.no_grad():
        z, y, mean, invstd = forward(True)
    dz = torch.randn_like(z)

    def backward() -> None:
        da = aten.threshold_backward.default(dz, z, 0)
        dy, _, _ = aten.native_batch_norm_backward.default(
            da, y, bn_weight, *running, mean, invstd, True, 1e-5, [True, True, True]
        )
        aten.convolution_backward.default(dy, x, weight, [0], *convolution, [False, True, False])

    return _backward_pair(op, (weight, bn_weight, bn_bias), dz, backward)


def lstm_layer(mode: str, device: str, dtype: torch.dtype) -> Pair:
    T, B, size = 4, 1, 16
    x = torch.randn(T, B, size, device=device).to(dtype)
    weights = [
        torch.randn(shape, device=device).to(dtype).requires_grad_(mode != "inference")
        for shape in ((4 * size, size), (4 * size, size), (4 * size,), (4 * size,))
    ]
    code, threads = {torch.float32: 0, torch.bfloat16: 3}[dtype], torch.get_num_threads()
    extension = _native.module()

    def op() -> Tensor:
        return lstm(x, None, weights, backend="native")[0]

    if device == "cuda":
        pytest.skip("not measured: the loop over steps on a GPU is bound by its launches")

    shape = (0, T, B, size, 0, 1, 0, 0, 0)
    w_hh, b_ih, b_hh = (w.data_ptr() for w in weights[1:])
    addresses = (w_hh, 0, b_ih, 0, b_hh, 0, *(0,) * 6)

    def forward(tapes: bool) -> tuple[Tensor, ...]:
        gates = torch.mm(x.flatten(0, 1), weights[0].t())
        y, h_n, c_n = x.new_empty(T, B, size), x.new_empty(1, B, size), x.new_empty(1, B, size)
        cells = x.new_empty(T, B, size) if tapes else None
        extension.lstm_forward_cpu(
            code, shape, gates.data_ptr(), 4 * size, addresses, 0, 0,
            gates.data_ptr() if tapes else 0, y.data_ptr(),
            0 if cells is None else cells.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), threads,
        )  # fmt: skip
        return y, cells, gates

    if mode == "inference":
        return Pair(_no_grad(op), _no_grad(lambda: forward(False)))
    if mode == "forward":
        return Pair(op, _no_grad(lambda: forward(True)))
    with torch.no_grad():
        y, cells, gates = forward(True)
    dy = torch.randn_like(y)

    def backward() -> None:
        dgates = torch.empty_like(gates)
        dh0, dc0 = x.new_empty(1, B, size), x.new_empty(1, B, size)
        extension.lstm_backward_cpu(
            code, shape, gates.data_ptr(), cells.data_ptr(), y.data_ptr(), addresses, 0, 0,
            dy.data_ptr(), 0, 0, 0, dgates.data_ptr(), 0, dh0.data_ptr(), dc0.data_ptr(), threads,
        )  # fmt: skip
        turned = dgates.t()
        torch.mm(turned, x.view(T * B, size))
        torch.mm(turned[:, B:], y[:-1].view((T - 1) * B, size))
        dgates.sum(0).clone()  # db_ih and db_hh are two tensors

    return _backward_pair(op, weights, dy, backward)


def _from_launches(
    op: timers.Call, mode: str, wanted: Any, x: Tensor, convolution: tuple[Any, ...]
) -> Pair:
    """GPU: direct is the convolution and the Triton launches that the call was seen to make."""
    op()
    weight = wanted[0]
    if mode == "backward":
        z = op()
        dz = torch.randn_like(z)
        torch.autograd.grad(z, wanted, dz, retain_graph=True)
        with _launches.record() as launches:
            torch.autograd.grad(z, wanted, dz, retain_graph=True)

        def backward() -> None:
            for launch in launches:
                launch()
            aten.convolution_backward.default(
                dz, x, weight, [0], *convolution, [False, True, False]
            )

        return _backward_pair(op, wanted, dz, backward)
    with _launches.record() as launches, torch.set_grad_enabled(mode == "forward"):
        op()

    def forward() -> None:
        torch.convolution(x, weight, None, *convolution)
        for launch in launches:
            launch()

    return Pair(op if mode == "forward" else _no_grad(op), _no_grad(forward))


class _Empty(torch.autograd.Function):
    """One node that does nothing: what it costs to enter the engine."""

    @staticmethod
    def forward(ctx: Any, work: Callable[[], Any] | None, out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.work, ctx.count = work, len(inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, ...]:
        if ctx.work is not None:
            ctx.work()
        return (None,) * (2 + ctx.count)


def _backward_pair(op: timers.Call, wanted: Any, grad: Tensor, work: timers.Call) -> Pair:
    out = op()
    empty = _Empty.apply(work, out.detach(), *wanted)

    def ours() -> Any:
        return torch.autograd.grad(out, wanted, grad, retain_graph=True)

    def direct() -> Any:
        return torch.autograd.grad(empty, wanted, grad, retain_graph=True, allow_unused=True)

    return Pair(ours, direct)


def _no_grad(call: timers.Call) -> timers.Call:
    def quiet() -> Any:
        with torch.no_grad():
            return call()

    return quiet


OPS = {"conv3d_bn_act": conv3d_bn_act, "lstm": lstm_layer}


@pytest.mark.parametrize("mode", ["inference", "forward", "backward"])
@pytest.mark.parametrize("op", OPS)
def test_host_overhead(benchmark, pytestconfig, op, mode, device, dtype, tiny):
    if op == "lstm" and not _native.status().ok:
        pytest.skip(f"not measured: {_native.status().why}")
    pair = OPS[op](mode, device, cases.DTYPES[dtype])
    benchmark.group = f"host_overhead/{op}/{mode}/{device}/{dtype}"
    if tiny:
        pair.direct()
        benchmark(pair.op)
        return
    timer = timers.wall(time.thread_time)
    if device == "cuda":
        timer = _enqueue(timer)
    small = torch.ones(8, 8, device=device)
    providers = {"direct": pair.direct, "op": pair.op, "add": lambda: torch.add(small, small)}
    calls = dict.fromkeys(providers, timers.calls_for(pair.op, timer))
    attempts = 0
    while attempts < 5:
        attempts += 1
        found = timers.measure(
            providers, "direct", timer=timer, attempts=1, calls=calls,
            rounds=pytestconfig.getoption("rounds"),
        )  # fmt: skip
        rounds = list(zip(found.samples["op"], found.samples["direct"], found.again, strict=True))
        differences = [op - (first + again) / 2 for op, first, again in rounds]
        overhead = statistics.median(differences)
        low, _, high = statistics.quantiles(differences, n=4)
        # Direct against itself, and the notch of a box plot: the median's 95 % interval, about.
        bias = statistics.median(again - first for _, first, again in rounds)
        worth = abs(bias) + 1.57 * (high - low) / len(rounds) ** 0.5
        if worth < WORTH:
            break
    void = "" if worth < WORTH else f"known to {worth * 1e6:.1f} us only"
    add = statistics.median(found.samples["add"])
    gate = GATE * max(1.0, add / GATE_ADD)
    benchmark.extra_info.update(
        op=op, mode=mode, device=device, dtype=dtype, overhead_us=round(overhead * 1e6, 2),
        gate_us=round(gate * 1e6, 2), torch_add_us=round(add * 1e6, 2), gated=mode == "inference",
        direct_us=round(statistics.median(found.again) * 1e6, 2),
        known_to_us=round(worth * 1e6, 2), void=void, attempts=attempts, method="CPU time of the thread",
    )  # fmt: skip
    if mode == "backward":
        benchmark.extra_info["engine_us"] = round(_engine(timer) * 1e6, 2)
    if mode == "forward":
        benchmark.extra_info["function_us"] = round(_function(timer) * 1e6, 2)
    timers.inject(benchmark, found.samples["op"], calls["op"])
    if void:
        pytest.skip(f"void: {void}")
    if mode != "inference":
        return
    said = f"{overhead * 1e6:.1f} us above its kernels, the limit is {gate * 1e6:.1f}"
    assert overhead < gate, f"{op}, {mode}: {said}"


def _enqueue(timer: timers.Timer) -> timers.Timer:
    """Host time of queueing alone: the device is idle before and waited for after."""

    def timed(call: timers.Call, times: int) -> float:
        torch.cuda.synchronize()
        return timer(call, min(times, 100)) * times / min(times, 100)

    return timed


@functools.cache
def _engine(timer: timers.Timer) -> float:
    """Seconds of ``torch.autograd.grad`` through one node that does nothing."""
    leaf = torch.zeros(1, requires_grad=True)
    out, grad = _Empty.apply(None, leaf.detach(), leaf), torch.ones(1)

    def call() -> Any:
        return torch.autograd.grad(out, leaf, grad, retain_graph=True, allow_unused=True)

    times = timers.calls_for(call, timer)
    return statistics.median(timer(call, times) / times for _ in range(15))


@functools.cache
def _function(timer: timers.Timer) -> float:
    """Seconds of entering an ``autograd.Function`` of four inputs that saves nothing."""
    leaves = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    out = torch.zeros(1)

    def call() -> Any:
        return _Empty.apply(None, out, *leaves)

    times = timers.calls_for(call, timer)
    return statistics.median(timer(call, times) / times for _ in range(15))
