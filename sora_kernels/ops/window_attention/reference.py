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
from .options import Options, Size3, fit

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
    windows = Windows.of(qkv, options)
    _, _, v, scores, factor = _scores(qkv, bias_table, pad_kv, seed, options, windows)
    weights = scores.softmax(-1)
    if factor is not None:
        weights = weights * factor.to(weights)
    out = torch.einsum("bwhij,bwjhd->bwihd", weights, v.to(weights.dtype)).flatten(3)
    sums = windows.join(scores.logsumexp(-1).transpose(2, 3)).flatten(1, 3).transpose(1, 2)
    return windows.join(out).to(qkv.dtype).contiguous(), sums


def backward(
    dout: Tensor, qkv: Tensor, bias_table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dqkv, dtable, dpad_kv: the derivative of the definition, by hand, in fp32 or wider."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    given = (t if t is None else t.to(wide) for t in (qkv, bias_table, pad_kv))
    windows = Windows.of(qkv, options)
    q, k, v, scores, factor = _scores(*given, seed, options, windows)  # type: ignore[arg-type, call-arg]
    heads = options.num_heads
    dout = windows.split(windows.pad(dout.to(wide))).unflatten(-1, (heads, -1))
    weights = scores.softmax(-1)
    kept_weights = weights if factor is None else weights * factor.to(wide)
    dv = torch.einsum("bwhij,bwihd->bwjhd", kept_weights, dout)
    dweights = torch.einsum("bwihd,bwjhd->bwhij", dout, v)
    if factor is not None:
        dweights = dweights * factor.to(wide)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = torch.einsum("bwhij,bwjhd->bwihd", dscores, k) * options.scale
    dk = torch.einsum("bwhij,bwihd->bwjhd", dscores, q) * options.scale
    dtokens = windows.join_padded(torch.stack((dq, dk, dv), 3).flatten(3))
    dtable = dpad = None
    if bias_table is not None:
        rows = offset_rows(windows.window, options, qkv.device)
        dtable = torch.zeros_like(bias_table, dtype=wide)
        sums = dscores.sum((0, 1)).permute(1, 2, 0)
        dtable.index_put_((rows,), sums, accumulate=True)
        dtable = dtable.to(bias_table.dtype)
    if pad_kv is not None:
        real = windows.pad(torch.ones_like(qkv[..., :1], dtype=torch.bool))
        lost = dtokens[..., qkv.shape[-1] // 3 :].masked_fill(real, 0).sum((0, 1, 2, 3))
        dpad = lost.view(pad_kv.shape).to(pad_kv.dtype)
    return windows.crop(dtokens).to(qkv.dtype).contiguous(), dtable, dpad


def _scores(
    qkv: Tensor, bias_table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, options: Options,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """q, k, v ``[B, windows, n, heads, dim]``, the scores ``[B, windows, heads, n, n]``, factors of the weights."""
    B, *size, width = qkv.shape
    heads, channels, device, shift = options.num_heads, width // 3, qkv.device, windows.shift
    # A pad's q is any (its result is cropped), its k and v are the given ones.
    row = qkv.new_zeros(channels)
    row = F.pad(row, (0, 2 * channels)) if pad_kv is None else torch.cat([row, pad_kv.reshape(-1)])
    real = windows.pad(torch.ones(1, *size, 1, dtype=torch.bool, device=device))
    tokens = windows.split(torch.where(real, windows.pad(qkv), row))
    q, k, v = tokens.unflatten(-1, (3, heads, channels // heads)).unbind(3)
    scores = torch.einsum("bwihd,bwjhd->bwhij", q * options.scale, k)
    if bias_table is not None:
        rows = offset_rows(windows.window, options, device)
        scores = scores + bias_table[rows].permute(2, 0, 1)
    t, h, w = (
        torch.arange(n, device=device).view([-1 if d == axis else 1 for d in range(3)])
        for axis, n in enumerate(windows.padded)
    )
    region = (t < shift[0]) * 4 + (h < shift[1]) * 2 + (w < shift[2]) * 1  # those that wrap round
    maps = (windows.split(x[None, ..., None]).squeeze(-1) for x in (region, t + 0 * region))
    region, frame = maps
    seen = region[..., :, None] == region[..., None, :]
    if not options.pads_take_part:
        seen = seen & windows.split(real).squeeze(-1)[..., None, :]
    if options.causal_t:
        seen = seen & (frame[..., None, :] <= frame[..., :, None])
    scores = scores.masked_fill(~seen.unsqueeze(2), torch.finfo(scores.dtype).min)
    factor = None
    if seed is not None:
        at = torch.arange(B * math.prod(size), device=device).view(B, *size, 1)
        query = windows.split(windows.pad(at)).squeeze(-1)[:, :, None, :, None]
        head = torch.arange(heads, device=device)[:, None, None]
        key = torch.arange(scores.shape[-1], device=device)
        factor = kept(query * heads + head, key, seed, options.dropout_p)
    return q, k, v, scores, factor


def offset_rows(window: Size3, options: Options, device: torch.device) -> Tensor:
    """The table's row for each pair of slots, int64 ``[n, n]``: that of their offset in the table's window."""
    table = options.table_window
    _, h, w = table if options.bias_index == "torchvision" else window
    slot = torch.arange(math.prod(window), device=device)
    rows = 0 * (slot[:, None] - slot)
    for place, n in zip((slot // (h * w), slot // w % h, slot % w), table, strict=True):
        rows = rows * (2 * n - 1) + place[:, None] - place + n - 1
    return rows


def kept(row: Tensor, key: Tensor, seed: Tensor, p: float) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - p), fp64: Philox4x32-10 of a weight's place.

    Args:
        row: int64, the query's number in the batch times the heads, plus the head. key: the key's slot. They broadcast.
    """
    zero = torch.zeros_like(key)
    words = philox4x32((key, row & _LOW, row >> 32, zero), (seed & _LOW, seed >> 32 & _LOW))
    threshold = int(p * 2**32)
    return (words[0] >= threshold).double() * (0.0 if threshold > _LOW else 1 / (1 - p))


class Windows(NamedTuple):
    """``[b, T, H, W, c]`` in windows ``[b, windows, tokens, c]`` and back; window and shift as they are used."""

    size: Sequence[int]
    window: Size3
    shift: Size3
    grid: bool

    @classmethod
    def of(cls, qkv: Tensor, options: Options) -> Windows:
        size = qkv.shape[1:4]
        return cls(size, *fit(size, options.window, options.shift), options.border == "grid")

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
        return self.crop(self.join_padded(x))

    def join_padded(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], *self.counts, *self.window, x.shape[-1])
        order = (4, 1, 5, 2, 6, 3) if self.grid else (1, 4, 2, 5, 3, 6)
        x = x.permute(0, *order, 7).reshape(x.shape[0], *self.padded, x.shape[-1])
        return x.roll(list(self.shift), (1, 2, 3))

    def crop(self, x: Tensor) -> Tensor:
        T, H, W = self.size
        return x[:, :T, :H, :W]
