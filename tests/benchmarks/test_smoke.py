"""The suite itself: rows of every benchmark once, tiny, checked by the 2x rule and not timed (all of
them: ``pytest benchmarks --benchmark-disable``); one row timed for real."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

for needed in ("pytest_benchmark", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from pytest_benchmark.utils import get_machine_id  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    foreign = ("TRITON_INTERPRET", "SORA_BACKEND", "PYTEST_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    env |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def test_rows_run_and_are_right():
    done = run("benchmarks", "--benchmark-disable", "--device", "cpu", "--sample", "3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_named_backends_are_providers():
    """The fused Triton passes, in the interpreter, through the same rows."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    releases = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if releases[0] < (3, 7) and releases[1] >= (2, 5):
        pytest.skip("Triton 3.6's interpreter fails under numpy 2.5 (tests/conftest.py mends it)")
    done = run(
        "benchmarks/test_bench_conv3d_bn_act.py", "--benchmark-disable", "--device", "cpu",
        "--providers", "sora:hybrid", "-k", "crnn.conv1",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "8 passed" in done.stdout


def test_a_timed_row(tmp_path):
    out = tmp_path / "run.json"
    select = ("-k", "test_rnn and crnn.rnn and inference", "--device", "cpu")
    done = run("benchmarks/test_bench_lstm.py", *select, "--rounds", "6", f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads(out.read_text())
    assert {"slug", "cpu", "isa", "gpu", "threads", "versions"} <= set(found["machine_info"])
    assert "node" not in found["machine_info"]  # a host's name is nobody's business
    rows = {b["extra_info"]["provider"]: b for b in found["benchmarks"]}
    assert set(rows) == {"torch", "sora"}
    for provider, row in rows.items():
        info = row["extra_info"]
        assert row["group"] == rows["torch"]["group"] and len(row["stats"]["data"]) == 6
        assert info["within_2x"] and info["errors"]["output"]["max"] >= 0
        assert info["void"] or info["speedup"] > 0
        assert info["bytes"] > 0 and info["flops"] > 0 and 0 < info["roofline_share"]
        assert info["method"] == "wall clock, 1 thread" and info["provider"] == provider
        assert info["aa_noise"] <= 0.03 or info["void"]
    # The same run again, with another machine's history: refused.
    found["machine_info"]["cpu"] = "another"
    storage = tmp_path / "history" / get_machine_id()
    storage.mkdir(parents=True)
    (storage / "0001_other.json").write_text(json.dumps(found))
    compared = run(
        "benchmarks/test_bench_lstm.py", *select, "--rounds", "2", "--benchmark-compare",
        f"--benchmark-storage=file://{storage.parent}",
    )  # fmt: skip
    assert compared.returncode != 0
    assert "another machine's: cpu" in compared.stdout + compared.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("--providers", "jax"), {}, "--providers: expected torch, sora"),
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 is set"),
    ],
    ids=["providers", "interpreter"],
)
def test_bad_usage(arguments, variables, message):
    done = run("benchmarks/test_bench_lstm.py", *arguments, **variables)
    assert done.returncode == 4 and message in done.stdout + done.stderr
