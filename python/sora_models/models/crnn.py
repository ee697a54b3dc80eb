"""The Sora model as a CNN over frames followed by a recurrent network over time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

from torch import Tensor, nn

from sora_models.models._base import SoraModel, check_clip
from sora_models.models._config import Config


@dataclass(frozen=True)
class CRNNConfig(Config):
    """Config of :class:`CRNN`.

    Attributes:
        in_channels: channels of a frame.
        channels: widths of the 3x3 convolutions.
        hidden_size, num_layers: of the recurrent network.
        num_classes: width of the output.
        norm: ``"batch"``, or None for the article's convolutions without normalisation.
        cell: ``"lstm"``, or ``"rnn"`` for the article's vanilla recurrence (tanh).
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (32, 64, 128)
    hidden_size: int = 128
    num_layers: int = 1
    num_classes: int = 10
    norm: str | None = "batch"
    cell: str = "lstm"

    def validate(self) -> None:
        self._int("in_channels", "hidden_size", "num_layers", "num_classes")
        self._ints("channels")
        self._choice("norm", ("batch", None))
        self._choice("cell", ("lstm", "rnn"))


class CRNN(SoraModel):
    """Per-frame CNN -> average over space -> LSTM over frames -> linear layer on the last step.

    Shapes: clip [B, in_channels, T, H, W], values in [0, 1], any T, H, W of at least 1
    -> logits [B, num_classes].

    Source: the article "Sora模型的视频数据表征", the one of that title that chains CNN, RNN and a
    fully connected layer. Repairs:

    * the article hands the CNN's 4-D map to the recurrent layer, which takes a sequence of vectors:
      each frame's map is averaged over space first;
    * its convolutions have no normalisation and train poorly from scratch: BatchNorm follows each
      (``norm=None`` gives the article's);
    * its code uses an LSTM where its text describes a vanilla RNN: both are here, by ``cell``.

    Layers: ``ConvBNAct3d`` (``ConvAct3d`` for ``norm=None``), ``LSTM`` (``RNN`` for
    ``cell="rnn"``). A backend that lacks one of them says so when the model is built.
    """

    name = "crnn"
    config_class = CRNNConfig
    config: CRNNConfig

    def __init__(self, config: CRNNConfig, layers: ModuleType) -> None:
        super().__init__(config, layers)
        self.config = config
        conv = layers.ConvBNAct3d if config.norm else layers.ConvAct3d
        self.cnn = nn.Sequential(
            *(
                conv(a, b, (1, 3, 3), padding=(0, 1, 1), bias=config.norm is None)
                for a, b in pairwise((config.in_channels, *config.channels))
            )
        )
        cell = layers.LSTM if config.cell == "lstm" else layers.RNN
        self.rnn = cell(
            config.channels[-1], config.hidden_size, config.num_layers, batch_first=True
        )
        self.fc = nn.Linear(config.hidden_size, config.num_classes)

    @classmethod
    def layers_used(cls, config: Config) -> tuple[str, ...]:
        assert isinstance(config, CRNNConfig)
        conv = "ConvBNAct3d" if config.norm else "ConvAct3d"
        return conv, "LSTM" if config.cell == "lstm" else "RNN"

    def features(self, clip: Tensor) -> Tensor:
        """The recurrent network's hidden state after each frame, [B, T, hidden_size]."""
        check_clip(clip, self.config.in_channels)
        frames = self.cnn(clip).mean((-2, -1)).transpose(1, 2)
        return self.rnn(frames)[0]

    def forward(self, clip: Tensor) -> Tensor:
        return self.fc(self.features(clip)[:, -1])
