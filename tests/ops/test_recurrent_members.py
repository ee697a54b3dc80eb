"""``lstm``, ``gru`` and ``rnn`` under ``torch.vmap`` with and without gradients: the kernels' numbers beside the
reference's, and that it was the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from sora_kernels.ops.lstm import ensemble, reference
from sora_kernels.testing import assert_close, assert_within_2x

pytestmark = pytest.mark.native
M = 3


def batched(call, *names: str, members: int = M) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The call's inputs, those that start with one of ``names`` once a member; and their axes."""
    inputs, dims = {}, {}
    for k, (name, t) in enumerate(call.inputs.items()):
        dims[name] = k % 2 if name.startswith(names) else None
        inputs[name] = t.clone()
        if dims[name] is not None:
            several = torch.stack([t, *(torch.randn_like(t) * 0.5 for _ in range(members - 1))])
            inputs[name] = several.movedim(0, k % 2)
    return inputs, dims


def outputs(call, backend: str):
    return lambda inputs: call.call(inputs, backend=backend)


def loss(call, backend: str):
    """A scalar in which every output's every entry has a weight of its own."""

    def function(inputs: dict[str, Tensor]) -> Tensor:
        total = 0.0
        for t in call.call(inputs, backend=backend):
            total = (
                total + (t * (torch.arange(t.numel(), dtype=t.dtype).cos().view(t.shape) + t)).sum()
            )
        return total

    return function


def by_autograd(
    found: list[Tensor], inputs: dict[str, Tensor], **options: bool
) -> tuple[Tensor, ...]:
    total = sum(t.square().sum() for t in found)
    return torch.autograd.grad(total, list(inputs.values()), **options)


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}


def outside(call, backend, dims, inputs):
    """loss.backward() through a forward pass under vmap."""
    inputs = leaves(inputs)
    return by_autograd(tree_leaves(vmap(outputs(call, backend), (dims,))(inputs)), inputs)


def second_order(call, backend, dims, inputs):
    """Autograd of what vmap(grad) found, and autograd twice."""
    inputs = leaves(inputs)
    found = tree_leaves(vmap(grad(loss(call, backend)), (dims,))(inputs))
    first = by_autograd([vmap(loss(call, backend), (dims,))(inputs)], inputs, create_graph=True)
    return by_autograd([*found, *first], inputs)


TRANSFORMS = {
    "vmap": lambda call, backend, dims, inputs: vmap(outputs(call, backend), (dims,))(inputs),
    "vmap(grad)": lambda call, backend, dims, inputs: vmap(grad(loss(call, backend)), (dims,))(inputs),
    "grad(vmap)": lambda call, backend, dims, inputs: grad(
        lambda inputs: vmap(loss(call, backend), (dims,))(inputs).sum()
    )(inputs),
    "outside": outside,
}  # fmt: skip


@contextlib.contextmanager
def no_reference() -> Iterator[None]:
    """Fails where the reference runs."""

    def refuse(*_):
        raise AssertionError("the reference ran")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "layer", refuse)
        patch.setattr(reference, "layer_backward", refuse)
        yield


def check(transform, call, dims, inputs, backend: str = "native") -> None:
    with no_reference():
        found = tree_leaves(transform(call, backend, dims, inputs))
    assert_same(found, tree_leaves(transform(call, "reference", dims, inputs)))


def assert_same(found, wanted) -> None:
    for k, (ours, want) in enumerate(zip(found, wanted, strict=True)):
        assert ours.dtype == want.dtype
        assert_close(ours, want, "transform_fp64", name=f"result {k}")


def fp64(recurrent, kind: str, **options):
    return recurrent(kind, **({"T": 4, "B": 2, "I": 3, "H": 3, "dtype": torch.float64} | options))


MEMBERS = {
    "weights": ("weight", "bias"),
    "x": ("x",),
    "both": ("x", "weight", "bias"),
    "states": ("h_0", "c_0"),
    "one weight": ("weight_ih",),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("names", MEMBERS.values(), ids=MEMBERS)
def test_members(recurrent, kind, names, transform):
    call = fp64(recurrent, kind, layers=2, bidirectional=True)
    inputs, dims = batched(call, *names)
    check(transform, call, dims, inputs)


LENGTHS = torch.tensor([3, 0])
RESET = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]).bool()
FEATURES = {
    "lengths": {"lengths": LENGTHS, "bidirectional": True},
    "reset": {"reset": RESET, "bidirectional": True, "states": False},
    "both": {"lengths": LENGTHS, "reset": RESET},
    "packed": {"packed": [4, 2], "bidirectional": True},
    "recompute": {"memory": "recompute", "bias": False},
    "recompute, lengths": {"memory": "recompute", "lengths": LENGTHS},
    "one step": {"T": 1, "H": 64, "I": 2},
    "one step, no states": {"T": 1, "H": 64, "I": 2, "states": False, "bidirectional": True},
    "two steps": {"T": 2, "H": 192, "I": 2},  # of an LSTM: steps.py
    "no rows": {"B": 0},
    "batch first": {"batch_first": True, "states": False},
}


