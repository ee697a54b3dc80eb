"""One folder an operator; importing this package registers them."""

from .conv3d_bn_act import conv3d_bn_act
from .lstm import gru, lstm, rnn

__all__ = ["conv3d_bn_act", "gru", "lstm", "rnn"]
