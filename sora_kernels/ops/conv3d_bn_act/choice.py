"""Which kernels make a convolution and its gradients: the table, and what each of them can do.

The table is data: rows of ``"dispatch"`` in ``tuned/<arch>.json``, found like a kernel's config. Its key is the kind of
the window and whether tensor cores take the dtype, for what decides is whether memory bounds the convolution.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from ... import _tuning
from ..._dispatch import Verdict, no
from .window import Window

STEM = 4  # channels
WIDEST = (1 << 31) - (1 << 20)  # output pixels; the rest is room for a tile


def is_depthwise(window: Window, channels: int, filters: int) -> bool:
    return not window.transposed and window.groups == channels == filters and channels > 1


def has_dgrad(window: Window, channels: int, filters: int) -> bool:
    """Whether a kernel of ours gives dx."""
    if window.replicate:
        return False
    return is_depthwise(window, channels, filters) or max(window.stride) == 1


def kind(window: Window, channels: int, filters: int) -> str:
    """ "depthwise" | "stem" | "pointwise" | "temporal" (k, 1, 1) | "spatial" (1, k, k) | "grouped" | "dense"."""
    if is_depthwise(window, channels, filters):
        return "depthwise"
    if window.groups > 1:
        return "grouped"
    if channels <= STEM:
        return "stem"
    kt, kh, kw = window.kernel
    if kh == kw == 1:
        return "pointwise" if kt == 1 else "temporal"
    return "spatial" if kt == 1 else "dense"


def kernels(window: Window, channels: int, filters: int, dtype: torch.dtype) -> Any:
    """The module that makes y: the most special one that can."""
    from . import depthwise, gemm, stem

    for module in (stem, depthwise):
        if module.can_run(window, channels, filters, dtype).ok:
            return module
    return gemm


def can_run(window: Window, channels: int, output: tuple[int, ...], dtype: torch.dtype) -> Verdict:
    """Whether some module makes y ``[N, K, T', H', W']``; needs Triton."""
    filters = output[1]
    if window.transposed:
        return no("a transposed convolution is a gradient of one; cuDNN and oneDNN have it")
    pixels = math.prod((output[0], *output[2:]))
    if pixels >= WIDEST:
        return no(f"{pixels} output pixels; the kernels count to 2^31")
    return kernels(window, channels, filters, dtype).can_run(window, channels, filters, dtype)


def table(
    device: torch.device, window: Window, channels: int, filters: int, dtype: torch.dtype
) -> dict[str, Any]:
    """``{"forward": ..., "dgrad": ..., "wgrad": ...}``, each "triton" or "aten"."""
    from . import gemm, passes

    tensor = dtype.itemsize == 2 or gemm.precision(dtype) == "tf32"
    return _table(passes.arch_of(device), window, channels, filters, tensor)


@functools.lru_cache(maxsize=4096)
def _table(arch: str, window: Window, channels: int, filters: int, tensor: bool) -> dict[str, Any]:
    key = (
        ("channels", channels), ("filters", filters), ("kind", kind(window, channels, filters)),
        ("math", "tensor" if tensor else "plain"),
    )  # fmt: skip
    return _tuning.config("conv3d_bn_act", "dispatch", arch, key)
