"""The demo behind ``sora demo``."""

from __future__ import annotations

from sora_models.demo.run import DemoOptions, run

__all__ = ["DemoOptions", "run"]
