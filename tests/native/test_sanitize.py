"""The C++ kernels under AddressSanitizer: random problems, every array of exactly its size.

What the test command has time for; ``make sanitize`` runs 1,000 cases on every instruction set, with
UndefinedBehaviorSanitizer and ThreadSanitizer too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.native

RUN = Path(__file__).parent / "sanitize" / "run.py"
SKIP = 77


@pytest.mark.slow
def test_random_problems_under_address_sanitizer():
    # Other instruction sets differ in how many units a vector has, and take as long to compile.
    command = [sys.executable, str(RUN), "--kind", "quick", "--isa", "generic", "--last", "59"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == SKIP:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generic: cases 0 to 59 agree" in done.stdout
