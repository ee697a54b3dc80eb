"""The Makefile's set-up, without running it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("target", ["demo", "test", "bench", "audit", "lint"])
def test_each_target_sets_everything_up(root, tmp_path, target):
    venv = tmp_path / "venv"
    done = make(root, "-n", target, f"VENV={venv}")
    assert done.returncode == 0, done.stderr
    steps = done.stdout
    order = ["-m venv", "^torch==", "-r requirements-dev.txt", "-e ."]
    places = [steps.index(step) for step in order]
    assert places == sorted(places)
    last = {
        "demo": "sora demo",
        "test": "pytest",
        "bench": "pytest",
        "audit": "audit",
        "lint": "mypy",
    }
    assert last[target] in steps.splitlines()[-1]


def test_test_target_checks_everything(root, tmp_path):
    steps = make(root, "-n", "test", f"VENV={tmp_path / 'venv'}").stdout
    for check in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert check in steps


def test_old_python_is_refused_by_name(root, tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 'Python >= 3.10 is needed, this is 3.8' >&2\nexit 1\n")
    old.chmod(0o755)
    done = make(root, "test", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode != 0 and "Python >= 3.10 is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_test_command(root):
    script = (root / ".ci" / "run").read_text()
    assert re.search(r"exec make test$", script, re.MULTILINE)
    assert os.access(root / ".ci" / "run", os.X_OK)


def test_requirements_are_exact_and_torch_is_first(root):
    lines = (root / "requirements-dev.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines[0].startswith("torch==")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line) for line in lines), lines
