"""Which element of x goes to which of a lane's outputs by which tap: follows from the window alone, and is worked out
while depthwise_kernels.py is compiled."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton

Triple = tuple[int, int, int]


class Element(NamedTuple):
    """An element of x that a lane loads.

    Attributes:
        t, w: where, from the lane's first.
        uses: the lane's (output, tap) that it is for.
    """

    t: int
    w: int
    uses: list[tuple[int, int]]


class Walk(NamedTuple):
    """What the kernels are specialised for besides the epilogue.

    Attributes:
        kernel, stride, before, dilation, replicate: as in ``Window``; ``before`` may be negative.
        channels: C.
        readable: channels that exist in memory: more than C where pixels are padded.
        pixel_x, pixel_y: elements from one pixel to the next of x, and of the output-sized tensor that is read.
        frames, columns: outputs of a lane.
        taps_w: taps along w that are worked on together: all, or 1 where they would not fit in registers.
    """

    kernel: Triple
    stride: Triple
    before: Triple
    dilation: Triple
    replicate: bool
    channels: int
    readable: int
    pixel_x: int
    pixel_y: int
    frames: int
    columns: int
    taps_w: int

    @property
    def pieces(self) -> int:
        """Sets of taps that are worked on together."""
        return self.kernel[1] * (self.kernel[2] // self.taps_w)

    @property
    def elements(self) -> list[Element]:
        """What a lane loads for one set of taps. Triton's own cache does not see a change of this code: clear it."""
        return _elements(self)


@functools.lru_cache(maxsize=256)
def _reach(outputs: int, taps: int, stride: int, dilation: int) -> dict[int, list[tuple[int, int]]]:
    """Of one axis: offset of an element from the lane's first -> the (output, tap) pairs that meet there."""
    found: dict[int, list[tuple[int, int]]] = {}
    for output in range(outputs):
        for tap in range(taps):
            found.setdefault(output * stride + tap * dilation, []).append((output, tap))
    return dict(sorted(found.items()))


def shares(outputs: int, taps: int, stride: int, dilation: int) -> bool:
    """Whether outputs side by side have elements in common."""
    return len(_reach(outputs, taps, stride, dilation)) < outputs * taps


@functools.lru_cache(maxsize=256)
def _elements(walk: Walk) -> list[Element]:
    times = _reach(walk.frames, walk.kernel[0], walk.stride[0], walk.dilation[0])
    columns = _reach(walk.columns, walk.taps_w, walk.stride[2], walk.dilation[2])
    return [
        Element(
            t, w, [(f * walk.columns + c, kt * walk.taps_w + kw) for f, kt in ts for c, kw in ws]
        )
        for t, ts in times.items()
        for w, ws in columns.items()
    ]


@triton.constexpr_function
def element_count(walk):
    return len(walk.elements)


@triton.constexpr_function
def element_t(walk, e):
    return walk.elements[e].t


@triton.constexpr_function
def element_w(walk, e):
    return walk.elements[e].w


@triton.constexpr_function
def use_count(walk, e):
    return len(walk.elements[e].uses)


@triton.constexpr_function
def use_output(walk, e, use):
    return walk.elements[e].uses[use][0]


@triton.constexpr_function
def use_tap(walk, e, use):
    return walk.elements[e].uses[use][1]


@triton.constexpr_function
def piece_count(walk):
    return walk.pieces
