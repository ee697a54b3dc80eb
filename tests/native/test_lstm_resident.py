"""The resident recurrent kernels (csrc/lstm/lstm_resident.h), run without a GPU: numbers against the definition in
fp64, what is read and written, races.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation import Emulated, LaunchError, NoCompiler, build, emulated
from mutation import mutate
from test_lstm_cpu import Problem, assert_same_bits, named, output_gradients, problem
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sora_kernels.ops.common.dtypes import DTYPE_CODES
from sora_kernels.ops.lstm import plans, reference, resident
from sora_kernels.ops.lstm.cells import CELLS, GRU, LSTM, RNN_RELU, Cell
from sora_kernels.testing import assert_within_2x, poisoned

SOURCE = Path(__file__).parent / "emulated" / "lstm_resident.cu"
FEW = SOURCE.with_name("lstm_resident_few.cu")
KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "lstm"
DTYPES = (torch.float32, torch.bfloat16)
BYTES = {0: 4, 2: 2, 3: 2}  # of an element, by DType


class Binding:
    """The binding's two functions, by the emulation: arrays are copied to emulated memory, where every access outside
    them is an error, and back.
    """

    def __init__(self, device: Emulated) -> None:
        self.device = device

    def lstm_resident_forward(self, dtype: int, numbers: tuple[int, ...], *where: int) -> None:
        sizes = Sizes(*numbers[:10])
        kinds = (
            "gx", "w_hh", "w_hh", "bias", "bias", "bias", "bias", "state", "state", "tape", "y", "cells",
            "state", "state",
        )  # fmt: skip
        self._run("run_lstm_resident_forward", dtype, sizes, numbers, kinds, outputs=range(9, 14))

    def lstm_resident_backward(self, dtype: int, numbers: tuple[int, ...], *where: int) -> None:
        sizes = Sizes(*numbers[:10])
        kinds = (
            "tape", "cells", "y", "w_hh", "w_hh", "state", "state", "y", "cells", "state", "state",
            "dgates", "state", "state",
        )  # fmt: skip
        self._run("run_lstm_resident_backward", dtype, sizes, numbers, kinds, outputs=range(11, 14))

    def _run(
        self, function: str, dtype: int, sizes: Sizes, numbers: tuple[int, ...], kinds: tuple[str, ...],
        outputs: range,
    ) -> None:  # fmt: skip
        integers = {7: 4 * sizes.B, 8: 8 * sizes.T, 9: sizes.data_rows}
        held, given = {}, list(numbers)
        for k, address in enumerate(numbers[7:], 7):
            if address == 0:
                continue
            name = ("lengths", "offsets", "reset")[k - 7] if k < 10 else f"{kinds[k - 10]}[{k}]"
            count = integers[k] if k < 10 else sizes.bytes_of(kinds[k - 10], BYTES[dtype])
            held[k] = memory(address, count), self.device.tensor(memory(address, count), name)
            given[k] = held[k][1].data_ptr()
        self.device.run(function, dtype, torch.tensor(given))
        for k in outputs:
            if k + 10 in held:
                host, emulated = held[k + 10]
                host.copy_(emulated)


class Sizes(SimpleNamespace):
    def __init__(self, cell, T, B, H, D, members, data_rows, *_: int) -> None:
        super().__init__(
            cell=tuple(CELLS.values())[cell],
            T=T,
            B=B,
            H=H,
            D=D,
            members=members,
            data_rows=data_rows,
        )

    def bytes_of(self, kind: str, element: int) -> int:
        H, rows, G = self.H, self.D * self.data_rows, self.cell.gates
        count = {
            "gx": rows * G * H, "w_hh": G * H * H, "bias": G * H, "state": self.D * self.B * H,
            "tape": rows * 4 * H, "y": rows * H, "cells": rows * H,
            "dgates": rows * H * (4 if self.cell is GRU else G),
        }[kind]  # fmt: skip
        return self.members * count * (4 if kind == "cells" else element)


@pytest.fixture(params=CELLS.values(), ids=CELLS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


def memory(address: int, count: int) -> Tensor:
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)


def install(
    monkeypatch: pytest.MonkeyPatch, seed: int = 2, source: Path = SOURCE, race: bool = False
) -> None:
    """Makes the emulation what ``resident`` calls."""
    try:
        device = emulated(source, race=race, seed=seed)
    except NoCompiler as why:
        pytest.skip(str(why))
    monkeypatch.setattr(resident, "_native", SimpleNamespace(module=lambda: Binding(device)))


class Tf32Products(TorchFunctionMode):
    """fp32 products as tensor cores make them, and cuDNN by default: operands rounded to TF32, sums in fp32."""

    PRODUCTS = (
        torch.nn.functional.linear,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.mm,
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.PRODUCTS:
            args = (*map(tf32, args[:2]), *args[2:])
        return function(*args, **(kwargs or {}))


def tf32(t: Tensor) -> Tensor:
    if t.dtype != torch.float32:
        return t
    return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def ours(p: Problem, recompute: bool = False) -> dict[str, Tensor]:
    with Tf32Products(), poisoned():
        result = resident.forward(p.cell, *p.inputs, p.bias, True)
        gates = None if recompute else result.gates
        needs = [True] * (2 + p.cell.has_c + len(p.weights))
        grads = resident.backward(
            p.cell, *output_gradients(p, result), *p.inputs, result.y, result.cells, gates, p.bias, needs
        )  # fmt: skip
    return named(p, result, grads)


def by_definition(p: Problem, y: Tensor | None) -> dict[str, Tensor]:
    with Tf32Products():
        result = reference.layer(p.cell, *p.inputs, p.bias)
        grads = reference.layer_backward(
            p.cell, *output_gradients(p, result), *p.inputs, result.y if y is None else y.to(p.x.dtype),
            result.cells, result.gates, p.bias,
        )  # fmt: skip
    return named(p, result, grads)


def check(*problems: Problem) -> None:
    """Every result by the 2x rule; of several problems side by side, as one number says nothing."""
    check_results(problems, map(ours, problems))


def check_results(problems: Iterable[Problem], results: Iterable[dict[str, Tensor]]) -> None:
    sides: list[list[dict[str, Tensor]]] = [[], [], []]
    for p, found in zip(problems, results, strict=True):
        y = found["y"] if p.cell is RNN_RELU else None  # all three behind one mask
        plain, truth = by_definition(p, y), by_definition(p.to(torch.float64), y)
        assert list(found) == list(plain) == list(truth)
        for side, results in zip(sides, (found, plain, truth), strict=True):
            side.append({name: t.flatten() for name, t in results.items()})
    for name in dict.fromkeys(name for found in sides[0] for name in found):
        results, plain, truth = (torch.cat([f[name] for f in side if name in f]) for side in sides)
        assert_within_2x(results, plain, truth, name=name, storage=p.x.dtype)


def largest(dtype: torch.dtype) -> int:
    return plans.MAX_HIDDEN[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_even_rows(monkeypatch, cell, dtype):
    """The kernels of exact sizes: full and partial groups of 8 rows, both directions."""
    install(monkeypatch)
    check(
        problem(cell, 5, 13, largest(dtype), D=2, dtype=dtype),
        problem(cell, 20, 3, 32, D=2, dtype=dtype),
        problem(cell, 1, 8, 32, bias=False, dtype=dtype),
    )


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=lambda cell: cell.name)
def test_fp16(monkeypatch, cell):
    install(monkeypatch, seed=1)
    check(
        problem(cell, 20, 9, 32, D=2, dtype=torch.float16),
        problem(cell, 6, 5, 20, D=2, rows="lengths", reset=True, dtype=torch.float16),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_hidden_size(monkeypatch, cell, dtype):
    """Absent units, in pairs and one by one."""
    install(monkeypatch, seed=3)
    sizes = (1, 20, 50, 21) if dtype == torch.float32 else (1, 20, 100, 71)
    check(*(problem(cell, 5, 3, H, D=1 + H % 2, dtype=dtype) for H in sizes))


@pytest.mark.parametrize("rows", ["even", "lengths", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_end_and_begin_again(monkeypatch, cell, rows, dtype):
    """Lengths on the device, of 0 too, packed rows, resets; nothing past a row's end is read (it is NaN)."""
    install(monkeypatch, seed=4)
    check(
        problem(cell, 7, 13, 32, D=2, rows=rows, reset=True, dtype=dtype),
        problem(cell, 5, 8, 50, D=2, rows=rows, reset=rows == "even", dtype=dtype),
        problem(cell, 5, 3, 7, D=1, rows=rows, reset=True, dtype=dtype),
    )


