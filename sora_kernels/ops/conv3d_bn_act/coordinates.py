"""Where an output pixel lies and what its taps read: what the convolutions' kernels share, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_place(row, TO, HO, WO):
    """n, t, h, w of an output pixel."""
    w = row % WO
    row = row // WO
    h = row % HO
    row = row // HO
    return row // TO, row % TO, h, w


@triton.jit
def is_inside(at, size, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Whether a coordinate is on the map; an axis without padding cannot leave it."""
    if BEFORE > 0 or AFTER > 0:
        # One comparison: what is negative becomes large.
        return at.to(tl.uint32) < size.to(tl.uint32)
    else:
        return at == at


@triton.jit
def pixel_number(n, t, h, w, T, H, W):
    """A pixel's number; n is int64 where the map can pass 2^31 elements."""
    return ((n * T + t) * H + h) * W + w


@triton.jit
def _clamp(at, size, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    if BEFORE > 0 or AFTER > 0:
        at = tl.minimum(tl.maximum(at, 0), size - 1)
    return at


@triton.jit
def clamped_pixel(n, t, h, w, kt, kh, kw, T, H, W, WINDOW: tl.constexpr):
    """The pixel a tap reads where padding repeats the border."""
    t = _clamp(t + kt * WINDOW.dilation[0], T, WINDOW.before[0], WINDOW.after[0])
    h = _clamp(h + kh * WINDOW.dilation[1], H, WINDOW.before[1], WINDOW.after[1])
    w = _clamp(w + kw * WINDOW.dilation[2], W, WINDOW.before[2], WINDOW.after[2])
    return pixel_number(n, t, h, w, T, H, W)
