"""Gradients of every order and kind: gradcheck, double backward, subsets, transforms, autocast, checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sora_kernels.ops.lstm import reference
from sora_kernels.ops.lstm.arguments import autocast
from sora_kernels.testing import assert_close, tolerance

NATIVE = pytest.param("native", marks=pytest.mark.native)
KERNELS = (NATIVE, "reference")
LENGTHS = torch.tensor([3, 0, 2])
SMALL = {
    "plain": {"T": 3, "H": 3},
    "both": {"T": 2, "B": 2, "H": 2, "bidirectional": True},
    "lengths": {"T": 3, "H": 2, "I": 2, "lengths": LENGTHS, "bidirectional": True},
    "packed": {"T": 3, "H": 2, "I": 2, "packed": [3, 2, 1]},
    "reset": {"T": 3, "H": 2, "I": 2, "reset": torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]).bool()},
    "recompute": {"T": 3, "H": 2, "I": 2, "memory": "recompute"},
}  # fmt: skip
GRADCHECK = tolerance("gradcheck_fp64")


def check_gradients(call, backend):
    # Away from relu's kink, where central differences say nothing.
    call = call.with_inputs(
        **{
            name: t + 2
            for name, t in call.inputs.items()
            if call.kind == "rnn_relu" and "bias" in name
        }
    )
    keys, leaves = list(call.inputs), [t.requires_grad_() for t in call.inputs.values()]

    def function(*tensors):
        return call.call(dict(zip(keys, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, leaves, atol=GRADCHECK)
    assert torch.autograd.gradgradcheck(function, leaves, atol=GRADCHECK, fast_mode=True)


@pytest.mark.native
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_gradcheck(recurrent, kind, case):
    check_gradients(recurrent(kind, dtype=torch.float64, **case), "native")


def test_gradcheck_of_the_reference(recurrent, kind):
    """Its handwritten backward equals autograd in test_recurrent_reference.py, case by case."""
    check_gradients(recurrent(kind, dtype=torch.float64, **SMALL["both"]), "reference")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("memory", ("save", "recompute"))
def test_gradcheck_of_cells_and_projection(recurrent, backend, memory):
    """Of all that an LSTM returns."""
    options = {"T": 3, "H": 3, "I": 2, "return_cells": True, "memory": memory}
    check_gradients(recurrent("lstm", dtype=torch.float64, **options), backend)
    check_gradients(
        recurrent("lstm", proj=2, lengths=LENGTHS, dtype=torch.float64, **options), backend
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("options", ({}, {"memory": "recompute"}, {"lengths": LENGTHS}), ids=str)
def test_double_backward_equals_reference(recurrent, kind, backend, options):
    call = recurrent(kind, H=5, dtype=torch.float64, **options)

    def second(name):
        leaves = {k: t.detach().requires_grad_() for k, t in call.inputs.items()}
        y, *last = call.call(leaves, backend=name)
        first = torch.autograd.grad(
            (y**2).sum() + last[-1].sum(), leaves.values(), create_graph=True
        )
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves.values())

    for name, ours, other in zip(call.inputs, second(backend), second("reference"), strict=True):
        assert_close(ours, other, "transform_fp64", name=name)


def test_gradient_through_cells_equals_autograd(recurrent):
    """A loss of every c(t) alone, through two layers."""
    call = recurrent("lstm", layers=2, return_cells=True, dtype=torch.float64)
    weight = torch.randn(5, 3, 6, dtype=torch.float64)

    def grads(backend, **options):
        leaves = {k: t.detach().requires_grad_() for k, t in call.inputs.items()}
        cells = call.call(leaves, backend=backend, **options)[3]
        return torch.autograd.grad((cells.sin() * weight).sum(), leaves.values())

    plain = {k: t.detach().requires_grad_() for k, t in call.inputs.items()}
    x, (h_0, c_0), weights = call.split(plain)
    for k in range(2):
        own = weights[4 * k : 4 * k + 4]
        result = reference.layer(
            call.cell, x, h_0[k : k + 1], c_0[k : k + 1], own, None, None, None, True
        )
        x = result.y
    wanted = torch.autograd.grad((result.cells.sin() * weight).sum(), plain.values())
    for options in (
        {"backend": None},
        {"backend": "reference"},
        {"backend": None, "memory": "recompute"},
    ):
        for name, ours, auto in zip(call.inputs, grads(**options), wanted, strict=True):
            assert_close(ours, auto, "transform_fp64", name=name)


@pytest.mark.parametrize("backend", KERNELS)
def test_needs_input_grad_subsets(recurrent, kind, backend):
    call = recurrent(kind, bidirectional=True, dtype=torch.float64)
    every = call.run(backend="reference")
    subsets = [(name,) for name in call.inputs] + [
        ("x", "bias_ih_l0"),
        ("h_0", "weight_hh_l0_reverse"),
    ]
    for wanted in subsets:
        leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in call.inputs.items()}
        outputs = call.call(leaves, backend=backend)
        torch.autograd.backward(outputs, call.output_grads(outputs))
        for name, leaf in leaves.items():
            if name in wanted:
                assert_close(leaf.grad, every[f"d{name}"], "transform_fp64", name=name)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("memory", ("save", "recompute"))
def test_one_output_used(recurrent, kind, backend, memory):
    cells = {"return_cells": True} if kind == "lstm" else {}
    call = recurrent(
        kind, lengths=torch.tensor([5, 0, 3]), dtype=torch.float64, memory=memory, **cells
    )

    def grads(name, used):
        leaves = {k: t.detach().requires_grad_() for k, t in call.inputs.items()}
        loss = call.call(leaves, backend=name)[used].sin().sum()
        return torch.autograd.grad(loss, leaves.values(), materialize_grads=True)

    for used in range(len(call.outputs)):
        for name, a, b in zip(
            call.inputs, grads(backend, used), grads("reference", used), strict=True
        ):
            assert_close(a, b, "transform_fp64", name=name)


def transformed(name, function, x, tangent):
    def loss(t):
        return function(t).square().sum()

    if name == "vmap":
        return torch.vmap(function)(torch.stack((x, tangent)))
    if name == "grad":
        return torch.func.grad(loss)(x)
    if name == "vmap_grad":
        return torch.vmap(torch.func.grad(loss))(torch.stack((x, tangent)))
    if name == "jvp":
        return torch.func.jvp(function, (x,), (tangent,))[1]
    if name == "hessian":
        return torch.func.hessian(loss)(x)
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("transform", ("vmap", "grad", "vmap_grad", "jvp", "hessian", "forward_ad"))
@pytest.mark.parametrize("backend", (NATIVE, "torch", "reference", None))
def test_transforms_equal_the_reference(recurrent, kind, transform, backend):
    lengths = torch.tensor([3, 1])
    call = recurrent(
        kind, T=3, B=2, I=2, H=3, bidirectional=True, lengths=lengths, dtype=torch.float64
    )
    x, hx, weights = call.split()
    states = hx if call.cell.has_c else (hx, None)

    def function(t):
        found = call.call({**call.inputs, "x": t}, backend=backend)
        return torch.cat([o.flatten() for o in found])

    def plain(t):
        found = reference.layer(call.cell, t, *states, weights, None, lengths, None, True)
        return torch.cat([o.flatten() for o in found[: len(call.outputs)]])

    tangent = torch.randn_like(x)
    ours = transformed(transform, function, x, tangent)
    assert_close(ours, transformed(transform, plain, x, tangent), "transform_fp64")


def test_vmap_over_an_ensemble(recurrent, kind):
    """Weights and hx with a leading model axis; packed data too."""
    for case in ({"return_cells": True} if kind == "lstm" else {}, {"packed": [5, 4, 2]}):
        calls = [recurrent(kind, dtype=torch.float64, **case) for _ in range(2)]
        stacked = {k: torch.stack([c.inputs[k] for c in calls]) for k in calls[0].inputs}
        found = torch.vmap(calls[0].call)(stacked)
        for k, call in enumerate(calls):
            for ours, alone in zip(found, call.call(), strict=True):
                assert_close(ours[k], alone, "transform_fp64")


@pytest.mark.parametrize("packed", (None, [5, 4, 2]), ids=("dense", "packed"))
@pytest.mark.parametrize("backend", (NATIVE, "torch", "reference"))
def test_autocast(recurrent, kind, backend, packed):
    """As torch's layers on the CPU: GRU is not cast, nor is LSTM on packed data."""
    call = recurrent(kind, bidirectional=True, packed=packed)
    cast = kind != "gru" and (kind != "lstm" or not packed)
    dtype = torch.bfloat16 if cast else torch.float32
    if packed:  # whose way is below the public function
        cell, given = call.cell, call.split()
        with torch.autocast("cpu", torch.bfloat16):
            states = given[1] if call.cell.has_c else (given[1],)
            x, *_ = autocast(cell, given[0], states, given[2], packed=True)
        assert x.dtype == dtype
        call = call.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = call.run(backend=backend)
        again = call.run(backend=backend, memory="recompute")
        wide = call.to(torch.float64).call(backend=backend)
    alone = call.to(dtype).run(backend=backend)
    for name in call.outputs:
        assert found[name].dtype == dtype
        if cast or backend != "torch":  # torch casts the products inside its loop
            assert torch.equal(found[name], alone[name]), name
        assert torch.equal(again[name], alone[name]), name
    assert found["dx"].dtype == again["dx"].dtype == call.inputs["x"].dtype
    assert wide[0].dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("backend", KERNELS)
def test_checkpoint(recurrent, kind, backend, use_reentrant):
    call = recurrent(kind, layers=2, dropout=0.5, training=True, dtype=torch.float64)
    keys = list(call.inputs)

    def function(*tensors):
        return call.call(dict(zip(keys, tensors, strict=True)), backend=backend)[0]

    def grads(wrap):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in call.inputs.values()]
        wrap(leaves).sin().sum().backward()
        return [t.grad for t in leaves]

    saved = grads(lambda leaves: function(*leaves))
    again = grads(lambda leaves: checkpoint(function, *leaves, use_reentrant=use_reentrant))
    for ours, other in zip(again, saved, strict=True):
        assert torch.equal(ours, other)
