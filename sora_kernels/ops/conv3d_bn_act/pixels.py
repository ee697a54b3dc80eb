"""What the launchers of the convolutions' kernels share: the tensors they take, which are looked at once more before
pointers are taken, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._dispatch import Verdict

ACTIVATIONS = ("", "relu", "silu", "leaky_relu")
LEAST = 16  # tl.dot's least extent
VECTOR = 16  # bytes of the widest load
WIDEST = (1 << 31) - (1 << 20)  # beyond, int64 counts; the rest is room for a tile


class Plan(NamedTuple):
    """One launch: all of it that is not a pointer."""

    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


def precision(dtype: torch.dtype) -> str:
    """tl.dot's ``input_precision``: TF32 only where torch's own convolutions may take it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def pixel_stride(name: str, x: Tensor) -> int:
    """Elements from one pixel of x ``[N, C, T, H, W]`` to the next; raises where pixels are not evenly spaced."""
    if x.dim() != 5:
        raise ValueError(f"{name}: expected 5 dimensions [N, C, T, H, W], got {tuple(x.shape)}")
    n, c, *sizes = x.shape
    found, inner = None, 1
    even = c == 1 or x.stride(1) == 1
    for axis in (4, 3, 2, 0):  # a size-1 axis may carry any stride
        if x.shape[axis] > 1:
            found = x.stride(axis) // inner if found is None else found
            even = even and x.stride(axis) == found * inner
        inner *= x.shape[axis]
    found = c if found is None else found
    if not even or found < c:
        raise ValueError(
            f"{name}: expected channels innermost and evenly spaced pixels (channels_last_3d), "
            f"got {tuple(x.shape)} with strides {x.stride()}"
        )
    return found


def readable(x: Tensor, stride: int, groups: int) -> int:
    """Channels of a group that may be read: up to a whole vector, where the pixel and the storage have room for it."""
    c = x.shape[1] // groups
    if groups > 1 or not is_whole(x.dtype, stride) or x.numel() == 0:
        return c
    vector = VECTOR // x.element_size()
    whole = triton.cdiv(c, vector) * vector
    end = x.storage_offset() + (x.numel() // c - 1) * stride + whole
    return whole if end * x.element_size() <= x.untyped_storage().nbytes() else c


def is_whole(dtype: torch.dtype, *strides: int) -> bool:
    """Whether rows at multiples of these strides are loaded by whole vectors."""
    return not any(stride * dtype.itemsize % VECTOR for stride in strides)


def empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Dense ``channels_last_3d``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def epilogue_arguments(
    z: Tensor, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, residual: Tensor | None, activation: str,
) -> tuple[tuple[Tensor | None, ...], int]:  # fmt: skip
    """What comes after the sums, checked against z: vectors in the kernels' order, and the residual's elements a pixel,
    0 without one."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if (mean is None) is not (variance is None):
        raise ValueError("mean, variance: expected both or neither")
    if mean is None and (bn_weight is not None or bn_bias is not None):
        raise ValueError("bn_weight, bn_bias: expected None without mean and variance")
    vectors = {
        "bias": bias, "mean": mean, "variance": variance, "bn_weight": bn_weight, "bn_bias": bn_bias,
    }  # fmt: skip
    _check_vectors(z, vectors)
    stride = 0
    if residual is not None:
        check_like("residual", residual, z, tuple(z.shape))
        stride = pixel_stride("residual", residual)
    return tuple(vectors.values()), stride


def check_like(name: str, t: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if t.dtype != x.dtype or t.device != x.device or tuple(t.shape) != shape:
        raise ValueError(
            f"{name}: expected {shape} {x.dtype} on {x.device}, got {tuple(t.shape)} {t.dtype} on {t.device}"
        )


def require(verdict: Verdict) -> None:
    if not verdict.ok:
        raise ValueError(verdict.why)


def _check_vectors(z: Tensor, vectors: dict[str, Tensor | None]) -> None:
    for name, v in vectors.items():
        if v is not None and (
            v.shape != (z.shape[1],) or v.device != z.device or not v.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected ({z.shape[1]},) contiguous on {z.device}, "
                f"got {tuple(v.shape)} with strides {v.stride()} on {v.device}"
            )
