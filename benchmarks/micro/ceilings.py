"""What the machine itself does: copies, matrix products, launches. ``python -m benchmarks.micro``.

The ceilings behind every ``roofline_share``, and the floor under short calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from . import machine, roofline, timers


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": {**machine.hardware(), "threads": options.threads, "slug": machine.slug()},
        "versions": machine.versions(),
    }
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        report[device] = {
            "copy_gb_per_s": copies(device),
            "product_tflop_per_s": products(device),
            "launch_us": launches(device),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        with open(options.json, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
