"""The CUDA step kernels (csrc/lstm/step_kernels.cuh), run without a GPU: numbers against the definition in fp64, what
is read and written, races. tests/ops/test_recurrent_steps.py has the same walk over the CPU's steps.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from emulation import Emulated, NoCompiler, build, emulated
from test_lstm_cpu import (
    assert_same_bits,
    both_ways,
    check,
    named,
    output_gradients,
    problem,
)
from test_lstm_resident import FEW
from test_lstm_resident import install as install_resident
from torch import Tensor

from sora_kernels.ops.common.dtypes import DTYPE_CODES
from sora_kernels.ops.lstm import native, projection, resident, steps
from sora_kernels.ops.lstm.cells import CELLS, GRU, LSTM, Cell
from sora_kernels.ops.lstm.reference import state_dtype
from sora_kernels.testing import assert_close

SOURCE = Path(__file__).parent / "emulated" / "lstm_steps.cu"
KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "lstm" / "step_kernels.cuh"
DTYPES = (torch.float32, torch.bfloat16)
OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}


class Array(NamedTuple):
    """Rows of bytes in memory, the last without what lies between it and the next."""

    rows: int
    width: int
    stride: int

    @property
    def bytes(self) -> int:
        return (self.rows - 1) * self.stride + self.width if self.rows else 0

    def between(self, t: Tensor) -> Tensor:
        """What lies between the rows: another direction's."""
        gaps = max(self.rows - 1, 0)
        return t[: gaps * self.stride].view(gaps, self.stride)[:, self.width :]


class Walk:
    """The arguments of all steps of a direction. Arrays are copied to emulated memory, where every access outside them
    is an error; what a step wrote is copied back.
    """

    OUTPUTS: tuple[str, ...]

    def __init__(self, device: Emulated, dtype: int, sizes: tuple[int, ...], named: dict) -> None:
        code, self.T, self.B, self.H, self.direction, self.offsets_at, lengths, reset = sizes
        self.device, self.code, self.cell = device, dtype, tuple(CELLS.values())[code]
        self.element = OF_CODE[dtype].itemsize
        self.state = state_dtype(OF_CODE[dtype]).itemsize
        self.offsets = [t * self.B for t in range(self.T + 1)]
        if self.offsets_at:
            offsets = memory(self.offsets_at, 8 * (self.T + 1))
            self.offsets = offsets.view(torch.int64).tolist()
        arrays = {k: self.array(k, named) for k in named if not k.endswith("_stride")}
        arrays |= {"lengths": Array(1, 8 * self.B, 0), "reset": Array(1, self.offsets[-1], 0)}
        addresses = {**named, "lengths": lengths, "reset": reset}
        self.held: dict[int, tuple[Array, Tensor, Tensor]] = {}  # by address: some are one array
        for name, array in arrays.items():
            address = addresses[name]
            if address and address not in self.held:
                host = memory(address, array.bytes)
                self.held[address] = array, host, device.tensor(host, name)
        self.written = {named[k] for k in self.OUTPUTS} - {0}
        self.numbers = torch.tensor([
            *sizes[:5], self.offsets_at, *map(self.place, (lengths, reset)),
            *(n if k.endswith("_stride") else self.place(n) for k, n in named.items()),
        ])  # fmt: skip

    def array(self, name: str, named: dict) -> Array:
        raise NotImplementedError

    def place(self, address: int) -> int:
        return self.held[address][2].data_ptr() if address else 0

    def rows(self, t: int) -> int:
        """Of step t; of none, all."""
        return self.offsets[t + 1] - self.offsets[t] if 0 <= t < self.T else self.B

    def run(self, function: str, t: int, address: int, product: Array) -> None:
        given = None
        if address:
            given = self.device.tensor(memory(address, product.bytes), "product")
        self.device.run(function, self.code, self.numbers, ctypes.c_int64(t), given)
        for address in self.written:
            array, host, emulated = self.held[address]
            same = torch.equal(array.between(emulated), array.between(host))
            assert same, f"{function} wrote between the rows of an array"
            host.copy_(emulated)


