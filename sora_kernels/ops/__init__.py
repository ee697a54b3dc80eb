"""One folder an operator; importing this package registers them."""

from .conv3d_bn_act import conv3d_act, conv3d_bn_act, conv_transpose3d_bn_act
from .lstm import gru, lstm, rnn
from .neighborhood_attention import neighborhood_attention3d
from .pyramid_pool import pyramid_pool3d
from .window_attention import window_attention3d

__all__ = [
    "conv3d_act",
    "conv3d_bn_act",
    "conv_transpose3d_bn_act",
    "gru",
    "lstm",
    "neighborhood_attention3d",
    "pyramid_pool3d",
    "rnn",
    "window_attention3d",
]
