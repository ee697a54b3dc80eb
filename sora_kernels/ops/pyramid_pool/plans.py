"""What the Triton backend launches for a call: levels' roots, tiles, grids, configs. No tensor is looked at."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ... import _tuning
from . import layout
from .geometry import Pyramid
from .layout import Form
from .levels import Level, bins, plan

OP = "pyramid_pool"
FORWARD, NESTED = "_pyramid_pool_fwd_kernel", "_pyramid_pool_nested_kernel"
PUSH, GATHER = "_pyramid_pool_push_kernel", "_pyramid_pool_bwd_kernel"

# Programs that fill a large GPU: while there are fewer, a sample's block of channels is shared among several.
FILL = 2048
# Elements that nested levels would read again, from where a second launch costs less than reading them.
NEST_FROM = 1 << 23
WIDEST = (1 << 31) - (1 << 20)  # beyond, offsets and i * n are int64; the rest is room for a tile
ROW = 16  # elements of W that lanes are laid out for
WHOLE_BINS = 16  # bins that a whole axis is taken to have
UNIT = 16  # strides that are multiples of it are given in it

Tile = tuple[int, int, int]  # bins, lanes along h, lanes along w


class Step(NamedTuple):
    """One launch: all of it that is not a pointer."""

    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


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

    config, places = _config(FORWARD, arch, form, C, dtype)
    tiles = _tiles(levels, places)
    walked = tuple(root == k for k, root in enumerate(roots))
    grid, programs = _grid(form, shape, tiles, walked, config["BLOCK_C"])
    unit, steps = _strides(form, shape, strides)
    constants = {"P": pyramid, "TILES": tiles, "UNIT": unit, **config, **common}
    first = Step(grid, (programs, C, *sizes, *steps), constants)
    if not two:
        return (first,)

    config, places = _config(NESTED, arch, form, C, dtype)
    tiles = tuple(
        _nested_tile(level, levels[root], places) for level, root in zip(levels, roots, strict=True)
    )
    made = tuple(not w for w in walked)
    grid, programs = _grid(form, shape, tiles, made, config["BLOCK_C"])
    constants = {"P": pyramid, "TILES": tiles, **config, **common}
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
    winners = tuple(
        form.has_max and s < 0 and w for s, w in zip(pyramid.source, wanted, strict=True)
    )

    push = None
    if form.has_max and any(s >= 0 and g for s, g in zip(pyramid.source, given, strict=True)):
        config, places = _config(PUSH, arch, form, C, dtype)
        tiles = tuple(
            (min(places, triton.next_power_of_2(math.prod(o or places for o in level))), 1, 1)
            for level in form.levels
        )
        grid, programs = _grid(form, shape, tiles, winners, config["BLOCK_C"], math.inf)
        constants: dict[str, Any] = {"P": pyramid, "TILES": tiles}
        constants |= {"GIVEN": given, "WANTED": tuple(wanted)}
        constants |= config | common
        push = Step(grid, (programs, C, *sizes), constants)

    config, places = _config(GATHER, arch, form, C, dtype)
    volume = math.prod(sizes)
    programs = triton.cdiv(volume, places)
    means = tuple(form.has_avg and g for g in given)
    constants = {"P": pyramid, "WINNERS": winners, "MEANS": means, "BLOCK_P": places}
    constants |= config | common
    grid = (programs * triton.cdiv(C, config["BLOCK_C"]) * B,)
    return push, Step(grid, (programs, C, *sizes, volume), constants)


def _pyramid(form: Form, roots: tuple[int, ...]) -> Pyramid:
    coded = layout.tape(form, (1, 1, 1)).coded  # does not depend on sizes
    found = plan(form.levels, None).source
    source = tuple(s if c else -1 for s, c in zip(found, coded, strict=True))
    return Pyramid(
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
) -> tuple[dict[str, int], int]:
    """Of the shipped config: its constants, with a tile's channels, and the places a channel."""
    key = (
        ("channels", channels),
        ("itemsize", dtype.itemsize),
        ("layout", "inner" if form.inner else "outer"),
        ("mode", form.mode),
    )
    constants = dict(_tuning.config(OP, kernel, arch, key))
    constants["BLOCK_C"] = min(constants["BLOCK_C"], triton.next_power_of_2(channels))
    return constants, constants.pop("TILE") // constants["BLOCK_C"]


def _tiles(levels: Sequence[Level], places: int) -> tuple[Tile, ...]:
    """A level with fewer bins has more elements a bin, and so more lanes a bin."""
    counts = [math.prod(o or WHOLE_BINS for o in level) for level in levels]
    found = []
    for level, count in zip(levels, counts, strict=True):
        ratio = triton.next_power_of_2(max(counts) // count + 1) // 2
        lanes = min(places, max(ratio, places // triton.next_power_of_2(count)))
        lanes_w = min(lanes, triton.next_power_of_2(-(-ROW // (level[2] or WHOLE_BINS))))
        found.append((places // lanes, lanes // lanes_w, lanes_w))
    return tuple(found)


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


def _strides(
    form: Form, shape: Sequence[int], strides: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """A unit, and the strides; where channels are innermost those of the other axes are in units, by which the
    compiler sees that rows are aligned. An axis of one element has any stride, so zero.
    """
    b, c, *others = (s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
    if form.inner and c == 1 and not any(s % UNIT for s in (b, *others)):
        return UNIT, (b // UNIT, c, *(s // UNIT for s in others))
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
