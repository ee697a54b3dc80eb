"""The registered ops: opcheck, compile without recompiling, export, meta, raw calls."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from sora_kernels import BackendError
from sora_kernels.ops.lstm import stack
from sora_kernels.ops.lstm.cells import CELLS
from sora_kernels.testing import assert_close

NATIVE = pytest.param("native", marks=pytest.mark.native)
KERNELS = (NATIVE, "reference")
LENGTHS = torch.tensor([3, 0, 5])


@pytest.fixture(autouse=True)
def _no_compiled_code():
    """Dynamo counts recompilations by code object, and these tests share theirs."""
    torch._dynamo.reset()


def ops(kind):
    """Inference, forward with tapes (the same for RNN), backward."""
    space = torch.ops.sora_kernels
    plain = getattr(space, kind).default
    fwd = plain if kind.startswith("rnn") else getattr(space, kind + "_fwd").default
    return plain, fwd, getattr(space, kind + "_bwd").default


def arguments(call, backend, **options):
    """Of the inference op."""
    x, hx, weights = call.split()
    states = hx if call.cell.has_c else (hx,)
    ragged = (call.batch_sizes, options.get("lengths"), options.get("reset"))
    return (x, *states, weights, *ragged, call.options["bias"], "", backend)


RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
OPS = {
    "both": ({"bidirectional": True, "bias": False}, {"lengths": LENGTHS, "reset": RESET}),
    "packed": ({"packed": [5, 4, 2]}, {}),
}


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param("both", "native", marks=pytest.mark.native),
        pytest.param("packed", "native", marks=pytest.mark.native),
        ("packed", "reference"),
    ],
)
def test_opcheck(recurrent, kind, case, backend):
    plain, fwd, bwd = ops(kind)
    shape, ragged = OPS[case]
    call = recurrent(kind, **shape)
    given = arguments(call, backend, **ragged)
    torch.library.opcheck(plain, given)
    torch.library.opcheck(fwd, given)
    has_c, states, count = call.cell.has_c, 1 + call.cell.has_c, len(call.inputs)
    inputs, bias = given[: states + 5], call.options["bias"]
    outputs = fwd(*given)
    y, tapes = outputs[0], outputs[1 + states :]
    # Of y alone, of cells too, and with the tapes made again.
    grads = (y, None, None, tapes[0]) if has_c else (y, None)
    few = [False, True] + [False] * (count - 2)
    end = (bias, few, "", backend)
    torch.library.opcheck(bwd, (*grads, *inputs, y, *tapes, *end))
    grads = (y, None, None, None) if has_c else (y, None)
    end = (bias, [True] * count, "", backend)
    torch.library.opcheck(bwd, (*grads, *inputs, y, *(None for _ in tapes), *end))


def test_opcheck_of_a_strided_input(recurrent, kind):
    call = recurrent(kind)
    call.inputs["x"] = call.inputs["x"].permute(1, 0, 2).contiguous().permute(1, 0, 2)
    torch.library.opcheck(ops(kind)[1], arguments(call, "reference"))


def test_packed_op_needs_its_states(recurrent, kind):
    call = recurrent(kind, packed=[5, 4, 2])
    given = list(arguments(call, "reference"))
    given[1] = None
    with pytest.raises(ValueError, match="h0: expected a tensor beside batch_sizes, got None"):
        ops(kind)[0](*given)


def counting_backend(counted):
    def count(graph, _):
        counted.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count)


COMPILED = [
    *((kind, False, {"layers": 2}) for kind in ("lstm", "gru")),
    *((kind, True, {"bidirectional": True, "memory": "recompute"}) for kind in CELLS),
]


@pytest.mark.parametrize(("kind", "ragged", "options"), COMPILED)
def test_compile_fullgraph_without_recompiling(recurrent, kind, ragged, options):
    graphs = []
    call = recurrent(kind, **options)
    keys = list(call.inputs)

    def step(lengths, *leaves):
        given = dict(zip(keys, leaves, strict=True))
        found = call.call(given, lengths=lengths)
        return sum(o.square().sum() for o in found)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting_backend(graphs))
    for T, B in ((5, 3), (7, 4), (9, 2)):
        lengths = torch.randint(0, T + 1, (B,)) if ragged else None
        sized = {"x": torch.randn(T, B, 4)}
        for name in ("h_0", "c_0"):
            if name in keys:
                sized[name] = torch.randn(len(call.inputs[name]), B, 6)
        leaves = [t.detach().requires_grad_() for t in ({**call.inputs, **sized}).values()]
        ours = torch.autograd.grad(compiled(lengths, *leaves), leaves)
        plain = torch.autograd.grad(step(lengths, *leaves), leaves)
        for a, b in zip(ours, plain, strict=True):
            assert_close(a, b, "composition_fp32")
    assert len(graphs) == 2  # one forward, one backward


def test_compile_dropout(recurrent):
    """Between layers, in the same graph: the seed is drawn there, at every call."""
    graphs, call = [], recurrent("gru", layers=2, H=32, dropout=0.5, training=True)
    call.inputs |= {k: t.requires_grad_() for k, t in call.inputs.items()}

    def step(inputs):
        return call.call(inputs, backend="reference")[0]

    compiled = torch.compile(step, fullgraph=True, backend=counting_backend(graphs))
    torch.manual_seed(3)
    first, second = compiled(call.inputs), compiled(call.inputs)
    torch.manual_seed(3)
    assert_close(first, compiled(call.inputs), "composition_fp32")
    assert not torch.equal(first, second)
    first.sum().backward()
    assert len(graphs) == 2


@pytest.mark.parametrize("backend", KERNELS)
def test_compile_cells(recurrent, backend):
    call = recurrent("lstm", return_cells=True, reset=torch.rand(5, 3) < 0.4)
    keys = list(call.inputs)

    def step(*leaves):
        return call.call(dict(zip(keys, leaves, strict=True)), backend=backend)[3].sin().sum()

    leaves = [t.requires_grad_() for t in call.inputs.values()]
    compiled = torch.compile(step, fullgraph=True, backend=counting_backend([]))
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(ours, torch.autograd.grad(step(*leaves), leaves), strict=True):
        assert_close(a, b, "composition_fp32")


@pytest.mark.native
@pytest.mark.parametrize("kind", ("lstm", "rnn_tanh"))
def test_compile_inductor(recurrent, kind):
    call = recurrent(kind)
    compiled = torch.compile(call.call, fullgraph=True)
    with torch.no_grad():
        for ours, plain in zip(compiled(call.inputs), call.call(), strict=True):
            assert_close(ours, plain, "composition_fp32")


@pytest.mark.parametrize("with_lengths", (False, True), ids=("dense", "lengths"))
def test_export_dynamic(recurrent, kind, with_lengths):
    call = recurrent(kind, states=False)

    class Module(torch.nn.Module):
        def forward(self, x, lengths):
            return call.call({**call.inputs, "x": x}, lengths=lengths)[0]

    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    lengths = torch.tensor([5, 0, 3]) if with_lengths else None
    dims = ({0: T, 1: B}, {0: B} if with_lengths else None)
    program = torch.export.export(Module(), (call.inputs["x"], lengths), dynamic_shapes=dims)
    assert any(node.target is ops(kind)[0] for node in program.graph.nodes)
    x, other = torch.randn(8, 2, 4), torch.tensor([8, 2]) if with_lengths else None
    assert torch.equal(program.module()(x, other), Module()(x, other))


def test_compiled_training_refuses_torch(recurrent):
    for kind in ("lstm", "gru"):
        call = recurrent(kind)
        leaves = {k: t.requires_grad_() for k, t in call.inputs.items()}
        compiled = torch.compile(call.call, backend="aot_eager")
        with pytest.raises(BackendError, match="keeps no gates"):
            compiled(leaves, backend="torch")


@pytest.mark.parametrize("kind", ("lstm", "gru", "rnn_tanh", "rnn_relu"))
def test_compiled_training_recomputes_in_torch(recurrent, kind):
    """Without tapes torch's layer has a backward op: it runs again under autograd."""
    call = recurrent(kind, memory="recompute", lengths=LENGTHS, bidirectional=True)
    leaves = {k: t.requires_grad_() for k, t in call.inputs.items()}
    compiled = torch.compile(call.call, backend="aot_eager", fullgraph=True)
    outputs = compiled(leaves, backend="torch")
    grads = call.output_grads(outputs)
    ours = torch.autograd.grad(outputs, list(leaves.values()), grads)
    plain = call.run(backend="torch")
    for name, a in zip(leaves, ours, strict=True):
        assert_close(a, plain[f"d{name}"], "composition_fp32", name=name)


