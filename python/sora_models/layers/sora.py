"""The layers that ``sora_kernels`` offers, under the names of :mod:`sora_models.layers.torch`.

A name that is not here yet makes every model that needs it raise one clear error when it is built.
"""

from __future__ import annotations

from sora_kernels.nn import (
    GRU,
    LSTM,
    RNN,
    ConvAct3d,
    ConvBNAct3d,
    ConvTransposeBNAct3d,
    PyramidPool3d,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConvAct3d",
    "ConvBNAct3d",
    "ConvTransposeBNAct3d",
    "PyramidPool3d",
]
