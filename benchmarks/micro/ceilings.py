"""Copies, matrix products, launches: the ceilings behind every ``roofline_share``, and the floor under short calls."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from .. import roofline, timers
from . import cases


def report(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "copy_gb_per_s": copies(device),
        "product_tflop_per_s": products(device),
        "launch_us": launches(device),
    }
    if device == "cuda":
        found["launch_us_predicted"] = cases.LAUNCH_US
    return found


def copies(device: str) -> dict[str, float]:
    """GB/s read and written, by the bytes of both ends."""
    sizes = [1 << n for n in ((16, 20, 24, 28) if device == "cpu" else (20, 24, 26, 28, 30, 32))]
    return {str(n): round(roofline.raw_copy_rate(device, n) / 1e9, 1) for n in sizes}


def products(device: str) -> dict[str, float]:
    """TFLOP/s of a large matrix product by dtype (on a GPU fp32 is TF32, as cuDNN has it)."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {
        name: round(roofline.product_rate(device, dtype) / 1e12, 3) for name, dtype in names.items()
    }


def launches(device: str) -> dict[str, float]:
    """Microseconds: the host's for one tiny op; on a GPU also between events and inside a graph."""
    x = torch.zeros(32, device=device)

    def call() -> torch.Tensor:
        return x.add_(1.0)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def host() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(200):
            call()
        taken = time.perf_counter() - start
        wait()
        return taken / 200

    found = {"host": statistics.median(host() for _ in range(15))}
    if device == "cuda":
        events, graph = timers.Events(), timers.Graph([call], launches=256)
        found["events"] = statistics.median(events(call, 1) for _ in range(30))
        found["graph"] = statistics.median(timers.replay(graph, 1) for _ in range(30))
    return {name: round(seconds * 1e6, 2) for name, seconds in found.items()}
