"""Windowed attention over video maps: see README.md in this folder."""

from .op import window_attention3d

__all__ = ["window_attention3d"]
