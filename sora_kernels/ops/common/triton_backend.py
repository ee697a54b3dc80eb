"""What every Triton backend needs, whatever it computes."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ..._dispatch import YES, Verdict, no
from .dtypes import DTYPES


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_run(device: torch.device, dtype: torch.dtype) -> Verdict:
    if not installed():
        return no("Triton is not installed")
    if dtype not in DTYPES:
        return no(f"x is {dtype}; the kernels take fp16, bf16, fp32 and fp64")
    if device.type == "cuda":
        return _capability_verdict(device.index or 0)
    if device.type == "cpu":
        from ...testing import interpreting

        return YES if interpreting() else no("x is on the CPU and TRITON_INTERPRET is not set")
    return no(f"x is on {device}; Triton kernels need a CUDA device")


@functools.cache
def _capability_verdict(device: int) -> Verdict:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return no(f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0")
    return YES
