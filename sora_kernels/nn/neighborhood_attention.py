"""``NeighborhoodAttention3d``: :func:`sora_kernels.neighborhood_attention3d` between its two projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common.dropout import dropout
from ..ops.neighborhood_attention import neighborhood_attention3d
from ..ops.neighborhood_attention.backends import OPERATOR
from ..ops.neighborhood_attention.op import check_window


class NeighborhoodAttention3d(nn.Module):
    """Multi-head self attention of every token of a video map to a window around it.

    The counterpart of NATTEN's ``NeighborhoodAttention3D``, by its constructor's names, with the relative-position bias
    that NATTEN gave up, and its gradient.

    Args:
        embed_dim: channels C. num_heads: divides C.
        kernel_size, stride, dilation: int or (t, h, w), as window_size, stride and dilation of
            :func:`sora_kernels.neighborhood_attention3d`.
        is_causal: along time.
        qkv_bias: of the projection to q, k and v.
        qk_scale: of the scores; None: head_dim ** -0.5.
        proj_drop: dropout of the output, in training.
        relative_bias: a learned bias by offset, ``relative_position_bias_table``.
        backend: as :func:`sora_kernels.neighborhood_attention3d`.

    Shape:
        ``[B, T, H, W, C]`` -> the same.

    Source: Hassani et al., "Neighborhood Attention Transformer", 2023.

    Example:
        >>> attention = sora_kernels.nn.NeighborhoodAttention3d(96, 3, kernel_size=(3, 7, 7), relative_bias=True)
        >>> attention(torch.randn(1, 4, 14, 14, 96)).shape
        torch.Size([1, 4, 14, 14, 96])
    """

    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        relative_bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}"
            )
        options = check_window(kernel_size, stride, dilation, is_causal)
        OPERATOR.check_name(backend)
        self.num_heads, self.is_causal, self.scale = num_heads, is_causal, qk_scale
        self.kernel_size, self.stride, self.dilation = (
            options.window, options.stride, options.dilation,
        )  # fmt: skip
        self.proj_drop, self.backend = proj_drop, backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        if relative_bias:
            table = torch.empty(options.rows, num_heads, device=device, dtype=dtype)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            self.register_parameter("relative_position_bias_table", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(
                f"x: expected [B, T, H, W, {self.qkv.in_features}], got {tuple(x.shape)}"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        y = neighborhood_attention3d(
            q, k, v, self.kernel_size, stride=self.stride, dilation=self.dilation, causal_t=self.is_causal,
            bias_table=self.relative_position_bias_table, scale=self.scale, backend=self.backend,
        )  # fmt: skip
        y = self.proj(y.flatten(-2))
        return dropout(y, self.proj_drop) if self.training and self.proj_drop else y

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"num_heads={self.num_heads}, is_causal={self.is_causal}"
        )
