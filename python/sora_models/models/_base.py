"""What the five models share: the layers check, the input check, saving."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from sora_models import layers as layer_builds
from sora_models._extras import require
from sora_models.models._config import Config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class SoraModel(nn.Module):
    """Base class. A model is written once against ``layers``, a module from ``layers.load``.

    Both builds of a model have the same parameter and buffer names, so a ``state_dict`` of one
    loads into the other.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Config]]

    def __init__(self, config: Config, layers: ModuleType) -> None:
        super().__init__()
        absent = layer_builds.missing(layers, self.layers_used(config))
        if absent:
            have = [
                backend
                for backend in layer_builds.BACKENDS
                if not layer_builds.missing(layer_builds.load(backend), absent)
            ]
            build = layers.__name__.rpartition(".")[2]
            raise NotImplementedError(
                f"{self.name} with this config needs {', '.join(absent)}, which backend {build!r} "
                f"does not have; backends that have it: {', '.join(map(repr, have))}"
            )

    @classmethod
    def layers_used(cls, config: Config) -> tuple[str, ...]:
        """Names of the layers that a model of this config takes from its build."""
        raise NotImplementedError

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes ``config.json`` and ``model.safetensors`` into the folder ``path``.

        The files do not say which build wrote them: either build reads them.

        Raises:
            ImportError: safetensors is not installed.
        """
        save_file = safetensors().save_file
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.contiguous().cpu() for key, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        document = {"model": self.name, "config": self.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return folder

    config: Config


def safetensors() -> ModuleType:
    return require("safetensors.torch", "saving and loading models")


def check_clip(clip: Tensor, channels: int) -> None:
    """Raises ValueError unless ``clip`` is floating point [B, channels, T, H, W], T, H, W >= 1."""
    if not isinstance(clip, Tensor):
        raise TypeError(f"clip: expected a tensor; got {type(clip).__name__}")
    shaped = clip.dim() == 5 and clip.shape[1] == channels and min(clip.shape[2:]) >= 1
    if not shaped or not torch.is_floating_point(clip):
        raise ValueError(
            f"clip: expected floating point [B, {channels}, T, H, W] with T, H, W of at least 1; "
            f"got {clip.dtype} {list(clip.shape)}"
        )
