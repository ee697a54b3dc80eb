"""Outputs and every gradient by name under the 2x rule, for every cell, feature, backend and dtype."""

from __future__ import annotations

import pytest
import torch

NATIVE = pytest.param("native", marks=pytest.mark.native)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LENGTHS = torch.tensor([3, 0, 5])

# A shape and why it is here.
SHAPES = {
    "tiny": {},
    "one_step": {"T": 1},
    "one_unit": {"H": 1, "I": 1, "B": 1},
    "vector_tail": {"T": 4, "B": 7, "I": 9, "H": 37},  # the last block of units is not full
    "whole_blocks": {"T": 3, "B": 13, "I": 16, "H": 64},
    "few_steps": {"T": 2, "B": 2, "I": 8, "H": 200},  # packing w_hh costs more than the steps
    "one_row": {"T": 6, "B": 1, "H": 20},
    "bidirectional": {"bidirectional": True, "H": 18},
    "two_layers": {"layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True},
    "no_states": {"states": False, "H": 9},
}
FEATURES = {
    "lengths": {"lengths": LENGTHS, "H": 9},
    "lengths_int32_both": {"lengths": LENGTHS.int(), "layers": 2, "bidirectional": True},
    "packed": {"packed": [5, 4, 2], "H": 20},
    "packed_both": {"packed": [5, 5, 1], "bidirectional": True, "layers": 2, "bias": False},
    "recompute": {"memory": "recompute", "H": 20, "bidirectional": True},
    "recompute_lengths": {"memory": "recompute", "lengths": LENGTHS, "bidirectional": True},
    "recompute_packed": {"memory": "recompute", "packed": [5, 2, 2]},
}
PROJECTED = {
    "projected": {"proj": 2, "H": 9},
    "projected_both": {"proj": 3, "bidirectional": True, "layers": 2, "bias": False},
    "projected_lengths": {"proj": 2, "lengths": LENGTHS},
    "projected_packed": {"proj": 2, "packed": [5, 3, 1], "bidirectional": True},
    "projected_recompute": {"proj": 2, "memory": "recompute"},
}
RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
# What torch's layer cannot do: there the reference in the same dtype is plain torch.
BEYOND = {
    "reset": {"reset": RESET, "H": 9},
    "reset_both": {"reset": RESET, "bidirectional": True, "layers": 2},
    "reset_lengths": {"reset": RESET, "lengths": LENGTHS, "bidirectional": True},
    "reset_recompute": {"reset": RESET, "memory": "recompute", "bidirectional": True},
}
CELLS = {
    "cells": {"return_cells": True, "T": 4, "H": 9, "bidirectional": True},
    "cells_two_layers": {"return_cells": True, "layers": 2},
    "cells_lengths": {"return_cells": True, "lengths": LENGTHS, "bidirectional": True},
    "cells_packed": {"return_cells": True, "packed": [5, 3, 1]},
    "cells_everything": {
        "return_cells": True, "lengths": LENGTHS, "reset": RESET, "proj": 2, "bidirectional": True,
        "layers": 2, "memory": "recompute",
    },
}  # fmt: skip


def named(*tables):
    return {
        "argvalues": [case for table in tables for case in table.values()],
        "ids": [name for table in tables for name in table],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", (NATIVE, "reference"))
@pytest.mark.parametrize("case", **named(SHAPES))
def test_dense(recurrent, kind, case, backend, dtype):
    recurrent(kind, dtype=dtype, **case).check(backend, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", (NATIVE, "reference"))
@pytest.mark.parametrize("case", **named(FEATURES))
def test_features(recurrent, kind, case, backend, dtype):
    recurrent(kind, dtype=dtype, **case).check(backend, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", (NATIVE, "reference"))
@pytest.mark.parametrize("case", **named(PROJECTED))
def test_projection(recurrent, case, backend, dtype):
    recurrent("lstm", dtype=dtype, **case).check(backend, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(BEYOND))
@pytest.mark.native
def test_reset(recurrent, kind, case, dtype):
    recurrent(kind, dtype=dtype, **case).check("native", "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(CELLS))
@pytest.mark.native
def test_cells(recurrent, case, dtype):
    recurrent("lstm", dtype=dtype, **case).check("native", "reference")


@pytest.mark.parametrize("backend", (NATIVE, "reference"))
def test_last_cell_is_the_last_of_the_cells(recurrent, backend):
    call = recurrent("lstm", H=9, bidirectional=True, return_cells=True)
    _, _, c_n, cells = call.call(backend=backend)
    assert torch.equal(cells[-1, :, :9], c_n[0]) and torch.equal(cells[0, :, 9:], c_n[1])
    with torch.no_grad():
        assert torch.equal(call.call(backend=backend)[3], cells)


@pytest.mark.native
def test_reset_in_packed_data(recurrent, kind):
    call = recurrent(kind, packed=[5, 4, 2], bidirectional=True, dtype=torch.float64)
    reset = torch.zeros(11, dtype=torch.bool)
    reset[[0, 4, 7]] = True
    call.with_options(reset=reset).check("native", "reference")


@pytest.mark.parametrize("backend", (NATIVE, "reference"))
def test_recompute_saves_no_tapes(recurrent, kind, backend):
    """What autograd holds after forward: with "recompute" nothing of the gates' size."""
    call = recurrent(kind, T=6, B=4, I=3, H=16)
    held = {}
    for memory in ("save", "recompute"):
        sizes: list[int] = []

        def keep(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        leaves = {name: t.detach().requires_grad_() for name, t in call.inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            call.call(leaves, backend=backend, memory=memory)
        held[memory] = sum(sizes)
    rows = 6 * 4 * 16
    tapes = call.cell.tape + call.cell.has_c
    assert held["save"] - held["recompute"] == rows * tapes
