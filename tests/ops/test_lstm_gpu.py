"""The recurrent kernels on a GPU: ``pytest -m gpu``. Without one, test_recurrent_steps.py runs the walk by
steps on the CPU, tests/native/test_lstm_resident.py the kernels that hold weights in registers in the
emulation.
"""

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
LENGTHS = torch.tensor([3, 0, 5])
RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
PACKED_RESET = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
CASES = {
    "both": {"bidirectional": True, "layers": 2},
    "no_states_no_bias": {"states": False, "bias": False, "bidirectional": True, "H": 17},
    "lengths": {"lengths": LENGTHS, "H": 20, "bidirectional": True},
    "packed": {"packed": [5, 4, 2], "H": 20, "bidirectional": True},
    "reset": {"reset": RESET, "bidirectional": True},
    "reset_lengths": {"reset": RESET, "lengths": LENGTHS, "bidirectional": True},
    "reset_packed": {"reset": PACKED_RESET, "packed": [5, 4, 2], "bidirectional": True},
    "recompute": {"memory": "recompute", "reset": RESET, "lengths": LENGTHS, "bidirectional": True},
    "recompute_packed": {"memory": "recompute", "packed": [5, 4, 2], "bidirectional": True},
    "wide": {"T": 20, "B": 33, "I": 64, "H": 130, "bidirectional": True},
}


