"""Spatio-temporal pyramid pooling: see README.md in this folder."""

from .op import pyramid_pool3d

__all__ = ["pyramid_pool3d"]
