"""What a result belongs to: hardware (results of two machines are never compared) and versions."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
from typing import Any

import torch


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU model, instruction set that torch uses, GPU with its memory."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": "",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


@functools.cache
def versions() -> dict[str, Any]:
    import sora_kernels

    found: dict[str, Any] = {
        "sora_kernels": sora_kernels.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "onednn": torch.backends.mkldnn.is_available(),
        "driver": None,
        "extension": sora_kernels.build_info().get("extension"),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"]
        try:
            done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
            driver, sm, memory = (part.strip() for part in done.stdout.splitlines()[0].split(","))
            found |= {"driver": driver, "sm_clock_max": sm, "memory_clock_max": memory}
        except (OSError, IndexError, ValueError):
            found["driver"] = "not known (no nvidia-smi)"
    return found


def _version(name: str) -> str | None:
    try:
        return __import__(name).__version__
    except ImportError:
        return None


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug() -> str:
    """Folder of ``results/``: GPU if there is one, else CPU and instruction set."""
    found = hardware()
    name = found["gpu"].partition(",")[0] or f"{found['cpu']} {found['isa']}"
    name = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(slug())
