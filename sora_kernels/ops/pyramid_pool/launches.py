"""The backend "triton": launches kernels.py as plans.py says. And what the audit and the tuner launch."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from ... import _tuning
from ..._launches import Launch
from ..common import dtypes
from . import kernels, layout, plans
from .layout import Form
from .levels import parse
from .results import Result

if TYPE_CHECKING:
    from .backends import Facts

OP = plans.OP
SHAPES = "pyramid_pool3d"  # in benchmarks/shapes.yaml


def forward(x: Tensor, valid_size: Tensor | None, form: Form, keep: bool) -> Result:
    """Of x ``[B, C, T, H, W]``, any strides. One launch or two, as ``plans`` has it."""
    _check(x, valid_size, form)
    keep = keep and form.has_max
    shape, strides = tuple(x.shape), x.stride()
    steps = plans.plan_forward(arch_of(x.device), form, shape, strides, x.dtype, keep)
    results = [x.new_empty(s) for s in layout.shapes(form, shape[0], shape[1], shape[2:])]
    indices, codes = layout.empty_tapes(form, x, shape[2:]) if keep else (None, None)
    valid = None if valid_size is None else valid_size.contiguous()
    written = (valid, tuple(results), indices, codes)
    walk, *nested = steps
    kernels._pyramid_pool_fwd_kernel[walk.grid](x, *written, *walk.sizes, **walk.constants)
    for step in nested:
        kernels._pyramid_pool_nested_kernel[step.grid](*written, *step.sizes, **step.constants)
    return Result(results, indices, codes)


def backward(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes: Tensor | None,
    valid_size: Tensor | None, form: Form, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx ``[B, C, T, H, W]`` in one launch or two, dense, channels last in memory where they are inner."""
    some = _check_grads(grads, indices, codes, valid_size, form, shape)
    given = tuple(g is not None for g in grads) * (len(form.levels) if form.flat else 1)
    push, gather = plans.plan_backward(arch_of(some.device), form, given, tuple(shape), some.dtype)
    pushed = None
    if push is not None:
        assert indices is not None
        wide = torch.promote_types(some.dtype, torch.float32)
        pushed = torch.empty_like(indices, dtype=wide)
        kernels._pyramid_pool_push_kernel[push.grid](
            tuple(grads), codes, pushed, *push.sizes, **push.constants
        )
    B, C, *sizes = shape
    dx = some.new_empty((B, *sizes, C) if form.inner else (B, C, *sizes))
    valid = None if valid_size is None else valid_size.contiguous()
    kernels._pyramid_pool_bwd_kernel[gather.grid](
        tuple(grads), pushed, indices, valid, dx, *gather.sizes, **gather.constants
    )
    return dx.movedim(-1, 1) if form.inner else dx


@functools.lru_cache(maxsize=16)
def _arch_of(device: int) -> str:
    return _tuning.arch_of(torch.cuda.get_device_capability(device))


def arch_of(device: torch.device) -> str:
    return _arch_of(device.index) if device.type == "cuda" else "default"