class ForwardSteps(Walk):
    NAMES = (
        "input", "input_stride", "b_ih", "b_hh", "h_prev", "h", "c", "y", "y_stride", "cells", "cells_stride", "gates",
    )  # fmt: skip
    OUTPUTS = ("h", "c", "y", "cells", "gates")

    def __init__(self, device: Emulated, dtype: int, sizes: tuple[int, ...], *numbers: int) -> None:
        super().__init__(device, dtype, sizes, dict(zip(self.NAMES, numbers[:-2], strict=True)))

    def array(self, name: str, named: dict) -> Array:
        H, N, G, size = self.H, self.offsets[-1], self.cell.gates, self.element
        if name in ("b_ih", "b_hh"):
            return Array(1, G * H * size, 0)
        if name in ("h_prev", "h"):
            return Array(1, self.B * H * size, 0)
        if name == "c":
            return Array(1, self.B * H * self.state, 0)
        if name == "cells":
            return Array(N, H * self.state, named["cells_stride"] * self.state)
        if name == "y":
            return Array(N, H * size, named["y_stride"] * size)
        columns = 4 if named["gates"] else G  # gates may be input
        return Array(N, columns * H * size, named["input_stride"] * size)

    def __call__(self, t: int, hidden: int) -> None:
        product = Array(1, self.rows(t) * self.cell.gates * self.H * self.element, 0)
        self.run("run_lstm_step_forward", t, hidden, product)


class BackwardSteps(Walk):
    NAMES = (
        "gates", "cells", "cells_stride", "c0", "h", "h_stride", "dy", "dy_stride", "dcells", "dcells_stride", "dh",
        "dc", "dgates",
    )  # fmt: skip
    OUTPUTS = ("dh", "dc", "dgates")

    def __init__(self, device: Emulated, dtype: int, sizes: tuple[int, ...], *numbers: int) -> None:
        super().__init__(device, dtype, sizes, dict(zip(self.NAMES, numbers[:-2], strict=True)))

    def array(self, name: str, named: dict) -> Array:
        H, N, size = self.H, self.offsets[-1], self.element
        if name in ("dh", "dc"):
            return Array(1, self.B * H * self.state, 0)
        if name == "c0":
            return Array(1, self.B * H * size, 0)
        if name in ("cells", "dcells"):
            return Array(N, H * self.state, named[f"{name}_stride"] * self.state)
        if name in ("h", "dy"):
            return Array(N, H * size, named[f"{name}_stride"] * size)
        return Array(1, N * (self.cell.tape or 1) * H * size, 0)

    def __call__(self, t: int, dh_next: int) -> None:
        later = t - 1 if self.direction else t + 1
        product = Array(1, self.rows(later) * self.H * self.element, 0)
        self.run("run_lstm_step_backward", t, dh_next, product)


def memory(address: int, count: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)


def walk_on(monkeypatch: pytest.MonkeyPatch, device: Emulated) -> list[str]:
    """Sends every call step by step over the emulation; the list of the passes' launches."""
    launches: list[str] = []

    def counted(kind: type[Walk]):
        def make(*args):
            launches.append(kind.__name__)
            return kind(device, *args)  # type: ignore[call-arg]

        return make

    module = SimpleNamespace(
        LstmForwardSteps=counted(ForwardSteps), LstmBackwardSteps=counted(BackwardSteps)
    )
    monkeypatch.setattr(steps, "_native", SimpleNamespace(module=lambda: module))
    monkeypatch.setattr(native, "walks_steps", lambda *call: True)
    return launches


@pytest.fixture
def walked(monkeypatch):
    """``walked(seed)``: calls go over the emulated kernels, with the race detector."""

    def install(seed: int) -> list[str]:
        try:
            device = emulated(SOURCE, race=True, seed=seed)
        except NoCompiler as why:
            pytest.skip(str(why))
        return walk_on(monkeypatch, device)

    return install


def project_over(monkeypatch: pytest.MonkeyPatch, core: object) -> None:
    for name in ("forward", "backward"):
        function = getattr(projection, name)
        monkeypatch.setattr(
            native, name, lambda cell, *args, f=function: f(core, *(a for a in args if a != ()))
        )


@pytest.fixture(params=CELLS.values(), ids=CELLS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16, torch.float64), ids=str)
def test_even_rows(walked, cell, dtype):
    """Both directions; more than one block of threads; one step; no biases."""
    launches = walked(1)
    check(problem(cell, 3, 13, 21, D=2, dtype=dtype))
    check(problem(cell, 1, 3, 5, bias=False, dtype=dtype))
    assert launches.count("ForwardSteps") == launches.count("BackwardSteps") == 3


