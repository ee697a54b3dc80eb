"""Drop-in modules, one file an operator."""

from .conv import ConvBNAct3d

__all__ = ["ConvBNAct3d"]
