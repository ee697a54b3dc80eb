"""The two ceilings of the machine, measured when first asked for: copying and matrix products."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch


def share(device: str, dtype: torch.dtype, bytes_: int, flops: int, seconds: float) -> float:
    """What part of a call's time its least traffic and arithmetic would need at the ceilings.

    Args:
        bytes_: each input read once, each output written once.
        flops: a multiply-add counts two.
    """
    floor = max(bytes_ / copy_rate(device, bytes_), flops / product_rate(device, dtype))
    return floor / seconds


def copy_rate(device: str, size: int) -> float:
    """Bytes read and written a second by a copy whose two ends together have about ``size`` bytes:
    what fits a cache is held against that cache."""
    return raw_copy_rate(device, 1 << min(max(size.bit_length(), 16), 30))


def raw_copy_rate(device: str, size: int) -> float:
    """The same at exactly ``size`` bytes."""
    return _copy_rate(device, size, torch.get_num_threads())


@functools.cache
def _copy_rate(device: str, size: int, threads: int) -> float:
    source = torch.randn(size // 8, device=device)
    target = torch.empty_like(source)
    return size / _best(lambda: target.copy_(source), device)


@functools.cache
def _product_rate(device: str, dtype: torch.dtype, threads: int) -> float:
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    was = torch.backends.cuda.matmul.allow_tf32
    # cuDNN's convolutions and LSTMs round fp32 to TF32 unless told not to: their ceiling is that one.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    return _product_rate(device, dtype, torch.get_num_threads())


def _best(call: Callable[[], object], device: str) -> float:
    """Seconds of the best of ten samples: a ceiling is what the machine can do."""

    def once(times: int) -> float:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - begin

    call()
    times = max(1, round(4e-3 / max(once(1), 1e-7)))
    return min(once(times) / times for _ in range(10))
