"""Modules of an operator that importing the library does not wait for."""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Names of a module that is imported by the first call: Triton takes a tenth of a second, numpy not much less.

    Args:
        name, package: as :func:`importlib.import_module`'s.
    """

    def __init__(self, name: str, package: str | None) -> None:
        self._name, self._package = name, package

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name, self._package), name)
