"""Windowed attention as modules: torchvision's, our own, and a block around either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common.dropout import dropout
from ..ops.window_attention import window_attention3d
from ..ops.window_attention.backends import OPERATOR
from ..ops.window_attention.op import check_shift, triple
from ..ops.window_attention.options import check_names, table_rows


class _WindowAttention(nn.Module):
    """The two projections, the bias table, and the operator between them."""

    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self, dim: int, window: Sequence[int], shift: Sequence[int], num_heads: int, qkv_bias: bool,
        proj_bias: bool, attention_dropout: float, dropout: float, bias: bool, bias_index: str, border: str,
        pad: str, causal_t: bool, backend: str | None, device, dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.window_size = triple("window_size", window, 1)
        self.shift_size = triple("shift_size", shift, 0)
        check_names(bias_index, border, pad)
        check_shift(self.window_size, self.shift_size, border)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim {dim}, got {num_heads}")
        OPERATOR.check_name(backend)
        self.num_heads, self.attention_dropout, self.dropout = num_heads, attention_dropout, dropout
        self.bias_index, self.border, self.pad = bias_index, border, pad
        self.causal_t, self.backend = causal_t, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        if bias:
            rows = table_rows(self.window_size)
            table = torch.empty(rows, num_heads, device=device, dtype=dtype)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            self.register_parameter("relative_position_bias_table", None)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, dim]`` -> the same."""
        if x.dim() != 5 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(
                f"x: expected [B, T, H, W, {self.qkv.in_features}], got {tuple(x.shape)}"
            )
        pad_kv = None
        if self.qkv.bias is not None and self.pad == "kv":
            pad_kv = self.qkv.bias[x.shape[-1] :].view(2, -1)  # what the projection makes of zeros
        y = window_attention3d(
            self.qkv(x), self.num_heads, self.window_size, self.shift_size,
            bias_table=self.relative_position_bias_table, bias_index=self.bias_index, border=self.border,
            pad=self.pad, pad_kv=pad_kv, causal_t=self.causal_t, dropout_p=self.attention_dropout,
            training=self.training, backend=self.backend,
        )  # fmt: skip
        y = self.proj(y)
        return dropout(y, self.dropout) if self.training and self.dropout else y

    def extra_repr(self) -> str:
        others = [
            f"{name}={getattr(self, name)!r}"
            for name, usual in (
                ("bias_index", "torchvision"), ("border", "cyclic"), ("pad", "kv"), ("causal_t", False),
                ("backend", None),
            )
            if getattr(self, name) != usual
        ]  # fmt: skip
        sizes = f"window_size={self.window_size}, shift_size={self.shift_size}"
        return ", ".join([sizes, f"num_heads={self.num_heads}", *others])


class ShiftedWindowAttention3d(_WindowAttention):
    """Drop-in for ``torchvision.models.video.swin_transformer.ShiftedWindowAttention3d`` (Video-Swin).

    The same constructor, parameters, buffer and numbers: state dicts load both ways. The projection runs on the map as
    it is, and nothing is padded, rolled or partitioned: :func:`sora_kernels.window_attention3d`.

    Args:
        dim: channels C. window_size, shift_size: three ints (t, h, w). num_heads: divides C.
        qkv_bias, proj_bias: biases of the two projections.
        attention_dropout, dropout: of the attention weights and of the output, in training.
        bias_index, backend: as :func:`sora_kernels.window_attention3d`.

    Shape:
        ``[B, T, H, W, C]`` -> the same, any T, H, W of at least 1.

    Source: Liu et al., "Video Swin Transformer", 2021.

    Example:
        >>> attention = sora_kernels.nn.ShiftedWindowAttention3d(96, [8, 7, 7], [4, 3, 3], 3)
        >>> attention(torch.randn(1, 8, 14, 14, 96)).shape
        torch.Size([1, 8, 14, 14, 96])
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        bias_index: str = "torchvision",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, window_size, shift_size, num_heads, qkv_bias, proj_bias, attention_dropout, dropout, True,
            bias_index, "cyclic", "kv", False, backend, device, dtype,
        )  # fmt: skip
        from ..ops.window_attention.position import codes

        index = codes(self.window_size, self.window_size, "exact").pairs()
        # Read by nobody here: it is a part of the state dicts that are exchanged.
        self.register_buffer("relative_position_index", torch.as_tensor(index, device=device))


class WindowAttention3d(_WindowAttention):
    """Windowed attention with what :func:`sora_kernels.window_attention3d` offers and torchvision's module does not.

    Args:
        dim: channels C. num_heads: divides C.
        window_size: three ints (t, h, w): ``(T, 1, 1)`` and ``(1, H, W)`` make divided space-time attention.
        shift_size: less than window_size.
        qkv_bias, proj_bias: biases of the two projections.
        relative_bias: a learned bias by offset, ``relative_position_bias_table``.
        attention_dropout, dropout: of the attention weights and of the output, in training.
        bias_index, border, pad, causal_t, backend: as :func:`sora_kernels.window_attention3d`; offsets are true ones
            and pads take no part unless asked for. With ``pad="kv"`` pads are what the projection makes of zeros.

    Shape:
        ``[B, T, H, W, C]`` -> the same.

    Example:
        >>> frames = sora_kernels.nn.WindowAttention3d(96, (1, 14, 14), 3)
        >>> frames(torch.randn(1, 8, 14, 14, 96)).shape
        torch.Size([1, 8, 14, 14, 96])
    """

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        num_heads: int,
        shift_size: Sequence[int] = (0, 0, 0),
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        relative_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        bias_index: str = "exact",
        border: str = "cyclic",
        pad: str = "mask",
        causal_t: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, window_size, shift_size, num_heads, qkv_bias, proj_bias, attention_dropout, dropout,
            relative_bias, bias_index, border, pad, causal_t, backend, device, dtype,
        )  # fmt: skip


class SwinBlock3d(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: torchvision's ``SwinTransformerBlock`` with our attention.

    Children and keys are torchvision's: ``norm1``, ``attn``, ``norm2``, ``mlp.0``, ``mlp.3``.

    Args:
        dim, num_heads, window_size, shift_size, dropout, attention_dropout: as
            :class:`ShiftedWindowAttention3d`; dropout also in the MLP.
        mlp_ratio: hidden width of the MLP, in units of dim.
        stochastic_depth_prob: with which a sample skips either branch, in training.
        backend: of the attention.

    Shape:
        ``[B, T, H, W, C]`` -> the same.

    Source: Liu et al., "Video Swin Transformer", 2021.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.0,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= stochastic_depth_prob < 1:
            raise ValueError(f"stochastic_depth_prob: expected [0, 1), got {stochastic_depth_prob}")
        self.stochastic_depth_prob = stochastic_depth_prob
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.attn = ShiftedWindowAttention3d(
            dim, window_size, shift_size, num_heads, attention_dropout=attention_dropout, dropout=dropout,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, device=device, dtype=dtype),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, device=device, dtype=dtype),
            nn.Dropout(dropout),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._sometimes(self.attn(self.norm1(x)))
        return x + self._sometimes(self.mlp(self.norm2(x)))

    def _sometimes(self, y: Tensor) -> Tensor:
        """Stochastic depth by samples (Huang et al., 2016)."""
        p = self.stochastic_depth_prob
        if not p or not self.training:
            return y
        kept = torch.empty(y.shape[0], *[1] * (y.dim() - 1), dtype=y.dtype, device=y.device)
        return y * kept.bernoulli_(1 - p).div_(1 - p)
