"""The two builds of every layer: ``"sora"`` (custom kernels) and ``"torch"`` (plain PyTorch)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

BACKENDS = ("sora", "torch")


def load(backend: str) -> ModuleType:
    """The module that holds the layers of a backend, ``"sora"`` or ``"torch"``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}; got {backend!r}")
    return import_module(f"sora_models.layers.{backend}")


def missing(layers: ModuleType, names: Iterable[str]) -> list[str]:
    """Those of the layer names that this build lacks, in order, each once."""
    return [name for name in dict.fromkeys(names) if not hasattr(layers, name)]
