"""``ConvBNAct3d``: Conv3d, BatchNorm3d, an optional residual and the activation as one module."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.conv3d_bn_act import conv3d_bn_act

_ACTIVATIONS: dict[str, Any] = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}


class ConvBNAct3d(nn.Module):
    """``activation(bn(conv(x)) + residual)`` through :func:`sora_kernels.conv3d_bn_act`.

    The children ``conv`` (``nn.Conv3d``) and ``bn`` (``nn.BatchNorm3d``) own every parameter and buffer, so that the
    state dict is that of the two modules. They are never called: their hooks do not run.

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

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: Any = 0,
        dilation: int | tuple[int, int, int] = 1,
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
        if padding_mode not in ("zeros", "replicate"):
            raise ValueError(f"padding_mode: expected 'zeros' or 'replicate', got {padding_mode!r}")
        if activation not in (*_ACTIVATIONS, None):
            raise ValueError(
                f"activation: expected one of {(*_ACTIVATIONS, None)}, got {activation!r}"
            )
        pairs = not isinstance(padding, (int, str)) and any(not isinstance(p, int) for p in padding)
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, 0 if pairs else padding, dilation, groups, bias,
            cast(Any, padding_mode), **factory,
        )  # fmt: skip
        self.bn = nn.BatchNorm3d(
            out_channels, eps, momentum, affine, track_running_stats, **factory
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend
        self._set_padding(tuple(map(tuple, padding)) if pairs else None)

    def _set_padding(self, pairs: Any) -> None:
        conv = self.conv
        if pairs is not None:
            self.padding: Any = pairs
        elif isinstance(conv.padding, str):
            # nn.Conv3d keeps "same" as a word and its sides, innermost first, in a private list.
            sides = conv._reversed_padding_repeated_twice
            self.padding = tuple((sides[i], sides[i + 1]) for i in (4, 2, 0))
        else:
            self.padding = conv.padding

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv3d,
        bn: nn.BatchNorm3d,
        act: nn.Module | None = None,
        *,
        backend: str | None = None,
    ) -> ConvBNAct3d:
        """The same computation over the same Parameter and buffer objects.

        Args:
            conv, bn: become the children; their training flags and parameters stay theirs.
            act: ``nn.ReLU``, ``nn.SiLU``, ``nn.LeakyReLU``, ``nn.Identity`` or None.
        """
        if not isinstance(conv, nn.Conv3d):
            raise TypeError(f"conv: expected nn.Conv3d, got {type(conv).__name__}")
        if not isinstance(bn, nn.BatchNorm3d):
            raise TypeError(f"bn: expected nn.BatchNorm3d, got {type(bn).__name__}")
        if bn.num_features != conv.out_channels:
            raise ValueError(f"bn: expected {conv.out_channels} features, got {bn.num_features}")
        if conv.padding_mode not in ("zeros", "replicate"):
            raise ValueError(
                f"conv: expected padding_mode 'zeros' or 'replicate', got {conv.padding_mode!r}"
            )
        activation = None
        if act is not None and not isinstance(act, nn.Identity):
            names = [name for name, kind in _ACTIVATIONS.items() if isinstance(act, kind)]
            if not names:
                raise TypeError(f"act: expected ReLU, SiLU, LeakyReLU or None, got {act!r}")
            activation = names[0]
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.conv, module.bn = conv, bn
        module.activation = activation
        module.negative_slope = getattr(act, "negative_slope", 0.01)
        module.backend = backend
        module._set_padding(None)
        return module.train(bn.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn = self.conv, self.bn
        training = bn.training and bn.track_running_stats
        momentum = bn.momentum
        if training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if momentum is None:
                # A cumulative average needs its count on the host; nn.BatchNorm3d reads it too.
                momentum = 1.0 / float(bn.num_batches_tracked)
        tracked = training or not bn.training
        return conv3d_bn_act(
            x,
            conv.weight,
            bn.weight,
            bn.bias,
            bn.running_mean if tracked else None,
            bn.running_var if tracked else None,
            bias=conv.bias,
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            stride=conv.stride,
            padding=self.padding,
            padding_mode=conv.padding_mode,
            dilation=conv.dilation,
            groups=conv.groups,
            training=bn.training,
            momentum=0.0 if momentum is None else momentum,
            eps=bn.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        chosen = f", backend={self.backend!r}" if self.backend else ""
        return f"activation={self.activation!r}{slope}{chosen}"
