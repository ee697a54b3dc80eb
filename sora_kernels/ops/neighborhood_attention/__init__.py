"""Sliding windows over a video map: see README.md in this folder."""

from .op import neighborhood_attention3d

__all__ = ["neighborhood_attention3d"]
