"""Measures one case on a device; the device may be emulated (``tests/native/emulation.py``)."""

from __future__ import annotations

import ctypes
import statistics
from pathlib import Path
from typing import Any, Protocol

import torch

from .cases import FIRST_ROUNDS, Case

REPEATS = 24
CYCLES = 500_000  # of a launch: long enough for a nanosecond clock that steps by a microsecond
MOST_ROUNDS = 1 << 18


class Device(Protocol):
    def tensor(self, value: torch.Tensor, name: str) -> torch.Tensor: ...
    def run(self, function: str, *arguments: torch.Tensor | float | None) -> object: ...


class Refused(RuntimeError):
    """A launch that CUDA did not take; the process is none the worse for it."""


class Gpu:
    """The library of build.py on the current CUDA device."""

    def __init__(self, library: Path) -> None:
        self.functions = ctypes.CDLL(str(library))

    def tensor(self, value: torch.Tensor, name: str) -> torch.Tensor:
        del name
        return value.cuda()

    def run(self, function: str, *arguments: torch.Tensor | float | None) -> None:
        values = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.functions, function)(*values, stream)
        if error:
            raise Refused(f"CUDA error {error} at the launch")
        torch.cuda.synchronize()


def measured(
    case: Case, device: Device, repeats: int = REPEATS, most_rounds: int = MOST_ROUNDS
) -> dict[str, Any]:
    """The case's row: median cycles and nanoseconds of one operation, and how far they spread.

    The first launch is short. It says how many rounds the others take, and what it has computed must be right.

    Raises:
        ArithmeticError: it is not.
    """
    stamps = device.tensor(torch.zeros(case.ctas, case.warps, 4, dtype=torch.int64), "stamps")
    out = device.tensor(torch.zeros(case.out_words, dtype=torch.int32), "out")
    scratch = device.tensor(torch.zeros(case.scratch_words, dtype=torch.int32), "scratch")

    def launch(rounds: int) -> tuple[int, int]:
        scratch.zero_()
        device.run(case.function, *case.arguments, rounds, stamps, out, scratch)
        return _elapsed(stamps.cpu())

    first = min(FIRST_ROUNDS, most_rounds)
    cycles, _ = launch(first)
    if case.expected is not None:
        _check(case, out.cpu(), case.expected(first))
    rounds = min(max(CYCLES * first // max(cycles, 1), first), most_rounds)
    launch(rounds)
    taken = [launch(rounds) for _ in range(repeats)]
    operations = rounds * case.operations
    each = [cycles / operations for cycles, _ in taken]
    clock = statistics.median(cycles / nanoseconds for cycles, nanoseconds in taken)
    low, middle, high = statistics.quantiles(each, n=4)
    return row_of(case) | {
        "cycles": round(middle, 2),
        "ns": round(middle / clock, 2),
        "cycles_range": [round(min(each), 2), round(max(each), 2)],
        "spread": round((high - low) / middle, 4),
        "clock_ghz": round(clock, 3),
        "repeats": repeats,
        "rounds": rounds,
    }


def row_of(case: Case) -> dict[str, Any]:
    """What is known of a row beforehand."""
    predicted = case.predicted_ns and [round(bound, 1) for bound in case.predicted_ns]
    return {"name": case.name, "parameters": case.parameters, "predicted_ns": predicted}


def _elapsed(stamps: torch.Tensor) -> tuple[int, int]:
    """Cycles and nanoseconds from the first start to the last end of a CTA: of the CTA that took longest."""
    begun, ended = stamps[..., :2], stamps[..., 2:]
    measuring = (ended > 0).all(-1)  # a warp that does not take part leaves nothing
    begun = begun.masked_fill(~measuring[..., None], torch.iinfo(torch.int64).max)
    taking_part = measuring.any(-1)
    taken = (ended.amax(1) - begun.amin(1))[taking_part].amax(0)
    return int(taken[0]), int(taken[1])


def _check(case: Case, out: torch.Tensor, expected: torch.Tensor) -> None:
    words = expected.reshape(-1) & 0xFFFFFFFF
    wrong = (out.long() & 0xFFFFFFFF) != words
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ArithmeticError(
            f"{int(wrong.sum())} of {len(words)} words are wrong, the first at {at}: "
            f"expected {int(words[at])}, got {int(out[at]) & 0xFFFFFFFF}"
        )
