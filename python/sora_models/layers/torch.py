"""The plain-PyTorch build of every layer that the Sora models use.

This is the baseline that tests and benchmarks compare with: stock modules and stock functions only,
written for clarity, with the constructors and the parameter names of ``sora_kernels.nn``. Nothing
here imports ``sora_kernels``. Video is ``[N, C, T, H, W]`` in the convolutions and the pool, and
``[B, T, H, W, C]`` in the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import GRU, LSTM, RNN

from sora_models.layers._window import ShiftedWindowAttention3d

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

Ints = int | tuple[int, int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Level = int | tuple[int | None, int | None, int | None]

_ACTIVATIONS: dict[str | None, Callable[..., Tensor]] = {
    "relu": lambda x, slope: F.relu(x),
    "silu": lambda x, slope: F.silu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    None: lambda x, slope: x,
}


def _activation(name: str | None, negative_slope: float) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        known = ", ".join(repr(key) for key in _ACTIVATIONS)
        raise ValueError(f"activation: expected one of {known}; got {name!r}")
    return partial(_ACTIVATIONS[name], slope=negative_slope)


class ConvBNAct3d(nn.Module):
    """``activation(bn(conv(x)) + residual)``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: as in ``torch.nn.Conv3d``.
        activation: ``"relu"``, ``"silu"``, ``"leaky_relu"`` or None.
        negative_slope: of the leaky ReLU.
        eps, momentum, affine, track_running_stats: as in ``torch.nn.BatchNorm3d``.

    Shapes: ``x`` [N, in_channels, T, H, W]; ``residual`` and the result [N, out_channels, T', H',
    W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.negative_slope = activation, negative_slope
        self._act = _activation(activation, negative_slope)
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = nn.BatchNorm3d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return self._act(y if residual is None else y + residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class ConvAct3d(nn.Module):
    """``activation(conv(x) + residual)``: :class:`ConvBNAct3d` without the normalisation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.negative_slope = activation, negative_slope
        self._act = _activation(activation, negative_slope)
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self._act(y if residual is None else y + residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class ConvTransposeBNAct3d(nn.Module):
    """``activation(bn(conv_transpose(x)))``.

    The arguments are those of ``torch.nn.ConvTranspose3d``, in its order, then those of
    :class:`ConvBNAct3d`. ``forward(x, output_size=(T, H, W))`` picks the output padding that gives
    this size, as the stock module does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        padding_mode: PaddingMode = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.negative_slope = activation, negative_slope
        self._act = _activation(activation, negative_slope)
        self.conv = nn.ConvTranspose3d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = nn.BatchNorm3d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        size = None if output_size is None else list(output_size)
        return self._act(self.bn(self.conv(x, size)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class PyramidPool3d(nn.Module):
    """Adaptive pools of several levels, side by side.

    Args:
        levels: each an int ``k`` for ``(k, k, k)`` or a tuple ``(t, h, w)`` of bin counts. Bin
            ``i`` of ``o`` over ``n`` elements is ``[floor(i n / o), ceil((i + 1) n / o))``. None
            keeps that axis whole, bin for element, and is for ``output="maps"``.
        mode: ``"max"``, ``"avg"``, or ``"maxavg"`` (the maxima, then the averages, as channels).
        output: ``"flat"`` is ``cat([pool(x, level).flatten(1) for level in levels], 1)`` in
            channels first order for both data formats; ``"maps"`` is the list of the levels' maps.
        data_format: ``"NCDHW"`` or ``"NDHWC"``, of the input and of the maps.

    Shapes: input [N, C, T, H, W] (or [N, T, H, W, C]); flat result [N, C * sum(t * h * w)], twice
    as wide for ``"maxavg"``.
    """

    def __init__(
        self,
        levels: Sequence[Level] = (1, 2, 4),
        *,
        mode: str = "max",
        output: str = "flat",
        data_format: str = "NCDHW",
    ) -> None:
        super().__init__()
        for argument, value, known in (
            ("mode", mode, ("max", "avg", "maxavg")),
            ("output", output, ("flat", "maps")),
            ("data_format", data_format, ("NCDHW", "NDHWC")),
        ):
            if value not in known:
                raise ValueError(f"{argument}: expected one of {known}; got {value!r}")
        self.levels = tuple(_level(level, output) for level in levels)
        if not self.levels:
            raise ValueError("levels: expected at least one level; got none")
        self.mode, self.output, self.data_format = mode, output, data_format

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.dim() != 5:
            raise ValueError(f"x: expected 5 dimensions, {self.data_format}; got {tuple(x.shape)}")
        if self.data_format == "NDHWC":
            x = x.movedim(-1, 1)
        maps = [self._pool(x, level) for level in self.levels]
        if self.output == "flat":
            return torch.cat([m.flatten(1) for m in maps], 1)
        return [m.movedim(1, -1) for m in maps] if self.data_format == "NDHWC" else maps

    def _pool(self, x: Tensor, level: tuple[int | None, int | None, int | None]) -> Tensor:
        t, h, w = (n if o is None else o for n, o in zip(x.shape[2:], level, strict=True))
        parts = []
        if self.mode != "avg":
            parts.append(F.adaptive_max_pool3d(x, (t, h, w)))
        if self.mode != "max":
            parts.append(F.adaptive_avg_pool3d(x, (t, h, w)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def extra_repr(self) -> str:
        return (
            f"levels={self.levels}, mode={self.mode!r}, output={self.output!r}, "
            f"data_format={self.data_format!r}"
        )


def _level(level: Level, output: str) -> tuple[int | None, int | None, int | None]:
    bins = (level, level, level) if isinstance(level, int) else tuple(level)
    if len(bins) != 3 or any(o is not None and o < 1 for o in bins):
        raise ValueError(f"levels: expected positive ints or (t, h, w) tuples; got {level!r}")
    if output == "flat" and None in bins:
        raise ValueError(f"levels: None keeps an axis whole, for output='maps' only; got {level!r}")
    return bins