@pytest.mark.parametrize("backend", (NATIVE, "torch", "reference"))
def test_raw_op_under_grad_mode(recurrent, kind, backend):
    """The op has the gradients of the public function."""
    call = recurrent(kind)
    want = call.run(backend=backend)
    with torch.no_grad():
        alone = ops(kind)[0](*arguments(call, backend))
    leaves = [t.requires_grad_() for t in call.inputs.values()]
    found = ops(kind)[0](*arguments(call, backend))
    assert all(torch.equal(ours, other) for ours, other in zip(found, alone, strict=True))
    grads = torch.autograd.grad(found, leaves, call.output_grads(found))
    for name, g in zip(call.inputs, grads, strict=True):
        assert torch.equal(g, want[f"d{name}"])


def test_raw_op_chooses_for_itself(recurrent, kind):
    """The empty name is the automatic choice, and SORA_BACKEND is read."""
    call = recurrent(kind, dtype=torch.float64)
    found = ops(kind)[0](*arguments(call, ""))
    for ours, plain in zip(found, call.call(backend="reference"), strict=True):
        assert_close(ours, plain, "transform_fp64")


def test_meta(recurrent, kind):
    call = recurrent(kind, layers=2, bidirectional=True)
    found = call.call({k: t.to("meta") for k, t in call.inputs.items()})
    for ours, real in zip(found, call.call(), strict=True):
        assert ours.is_meta and ours.shape == real.shape and ours.dtype == real.dtype