def test_nothing_is_written_past_a_row(monkeypatch, cell):
    install(monkeypatch, seed=5)
    monkeypatch.setattr(resident.Steps, "new", filled_with_sevens)
    p = problem(cell, 6, 9, 32, D=2, rows="lengths", dtype=torch.bfloat16)
    result = resident.forward(p.cell, *p.inputs, p.bias, True)
    for name, t in (("y", result.y), ("cells", result.cells), ("gates", result.gates)):
        if t is not None:
            rows = t.movedim(0, 2) if name == "gates" else t
            assert (rows[~p.live] == 7).all(), name
            assert (rows[p.live] != 7).any(), name


def filled_with_sevens(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full(shape, 7, dtype=dtype or like.dtype)


def test_only_some_states_and_gradients(monkeypatch, cell):
    """h0 without c0, gradients of one output at a time, tapes that are made again."""
    install(monkeypatch, seed=6)
    p = problem(cell, 4, 3, 32, D=2, dtype=torch.bfloat16)
    assert_same_bits(ours(p), ours(p, recompute=True))
    p.c0 = None
    check(p)
    p.h0 = None
    check(p)
    result = resident.forward(p.cell, *p.inputs, p.bias, True)
    grads = output_gradients(p, result)
    whole = backward(p, result, grads)
    parts = [
        backward(p, result, [g if i == k else None for i, g in enumerate(grads)]) for k in range(4)
    ]
    for name in ("dh0", "dx"):
        some = sum(part[name].float() for part in parts)
        assert_within_2x(some, some, whole[name], name=name, storage=torch.bfloat16)


def backward(p: Problem, result: reference.Result, grads: list[Tensor | None]) -> dict[str, Tensor]:
    needs = [True] * (2 + p.cell.has_c + len(p.weights))
    found = resident.backward(
        p.cell, *grads, *p.inputs, result.y, result.cells, result.gates, p.bias, needs
    )
    return named(p, result, found)


def test_addresses_of_odd_elements(monkeypatch):
    """Arrays that begin at an odd element are read one by one: same bits."""
    install(monkeypatch, seed=7)
    p = problem(LSTM, 4, 3, 32, dtype=torch.bfloat16)
    aligned = ours(p)
    for k, w in enumerate(p.weights):
        p.weights[k] = torch.cat((w.new_zeros(1), w.flatten()))[1:].view(w.shape)
    assert p.weights[1].data_ptr() % 4 == 2
    for name, t in ours(p).items():
        assert_within_2x(
            t.float(), t.float(), aligned[name].double(), name=name, storage=torch.bfloat16
        )


def test_order_of_threads_does_not_show(monkeypatch, cell):
    p = problem(cell, 5, 9, 32, D=2, rows="lengths", reset=True, dtype=torch.bfloat16)
    found = []
    for seed in (0, 8, 11):
        install(monkeypatch, seed=seed)
        found.append(ours(p))
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_members(monkeypatch, cell):
    """Several layers in one launch: the bits of one at a time."""
    install(monkeypatch, seed=9)
    T, B, H, D, E = 3, 3, 20, 2, 2
    problems = [problem(cell, T, B, H, D=D, dtype=torch.bfloat16) for _ in range(E)]
    alone = [resident.forward(p.cell, *p.inputs, p.bias, True) for p in problems]
    gx = torch.stack([
        torch.stack([p.x.flatten(0, 1) @ p.weights[4 * d].t() for d in range(D)]) for p in problems
    ])  # fmt: skip
    like = alone[0]
    out = {
        name: t.new_full((E, *t.shape), torch.nan)
        for name in ("gates", "y", "cells", "h_n", "c_n") if (t := getattr(like, name)) is not None
    }  # fmt: skip

    def address(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    given = [gx] + [
        torch.stack([p.weights[4 * d + k] for p in problems]) for k in (1, 2, 3) for d in range(D)
    ]
    given += [torch.stack([p.h0 for p in problems])]
    given += [torch.stack([p.c0 for p in problems])] if cell.has_c else [None]
    resident._native.module().lstm_resident_forward(
        3,
        (cell.code, T, B, H, D, E, T * B, 0, 0, 0, *map(address, given), *(
            address(out.get(name)) for name in ("gates", "y", "cells", "h_n", "c_n")
        )),
        -1, 0,
    )  # fmt: skip
    for name, together in out.items():
        for e in range(E):
            assert torch.equal(together[e], getattr(alone[e], name)), name


@pytest.mark.parametrize(
    ("cell", "dtype", "H", "units"),
    [
        (LSTM, torch.bfloat16, 128, 128),
        (GRU, torch.bfloat16, 32, 32),
        (RNN_RELU, torch.bfloat16, 127, 128),
        (LSTM, torch.float32, 64, 64),
        (LSTM, torch.float32, 3, 64),
    ],
)
def test_plan(monkeypatch, cell, dtype, H, units):
    """What ``explain`` shows, all but registers, which the host has none of; no array is looked at."""
    install(monkeypatch)
    device = resident._native.module().device
    T, B, D, members = 5, 17, 2, 3
    numbers = torch.tensor([cell.code, T, B, H, D, members, T * B, 0, 0, 1])
    gates = {LSTM: 4, GRU: 3, RNN_RELU: 1}[cell]
    for backward in (0, 1):
        found = torch.zeros(5, dtype=torch.int64)
        device.run("run_lstm_resident_plan", DTYPE_CODES[dtype], numbers, backward, found)
        shared = 2 * 8 * units * dtype.itemsize * (gates if backward else 1)
        assert found.tolist() == [units, 3 * D * members, 2 * units, 0, shared]
    numbers[3] = 129
    with pytest.raises(LaunchError, match="error -3"):
        device.run("run_lstm_resident_plan", DTYPE_CODES[dtype], numbers, 0, found)


def test_arguments(monkeypatch):
    install(monkeypatch)
    p = problem(LSTM, 2, 2, 32, dtype=torch.bfloat16)
    for name, value, code in (
        ("H", 130, -3), ("H", 0, -4), ("T", 0, -4), ("D", 3, -4), ("members", 65536, -3), ("data_rows", 3, -4),
        ("dtype", 1, -1), ("gx", 0, -4), ("c_n", 0, -4), ("b_hh", 0, -4),
    ):  # fmt: skip
        with pytest.raises(LaunchError, match=f"error {code}"):
            forward_with(p, name, value)


def forward_with(p: Problem, name: str, value: int) -> None:
    """``resident.forward`` with one number of its call changed."""
    places = {"T": 1, "H": 3, "D": 4, "members": 5, "data_rows": 6, "gx": 10, "b_hh": 15, "c_n": 23}
    binding = resident._native.module()

    def run(dtype: int, numbers: tuple[int, ...], *where: int) -> None:
        changed = list(numbers)
        if name in places:
            changed[places[name]] = value
        given = torch.tensor(changed)
        binding.device.run("run_lstm_resident_forward", value if name == "dtype" else dtype, given)

    module = SimpleNamespace(lstm_resident_forward=run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "_native", SimpleNamespace(module=lambda: module))
        resident.forward(p.cell, *p.inputs, p.bias, True)


def ragged(cell: Cell) -> Problem:
    torch.manual_seed(0)
    return problem(cell, 5, 9, 32, D=2, rows="lengths", reset=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("seed", (0, 2, 5, 7))
def test_no_races(monkeypatch, cell, seed):
    install(monkeypatch, seed, FEW, race=True)
    ours(ragged(cell))


def test_every_synchronisation_is_needed(monkeypatch):
    """Without the barrier of either pass some order of threads gives a race, and a wrong number."""
    problems = [ragged(LSTM), ragged(GRU)]
    install(monkeypatch, 0, FEW)
    expected = [ours(p) for p in problems]

    def same(device: Emulated) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resident, "_native", SimpleNamespace(module=lambda: Binding(device)))
            for p, want in zip(problems, expected, strict=True):
                assert_same_bits(ours(p), want)

    files = [KERNELS / f"resident_{name}.cuh" for name in ("fwd", "bwd")]
    found = mutate(FEW, files, same, seeds=range(6))
    assert len(found.sites) == 2, found.table()
    for site in found.sites:
        for kind in found.builds:
            assert found.caught[site.number, kind], found.table()


@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_two_buffers_are_needed(monkeypatch, name):
    """With one buffer for what was and what comes, a barrier a step would not be enough."""
    problems = [ragged(LSTM)]
    text = (KERNELS / f"resident_{name}.cuh").read_text()
    one_buffer, count = re.subn(r"\n    buffer \^= [^;]*;", "", text)
    assert count == 1
    library = build(FEW, race=True, replaced={KERNELS / f"resident_{name}.cuh": one_buffer})
    caught = 0
    for seed in range(6):
        device = Emulated(library, race=True, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resident, "_native", SimpleNamespace(module=lambda d=device: Binding(d)))
            try:
                ours(problems[0])
            except LaunchError as error:
                assert "race" in str(error)
                caught += 1
    assert caught