@pytest.mark.parametrize("reset", (False, True), ids=("", "reset"))
@pytest.mark.parametrize("rows", ("lengths", "packed"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_end_and_begin_again(walked, cell, dtype, rows, reset):
    """Lengths on the device, of 0 too; nothing past a row's end is read (it is NaN)."""
    walked(2)
    check(problem(cell, 5, 6, 20, D=2, rows=rows, reset=reset, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resets(walked, cell, dtype):
    walked(3)
    check(problem(cell, 5, 6, 20, D=2, reset=True, dtype=dtype))


@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_tapes_made_again(walked, rows):
    """By the forward kernels: of every step at once (GRU), with the products known (LSTM)."""
    walked(4)
    for own in (LSTM, GRU):
        p = problem(own, 4, 3, 18, D=2, rows=rows, reset=True, dtype=torch.float64)
        result = native.forward(p.cell, *p.inputs, p.bias, True)
        kept, again = both_ways(p, result), both_ways(p, result._replace(gates=None))
        for name, t in again.items():
            assert_close(t, kept[name], "transform_fp64", name=name)


@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_only_some_states_and_gradients(walked, cell, rows):
    """Arrays that are not there; the gradient of each output alone, which together are the whole."""
    walked(5)
    p = problem(cell, 4, 3, 18, D=2, rows=rows, reset=True, dtype=torch.float64)
    if rows != "packed":
        p.h0 = None
    p.c0 = None
    result = native.forward(p.cell, *p.inputs, p.bias, True)
    needs = [True] * (2 + cell.has_c + len(p.weights))

    def gradients(grads):
        found = native.backward(
            p.cell, *grads, *p.inputs, result.y, result.cells, result.gates, p.bias, needs
        )
        return named(p, result, found)

    grads = output_gradients(p, result)
    whole = gradients(grads)
    parts = [gradients([g if k == i else None for i, g in enumerate(grads)]) for k in range(4)]
    for name in whole:
        if name.startswith("d"):
            total = sum(part[name] for part in parts)
            assert_close(total, whole[name], "transform_fp64", name=name)


def test_order_of_threads_does_not_show(walked, cell):
    p = problem(cell, 4, 15, 20, D=2, rows="lengths", reset=True, dtype=torch.bfloat16)
    found = []
    for seed in (0, 5, 8):
        walked(seed)
        found.append(both_ways(p))
    for other in found[1:]:
        assert_same_bits(found[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_projections(walked, monkeypatch, rows, dtype):
    """projection.py over these kernels, as on CUDA."""
    launches = walked(6)
    project_over(monkeypatch, steps)
    check(problem(LSTM, 5, 6, 20, D=2, P=7, rows=rows, reset=rows != "even", dtype=dtype))
    p = problem(LSTM, 3, 2, 6, P=2, rows=rows, bias=False, dtype=dtype)
    p.h0 = p.h0 if rows == "packed" else None
    check(p)
    assert set(launches) == {"ForwardSteps", "BackwardSteps"}


@pytest.mark.parametrize("rows", ("even", "lengths", "packed"))
def test_projections_over_resident_weights(monkeypatch, rows):
    """The other core; with tapes and without, the same bits."""
    install_resident(monkeypatch, 6, FEW)
    project_over(monkeypatch, resident)
    p = problem(LSTM, 5, 6, 32, D=2, P=7, rows=rows, reset=rows != "even", dtype=torch.bfloat16)
    check(p)
    result = native.forward(p.cell, *p.inputs, p.bias, True)
    kept, again = both_ways(p, result), both_ways(p, result._replace(gates=None))
    del kept["gates"]
    assert_same_bits(kept, again)


# Ways to break a kernel, and what says so. Each is a choice at run time, so that all are one library.
BROKEN = {
    1: ("Memory::state(a.c, at)", "Memory::state(a.c, {} ? at ^ 1 : at)", "race"),
    2: ("Memory::state(a.dc, at)", "Memory::state(a.dc, {} ? at ^ 1 : at)", "race"),
    3: ("if (at >= count) return;", "if (!{} && at >= count) return;", "out of bounds"),
    4: (
        "y_at = row * a.y_stride + j",
        "y_at = row * a.y_stride + j + ({} ? H : 0)",
        "between the rows",
    ),
    5: ("bool clears = rows.clears(b)", "bool clears = !{} && rows.clears(b)", "against fp64"),
    6: ("if (!rows.runs(b))", "if (!{} && !rows.runs(b))", "NaN differs"),
}


@pytest.mark.parametrize("number", BROKEN)
def test_a_broken_kernel_is_found(monkeypatch, number):
    text = KERNELS.read_text()
    for k, (whole, broken, _) in BROKEN.items():
        assert whole in text
        text = text.replace(whole, broken.format(f"(emu::mutation == {k})"))
    try:
        library = build(SOURCE, race=True, replaced={KERNELS: text})
    except NoCompiler as why:
        pytest.skip(str(why))
    device = Emulated(library, race=True, seed=1)
    walk_on(monkeypatch, device)
    p = problem(LSTM, 4, 6, 20, D=2, rows="lengths", reset=True)
    check(p)
    device.mutate(number)
    try:
        with pytest.raises(AssertionError, match=BROKEN[number][2]):
            check(p)
    finally:
        device.mutate(None)
