"""The further baselines of a benchmark row, and the bytes that training keeps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import rivals, stacks, timers

ROOT = Path(__file__).resolve().parents[2]
compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler",
)


def unit(channels: int = 8) -> stacks.Stock:
    return stacks.Stock(
        3, channels, (3, 3, 3), (1, 1, 1), (1, 1, 1), groups=1, bias=False, activation="relu"
    )


def test_saved_bytes_count_a_storage_once_and_no_parameter():
    x = torch.randn(2, 3, 4, 6, 6)
    y = 2 * 8 * 4 * 6 * 6 * 4
    statistics = 2 * 8 * 4  # mean and 1/std
    # x; y, which BatchNorm saves; z, which ReLU saves in place of BatchNorm's output.
    assert rivals.saved_bytes(unit(), (x,)) == x.numel() * 4 + 2 * y + statistics

    class Twice(nn.Module):
        def forward(self, x):
            x = x.exp()
            return x.view(-1) * x.view(-1).sin()  # exp's, sin's and both factors: two storages

    leaf = torch.randn(10, 10, requires_grad=True)
    assert rivals.saved_bytes(Twice(), (leaf,)) == 2 * 100 * 4


def measurement(again: list[float]) -> timers.Measurement:
    samples = {
        "torch": [4.0, 4.0, 8.0],
        "sora": [2.0, 2.0, 4.0],
        "contiguous": [6.0, 6.0, 12.0],
        "freezing": [1.0, 2.2, 4.4],
    }
    return timers.Measurement("torch", samples, again, "")


def case() -> rivals.Case:
    return rivals.Case(
        "group", "cpu", torch.float32, {}, lambda provider: {}, 0, 0, layout="channels_last",
        rivals=("contiguous", "freezing"),
    )  # fmt: skip


def test_speedups_are_of_rounds_and_over_the_best():
    found = rivals.speedups(measurement([4.0, 4.0, 8.0]), "sora", case())
    over = {"channels_last": 2.0, "contiguous": 3.0, "freezing": 1.1}
    assert found == {"speedup_over": over, "speedup_over_best": 1.1}


def test_a_void_row_claims_nothing():
    found = rivals.speedups(measurement([5.0, 5.0, 10.0]), "sora", case())
    assert found == {"speedup_over": None, "speedup_over_best": None}


@compiles
def test_frozen_modules_are_frozen():
    """Beside one of their class that is compiled and not frozen: neither takes the other's code."""
    x = torch.randn(1, 3, 4, 6, 6).to(memory_format=torch.channels_last_3d)
    plain = unit().eval().to(memory_format=torch.channels_last_3d)
    compiled = torch.compile(plain)
    with torch.no_grad():
        compiled(x)
        frozen = [rivals.freeze(unit().eval().to(memory_format=torch.channels_last_3d), (x,))]
        frozen.append(rivals.freeze(unit().eval().to(memory_format=torch.channels_last_3d), (x,)))
        before = [m(x).clone() for m in (compiled, *frozen)]
        for module in (compiled, *frozen):
            module._orig_mod.conv.weight.mul_(2)
        after = [m(x) for m in (compiled, *frozen)]
    assert [a.equal(b) for a, b in zip(before, after, strict=True)] == [False, True, True]
    assert not before[1].equal(before[2])


@compiles
def test_a_graph_that_is_not_frozen_is_refused():
    x = torch.randn(1, 3, 4, 6, 6)
    with pytest.raises(RuntimeError, match="did not freeze"):
        rivals.freeze(unit().train(), (x,))


def test_a_missing_compiler_is_said(monkeypatch):
    def fail(module, inputs):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(rivals, "freeze", fail)
    x = torch.randn(1, 3, 2, 3, 3)
    found = rivals.of(unit().eval(), (x,), "channels_last", freezing=1)
    assert list(found.calls) == list(found.makers()) == ["contiguous"]
    assert found.info() == {"not_measured": {"freezing": "no C++ compiler"}}


def test_the_least_exact_is_chosen_and_must_be_right():
    truth = torch.linspace(-1, 1, 64).double()
    plain, coarser = truth.float() + 1e-5, truth.float() + 1.5e-5
    others = rivals.Rivals({"contiguous": lambda: coarser})
    assert rivals.least_exact(others, plain, truth).equal(coarser)
    assert rivals.least_exact(rivals.Rivals(), plain, truth) is plain
    wrong = rivals.Rivals({"contiguous": lambda: truth.float() + 1e-3})
    with pytest.raises(AssertionError, match="contiguous .*rms error"):
        rivals.least_exact(wrong, plain, truth)


@compiles
def test_rows_say_all_of_it(tmp_path):
    out = tmp_path / "run.json"
    foreign = ("TRITON_INTERPRET", "SORA_BACKEND", "PYTEST_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "benchmarks/test_bench_conv3d_bn_act.py", "-k", "slowfast.fast.res2.a and channels_last",
            "--device", "cpu", "--rounds", "2", f"--benchmark-json={out}",
        ],
        capture_output=True, text=True, env=env | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    rows = [b["extra_info"] for b in json.loads(out.read_text())["benchmarks"]]
    ours = {row["mode"]: row for row in rows if row["provider"] == "sora"}
    assert set(ours) == {"inference", "train"} and len(rows) == 4
    pixels = 16 * 28 * 28
    # x, the convolution's output and the block's, and two statistics a channel.
    stock = next(row for row in rows if (row["mode"], row["provider"]) == ("train", "torch"))
    assert stock["saved_bytes"] == 4 * (pixels * (32 + 8 + 8) + 2 * 8)
    assert 0 < ours["train"]["saved_bytes"] <= stock["saved_bytes"]
    assert "speedup_over" not in ours["train"] and "saved_bytes" not in ours["inference"]
    row = ours["inference"]
    if row["void"]:
        assert row["speedup_over"] is None
    else:
        assert set(row["speedup_over"]) == {"channels_last", "contiguous", "freezing"}
        assert row["speedup_over"]["channels_last"] == row["speedup"]
        assert row["speedup_over_best"] == min(row["speedup_over"].values())
