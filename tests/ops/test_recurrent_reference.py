"""The definition: torch's layers in fp64, sequences alone and in batches, its backward and autograd's."""

from __future__ import annotations

import itertools

import pytest
import torch

from sora_kernels.ops.lstm import reference
from sora_kernels.ops.lstm.cells import CELLS
from sora_kernels.testing import assert_close

LENGTHS = torch.tensor([3, 0, 5])
RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
CASES = {
    "plain": {},
    "one_step": {"T": 1, "states": False},
    "two_layers": {"layers": 2, "bidirectional": True},
    "no_bias": {"bias": False},
    "lengths": {"lengths": LENGTHS, "layers": 2, "bidirectional": True},
    "packed": {"packed": [5, 3, 3], "layers": 2, "bidirectional": True},
    "packed_one_way": {"packed": [5, 4, 1], "bias": False},
}


@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_torch(recurrent, kind, case, memory):
    call = recurrent(kind, dtype=torch.float64, memory=memory, **case)
    ours, stock = call.run(backend="reference"), call.run(backend="torch")
    for name in stock:
        assert_close(ours[name], stock[name], "transform_fp64", name=name)


@pytest.mark.parametrize(
    "case", ({"lengths": LENGTHS}, {"packed": [5, 4, 2]}), ids=("lengths", "packed")
)
@pytest.mark.parametrize("bidirectional", (False, True))
def test_projection_equals_torch(recurrent, case, bidirectional):
    call = recurrent("lstm", proj=2, bidirectional=bidirectional, dtype=torch.float64, **case)
    ours, stock = call.run(backend="reference"), call.run(backend="torch")
    for name in stock:
        assert_close(ours[name], stock[name], "transform_fp64", name=name)


@pytest.mark.parametrize("case", ({}, {"bidirectional": True, "layers": 2}), ids=("plain", "both"))
def test_each_row_is_what_it_is_alone(recurrent, kind, case):
    """y is zero past a row's length; an empty row keeps its state."""
    call = recurrent(kind, dtype=torch.float64, **case)
    found = call.call(lengths=LENGTHS, backend="reference")
    for row, length in enumerate(LENGTHS.tolist()):
        assert torch.count_nonzero(found[0][length:, row]) == 0
        states = {k: t[:, row : row + 1] for k, t in call.inputs.items() if k in ("h_0", "c_0")}
        if length == 0:
            for last, first in zip(found[1:], states.values(), strict=True):
                assert torch.equal(last[:, row : row + 1], first)
            continue
        alone = call.with_inputs(x=call.inputs["x"][:length, row : row + 1], **states)
        y, *last = alone.call(backend="torch")
        assert_close(found[0][:length, row], y[:, 0], "transform_fp64")
        for ours, own in zip(found[1:], last, strict=True):
            assert_close(ours[:, row], own[:, 0], "transform_fp64")


@pytest.mark.parametrize("bidirectional", (False, True))
def test_reset_equals_separate_sequences(recurrent, kind, bidirectional):
    call = recurrent(kind, T=6, B=2, bidirectional=bidirectional, states=False, dtype=torch.float64)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2, 0] = reset[5, 0] = True
    y, *_ = call.call(reset=reset, backend="reference")
    for row, borders in ((0, (0, 2, 5, 6)), (1, (0, 6))):
        for start, end in itertools.pairwise(borders):
            piece = call.with_inputs(x=call.inputs["x"][start:end, row : row + 1])
            alone, *_ = piece.call(backend="torch")
            assert_close(y[start:end, row], alone[:, 0], "transform_fp64")


def test_packed_equals_lengths(recurrent, kind):
    """The same rows, packed and padded, with resets."""
    lengths = [5, 4, 2]
    call = recurrent(kind, bidirectional=True, dtype=torch.float64)
    padded = call.call(lengths=torch.tensor(lengths), reset=RESET, backend="reference")
    packing = reference.Packing(torch.tensor([3, 3, 2, 2, 1]), torch.empty(11))
    packed = call.with_inputs(x=packing.take(call.inputs["x"]))
    packed.batch_sizes = torch.tensor([3, 3, 2, 2, 1])
    found = packed.call(reset=packing.take(RESET), backend="reference")
    assert packing.lengths.tolist() == lengths
    assert_close(packing.pad(found[0]), padded[0], "transform_fp64")
    for ours, other in zip(found[1:], padded[1:], strict=True):
        assert_close(ours, other, "transform_fp64")


LAYERS = {
    "plain": {},
    "both": {"bidirectional": True, "bias": False},
    "packed": {"packed": [5, 4, 2], "bidirectional": True},
    "lengths": {"lengths": LENGTHS, "bidirectional": True},
}
KINDS = [*((kind, 0) for kind in CELLS), ("lstm", 2)]


@pytest.mark.parametrize("tapes", ("saved", "again"))
@pytest.mark.parametrize("with_reset", (False, True), ids=("", "reset"))
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("kind", "proj"), KINDS)
def test_handwritten_backward_equals_autograd(recurrent, kind, proj, case, with_reset, tapes):
    call = recurrent(kind, proj=proj, dtype=torch.float64, **case)
    leaves = {name: t.requires_grad_() for name, t in call.inputs.items()}
    x, hx, weights = call.split(leaves)
    h_0, c_0 = hx if call.cell.has_c else (hx, None)
    lengths = case.get("lengths")
    reset = torch.rand(x.shape[:-1]) < 0.4 if with_reset else None
    bias = case.get("bias", True)
    given = (x, h_0, c_0, weights, call.batch_sizes, lengths, reset)
    result = reference.layer(call.cell, *given, bias)
    outputs = [t for t in result[:4] if t is not None]
    grads = [torch.randn_like(t) for t in outputs]
    wanted = torch.autograd.grad(outputs, list(leaves.values()), grads)
    dy, dh_n, dc_n, dcells = grads if call.cell.has_c else (*grads, None, None)
    kept = (result.cells, result.gates) if tapes == "saved" else (None, None)
    with torch.no_grad():
        dx, dh0, dc0, dweights = reference.layer_backward(
            call.cell, dy, dh_n, dc_n, dcells, *given, result.y, *kept, bias
        )
    states = (dh0, dc0) if call.cell.has_c else (dh0,)
    for name, ours, auto in zip(leaves, (dx, *states, *dweights), wanted, strict=True):
        assert_close(ours, auto, "transform_fp64", name=f"d{name}")


def test_without_tapes(recurrent, kind):
    call = recurrent(kind)
    x, hx, weights = call.split()
    h_0, c_0 = hx if call.cell.has_c else (hx, None)
    full = reference.layer(call.cell, x, h_0, c_0, weights, None, None, None, True)
    bare = reference.layer(call.cell, x, h_0, c_0, weights, None, None, None, True, tapes=False)
    assert bare.cells is None and bare.gates is None
    assert torch.equal(bare.y, full.y) and torch.equal(bare.h_n, full.h_n)
