"""The kernels of benchmarks/micro under the emulation: they compute what they say, in every order, without a race."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from emulation import Emulated, NoCompiler, build

from benchmarks.micro import build as micro_build
from benchmarks.micro import cases
from benchmarks.micro.measure import measured

SOURCE = micro_build.SOURCE
# Of each kernel a small launch.
SMALL = [
    cases.block_barrier(True, 3),
    cases.cluster_barrier("exchange", 3),
    cases.grid_barrier(True, 3),
    cases.ping_pong(False, 3),
    cases.ping_pong(True, 2),
    cases.all_gather(False, 64, 2, warps=1),
    cases.all_gather(True, 64, 2, warps=1),
    cases.l2_flags(True, True, 3),
    cases.l2_flags(True, False, 3),
    cases.products(False, 8, 16, 2),
    cases.products(True, 2, 16, 1),
]
LARGER = [
    cases.block_barrier(False, 16),
    cases.cluster_barrier("relaxed", 4),
    cases.cluster_barrier("ordered", 2),
    cases.cluster_barrier("exchange", 8),
    cases.grid_barrier(False, 4),
    cases.ping_pong(True, 16),
    cases.all_gather(False, 32, 4, warps=2),
    cases.all_gather(True, 32, 4, warps=2),
    cases.all_gather(False, 128, 2),
    cases.all_gather(True, 128, 2),
    cases.l2_flags(False, True, 4),
    cases.l2_flags(True, False, 16),
    cases.products(False, 1, 16, 4),
    cases.products(False, 4, 32, 8),
    cases.products(True, 4, 32, 4),
]
ROUNDS = 4


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return build(SOURCE, race=True)
    except NoCompiler as why:
        pytest.skip(str(why))


def run(case: cases.Case, device: Emulated) -> dict:
    return measured(case, device, repeats=2, most_rounds=ROUNDS)


def named(case: cases.Case) -> str:
    return "-".join([case.name, *map(str, case.parameters.values())]).replace(" ", "_")


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_right_in_every_order_without_a_race(case, library):
    assert case.expected is not None
    for seed in range(9):
        row = run(case, Emulated(library, race=True, seed=seed))
        assert row["rounds"] == ROUNDS and row["cycles"] > 0


@pytest.mark.parametrize("case", LARGER, ids=named)
def test_the_sizes_that_are_measured(case, library):
    run(case, Emulated(library, race=True, seed=1))


def test_a_wrong_value_is_an_error(library):
    case = dataclasses.replace(SMALL[0], expected=lambda rounds: torch.zeros(96, dtype=torch.int64))
    with pytest.raises(
        ArithmeticError, match="of 96 words are wrong, the first at 0: expected 0, got"
    ):
        run(case, Emulated(library, race=True))
