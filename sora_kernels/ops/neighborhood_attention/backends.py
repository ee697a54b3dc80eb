"""``neighborhood_attention3d``: the backends, what each can run, and which comes first."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dispatch import YES, Backend, Operator, Verdict, no
from ..common import triton_backend
from ..common.lazy import Lazy
from . import definition
from .options import Options

HEAD_DIMS = (16, 128)  # least of a tensor core's products, most of the kernels


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # of q
    options: Options
    bias: bool
    grad: bool

    @property
    def full(self) -> bool:
        """Every token sees every other, and nothing is added: what a fused attention of torch's takes."""
        return self.options.sees_all(self.shape[1:4]) and not self.bias


def _triton_can_run(facts: Facts) -> Verdict:
    if facts.shape[-1] > HEAD_DIMS[1]:
        return no(f"head_dim is {facts.shape[-1]}; the kernels take up to {HEAD_DIMS[1]}")
    verdict = triton_backend.can_run(facts.device, facts.dtype)
    if not verdict.ok:
        return verdict
    bits = _launches.packed_bits(facts.shape[1:4], facts.options)
    if bits > _launches.WORD:
        return no(f"coordinates in a box of keys take {bits} bits; a word has {_launches.WORD}")
    return YES


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md says why."""
    if facts.device.type == "cuda" and not facts.full and facts.shape[-1] >= HEAD_DIMS[0]:
        return ("triton", "torch", "reference")
    return ("torch", "triton", "reference")


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of the forward pass: q, k, v once, the output, with gradients a sum a token and head."""
    elements = math.prod(facts.shape)
    sums = elements // max(facts.shape[-1], 1) * 4 if facts.grad else 0
    return 4 * elements * facts.dtype.itemsize + sums


def facts_of(q: Tensor, options: Options, bias: bool, grad: bool) -> Facts:
    return Facts(q.device, q.dtype, tuple(q.shape), options, bias, grad)


_launches = Lazy(".launches", __package__)
_stock = Lazy(".stock", __package__)

OPERATOR = Operator(
    "neighborhood_attention3d",
    [
        Backend(
            "triton",
            _triton_can_run,
            _launches,
            config=lambda facts: _launches.describe(facts),
            floor_bytes=_floor_bytes,
        ),
        Backend("torch", lambda facts: YES, _stock, floor_bytes=_floor_bytes),
        Backend("reference", lambda facts: YES, definition),
    ],
    prefer=_prefer,
    facts=lambda *args, **kwargs: _facts_of_call(*args, **kwargs),
)


def _facts_of_call(*args: Any, **kwargs: Any) -> Facts:
    """The public function's arguments -> facts, for ``explain``."""
    from .op import facts_of_call

    return facts_of_call(*args, **kwargs)
