"""Time and peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory in use during a call, which must be warm, beyond what was in use before it.

    On CUDA what torch's allocator hands out. On Linux the growth of the process's resident set to
    its high-water mark, which the kernel keeps, so that buffers outside torch (oneDNN's, the native
    kernels') count too. Elsewhere None: not measured.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        return _resident_growth(run)
    except OSError:
        return None


def peak_memory_method(device: torch.device) -> str:
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "growth of the resident set to its high-water mark"


def _resident_growth(run: Run) -> int:
    gc.collect()
    _return_free_pages()
    # "5" resets the high-water mark to the current resident set (Linux, proc(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _return_free_pages() -> None:
    """Gives freed pages back to the system, or a second call would reuse them unseen (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
