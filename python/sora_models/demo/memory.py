"""Peak memory of a forward pass, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from sora_models.registry import build

METHODS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "growth of the resident set to its high-water mark, in a fresh process",
}


def peaks(backend: str, shapes: Sequence[Sequence[int]], device: str) -> list[int | None]:
    """Bytes that ``crnn`` needs at its peak for clips of these shapes, beyond weights and inputs.

    On CUDA what torch's allocator hands out; on Linux the growth of the process's resident set, so
    that buffers outside torch (oneDNN's, the native kernels') count too; elsewhere None, not
    measured. The process is a fresh one whose malloc returns every freed block to the system:
    otherwise the figure would depend on what ran before.

    Raises RuntimeError with the process's own words if it fails.
    """
    child = subprocess.run(
        [sys.executable, "-m", __name__, backend, device, json.dumps([*map(list, shapes)])],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"measuring the memory of backend {backend!r} failed:\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


@torch.no_grad()
def _measure(backend: str, device: torch.device, shapes: list[list[int]]) -> list[int | None]:
    model = build("crnn", backend).to(device).eval()
    found = []
    for shape in shapes:
        clip = torch.rand(shape, device=device)
        for _ in range(2):
            model(clip)
        found.append(_peak(partial(model, clip), device))
    return found


def _peak(run: Callable[[], object], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        _return_free_pages()
        # "5" resets the high-water mark to the current resident set (Linux, proc(5)).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _return_free_pages() -> None:
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    _backend, _device, _shapes = sys.argv[1:]
    print(json.dumps(_measure(_backend, torch.device(_device), json.loads(_shapes))))
