from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sora_kernels import _tuning, audit, tune

ROOT = Path(__file__).resolve().parents[2]
KEY = {"layout": "channels_last", "itemsize": 2, "channels": 64}
CONFIG = {"BLOCK_M": 64, "BLOCK_C": 64, "ITERATIONS": 4, "num_warps": 8}


def test_candidates_stop_at_the_channels():
    grid = {"BLOCK_M": (16, 32), "BLOCK_C": (32, 64, 128), "num_warps": (4,)}
    found = tune.candidates(grid, {"channels": 54})
    assert len(found) == 4 and {c["BLOCK_C"] for c in found} == {32, 64}
    # Narrower than every block: the smallest one remains, and launches clip it.
    assert {c["BLOCK_C"] for c in tune.candidates(grid, {"channels": 8})} == {32}


def test_choose_is_conservative():
    shipped = [1.0, 2.0]
    assert tune.choose({0: [0.99, 1.96]}, shipped) is None  # within the margin
    assert tune.choose({}, shipped) is None  # every candidate failed
    number, ratio = tune.choose({0: [0.5, 4.0], 1: [0.8, 1.6]}, shipped)
    assert number == 1 and ratio == pytest.approx(0.8)


def test_merge_replaces_the_same_key_and_nothing_else():
    rows = tune.merge({}, "_k", KEY, CONFIG, ratio=0.9)
    rows = tune.merge(rows, "_k", {**KEY, "channels": 128}, {**CONFIG, "BLOCK_M": 32})
    rows = tune.merge(rows, "_other", KEY, CONFIG)
    before = json.dumps(rows)
    better = tune.merge(rows, "_k", KEY, {**CONFIG, "num_warps": 4})
    assert json.dumps(rows) == before  # the argument is left alone
    assert [row["config"]["num_warps"] for row in better["_k"]] == [8, 4]
    assert better["_other"] == rows["_other"]
    assert better["_k"][1]["match"] == {"layout": "channels_last", "itemsize": 2}
    assert better["_k"][1]["at"] == {"channels": 64}


def test_written_rows_are_looked_up(tmp_path, monkeypatch):
    rows = tune.merge({}, "_k", KEY, CONFIG)
    rows = tune.merge(rows, "_k", {**KEY, "channels": 512}, {**CONFIG, "BLOCK_C": 128})
    path = tmp_path / "ops" / "op" / "tuned" / "sm90.json"
    path.parent.mkdir(parents=True)
    tune.write(path, rows)
    assert json.loads(path.read_text()) == rows
    monkeypatch.setattr(_tuning.resources, "files", lambda package: tmp_path)
    _tuning.rows.cache_clear()
    try:
        key = tuple(sorted({**KEY, "channels": 96}.items()))
        assert _tuning.config("op", "_k", "sm90", key) == CONFIG
        key = tuple(sorted({**KEY, "channels": 400}.items()))
        assert _tuning.config("op", "_k", "sm90", key)["BLOCK_C"] == 128
    finally:
        _tuning.rows.cache_clear()
        _tuning.config.cache_clear()


def test_forced_config_reaches_the_plan():
    launches = pytest.importorskip("sora_kernels.ops.conv3d_bn_act.launches")
    call = ("_bn_act_fwd_kernel", "default", 1, 64, 100, True, torch.float32)
    shipped = launches.passes.plan(*call)
    with tune.forced(launches, "_bn_act_fwd_kernel", {**CONFIG, "BLOCK_M": 16}):
        assert launches.passes.plan(*call).tile["BLOCK_M"] == 16
        other = launches.passes.plan("_bn_stats_kernel", *call[1:])
        assert other.tile["BLOCK_M"] != 16
    assert launches.passes.plan(*call) == shipped


def test_launches_say_what_they_look_up(monkeypatch):
    """The kernels whose configs a launch asks for are those that it names. Those of all layers of shapes.yaml, in all
    layouts, are what the shipped file has rows for."""
    launches = pytest.importorskip("sora_kernels.ops.conv3d_bn_act.launches")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    asked: set[str] = set()
    archs: set[str] = set()
    lookup = _tuning.config

    def recorded(op, kernel, arch, key):
        asked.add(kernel)
        archs.add(arch)
        return lookup(op, kernel, arch, key)

    monkeypatch.setattr(_tuning, "config", recorded)
    found = set()
    for layer, shape in audit.shapes("conv3d_bn_act").items():
        for launch in launches.launches(layer, shape, device="meta"):
            asked.clear()
            launches.forget_plans()
            with launches.as_on("sm90"):
                launch.run()
            assert asked == set(launch.kernels), launch.label
            assert launch.key["layout"] in launches.CANDIDATES, launch.label
            found.update((kernel, launch.key["layout"]) for kernel in launch.kernels)
    assert archs == {"sm90"}  # every module plans for the GPU that it is told
    shipped = {k: v for k, v in _tuning.rows("conv3d_bn_act", "default").items() if k != "dispatch"}
    assert {kernel for kernel, _ in found} == set(shipped)
    named = {
        (kernel, row["match"]["layout"])
        for kernel, rows in shipped.items()
        for row in rows
        if "layout" in row.get("match", {})
    }
    assert named == {(kernel, layout) for kernel, layout in found if layout != "convolution"}


def test_an_architecture_has_rows_of_kernels_that_there_are():
    folder = ROOT / "sora_kernels" / "ops" / "conv3d_bn_act" / "tuned"
    rows = {
        path.stem: _tuning.rows("conv3d_bn_act", path.stem).keys() for path in folder.glob("*.json")
    }
    assert all(found <= rows["default"] for found in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_refused():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sora_kernels.tune", "conv3d_bn_act"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr


def test_the_interpreter_is_refused():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "sora_kernels.tune", "conv3d_bn_act"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 2 and "TRITON_INTERPRET=1 is set" in done.stderr
