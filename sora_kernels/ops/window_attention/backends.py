"""``window_attention3d``: the backends, what each can run, and which comes first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dispatch import YES, Backend, Operator, Verdict, no
from ..common import triton_backend
from ..common.lazy import Lazy
from . import definition
from .options import Options

MOST_DIM = 128  # a row of a head that a kernel holds


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # of qkv
    options: Options
    bias: bool
    grad: bool

    @property
    def head_dim(self) -> int:
        return self.shape[-1] // 3 // self.options.num_heads

    @property
    def full(self) -> bool:
        """Every token sees every other, and nothing is added: what a fused attention of torch's takes."""
        o = self.options
        covered = all(n <= w for n, w in zip(self.shape[1:4], o.window, strict=True))
        return covered and not (self.bias or o.causal_t or o.dropout_p)


def takes(head_dim: int) -> Verdict:
    """Whether the Triton kernels take such heads."""
    if head_dim > MOST_DIM:
        return no(f"head_dim is {head_dim}; the kernels take up to {MOST_DIM}")
    return YES


def _triton_can_run(facts: Facts) -> Verdict:
    verdict = takes(facts.head_dim)
    return triton_backend.can_run(facts.device, facts.dtype) if verdict.ok else verdict


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md says why."""
    if facts.device.type == "cuda" and not (_by_sdpa(facts) or _wide_fp32(facts)):
        return ("triton", "torch", "reference")
    return ("torch", "triton", "reference")


def _by_sdpa(facts: Facts) -> bool:
    """On CUDA: whether torch's fused attention takes the call, with gradients too."""
    fused = facts.dtype in (torch.float16, torch.bfloat16) and facts.head_dim % 8 == 0
    return facts.full and (fused or not facts.grad)


def _wide_fp32(facts: Facts) -> bool:
    """Rows that the kernels cannot hold in registers."""
    return facts.dtype == torch.float32 and facts.head_dim >= 64


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of the forward pass: qkv once, the output, with gradients a sum a token and head."""
    B, T, H, W, width = facts.shape
    sums = 4 * facts.options.num_heads if facts.grad else 0
    return B * T * H * W * ((width + width // 3) * facts.dtype.itemsize + sums)


def facts_of(qkv: Tensor, options: Options, bias: bool, grad: bool) -> Facts:
    return Facts(qkv.device, qkv.dtype, tuple(qkv.shape), options, bias, grad)


_launches = Lazy(".launches", __package__)
_stock = Lazy(".stock", __package__)

OPERATOR = Operator(
    "window_attention3d",
    [
        Backend(
            "triton",
            _triton_can_run,
            _launches,
            config=lambda facts: _launches.describe(facts),
            floor_bytes=_floor_bytes,
        ),
        Backend(
            "torch",
            lambda facts: YES,
            _stock,
            floor_bytes=_floor_bytes,
        ),
        Backend("reference", lambda facts: YES, definition),
    ],
    prefer=_prefer,
    facts=lambda *args, **kwargs: _facts_of_call(*args, **kwargs),
)


def _facts_of_call(*args: Any, **kwargs: Any) -> Facts:
    """The public function's arguments -> facts, for ``explain``."""
    from .op import facts_of_call

    return facts_of_call(*args, **kwargs)
