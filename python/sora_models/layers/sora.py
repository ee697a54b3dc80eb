"""The layers that ``sora_kernels`` offers, under the names of :mod:`sora_models.layers.torch`."""

from __future__ import annotations

from sora_kernels.nn import (
    GRU,
    LSTM,
    RNN,
    ConvAct3d,
    ConvBNAct3d,
    ConvTransposeBNAct3d,
    PyramidPool3d,
    ShiftedWindowAttention3d,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConvAct3d",
    "ConvBNAct3d",
    "ConvTransposeBNAct3d",
    "PyramidPool3d",
    "ShiftedWindowAttention3d",
]
