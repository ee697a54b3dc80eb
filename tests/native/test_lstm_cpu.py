"""The C++ kernels of the recurrent cells: ways to walk the steps, threads, instruction sets, memory, errors."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sora_kernels import _native
from sora_kernels.ops.lstm import native, products, reference, steps
from sora_kernels.ops.lstm.cells import CELLS, GRU, LSTM, RNN_RELU, RNN_TANH, Cell
from sora_kernels.ops.lstm.int8 import Int8Weights, quantise
from sora_kernels.testing import assert_close, assert_within_2x, tolerance

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAN = float("nan")


@dataclass
class Problem:
    """One layer's inputs, as ``native.forward`` takes them."""

    cell: Cell
    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    bias: bool = True

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        weights = [w.to(dtype) for w in self.weights]
        return dataclasses.replace(
            self, x=self.x.to(dtype), h0=cast(self.h0), c0=cast(self.c0), weights=weights
        )

    @property
    def inputs(self) -> tuple:
        return (
            self.x, self.h0, self.c0, self.weights, self.batch_sizes, self.lengths, self.reset,
        )  # fmt: skip

    @property
    def live(self) -> Tensor:
        """bool, of x's leading shape: the (row, step) pairs that run."""
        if self.lengths is None:
            return torch.ones(self.x.shape[:-1], dtype=torch.bool)
        return torch.arange(len(self.x))[:, None] < self.lengths


def problem(
    cell: Cell, T: int, B: int, H: int, D: int = 1, I: int = 3, P: int = 0,  # noqa: E741
    rows: str = "even", reset: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32,
) -> Problem:  # fmt: skip
    """Weights of torch's sizes; ``rows`` "even", "lengths" (some 0, NaN past them) or "packed"."""
    scale, per_gate = H**-0.5, cell.gates * H
    shapes = [(per_gate, I), (per_gate, P or H)]
    shapes += [(per_gate,), (per_gate,)] if bias else []
    shapes += [(P, H)] if P else []
    weights = [torch.empty(s).uniform_(-scale, scale).to(dtype) for _ in range(D) for s in shapes]
    x, lengths, batch_sizes = torch.randn(T, B, I), None, None
    if rows != "even":
        lengths = torch.randint(0 if rows == "lengths" else 1, T + 1, (B,))
        lengths[:1] = T
        live = torch.arange(T)[:, None] < lengths
        x[~live] = NAN
        if rows == "packed":
            batch_sizes, lengths = live.sum(1), None
            x = torch.randn(int(batch_sizes.sum()), I)
    resets = torch.rand(x.shape[:-1]) < 0.3 if reset else None
    h0, c0 = torch.randn(D, B, P or H), torch.randn(D, B, H) if cell.has_c else None
    found = Problem(cell, x, h0, c0, weights, batch_sizes, lengths, resets, bias)
    return found.to(dtype)


def forward(p: Problem, tapes: bool = True, int8: Sequence[Int8Weights] = ()) -> reference.Result:
    return native.forward(p.cell, *p.inputs, p.bias, tapes, int8)


def output_gradients(p: Problem, result: reference.Result) -> list[Tensor | None]:
    """Of y, h_n, c_n, cells; NaN where a row has ended, which nobody may read."""
    generator = torch.Generator().manual_seed(1)
    grads: list[Tensor | None] = []
    for t in result[:4]:
        g = None if t is None else torch.randn(t.shape, generator=generator).to(t.dtype)
        if g is not None and t is not result.h_n and t is not result.c_n:
            g[~p.live] = NAN
        grads.append(g)
    return grads


def both_ways(p: Problem, layer: reference.Result | None = None) -> dict[str, Tensor]:
    """Outputs, tapes and gradients of the kernels by name."""
    result = forward(p) if layer is None else layer
    needs = [True] * (2 + p.cell.has_c + len(p.weights))
    grads = native.backward(
        p.cell, *output_gradients(p, result), *p.inputs, result.y, result.cells, result.gates,
        p.bias, needs,
    )  # fmt: skip
    return named(p, result, grads)


def reference_both_ways(p: Problem, y: Tensor | None = None) -> dict[str, Tensor]:
    """The same from the definition; with ``y``, gradients are those behind its relu mask."""
    result = reference.layer(p.cell, *p.inputs, p.bias)
    grads = reference.layer_backward(
        p.cell, *output_gradients(p, result), *p.inputs, result.y if y is None else y.to(p.x.dtype),
        result.cells, result.gates, p.bias,
    )  # fmt: skip
    return named(p, result, grads)


