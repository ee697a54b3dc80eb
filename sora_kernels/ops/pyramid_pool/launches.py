"""The backend "triton": plans, checks and launches of kernels.py; and what the audit and the tuner launch."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from . import kernels, layout
from .layout import Form
from .levels import Level, bins, plan
from .results import Result

OP = "pyramid_pool"
FORWARD, NESTED = "_pyramid_pool_fwd_kernel", "_pyramid_pool_nested_kernel"
PUSH, GATHER = "_pyramid_pool_push_kernel", "_pyramid_pool_bwd_kernel"

# Programs that fill a large GPU: while there are fewer, a sample's block of channels is shared among several.
FILL = 2048
# Elements that nested levels would read again, from where a second launch costs less than reading them.
NEST_FROM = 1 << 23
WIDEST = (1 << 31) - (1 << 20)  # beyond, offsets and i * n are int64; the rest is room for a tile


class Step(NamedTuple):
    """One launch: all of it that is not a pointer."""

    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


def forward(x: Tensor, valid_size: Tensor | None, form: Form, keep: bool) -> Result:
    """Of x ``[B, C, T, H, W]``, any strides. One launch, or two: see :func:`plan_forward`."""
    _check(x, valid_size, form)
    keep = keep and form.has_max
    shape, strides = tuple(x.shape), x.stride()
    steps = plan_forward(arch_of(x.device), form, shape, strides, x.dtype, keep)
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
    """dx ``[B, C, T, H, W]`` in one launch, dense, channels last in memory where they are inner."""
    some = _check_grads(grads, indices, codes, valid_size, form, shape)
    given = tuple(g is not None for g in grads) * (len(form.levels) if form.flat else 1)
    push, gather = plan_backward(arch_of(some.device), form, given, tuple(shape), some.dtype)
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


@functools.lru_cache(maxsize=4096)
def plan_forward(
    arch: str, form: Form, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
    keep: bool,
) -> tuple[Step, ...]:  # fmt: skip
    """One launch in which every level is made from x, or two: those that follow from no other from x, the others
    from their results. The second launch pays once there is enough of x.
    """
    B, C, *sizes = shape
    levels = form.levels
    roots = _roots(levels)
    again = sum(root != k for k, root in enumerate(roots)) * math.prod(shape)
    two = form.mode == "max" and again >= NEST_FROM
    if not two:
        roots = tuple(range(len(levels)))
    wide = _is_wide(form, shape, strides)
    common = {"TRACK": keep, "ACC": _accumulator(dtype), "INDEX": tl.int64 if wide else tl.int32}
    pyramid = _pyramid(form, roots)

    config, block_c, places = _config(FORWARD, arch, form, C, dtype)
    tiles = _tiles(levels, places)
    walked = tuple(root == k for k, root in enumerate(roots))
    grid, programs = _grid(form, shape, tiles, walked, block_c)
    unit, steps = _strides(form, shape, strides)
    first = Step(
        grid,
        (programs, C, *sizes, *steps),
        {
            "P": pyramid, "TILES": tiles, "BLOCK_C": block_c, "UNIT": unit,
            "num_warps": config["num_warps"], **common,
        },
    )  # fmt: skip
    if not two:
        return (first,)

    config, block_c, places = _config(NESTED, arch, form, C, dtype)
    tiles = tuple(
        _nested_tile(level, levels[root], places) for level, root in zip(levels, roots, strict=True)
    )
    grid, programs = _grid(form, shape, tiles, tuple(not w for w in walked), block_c)
    constants = {"P": pyramid, "TILES": tiles, "BLOCK_C": block_c, **common}
    constants["num_warps"] = config["num_warps"]
    return first, Step(grid, (programs, C, *sizes), constants)


@functools.lru_cache(maxsize=4096)
def plan_backward(
    arch: str, form: Form, given: tuple[bool, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Step | None, Step]:
    """One launch that gathers; before it, where a level with codes has a gradient, one that pushes down to the levels
    with indices.
    """
    B, C, *sizes = shape
    pyramid = _pyramid(form, tuple(range(len(form.levels))))
    wide = _is_wide(form, shape, None)
    common = {"ACC": _accumulator(dtype), "INDEX": tl.int64 if wide else tl.int32}
    wanted = list(given)
    for k in reversed(plan(form.levels, None).order):
        if pyramid.source[k] >= 0 and wanted[k]:
            wanted[pyramid.source[k]] = True
    winners = tuple(form.has_max and s < 0 and w for s, w in zip(pyramid.source, wanted, strict=True))

    push = None
    if form.has_max and any(s >= 0 and g for s, g in zip(pyramid.source, given, strict=True)):
        config, block_c, places = _config(PUSH, arch, form, C, dtype)
        tiles = tuple(
            (min(places, triton.next_power_of_2(math.prod(o or places for o in level))), 1, 1)
            for level in form.levels
        )
        grid, programs = _grid(form, shape, tiles, winners, block_c, math.inf)
        constants = {
            "P": pyramid, "TILES": tiles, "GIVEN": given, "WANTED": tuple(wanted),
            "BLOCK_C": block_c, "num_warps": config["num_warps"], **common,
        }  # fmt: skip
        push = Step(grid, (programs, C, *sizes), constants)

    config, block_c, places = _config(GATHER, arch, form, C, dtype)
    volume = math.prod(sizes)
    programs = triton.cdiv(volume, places)
    constants = {
        "P": pyramid, "WINNERS": winners, "MEANS": tuple(form.has_avg and g for g in given),
        "BLOCK_P": places, "BLOCK_C": block_c, "num_warps": config["num_warps"], **common,
    }  # fmt: skip
    grid = (programs * triton.cdiv(C, block_c) * B,)
    return push, Step(grid, (programs, C, *sizes, volume), constants)


def _pyramid(form: Form, roots: tuple[int, ...]) -> kernels.Pyramid:
    coded = layout.tape(form, (1, 1, 1)).coded  # does not depend on sizes
    found = plan(form.levels, None).source
    source = tuple(s if c else -1 for s, c in zip(found, coded, strict=True))
    return kernels.Pyramid(
        form.levels, source, roots, form.has_max, form.has_avg, form.flat, form.ndhwc, form.inner
    )


def _roots(levels: Sequence[Level]) -> tuple[int, ...]:
    """For each level the one made from x that it follows from."""
    found = plan(levels, None)
    roots = list(range(len(levels)))
    for k in found.order:
        if found.source[k] >= 0:
            roots[k] = roots[found.source[k]]
    return tuple(roots)


def _config(
    kernel: str, arch: str, form: Form, channels: int, dtype: torch.dtype
) -> tuple[dict[str, int], int, int]:
    """The shipped config; of a tile the channels, and the places a channel."""
    key = (
        ("channels", channels),
        ("itemsize", dtype.itemsize),
        ("layout", "inner" if form.inner else "outer"),
    )
    config = _tuning.config(OP, kernel, arch, key)
    block_c = min(config["BLOCK_C"], triton.next_power_of_2(channels))
    return config, block_c, config["TILE"] // block_c


Tile = tuple[int, int, int]  # bins, lanes along h, lanes along w


def _tiles(levels: Sequence[Level], places: int) -> tuple[Tile, ...]:
    """A level with fewer bins has more elements a bin, and so more lanes a bin."""
    counts = [math.prod(o or _WHOLE_BINS for o in level) for level in levels]
    found = []
    for level, count in zip(levels, counts, strict=True):
        ratio = triton.next_power_of_2(max(counts) // count + 1) // 2
        lanes = min(places, max(ratio, places // triton.next_power_of_2(count)))
        lanes_w = min(lanes, triton.next_power_of_2(-(-_ROW // (level[2] or _WHOLE_BINS))))
        found.append((places // lanes, lanes // lanes_w, lanes_w))
    return tuple(found)


_ROW = 16  # elements of W that lanes are laid out for
_WHOLE_BINS = 16  # bins that a whole axis is taken to have


def _nested_tile(level: Level, root: Level, places: int) -> Tile:
    lanes = min(places, triton.next_power_of_2(layout.volume(layout.children(level, root))))
    return places // lanes, 1, lanes


def _grid(
    form: Form, shape: Sequence[int], tiles: Sequence[Tile], made: Sequence[bool], block_c: int,
    fill: float = FILL,
) -> tuple[tuple[int], int]:  # fmt: skip
    """One program a sample and block of channels, or as many as it takes to ``fill`` the GPU, up to one a tile."""
    B, C, *sizes = shape
    count = sum(
        triton.cdiv(layout.volume(bins(level, sizes)), tile[0])
        for level, tile, own in zip(form.levels, tiles, made, strict=True)
        if own
    )
    blocks = B * triton.cdiv(C, block_c)
    programs = int(min(count, -(-fill // blocks)))
    return (blocks * programs,), programs


_UNIT = 16


def _strides(
    form: Form, shape: Sequence[int], strides: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """A unit, and the strides; where channels are innermost those of the other axes are in units, by which the
    compiler sees that rows are aligned. An axis of one element has any stride, so zero.
    """
    b, c, *others = (s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
    if form.inner and c == 1 and not any(s % _UNIT for s in (b, *others)):
        return _UNIT, (b // _UNIT, c, *(s // _UNIT for s in others))
    return 1, (b, c, *others)


def _is_wide(form: Form, shape: Sequence[int], strides: Sequence[int] | None) -> bool:
    """Whether an offset within a sample, or a bin's number times a size, passes int32."""
    _, C, *sizes = shape
    found = layout.tape(form, sizes)
    extents = [C * math.prod(sizes), C * found.indices, C * found.codes]
    extents += [math.prod(s[1:]) for s in layout.shapes(form, 1, C, sizes)]
    extents += [o * n for level in form.levels for o, n in zip(level, sizes, strict=True)]
    if strides is not None:
        extents.append(sum((n - 1) * s for n, s in zip(shape[1:], strides[1:], strict=True)))
    return max(extents) >= WIDEST


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@functools.lru_cache(maxsize=16)
def _arch_of(device: int) -> str:
    return _tuning.arch_of(torch.cuda.get_device_capability(device))


def arch_of(device: torch.device) -> str:
    return _arch_of(device.index) if device.type == "cuda" else "default"


def _check(x: Tensor, valid_size: Tensor | None, form: Form) -> None:
    """The last look before pointers are taken."""
    if x.dim() != 5 or x.dtype not in layout.DTYPES or x.numel() == 0:
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
    plan_forward.cache_clear()
    plan_backward.cache_clear()
