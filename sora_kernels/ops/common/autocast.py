"""Autocast inside an operator: off, for its dtypes were settled at the door."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Stock operations inside take their arguments as they are."""
    if torch._C._is_any_autocast_enabled() and not x.is_meta:
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
