"""Packages that only some commands need, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Imports ``module``; raises ImportError that names the extra which brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {package}: pip install 'sora_kernels[models]' ({error})"
        ) from error
