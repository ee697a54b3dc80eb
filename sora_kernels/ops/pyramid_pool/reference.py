"""``pyramid_pool3d`` in plain torch: the definition. Any device, any floating dtype, every ``torch.func`` transform.

``x`` is ``[B, C, T, H, W]`` here whatever its strides, and maps are ``[B, C or 2C, t, h, w]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import Level, bins

_mean_backward = torch.ops.aten._adaptive_avg_pool3d_backward.default


def maps(
    x: Tensor, levels: Sequence[Level], mode: str, valid_size: Tensor | None,
    places: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """One map a level; for "maxavg" the maxima are the first C channels, the means the others.

    Args:
        places: where the maxima are, as :func:`argmax` finds them; found out if None.
    """
    found = []
    for k, level in enumerate(levels):
        parts = []
        if mode != "avg":
            at = argmax(x, level, valid_size) if places is None else places[k]
            here = x.flatten(2).gather(2, at.flatten(2).clamp(min=0)).view(at.shape)
            parts.append(here.where(at >= 0, 0) if valid_size is not None else here)
        if mode != "max":
            parts.append(_by_region(_mean, x, level, valid_size, 0))
        found.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return found


def argmax(x: Tensor, level: Level, valid_size: Tensor | None) -> Tensor:
    """int64 [B, C, t, h, w]: place of each bin's maximum in the flattened T, H, W, -1 where there is none.

    Of equal values the first, of NaNs the last.
    """
    return _by_region(_argmax, x.detach(), level, valid_size, -1)


def maps_backward(
    grads: Sequence[Tensor | None], places: Sequence[Tensor] | None, levels: Sequence[Level],
    mode: str, valid_size: Tensor | None, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx ``[B, C, T, H, W]`` from the gradients of :func:`maps`, in their dtype."""
    some = next(g for g in grads if g is not None)
    dx = some.new_zeros(tuple(shape))
    for k, g in enumerate(grads):
        if g is None:
            continue
        first, *_, last = g.chunk(2, 1) if mode == "maxavg" else (g, g)
        if places is not None:
            at = places[k].flatten(2)
            given = first.flatten(2).where(at >= 0, 0)
            dx.flatten(2).scatter_add_(2, at.clamp(min=0), given)
        if mode != "max":
            _add_mean_backward(dx, last, levels[k], valid_size)
    return dx


def _add_mean_backward(dx: Tensor, g: Tensor, level: Level, valid_size: Tensor | None) -> None:
    if valid_size is None:
        dx += _mean_backward(g.contiguous(), dx)
        return
    for b, (t, h, w) in enumerate(_regions(valid_size, dx.shape[2:])):
        if t and h and w:
            region = dx[b : b + 1, :, :t, :h, :w]
            i, j, k = bins(level, (t, h, w))
            region += _mean_backward(g[b : b + 1, :, :i, :j, :k].contiguous(), region)


def _regions(valid_size: Tensor, sizes: Sequence[int]) -> list[list[int]]:
    return [
        [min(max(v, 0), n) for v, n in zip(given, sizes, strict=True)]
        for given in valid_size.tolist()
    ]


def _by_region(
    pool: Callable[[Tensor, Level, Sequence[int]], Tensor], x: Tensor, level: Level,
    valid_size: Tensor | None, beyond: int,
) -> Tensor:  # fmt: skip
    """``pool(region, bins, sizes of x)``, of all of x or of each sample's own region."""
    sizes = x.shape[2:]
    if valid_size is None:
        return pool(x, bins(level, sizes), sizes)
    dtype = torch.int64 if pool is _argmax else x.dtype
    whole = x.new_full((1, x.shape[1], *bins(level, sizes)), beyond, dtype=dtype)
    rows = []
    for b, (t, h, w) in enumerate(_regions(valid_size, sizes)):
        row = whole
        if t and h and w:
            own = bins(level, (t, h, w))
            row = pool(x[b : b + 1, :, :t, :h, :w], own, sizes)
            # A whole axis goes on where the region ends.
            pads = [(0, n - o) for o, n in zip(own, whole.shape[2:], strict=True)]
            row = F.pad(row, [v for pad in reversed(pads) for v in pad], value=beyond)
        rows.append(row)
    return torch.cat(rows) if rows else whole[:0]


def _mean(x: Tensor, own: Level, sizes: Sequence[int]) -> Tensor:
    return F.adaptive_avg_pool3d(x, own)


def _argmax(x: Tensor, own: Level, sizes: Sequence[int]) -> Tensor:
    at = F.adaptive_max_pool3d(x, own, return_indices=True)[1]
    _, _, _, h, w = x.shape
    if (h, w) == tuple(sizes[1:]):
        return at
    return (at // (h * w) * sizes[1] + at // w % h) * sizes[2] + at % w
