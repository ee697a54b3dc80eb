"""Shifted-window attention over (T, H, W) in plain PyTorch. Imports no ``sora_kernels``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size3 = tuple[int, int, int]


class ShiftedWindowAttention3d(nn.Module):
    """Multi-head attention inside the windows of a video map, the windows cyclically shifted.

    A twin of torchvision's module of the same name (Video-Swin): same constructor, parameters and
    buffer, and the same numbers. The rules that pretrained weights depend on:

    * the map is padded at its end to a multiple of the window *before* the projection to q, k, v,
      so pad tokens take part as keys and values equal to the projection's bias;
    * on an axis that the window covers whole, the window is clipped to the map and not shifted;
    * under a shift, tokens that the cyclic roll brings together from two ends of an axis do not see
      each other;
    * a clipped window reads the relative position index of the full window's first slots
      (``bias_index="torchvision"``). That is wrong geometry once H or W is clipped; ``"exact"``
      uses the true offsets, for models that meet maps smaller than the window.

    Args:
        dim: channels C. window_size, shift_size: (t, h, w). num_heads: must divide C.
        qkv_bias, proj_bias: biases of the two projections.
        attention_dropout, dropout: on the attention weights and on the output, in training.
        bias_index: ``"torchvision"`` or ``"exact"``.

    Shapes: input and output [B, T, H, W, C], any T, H, W of at least 1.

    Source: Liu et al., "Video Swin Transformer", 2021.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        bias_index: str = "torchvision",
    ) -> None:
        super().__init__()
        window, shift = _triple("window_size", window_size, 1), _triple("shift_size", shift_size, 0)
        if any(s >= w for w, s in zip(window, shift, strict=True)):
            raise ValueError(
                f"shift_size: expected less than window_size {window} on every axis; got {shift}"
            )
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim {dim}; got {num_heads}")
        if bias_index not in ("torchvision", "exact"):
            raise ValueError(f"bias_index: expected 'torchvision' or 'exact'; got {bias_index!r}")
        self.window_size, self.shift_size = window, shift
        self.num_heads, self.bias_index = num_heads, bias_index
        self.attention_dropout, self.dropout = attention_dropout, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        table = torch.empty(math.prod(2 * w - 1 for w in window), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("relative_position_index", offset_index(window, window))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(
                f"x: expected [B, T, H, W, {self.qkv.in_features}]; got {tuple(x.shape)}"
            )
        b, *size, c = x.shape
        window, shift = fit(size, self.window_size, self.shift_size)
        padded = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
        (dt, dh, dw) = (p - n for p, n in zip(padded, size, strict=True))
        x = F.pad(x, (0, 0, 0, dw, 0, dh, 0, dt))
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))

        tokens = partition(x, window)
        n = tokens.shape[1]
        qkv = self.qkv(tokens).view(-1, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [windows, heads, n, head_dim]
        scores = (q * (c // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.position_bias(window)
        if any(shift):
            apart = separated(padded, window, shift, x.device)
            scores = scores.view(b, len(apart), *scores.shape[1:])
            scores = scores.masked_fill(apart.unsqueeze(1), float("-inf")).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        y = self.proj((weights @ v).transpose(1, 2).reshape(-1, n, c))
        y = F.dropout(y, self.dropout, self.training)

        y = merge(y, padded, window)
        if any(shift):
            y = y.roll(shift, (1, 2, 3))
        return y[:, : size[0], : size[1], : size[2]]

    def position_bias(self, window: Size3) -> Tensor:
        """The table laid out for a (clipped) window, [heads, n, n]."""
        n = math.prod(window)
        if self.bias_index == "exact" and window != self.window_size:
            device = self.relative_position_index.device
            index = offset_index(window, self.window_size, device)
        else:
            index = self.relative_position_index[:n, :n]
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, shift_size={self.shift_size}, "
            f"num_heads={self.num_heads}"
        )


def _triple(argument: str, value: Sequence[int], least: int) -> Size3:
    sizes = tuple(value)
    if len(sizes) != 3 or any(not isinstance(s, int) or s < least for s in sizes):
        raise ValueError(f"{argument}: expected three ints of at least {least}; got {value!r}")
    return sizes


def fit(size: Sequence[int], window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """The window clipped to the map, and no shift on the axes that it covers whole."""
    clipped = tuple(min(n, w) for n, w in zip(size, window, strict=True))
    kept = tuple(0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True))
    return clipped, kept  # type: ignore[return-value]


def offset_index(window: Size3, table_window: Size3, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each pair of slots of ``window``, int64 [n, n]."""
    slots = torch.cartesian_prod(*(torch.arange(w, device=device) for w in window))
    offsets = slots[:, None] - slots[None, :]
    rows = torch.zeros_like(offsets[..., 0])
    for axis, w in enumerate(table_window):
        rows = rows * (2 * w - 1) + offsets[..., axis] + w - 1
    return rows


def partition(x: Tensor, window: Size3) -> Tensor:
    """[B, T, H, W, C], sizes that the window divides -> [B * windows, tokens of a window, C]."""
    b, t, h, w, c = x.shape
    wt, wh, ww = window
    x = x.view(b, t // wt, wt, h // wh, wh, w // ww, ww, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, wt * wh * ww, c)


def merge(tokens: Tensor, size: Sequence[int], window: Size3) -> Tensor:
    """The inverse of :func:`partition`."""
    (t, h, w), (wt, wh, ww), c = size, window, tokens.shape[-1]
    grid = (t // wt, h // wh, w // ww)
    x = tokens.view(tokens.shape[0] // math.prod(grid), *grid, wt, wh, ww, c)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, t, h, w, c)


def separated(size: Sequence[int], window: Size3, shift: Size3, device: torch.device) -> Tensor:
    """Which pairs of slots must not see each other, bool [windows, n, n].

    After the roll, the last ``shift`` positions of an axis hold what came from its beginning.
    """
    regions = torch.zeros(1, *size, 1, dtype=torch.int64, device=device)
    for axis, (n, s) in enumerate(zip(size, shift, strict=True)):
        wrapped = torch.arange(n, device=device) >= n - s
        regions = regions * 2 + wrapped.view([-1 if d == axis + 1 else 1 for d in range(5)])
    codes = partition(regions, window).squeeze(-1)
    return codes[:, :, None] != codes[:, None, :]
