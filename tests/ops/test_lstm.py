from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from sora_kernels import BackendError, explain
from sora_kernels.ops.lstm import lstm, reference
from sora_kernels.testing import assert_close, assert_within_2x, poisoned, tolerance

NATIVE = pytest.param("native", marks=pytest.mark.native)
KERNELS = (NATIVE, "reference")
BACKENDS = (NATIVE, "torch", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
INFERENCE = torch.ops.sora_kernels.lstm.default
FORWARD = torch.ops.sora_kernels.lstm_fwd.default
BACKWARD = torch.ops.sora_kernels.lstm_bwd.default


class Case(NamedTuple):
    """A shape and why it is here."""

    name: str
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 6
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_layers": self.layers,
            "bidirectional": self.bidirectional,
            "bias": self.bias,
            "proj_size": self.proj,
        }


DENSE = [
    Case("tiny"),
    Case("one_step", T=1),
    Case("one_unit", H=1, I=1, B=1),
    Case("vector_tail", T=4, B=7, I=9, H=37),  # the last block of units is not full
    Case("whole_blocks", T=3, B=13, I=16, H=64),
    Case("step_by_step", T=2, B=2, I=8, H=200),  # too few steps to pack w_hh
    Case("one_row", T=6, B=1, H=20),
    Case("bidirectional", bidirectional=True, H=18),
    Case("two_layers", layers=2, bidirectional=True),
    Case("no_bias", bias=False, bidirectional=True),
]
CASES = [
    *DENSE,
    Case("projected", proj=2),
    Case("projected_both", proj=3, bidirectional=True, layers=2, bias=False),
]


def names(cases: list[Case]) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [case.name for case in cases]}


def make(case: Case, dtype: torch.dtype = torch.float32, states: bool = True) -> dict[str, Tensor]:
    """Every input by name: x, h_0, c_0, then the weights of ``torch.nn.LSTM``."""
    module = torch.nn.LSTM(
        case.I,
        case.H,
        case.layers,
        case.bias,
        bidirectional=case.bidirectional,
        proj_size=case.proj,
    )
    count = case.layers * (1 + case.bidirectional)
    inputs = {"x": torch.randn(case.T, case.B, case.I)}
    if states:
        inputs["h_0"] = torch.randn(count, case.B, case.proj or case.H)
        inputs["c_0"] = torch.randn(count, case.B, case.H)
    inputs |= {name: p.detach().clone() for name, p in module.named_parameters()}
    return {name: t.to(dtype) for name, t in inputs.items()}


