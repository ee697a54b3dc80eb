"""Every synchronisation of the demonstration kernels, removed or weakened in turn, is missed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulation import Emulated, NoCompiler, compiler
from mutation import mutate, sites_of

FOLDER = Path(__file__).parent / "emulated"
DEMO = FOLDER / "demo.cu"


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    try:
        compiler()
    except NoCompiler as why:
        pytest.skip(str(why))


def check_pipeline(device: Emulated) -> None:
    x = torch.arange(5.0 * 64).view(5, 64)
    out = device.tensor(torch.full((5, 64), torch.nan), "out")
    device.run("run_pipeline", device.tensor(x, "x"), out, 5)
    assert torch.equal(out, x + x.flip(1)), "a wrong result"


def check_all_gather(device: Emulated, bulk: bool) -> None:
    size, steps = 3, 5
    out = device.tensor(torch.zeros(size, steps, dtype=torch.int32), "out")
    device.run("run_all_gather", int(bulk), out, size, steps)
    values = torch.arange(size, dtype=torch.int32)
    for step in range(steps):
        values = torch.arange(size, dtype=torch.int32) + values.sum().int()
        assert torch.equal(out[:, step], values), "a wrong result"


@pytest.mark.parametrize("kernel", ["pipeline", "all_gather"])
def test_each_removed_synchronisation_is_noticed(kernel):
    def check(device: Emulated) -> None:
        if kernel == "pipeline":
            check_pipeline(device)
        else:
            check_all_gather(device, bulk=False)
            check_all_gather(device, bulk=True)

    found = mutate(DEMO, [FOLDER / f"{kernel}.cuh"], check)
    assert len(found.sites) >= {"pipeline": 5, "all_gather": 11}[kernel]
    assert not found.survivors, found.table()


def test_a_synchronisation_too_many_survives():
    source = FOLDER / "pipeline.cuh"
    text = source.read_text()
    assert "    sync_block();  // row is" in text

    # Two barriers in a row: either one is enough, so both are said to be unnoticed.
    doubled = text.replace("    sync_block();  // row", "    sync_block(); sync_block();  // row")
    found = mutate(DEMO, [source], check_pipeline, texts={source: doubled})
    assert [s.call for s in found.survivors] == ["sync_block()"] * 2


def test_sites():
    text = """
// sync_block() in a comment
void helper() { sync_warp(); }
  if (x) cp_async_wait<N>();
  while (load_acquire<Scope::gpu>(p + f(1)) < 3) {}
  store_release<Scope::gpu>(p, "sync_block()");
"""
    changed, sites = sites_of(text, "k.cuh")
    assert [str(s) for s in sites] == [
        "k.cuh:3  sync_warp()  ->  removed",
        "k.cuh:4  cp_async_wait<N>()  ->  removed",
        "k.cuh:4  cp_async_wait<N>()  ->  cp_async_wait<N + 1>()",
        "k.cuh:5  load_acquire<Scope::gpu>(p + f(1))  ->  load_relaxed<Scope::gpu>(p + f(1))",
        'k.cuh:6  store_release<Scope::gpu>(p, "sync_block()")  ->  removed',
        'k.cuh:6  store_release<Scope::gpu>(p, "sync_block()")  ->  '
        'store_relaxed<Scope::gpu>(p, "sync_block()")',
    ]
    assert changed.count("\n") == text.count("\n")
    assert "(::emu::mutation == 0 ? void() : sync_warp())" in changed
