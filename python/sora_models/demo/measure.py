"""Time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]


def median_seconds(runs: Sequence[Run], rounds: int, device: torch.device) -> list[float]:
    """Median wall time of each warm call, interleaved so that the machine's drift hits all."""
    for run in runs:
        run()
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, sample in zip(runs, samples, strict=True):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            sample.append(time.perf_counter() - start)
    return [statistics.median(sample) for sample in samples]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
