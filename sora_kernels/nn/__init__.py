"""Drop-in modules, one file an operator."""

from .conv import ConvBNAct3d
from .lstm import LSTM

__all__ = ["LSTM", "ConvBNAct3d"]