def split(inputs: dict[str, Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
    hx = (inputs["h_0"], inputs["c_0"]) if "h_0" in inputs else None
    return inputs["x"], hx, [t for n, t in inputs.items() if n not in ("x", "h_0", "c_0")]


def call(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    y, (h_n, c_n), *cells = lstm(*split(inputs), **options)
    return (y, h_n, c_n, *cells)


def run(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and every gradient by name, for fixed random output gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = call(leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = dict(zip(("y", "h_n", "c_n", "cells"), outputs, strict=False))
    return named | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", **names(DENSE))
def test_forward_and_gradients(case, backend, dtype):
    inputs = make(case, dtype)
    truth = run(double(inputs), backend="reference", **case.options)
    plain = run(inputs, backend="torch", **case.options)
    ours = run(inputs, backend=backend, **case.options)
    assert set(ours) == set(truth) and len(ours) == 3 + len(inputs)
    for name in ours:
        assert_within_2x(ours[name], plain[name], truth[name], name=name)


@pytest.mark.parametrize("case", **names(CASES))
def test_reference_equals_torch(case):
    inputs = make(case, torch.float64)
    ours = run(inputs, backend="reference", **case.options)
    stock = run(inputs, backend="torch", **case.options)
    for name in stock:
        assert_close(ours[name], stock[name], "transform_fp64", name=name)


RAGGED = [Case("plain"), Case("both", bidirectional=True, layers=2), Case("proj", proj=2)]


@pytest.mark.parametrize("case", **names(RAGGED))
def test_lengths(case):
    """Each row is what it is alone; y is zero past its length; an empty row keeps its state."""
    inputs, lengths = make(case, torch.float64), torch.tensor([3, 0, 5])
    found = run(inputs, backend="reference", lengths=lengths, **case.options)
    packed = run(inputs, backend="torch", lengths=lengths, **case.options)
    for name in found:
        assert_close(packed[name], found[name], "transform_fp64", name=name)
    for row, length in enumerate(lengths.tolist()):
        assert torch.count_nonzero(found["y"][length:, row]) == 0
        if length == 0:
            assert torch.equal(found["h_n"][:, row], inputs["h_0"][:, row])
            continue
        alone = dict(inputs, x=inputs["x"][:length, row : row + 1])
        alone |= {k: inputs[k][:, row : row + 1] for k in ("h_0", "c_0")}
        y, h_n, c_n = call(alone, backend="torch", **case.options)
        assert_close(found["y"][:length, row], y[:, 0], "transform_fp64")
        assert_close(found["h_n"][:, row], h_n[:, 0], "transform_fp64")
        assert_close(found["c_n"][:, row], c_n[:, 0], "transform_fp64")


@pytest.mark.parametrize("bidirectional", (False, True))
def test_reset_equals_separate_sequences(bidirectional):
    case = Case("reset", T=6, B=2, bidirectional=bidirectional)
    inputs = make(case, torch.float64, states=False)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2, 0] = reset[5, 0] = True
    y, *_ = call(inputs, reset=reset, **case.options)
    for row, borders in ((0, (0, 2, 5, 6)), (1, (0, 6))):
        for start, end in itertools.pairwise(borders):
            piece = dict(inputs, x=inputs["x"][start:end, row : row + 1])
            alone, *_ = call(piece, backend="torch", **case.options)
            assert_close(y[start:end, row], alone[:, 0], "transform_fp64")


LAYERS = [
    Case("plain"),
    Case("both", bidirectional=True),
    Case("proj", proj=2, bidirectional=True, bias=False),
]


@pytest.mark.parametrize("with_lengths", (False, True))
@pytest.mark.parametrize("with_reset", (False, True))
@pytest.mark.parametrize("case", **names(LAYERS))
def test_handwritten_backward_equals_autograd(case, with_reset, with_lengths):
    inputs = make(case, torch.float64)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    x, (h_0, c_0), weights = split(leaves)
    lengths = torch.tensor([3, 0, 5]) if with_lengths else None
    reset = torch.rand(case.T, case.B) < 0.4 if with_reset else None
    result = reference.layer(x, h_0, c_0, weights, lengths, reset, case.bias)
    grads = [torch.randn_like(t) for t in result[:4]]
    wanted = torch.autograd.grad(result[:4], list(leaves.values()), grads)
    with torch.no_grad():
        dx, dh0, dc0, dweights = reference.layer_backward(
            *grads,
            x,
            h_0,
            c_0,
            weights,
            lengths,
            reset,
            result.y,
            result.cells,
            result.gates,
            case.bias,
        )
    for name, ours, auto in zip(leaves, (dx, dh0, dc0, *dweights), wanted, strict=True):
        assert_close(ours, auto, "transform_fp64", name=f"d{name}")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells(backend, dtype):
    case = Case("cells", bidirectional=True, T=4, H=9)
    inputs = make(case, dtype)
    truth = run(double(inputs), backend="reference", return_cells=True, **case.options)
    ours = run(inputs, backend=backend, return_cells=True, **case.options)
    plain = run(inputs, backend="reference", return_cells=True, **case.options)
    for name in truth:
        assert_within_2x(ours[name], plain[name], truth[name], name=name)
    H = case.H
    assert torch.equal(ours["cells"][-1, :, :H], ours["c_n"][0])
    assert torch.equal(ours["cells"][0, :, H:], ours["c_n"][1])
    with torch.no_grad():
        assert torch.equal(
            call(inputs, backend=backend, return_cells=True, **case.options)[3], ours["cells"]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_first_and_no_states(backend):
    case = Case("no_states", bidirectional=True, layers=2)
    inputs = make(case, torch.float64, states=False)
    y, h_n, c_n = call(inputs, backend=backend, **case.options)
    zeros = dict(inputs, h_0=h_n * 0, c_0=c_n * 0)
    turned = call(
        dict(zeros, x=inputs["x"].transpose(0, 1)),
        batch_first=True,
        backend=backend,
        **case.options,
    )
    for ours, other in zip(turned, (y.transpose(0, 1), h_n, c_n), strict=True):
        assert_close(ours, other, "transform_fp64")
    run(inputs, backend=backend, **case.options)


SMALL = [Case("plain", T=3, H=3), Case("both", T=2, B=2, H=2, bidirectional=True)]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", **names(SMALL))
def test_gradcheck(case, backend):
    inputs = make(case, torch.float64)
    keys, leaves = list(inputs), [t.requires_grad_() for t in inputs.values()]

    def function(*tensors):
        given = dict(zip(keys, tensors, strict=True))
        return call(given, backend=backend, return_cells=True, **case.options)

    assert torch.autograd.gradcheck(function, leaves, atol=tolerance("gradcheck_fp64"))
    assert torch.autograd.gradgradcheck(
        function, leaves, atol=tolerance("gradcheck_fp64"), fast_mode=True
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward_equals_reference(backend):
    inputs = make(Case("double", H=5), torch.float64)

    def second(name):
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
        y, _, c_n = call(leaves, backend=name)
        first = torch.autograd.grad((y**2).sum() + c_n.sum(), leaves.values(), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves.values())

    for name, ours, other in zip(inputs, second(backend), second("reference"), strict=True):
        assert_close(ours, other, "transform_fp64", name=name)


@pytest.mark.parametrize("backend", KERNELS)
def test_needs_input_grad_subsets(backend):
    case = Case("needs", bidirectional=True)
    inputs = make(case, torch.float64)
    every = run(inputs, backend="reference", **case.options)
    for wanted in (
        ("x",),
        ("h_0",),
        ("c_0",),
        ("weight_hh_l0",),
        ("bias_hh_l0_reverse",),
        ("x", "bias_ih_l0"),
    ):
        leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in inputs.items()}
        outputs = call(leaves, backend=backend, **case.options)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).double() for o in outputs]
        torch.autograd.backward(outputs, grads)
        for name, leaf in leaves.items():
            if name in wanted:
                assert_close(leaf.grad, every[f"d{name}"], "transform_fp64", name=name)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("used", ("y", "h_n", "c_n", "cells"))
@pytest.mark.parametrize("backend", KERNELS)
def test_one_output_used(backend, used):
    inputs = make(Case("one_output"), torch.float64)
    at = ("y", "h_n", "c_n", "cells").index(used)

    def grads(name):
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
        return torch.autograd.grad(
            call(leaves, backend=name, return_cells=True)[at].sin().sum(), leaves.values()
        )

    for name, ours, other in zip(inputs, grads(backend), grads("reference"), strict=True):
        assert_close(ours, other, "transform_fp64", name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Strided, sliced and expanded inputs, and output gradients that are not contiguous."""
    case = Case("layouts", T=4, B=3, I=5, H=7)
    inputs = make(case, torch.float64)
    odd = dict(inputs)
    odd["x"] = torch.randn(5, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    odd["h_0"] = torch.randn(1, 7, 6, dtype=torch.float64).transpose(1, 2)[:, ::2]
    odd["c_0"] = torch.randn(1, 1, 7, dtype=torch.float64).expand(1, 3, 7)
    odd["weight_hh_l0"] = inputs["weight_hh_l0"].t().contiguous().t()
    odd["weight_ih_l0"] = torch.randn(28, 10, dtype=torch.float64)[:, ::2]
    plain = {name: t.contiguous() for name, t in odd.items()}

    def grads(given, name):
        leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
        y, h_n, _ = call(leaves, backend=name)
        weight = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(2)).double()
        return (
            y,
            *torch.autograd.grad((y.permute(2, 0, 1) * weight).sum() + h_n.sum(), leaves.values()),
        )

    for ours, other in zip(grads(odd, backend), grads(plain, "reference"), strict=True):
        assert_close(ours, other, "transform_fp64")


@pytest.mark.parametrize("backend", KERNELS)
def test_empty_batch(backend):
    case = Case("empty", B=0, bidirectional=True)
    found = run(make(case), backend=backend, **case.options)
    assert found["y"].shape == (5, 0, 12) and found["dx"].shape == (5, 0, 4)
    assert torch.count_nonzero(found["dweight_hh_l0"]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    inputs = make(Case("nan", H=20))
    inputs["x"][2, 1, 0] = float("nan")
    y, h_n, _ = call(inputs, backend=backend)
    assert y[2:, 1].isnan().all() and h_n[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any() and not y[:2].isnan().any()


@pytest.mark.parametrize("backend", KERNELS)
def test_saturation(backend):
    """Gates at infinity: 0, 1 and +-1, not NaN."""
    inputs = make(Case("large", H=20))
    for value in (1e4, -1e4, float("inf"), -float("inf")):
        inputs["bias_ih_l0"] = torch.full((80,), value)
        ours, wide = call(inputs, backend=backend), call(double(inputs), backend="reference")
        for a, b in zip(ours, wide, strict=True):
            assert_close(a, b.float(), "composition_fp32")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written(backend, dtype):
    for case in (Case("tail", H=19, bidirectional=True), Case("steps", T=2, H=200)):
        inputs = make(case, dtype)
        clean = run(inputs, backend=backend, **case.options)
        with poisoned():
            found = run(inputs, backend=backend, **case.options)
        for name in clean:
            assert torch.equal(found[name], clean[name]), name


@pytest.mark.native
@pytest.mark.parametrize("threads", (1, 2))
def test_bitwise_repeatable(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in (Case("rows", B=17, H=64, T=8), Case("units", B=1, H=300, T=6)):
            inputs = make(case)
            first, second = (run(inputs, backend="native") for _ in range(2))
            for name in first:
                assert torch.equal(first[name], second[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
def test_two_python_threads():
    cases = [make(Case("a", B=4, H=40, T=30)), make(Case("b", B=2, H=33, T=40))]
    expected = [run(inputs, backend="native") for inputs in cases]
    wrong: list[str] = []

    def work(k):
        for _ in range(5):
            found = run(cases[k], backend="native")
            wrong.extend(n for n in found if not torch.equal(found[n], expected[k][n]))

    workers = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def layer_arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, hx, weights = split(make(case, dtype))
    return (x, *(hx or (None, None)), weights)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    for case in (Case("one"), Case("both", bidirectional=True, bias=False)):
        x, h_0, c_0, weights = layer_arguments(case)
        arguments = (x, h_0, c_0, weights, None, None, case.bias, "", backend)
        torch.library.opcheck(INFERENCE, arguments)
        torch.library.opcheck(FORWARD, arguments)
        y, h_n, c_n, cells, gates = FORWARD(*arguments)
        torch.library.opcheck(FORWARD, (x.permute(1, 0, 2), None, None, *arguments[3:]))
        for needs in ([True] * (3 + len(weights)), [False, True] + [False] * (1 + len(weights))):
            inputs = (x, h_0, c_0, weights, None, None, y, cells, gates)
            torch.library.opcheck(
                BACKWARD, (y, h_n, None, cells, *inputs, case.bias, needs, "", backend)
            )


@pytest.mark.parametrize("backend", KERNELS)
def test_compile_fullgraph_without_recompiling(backend):
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return make_boxed_func(graph.forward)

    case = Case("compiled", layers=2, bidirectional=True)
    inputs = make(case)

    def step(x, h_0, c_0, *weights):
        y, (h_n, c_n) = lstm(x, (h_0, c_0), weights, backend=backend, **case.options)
        return y.square().sum() + h_n.sum() + c_n.sum()

    compiled = torch.compile(
        step, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count)
    )
    for T, B in ((5, 3), (7, 4), (9, 2)):
        state = torch.randn(4, B, case.H)
        given = dict(inputs, x=torch.randn(T, B, case.I), h_0=state, c_0=state)
        leaves = [t.detach().requires_grad_() for t in given.values()]
        ours = torch.autograd.grad(compiled(*leaves), leaves)
        plain = torch.autograd.grad(step(*leaves), leaves)
        for a, b in zip(ours, plain, strict=True):
            assert_close(a, b, "composition_fp32")
    assert graphs == 2  # one forward, one backward


@pytest.mark.native
def test_compile_inductor():
    inputs = make(Case("inductor"))
    compiled = torch.compile(call, fullgraph=True)
    with torch.no_grad():
        for ours, plain in zip(compiled(inputs), call(inputs), strict=True):
            assert_close(ours, plain, "composition_fp32")


def test_export_dynamic():
    inputs = make(Case("export"), states=False)

    class Module(torch.nn.Module):
        def forward(self, x):
            return lstm(x, None, split(inputs)[2])[0]

    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    program = torch.export.export(Module(), (inputs["x"],), dynamic_shapes=({0: T, 1: B},))
    assert any(node.target is INFERENCE for node in program.graph.nodes)
    x = torch.randn(8, 2, 4)
    assert torch.equal(program.module()(x), lstm(x, None, split(inputs)[2])[0])


def test_compiled_training_refuses_torch():
    inputs = {k: t.requires_grad_() for k, t in make(Case("tiny")).items()}
    compiled = torch.compile(call, backend="aot_eager")
    with pytest.raises(BackendError, match="keeps no gates"):
        compiled(inputs, backend="torch")


def transformed(name: str, function: Callable[..., Tensor], x: Tensor, tangent: Tensor) -> Any:
    if name == "vmap":
        return torch.vmap(function)(torch.stack((x, tangent)))
    if name == "grad":
        return torch.func.grad(lambda t: function(t).square().sum())(x)
    if name == "vmap_grad":
        return torch.vmap(torch.func.grad(lambda t: function(t).square().sum()))(
            torch.stack((x, tangent))
        )
    if name == "jvp":
        return torch.func.jvp(function, (x,), (tangent,))[1]
    if name == "hessian":
        return torch.func.hessian(lambda t: function(t).square().sum())(x)
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("transform", ("vmap", "grad", "vmap_grad", "jvp", "hessian", "forward_ad"))
@pytest.mark.parametrize("backend", (NATIVE, "torch", "reference", None))
def test_transforms_equal_the_reference(transform, backend):
    case = Case("transform", T=3, B=2, I=2, H=3, bidirectional=True)
    x, hx, weights = split(make(case, torch.float64))

    def function(t):
        y, (_, c_n) = lstm(t, hx, weights, backend=backend, **case.options)
        return torch.cat((y.flatten(), c_n.flatten()))

    def plain(t):
        result = reference.layer(t, *hx, weights, None, None, True)
        return torch.cat((result.y.flatten(), result.c_n.flatten()))

    tangent = torch.randn_like(x)
    ours = transformed(transform, function, x, tangent)
    assert_close(ours, transformed(transform, plain, x, tangent), "transform_fp64")


@pytest.mark.parametrize("backend", (NATIVE, "torch", "reference"))
def test_autocast(backend):
    case = Case("autocast", bidirectional=True)
    inputs = make(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, backend=backend, **case.options)
        wide = call(double(inputs), backend=backend, **case.options)
    rounded = run({k: t.bfloat16() for k, t in inputs.items()}, backend=backend, **case.options)
    for name in ("y", "h_n", "c_n"):
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], rounded[name])
    assert found["dx"].dtype == torch.float32 and wide[0].dtype == torch.float64


def test_dropout():
    case = Case("dropout", layers=3, T=4, B=8, H=8)
    inputs = make(case)
    for backend in ("reference", "torch"):
        evaluated = call(inputs, dropout=0.5, backend=backend, **case.options)[0]
        assert torch.equal(evaluated, call(inputs, backend=backend, **case.options)[0])
        trained = call(inputs, dropout=0.5, training=True, backend=backend, **case.options)[0]
        assert not torch.equal(evaluated, trained)
    torch.manual_seed(3)
    first = run(inputs, dropout=0.3, training=True, backend="reference", **case.options)
    torch.manual_seed(3)
    second = run(inputs, dropout=0.3, training=True, backend="reference", **case.options)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # All outputs of the first layer dropped: the second sees zeros.
    options = {"dropout": 1.0, "training": True, "backend": "reference", **case.options}
    changed = dict(inputs, x=inputs["x"] + 1)
    assert torch.equal(call(inputs, **options)[0], call(changed, **options)[0])


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 9),
    B=st.integers(0, 9),
    I=st.integers(1, 20),
    H=st.integers(1, 70),
    two=st.booleans(),
    bias=st.booleans(),
)
@pytest.mark.native
def test_random_sizes(T, B, I, H, two, bias):  # noqa: E741
    case = Case("random", T, B, I, H, bidirectional=two, bias=bias)
    inputs = make(case, torch.float64)
    ours = run(inputs, backend="native", **case.options)
    plain = run(inputs, backend="reference", **case.options)
    for name in plain:
        assert_close(ours[name], plain[name], "transform_fp64", name=name)


REFUSED = [
    ({"memory": "keep"}, "memory must be 'save' or 'recompute', got 'keep'"),
    ({"precision": "tf16"}, "precision must be None, 'tf32' or 'ieee', got 'tf16'"),
    ({"backend": "cudnn"}, "backend must be one of native, torch, reference or None, got 'cudnn'"),
    ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"num_layers": 2}, "weights must be 2 layers x 1 directions x 4 tensors .* got 4"),
    ({"proj_size": 6, "bias": False}, "weights must be 1 layers x 1 directions x 3 tensors"),
    ({"lengths": torch.tensor([1, 2])}, r"lengths must be int32 or int64 \[3\], got .* \(2,\)"),
    ({"lengths": torch.ones(3)}, r"lengths must be int32 or int64 \[3\], got torch.float32"),
    ({"reset": torch.zeros(5, 3)}, r"reset must be bool \(5, 3\) on cpu, got torch.float32"),
    ({"reset": torch.zeros(3, 5, dtype=torch.bool)}, r"reset must be bool \(5, 3\)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        call(make(Case("tiny")), **options)


def test_recompute_is_not_there_yet():
    with pytest.raises(NotImplementedError, match="memory='recompute' is not there yet"):
        call(make(Case("tiny")), memory="recompute")


BAD_TENSORS = [
    ("x", lambda t: t[0], r"x must be \[T, B, I\], got \(3, 4\)"),
    ("x", lambda t: t[:0], r"x must have at least one step, got \(0, 3, 4\)"),
    ("x", lambda t: t.int(), "x must be floating point, got torch.int32"),
    ("h_0", lambda t: t[:, :2], r"h_0 must be \(1, 3, 6\) torch.float32 on cpu, got \(1, 2, 6\)"),
    ("c_0", lambda t: t.double(), r"c_0 must be .* got \(1, 3, 6\) torch.float64"),
    ("c_0", lambda t: t.to("meta"), "c_0 must be .* on cpu, got .* on meta"),
    ("weight_ih_l0", lambda t: t[:, :3], r"weights\[0\] must be \(24, 4\) .* got \(24, 3\)"),
    ("weight_hh_l0", lambda t: t[:23], r"w_hh\) must be \[4\*H, H\], got \(23, 6\)"),
    ("bias_hh_l0", lambda t: t.half(), r"weights\[3\] must be .* got \(24,\) torch.float16"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_TENSORS)
def test_bad_tensors(name, change, message):
    inputs = make(Case("tiny"))
    with pytest.raises(ValueError, match=message):
        call(dict(inputs, **{name: change(inputs[name])}))


def test_backends_say_why():
    inputs = make(Case("tiny"))
    reset, lengths = torch.zeros(5, 3, dtype=torch.bool), torch.tensor([5, 3, 1])
    for backend, options, why in (
        ("native", {"lengths": lengths}, "lengths were given"),
        ("native", {"reset": reset}, "reset was given"),
        ("torch", {"reset": reset}, "torch's LSTM cannot reset"),
        ("torch", {"return_cells": True}, "return_cells is True"),
    ):
        with pytest.raises(BackendError, match=f"'{backend}' cannot run: .*{why}"):
            call(inputs, backend=backend, **options)
        rows = {row.backend: row for row in explain(lstm, *split(inputs), **options).rows}
        assert not rows[backend].usable and why in rows[backend].why
    half = {k: t.half() for k, t in inputs.items()}
    with pytest.raises(BackendError, match="torch.float16 on the CPU"):
        call(half, backend="native")
    projected = Case("p", proj=2)
    with pytest.raises(BackendError, match="proj_size is 2"):
        call(make(projected), backend="native", **projected.options)
    assert explain(lstm, *split(inputs), reset=reset).chosen == "reference"
    assert explain(lstm, *split(inputs), lengths=lengths).chosen == "torch"


def test_auto_choice_runs_everything():
    for case in CASES:
        inputs = make(case, torch.float64)
        ours, plain = run(inputs, **case.options), run(inputs, backend="reference", **case.options)
        for name in plain:
            assert_close(ours[name], plain[name], "transform_fp64", name=name)


def test_meta():
    inputs = {k: t.to("meta") for k, t in make(Case("meta", bidirectional=True)).items()}
    y, h_n, c_n = call(inputs, bidirectional=True)
    assert y.shape == (5, 3, 12) and h_n.shape == c_n.shape == (2, 3, 6) and y.is_meta
