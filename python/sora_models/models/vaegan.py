"""The Sora model as a variational autoencoder with an adversarial critic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_models.models._base import SoraModel, check_clip
from sora_models.models._config import Config

COMPRESSION = 48


@dataclass(frozen=True)
class VAEGANConfig(Config):
    """Config of :class:`VAEGAN`.

    Attributes:
        in_channels: channels of a frame.
        channels: widths of the encoder's stages; every stage halves height and width.
        time_strides: 1 or 2 for each stage.
        latent_channels: channels of the latent map; at most in_channels * stride / 48, where
            stride is the product of all strides, so that the latent has at most 1/48 of the clip's
            elements.
        critic_channels: widths of the discriminator's strided convolutions.
        critic_levels: pyramid levels that pool their map to a vector.
        critic_hidden: width of the discriminator's fully connected layers.
        num_classes: classes of the discriminator, the classifier and the detector.
        kl_weight, adversarial_weight, class_weight: of the losses, in units of the mean squared
            error.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (32, 64, 128)
    time_strides: tuple[int, ...] = (1, 2, 2)
    latent_channels: int = 16
    critic_channels: tuple[int, ...] = (32, 64)
    critic_levels: tuple[int, ...] = (1, 2)
    critic_hidden: int = 256
    num_classes: int = 10
    kl_weight: float = 1e-3
    adversarial_weight: float = 1e-2
    class_weight: float = 1e-1

    def validate(self) -> None:
        self._int("in_channels", "latent_channels", "critic_hidden", "num_classes")
        self._ints("channels")
        self._ints("time_strides", length=len(self.channels))
        self._ints("critic_channels")
        self._ints("critic_levels")
        self._number("kl_weight")
        self._number("adversarial_weight")
        self._number("class_weight")
        if any(stride > 2 for stride in self.time_strides):
            self._reject("time_strides", "1 or 2 for each stage")
        most = self.in_channels * math.prod(self.stride) // COMPRESSION
        if self.latent_channels > most:
            self._reject(
                "latent_channels",
                f"at most {most}, which is 1/{COMPRESSION} of the clip at stride {self.stride}",
            )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Clip positions for each latent position, (t, h, w)."""
        space = 2 ** len(self.channels)
        return math.prod(self.time_strides), space, space


class VAEGANOutput(NamedTuple):
    """reconstruction [B, in_channels, T, H, W]; mu, logvar [B, latent_channels, t, h, w]; logits
    [B, num_classes]."""

    reconstruction: Tensor
    mu: Tensor
    logvar: Tensor
    logits: Tensor


class Detections(NamedTuple):
    """One candidate for each latent position: objectness logit [B, t, h, w]; box [B, t, h, w, 4]
    as (centre x, centre y, width, height) in fractions of the frame; class logits [B, t, h, w,
    num_classes].
    """

    objectness: Tensor
    boxes: Tensor
    logits: Tensor


class Discriminator(nn.Module):
    """Strided convolutions, a pyramid pool to one vector, fully connected layers, two outputs.

    Shapes: clip [B, in_channels, T, H, W] -> real/fake logit [B], class logits [B, num_classes].
    """

    def __init__(self, config: VAEGANConfig, layers: ModuleType) -> None:
        super().__init__()
        widths = (config.in_channels, *config.critic_channels)
        self.stem = nn.Sequential(
            *(
                layers.ConvBNAct3d(
                    a, b, 3, stride=2, padding=1, bias=False,
                    activation="leaky_relu", negative_slope=0.2,
                )
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )  # fmt: skip
        self.pool = layers.PyramidPool3d(config.critic_levels, mode="avg")
        bins = sum(level**3 for level in config.critic_levels)
        self.fc = nn.Sequential(
            nn.Linear(widths[-1] * bins, config.critic_hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(config.critic_hidden, config.critic_hidden),
            nn.LeakyReLU(0.2),
        )
        self.real = nn.Linear(config.critic_hidden, 1)
        self.classes = nn.Linear(config.critic_hidden, config.num_classes)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        features = self.fc(self.pool(self.stem(clip)))
        return self.real(features).squeeze(-1), self.classes(features)


class VAEGAN(SoraModel):
    """Conv encoder -> mu, logvar -> transposed-conv decoder, with a discriminator and two heads.

    The encoder's stages have even kernels, so that each halves a size rounding down and still
    reads every position; the decoder's transposed convolutions undo that to the exact size, odd
    ones too (their output padding is 0 or 1). So any clip comes back in its own size, and the
    latent map never has more than 1/48 of the clip's elements. A clip smaller than one stride (4
    frames, 8 x 8 pixels by default) is first extended to it by repeating its edge, and the result
    is cropped; the bound then counts the extended clip.

    Shapes: clip [B, in_channels, T, H, W], values in [0, 1] -> :class:`VAEGANOutput`, whose
    reconstruction is in (0, 1). In training the latent is drawn, in eval it is mu.

    Source: the article "《Sora模型的视频数据表征技术》" (encoder, decoder and discriminator for
    classification, detection and generation). It gives no code. Repairs:

    * its discriminator is fully connected layers, which would fix the clip's size: two strided
      convolutions and a pyramid pool turn any clip into a fixed vector in front of them;
    * it names no latent shape: a map at 1/4 of the frames and 1/8 of each side, 16 channels;
    * it names no heads for classification and detection: a linear layer on the pooled latent, and
      one box a latent position from the encoder's map.

    Layers: ``ConvBNAct3d``, ``ConvTransposeBNAct3d``, ``PyramidPool3d``.
    """

    name = "vaegan"
    config_class = VAEGANConfig
    config: VAEGANConfig

    def __init__(self, config: VAEGANConfig, layers: ModuleType) -> None:
        super().__init__(config, layers)
        self.config = config
        widths = (config.in_channels, *config.channels)
        geometry = [
            {"kernel_size": (s + 2, 4, 4), "stride": (s, 2, 2), "padding": 1, "bias": False}
            for s in config.time_strides
        ]
        self.encoder = nn.Sequential(
            *(
                layers.ConvBNAct3d(a, b, **g)
                for a, b, g in zip(widths, widths[1:], geometry, strict=False)
            )
        )
        top, latent = widths[-1], config.latent_channels
        self.mu, self.logvar = nn.Conv3d(top, latent, 1), nn.Conv3d(top, latent, 1)

        back = (*reversed(config.channels), config.channels[0])
        self.decoder_in = layers.ConvBNAct3d(latent, top, 3, padding=1, bias=False)
        self.decoder = nn.ModuleList(
            layers.ConvTransposeBNAct3d(a, b, **g)
            for a, b, g in zip(back, back[1:], reversed(geometry), strict=False)
        )
        self.to_frames = nn.Conv3d(back[-1], config.in_channels, 3, padding=1)

        self.pool = layers.PyramidPool3d((1, 2), mode="avg")
        self.classifier = nn.Linear(latent * 9, config.num_classes)
        self.detector = nn.Sequential(
            layers.ConvBNAct3d(top, top, 3, padding=1, bias=False),
            nn.Conv3d(top, 5 + config.num_classes, 1),
        )
        self.discriminator = Discriminator(config, layers)

    @classmethod
    def layers_used(cls, config: Config) -> tuple[str, ...]:
        return "ConvBNAct3d", "ConvTransposeBNAct3d", "PyramidPool3d"

    def features(self, clip: Tensor) -> Tensor:
        """The encoder's map, [B, channels[-1], t, h, w]."""
        check_clip(clip, self.config.in_channels)
        pads = [max(0, s - n) for s, n in zip(self.config.stride, clip.shape[2:], strict=True)]
        if any(pads):
            clip = F.pad(clip, (0, pads[2], 0, pads[1], 0, pads[0]), mode="replicate")
        return self.encoder(clip)

    def encode(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, each [B, latent_channels, t, h, w]."""
        features = self.features(clip)
        return self.mu(features), self.logvar(features).clamp(-30, 20)

    def decode(self, latent: Tensor, size: Sequence[int]) -> Tensor:
        """Frames [B, in_channels, *size] in (0, 1) from a latent map made for ``size``."""
        sizes = self._sizes(size)
        expected = (self.config.latent_channels, *sizes[-1])
        if latent.dim() != 5 or latent.shape[1:] != expected:
            raise ValueError(
                f"latent: expected [B, {', '.join(map(str, expected))}] for size {tuple(size)}; "
                f"got {list(latent.shape)}"
            )
        y = self.decoder_in(latent)
        for stage, stage_size in zip(self.decoder, reversed(sizes[:-1]), strict=True):
            y = stage(y, output_size=stage_size)
        t, h, w = size
        return self.to_frames(y).sigmoid()[:, :, :t, :h, :w]

    def forward(self, clip: Tensor) -> VAEGANOutput:
        mu, logvar = self.encode(clip)
        latent = draw(mu, logvar) if self.training else mu
        return VAEGANOutput(self.decode(latent, clip.shape[2:]), mu, logvar, self.classify(mu))

    def classify(self, mu: Tensor) -> Tensor:
        """Class logits [B, num_classes] from the latent."""
        return self.classifier(self.pool(mu))

    def detect(self, clip: Tensor) -> Detections:
        """One candidate box for each latent position. Train it with a loss of your own."""
        out = self.detector(self.features(clip)).movedim(1, -1)
        grid_h, grid_w = out.shape[2:4]
        y = torch.arange(grid_h, device=out.device, dtype=out.dtype).view(-1, 1, 1)
        x = torch.arange(grid_w, device=out.device, dtype=out.dtype).view(-1, 1)
        cells = torch.cat([x.expand(grid_h, -1, 1), y.expand(-1, grid_w, 1)], -1)
        centre = (cells + out[..., 1:3].sigmoid()) / out.new_tensor([grid_w, grid_h])
        boxes = torch.cat([centre, out[..., 3:5].sigmoid()], -1)
        return Detections(out[..., 0], boxes, out[..., 5:])

    @torch.no_grad()
    def sample(
        self, count: int, size: Sequence[int], *, generator: torch.Generator | None = None
    ) -> Tensor:
        """New clips [count, in_channels, *size] from latents drawn from the standard normal."""
        shape = (count, self.config.latent_channels, *self._sizes(size)[-1])
        weight = self.mu.weight
        latent = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        return self.decode(latent, size)

    def generator_loss(self, clip: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of encoder, decoder and classifier; the discriminator gets no gradient from them.

        ``labels`` is int64 [B]. Returns scalars ``reconstruction`` (mean squared error), ``kl``
        (for each element of the clip), ``adversarial``, ``classification`` (with labels), their
        weighted sum ``total``.
        """
        out = self(clip)
        with frozen(self.discriminator):
            real, _ = self.discriminator(out.reconstruction)
        kl = 0.5 * (out.mu.square() + out.logvar.exp() - 1 - out.logvar).sum() / clip.numel()
        losses = {
            "reconstruction": F.mse_loss(out.reconstruction, clip),
            "kl": kl,
            "adversarial": F.binary_cross_entropy_with_logits(real, torch.ones_like(real)),
        }
        total = (
            losses["reconstruction"]
            + self.config.kl_weight * kl
            + self.config.adversarial_weight * losses["adversarial"]
        )
        if labels is not None:
            losses["classification"] = F.cross_entropy(out.logits, labels)
            total = total + self.config.class_weight * losses["classification"]
        return losses | {"total": total}

    def discriminator_loss(self, clip: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of the discriminator; the rest of the model gets no gradient from them.

        Returns scalars ``real``, ``fake``, ``classification`` (with labels, on the real clips) and
        their sum ``total``.
        """
        with torch.no_grad():
            fake_clip = self(clip).reconstruction
        real, classes = self.discriminator(clip)
        fake, _ = self.discriminator(fake_clip)
        losses = {
            "real": F.binary_cross_entropy_with_logits(real, torch.ones_like(real)),
            "fake": F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)),
        }
        if labels is not None:
            losses["classification"] = F.cross_entropy(classes, labels)
        return losses | {"total": torch.stack(list(losses.values())).sum()}

    def _sizes(self, size: Sequence[int]) -> list[tuple[int, int, int]]:
        """The map's size before each encoder stage and after the last, of the extended clip."""
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"size: expected (T, H, W) of at least 1; got {tuple(size)}")
        t, h, w = (max(n, s) for n, s in zip(size, self.config.stride, strict=True))
        sizes = [(t, h, w)]
        for stride in self.config.time_strides:
            t, h, w = t // stride, h // 2, w // 2
            sizes.append((t, h, w))
        return sizes


def draw(mu: Tensor, logvar: Tensor) -> Tensor:
    """A sample of the normal distribution, differentiable in both arguments."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters take no part in gradients."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