def _check(x: Tensor, valid_size: Tensor | None, form: Form) -> None:
    """The last look before pointers are taken."""
    if x.dim() != 5 or x.dtype not in dtypes.DTYPES or x.numel() == 0:
        raise ValueError(
            f"x: expected [B, C, T, H, W] of fp16, bf16, fp32 or fp64 with elements, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    _check_valid(valid_size, x.shape[0], x.device)


def _check_valid(valid_size: Tensor | None, batch: int, device: torch.device) -> None:
    if valid_size is not None and (
        tuple(valid_size.shape) != (batch, 3)
        or valid_size.dtype not in (torch.int32, torch.int64)
        or valid_size.device != device
    ):
        raise ValueError(
            f"valid_size: expected int32 or int64 ({batch}, 3) on {device}, "
            f"got {valid_size.dtype} {tuple(valid_size.shape)} on {valid_size.device}"
        )


def _check_grads(
    grads: Sequence[Tensor | None], indices: Tensor | None, codes: Tensor | None,
    valid_size: Tensor | None, form: Form, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """One of the gradients, after a last look at all."""
    some = next(g for g in grads if g is not None)
    B, C, *sizes = shape
    for g, expected in zip(grads, layout.shapes(form, B, C, sizes), strict=True):
        if g is not None:
            _check_tensor("grads", g, expected, some.dtype, some.device)
    if form.has_max:
        found = layout.tape(form, sizes)
        for name, t, columns, dtype in (
            ("indices", indices, found.indices, torch.int32), ("codes", codes, found.codes, torch.uint8)
        ):  # fmt: skip
            if t is None:
                raise ValueError(f"{name}: expected a tape, got None")
            tape = (B, columns, C) if form.inner else (B, C, columns)
            _check_tensor(name, t, tape, dtype, some.device)
    _check_valid(valid_size, B, some.device)
    return some


def _check_tensor(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if (
        tuple(t.shape) != tuple(shape)
        or t.dtype != dtype
        or t.device != device
        or not t.is_contiguous()
    ):
        raise ValueError(
            f"{name}: expected contiguous {dtype} {tuple(shape)} on {device}, "
            f"got {t.dtype} {tuple(t.shape)} on {t.device} with strides {t.stride()}"
        )


@contextlib.contextmanager
def as_on(arch: str) -> Iterator[None]:
    """Plans inside are those of ``arch`` (``"sm90"``), whatever device the tensors are on."""
    with mock.patch.object(sys.modules[__name__], "arch_of", lambda device: arch):
        yield


def forget_plans() -> None:
    """After a change of the configs."""
    plans.plan_forward.cache_clear()
    plans.plan_backward.cache_clear()


def describe(facts: Facts) -> str:
    """The forward pass's config, for ``explain``."""
    B, C, *sizes = facts.shape
    dense = torch.empty((B, *sizes, C) if facts.form.inner else facts.shape, device="meta")
    strides = (dense.movedim(-1, 1) if facts.form.inner else dense).stride()
    keep = facts.grad and facts.form.has_max
    steps = plans.plan_forward(
        arch_of(facts.device), facts.form, facts.shape, strides, facts.dtype, keep
    )
    constants = steps[0].constants
    bins, lanes_h, lanes_w = max(constants["TILES"])
    return (
        f"{constants['BLOCK_C']} channels x {bins * lanes_h * lanes_w}, "
        f"{constants['num_warps']} warps, {len(steps)} launch{'es' if len(steps) > 1 else ''}"
    )


# Configs that ``tune`` tries, by layout.
CANDIDATES: dict[str, dict[str, Sequence[int]]] = {
    "inner": {
        "TILE": (512, 1024, 2048), "BLOCK_C": (16, 32, 64), "num_warps": (4, 8), "maxnreg": (64, 96, 128),
    },
    "outer": {
        "TILE": (256, 512, 1024), "BLOCK_C": (1, 4, 8, 16), "num_warps": (4, 8), "maxnreg": (64, 96, 128),
    },
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the test command compiles: every kernel, both layouts, one launch and two.
GATED = {"gate": ("outer, fp32, max",), "mid": ("inner, bf16, max", "inner, fp32, maxavg")}


def launches(
    layer: str, shape: dict[str, Any], *, device: str, gated: bool = False
) -> Iterator[Launch]:
    """The launches of one row of ``shapes.yaml``.

    Args:
        device: ``"meta"`` or ``"cuda"``.
        gated: only those that the test command compiles.
    """
    levels = parse([o if isinstance(o, int) else tuple(o) for o in shape["levels"]], "maps")
    size = (shape["batch"], *shape["input"])
    for place in ("outer", "inner"):
        memory = torch.channels_last_3d if place == "inner" else torch.contiguous_format
        for name, dtype in DTYPES.items():
            for mode in ("max", "avg", "maxavg"):
                label = f"{place}, {name}, {mode}"
                if gated and label not in GATED.get(layer, ()):
                    continue
                inner = place == "inner"
                form = Form(levels, mode, not shape.get("maps"), inner, inner, mode != "avg")
                x = torch.empty(size, dtype=dtype, device=device, memory_format=memory)
                x = x if device == "meta" else x.normal_()
                key = {
                    "layout": place, "mode": mode, "channels": size[1], "itemsize": dtype.itemsize,
                }  # fmt: skip
                for variant, names, run in _variants(x, form):
                    yield Launch(f"{layer}, {label}, {variant}", names, key, run)


def _variants(
    x: Tensor, form: Form
) -> Iterator[tuple[str, tuple[str, ...], Callable[[], tuple[Tensor | None, ...]]]]:
    def kernels_of(keep: bool) -> tuple[str, ...]:
        steps = plans.plan_forward(
            arch_of(x.device), form, tuple(x.shape), x.stride(), x.dtype, keep
        )
        return (plans.FORWARD, plans.NESTED)[: len(steps)]

    def fwd(keep: bool) -> Callable[[], tuple[Tensor | None, ...]]:
        def run() -> tuple[Tensor | None, ...]:
            results, indices, codes = forward(x, None, form, keep)
            return (*results, indices, codes)

        return run

    yield "forward", kernels_of(False), fwd(False)
    if form.has_max:
        yield "training forward", kernels_of(True), fwd(True)
    results = [x.new_empty(s) for s in layout.shapes(form, x.shape[0], x.shape[1], x.shape[2:])]
    indices = codes = None
    if form.has_max:
        indices, codes = layout.empty_tapes(form, x, x.shape[2:])
    if x.device.type != "meta":
        _, indices, codes = forward(x, None, form, True)
        results = [r.normal_() for r in results]
    names = (plans.PUSH, plans.GATHER) if codes is not None and codes.numel() else (plans.GATHER,)
    shape = tuple(x.shape)
    yield "backward", names, lambda: (backward(results, indices, codes, None, form, shape),)
