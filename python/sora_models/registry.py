"""Models by name: build, list, load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_models import layers as layer_builds
from sora_models.models import (
    CRNN,
    VAEGAN,
    Autoencoder,
    Enhancer,
    PyramidTransformer,
    SoraModel,
)
from sora_models.models._base import CONFIG_FILE, WEIGHTS_FILE, safetensors

_MODELS: dict[str, type[SoraModel]] = {
    model.name: model for model in (CRNN, VAEGAN, PyramidTransformer, Enhancer, Autoencoder)
}


def list_models() -> list[str]:
    """The names that :func:`build` takes."""
    return list(_MODELS)


def model_class(name: str) -> type[SoraModel]:
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(_MODELS)}; got {name!r}")
    return _MODELS[name]


def build(name: str, backend: str = "sora", **config: Any) -> SoraModel:
    """A model with fresh weights.

    Args:
        name: one of :func:`list_models`.
        backend: ``"sora"`` for the custom kernels, ``"torch"`` for plain PyTorch. Both have the
            same state_dict keys and, with the same weights, the same numbers.
        config: fields of the model's config, e.g. ``num_classes=51``.

    Raises:
        ValueError: unknown name, backend or field, or a bad value; the message names it.
        NotImplementedError: the backend lacks a layer that the model needs.
    """
    model = model_class(name)
    return model(model.config_class.from_dict(config), layer_builds.load(backend))


def from_pretrained(path: str | Path, backend: str = "sora") -> SoraModel:
    """The model that ``model.save_pretrained(path)`` wrote, in eval mode, on the CPU.

    Either backend reads what the other wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ``config.json`` is not a Sora model's.
        RuntimeError: the weights do not fit the config.
        ImportError: safetensors is not installed.
    """
    load_file = safetensors().load_file
    folder = Path(path)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: expected a folder with {file}; it is not there")
    try:
        document = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        name, config = document["model"], dict(document["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{folder / CONFIG_FILE}: expected JSON {{"model": name, "config": fields}}; {error!r}'
        ) from error
    model = build(name, backend, **config)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()


def parameter_count(model: nn.Module | str, **config: Any) -> int:
    """Number of parameters of a model, or of the model of that name and config (not filled)."""
    if isinstance(model, str):
        with torch.device("meta"):
            model = build(model, "torch", **config)
    return sum(p.numel() for p in model.parameters())
