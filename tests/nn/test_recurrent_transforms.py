"""Compiling, exporting and ``torch.func`` over ``sk.nn.LSTM``, ``GRU`` and ``RNN``: what torch's modules refuse."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import sora_kernels as sk
from sora_kernels.testing import assert_close, assert_within_2x

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def inputs(T=5, B=3, batch_first=False, dtype=torch.float64):
    shape = (B, T, 4) if batch_first else (T, B, 4)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


COMPILED = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3, "bidirectional": True, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("RNN_TANH", {"bias": False, "batch_first": True, "num_layers": 2}),
    ("RNN_RELU", {}),
]


@pytest.mark.parametrize("case", COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
def test_one_graph_for_every_length_and_batch(case, training):
    kind, options = case
    torch._dynamo.reset()
    ours, _ = kind.pair(**options)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in (
        (5, 7),
        (8, 9),
        (11, 10),
    ):  # none is a size of the layer: equal sizes are one symbol
        x, hx = inputs(T, B, ours.batch_first), kind.states(ours, B)
        with torch._dynamo.config.patch(error_on_recompile=T > 5), torch.set_grad_enabled(training):
            found = compiled(x, hx)
        wanted = ours(x, hx)
        kind.assert_same(found, wanted)
        if training:
            kind.assert_same(kind.gradients(ours, found, x), kind.gradients(ours, wanted, x))


def test_one_graph_with_lengths_resets_and_cells():
    torch._dynamo.reset()
    ours = sk.nn.LSTM(4, 6, dtype=torch.float64, memory="recompute")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((5, 3), (6, 4)):
        x, lengths, reset = inputs(T, B), torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3
        with torch._dynamo.config.patch(error_on_recompile=T > 5):
            y, _, cells = compiled(x, lengths=lengths, reset=reset, return_cells=True)
        own_y, _, own_cells = ours(x, lengths=lengths, reset=reset, return_cells=True)
        assert_close(y, own_y, "transform_fp64")
        assert_close(cells, own_cells, "transform_fp64")
        found, wanted = (
            torch.autograd.grad(a.sum() + (c**2).sum(), x)
            for a, c in ((y, cells), (own_y, own_cells))
        )
        assert_close(found[0], wanted[0], "transform_fp64")


def test_compiled_sees_a_new_weight(kind):
    torch._dynamo.reset()
    ours, theirs = kind.pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = inputs()
    compiled(x)
    ours.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    theirs.load_state_dict(ours.state_dict())
    kind.assert_same(compiled(x), theirs(x))


@pytest.mark.parametrize("strict", (False, True), ids=("non-strict", "strict"))
def test_export_with_dynamic_length_and_batch(kind, strict):
    ours = kind.ours(4, 6, batch_first=True, bidirectional=True, **kind.fixed)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(
        ours, (torch.randn(3, 5, 4),), dynamic_shapes={"input": sizes}, strict=strict
    )
    assert list(program.state_dict) == list(ours.state_dict())
    for shape in ((2, 9, 4), (7, 3, 4)):
        x = torch.randn(shape)
        kind.assert_same(program.module()(x), ours(x), "composition_fp32")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace(kind):
    ours = kind.ours(4, 6, 2, bidirectional=True, **kind.fixed).eval()
    traced = torch.jit.trace(ours, (torch.randn(5, 3, 4),))
    x = torch.randn(7, 2, 4)
    kind.assert_same(traced(x), ours(x), "composition_fp32")


def test_an_ensemble_by_vmap(kind):
    members = [kind.pair(num_layers=2)[0] for _ in range(3)]
    state, _ = stack_module_state(members)
    x = inputs()

    def call(weights, x):
        return functional_call(members[0], weights, (x,))

    together = vmap(call, (0, None))(state, x)
    own_inputs = vmap(call)(state, torch.stack([x, x * 2, x * 3]))
    for k, member in enumerate(members):
        kind.assert_same([t[k] for t in kind.flat(together)], member(x))
        kind.assert_same([t[k] for t in kind.flat(own_inputs)], member(x * (k + 1)))


def test_gradients_of_each_sample(kind):
    ours, theirs = kind.pair()
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    x = inputs().detach()

    def loss(weights, sample):
        return functional_call(ours, weights, (sample.unsqueeze(1),))[0].square().sum()

    each = vmap(grad(loss), (None, 1))(weights, x)
    for b in range(x.shape[1]):
        own_loss = theirs(x[:, b : b + 1])[0].square().sum()
        wanted = torch.autograd.grad(own_loss, [*theirs.parameters()])
        for (name, got), want in zip(each.items(), wanted, strict=True):
            assert_close(got[b], want, "transform_fp64", name=f"{name} of sample {b}")


def test_forward_mode(kind):
    ours, _ = kind.pair()
    x, tangent = inputs().detach(), inputs().detach()
    y, dy = jvp(lambda x: ours(x)[0], (x,), (tangent,))
    assert_close(y, ours(x)[0], "transform_fp64")
    jacobian = jacrev(lambda x: ours(x)[0])(x)
    assert_close(dy, (jacobian * tangent).sum((-3, -2, -1)), "transform_fp64")
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x, tangent))[0]
        assert_close(forward_ad.unpack_dual(dual).tangent, dy, "transform_fp64")


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_double_backward(case, training):
    kind, options = case
    ours, theirs = kind.pair(**options)
    ours.train(training)
    x, found = inputs(batch_first=ours.batch_first), []
    for module in (ours, theirs):
        loss = sum(t.square().sum() for t in kind.flat(module(x)))
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(
            penalty, [x, *module.parameters()], allow_unused=True, materialize_grads=True
        )
        found.append([*first, *second])
    kind.assert_same(*found)


def test_gradient_through_every_cell_state_compiled_and_twice():
    ours = sk.nn.LSTM(4, 6, num_layers=2, dtype=torch.float64)
    x = inputs()

    def first(call):
        cells = call(x, return_cells=True)[2]
        return torch.autograd.grad((cells**3).sum(), x, create_graph=True)[0]

    (twice,) = torch.autograd.grad(first(ours).square().sum(), x)
    assert twice.abs().sum() > 0
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    cells = compiled(x, return_cells=True)[2]
    assert_close(torch.autograd.grad((cells**3).sum(), x)[0], first(ours), "transform_fp64")


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(kind, reentrant):
    ours, _ = kind.pair(num_layers=2)
    x = inputs()
    found = checkpoint(ours, x, use_reentrant=reentrant)
    wanted = ours(x)
    kind.assert_same(found, wanted)
    for result in (found, wanted):
        ours.zero_grad()
        result[0].square().sum().backward()
        grads = [p.grad for p in ours.parameters()]
        if result is found:
            first = grads
    kind.assert_same(first, grads)


def test_dropout_is_the_same_when_checkpointed(kind):
    ours = kind.ours(4, 6, 2, dropout=0.5, **kind.fixed)
    x = inputs(dtype=torch.float32)
    torch.manual_seed(7)
    wanted = torch.autograd.grad(ours(x)[0].sum(), x)[0]
    torch.manual_seed(7)
    found = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False)[0].sum(), x)[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("given", (None, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_autocast_on_the_cpu(kind, packed, dtype, given):
    """Whatever dtype torch's module comes out in there: it depends on the cell, the packing and hx."""
    ours, theirs = kind.pair(torch.float32, bidirectional=True)
    x = torch.randn(5, 3, 4, dtype=dtype)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 3, 1])
    hx = None if given is None else kind.states(ours, dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(x, hx), theirs(x, hx)
        inside = kind.flat(found)[0].float().square().sum()
    exact = None if given is None else [h.double() for h in kind.flat(hx)]
    truth = theirs.double()(
        x.double(), tuple(exact) if exact and kind.has_c else exact and exact[0]
    )
    for found_, wanted_, truth_ in zip(*map(kind.flat, (found, wanted, truth)), strict=True):
        assert_within_2x(found_, wanted_, truth_)  # which compares the dtypes
    inside.backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


def test_autocast_leaves_fp64_alone(kind):
    ours, theirs = kind.pair()
    x = inputs()
    wanted = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        kind.assert_same(ours(x), wanted)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="does not match"):
        ours.float()(x)
