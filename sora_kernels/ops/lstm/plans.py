"""How the CUDA kernels walk the steps of a layer, and what a step is expected to cost, there and in
cuDNN. The costs are rows of ``tuned/``, which says where they come from.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ... import _native, _tuning
from ..._dispatch import YES, Verdict, no
from ..common.dtypes import DTYPE_CODES
from .cells import CELLS, LSTM

# The largest H whose w_hh the registers of a CTA hold: lstm_resident_max_hidden of csrc/lstm.
MAX_HIDDEN = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
ROWS = 8  # of the batch, in a CTA
_WARPS = 8  # that an SM runs as fast as one alone: two for each of its schedulers


class Layer(NamedTuple):
    """What a plan depends on. ``precision``: of fp32, see precision.py."""

    cell: str
    dtype: torch.dtype
    batch: int
    hidden_size: int
    directions: int
    ragged: bool  # lengths or packed rows
    reset: bool
    proj_size: int
    precision: str


class Gpu(NamedTuple):
    arch: str
    sms: int
    clock: float  # GHz


@lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    arch = _tuning.arch_of((properties.major, properties.minor))
    clock = getattr(properties, "clock_rate", 0) / 1e6  # not every build of torch tells
    return Gpu(arch, properties.multi_processor_count, clock or 1.755)


def resident_can_run(dtype: torch.dtype, hidden_size: int, precision: str) -> Verdict:
    """Whether ``w_hh`` can stay in the registers of a CTA."""
    if dtype not in MAX_HIDDEN:
        return no(f"x is {dtype}; registers hold weights of fp16, bf16 and fp32")
    if precision == "ieee":
        return no("precision is 'ieee'; weights in registers are multiplied in TF32")
    if hidden_size > MAX_HIDDEN[dtype]:
        most = f"{MAX_HIDDEN[dtype]} in {dtype}"
        return no(f"hidden_size is {hidden_size}; registers hold weights up to {most}")
    return YES


def _resident_can_run(layer: Layer) -> Verdict:
    return resident_can_run(layer.dtype, layer.hidden_size, layer.precision)


@lru_cache(maxsize=1024)
def native_us(layer: Layer, gpu: Gpu) -> float:
    """Predicted forward time of a step of the whole layer on the backend "native"."""
    if not _resident_can_run(layer).ok:
        step = _tuning.config("lstm", "steps", gpu.arch, ())
        return step["forward_ns"] * layer.directions / 1e3
    H = layer.hidden_size
    key = (
        ("bits", 8 * layer.dtype.itemsize), ("cell", layer.cell.partition("_")[0]),
        ("guarded", int(layer.ragged or layer.reset or H not in (32, 64, 128))), ("hidden_size", H),
    )  # fmt: skip
    step = _tuning.config("lstm", "resident", gpu.arch, key)
    ctas = -(-layer.batch // ROWS) * layer.directions
    at_once = gpu.sms * max(1, _WARPS // -(-H // 16))
    return max(1, -(-ctas // at_once)) * step["forward_cycles"] / gpu.clock / 1e3


def cudnn_algorithm(layer: Layer) -> str:
    """What torch's layer runs, by the rule of aten/src/ATen/native/cudnn/RNN.cpp as far as ``layer``
    says: "persistent" asks for an input size of whole 128s too.
    """
    H, B = layer.hidden_size, layer.batch
    if layer.ragged:
        return "packed"
    if layer.proj_size or layer.dtype == torch.float64:
        return "standard"
    if (192 if CELLS[layer.cell].tape else 384) >= H:
        return "small_h"
    alone = layer.dtype == torch.float16 and layer.cell == LSTM.name and layer.directions == 1
    if alone and H <= 1024 and H % 128 == 0 and B % 8 == 0 and B <= 128:
        return "persistent"
    return "standard"


@lru_cache(maxsize=1024)
def cudnn_us(layer: Layer, gpu: Gpu) -> float:
    """Predicted forward time of a step of torch's layer."""
    key = (
        ("algorithm", cudnn_algorithm(layer)), ("batch", layer.batch),
        ("cell", layer.cell.partition("_")[0]), ("hidden_size", layer.hidden_size),
    )  # fmt: skip
    step = _tuning.config("lstm", "cudnn", gpu.arch, key)
    return step["forward_ns"] * layer.directions / 1e3


def describe_native(layer: Layer, steps: int, device: torch.device) -> str:
    """The kernels of a call on CUDA, for ``explain``."""
    predicted = f"{native_us(layer, gpu_of(device)):.2g} us a step predicted"
    if not (verdict := _resident_can_run(layer)).ok:
        return f"steps: a GEMM and a kernel a step; {predicted} ({verdict.why})"
    rows, some = steps * layer.batch, 1  # an address stands for "there are lengths"
    shape = (
        CELLS[layer.cell].code, steps, layer.batch, layer.hidden_size, layer.directions, 1, rows,
        some if layer.ragged else 0, 0, some if layer.reset else 0,
    )  # fmt: skip
    code, found = DTYPE_CODES[layer.dtype], []
    for name, backward in (("forward", False), ("backward", True)):
        plan = _native.module().lstm_resident_plan(code, shape, backward, device.index or 0)
        found.append(
            f"{name} {plan['units']} units, {plan['threads']} threads x {plan['registers']} registers, "
            f"{plan['shared_bytes'] / 1024:g} KiB shared"
        )
    return f"resident: {'; '.join(found)}; {plan['ctas']} CTAs; {predicted}"


def describe_cudnn(layer: Layer, device: torch.device) -> str:
    """Torch's layer on CUDA, for ``explain``."""
    predicted = cudnn_us(layer, gpu_of(device))
    return f"cuDNN {cudnn_algorithm(layer)}; {predicted:.2g} us a step predicted"
