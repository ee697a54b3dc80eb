"""The C++ kernels: threads, instruction sets, errors, and the cell that the GPU shares."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from sora_kernels import _native
from sora_kernels.ops.lstm import native, reference
from sora_kernels.testing import assert_close, assert_within_2x

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def make(T, B, I, H, D, dtype):  # noqa: E741
    """x, h0, c0, weights of one layer."""
    module = torch.nn.LSTM(I, H, bidirectional=D == 2)
    weights = [p.detach().to(dtype) for p in module.parameters()]
    return torch.randn(T, B, I, dtype=dtype), *torch.randn(2, D, B, H, dtype=dtype), weights


def both_ways(arguments, dtype):
    """Outputs, tapes and gradients from the kernels."""
    x, h0, c0, weights = arguments
    result = native.forward(x, h0, c0, weights, True, True)
    grads = [torch.ones_like(t) for t in result[:4]]
    dx, dh0, dc0, dw = native.backward(
        *grads,
        x,
        h0,
        c0,
        weights,
        result.y,
        result.cells,
        result.gates,
        True,
        [True] * (3 + len(weights)),
    )
    return [*result, dx, dh0, dc0, *dw]


def reference_both_ways(arguments):
    x, h0, c0, weights = arguments
    result = reference.layer(x, h0, c0, weights, None, None, True)
    grads = [torch.ones_like(t) for t in result[:4]]
    dx, dh0, dc0, dw = reference.layer_backward(
        *grads, x, h0, c0, weights, None, None, result.y, result.cells, result.gates, True
    )
    return [*result, dx, dh0, dc0, *dw]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ("sequence", "steps"))
@pytest.mark.parametrize("D", (1, 2))
def test_both_ways_to_walk_the_steps(D, way, dtype, monkeypatch):
    monkeypatch.setattr(native, "_worth_packing", lambda T, B, H: way == "sequence")
    for T, B, I, H in ((4, 3, 5, 21), (1, 2, 3, 40), (3, 0, 2, 4)):  # noqa: E741
        arguments = make(T, B, I, H, D, dtype)
        x, h0, c0, weights = arguments
        truth = reference_both_ways(
            (x.double(), h0.double(), c0.double(), [w.double() for w in weights])
        )
        plain, ours = reference_both_ways(arguments), both_ways(arguments, dtype)
        for k, (a, b, t) in enumerate(zip(ours, plain, truth, strict=True)):
            assert_within_2x(a, b, t, name=f"result {k}")


@pytest.mark.parametrize("way", ("sequence", "steps"))
def test_no_tapes_no_states_same_bits(way, monkeypatch):
    monkeypatch.setattr(native, "_worth_packing", lambda T, B, H: way == "sequence")
    x, h0, c0, weights = make(5, 3, 4, 21, 2, torch.float32)
    zero = torch.zeros_like(h0)
    with_tapes = native.forward(x, zero, zero, weights, True, True)
    without = native.forward(x, None, None, weights, True, False)
    assert len(without) == 3
    for a, b in zip(with_tapes[:3], without, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape", ((40, 16, 8, 64, 1), (30, 1, 8, 320, 1), (30, 2, 8, 320, 2), (40, 3, 8, 64, 2))
)
def test_threads_agree(shape):
    """Rows shared (no barrier), units shared (a barrier a step), directions shared."""
    arguments = make(*shape, torch.float64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both_ways(arguments, torch.float64))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close(b, a, "transform_fp64")


PROGRAM = """
import sys, torch
from sora_kernels import _native
from sora_kernels.ops.lstm import native
torch.set_num_threads(1)
assert _native.module().lstm_cpu_isa() == sys.argv[1], _native.module().lstm_cpu_isa()
torch.save([tuple(native.forward(*a, True, True)) for a in torch.load(sys.argv[2])], sys.argv[3])
"""


@pytest.mark.parametrize("isa", ("generic", "avx2"))
def test_each_instruction_set(isa, tmp_path):
    order = ("generic", "avx2", "avx512")
    best = _native.module().lstm_cpu_isa()
    if order.index(isa) > order.index(best):
        pytest.skip(f"this machine has no {isa}")
    inputs = [make(4, 5, 3, 37, 2, dtype) for dtype in DTYPES]
    torch.save(inputs, tmp_path / "in.pt")
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        isa,
        str(tmp_path / "in.pt"),
        str(tmp_path / "out.pt"),
    ]
    run = subprocess.run(
        command, env=os.environ | {"SORA_CPU_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    for arguments, found in zip(inputs, torch.load(tmp_path / "out.pt"), strict=True):
        x, h0, c0, weights = arguments
        truth = reference.layer(
            x.double(), h0.double(), c0.double(), [w.double() for w in weights], None, None, True
        )
        plain = reference.layer(*arguments, None, None, True)
        for a, b, t in zip(found, plain, truth, strict=True):
            assert_within_2x(a, b, t)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_activations(dtype):
    """sigmoid and tanh over their whole range, through the cell: i = sigmoid(a), g = tanh(a)."""
    a = torch.cat(
        (torch.linspace(-120, 120, 4001), torch.logspace(-30, 2, 500), -torch.logspace(-30, 2, 500))
    )
    a = torch.cat((a, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")]))).to(dtype)
    H = len(a)
    gates = a.repeat(1, 4)
    c, h, c_prev = torch.zeros(3, 1, H, dtype=dtype)
    _native.module().lstm_cell_forward(
        native.DTYPE_CODES[dtype], 1, H, gates.data_ptr(), c_prev.data_ptr(), H, c.data_ptr(), H,
        h.data_ptr(), H, -1, 0,
    )  # fmt: skip
    wide = a.double()
    i, _, g, _ = gates[0].chunk(4)
    assert_within_2x(i, torch.sigmoid(a), torch.sigmoid(wide), name="sigmoid")
    assert_within_2x(g, torch.tanh(a), torch.tanh(wide), name="tanh")
    small = (wide.abs() < 0.5) & (wide != 0)
    relative = (g[small].double() / torch.tanh(wide[small]) - 1).abs().max()
    # A relative bound, where 2x at the largest value says nothing.
    assert relative <= 4 * torch.finfo(dtype).eps


def test_errors():
    module = _native.module()
    with pytest.raises(RuntimeError, match="lstm_forward_cpu: no kernel for this element type"):
        module.lstm_forward_cpu(
            native.DTYPE_CODES[torch.float16], 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1
        )
    if _native.cuda_status().state == "absent" and _native.build_info()["cuda_runtime"] is None:
        with pytest.raises(RuntimeError, match="lstm_cell_forward: built without CUDA"):
            module.lstm_cell_forward(0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0)
    x, h0, c0, weights = make(3, 2, 4, 5, 1, torch.float32)
    with pytest.raises(
        ValueError, match="every tensor to be torch.float32 on cpu, got torch.float64"
    ):
        native.forward(x, h0.double(), c0, weights, True, False)


def test_the_gil_is_released():
    """Another Python thread gets on while one long call runs."""
    x, h0, c0, weights = make(400, 8, 8, 256, 1, torch.float32)
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.0005)
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    gates = torch.zeros(1, 400, 8, 1024)
    y, h_n, c_n = torch.empty(400, 8, 256), torch.empty(1, 8, 256), torch.empty(1, 8, 256)
    before = ticks
    _native.module().lstm_forward_cpu(
        0, 400, 8, 256, 1, gates.data_ptr(), weights[1].data_ptr(), 0, h0.data_ptr(), c0.data_ptr(),
        y.data_ptr(), 0, h_n.data_ptr(), c_n.data_ptr(), 1,
    )  # fmt: skip
    during = ticks - before
    done.set()
    other.join()
    assert during >= 2
