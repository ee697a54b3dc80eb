"""The public arguments of the convolution operators: normal forms and checks. Nothing here touches data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAME = "conv3d_bn_act"


def triple(name: str, value: int | Sequence[int], least: int) -> list[int]:
    """``value`` as [t, h, w]."""
    if isinstance(value, int):
        value = (value, value, value)
    if len(value) != 3 or min(value) < least:
        raise ValueError(f"{name}: expected an int or 3 ints >= {least}, got {value!r}")
    return list(value)


def paddings(padding: int | Sequence[int] | Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Padding before and after, as [t, h, w] each."""
    if isinstance(padding, int) or all(isinstance(p, int) for p in padding):
        both = triple("padding", padding, 0)  # type: ignore[arg-type]
        return both, both
    pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in padding]
    if len(pairs) != 3 or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(
            f"padding: expected an int, (t, h, w) or ((t0, t1), (h0, h1), (w0, w1)) >= 0, got {padding!r}"
        )
    return [p[0] for p in pairs], [p[1] for p in pairs]


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> Tensor:
    """x padded as a tensor: for the forms that ATen's convolution cannot take."""
    if mode not in ("zeros", "replicate"):
        raise ValueError(f"padding_mode: expected 'zeros' or 'replicate', got {mode!r}")
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    sides = [side for axis in (2, 1, 0) for side in (before[axis], after[axis])]
    x = F.pad(x, sides, "constant" if mode == "zeros" else "replicate")
    return x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x


def output_shape(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[Any]:
    """[N, K, T', H', W'] (symbolic where x is)."""
    n, _, t, h, w = x.shape
    k, _, kt, kh, kw = weight.shape
    return [
        n,
        k,
        (t + 2 * padding[0] - dilation[0] * (kt - 1) - 1) // stride[0] + 1,
        (h + 2 * padding[1] - dilation[1] * (kh - 1) - 1) // stride[1] + 1,
        (w + 2 * padding[2] - dilation[2] * (kw - 1) - 1) // stride[2] + 1,
    ]


def validate(
    x: Tensor,
    weight: Tensor,
    vectors: dict[str, Tensor | None],
    activation: str | None,
    groups: int,
) -> None:
    """Raises one ValueError that names the argument, what was expected and what came."""
    if x.dim() != 5:
        raise ValueError(f"x: expected 5 dimensions [N, C, T, H, W], got {_said(x)}")
    if weight.dim() != 5:
        raise ValueError(
            f"weight: expected 5 dimensions [K, C / groups, kt, kh, kw], got {_said(weight)}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected fp16, bf16, fp32 or fp64, got {_said(x)}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight: expected {x.dtype} on {x.device} like x, got {_said(weight)}")
    k = weight.shape[0]
    if groups < 1 or k % groups:
        raise ValueError(
            f"groups: expected a divisor of weight's {k} output channels, got {groups}"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x: expected {weight.shape[1] * groups} channels for weight {tuple(weight.shape)} "
            f"and groups {groups}, got {_said(x)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    for name, v in vectors.items():
        if v is None:
            continue
        dtypes = (x.dtype,) if name == "bias" else (x.dtype, torch.promote_types(x.dtype, torch.float32))  # fmt: skip
        if v.dim() != 1 or v.shape[0] != k or v.dtype not in dtypes or v.device != x.device:
            raise ValueError(
                f"{name}: expected [{k}] {' or '.join(map(str, dict.fromkeys(dtypes)))} on {x.device}, "
                f"got {_said(v)}"
            )
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        missing = "running_mean" if vectors["running_mean"] is None else "running_var"
        raise ValueError(
            f"{missing}: expected both running statistics or neither, got None for this one"
        )


def _said(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
