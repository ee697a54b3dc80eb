"""How exact products of fp32 are on CUDA: the call's ``precision``, or torch's flag for its own layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.autocast import without_autocast

# torch.backends.cudnn.rnn.fp32_precision without its detour of ten microseconds.
_flag = torch._C._get_fp32_precision_getter


def resolved(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """``"tf32"`` or ``"ieee"`` for fp32 on CUDA, where "" is what cuDNN's layers may do; "" elsewhere."""
    if dtype != torch.float32 or device.type != "cuda":
        return ""
    return precision or of_cudnn()


def of_cudnn() -> str:
    """What ``torch.backends.cudnn`` lets its recurrent layers do."""
    return "tf32" if _flag("cuda", "rnn") == "tf32" else "ieee"


def of_products() -> str:
    """What torch's GEMMs do; inside ``settled`` what the layer does."""
    return "tf32" if _flag("cuda", "matmul") == "tf32" else "ieee"


@contextlib.contextmanager
def settled(x: Tensor, precision: str) -> Iterator[None]:
    """No autocast, which would cast single GEMMs of a layer whose dtype is settled, and GEMMs as exact
    as the layer's. That flag is global: other threads see it meanwhile.
    """
    wanted = resolved(precision, x.device, x.dtype)
    with without_autocast(x):
        if wanted in ("", of_products()):
            yield
            return
        flags = torch.backends.cuda.matmul
        was = flags.fp32_precision
        flags.fp32_precision = wanted
        try:
            yield
        finally:
            flags.fp32_precision = was
