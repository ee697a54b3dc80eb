"""The Sora model as a spatio-temporal pyramid of maps read by window attention."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_models.models._base import SoraModel, check_clip
from sora_models.models._config import Config


@dataclass(frozen=True)
class PyramidTransformerConfig(Config):
    """Config of :class:`PyramidTransformer`.

    Attributes:
        in_channels: channels of a frame.
        patch_size: (t, h, w) of the patches that become tokens.
        dim: width of a token.
        scales: spatial bins s of the levels (None, s, s) and (t, s, s).
        times: temporal bins t of the levels (t, s, s).
        pool_mode: ``"max"`` or ``"avg"``.
        depth, num_heads: of the attention blocks, shared by all levels; num_heads divides dim.
        window_size: (t, h, w) of the attention windows; every second block shifts by half of it.
        mlp_ratio: hidden width of a block's MLP, in units of dim.
        hidden_size: width of the clip's representation.
        dropout: in the blocks and before the head.
        num_classes: width of the output.
    """

    in_channels: int = 3
    patch_size: tuple[int, int, int] = (2, 4, 4)
    dim: int = 96
    scales: tuple[int, ...] = (1, 2, 4, 8)
    times: tuple[int, ...] = (1, 2, 4, 8)
    pool_mode: str = "max"
    depth: int = 2
    num_heads: int = 3
    window_size: tuple[int, int, int] = (4, 4, 4)
    mlp_ratio: int = 4
    hidden_size: int = 256
    dropout: float = 0.1
    num_classes: int = 10

    def validate(self) -> None:
        self._int("in_channels", "dim", "depth", "num_heads", "mlp_ratio", "hidden_size")
        self._int("num_classes")
        self._ints("patch_size", length=3)
        self._ints("window_size", length=3)
        self._ints("scales")
        self._ints("times")
        self._choice("pool_mode", ("max", "avg"))
        self._number("dropout", below=1.0)
        if self.dim % self.num_heads:
            self._reject("num_heads", f"a divisor of dim {self.dim}")


class WindowBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, on [B, T, H, W, C]."""

    def __init__(self, config: PyramidTransformerConfig, shifted: bool, layers: ModuleType) -> None:
        super().__init__()
        dim, dropout = config.dim, config.dropout
        shift = tuple(w // 2 if shifted else 0 for w in config.window_size)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = layers.ShiftedWindowAttention3d(
            dim, config.window_size, shift, config.num_heads, dropout=dropout, bias_index="exact"
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_ratio * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(config.mlp_ratio * dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PyramidTransformer(SoraModel):
    """Patches -> pyramid of pooled maps -> shared window attention -> one vector a clip -> classes.

    With 4 scales and 4 times the pyramid has 20 levels: the 4 spatial levels keep time whole, and
    their 4 x 4 product with the temporal levels gives (t, s, s). The blocks run on every level's
    map with the same weights (windows clip to small maps, and the position bias follows the true
    offsets); each map's normalised tokens are averaged, the levels concatenated, and a linear
    layer gives the clip's representation.

    Shapes: clip [B, in_channels, T, H, W], any T, H, W of at least 1 (padded with zeros at the end
    to whole patches) -> logits [B, num_classes].

    Source: the article "Sora模型的视频数据表征", the one of that title built on pyramid pooling
    over space and time and self-attention. Repairs:

    * its attention multiplies query and key element by element: here scaled dot products, inside
      windows so that long clips stay affordable;
    * its pyramid chains convolutions and fixed pools of raw pixels, for one clip size: a patch
      embedding stands first, and the pyramid's bins fit any size;
    * it concatenates maps of different sizes: each is averaged to a vector first.

    Layers: ``PyramidPool3d``, ``ShiftedWindowAttention3d``.
    """

    name = "pyramid_transformer"
    config_class = PyramidTransformerConfig
    config: PyramidTransformerConfig

    def __init__(self, config: PyramidTransformerConfig, layers: ModuleType) -> None:
        super().__init__(config, layers)
        self.config = config
        self.patch_embedding = nn.Conv3d(
            config.in_channels, config.dim, config.patch_size, config.patch_size
        )
        self.patch_norm = nn.LayerNorm(config.dim)
        self.pyramid = layers.PyramidPool3d(
            levels(config), mode=config.pool_mode, output="maps", data_format="NDHWC"
        )
        self.blocks = nn.Sequential(
            *(WindowBlock(config, shifted=i % 2 == 1, layers=layers) for i in range(config.depth))
        )
        self.norm = nn.LayerNorm(config.dim)
        self.fuse = nn.Linear(len(levels(config)) * config.dim, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, config.num_classes)

    @classmethod
    def layers_used(cls, config: Config) -> tuple[str, ...]:
        return "PyramidPool3d", "ShiftedWindowAttention3d"

    def features(self, clip: Tensor) -> Tensor:
        """The representation of each clip, [B, hidden_size]."""
        check_clip(clip, self.config.in_channels)
        patch = self.config.patch_size
        (dt, dh, dw) = (-n % p for n, p in zip(clip.shape[2:], patch, strict=True))
        patches = self.patch_embedding(F.pad(clip, (0, dw, 0, dh, 0, dt)))
        tokens = self.patch_norm(patches.movedim(1, -1))
        maps = [self.norm(self.blocks(level)) for level in self.pyramid(tokens)]
        return self.fuse(torch.cat([level.mean((1, 2, 3)) for level in maps], 1))

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(clip)))


def levels(config: PyramidTransformerConfig) -> list[tuple[int | None, int, int]]:
    """The pyramid's levels: (None, s, s) for each scale, then (t, s, s), scales first."""
    spatial: list[tuple[int | None, int, int]] = [(None, s, s) for s in config.scales]
    return spatial + [(t, s, s) for s in config.scales for t in config.times]
