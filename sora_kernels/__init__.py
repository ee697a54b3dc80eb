"""sora_kernels: custom kernels for video models in PyTorch, forward and backward.

Importing touches no device, loads no extension and no Triton: kernels are imported by their first call.
"""

from __future__ import annotations

from . import nn
from ._dispatch import BackendError, explain
from ._native import build_info
from ._version import __version__
from .adopt import save_memory
from .ops import (
    conv3d_act,
    conv3d_bn_act,
    conv_transpose3d_bn_act,
    gru,
    lstm,
    neighborhood_attention3d,
    pyramid_pool3d,
    rnn,
    window_attention3d,
)

__all__ = [
    "BackendError",
    "__version__",
    "build_info",
    "conv3d_act",
    "conv3d_bn_act",
    "conv_transpose3d_bn_act",
    "explain",
    "gru",
    "lstm",
    "neighborhood_attention3d",
    "nn",
    "pyramid_pool3d",
    "rnn",
    "save_memory",
    "window_attention3d",
]
