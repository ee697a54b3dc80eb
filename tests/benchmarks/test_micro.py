"""The micro-benchmarks where there is no GPU: what is said then, that the kernels compile for GPUs, how a process that
dies is survived, and the arithmetic of a row.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.micro import build, cases, measure, primitives

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_compiles_without_spills(tmp_path):
    try:
        target = tmp_path / "micro.so"
        said = build.compile_for("90a", target, "-shared", "-Xcompiler=-fPIC", "-Xptxas=-v")
    except build.CannotBuild as why:
        if str(why).startswith("no "):
            pytest.skip(str(why))
        raise
    kernels = re.findall(r"Compiling entry function '(\S+)'", said)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = dict(zip(kernels, map(int, re.findall(r"Used (\d+) registers", said)), strict=True))
    assert len(kernels) == 25 and set(spills) == {("0", "0")}
    assert "warning" not in said
    # A is really in registers: 4 for each of 16 or 32 tiles, beside B and the sums.
    held = [
        (n, int(tiles))
        for n in kernels
        for tiles in re.findall(r"products_kernel.*Li(16|32)ELi\d+E", n)
    ]
    assert len(held) == 10
    for name, tiles in held:
        assert registers[name] >= 4 * tiles + tiles // 2, name
        # The occupancy that clusters are asked about: one CTA of 256 threads an SM.
        assert tiles == 16 or registers[name] > 128, name
    library = ctypes.CDLL(str(target))
    for function in {case.function for case in cases.all_cases(132)} | {"micro_active_clusters"}:
        assert getattr(library, function), function
    assert (
        library.micro_all_gather(0, 4, 1000, 8, 1, None, None, None, None) == 1
    )  # cudaErrorInvalidValue


def test_a_library_is_built_once(monkeypatch, tmp_path):
    calls = []

    def compiled(arch: str, target: Path, *flags: str) -> str:
        calls.append((arch, flags))
        target.write_text("a library")
        return ""

    try:
        build.find_nvcc()
    except build.CannotBuild as why:
        pytest.skip(str(why))
    monkeypatch.setattr(build, "compile_for", compiled)
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    found = build.shared_object((9, 0))
    assert build.shared_object((9, 0)) == found and found.read_text() == "a library"
    assert build.shared_object((8, 6)) != found
    assert calls == [(arch, ("-shared", "-Xcompiler=-fPIC")) for arch in ("90a", "86")]
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".so", ".so"]


def test_without_a_gpu_one_line_says_so():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.micro"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["primitives"] == "not measured: torch sees no CUDA device"
    assert done.stderr.splitlines()[-1] == report["primitives"]
    assert (
        report["predicted_for"] == "H200, 1.75 GHz"
        and report["versions"]["torch"] == torch.__version__
    )
    assert set(report["cpu"]) == {"copy_gb_per_s", "product_tflop_per_s", "launch_us"}
    assert report["cpu"]["launch_us"]["host"] > 0


def test_without_nvcc_it_is_not_measured(monkeypatch):
    def missing():
        raise build.CannotBuild("no nvcc (looked for it on PATH and in /usr/local/cuda)")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "find_nvcc", missing)
    assert primitives.why_not() == "no nvcc (looked for it on PATH and in /usr/local/cuda)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    assert primitives.why_not() == "the GPU is older than sm_80: T4"


PROGRAM = """
import json, sys
fatal = json.loads(sys.argv[1])
for number in range(int(sys.argv[2]), 6):
    row = {"name": f"case {number}"}
    print(json.dumps({"case": number, "row": row}), flush=True)
    if number in fatal:
        sys.exit("Traceback:\\n  what\\nCUDA error: unspecified launch failure\\nCompile with `A` to see more.")
    print(json.dumps({"case": number, "row": row | {"ns": number}, "done": True}), flush=True)
