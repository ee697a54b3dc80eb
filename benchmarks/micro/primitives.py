"""The rows of all cases, one JSON line each. ``python -m benchmarks.micro.primitives``.

The report runs it as a process of its own (:func:`rows_of_processes`): a kernel that traps ends all that CUDA can do in
a process. The next process goes on after the case that failed.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import build, cases, measure

ROOT = Path(__file__).resolve().parents[2]
MOST_FAILURES = 3  # a hang takes ten seconds to trap

Row = dict[str, Any]


def why_not() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"the GPU is older than sm_80: {torch.cuda.get_device_name()}"
    try:
        build.shared_object(torch.cuda.get_device_capability())
    except build.CannotBuild as why:
        return str(why)
    return ""


def rows() -> Iterator[Row]:
    """The rows of this machine, where :func:`why_not` is empty."""
    module = [sys.executable, "-m", "benchmarks.micro.primitives", "--from"]
    return rows_of_processes(lambda first: [*module, str(first)])


def rows_of_processes(command: Callable[[int], Sequence[str]]) -> Iterator[Row]:
    """The rows that processes print; where one ends within a case, another begins with the next.

    Args:
        command: that starts at the case of this number. It prints ``{"case": number, "row": row}``
            before each case, and after it the same with ``"done": true``.
    """
    first = 0
    for _ in range(MOST_FAILURES):
        begun: Row = {}
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command(first), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    found = json.loads(line)
                    if found.get("done"):
                        first = found["case"] + 1
                        begun = {}
                        yield found["row"]
                    else:
                        begun = found["row"]
            if process.returncode == 0:
                return
            errors.seek(0)
            said = errors.read()
        yield begun | {"error": _last_error(said) or f"exit status {process.returncode}"}
        first += 1
    yield {"error": f"given up after {MOST_FAILURES} failures"}


def _last_error(said: str) -> str:
    """The line that names the error: torch adds advice after it."""
    lines = [line for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.match(r"\S.*[Ee]rror: ", line)), "")


def print_rows(first: int) -> None:
    """What :func:`rows_of_processes` reads, from the case of this number on."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    device = measure.Gpu(build.shared_object(capability))
    every = cases.all_cases(properties.multi_processor_count)
    warm_up()
    for number, case in enumerate(every[first:], first):
        row = measure.row_of(case)
        if capability < case.needs:
            row["not_measured"] = f"needs sm_{case.needs[0]}{case.needs[1]}"
        else:
            print(json.dumps({"case": number, "row": row}), flush=True)
            try:
                row = measure.measured(case, device)
            except (measure.Refused, ArithmeticError) as error:
                row["error"] = str(error)
        print(json.dumps({"case": number, "row": row, "done": True}), flush=True)
    if capability >= (9, 0):
        largest = itertools.product(cases.PLAN_SHARED_BYTES, range(1, 17))
        for number, (plan, size) in enumerate(largest, len(every)):
            row = active_clusters(device, plan, size)
            print(json.dumps({"case": number, "row": row, "done": True}), flush=True)


def active_clusters(device: measure.Gpu, plan: str, size: int) -> Row:
    """How many clusters of this size run at once, each CTA on an SM of its own."""
    clusters = ctypes.c_int()
    bytes_ = cases.PLAN_SHARED_BYTES[plan]
    error = device.functions.micro_active_clusters(size, bytes_, ctypes.byref(clusters))
    row: Row = {
        "name": "clusters at once",
        "parameters": {"weights": plan, "shared_bytes": bytes_, "cluster": size},
        "predicted": cases.CLUSTERS_OF_16 if size == 16 else None,
        "clusters": clusters.value,
    }
    return row | ({"refused": f"CUDA error {error}"} if error else {})


def summary(found: Sequence[Row]) -> str:
    failed = sum("error" in row for row in found)
    left_out = sum("not_measured" in row for row in found)
    return f"primitives: {len(found)} rows, {failed} failed, {left_out} not measured"


def warm_up() -> None:
    """Some tenths of a second of work: an idle GPU has low clocks."""
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        x = torch.mm(x, x).clamp_(-1, 1)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--from", type=int, default=0, dest="first", help="number of the first case"
    )
    options = parser.parse_args()
    if why := why_not():
        print(f"not measured: {why}")
        return
    print_rows(options.first)


if __name__ == "__main__":
    main()
