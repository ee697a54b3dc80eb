"""The Sora model as a spatio-temporal convolutional autoencoder with residual blocks."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from sora_models.models._base import SoraModel, check_clip
from sora_models.models._config import Config


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """Config of :class:`Autoencoder`.

    Attributes:
        in_channels: channels of a frame.
        channels: widths at full and at half resolution.
        num_blocks: residual blocks at half resolution.
        latent_size: width of the latent vector.
        num_classes: width of the class output.
    """

    in_channels: int = 3
    channels: tuple[int, int] = (64, 128)
    num_blocks: int = 3
    latent_size: int = 64
    num_classes: int = 10

    def validate(self) -> None:
        self._int("in_channels", "latent_size", "num_classes")
        self._ints("channels", length=2)
        self._int("num_blocks", least=0)


class AutoencoderOutput(NamedTuple):
    """reconstruction [B, in_channels, T, H, W], latent [B, latent_size], logits [B,
    num_classes]."""

    reconstruction: Tensor
    latent: Tensor
    logits: Tensor


class ResidualBlock(nn.Module):
    """``relu(x + bn(conv(relu(bn(conv(x))))))``."""

    def __init__(self, channels: int, layers: ModuleType) -> None:
        super().__init__()
        self.conv1 = layers.ConvBNAct3d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = layers.ConvBNAct3d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), residual=x)


class Autoencoder(SoraModel):
    """Conv encoder -> residual blocks -> transposed-conv decoder -> frames, latent and classes.

    Shapes: clip [B, in_channels, T, H, W], any T, H, W of at least 1 ->
    :class:`AutoencoderOutput`. The stride-2 encoder rounds odd sizes up; the decoder's output is
    cropped back to the clip's size.

    Source: the article "Sora模型的视频数据表征", the one of that title that joins a spatio-temporal
    convolutional network, residual blocks and an autoencoder. Repairs:

    * its list of residual blocks cannot stand inside a Sequential, and the block is never defined:
      here it is the two-convolution block with an identity skip;
    * it normalises after the ReLU; here Conv -> BN -> ReLU. Its transposed convolution has no
      activation, and none is added;
    * it never reconstructs a frame: a 3x3x3 convolution trained by the mean squared error does;
    * its dense layers act at every position of the map: a global average stands before them, and
      the 64-wide layer is the latent;
    * its unpadded convolutions shrink the clip: all are padded here.

    Layers: ``ConvBNAct3d``, ``ConvTransposeBNAct3d``.
    """

    name = "autoencoder"
    config_class = AutoencoderConfig
    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, layers: ModuleType) -> None:
        super().__init__(config, layers)
        self.config = config
        full, half = config.channels
        self.encoder = nn.Sequential(
            layers.ConvBNAct3d(config.in_channels, full, 3, padding=1, bias=False),
            layers.ConvBNAct3d(full, half, 3, stride=2, padding=1, bias=False),
        )
        self.blocks = nn.Sequential(
            *(ResidualBlock(half, layers) for _ in range(config.num_blocks))
        )
        self.up = layers.ConvTransposeBNAct3d(half, full, 2, stride=2, bias=False, activation=None)
        self.refine = layers.ConvBNAct3d(full, full, 3, padding=1, bias=False)
        self.recon = nn.Conv3d(full, config.in_channels, 3, padding=1)
        self.latent = nn.Linear(full, config.latent_size)
        self.classifier = nn.Linear(config.latent_size, config.num_classes)

    @classmethod
    def layers_used(cls, config: Config) -> tuple[str, ...]:
        return "ConvBNAct3d", "ConvTransposeBNAct3d"

    def features(self, clip: Tensor) -> Tensor:
        """The decoder's last map, [B, channels[0], T, H, W]."""
        check_clip(clip, self.config.in_channels)
        t, h, w = clip.shape[2:]
        up = self.up(self.blocks(self.encoder(clip)))
        return self.refine(up[:, :, :t, :h, :w])

    def encode(self, clip: Tensor) -> Tensor:
        """The latent vector of each clip, [B, latent_size], not negative."""
        return self._latent(self.features(clip))

    def forward(self, clip: Tensor) -> AutoencoderOutput:
        features = self.features(clip)
        latent = self._latent(features)
        return AutoencoderOutput(self.recon(features), latent, self.classifier(latent))

    def loss(
        self, clip: Tensor, labels: Tensor | None = None, *, class_weight: float = 0.1
    ) -> dict[str, Tensor]:
        """Mean squared error, plus the cross-entropy of the classes where labels are given.

        ``labels`` is int64 [B]. Returns scalars ``reconstruction``, ``classification`` (with
        labels) and their weighted sum ``total``.
        """
        out = self(clip)
        losses = {"reconstruction": F.mse_loss(out.reconstruction, clip)}
        total = losses["reconstruction"]
        if labels is not None:
            losses["classification"] = F.cross_entropy(out.logits, labels)
            total = total + class_weight * losses["classification"]
        return losses | {"total": total}

    def _latent(self, features: Tensor) -> Tensor:
        return F.relu(self.latent(features.mean((2, 3, 4))))
