"""What the tests of the C++ kernels share: a process on another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # emulation.py and mutation.py

ORDER = ("generic", "avx2", "avx512")


@pytest.fixture(params=ORDER[:-1])
def on_other_isa(request) -> Callable[[str, str], None]:
    """``run(best, program)``: the program, with this folder and the instruction set as arguments, in a process that is
    held to it; ``best`` is what the other tests run on.
    """

    def run(best: str, program: str) -> None:
        isa = request.param
        if ORDER.index(isa) > ORDER.index(best):
            pytest.skip(f"this machine has no {isa}")
        if isa == best:
            pytest.skip(f"{isa} is what the other tests run on")
        done = subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent), isa],
            env=os.environ | {"SORA_CPU_ISA": isa}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return run