def named(p: Problem, result: reference.Result, grads: tuple) -> dict[str, Tensor]:
    found = dict(result._asdict())
    if result.gates is not None:  # they mean nothing past a row's length
        found["gates"] = torch.where(p.live[..., None], result.gates, 0)
    found |= dict(zip(("dx", "dh0", "dc0"), grads[:3], strict=True))
    found |= {f"dweights[{k}]": g for k, g in enumerate(grads[3])}
    return {name: t for name, t in found.items() if t is not None}


def check(*problems: Problem) -> None:
    """Every result by the 2x rule; of several problems side by side, as one number says nothing."""
    sides: list[list[dict[str, Tensor]]] = [[], [], []]
    for p in problems:
        ours = both_ways(p)
        y = ours["y"] if p.cell is RNN_RELU else None  # all three behind one mask
        plain, truth = reference_both_ways(p, y), reference_both_ways(p.to(torch.float64), y)
        assert list(ours) == list(plain) == list(truth)
        for side, found in zip(sides, (ours, plain, truth), strict=True):
            side.append(found)
    dtype = problems[0].x.dtype  # c is wider, and no more exact
    for name in sides[0][0]:
        ours, plain, truth = (torch.stack([f[name] for f in side]) for side in sides)
        assert_within_2x(ours, plain, truth, name=name, storage=dtype)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(params=CELLS.values(), ids=CELLS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors(cell, dtype):
    """Full and partial vectors of units: 4 to 16 lanes, one to four vectors a block."""
    check(*(problem(cell, T=3, B=2, H=1, D=2, dtype=dtype) for _ in range(30)))
    for k, H in enumerate((15, 16, 17, 31, 33, 65)):
        check(problem(cell, T=3, B=2 + k % 3, H=H, D=1 + k % 2, bias=k % 3 > 0, dtype=dtype))
    if cell is LSTM:
        for k, (H, P) in enumerate(((17, 1), (16, 15), (33, 16), (20, 17), (65, 33))):
            check(problem(cell, T=3, B=3, H=H, P=P, D=1 + k % 2, bias=k % 2 > 0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_many_rows(cell, rows, dtype):
    """48 rows share a block of sums and 96 walk the sequence together: full, one over, two more."""
    for B in (48, 49, 97, 195):
        # More than one tile of rows: sums are made in slices of 64 terms.
        p = problem(cell, 3, B, H=70 if B == 49 else 18, D=1 + (B == 97), rows=rows, dtype=dtype)
        check(p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_resets(cell, rows, dtype):
    check(problem(cell, 6, 5, 18, D=2, rows=rows, reset=True, dtype=dtype))
    if cell is LSTM:
        check(problem(cell, 6, 5, 18, D=2, P=7, rows=rows, reset=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step(cell, dtype):
    """Its products are GEMMs: the kernel gets no w_hh, and no backward product but a projection's."""
    check(*(problem(cell, 1, 1, 1, D=2, dtype=dtype) for _ in range(30)))
    check(problem(cell, 1, 5, 33, D=2, dtype=dtype))
    for feature in ({"rows": "packed", "bias": False}, {"rows": "lengths"}, {"reset": True}):
        check(problem(cell, 1, 5, 18, dtype=dtype, **feature))
    if cell is LSTM:
        check(problem(cell, 1, 3, 17, D=2, P=5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ("sequence", "steps"))
@pytest.mark.parametrize("D", (1, 2))
def test_both_ways_to_walk_the_steps(D, way, dtype, monkeypatch):
    """An LSTM on even rows has two."""
    monkeypatch.setattr(steps, "faster", lambda T, B, H: way == "steps")
    walked = []
    monkeypatch.setattr(steps, "forward", recording(walked, steps.forward))
    monkeypatch.setattr(steps, "backward", recording(walked, steps.backward))
    for T, B, I, H in ((4, 3, 5, 21), (1, 2, 3, 40)):  # noqa: E741
        check(problem(LSTM, T, B, H, D, I, bias=B != 2, dtype=dtype))
    assert len(walked) == (4 if way == "steps" else 0)


def test_empty_batch(cell):
    for rows in ("even", "lengths"):
        check(problem(cell, 3, 0, 4, D=2, rows=rows))
        check(problem(cell, 1, 0, 4, rows=rows))


def test_empty_batch_step_by_step(monkeypatch):
    monkeypatch.setattr(steps, "faster", lambda T, B, H: True)
    check(problem(LSTM, 3, 0, 4, D=2))


def test_nothing_else_walks_steps(monkeypatch):
    def refuse(*_):
        pytest.fail("only of an LSTM on even rows, with no reset, was it measured to be faster")

    monkeypatch.setattr(steps, "faster", lambda T, B, H: True)
    monkeypatch.setattr(steps, "forward", refuse)
    for other in (GRU, RNN_TANH, RNN_RELU):
        forward(problem(other, 2, 2, 200))
    for feature in ({"P": 5}, {"rows": "lengths"}, {"rows": "packed"}, {"reset": True}):
        forward(problem(LSTM, 2, 2, 200, **feature))


def recording(calls, function):
    def call(*args):
        calls.append(function.__name__)
        return function(*args)

    return call


def test_no_tapes_no_states_same_bits(cell, monkeypatch):
    features: list[dict] = [{}, {"rows": "lengths", "reset": True}] + [{"P": 5}] * (cell is LSTM)
    for way in ("sequence", "steps") if cell is LSTM else ("sequence",):
        monkeypatch.setattr(steps, "faster", lambda T, B, H, way=way: way == "steps")
        for feature in features:
            p = problem(cell, 5, 3, 21, D=2, **feature)
            p.h0 = torch.zeros_like(p.h0)
            p.c0 = None if p.c0 is None else torch.zeros_like(p.c0)
            with_tapes = forward(p)
            p.h0 = p.c0 = None
            without = forward(p, tapes=False)
            assert without.cells is None and without.gates is None
            for a, b in zip(with_tapes[:3], without[:3], strict=True):
                assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_tapes_made_again(cell, rows):
    """Backward without tapes walks the cells alone over products of all steps at once."""
    for P in (0, 5) if cell is LSTM else (0,):
        p = problem(cell, 5, 4, 21, D=2, P=P, rows=rows, reset=True, dtype=torch.float64)
        result = forward(p)
        again = both_ways(p, result._replace(gates=None))
        kept = both_ways(p, result)
        for name, t in again.items():
            if name != "gates":
                assert_close(t, kept[name], "transform_fp64", name=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_int8_weights(cell, dtype):
    """As the definition with the weights that the numbers stand for."""
    sizes = ((1, 33, {}), (3, 70, {"D": 2}), (8, 17, {"rows": "lengths", "reset": True}))
    sizes += ((2, 20, {"rows": "packed", "bias": False}),)
    sizes += ((3, 33, {"P": 18, "D": 2}),) * (cell is LSTM)
    for B, H, feature in sizes:
        p = problem(cell, 4, B, H, dtype=dtype, **feature)
        per = len(p.weights) // p.h0.shape[0]
        stands_for = p.to(torch.float64)
        for k in range(1, len(p.weights), per):
            p.weights[k][0] = 0
            w = p.weights[k].float()
            scale = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
            stands_for.weights[k] = (w / scale).round().double() * scale.double()
        ours = forward(p, int8=[quantise(cell, w) for w in p.weights[1::per]])
        found = (
            ours,
            *(reference.layer(cell, *q.inputs, p.bias) for q in (stands_for.to(dtype), stands_for)),
        )
        for name, a, b, t in zip(ours._fields, *found, strict=True):
            if a is not None:
                a, b, t = (
                    torch.where(p.live[..., None], v, 0) if name == "gates" else v
                    for v in (a, b, t)
                )
                assert_within_2x(a, b, t, name=name, storage=dtype)


# How plan_threads (csrc/lstm/lstm_cpu.cpp) shares the work with two threads or more: by rows where each has four, by
# units where one step of few rows has enough arithmetic, by direction where not.
WIDE = {
    "lstm": 330,
    "gru": 380,
    "rnn_tanh": 650,
    "rnn_relu": 650,
}  # one row's step pays for a barrier


def shared(cell: Cell) -> dict[str, Problem]:
    wide = WIDE[cell.name]
    sizes: dict[str, dict] = {
        "rows": {"T": 60, "B": 17, "H": 100},
        "rows of both directions": {"T": 30, "B": 17, "H": 100, "D": 2},
        "rows by their steps": {"T": 60, "B": 19, "H": 100, "rows": "lengths"},
        "rows, reset": {"T": 60, "B": 17, "H": 100, "rows": "packed", "reset": True},
        "directions": {"T": 40, "B": 3, "H": 150, "D": 2},
        "units": {"T": 16, "B": 1, "H": wide},
        "units of ragged rows": {"T": 24, "B": 3, "H": wide, "rows": "lengths", "reset": True},
    }
    if cell is LSTM:
        sizes["rows, projected"] = {"T": 60, "B": 17, "H": 100, "P": 33}
        sizes["units, projected"] = {"T": 8, "B": 1, "H": 600, "P": 200}
        sizes["units, projected, ragged"] = {"T": 12, "B": 3, "H": 500, "P": 150, "rows": "packed"}
        sizes["units of both directions"] = {"T": 8, "B": 1, "H": wide, "D": 2}
    return {name: problem(cell, dtype=torch.float64, **size) for name, size in sizes.items()}


def test_threads_agree(cell):
    """Also: the same bits every time for one number of threads."""
    before = torch.get_num_threads()
    try:
        for name, p in shared(cell).items():
            torch.set_num_threads(1)
            alone = both_ways(p)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                together = both_ways(p)
                for result in alone:
                    what = f"{name}, {threads} threads: {result}"
                    assert_close(together[result], alone[result], "transform_fp64", name=what)
            assert_same_bits(together, both_ways(p))
    finally:
        torch.set_num_threads(before)


PROGRAM = """
import sys, torch
from sora_kernels import _native
from sora_kernels.ops.lstm.cells import CELLS
sys.path.insert(0, sys.argv[1])
import test_lstm_cpu as tests
torch.set_num_threads(1)
assert _native.module().lstm_cpu_isa() == sys.argv[2], _native.module().lstm_cpu_isa()
torch.manual_seed(0)
for cell in CELLS.values():
    for dtype in tests.DTYPES:
        for H in (5, 37, 70):
            tests.check(tests.problem(cell, 3, 7, H, D=2, dtype=dtype))
        tests.check(tests.problem(cell, 4, 49, 18, rows="lengths", reset=True, dtype=dtype))
        tests.check(tests.problem(cell, 4, 1, 33, rows="packed", dtype=dtype))
    tests.test_activations(cell, torch.float32), tests.test_activations(cell, torch.float64)
for dtype in tests.DTYPES:
    tests.check(tests.problem(CELLS["lstm"], 3, 7, 37, D=2, P=9, dtype=dtype))
"""


def test_each_instruction_set(on_other_isa):
    """The best one is every other test's."""
    on_other_isa(_native.module().lstm_cpu_isa(), PROGRAM)


def anything(dtype: torch.dtype) -> Tensor:
    """Values over the whole range of sigmoid and tanh, both kinds of zero, infinities, NaN."""
    small = torch.logspace(-30, 2, 500, dtype=torch.float64)
    values = (torch.linspace(-120, 120, 4001, dtype=torch.float64), small, -small)
    return torch.cat((*values, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), NAN]))).to(
        dtype
    )


def check_activation(found: Tensor, a: Tensor, function, name: str) -> None:
    assert_within_2x(found, function(a), function(a.double()), name=name)
    if function is not torch.tanh:
        return
    small = (a.abs() < 0.5) & (a != 0)
    relative = (found[small].double() / torch.tanh(a[small].double()) - 1).abs().max().item()
    # Where 2x at the largest value says nothing: as many roundings, of each value.
    eps = torch.finfo(a.dtype).eps
    assert relative <= tolerance("floor_eps_32bit") / 2 * eps, f"{name}: {relative / eps} eps"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_activations(cell, dtype):
    """Through the cell: one step from zero, where every gate is a function of the same value."""
    a, units = anything(dtype), 19
    weights = [torch.ones(cell.gates * units, 1), torch.zeros(cell.gates * units, units)]
    x = a.repeat(1, 1).t()[None]
    p = Problem(cell, x, None, None, [w.to(dtype) for w in weights], bias=False)
    result = forward(p)
    wide = a[:, None].expand(-1, units)
    if cell.tape == 0:
        check_activation(result.y[0], wide, torch.relu if cell is RNN_RELU else torch.tanh, "y")
        return
    first, second, third, fourth = result.gates[0, 0].chunk(4, -1)
    check_activation(first, wide, torch.sigmoid, "first gate")
    check_activation(second, wide, torch.sigmoid, "second gate")
    check_activation(third, wide, torch.tanh, "third gate")
    if cell is LSTM:
        check_activation(fourth, wide, torch.sigmoid, "fourth gate")
        check_activation(
            result.y[0], wide, lambda v: v.sigmoid() * (v.sigmoid() * v.tanh()).tanh(), "h"
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_activations_step_by_step(dtype):
    """The cell that CPU and GPU share."""
    a = anything(dtype)
    H = len(a)
    gates = a.repeat(1, 4)
    c = torch.zeros(1, H, dtype=dtype)
    forward_steps(
        native.DTYPE_CODES[dtype], (LSTM.code, 1, 1, H, 0, 0, 0, 0), input=gates.data_ptr(),
        input_stride=4 * H, c=c.data_ptr(), gates=gates.data_ptr(),
    )(0, 0)  # fmt: skip
    i, _, g, _ = gates[0].chunk(4)
    check_activation(i, a, torch.sigmoid, "sigmoid")
    check_activation(g, a, torch.tanh, "tanh")


def forward_steps(dtype: int, steps: tuple[int, ...], **given: int):
    """LstmForwardSteps with null for everything that is not given, on the CPU."""
    names = (
        "input", "input_stride", "b_ih", "b_hh", "h_prev", "h", "c", "y", "y_stride", "cells",
        "cells_stride", "gates", "stream",
    )  # fmt: skip
    arguments = dict.fromkeys(names, 0) | {"device": -1} | given
    return _native.module().LstmForwardSteps(dtype=dtype, steps=steps, **arguments)


@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_outputs_are_written_whole_and_only_where_rows_run(cell, rows):
    """Whatever lay in the outputs' memory does not matter; past a row's length it stays."""
    for P in (0, 5) if cell is LSTM else (0,):
        p = problem(cell, 5, 6, 21, D=2, P=P, rows=rows, reset=True)
        zero, nan, one = (call_directly(p, fill) for fill in (0.0, NAN, 1.0))
        for name, of_zeros in zero.items():
            ended = of_zeros != one[name]
            if name in ("y", "cells"):
                expected = ~p.live[..., None].expand_as(ended)
            elif name == "gates":
                expected = ~p.live[..., None].expand_as(ended)
            else:
                expected = torch.zeros_like(ended)
            assert torch.equal(ended, expected), name
            assert torch.equal(nan[name].isnan(), expected), name
            assert torch.equal(nan[name][~expected], of_zeros[~expected]), name


def call_directly(p: Problem, fill: float) -> dict[str, Tensor]:
    """Both functions of the extension, every output array full of ``fill``."""
    rows = native.Rows.of(p.x, p.h0, p.batch_sizes, p.lengths)
    sizes = native.Sizes.of_layer(p.cell, p.weights, p.bias)
    (D, H, P), O, G = sizes, sizes.output_size, p.cell.gates  # noqa: E741
    shape, _keep = native.shape_of(p.cell, rows, sizes, p.reset)
    inputs = products.input_products(rows.packed(p.x), p.weights, D, G * H, G * H)
    addresses = native.addresses_of(p.weights, sizes, p.bias)

    def full(*shape: int) -> Tensor:
        return torch.full(shape, fill)

    def at(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    y, h_n = full(*rows.shape, D * O), full(D, rows.B, O)
    c_n = full(D, rows.B, H) if p.cell.has_c else None
    cells = full(*rows.shape, D * H) if p.cell.has_c else None
    gates = full(D, *rows.shape, 4 * H) if p.cell.tape else None
    module, threads = _native.module(), 1
    module.lstm_forward_cpu(
        dtype=0, shape=shape, input=at(inputs), input_stride=G * H, weights=addresses, h0=at(p.h0),
        c0=at(p.c0), gates=at(gates), y=at(y), cells=at(cells), h_n=at(h_n), c_n=at(c_n),
        threads=threads,
    )  # fmt: skip
    outputs = {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells, "gates": gates}
    dy, dh_n, dc_n, dcells = output_gradients(p, reference.Result(y, h_n, c_n, cells, gates))
    dgates, dh = full(D, rows.N, (4 if p.cell is GRU else G) * H), full(D, rows.N, P)
    dh0, dc0 = full(D, rows.B, O), full(D, rows.B, H) if p.cell.has_c else None
    module.lstm_backward_cpu(
        dtype=0, shape=shape, gates=at(gates), cells=at(cells), y=at(y), weights=addresses,
        h0=at(p.h0), c0=at(p.c0), dy=at(dy), dcells=at(dcells), dh_n=at(dh_n), dc_n=at(dc_n),
        dgates=at(dgates), dh=at(dh if P else None), dh0=at(dh0), dc0=at(dc0), threads=threads,
    )  # fmt: skip
    outputs |= {"dgates": dgates, "dh": dh, "dh0": dh0, "dc0": dc0}
    for d in range(D):
        h_prev = outputs[f"h_prev[{d}]"] = full(rows.N, O)
        module.lstm_previous_states_cpu(
            element_bytes=4, shape=shape, direction=d, y=at(y), h0=at(p.h0), h_prev=at(h_prev)
        )
    return {name: t for name, t in outputs.items() if t is not None}


def test_errors():
    module = _native.module()
    none, shape = (0,) * 12, (LSTM.code, 1, 1, 1, 0, 1, 0, 0, 0)
    half = native.DTYPE_CODES[torch.float16]
    with pytest.raises(RuntimeError, match="lstm_forward_cpu: no kernel for this element type"):
        module.lstm_forward_cpu(half, shape, 0, 4, none, 0, 0, 0, 0, 0, 0, 0, 1)
    with pytest.raises(RuntimeError, match="lstm_backward_cpu: no kernel for this element type"):
        module.lstm_backward_cpu(half, shape, 0, 0, 0, none, *(0,) * 10, 1)
    with pytest.raises(RuntimeError, match="LstmForwardSteps: no kernel for this element type"):
        forward_steps(half, (LSTM.code, 1, 1, 1, 0, 0, 0, 0))(0, 0)
    with pytest.raises(RuntimeError, match="LstmBackwardSteps: no kernel for this element type"):
        module.LstmBackwardSteps(half, (LSTM.code, 1, 1, 1, 0, 0, 0, 0), *(0,) * 13, -1, 0)(0, 0)
    if _native.cuda_status().state == "absent" and _native.build_info()["cuda_runtime"] is None:
        with pytest.raises(RuntimeError, match="LstmForwardSteps: built without CUDA"):
            forward_steps(0, (LSTM.code, 1, 1, 1, 0, 0, 0, 0), device=0)(0, 0)


def test_errors_before_pointers(cell):
    wanted = "every tensor to be torch.float32 on cpu, got torch.float64"
    p = problem(cell, 3, 2, 5)
    with pytest.raises(ValueError, match=wanted):
        forward(dataclasses.replace(p, h0=p.h0.double()))
    with pytest.raises(ValueError, match=wanted):
        forward(
            dataclasses.replace(p, weights=[p.weights[0], p.weights[1].double(), *p.weights[2:]])
        )
    p = problem(cell, 3, 2, 5, rows="packed")
    for h0, got in ((None, "None"), (p.h0[:, :1], "1 rows")):
        with pytest.raises(ValueError, match=f"h0: expected 2 rows as batch_sizes has, got {got}"):
            forward(dataclasses.replace(p, h0=h0))
    sizes = p.batch_sizes.flip(0)
    sizes[-1] += 1
    with pytest.raises(ValueError, match="batch_sizes: expected"):
        forward(dataclasses.replace(p, batch_sizes=sizes))


def test_the_gil_is_released(monkeypatch):
    """Another Python thread gets on while one long call runs."""
    module, during = _native.module(), {}
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.0005)
            ticks += 1

    class Counting:
        def __getattr__(self, name):
            def call(*args):
                before = ticks
                getattr(module, name)(*args)
                during[name] = ticks - before

            return call

    p = problem(LSTM, 400, 8, 256, rows="packed")
    monkeypatch.setattr(_native, "module", Counting)
    other = threading.Thread(target=tick)
    other.start()
    try:
        both_ways(p)
    finally:
        done.set()
        other.join()
    assert during["lstm_forward_cpu"] >= 2 and during["lstm_backward_cpu"] >= 2
