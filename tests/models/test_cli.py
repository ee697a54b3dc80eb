"""The ``sora`` command end to end, on small synthetic videos."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import torch

import sora_models
from sora_models.cli import main
from sora_models.demo import compare, memory
from sora_models.demo.measure import median_seconds

for module in ("av", "matplotlib", "tqdm"):
    pytest.importorskip(module)

SMALL = ["--frames", "6", "--stride", "2", "--size", "16x24", "--rounds", "1"]


@pytest.fixture
def no_memory(monkeypatch):
    """Leaves the memory out: each figure takes a process."""
    monkeypatch.setattr(memory, "peaks", lambda backend, shapes, device: [None] * len(shapes))


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_demo(write_video, moving_square, tmp_path, capsys):
    first = write_video(moving_square, "walk.mp4")
    second = write_video(moving_square[:1], "still.mp4")  # one frame
    out = tmp_path / "out"
    assert main(["demo", str(first), str(second), *SMALL, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    head, rule, *rows = text.split("\n\n")[0].splitlines()
    assert head.split()[0] == "clip" and "error sora" in head and "torch / sora" in head
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["walk", "still"]
    assert "6 x 16 x 24" in rows[0] and "1 x 16 x 24" in rows[1]
    if sys.platform == "linux":
        assert all(float(row.split()[-1]) >= 0 and float(row.split()[-2]) >= 0 for row in rows)
    assert "conv3d_bn_act ran on " in text and "lstm ran on " in text
    assert "the builds agree on every clip" in text
    wide, high = png_size(out / "demo.png")
    assert wide == 1800 and high > 1000


def test_demo_says_where_the_builds_disagree(
    write_video, moving_square, tmp_path, capsys, monkeypatch, no_memory
):
    path = write_video(moving_square)
    load = compare.calibrate

    def spoil(pair, clips):
        load(pair, clips)
        with torch.no_grad():
            pair.models[1].fc.bias[0] += 1e-3

    monkeypatch.setattr("sora_models.demo.run.calibrate", spoil)
    status = main(["demo", str(path), *SMALL, "--backend-b", "torch", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert status == 1
    assert "clip: torch logits (torch.float32): max error 1.0" in text and "agree" not in text
    row = text.splitlines()[2]
    assert row.split()[-2:] == ["-", "-"]  # memory that was not measured
    assert "1.0e-03" in row


def test_demo_calibrates_all_builds_alike(write_video):
    pair = compare.build_pair("torch", "sora", 3, torch.device("cpu"))
    compare.calibrate(pair, [torch.rand(1, 3, 2, 8, 8), torch.rand(1, 3, 3, 8, 8)])
    states = [m.state_dict() for m in (pair.plain, *pair.models, pair.truth)]
    for key, value in states[0].items():
        assert all(torch.equal(value.double(), state[key].double()) for state in states), key
    assert states[0]["cnn.0.bn.num_batches_tracked"] == 2
    assert pair.plain.cnn[0].bn.momentum == 0.1
    again = compare.build_pair("torch", "torch", 3, torch.device("cpu"))
    assert torch.equal(again.plain.fc.weight, pair.plain.fc.weight)


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("missing.mp4", None, "no such file"),
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"this is no video\n" * 99, "not a video that FFmpeg can open"),
    ],
)
def test_demo_names_a_clip_it_cannot_read(tmp_path, capsys, name, content, what):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["demo", str(path), "--out", str(tmp_path / "out")]) == 2
    streams = capsys.readouterr()
    assert f"sora: error: {path}: {what}" in streams.err and not streams.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "required"),
        (["dance"], "invalid choice"),
        (["demo", "--size", "64"], "expected HxW, such as 64x64; got '64'"),
        (["demo", "--frames", "0"], "expected at least 1; got 0"),
        (["demo", "--backend-a", "jax"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, what, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and what in capsys.readouterr().err


def test_a_bad_device_is_one_line(write_video, moving_square, capsys):
    path = write_video(moving_square)
    assert main(["demo", str(path), "--device", "abacus"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sora: error: ") and "abacus" in error
    if not torch.cuda.is_available():
        assert main(["demo", str(path), "--device", "cuda"]) == 2
        assert "device: torch sees no CUDA device here" in capsys.readouterr().err


def test_models_lists_them(capsys):
    assert main(["models"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == sora_models.list_models()
    assert all("torch" in row for row in rows)
    assert "226,858" in rows[0] and "sora, torch" in rows[0]


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "sora_models", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "demo" in done.stdout and "models" in done.stdout


def test_median_seconds_interleaves():
    order = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = median_seconds(runs, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and len(seconds) == 2 and min(seconds) >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_peak_memory_grows_with_the_clip():
    """The widest pair of maps of the CNN must stand in memory at once: 64 and 128 channels."""
    small, large = memory.peaks("torch", [(1, 3, 2, 32, 32), (1, 3, 16, 48, 48)], "cpu")
    assert small < large
    assert large >= (64 + 128) * 16 * 48 * 48 * 4


def test_peak_memory_passes_on_what_went_wrong():
    with pytest.raises(RuntimeError, match=r"backend 'torch' failed:\n.*(?s:.*)clip: expected"):
        memory.peaks("torch", [(1, 2, 1, 4, 4)], "cpu")
