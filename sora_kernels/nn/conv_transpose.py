"""``ConvTransposeBNAct3d``: ConvTranspose3d, BatchNorm3d, an optional residual and the activation as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.conv3d_bn_act import conv_transpose3d_bn_act
from ._conv import ActivatedConv, batch_norm, check_modules

Ints = int | tuple[int, int, int]


class ConvTransposeBNAct3d(ActivatedConv):
    """``activation(bn(conv_transpose(x)) + residual)`` through :func:`sora_kernels.conv_transpose3d_bn_act`.

    The children ``conv`` (``nn.ConvTranspose3d``) and ``bn`` own every parameter and buffer and are never called, as in
    :class:`ConvBNAct3d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as
            ``nn.ConvTranspose3d``, in its order.
        activation, negative_slope, eps, momentum, affine, track_running_stats, backend: as :class:`ConvBNAct3d`.

    Shape:
        x ``[N, C, T, H, W]`` -> ``[N, K, T', H', W']``; ``output_size`` (T', H', W') picks the output padding that
        gives this size, as the stock module does.
    """

    conv: nn.ConvTranspose3d

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
        conv = nn.ConvTranspose3d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            cast(Any, padding_mode), device=device, dtype=dtype,
        )  # fmt: skip
        self._set(conv, activation, negative_slope, backend)
        self.bn: nn.BatchNorm3d | nn.SyncBatchNorm = nn.BatchNorm3d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    @classmethod
    def from_modules(
        cls,
        conv: nn.ConvTranspose3d,
        bn: nn.BatchNorm3d | nn.SyncBatchNorm,
        act: nn.Module | None = None,
        *,
        backend: str | None = None,
    ) -> ConvTransposeBNAct3d:
        """The same computation over the same Parameter and buffer objects, as :meth:`ConvBNAct3d.from_modules`."""
        check_modules(conv, nn.ConvTranspose3d, bn)
        module = cls._over(conv, act, backend)
        module.bn = bn
        return module.train(bn.training)

    def forward(
        self,
        x: Tensor,
        output_size: Sequence[int] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        conv: Any = self.conv
        output_padding = conv.output_padding
        if output_size is not None:
            output_padding = conv._output_padding(
                x, list(output_size), conv.stride, conv.padding, conv.kernel_size, 3, conv.dilation
            )
        return conv_transpose3d_bn_act(
            x,
            conv.weight,
            bias=conv.bias,
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            stride=conv.stride,
            padding=conv.padding,
            output_padding=tuple(output_padding),
            dilation=conv.dilation,
            groups=conv.groups,
            backend=self.backend,
            **batch_norm(self.bn),
        )