"""


@pytest.mark.parametrize("fatal", [[], [2], [0, 5], [1, 2, 3]], ids=str)
def test_a_kernel_that_traps_costs_its_row(fatal):
    def command(first: int) -> list[str]:
        return [sys.executable, "-c", PROGRAM, json.dumps(fatal), str(first)]

    rows = list(primitives.rows_of_processes(command))
    gave_up = len(fatal) >= primitives.MOST_FAILURES
    expected = [
        {"name": f"case {n}"}
        | ({"error": "CUDA error: unspecified launch failure"} if n in fatal else {"ns": n})
        for n in range(4 if gave_up else 6)
    ]
    if gave_up:
        expected.append({"error": "given up after 3 failures"})
    assert rows == expected
    failed = len(fatal) + gave_up
    assert (
        primitives.summary(rows) == f"primitives: {len(rows)} rows, {failed} failed, 0 not measured"
    )


class Clocked:
    """A device whose rounds take 200 cycles, at two cycles a nanosecond, from a start of their own for each CTA."""

    def __init__(self, out: int) -> None:
        self.out = out
        self.rounds: list[int] = []

    def tensor(self, value: torch.Tensor, name: str) -> torch.Tensor:
        return value

    def run(self, function: str, *arguments) -> None:
        *_, rounds, stamps, out, scratch = arguments
        assert not scratch.any()
        scratch.fill_(1)
        self.rounds.append(rounds)
        taken = 200 * rounds + (10 * len(self.rounds) if rounds > 64 else 0)
        for cta, begun in enumerate((1000, 90_000)):
            # The second warp begins and ends later; a third does not take part.
            stamps[cta, 0] = torch.tensor(
                [begun, begun, begun + taken - 50, begun + taken // 2 - 25]
            )
            late = torch.tensor([begun + 30, begun + 15, begun + taken, begun + taken // 2])
            stamps[cta, 1] = late
        out.fill_(self.out)


def case_for(device: Clocked, **changes) -> cases.Case:
    given = {
        "name": "a case", "parameters": {"n": 2}, "function": "f", "arguments": (7,), "ctas": 2, "warps": 3,
        "out_words": 4, "expected": lambda rounds: torch.full((4,), 64), "operations": 4,
        "predicted_ns": (20.04, 30.0),
    }  # fmt: skip
    return cases.Case(**(given | changes))


def test_a_row():
    device = Clocked(out=64)
    row = measure.measured(case_for(device), device)
    rounds = measure.CYCLES // 200
    assert device.rounds == [64] + [rounds] * (1 + measure.REPEATS)
    each = [(200 * rounds + 10 * n) / (4 * rounds) for n in range(3, 3 + measure.REPEATS)]
    assert row["name"] == "a case" and row["parameters"] == {"n": 2}
    assert row["predicted_ns"] == [20.0, 30.0]
    assert row["cycles"] == pytest.approx(sum(each) / len(each), abs=0.01)
    assert row["ns"] == pytest.approx(row["cycles"] / 2, abs=0.01)
    assert row["cycles_range"] == pytest.approx([each[0], each[-1]], abs=0.01)
    assert (
        row["clock_ghz"] == 2.0
        and row["repeats"] == measure.REPEATS >= 20
        and row["rounds"] == rounds
    )
    assert 0 < row["spread"] < 0.01


def test_wrong_values_are_no_measurement():
    device = Clocked(out=65)
    with pytest.raises(
        ArithmeticError, match="4 of 4 words are wrong, the first at 0: expected 64, got 65"
    ):
        measure.measured(case_for(device), device)


def test_cases_cover_the_questions():
    every = cases.all_cases(132)
    rows = [json.loads(json.dumps(measure.row_of(case))) for case in every]
    assert len({(row["name"], json.dumps(row["parameters"])) for row in rows}) == len(rows)

    def values(name: str, parameter: str) -> set:
        return {row["parameters"][parameter] for row in rows if row["name"] == name}

    assert values("block barrier", "warps") == {2, 4, 8, 16}
    for name in ("cluster barrier", "DSMEM one way"):
        assert values(name, "cluster") == {2, 4, 8, 16}
    assert values("DSMEM all-gather", "cluster") == {4, 8, 16}
    assert values("L2 flags, all to all", "ctas") == {2, 4, 8, 16, 32, 64, 128}
    assert values("grid barrier", "ctas") == {2, 4, 8, 16, 32, 64, 128, 132}
    assert values("mma, A in registers", "warps_per_scheduler") == {1, 2, 3, 4}
    for row in rows:
        low, high = row["predicted_ns"]
        assert 0 <= low <= high < 10_000, row
    assert not any(case.needs > (8, 0) for case in every if case.ctas == 1 or "L2" in case.name)
    assert max(case.ctas for case in cases.all_cases(46)) == 46


@pytest.mark.gpu
def test_every_case_on_a_gpu():
    assert primitives.why_not() == ""
    rows = list(primitives.rows())
    assert rows and not [row for row in rows if "error" in row]
    for row in rows:
        assert "not_measured" in row or row.get("ns", row.get("clusters", -1)) >= 0, row
