"""Drop-in modules, one file an operator."""

from .conv import ConvBNAct3d
from .gru import GRU
from .lstm import LSTM
from .pyramid_pool import PyramidPool3d
from .rnn import RNN

__all__ = ["GRU", "LSTM", "RNN", "ConvBNAct3d", "PyramidPool3d"]
