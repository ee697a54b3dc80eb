"""Video Swin-T in two builds from one description: stock blocks, or ``sk.nn.SwinBlock3d``.

The architecture is that published (Liu et al., "Video Swin Transformer", 2021), its stochastic depth left out, that
rows repeat. Both builds have the state dict of torchvision's ``swin3d_t``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sora_kernels as sk

from . import windows

# (dim, heads, window, shift) -> module of [B, T, H, W, dim]
BlockOf = Callable[[int, int, Sequence[int], Sequence[int]], nn.Module]


class Block(nn.Module):
    """torchvision's ``SwinTransformerBlock`` around a stock attention."""

    def __init__(self, dim: int, heads: int, window: Sequence[int], shift: Sequence[int]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = windows.stock(dim, heads, window, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * dim, dim), nn.Dropout(0.0)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        pt, ph, pw = (-n % p for n, p in zip(x.shape[2:], self.patch, strict=True))
        return self.norm(self.proj(F.pad(x, (0, pw, 0, ph, 0, pt))).permute(0, 2, 3, 4, 1))


class PatchMerging(nn.Module):
    """Four neighbours of a frame into one token of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-3:-1]
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        near = [x[..., h::2, w::2, :] for w in (0, 1) for h in (0, 1)]
        return self.reduction(self.norm(torch.cat(near, -1)))


class SwinTransformer3d(nn.Module):
    def __init__(
        self, block: BlockOf, dim: int, depths: Sequence[int], heads: Sequence[int], window: Sequence[int],
        classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = PatchEmbed(dim, (2, 4, 4))
        features: list[nn.Module] = []
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            if stage:
                features.append(PatchMerging(dim << (stage - 1)))
            shifts = ([0, 0, 0], [n // 2 for n in window])
            blocks = [
                block(dim << stage, count, window, shifts[number % 2]) for number in range(depth)
            ]
            features.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*features)
        last = dim << (len(depths) - 1)
        self.norm = nn.LayerNorm(last)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` -> ``[B, classes]``."""
        return self.head(self.norm(self.features(self.patch_embed(x))).mean((1, 2, 3)))


def build(
    kind: str, *, width: int = 96, classes: int = 400, backend: str | None = None
) -> SwinTransformer3d:
    """Swin3D-T.

    Args:
        kind: ``"torch"``: stock attention in :class:`Block`; ``"sora"``: ours, with ``backend``.
        width: channels of the first stage, a multiple of 3.
    """
    block: BlockOf = Block if kind == "torch" else functools.partial(_ours, backend=backend)
    heads = (3, 6, 12, 24)
    return SwinTransformer3d(block, width, (2, 2, 6, 2), heads, (8, 7, 7), classes)


def _ours(
    dim: int, heads: int, window: Sequence[int], shift: Sequence[int], *, backend: str | None
) -> nn.Module:
    return sk.nn.SwinBlock3d(dim, heads, window, shift, backend=backend)
