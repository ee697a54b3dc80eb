"""``pyramid_pool3d``: the backends, what each can run, and which comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._dispatch import YES, Backend, Operator, Verdict, no
from ..common import triton_backend
from ..common.dtypes import CPU_DTYPES
from ..common.lazy import Lazy
from . import definition, gemm, layout, stock
from .layout import Form
from .levels import bins

GEMM_BINS = 128  # beyond, the product has more arithmetic than the memory has time for


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # [B, C, T, H, W]
    form: Form
    valid: bool  # valid_size was given
    grad: bool


def _triton_can_run(facts: Facts) -> Verdict:
    return triton_backend.can_run(facts.device, facts.dtype)


def _native_can_run(facts: Facts) -> Verdict:
    if facts.device.type != "cpu":
        return no(f"x is on {facts.device}; the native kernels run on the CPU")
    if facts.dtype not in CPU_DTYPES:
        return no(f"x is {facts.dtype}; the native kernels take fp32, fp64 and bf16")
    if facts.form.codes:
        return no("codes were asked for; the native kernels keep indices")
    status = _native.status()
    return YES if status.ok else no(status.why)


def _gemm_can_run(facts: Facts) -> Verdict:
    form = facts.form
    if form.mode != "avg":
        return no(f"mode is {form.mode!r}; a matrix product makes means alone")
    if facts.valid:
        return no("valid_size was given; the matrix is the same for every sample")
    count = sum(layout.volume(bins(level, facts.shape[2:])) for level in form.levels)
    if count > GEMM_BINS:
        return no(f"there are {count} bins; the matrix product is for up to {GEMM_BINS}")
    if facts.device.type == "cuda" and facts.dtype == torch.float32:
        if torch.backends.cuda.matmul.allow_tf32:
            return no("torch.backends.cuda.matmul.allow_tf32 is True; TF32 would round x")
    return YES


def _torch_can_run(facts: Facts) -> Verdict:
    if facts.valid:
        return no("valid_size was given; torch's pools take no regions")
    return YES


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md has the measurements behind it."""
    if facts.device.type == "cpu":
        return ("native", "torch", "reference")
    return ("triton", "torch", "reference")


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of the forward pass: x once, every output, an index a maximum."""
    B, C, *sizes = facts.shape
    values = B * C * sum(layout.volume(bins(level, sizes)) for level in facts.form.levels)
    tapes = 4 * values if facts.grad and facts.form.has_max else 0
    x = torch.Size(facts.shape).numel()
    return (x + values * facts.form.parts) * facts.dtype.itemsize + tapes


def facts_of(
    x: Tensor, form: Form, valid_size: Tensor | None, grad: bool, shape: Sequence[int]
) -> Facts:
    return Facts(x.device, x.dtype, tuple(shape), form, valid_size is not None, grad)


_launches = Lazy(".launches", __package__)

OPERATOR = Operator(
    "pyramid_pool3d",
    [
        Backend(
            "triton",
            _triton_can_run,
            _launches,
            config=lambda facts: _launches.describe(facts),
            floor_bytes=_floor_bytes,
        ),
        Backend("native", _native_can_run, Lazy(".native", __package__), floor_bytes=_floor_bytes),
        Backend("gemm", _gemm_can_run, gemm, floor_bytes=_floor_bytes),
        Backend(
            "torch",
            _torch_can_run,
            stock,
            floor_bytes=_floor_bytes,
            # On CUDA torch has no backward that deterministic mode lets through.
            deterministic=lambda facts: not (facts.grad and facts.device.type == "cuda"),
        ),
        Backend("reference", lambda facts: YES, definition),
    ],
    prefer=_prefer,
    facts=lambda *args, **kwargs: _facts_of_call(*args, **kwargs),
)


def _facts_of_call(*args: Any, **kwargs: Any) -> Facts:
    """The public function's arguments -> facts, for ``explain``."""
    from .op import facts_of_call

    return facts_of_call(*args, **kwargs)
