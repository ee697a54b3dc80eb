"""The resident recurrent kernels (csrc/lstm/lstm_resident.h), run without a GPU: numbers against the definition in fp64,
what is read and written, races.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import emulation
from sora_kernels.ops.lstm import reference, resident
from sora_kernels.ops.lstm.cells import CELLS, GRU, LSTM, RNN_RELU, Cell
from sora_kernels.testing import assert_within_2x
from test_lstm_cpu import Problem, named, output_gradients, problem

SOURCE = emulation.ROOT / "tests/native/emulated/lstm_resident.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = {0: 4, 2: 2, 3: 2}  # of an element, by DType


class Binding:
    """The binding's two functions, by the emulation: arrays are copied to emulated memory, where every access outside them
    is an error, and back.
    """

    def __init__(self, device: emulation.Emulated) -> None:
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


def memory(address: int, count: int) -> Tensor:
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)


def install(monkeypatch: pytest.MonkeyPatch, seed: int, race: bool) -> None:
    try:
        device = emulation.emulated(SOURCE, race=race, seed=seed)
    except emulation.NoCompiler as why:
        pytest.skip(str(why))
    module = SimpleNamespace(module=lambda: Binding(device))
    monkeypatch.setattr(resident, "_native", module)


@pytest.fixture(params=(1, 2, 5), ids="seed {}".format)
def seed(request: pytest.FixtureRequest) -> int:
    return request.param


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
    with Tf32Products():
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
    sides: list[list[dict[str, Tensor]]] = [[], [], []]
    for p in problems:
        found = ours(p)
        y = found["y"] if p.cell is RNN_RELU else None  # all three behind one mask
        plain, truth = by_definition(p, y), by_definition(p.to(torch.float64), y)
        assert list(found) == list(plain) == list(truth)
        for side, results in zip(sides, (found, plain, truth), strict=True):
            side.append({name: t.flatten() for name, t in results.items()})
    for name in sides[0][0]:
        results, plain, truth = (torch.cat([f[name] for f in side]) for side in sides)
        assert_within_2x(results, plain, truth, name=name, storage=problems[0].x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_even_rows(monkeypatch, cell, dtype):
    """The kernels of exact sizes: full and partial groups of 8 rows, both directions."""
    install(monkeypatch, seed=2, race=False)
    sizes = (32, 128 if dtype.itemsize == 2 else 64)
    check(*(problem(cell, 6, B, H, D=2, dtype=dtype) for B, H in zip((3, 13), sizes)))
