"""The report of ``python -m sora_kernels.info``."""

from __future__ import annotations

import json

import pytest

import sora_kernels
from sora_kernels import _native, info
from sora_kernels._dispatch import OPERATORS

SECTIONS = {"versions", "devices", "extension", "backends", "tuned configs", "environment"}


def test_report_is_whole(monkeypatch):
    monkeypatch.setenv("SORA_BACKEND", "reference")
    report = info.collect()
    assert set(report) == SECTIONS
    assert not any("failed" in items for items in report.values()), report
    assert report["versions"]["sora_kernels"].startswith(sora_kernels.__version__)
    assert report["environment"]["SORA_BACKEND"] == "reference"
    assert "default" in report["tuned configs"]["conv3d_bn_act"]


def test_every_operator_is_explained():
    """A new operator adds its small call to ``info.SAMPLES``."""
    backends = info.collect()["backends"]
    assert set(info.SAMPLES) == set(OPERATORS)
    for name, operator in OPERATORS.items():
        text = backends[f"{name}, cpu"]
        assert "is chosen" in text
        assert all(backend in text for backend in operator.backends), text


def test_extension_says_why(monkeypatch):
    state = _native.Status("broken", "the reason and the cure")
    monkeypatch.setattr(_native, "_load", lambda: (state, None))
    assert info.collect()["extension"] == {"sora_kernels._C": "broken: the reason and the cure"}


def test_broken_part_becomes_a_line(monkeypatch):
    def broken():
        raise OSError("libcuda.so is a stone")

    monkeypatch.setattr(info, "_devices", broken)
    report = info.collect()
    assert report["devices"] == {"failed": "OSError: libcuda.so is a stone"}
    assert set(report) == SECTIONS


def test_command(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert all(section in text.splitlines() for section in SECTIONS)
    assert info.main(["--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == SECTIONS


def test_build_info():
    found = sora_kernels.build_info()
    assert found == info.build_info()
    if found["extension"] != "ok":
        assert found["why"]
        pytest.skip(found["why"])
    assert found["version"] == sora_kernels.__version__
    assert {"mode", "commit", "cxx", "nvcc", "cuda_archs", "python", "pybind11"} <= set(found)
    assert (found["cuda_runtime"] is None) == (found["nvcc"] is None)
