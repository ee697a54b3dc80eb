"""Depthwise convolution: plans and launchers of depthwise_kernels.py."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuning
from ..._dispatch import YES, Verdict, no
from ..common.dtypes import DTYPES
from . import depthwise_kernels as kernels
from . import passes
from .depthwise_walk import Walk, shares
from .passes import ACCUMULATORS, OP, accumulator
from .pixels import (
    VECTOR,
    WIDEST,
    Plan,
    check_like,
    empty,
    epilogue_arguments,
    pixel_stride,
    readable,
    require,
)
from .window import Window

FORWARD, WGRAD = "_conv3d_depthwise_fwd_kernel", "_conv3d_depthwise_wgrad_kernel"

MOST_TAPS = 15  # weights, or sums for them, that a lane holds at once
MERGED_TILES = 256  # statistics that one program merges
FILL = 1024  # programs of wgrad at most: its partial sums are no more
PLAIN = {"EPS": 0.0, "ACTIVATION": "", "SLOPE": 0.0}


class Placed(NamedTuple):
    """Where outputs lie in a dense tensor, in pixels: the first one, and the strides of n, t, h and w."""

    start: int
    n: int
    t: int
    h: int
    w: int


def can_run(window: Window, channels: int, filters: int, dtype: torch.dtype) -> Verdict:
    """Forward and wgrad: any stride, dilation and padding; dgrad: any but replicate padding."""
    if dtype not in DTYPES:
        return no(f"x is {dtype}; the kernels take fp16, bf16, fp32 and fp64")
    if not window.groups == channels == filters:
        return no(
            f"{channels} channels, {filters} filters and {window.groups} groups; "
            "depthwise kernels take one filter a channel"
        )
    if window.transposed:
        return no("the convolution is transposed; dgrad of its window is what it computes")
    if window.kernel[0] > MOST_TAPS:
        return no(f"kernel is {window.kernel}; depthwise kernels take {MOST_TAPS} taps in time")
    return YES


def forward(
    x: Tensor,
    weight: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str = "",
    negative_slope: float = 0.0,
) -> Tensor:
    """``act(((conv(x) + bias) - mean) / sqrt(variance + eps) * bn_weight + bn_bias + residual)``, each part optional.

    Returns:
        [N, C, T', H', W'], dense ``channels_last_3d``, rounded once.
    """
    z = _output(x, weight, window)
    vectors, _ = epilogue_arguments(
        z, bias, mean, variance, bn_weight, bn_bias, residual, activation
    )
    constants = {"EPS": eps, "ACTIVATION": activation, "SLOPE": negative_slope}
    _run(x, weight, window, z, _dense(z), list(z.shape[2:]), residual, vectors, constants)
    return z


def forward_with_statistics(
    x: Tensor, weight: Tensor, window: Window
) -> tuple[Tensor, Tensor, int]:
    """The convolution, and mean and M2 of its rounded values.

    Returns:
        y: [N, C, T', H', W'], dense ``channels_last_3d``.
        part: [1, 3, C], of all rows: a tile of lanes is no run of rows, so tiles are merged here, in a fixed order.
        ROWS: all rows.
    """
    y = _output(x, weight, window)
    part = _run(x, weight, window, y, _dense(y), list(y.shape[2:]), None, (None,) * 5, PLAIN, True)
    assert part is not None
    channels = y.shape[1]
    block_c = min(16, triton.next_power_of_2(channels))
    while (tiles := part.shape[0]) > 1:
        merged = part.new_empty(triton.cdiv(tiles, MERGED_TILES), 4, channels)
        grid = merged.shape[0], triton.cdiv(channels, block_c)
        kernels._conv3d_depthwise_merge_kernel[grid](
            part, merged, channels, tiles, BLOCK_T=MERGED_TILES, BLOCK_C=block_c
        )
        part = merged
    return y, part[:, 1:], y.numel() // channels


def dgrad(dy: Tensor, weight: Tensor, window: Window, sizes: Sequence[int]) -> Tensor:
    """The gradient of x ``[N, C, *sizes]``, dense ``channels_last_3d``: the forward kernel over dy, taps turned.

    With a stride, elements of dx that the same taps reach lie a stride apart: each such class is one launch that
    writes its own pixels, so that nothing is multiplied by zero.
    """
    if window.replicate and max(*window.before, *window.after) > 0:
        raise ValueError(f"window: expected padding of zeros, got {window}")
    if window.output(sizes) != list(dy.shape[2:]):
        raise ValueError(
            f"dy: expected sizes {window.output(sizes)} for x's {list(sizes)}, got {tuple(dy.shape)}"
        )
    channels = dy.shape[1]
    require(can_run(window, channels, weight.shape[0], dy.dtype))
    check_like("weight", weight, dy, (channels, 1, *window.kernel))
    dx = empty(dy, (dy.shape[0], channels, *sizes))
    whole = _dense(dx)
    axes = [list(_classes(window, axis, size)) for axis, size in enumerate(sizes)]
    if any(not c.taps for axis in axes for c in axis):
        dx.zero_()  # what no tap reaches
    for of in itertools.product(*axes):
        if all(c.taps for c in of):
            kt, kh, kw = (slice(c.taps.start, c.taps.stop, c.taps.step) for c in of)
            turned = weight[:, :, kt, kh, kw].flip(2, 3, 4)
            part = Window(
                kernel=tuple(turned.shape[2:]),  # type: ignore[arg-type]
                before=tuple(c.before for c in of),  # type: ignore[arg-type]
                dilation=tuple(c.dilation for c in of),  # type: ignore[arg-type]
                groups=channels,
            )
            start = sum(c.first * s for c, s in zip(of, whole[2:], strict=True))
            steps = [s * stride for s, stride in zip(whole[2:], window.stride, strict=True)]
            counts = [c.elements for c in of]
            _run(dy, turned, part, dx, Placed(start, whole.n, *steps), counts, None, (None,) * 5, PLAIN)  # fmt: skip
    return dx


def wgrad(x: Tensor, dy: Tensor, window: Window) -> Tensor:
    """The gradient of the weight ``[C, 1, kt, kh, kw]``, in x's dtype; any stride, padding and dilation."""
    n, channels, *sizes = x.shape
    pixel_x = pixel_stride("x", x)
    require(can_run(window, channels, dy.shape[1], x.dtype))
    check_like("dy", dy, x, (n, channels, *window.output(sizes)))
    pixel_y = pixel_stride("dy", dy)
    least = min(readable(x, pixel_x, 1), readable(dy, pixel_y, 1))
    walk = _walk(window, channels, least, pixel_x, pixel_y)
    plan = plan_wgrad(passes.arch_of(x.device), walk, n, tuple(sizes), tuple(dy.shape[2:]), x.dtype)
    taps = math.prod(window.kernel)
    chunks = plan.grid[0] // plan.constants["WALK"].pieces
    part = torch.empty(chunks, taps, channels, dtype=accumulator(x), device=x.device)
    kernels._conv3d_depthwise_wgrad_kernel[plan.grid](x, dy, part, *plan.sizes, **plan.constants)
    dw = torch.empty(channels, 1, *window.kernel, dtype=x.dtype, device=x.device)
    block = min(64, triton.next_power_of_2(dw.numel()))
    kernels._conv3d_depthwise_reduce_kernel[(triton.cdiv(dw.numel(), block),)](
        part, dw, chunks, taps, channels, BLOCK_P=16, BLOCK_E=block, ACC=plan.constants["ACC"]
    )
    return dw


@functools.lru_cache(maxsize=4096)
def plan_forward(
    arch: str, walk: Walk, n: int, sizes: tuple[int, ...], output: tuple[int, ...], placed: Placed,
    dtype: torch.dtype, statistics: bool,
) -> Plan:  # fmt: skip
    """A flat tile, or with statistics one of whole lanes, a block of channels wide."""
    walk, config = _config(
        FORWARD, arch, walk, dtype, {"epilogue": "statistics" if statistics else "affine"}
    )
    block_l, block_c = config["BLOCK_L"], config["BLOCK_C"]
    if not statistics:
        block_c = min(block_c, _width(walk, dtype))
        work = triton.cdiv(walk.channels, block_c)
        columns = 1
    else:
        work, columns = 1, triton.cdiv(walk.channels, block_c)
    lanes = _lanes(walk, n, output)
    constants = {
        "WALK": walk, **config, "BLOCK_C": block_c,
        "INDEX": tl.int64 if lanes * work >= WIDEST else tl.int32,
        "ACC": ACCUMULATORS.get(dtype, tl.float32),
    }  # fmt: skip
    grid = triton.cdiv(lanes * work, block_l), columns
    return Plan(grid, (lanes, *sizes, *output, *placed), constants)


@functools.lru_cache(maxsize=4096)
def plan_wgrad(
    arch: str, walk: Walk, n: int, sizes: tuple[int, ...], output: tuple[int, ...], dtype: torch.dtype
) -> Plan:  # fmt: skip
    """The grid's first axis is chunks of lanes x rows of taps."""
    walk, config = _config(WGRAD, arch, walk, dtype, {})
    lanes = _lanes(walk, n, output)
    tiles = triton.cdiv(lanes, config["BLOCK_L"])
    columns = triton.cdiv(walk.channels, config["BLOCK_C"])
    repeats = triton.cdiv(tiles, min(tiles, triton.cdiv(FILL, walk.pieces * columns)))
    constants = {
        "WALK": walk, **config, "INDEX": tl.int64 if lanes >= WIDEST else tl.int32,
        "ACC": ACCUMULATORS.get(dtype, tl.float32),
    }  # fmt: skip
    grid = triton.cdiv(tiles, repeats) * walk.pieces, columns
    return Plan(grid, (lanes, repeats, *sizes, *output), constants)


def forget_plans() -> None:
    """After a change of the configs."""
    plan_forward.cache_clear()
    plan_wgrad.cache_clear()


class _Class(NamedTuple):
    """Of one axis of dx: elements ``first``, ``first + stride``, ..., which the same taps reach.

    Attributes:
        elements: how many they are.
        taps: those that reach them.
        before, dilation: of the convolution over dy, with these taps turned round, that makes them.
    """

    first: int
    elements: int
    taps: range
    before: int
    dilation: int


def _classes(window: Window, axis: int, size: int) -> Iterator[_Class]:
    taps, stride, before, dilation = (
        field[axis] for field in (window.kernel, window.stride, window.before, window.dilation)
    )
    common = math.gcd(stride, dilation)
    for first in range(min(stride, size)):
        # Output o reads element o * stride - before + tap * dilation.
        reach = [k for k in range(taps) if (first + before - k * dilation) % stride == 0]
        count = -(-(size - first) // stride)
        if not reach:
            yield _Class(first, count, range(0), 0, 1)
            continue
        last = (reach[-1] * dilation - first - before) // stride
        yield _Class(
            first, count, range(reach[0], taps, stride // common), last, dilation // common
        )


def _run(
    x: Tensor, weight: Tensor, window: Window, z: Tensor, placed: Placed, output: list[int],
    residual: Tensor | None, vectors: tuple[Tensor | None, ...], constants: dict[str, Any],
    statistics: bool = False,
) -> Tensor | None:  # fmt: skip
    """The forward kernel; returns the tiles' statistics."""
    n, channels, *sizes = x.shape
    pixel_x = pixel_stride("x", x)
    pixel_y = channels if residual is None else pixel_stride("residual", residual)
    walk = _walk(window, channels, readable(x, pixel_x, 1), pixel_x, pixel_y)
    plan = plan_forward(
        passes.arch_of(x.device), walk, n, tuple(sizes), tuple(output), placed, x.dtype, statistics
    )
    # Channels innermost, and zeros for those that are read but are not there.
    packed = weight.reshape(channels, -1).t()
    packed = F.pad(packed, (0, walk.readable - channels)).contiguous()
    part = None
    if statistics:
        part = torch.empty(plan.grid[0], 4, channels, dtype=accumulator(x), device=x.device)
    kernels._conv3d_depthwise_fwd_kernel[plan.grid](
        x, packed, z, residual, *vectors, part, *plan.sizes, **constants, **plan.constants
    )
    return part


def _output(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The last look at x and weight before pointers are taken; an empty result of the right sizes."""
    pixel_stride("x", x)
    n, channels, *sizes = x.shape
    require(can_run(window, channels, weight.shape[0], x.dtype))
    check_like("weight", weight, x, (channels, 1, *window.kernel))
    output = window.output(sizes)
    if min(n, *output) < 1:
        raise ValueError(f"x: expected at least one output, got {n} x {output} of {tuple(x.shape)}")
    return empty(x, (n, channels, *output))


def _dense(z: Tensor) -> Placed:
    _, _, t, h, w = z.shape
    return Placed(0, t * h * w, h * w, w, 1)


def _walk(window: Window, channels: int, readable: int, pixel_x: int, pixel_y: int) -> Walk:
    """Without a lane's outputs, which the config says."""
    kt, _, kw = window.kernel
    padded = max(*window.before, *window.after) > 0
    return Walk(
        window.kernel, window.stride, window.before, window.dilation, window.replicate and padded,
        channels, readable, pixel_x, pixel_y, 1, 1, kw if kt * kw <= MOST_TAPS else 1,
    )  # fmt: skip


def _config(
    kernel: str, arch: str, walk: Walk, dtype: torch.dtype, match: dict[str, str]
) -> tuple[Walk, dict[str, int]]:
    """The shipped config, and the walk with the outputs of a lane."""
    key = (("itemsize", dtype.itemsize), ("width", _width(walk, dtype)), *match.items())
    config = dict(_tuning.config(OP, kernel, arch, key))
    frames, columns = config.pop("FRAMES"), config.pop("COLUMNS")
    (kt, _, _), (st, _, sw), (dt, _, dw) = walk.kernel, walk.stride, walk.dilation
    if not shares(frames, kt, st, dt):
        frames, columns = 1, columns * 2
    if not shares(columns, walk.taps_w, sw, dw):
        columns = 1
    config["BLOCK_C"] = min(config["BLOCK_C"], triton.next_power_of_2(walk.channels))
    return walk._replace(frames=frames, columns=columns), config


def _width(walk: Walk, dtype: torch.dtype) -> int:
    """Channels that one load brings: of those that exist, as many as pixels are aligned for."""
    whole = math.gcd(walk.readable, walk.pixel_x)
    return min(VECTOR // dtype.itemsize, whole & -whole)


def _lanes(walk: Walk, n: int, output: Sequence[int]) -> int:
    t, h, w = output
    return n * triton.cdiv(t, walk.frames) * h * triton.cdiv(w, walk.columns)
