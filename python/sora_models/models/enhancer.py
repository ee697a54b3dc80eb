"""The Sora model as a video enhancer: convolutions, a recurrence over time, convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_models.models._base import SoraModel, check_clip
from sora_models.models._config import Config

_PIXEL_CELLS = {"pixel_lstm": "LSTM", "pixel_gru": "GRU"}


@dataclass(frozen=True)
class EnhancerConfig(Config):
    """Config of :class:`Enhancer`.

    Attributes:
        in_channels: channels of a frame.
        channels: widths of the per-frame 3x3 convolutions.
        cell: ``"pixel_lstm"`` or ``"pixel_gru"`` (one sequence a pixel, weights shared over
            pixels), or ``"conv_lstm"`` (gates by 3x3 convolutions).
        hidden_size: width of the recurrence.
        num_layers: stacked pixel recurrences; ``"conv_lstm"`` has one.
        stack: widths of the 3x3x3 convolutions after the recurrence.
        num_classes: width of the class output; 0 leaves the head out.
        num_targets: width of the regression output; 0 leaves the head out.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (16, 32)
    cell: str = "pixel_lstm"
    hidden_size: int = 32
    num_layers: int = 1
    stack: tuple[int, ...] = (32, 32)
    num_classes: int = 10
    num_targets: int = 1

    def validate(self) -> None:
        self._int("in_channels", "hidden_size", "num_layers")
        self._int("num_classes", "num_targets", least=0)
        self._ints("channels")
        self._ints("stack")
        self._choice("cell", (*_PIXEL_CELLS, "conv_lstm"))
        if self.cell == "conv_lstm" and self.num_layers != 1:
            self._reject("num_layers", "1 for cell='conv_lstm'")


class EnhancerOutput(NamedTuple):
    """enhanced [B, in_channels, T, H, W]; logits [B, num_classes], values [B, num_targets] or
    None."""

    enhanced: Tensor
    logits: Tensor | None
    values: Tensor | None


class PixelRecurrence(nn.Module):
    """A recurrent layer along time at every pixel, [B, C, T, H, W] -> [B, hidden_size, T, H, W]."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        rows = x.permute(2, 0, 3, 4, 1).reshape(t, b * h * w, c)  # time first: no kernel turns it
        y = self.rnn(rows)[0]
        return y.view(t, b, h, w, y.shape[-1]).permute(1, 4, 0, 2, 3)


class ConvLSTM(nn.Module):
    """An LSTM over time whose gates are 3x3 convolutions of the frame and of the hidden map.

    Shapes: [B, C, T, H, W] -> [B, hidden_size, T, H, W]. Gates stand in torch's order i, f, g, o.
    The frames' share of the gates is one convolution over the whole clip.

    Source: Shi et al., "Convolutional LSTM Network", 2015, without peepholes.
    """

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.conv_ih = nn.Conv3d(in_channels, 4 * hidden_size, (1, 3, 3), padding=(0, 1, 1))
        self.conv_hh = nn.Conv2d(hidden_size, 4 * hidden_size, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gates_x = self.conv_ih(x)
        b, _, _, height, width = x.shape
        h = c = x.new_zeros(b, self.hidden_size, height, width)
        steps = []
        for gate_x in gates_x.unbind(2):
            i, f, g, o = (gate_x + self.conv_hh(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        return torch.stack(steps, 2)


class Enhancer(SoraModel):
    """Per-frame CNN -> recurrence over time -> conv stack -> enhanced frames = clip + residual.

    Shapes: clip [B, in_channels, T, H, W], any T, H, W of at least 1 -> :class:`EnhancerOutput`.
    The enhanced frames have the clip's size and are not clamped.

    Source: the article "Sora模型的视频数据处理步骤". Repairs:

    * it hands feature maps to a recurrent layer that takes vectors: time runs as one sequence a
      pixel with shared weights, or through the recurrent convolution that its text names
      (``cell="conv_lstm"``);
    * it pools between the recurrence and the output, which cannot return frames: pooling is in the
      class and regression heads only, and the frames are the clip plus a predicted residual.

    Layers: ``ConvBNAct3d``; ``LSTM`` for ``cell="pixel_lstm"``, ``GRU`` for ``cell="pixel_gru"``.
    """

    name = "enhancer"
    config_class = EnhancerConfig
    config: EnhancerConfig

    def __init__(self, config: EnhancerConfig, layers: ModuleType) -> None:
        super().__init__(config, layers)
        self.config = config
        self.cnn = nn.Sequential(
            *(
                layers.ConvBNAct3d(a, b, (1, 3, 3), padding=(0, 1, 1), bias=False)
                for a, b in pairwise((config.in_channels, *config.channels))
            )
        )
        width, hidden = config.channels[-1], config.hidden_size
        if config.cell in _PIXEL_CELLS:
            cell = getattr(layers, _PIXEL_CELLS[config.cell])
            self.recurrence: nn.Module = PixelRecurrence(cell(width, hidden, config.num_layers))
        else:
            self.recurrence = ConvLSTM(width, hidden)
        self.stack = nn.Sequential(
            *(
                layers.ConvBNAct3d(a, b, 3, padding=1, bias=False)
                for a, b in pairwise((hidden, *config.stack))
            )
        )
        self.residual = nn.Conv3d(config.stack[-1], config.in_channels, 3, padding=1)
        heads = config.num_classes, config.num_targets
        self.classifier, self.regressor = (
            nn.Linear(config.stack[-1], n) if n else None for n in heads
        )

    @classmethod
    def layers_used(cls, config: Config) -> tuple[str, ...]:
        assert isinstance(config, EnhancerConfig)
        cell = _PIXEL_CELLS.get(config.cell)
        return ("ConvBNAct3d", cell) if cell else ("ConvBNAct3d",)

    def features(self, clip: Tensor) -> Tensor:
        """The conv stack's map, [B, stack[-1], T, H, W]."""
        check_clip(clip, self.config.in_channels)
        return self.stack(self.recurrence(self.cnn(clip)))

    def forward(self, clip: Tensor) -> EnhancerOutput:
        features = self.features(clip)
        pooled = features.mean((2, 3, 4))
        return EnhancerOutput(
            clip + self.residual(features),
            self.classifier(pooled) if self.classifier is not None else None,
            self.regressor(pooled) if self.regressor is not None else None,
        )

    def loss(
        self, clip: Tensor, target: Tensor, labels: Tensor | None = None, *,
        class_weight: float = 0.1,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Mean squared error against the clean frames ``target``, plus the classes' cross-entropy.

        ``target`` has the clip's shape, ``labels`` is int64 [B]. Returns scalars ``enhancement``,
        ``classification`` (with labels) and their weighted sum ``total``.
        """
        out = self(clip)
        if target.shape != clip.shape:
            raise ValueError(f"target: expected {list(clip.shape)}; got {list(target.shape)}")
        losses = {"enhancement": F.mse_loss(out.enhanced, target)}
        total = losses["enhancement"]
        if labels is not None:
            if out.logits is None:
                raise ValueError("labels: expected None, the model has no classes; got labels")
            losses["classification"] = F.cross_entropy(out.logits, labels)
            total = total + class_weight * losses["classification"]
        return losses | {"total": total}
