"""Drop-in modules, one file an operator."""

from .conv import ConvAct3d, ConvBNAct3d
from .conv_causal import CausalConvBNAct3d
from .conv_transpose import ConvTransposeBNAct3d
from .gru import GRU
from .lstm import LSTM
from .neighborhood_attention import NeighborhoodAttention3d
from .pyramid_pool import PyramidPool3d
from .rnn import RNN
from .window_attention import ShiftedWindowAttention3d, SwinBlock3d, WindowAttention3d

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CausalConvBNAct3d",
    "ConvAct3d",
    "ConvBNAct3d",
    "ConvTransposeBNAct3d",
    "NeighborhoodAttention3d",
    "PyramidPool3d",
    "ShiftedWindowAttention3d",
    "SwinBlock3d",
    "WindowAttention3d",
]
