"""``ConvBNAct3d`` and ``ConvAct3d``: Conv3d, BatchNorm3d, an optional residual and the activation as one module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.conv3d_bn_act import conv3d_act, conv3d_bn_act
from ._conv import (
    ActivatedConv,
    are_pairs,
    batch_norm,
    check_modules,
    check_padding_mode,
    held,
    padding_of,
)

Ints = int | tuple[int, int, int]


class ConvBNAct3d(ActivatedConv):
    """``activation(bn(conv(x)) + residual)`` through :func:`sora_kernels.conv3d_bn_act`.

    The children ``conv`` (``nn.Conv3d``) and ``bn`` (``nn.BatchNorm3d``) own every parameter and buffer, so that the
    state dict is that of the two modules. They are never called: their hooks do not run. Where
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` has put its module for ``bn``, the ranks of its group share statistics.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            ``nn.Conv3d``; ``padding_mode`` "zeros" or "replicate", ``padding`` also "same", "valid" and
            ((t0, t1), (h0, h1), (w0, w1)).
        activation: "relu", "silu", "leaky_relu" (with ``negative_slope``) or None.
        eps, momentum, affine, track_running_stats: as ``nn.BatchNorm3d``; momentum None averages all batches.
        backend: as :func:`sora_kernels.conv3d_bn_act`.

    Shape:
        x ``[N, C, T, H, W]``, residual ``[N, K, T', H', W']`` or None -> ``[N, K, T', H', W']``.

    Equivalent to::

        nn.Sequential(nn.Conv3d(...), nn.BatchNorm3d(out_channels), nn.ReLU())
    """

    conv: nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Any = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv, self.padding = _conv(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self._set(conv, activation, negative_slope, backend)
        self.bn: nn.BatchNorm3d | nn.SyncBatchNorm = nn.BatchNorm3d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv3d,
        bn: nn.BatchNorm3d | nn.SyncBatchNorm,
        act: nn.Module | None = None,
        *,
        backend: str | None = None,
    ) -> ConvBNAct3d:
        """The same computation over the same Parameter and buffer objects.

        Args:
            conv, bn: become the children; their training flags and parameters stay theirs.
            act: ``nn.ReLU``, ``nn.SiLU``, ``nn.LeakyReLU``, ``nn.Identity`` or None.
        """
        check_modules(conv, nn.Conv3d, bn)
        module = cls._over(conv, act, backend)
        module.bn, module.padding = bn, padding_of(conv)
        return module.train(bn.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._run(x, residual, self.padding)

    def _run(self, x: Tensor, residual: Tensor | None, padding: Any) -> Tensor:
        conv = held(self, "conv")
        return conv3d_bn_act(
            x,
            held(conv, "weight"),
            bias=held(conv, "bias"),
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            stride=conv.stride,
            padding=padding,
            padding_mode=conv.padding_mode,
            dilation=conv.dilation,
            groups=conv.groups,
            backend=self.backend,
            **batch_norm(held(self, "bn")),
        )


class ConvAct3d(ActivatedConv):
    """``activation(conv(x) + residual)`` through :func:`sora_kernels.conv3d_act`: no normalisation.

    The child ``conv`` (``nn.Conv3d``) owns the parameters and is never called. The arguments and shapes are those of
    :class:`ConvBNAct3d`.
    """

    conv: nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Any = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv, self.padding = _conv(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self._set(conv, activation, negative_slope, backend)

    @classmethod
    def from_modules(
        cls, conv: nn.Conv3d, act: nn.Module | None = None, *, backend: str | None = None
    ) -> ConvAct3d:
        """The same computation over the same Parameter objects, as :meth:`ConvBNAct3d.from_modules`."""
        check_modules(conv, nn.Conv3d, None)
        module = cls._over(conv, act, backend)
        module.padding = padding_of(conv)
        return module.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = held(self, "conv")
        return conv3d_act(
            x,
            held(conv, "weight"),
            held(conv, "bias"),
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            stride=conv.stride,
            padding=self.padding,
            padding_mode=conv.padding_mode,
            dilation=conv.dilation,
            groups=conv.groups,
            backend=self.backend,
        )


def _conv(
    in_channels: int, out_channels: int, kernel_size: Ints, stride: Ints, padding: Any, dilation: Ints,
    groups: int, bias: bool, padding_mode: str, device: Any, dtype: torch.dtype | None,
) -> tuple[nn.Conv3d, Any]:  # fmt: skip
    """The child, and the padding as the operator takes it."""
    check_padding_mode("padding_mode: expected ", padding_mode)
    pairs = are_pairs(padding)
    conv = nn.Conv3d(
        in_channels, out_channels, kernel_size, stride, 0 if pairs else padding, dilation, groups, bias,
        cast(Any, padding_mode), device=device, dtype=dtype,
    )  # fmt: skip
    return conv, tuple(map(tuple, padding)) if pairs else padding_of(conv)
