"""Autocast at an operator's door, where it settles dtypes, and inside, where it is off."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, as it is now, casts x to; None where it leaves it. fp64 stays as it is."""
    if (
        torch._C._is_any_autocast_enabled()
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype is not torch.float64
    ):
        return torch.get_autocast_dtype(x.device.type)
    return None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Stock operations inside take their arguments as they are."""
    if torch._C._is_any_autocast_enabled() and not x.is_meta:
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
