"""Drop-in modules, one file an operator."""

from .conv import ConvBNAct3d
from .gru import GRU
from .lstm import LSTM
from .rnn import RNN

__all__ = ["GRU", "LSTM", "RNN", "ConvBNAct3d"]
