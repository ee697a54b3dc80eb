"""The definition in plain torch: pad, roll, partition, attend, and back. Differentiable, any device, fp64 too.

Nothing here uses a plan: it is what plans are checked against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dropout import philox4x32
from .geometry import Size3, fit
from .options import Options

_LOW = 0xFFFFFFFF


def window_attention3d(
    qkv: Tensor, bias_table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options
) -> Tensor:  # fmt: skip
    """``[B, T, H, W, C]``; arguments as the public function's.

    Args:
        seed: int64, one value, of the dropout; None without.
    """
    return attention_and_sums(qkv, bias_table, pad_kv, seed, options)[0]


def attention_and_sums(
    qkv: Tensor, bias_table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """And the log-sum-exp of every token's scores, ``[B, heads, T * H * W]``."""
    B, *size, width = qkv.shape
    heads, channels, device = options.num_heads, width // 3, qkv.device
    window, shift = fit(size, options.window, options.shift)
    windows = Windows(size, window, shift, options.border == "grid")

    # A pad's q is any (its result is cropped), its k and v are the given ones.
    row = qkv.new_zeros(channels)
    row = F.pad(row, (0, 2 * channels)) if pad_kv is None else torch.cat([row, pad_kv.reshape(-1)])
    real = windows.pad(torch.ones(1, *size, 1, dtype=torch.bool, device=device))
    tokens = windows.split(torch.where(real, windows.pad(qkv), row))
    q, k, v = tokens.unflatten(-1, (3, heads, channels // heads)).unbind(3)
    scores = torch.einsum("bwihd,bwjhd->bwhij", q * options.scale, k)
    if bias_table is not None:
        index = torch.as_tensor(options.codes(window).pairs(), device=device)
        scores = scores + bias_table[index].permute(2, 0, 1)

    t, h, w = (
        torch.arange(n, device=device).view([-1 if d == axis else 1 for d in range(3)])
        for axis, n in enumerate(windows.padded)
    )
    region = (t < shift[0]) * 4 + (h < shift[1]) * 2 + (w < shift[2]) * 1  # those that wrap round
    region, frame = (
        windows.split(x[None, ..., None]).squeeze(-1) for x in (region, t + 0 * region)
    )
    seen = region[..., :, None] == region[..., None, :]
    if not options.pads_take_part:
        seen = seen & windows.split(real).squeeze(-1)[..., None, :]
    if options.causal_t:
        seen = seen & (frame[..., None, :] <= frame[..., :, None])
    scores = scores.masked_fill(~seen.unsqueeze(2), torch.finfo(scores.dtype).min)
    sums = windows.join(scores.logsumexp(-1).transpose(2, 3)).flatten(1, 3).transpose(1, 2)
    weights = scores.softmax(-1)
    if seed is not None:
        at = torch.arange(B * math.prod(size), device=device).view(B, *size, 1)
        query = windows.split(windows.pad(at)).squeeze(-1)[:, :, None, :, None]
        head = torch.arange(heads, device=device)[:, None, None]
        key = torch.arange(weights.shape[-1], device=device)
        weights = weights * kept(query * heads + head, key, seed, options.dropout_p).to(weights)
    out = torch.einsum("bwhij,bwjhd->bwihd", weights, v.to(weights.dtype)).flatten(3)
    return windows.join(out).to(qkv.dtype).contiguous(), sums


def kept(row: Tensor, key: Tensor, seed: Tensor, p: float) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - p), fp64: Philox4x32-10 of a weight's place.

    Args:
        row: int64, the query's number in the batch times the heads, plus the head. key: the key's slot. They broadcast.
    """
    zero = torch.zeros_like(key)
    words = philox4x32((key, row & _LOW, row >> 32, zero), (seed & _LOW, seed >> 32 & _LOW))
    threshold = int(p * 2**32)
    return (words[0] >= threshold) * (0.0 if threshold > _LOW else 1 / (1 - p))


class Windows(NamedTuple):
    """``[b, T, H, W, c]`` in windows ``[b, windows, tokens, c]`` and back."""

    size: Sequence[int]
    window: Size3
    shift: Size3
    grid: bool

    @property
    def counts(self) -> list[int]:
        return [-(-n // w) for n, w in zip(self.size, self.window, strict=True)]

    @property
    def padded(self) -> list[int]:
        return [c * w for c, w in zip(self.counts, self.window, strict=True)]

    def pad(self, x: Tensor) -> Tensor:
        dt, dh, dw = (p - n for p, n in zip(self.padded, self.size, strict=True))
        return F.pad(x, (0, 0, 0, dw, 0, dh, 0, dt))

    def split(self, x: Tensor) -> Tensor:
        """Of a padded map."""
        x = x.roll([-s for s in self.shift], (1, 2, 3))
        pairs = zip(self.window, self.counts, strict=True)
        if self.grid:
            lengths, order = [n for w, c in pairs for n in (w, c)], (2, 4, 6, 1, 3, 5)
        else:
            lengths, order = [n for w, c in pairs for n in (c, w)], (1, 3, 5, 2, 4, 6)
        x = x.reshape(x.shape[0], *lengths, x.shape[-1]).permute(0, *order, 7)
        return x.flatten(4, 6).flatten(1, 3)

    def join(self, x: Tensor) -> Tensor:
        """The map, without its pads."""
        x = x.reshape(x.shape[0], *self.counts, *self.window, x.shape[-1])
        order = (4, 1, 5, 2, 6, 3) if self.grid else (1, 4, 2, 5, 3, 6)
        x = x.permute(0, *order, 7).reshape(x.shape[0], *self.padded, x.shape[-1])
        x = x.roll(list(self.shift), (1, 2, 3))
        T, H, W = self.size
        return x[:, :T, :H, :W]
