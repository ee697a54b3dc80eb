"""``dropout()``: what is dropped follows from a seed and an element's place, so no mask is stored.

The seed is drawn by torch's generator of x's device and stays there: ``torch.manual_seed`` and checkpointing repeat a
mask, the replay of a CUDA graph draws a new one, and nothing waits for the host. The gradient is the same op on dy with
the same seed; being linear, it is its own derivative of every order.

*native* (csrc/dropout) and *reference* give the same bits; the reference runs inside ``torch.func`` transforms, and
where a graph that holds the op meets a device without a kernel. Under ``vmap`` the seed follows torch's rules:
``randomness="different"`` draws one for each sample, ``"same"`` one for all, and the default raises.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ... import _native
from .dtypes import DTYPE_CODES
from .gradient import transformed
from .schema import register

# As enum DType in csrc/common/dtype.h.
_LOW = 0xFFFFFFFF
# Up to here an ``autograd.Function`` costs the host more than torch's own dropout takes. Grad mode may not decide this:
# checkpointing runs the same call without and with it, and wants one mask.
_FEW = 3072


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 - p).

    Equivalent to ``torch.nn.functional.dropout(x, p, training=True)``, with a mask of its own::

        y = x * (torch.rand_like(x) >= p) / (1 - p)

    Args:
        x: any shape, floating point. The mask goes by place in logical order, whatever the strides.
        p: in [0, 1]. 0 returns x; 1 returns ``x * 0``.

    Returns:
        y in x's dtype.

    Raises:
        ValueError: x is not floating point, or p is outside [0, 1].

    Source: Srivastava et al. (2014); the generator is Philox4x32-10 of Salmon et al. (2011).
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not x.is_floating_point():
        raise ValueError(f"dropout: x must be floating point, got {x.dtype}")
    if p == 0:
        return x
    if not torch.compiler.is_compiling() and (x.numel() <= _FEW or not _native_can_run(x)):
        return F.dropout(x, p)
    return _differentiable(x, torch.randint(0, 2**63 - 1, (), device=x.device), float(p))


def reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The definition in plain torch, on any device: ``x * factor`` with csrc/dropout/dropout.h's factor.

    Args:
        seed: int64, one value.
    """
    state = torch.promote_types(x.dtype, torch.float32)
    count = x.numel()
    counter = torch.arange(-(-count // 4), device=x.device)
    zero = torch.zeros_like(counter)
    words = philox4x32(
        (counter & _LOW, counter >> 32, zero, zero), (seed & _LOW, seed >> 32 & _LOW)
    )
    word = torch.stack(words, -1).flatten(-2)[:count].reshape(x.shape)
    threshold = int(p * 2**32)
    scale = 0.0 if threshold > _LOW else 1 / (1 - p)
    return (x.to(state) * ((word >= threshold).to(state) * scale)).to(x.dtype)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words, which broadcast.

    A product of two words may pass 2^63: its bits are right all the same, and those above 32 are masked.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def _native_can_run(x: Tensor) -> bool:
    if x.is_cpu:
        return x.dtype != torch.float16 and x.dtype in DTYPE_CODES and _native.status().ok
    return x.is_cuda and x.dtype in DTYPE_CODES and _native.cuda_device_status(x.device).ok


def _impl(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"dropout: seed must be one int64 on {x.device}, "
            f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    if not _native_can_run(x):
        return reference(x, seed.reshape(()), p).contiguous()
    x = x.contiguous()
    y = torch.empty_like(x)
    device, stream = -1, 0
    if x.is_cuda:
        device = x.device.index
        stream = torch._C._cuda_getCurrentRawStream(device)
    _native.module().dropout(
        DTYPE_CODES[x.dtype], x.numel(), x.data_ptr(), seed.data_ptr(), p, y.data_ptr(), device, stream,
        _native.num_threads(),
    )  # fmt: skip
    return y


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


_op = register("dropout(Tensor x, Tensor seed, float p) -> Tensor", _impl, _fake)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return _op(x, seed, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return _differentiable(dy, seed, ctx.p), None, None


def _differentiable(x: Tensor, seed: Tensor, p: float) -> Tensor:
    # Legacy batching is what ``torch.autograd.grad(is_grads_batched=True)`` runs a backward under.
    if not torch.compiler.is_dynamo_compiling() and (
        transformed((x, seed)) or is_legacy_batchedtensor(x)
    ):
        return reference(x, seed, p)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, seed, p)
    return _op(x, seed, p)
