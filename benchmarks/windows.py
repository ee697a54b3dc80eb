"""Windowed attention as others write it, between projections and with them: what ours is measured against.

``eager`` is torchvision's form: roll, cut into windows, scores, bias, mask, softmax, and back. ``sdpa_mask`` hands SDPA
the sum of bias and region mask, one ``[n, n]`` a window and head; ``flex`` is FlexAttention with both in its score_mod.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sora_kernels as sk
from sora_models.layers import torch as plain
from sora_models.layers._window import fit, merge, offset_index, partition, separated

from . import torchvision_models

FORMS = ("eager", "sdpa_mask", "flex")


class Core(nn.Module):
    """``[B, T, H, W, 3 C]`` -> ``[B, T, H, W, C]``; pads are zeros."""

    relative_position_index: Tensor

    def __init__(self, form: str, heads: int, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.window, self.shift = tuple(window), tuple(shift)
        table = torch.empty(math.prod(2 * n - 1 for n in window), heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("relative_position_index", offset_index(self.window, self.window))
        self._mask: Tensor | None = None

    def forward(self, qkv: Tensor) -> Tensor:
        T, H, W = size = qkv.shape[1:4]
        _, shift = fit(size, self.window, self.shift)
        y = unrolled(self.attend(rolled(self.padded(qkv), shift), size), shift)
        return y[:, :T, :H, :W].contiguous()

    def padded(self, x: Tensor) -> Tensor:
        size = x.shape[1:4]
        window, _ = fit(size, self.window, self.shift)
        dt, dh, dw = (-n % w for n, w in zip(size, window, strict=True))
        return F.pad(x, (0, 0, 0, dw, 0, dh, 0, dt)) if dt or dh or dw else x

    def attend(self, qkv: Tensor, size: Sequence[int]) -> Tensor:
        """Of a padded and rolled map.

        Args:
            size: the map's before it was padded.
        """
        window, shift = fit(size, self.window, self.shift)
        return getattr(self, f"_{self.form}")(qkv, window, shift)

    def bias(self, n: int) -> Tensor:
        index = self.relative_position_index[:n, :n]
        return self.relative_position_bias_table[index].permute(2, 0, 1).contiguous()

    def _eager(self, qkv: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
        tokens = partition(qkv, window)
        n, width = tokens.shape[1:]
        q, k, v = tokens.view(-1, n, 3, self.heads, width // 3 // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + self.bias(n)
        if any(shift):
            apart = separated(qkv.shape[1:4], window, shift, qkv.device)
            scores = scores.view(-1, len(apart), *scores.shape[1:])
            scores = scores.masked_fill(apart.unsqueeze(1), float("-inf")).flatten(0, 1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n, width // 3)
        return merge(y, qkv.shape[1:4], window)

    def _sdpa_mask(self, qkv: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
        """One copy of the map in, one out: windows and heads are one axis, that a mask serves every sample."""
        B, *size, width = qkv.shape
        counts = [n // w for n, w in zip(size, window, strict=True)]
        n, heads, dim = math.prod(window), self.heads, width // 3 // self.heads
        cut = [length for pair in zip(counts, window, strict=True) for length in pair]
        q, k, v = (
            qkv.view(B, *cut, 3, heads, dim)
            .permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)
            .reshape(3, *((B, -1) if any(shift) else (-1, heads)), n, dim)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._summed(size, window, shift))
        y = y.view(B, *counts, heads, *window, dim).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
        return y.reshape(B, *size, width // 3)

    def _summed(self, size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
        """Bias and mask, ``[windows * heads, n, n]``; in evaluation made once."""
        if self._mask is not None and not self.training:
            return self._mask
        mask = self.bias(math.prod(window))
        if any(shift):
            apart = separated(size, window, shift, mask.device).unsqueeze(1)
            mask = torch.where(apart, float("-inf"), mask).flatten(0, 1)
        if self.training:
            return mask
        self._mask = mask.detach()
        if mask.is_cuda:  # rows that begin at 16 bytes, or SDPA would copy it in every call
            self._mask = F.pad(self._mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
        return self._mask

    def _flex(self, qkv: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        tokens = partition(qkv, window)
        n, width = tokens.shape[1:]
        q, k, v = tokens.view(-1, n, 3, self.heads, width // 3 // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.bias(n)
        region = regions(qkv.shape[1:4], window, shift, qkv.device)
        windows = len(region)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score + bias[h, i, j]
            if not any(shift):
                return score
            own = b % windows
            return torch.where(region[own, i] == region[own, j], score, float("-inf"))

        y = flex_attention(q, k, v, score_mod=score_mod)
        return merge(y.transpose(1, 2).reshape(-1, n, width // 3), qkv.shape[1:4], window)


def rolled(x: Tensor, shift: Sequence[int]) -> Tensor:
    return x.roll([-s for s in shift], (1, 2, 3)) if any(shift) else x


def unrolled(x: Tensor, shift: Sequence[int]) -> Tensor:
    return x.roll(list(shift), (1, 2, 3)) if any(shift) else x


def regions(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor:
    """Number of the region that a slot lies in, int32 ``[windows, n]``: slots of two do not see each other."""
    found = torch.zeros(1, *size, 1, dtype=torch.int32, device=device)
    for axis, (n, s) in enumerate(zip(size, shift, strict=True)):
        wrapped = torch.arange(n, device=device, dtype=torch.int32) >= n - s
        found = found * 2 + wrapped.view([-1 if d == axis + 1 else 1 for d in range(5)])
    return partition(found, window).squeeze(-1)


class OursCore(nn.Module):
    """:func:`sora_kernels.window_attention3d` with the parameter and buffer of :class:`Core`."""

    relative_position_index: Tensor

    def __init__(
        self, heads: int, window: Sequence[int], shift: Sequence[int], backend: str | None
    ) -> None:
        super().__init__()
        self.heads, self.window, self.shift, self.backend = heads, window, shift, backend
        like = Core("eager", heads, window, shift)
        self.relative_position_bias_table = like.relative_position_bias_table
        self.register_buffer("relative_position_index", like.relative_position_index)

    def forward(self, qkv: Tensor) -> Tensor:
        return sk.window_attention3d(
            qkv, self.heads, self.window, self.shift, bias_table=self.relative_position_bias_table,
            backend=self.backend,
        )  # fmt: skip


class Attention(Core):
    """With the projections, rolled at the width of x as torchvision's module is, and with its state dict."""

    def __init__(
        self, form: str, dim: int, heads: int, window: Sequence[int], shift: Sequence[int]
    ) -> None:
        super().__init__(form, heads, window, shift)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        T, H, W = size = x.shape[1:4]
        _, shift = fit(size, self.window, self.shift)
        y = self.attend(self.qkv(rolled(self.padded(x), shift)), size)
        return unrolled(self.proj(y), shift)[:, :T, :H, :W].contiguous()


def stock(dim: int, heads: int, window: Sequence[int], shift: Sequence[int]) -> nn.Module:
    """torchvision's module, or where it is not installed our transcription of it."""
    found = torchvision_models.video_swin()
    kind = plain.ShiftedWindowAttention3d if found is None else found.ShiftedWindowAttention3d
    return kind(dim, list(window), list(shift), heads)


def source() -> str:
    """Of :func:`stock`, for the row."""
    if torchvision_models.video_swin() is None:
        return "sora_models.layers.torch"
    import torchvision

    return f"torchvision {torchvision.__version__}"
