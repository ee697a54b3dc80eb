"""The cell kernel on a GPU: ``pytest -m gpu``. The CPU tests run its formulas, csrc/lstm/cell.h."""

from __future__ import annotations

import pytest
import torch

import sora_kernels as sk
from sora_kernels import _native
from sora_kernels.nn.lstm import LSTM
from sora_kernels.ops.lstm import lstm
from sora_kernels.testing import assert_within_2x, poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.native]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    (5, 3, 4, 6, 1),
    (4, 7, 16, 37, 2),
    (1, 1, 1, 1, 1),
    (3, 0, 2, 4, 1),
    (20, 33, 64, 130, 2),
)


@pytest.fixture(autouse=True)
def _cuda_part(monkeypatch):
    status = _native.cuda_status()
    assert status.state == "ok", status.why
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs_of(shape, dtype):
    T, B, I, H, D = shape  # noqa: E741
    module = torch.nn.LSTM(I, H, bidirectional=D == 2)
    states = torch.randn(2, D, B, H)
    tensors = (torch.randn(T, B, I), *states, *module.parameters())
    return [t.detach().to("cuda", dtype) for t in tensors]


def run(inputs, backend, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    x, h, c, *weights = leaves
    y, (h_n, c_n), *cells = lstm(
        x, (h, c), weights, bidirectional=len(weights) == 8, backend=backend, **options
    )
    outputs = (y, h_n, c_n, *cells)
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator, device="cuda").to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype):
    inputs = inputs_of(shape, dtype)
    truth = run([t.double() for t in inputs], "reference", return_cells=True)
    plain = run(inputs, "reference", return_cells=True)
    ours = run(inputs, "native", return_cells=True)
    for k, (a, b, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_within_2x(a, b, t, name=f"result {k}")


@pytest.mark.parametrize("function", (sk.gru, sk.rnn))
@pytest.mark.parametrize("ragged", (False, True), ids=("dense", "lengths"))
def test_gru_and_rnn_run_in_torch(function, ragged):
    """No CUDA kernels of ours yet: torch's layer by default, the reference where that cannot reset."""
    kind = torch.nn.GRU if function is sk.gru else torch.nn.RNN
    module = kind(4, 6, bidirectional=True, device="cuda")
    x = torch.randn(5, 3, 4, device="cuda", requires_grad=True)
    weights = list(module.parameters())
    lengths = torch.tensor([5, 0, 2], device="cuda") if ragged else None
    assert sk.explain(function, x, None, weights, bidirectional=True).chosen == "torch"

    def grads(dtype, **options):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
        y, h_n = function(
            leaves[0], None, leaves[1:], bidirectional=True, lengths=lengths, **options
        )
        return [y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.sum(), leaves)]

    truth = grads(torch.float64, backend="reference")
    plain = grads(torch.float32, backend="reference")
    for options in ({}, {"memory": "recompute"}):
        for a, b, t in zip(grads(torch.float32, **options), plain, truth, strict=True):
            assert_within_2x(a, b, t)
    reset = torch.zeros(5, 3, dtype=torch.bool, device="cuda")
    with_reset = grads(torch.float32, reset=reset)
    for a, b, t in zip(with_reset, plain, truth, strict=True):
        assert_within_2x(a, b, t)


def test_bitwise_repeatable_and_every_output_written():
    inputs = inputs_of(SHAPES[-1], torch.bfloat16)
    first, second = run(inputs, "native"), run(inputs, "native")
    with poisoned():
        third = run(inputs, "native")
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_current_stream():
    """The cell waits for work queued before it on the same, not the default, stream."""
    inputs = inputs_of(SHAPES[-1], torch.float32)
    expected = run(inputs, "native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(t) for t in inputs]
        torch.cuda._sleep(50_000_000)
        for to, source in zip(late, inputs, strict=True):
            to.copy_(source)
        found = run(late, "native")
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current():
    inputs = inputs_of(SHAPES[1], torch.float32)
    x, h, c, *weights = inputs
    here = lstm(x, (h, c), weights, bidirectional=True, backend="native")[0]
    x, h, c, *weights = [t.to("cuda:1") for t in inputs]
    there = lstm(x, (h, c), weights, bidirectional=True, backend="native")[0]
    assert torch.equal(here.cpu(), there.cpu()) and torch.cuda.current_device() == 0


def test_cuda_graph():
    inputs = inputs_of(SHAPES[1], torch.float32)
    x, h, c, *weights = inputs
    call = lambda: lstm(x, (h, c), weights, bidirectional=True, backend="native")[0]  # noqa: E731
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        x.normal_()
        graph.replay()
        assert torch.equal(y, call())


def test_precision_is_put_back():
    inputs = inputs_of(SHAPES[-1], torch.float32)
    with torch.no_grad():
        x, h, c, *weights = inputs
        for precision in ("tf32", "ieee"):
            lstm(x, (h, c), weights, bidirectional=True, backend="native", precision=precision)
            assert torch.backends.cuda.matmul.allow_tf32 is False


def test_module_and_compiled_training():
    module = LSTM(16, 32, 2, device="cuda", backend="native")
    x = torch.randn(5, 3, 16, device="cuda", requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    ours = torch.autograd.grad(compiled(x)[0].square().sum(), [x, *module.parameters()])
    eager = torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()])
    wide = LSTM(16, 32, 2, device="cuda", dtype=torch.float64, backend="reference")
    wide.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    x64 = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(wide(x64)[0].square().sum(), [x64, *wide.parameters()])
    for a, b, t in zip(ours, eager, truth, strict=True):
        assert_within_2x(a, b, t)
