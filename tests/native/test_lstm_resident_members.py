"""The resident kernels with several layers in one launch, run without a GPU: numbers, and that vmap gets there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import pytest
import torch
from test_lstm_cpu import Problem, assert_same_bits, named, output_gradients, problem
from test_lstm_resident import DTYPES, Binding, Sizes, Tf32Products, check_results, install
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sora_kernels.ops.lstm import gru, lstm, reference, resident, rnn
from sora_kernels.ops.lstm.cells import CELLS, GRU, LSTM, RNN_TANH
from sora_kernels.testing import assert_within_2x, poisoned


def together(problems: Sequence[Problem], recompute: bool = False) -> list[dict[str, Tensor]]:
    """Results and gradients of each problem, all in one launch either way."""

    def stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
        several = list(tensors)
        return None if several[0] is None else torch.stack(several)

    def each(kind: str) -> Tensor | None:
        return stack(getattr(p, kind) for p in problems)

    first, E = problems[0], len(problems)
    cell, bias = first.cell, first.bias
    weights = [stack(several) for several in zip(*(p.weights for p in problems), strict=True)]
    inputs = (each("x"), each("h0"), each("c0"), weights, *first.inputs[4:])
    needs = [True] * (2 + cell.has_c + len(weights))
    with Tf32Products(), poisoned():
        result = resident.forward(cell, *inputs, bias, True, E)
        alone = [reference.Result(*(None if t is None else t[e] for t in result)) for e in range(E)]
        grads = zip(
            *(output_gradients(p, r) for p, r in zip(problems, alone, strict=True)), strict=True
        )
        gates = None if recompute else result.gates
        chain = resident.chain(
            cell, *map(stack, grads), *inputs, result.y, result.cells, gates, bias, needs, E
        )  # fmt: skip
        dx, dweights = chain.gradients(weights, bias, needs)
    found = []
    for e, p in enumerate(problems):
        own = [None if t is None else t[e] for t in (dx, chain.dh0, chain.dc0)]
        own[0] = own[0].view(p.x.shape)
        found.append(named(p, alone[e], (*own, [g[e] for g in dweights])))
    return found


def members_like(p: Problem, E: int) -> list[Problem]:
    """Other numbers in the same rows."""

    def other(t: Tensor | None) -> Tensor | None:
        return None if t is None else t + torch.randn(t.shape).to(t.dtype) * 0.25

    changed = [
        {"weights": list(map(other, p.weights))}
        | {k: other(getattr(p, k)) for k in ("x", "h0", "c0")}
        for _ in range(E - 1)
    ]
    return [p, *(dataclasses.replace(p, **change) for change in changed)]


@pytest.mark.parametrize("rows", ["even", "lengths", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_members_both_ways(monkeypatch, cell, rows, dtype):
    """By the 2x rule, in sizes of one group of rows and more; the same bits where the tapes are made again."""
    install(monkeypatch, seed=10)
    for H, D in ((32, 2), (7, 1)):
        reset, bias = rows == "lengths", H == 32
        p = problem(cell, 5, 9, H, D=D, rows=rows, reset=reset, bias=bias, dtype=dtype)
        problems = members_like(p, 3)
        found = together(problems)
        check_results(problems, found)
        for a, b in zip(found, together(problems, recompute=True), strict=True):
            assert_same_bits(a, b)


class Counting:
    """The emulation's binding; which pass it launched, and of how many members."""

    def __init__(self, binding: Binding) -> None:
        self.binding, self.launches = binding, []

    def __getattr__(self, name):
        def run(dtype, numbers, *where):
            self.launches.append((name.rpartition("_")[2], Sizes(*numbers[:10]).members))
            getattr(self.binding, name)(dtype, numbers, *where)

        return run


@pytest.mark.parametrize("ensemble", (True, False), ids=("ensemble", "samples"))
@pytest.mark.parametrize("cell", (LSTM, GRU, RNN_TANH), ids=lambda cell: cell.name)
def test_vmap_is_one_launch(monkeypatch, cell, ensemble):
    """An ensemble is one launch each way; samples of one layer are rows, and one launch backward."""
    install(monkeypatch, seed=1)
    binding = Counting(resident._native.module())
    monkeypatch.setattr(resident, "_native", SimpleNamespace(module=lambda: binding))
    monkeypatch.setattr(resident, "takes", lambda x, H, members=0: True)
    E = 3
    problems = members_like(problem(cell, 7, 2, 12, D=2, dtype=torch.bfloat16), E)
    first, function = problems[0], {LSTM: lstm, GRU: gru, RNN_TANH: rnn}[cell]
    weights, x = first.weights, first.x
    if ensemble:
        weights = [
            torch.stack(several) for several in zip(*(p.weights for p in problems), strict=True)
        ]
    else:
        x = torch.stack([p.x for p in problems])

    def gradients(backend, *inputs):
        def loss(weights, x):
            states = [h.to(x.dtype) for h in (first.h0, first.c0) if h is not None]
            hx = tuple(states) if cell.has_c else states[0]
            y, _ = function(x, hx, weights, bidirectional=True, backend=backend)
            return y.double().square().sum()

        dims = (0, None) if ensemble else (None, 0)
        return tree_leaves(torch.vmap(torch.func.grad(loss, (0, 1)), dims)(*inputs))

    found = gradients("native", weights, x)
    assert binding.launches == [("forward", E)] * ensemble + [("backward", E if ensemble else 1)]
    plain = gradients("reference", weights, x)
    truth = gradients("reference", [w.double() for w in weights], x.double())
    for k, three in enumerate(zip(found, plain, truth, strict=True)):
        assert_within_2x(*three, name=f"gradient {k}")