def on_cuda(call):
    """A call of conftest.py's kind with its tensors moved; batch_sizes stay on the CPU, as in torch."""
    moved = call.with_inputs(**{name: t.cuda() for name, t in call.inputs.items()})
    given = {n: t.cuda() for n, t in call.options.items() if isinstance(t, torch.Tensor)}
    return moved.with_options(**given)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_cell_and_feature(recurrent, kind, case, dtype):
    on_cuda(recurrent(kind, dtype=dtype, **case)).check("native", "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_projection(recurrent, case, dtype):
    on_cuda(recurrent("lstm", proj=5, dtype=dtype, **case)).check("native", "reference")


def test_ieee_products(recurrent, kind):
    call = on_cuda(recurrent(kind, H=130, B=33, I=64, T=20, bidirectional=True))
    call.with_options(precision="ieee").check("native", "reference")


def test_tf32_products(recurrent, kind):
    """Weights in registers up to H = 64, a GEMM a step beyond."""
    for H in (17, 32, 64, 130):
        call = on_cuda(recurrent(kind, H=H, B=33, I=64, T=20, bidirectional=True))
        call.with_options(precision="tf32").check("native", "reference")


@pytest.mark.parametrize("H", [32, 64, 128, 96, 41])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_kernel_with_weights_in_registers(recurrent, kind, dtype, H):
    for case in ({}, {"lengths": LENGTHS, "reset": RESET}):
        call = on_cuda(recurrent(kind, dtype=dtype, H=H, bidirectional=True, **case))
        call.check("native", "reference")


def test_many_launches_and_two_streams(recurrent, kind):
    call = on_cuda(recurrent(kind, dtype=torch.bfloat16, H=64, B=16, bidirectional=True))
    expected = call.call(backend="native")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with torch.no_grad():
        torch.cuda.synchronize()
        for _ in range(5000):
            found = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(call.call(backend="native"))
        torch.cuda.synchronize()
    for each in found:
        for a, b in zip(each, expected, strict=True):
            assert torch.equal(a, b)


def test_cudnn_gets_weights_in_one_piece(recwarn):
    """nn.RNNBase lays them out when the module moves; scattered ones are copied at every call, with a warning."""
    module = LSTM(16, 256, 2, backend="torch").cuda()
    module(torch.randn(5, 3, 16, device="cuda"))[0].sum().backward()
    assert not [w for w in recwarn if "contiguous chunk" in str(w.message)]


@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("proj", (0, 5))
def test_nothing_waits_for_the_gpu(recurrent, kind, proj, memory):
    if proj and kind != "lstm":
        pytest.skip("an LSTM alone has projections")
    for case in ("reset_lengths", "reset_packed"):
        call = on_cuda(recurrent(kind, proj=proj, memory=memory, **CASES[case]))
        leaves = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
        grads = call.output_grads(call.call(leaves, backend="native"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = call.call(leaves, backend="native")
            torch.autograd.grad(found, list(leaves.values()), grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_graph_serves_all_lengths_and_resets(recurrent, kind):
    call = on_cuda(recurrent(kind, **CASES["reset_lengths"]))
    lengths, reset = call.options["lengths"], call.options["reset"]
    with torch.no_grad():
        call.call(backend="native")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, *_ = call.call(backend="native")
        lengths.copy_(torch.tensor([5, 2, 1]))
        reset.logical_not_()
        graph.replay()
        assert torch.equal(y, call.call(backend="native")[0])


def test_same_bits_in_any_memory(recurrent, kind):
    for case in CASES.values():
        call = on_cuda(recurrent(kind, **case))
        first = call.run(backend="native")
        with poisoned():
            again = call.run(backend="native")
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("function", (sk.lstm, sk.gru, sk.rnn))
def test_which_backend_is_chosen(function):
    """Weights in registers, then cuDNN; steps where it cannot, and where bits must repeat."""
    kind = {sk.lstm: torch.nn.LSTM, sk.gru: torch.nn.GRU, sk.rnn: torch.nn.RNN}[function]
    weights = list(kind(4, 256, device="cuda").parameters())
    x = torch.randn(5, 3, 4, device="cuda")
    reset = torch.zeros(5, 3, dtype=torch.bool, device="cuda")
    lengths = torch.tensor([5, 0, 2], device="cuda")
    assert sk.explain(function, x, None, weights).chosen == "torch"
    assert sk.explain(function, x, None, weights, reset=reset).chosen == "native"
    assert sk.explain(function, x, None, weights, lengths=lengths).chosen == "native"
    small = [w.bfloat16() for w in kind(4, 128, device="cuda").parameters()]
    found = sk.explain(function, x.bfloat16(), None, small)
    assert found.chosen == "native" and "resident: " in str(found) and " registers" in str(found)
    try:
        torch.use_deterministic_algorithms(True)
        assert sk.explain(function, x, None, weights, lengths=lengths).chosen == "native"
    finally:
        torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize("ensemble", (True, False), ids=("ensemble", "samples"))
@pytest.mark.parametrize("H", (32, 130))  # in the registers of a CTA, and step by step
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_vmap(recurrent, kind, dtype, H, ensemble):
    """Gradients of each member: of layers with weights of their own, and of samples."""
    if kind == "rnn_relu":
        pytest.skip("gradients behind a kink: test_lstm_resident_members.py")
    torch.backends.cuda.matmul.allow_tf32 = dtype == torch.float32  # what the resident kernels are
    call = on_cuda(recurrent(kind, T=12, B=9, H=H, bidirectional=True, dtype=dtype))
    apart = [n for n in call.inputs if n.startswith(("weight", "bias") if ensemble else "x")]
    inputs = {
        n: torch.stack([t + 0.25 * torch.randn_like(t) for _ in range(3)]) if n in apart else t
        for n, t in call.inputs.items()
    }
    dims = {n: 0 if n in apart else None for n in inputs}

    def gradients(backend, call, inputs):
        def loss(inputs):
            return sum(t.double().square().sum() for t in call.call(inputs, backend=backend))

        found = torch.vmap(torch.func.grad(loss), (dims,))(inputs)
        return list(found.values())

    found, plain = (gradients(backend, call, inputs) for backend in ("native", "reference"))
    exact = {n: t.double() for n, t in inputs.items()}
    truth = gradients("reference", call.to(torch.float64), exact)
    for name, *three in zip(inputs, found, plain, truth, strict=True):
        assert_within_2x(*three, name=name)