@pytest.mark.parametrize("transform", ["vmap(grad)", "outside"])
@pytest.mark.parametrize("names", [("x", "h_0"), ("weight", "bias", "x")], ids=["x", "both"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_features(recurrent, kind, feature, names, transform):
    call = fp64(recurrent, kind, **feature)
    inputs, dims = batched(call, *names)
    check(TRANSFORMS[transform], call, dims, inputs)


@pytest.mark.parametrize("transform", ["vmap(grad)", "grad(vmap)"])
@pytest.mark.parametrize("names", [("x",), ("weight", "bias")], ids=["x", "weights"])
@pytest.mark.parametrize(
    "feature",
    [
        {"proj": 2, "bidirectional": True},
        {"return_cells": True},
        {"proj": 2, "memory": "recompute"},
    ],
    ids=str,
)
def test_cells_and_projections(recurrent, feature, names, transform):
    call = fp64(recurrent, "lstm", layers=2, **feature)
    inputs, dims = batched(call, *names)
    check(TRANSFORMS[transform], call, dims, inputs)


@pytest.mark.parametrize("names", [("x",), ("weight", "bias")], ids=["x", "weights"])
def test_second_order(recurrent, kind, names):
    call = fp64(recurrent, kind, T=2, H=2, lengths=LENGTHS.clamp(max=2), bidirectional=True)
    inputs, dims = batched(call, *names)
    assert_same(
        second_order(call, "native", dims, inputs), second_order(call, "reference", dims, inputs)
    )


ROWS = {
    "lengths": {"lengths": torch.tensor([[4, 0], [1, 2], [3, 4]])},
    "reset": {"reset": torch.rand(M, 4, 2, generator=torch.Generator().manual_seed(0)) < 0.4},
}


@pytest.mark.parametrize("transform", ["vmap", "vmap(grad)", "outside"])
@pytest.mark.parametrize("names", [("x",), ("weight", "bias")], ids=["x", "weights"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_lengths_and_resets_of_each_member(recurrent, rows, names, transform):
    call = fp64(recurrent, "lstm", bidirectional=True)
    inputs, dims = batched(call, *names)

    def run(backend: str) -> list[Tensor]:
        def one(inputs, rows):
            how = outputs if transform != "vmap(grad)" else loss
            return how(call.with_options(**rows), backend)(inputs)

        if transform == "vmap(grad)":
            return tree_leaves(vmap(grad(one), (dims, 0))(inputs, rows))
        given = leaves(inputs)
        found = list(vmap(one, (dims, 0))(given, rows))
        return found if transform == "vmap" else list(by_autograd(found, given))

    with no_reference():
        found = run("native")
    assert_same(found, run("reference"))


NESTED = {
    "ensemble of samples": (("weight", "bias"), ("x",)),
    "samples of an ensemble": (("x",), ("weight", "bias")),
    "samples of samples": (("x",), ("x", "h_0")),
    "ensembles": (("weight", "bias"), ("weight", "bias", "x")),
}


@pytest.mark.parametrize("lengths", (None, LENGTHS), ids=("even", "lengths"))
@pytest.mark.parametrize("names", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nested(recurrent, kind, names, lengths):
    """vmap of vmap(grad), and vmap(grad(vmap))."""
    call = fp64(recurrent, kind, lengths=lengths, bidirectional=True)
    within, inner = batched(call, *names[1])
    inputs, outer = {}, {}
    for name, t in within.items():
        outer[name] = 0 if name.startswith(names[0]) else None
        inputs[name] = t if outer[name] is None else torch.stack([t, t.flip(0)])
    results = []
    for backend in ("native", "reference"):
        own = loss(call, backend)

        def summed(inputs, own=own):
            return vmap(own, (inner,))(inputs).square().sum()

        with no_reference() if backend == "native" else contextlib.nullcontext():
            found = [
                vmap(vmap(grad(own), (inner,)), (outer,))(inputs),
                vmap(grad(summed), (outer,))(inputs),
            ]
        results.append(tree_leaves(found))
    assert_same(*results)


def jvp_of_pull(function, inputs):
    """A transform that is there only once the forward pass is over."""
    y, pull = vjp(lambda x: function({**inputs, "x": x})[0], inputs["x"])
    return jvp(lambda dy: pull(dy)[0], (y.cos(),), (y.sin(),))


def legacy(function, inputs):
    given = leaves(inputs)
    y = vmap(lambda x: function({**given, "x": x})[0])(torch.stack([given["x"]] * 2))
    dy = torch.eye(y.numel(), dtype=y.dtype)[:4].view(4, *y.shape)
    return torch.autograd.grad(y, list(given.values())[:1], dy, is_grads_batched=True)


OTHERS = {
    "jacrev": lambda f, inputs: jacrev(lambda inputs: f(inputs)[0])(inputs),
    "jacfwd": lambda f, inputs: jacfwd(lambda x: f({**inputs, "x": x})[0])(inputs["x"]),
    "hessian": lambda f, inputs: hessian(lambda x: f({**inputs, "x": x})[0].sum())(inputs["x"]),
    "grad(grad)": lambda f, inputs: grad(
        lambda x: grad(lambda x: f({**inputs, "x": x})[0].cos().sum())(x).square().sum()
    )(inputs["x"]),
    "vmap(jvp)": lambda f, inputs: vmap(
        lambda x: jvp(lambda x: f({**inputs, "x": x})[0], (x,), (x.cos(),))
    )(torch.stack([inputs["x"]] * 2)),
    "functionalize": lambda f, inputs: torch.func.functionalize(f)(inputs),
    "jvp of pull": jvp_of_pull,
    "grad of pull": lambda f, inputs: grad(
        lambda dy: vjp(lambda x: f({**inputs, "x": x})[0], inputs["x"])[1](dy)[0].square().sum()
    )(f(inputs)[0].cos()),
    "is_grads_batched": legacy,
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_every_other_transform(recurrent, kind, other):
    call = fp64(recurrent, kind, T=3, H=2)
    assert_same(
        *(tree_leaves(other(outputs(call, b), call.inputs)) for b in ("native", "reference"))
    )


def test_no_members(recurrent):
    call = fp64(recurrent, "lstm")
    inputs, dims = batched(call, "x")
    inputs["x"] = inputs["x"][:0]
    for transform in ("vmap", "outside"):
        run = TRANSFORMS[transform]
        found, wanted = (tree_leaves(run(call, b, dims, inputs)) for b in ("native", "reference"))
        assert [t.shape for t in found] == [t.shape for t in wanted]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("transform", ["vmap", "vmap(grad)"])
@pytest.mark.parametrize("names", [("x",), ("weight", "bias")], ids=["x", "weights"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_twice_the_error_of_the_reference_at_most(recurrent, kind, names, transform, dtype):
    call = recurrent(kind, T=12, B=4, I=8, H=16, dtype=dtype)
    inputs, dims = batched(call, *names, members=4)
    run = TRANSFORMS[transform]
    found, plain = (tree_leaves(run(call, b, dims, inputs)) for b in ("native", "reference"))
    exact = {name: t.double() for name, t in inputs.items()}
    truth = tree_leaves(run(call.to(torch.float64), "reference", dims, exact))
    for k, three in enumerate(zip(found, plain, truth, strict=True)):
        assert_within_2x(*three, name=f"result {k}")


def test_dropout_between_layers(recurrent):
    """Its mask follows vmap's randomness; the layers around it are the kernels."""
    call = recurrent("gru", T=6, B=64, H=16, layers=2, dropout=0.5, training=True)
    inputs, dims = batched(call, "weight", "bias")
    inputs = {
        name: t[:1].expand(2, *t.shape[1:]) if dims[name] == 0 else t for name, t in inputs.items()
    }
    dims = {name: dim if dim == 0 else None for name, dim in dims.items()}
    inputs |= {name: call.inputs[name] for name, dim in dims.items() if dim is None}
    with no_reference():
        for randomness in ("same", "different"):
            y = vmap(outputs(call, "native"), (dims,), randomness=randomness)(inputs)[0]
            assert torch.equal(y[0], y[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="random"):
        vmap(outputs(call, "native"), (dims,))(inputs)


@pytest.mark.parametrize(
    ("T", "backend", "kernels"), [(1, None, False), (1, "native", True), (20, None, True)]
)
def test_few_steps_are_the_references(recurrent, monkeypatch, T, backend, kernels):
    """Where host work is all there is, ATen's is less; a named backend is obeyed."""
    call, calls, forward = recurrent("lstm", T=T, B=1, H=8), [], ensemble.forward
    inputs, dims = batched(call, "weight", "bias")
    monkeypatch.setattr(ensemble, "forward", lambda *a: calls.append(a) or forward(*a))
    vmap(outputs(call, backend), (dims,))(inputs)
    assert bool(calls) == kernels


def test_a_backend_that_cannot_run_leaves_it_to_the_reference(recurrent):
    """As the reference under a transform asks for nothing."""
    call = recurrent("lstm", dtype=torch.float16, reset=torch.rand(5, 3) < 0.5)
    inputs, dims = batched(call, "weight", "bias")
    for name in ("native", "torch"):
        found = vmap(outputs(call, name), (dims,))(inputs)
        assert_same(found, vmap(outputs(call, "reference"), (dims,))(inputs))