def test_fake_tensors(recurrent, kind):
    call = recurrent(kind, packed=[5, 4, 2], bidirectional=True)
    with torch._subclasses.FakeTensorMode() as mode:
        x, *given = arguments(call, "reference")
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (x, *given)]
        fake = [[mode.from_tensor(w) for w in a] if isinstance(a, list) else a for a in fake]
        found = ops(kind)[1](*fake)
    for ours, real in zip(found, ops(kind)[1](x, *given), strict=True):
        assert ours.shape == real.shape and ours.dtype == real.dtype


def test_compile_packed_without_recompiling(recurrent, kind):
    """Another number of steps, rows and values in one graph, given the states."""
    graphs, call = [], recurrent(kind, packed=[5, 4, 2])

    def step(batch_sizes, x, *leaves):
        found = stack.run(
            call.cell, x, leaves[:states], leaves[states:], True, 1, False, False, 0, 0.0, True,
            batch_sizes=batch_sizes,
        )  # fmt: skip
        return found[0].square().sum() + found[1][0].sum()

    states = 1 + call.cell.has_c
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting_backend(graphs))
    for lengths in ([5, 4, 2], [7, 7, 3, 1], [2, 1]):
        other = recurrent(kind, T=lengths[0], B=len(lengths), packed=lengths)
        leaves = [t.requires_grad_() for t in other.inputs.values()]
        ours = torch.autograd.grad(compiled(other.batch_sizes, *leaves), leaves)
        plain = torch.autograd.grad(step(other.batch_sizes, *leaves), leaves)
        for a, b in zip(ours, plain, strict=True):
            assert_close(a, b, "composition_fp32")
    assert len(graphs) == 2
