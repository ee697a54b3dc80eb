"""``save_memory()``: training with fewer saved activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.conv3d_bn_act import recipes


@contextlib.contextmanager
def save_memory() -> Iterator[None]:
    """Inside, outputs of :func:`sora_kernels.conv3d_bn_act` with batch statistics and without a residual are not kept
    for backward, whoever wants to keep them: convolutions, pools, anything. Each use in backward makes them again from
    the convolution's result, which is kept anyway: one elementwise pass, no convolution.

    A chain of convolutions saves about half of its activations, a residual network about a quarter; gradients are
    the same to rounding, bit for bit where the fused Triton passes run. An output that was changed in place is
    kept as ever. In code under ``torch.compile`` nothing changes.

    Example:
        >>> with sora_kernels.save_memory():  # doctest: +SKIP
        ...     loss = model(clip).sum()
        >>> loss.backward()  # doctest: +SKIP
    """
    with recipes.recording(), torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(t: Tensor) -> Any:
    recipe = recipes.find(t)
    return t if recipe is None else recipe


def _unpack(kept: Any) -> Tensor:
    return kept.make() if isinstance(kept, recipes.Recipe) else kept
