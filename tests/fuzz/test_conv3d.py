"""Random convolutions by the automatic backend, a tenth of them by our kernels in Triton's interpreter. The test
command runs 100, ``make fuzz`` 2,000: outputs with and without gradients, and every gradient, by the 2x rule.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.conv3d_bn_act.reference import activate, activate_like
from sora_kernels.testing import assert_close, assert_within_2x

FIRST, LAST = (int(n) for n in os.environ.get("SORA_FUZZ", "0:99").split(":"))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "bias", "bn_weight", "bn_bias", "residual")


class Case(NamedTuple):
    number: int
    operator: str  # "bn", "act" or "transposed"
    shape: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str
    groups: int
    output_padding: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    weight_layout: str
    activation: str | None
    training: bool
    affine: bool
    bias: bool
    residual: bool
    backend: str | None


def random_case(number: int) -> Case | None:
    """None where nothing comes out, or too few values for statistics to be compared."""
    r = random.Random(number)
    operator = r.choice(("bn", "bn", "act", "transposed"))
    own = number % 10 == 0 and operator != "transposed"
    sizes = tuple(r.randint(1, 5 if own else 9) for _ in range(3))
    groups = r.choice((1, 1, 1, 2, 3))
    channels, filters = groups * r.randint(1, 6), groups * r.randint(1, 6)
    if r.random() < 0.25:  # depthwise
        groups = filters = channels
    kernel = tuple(r.choice((1, 1, 2, 3, 3, 4, 5)) for _ in range(3))
    stride = tuple(r.choice((1, 1, 2, 3)) for _ in range(3))
    dilation = tuple(r.choice((1, 1, 1, 2)) for _ in range(3))
    if r.random() < 0.5 or operator == "transposed":
        padding = tuple((p, p) for p in (r.randint(0, 2) for _ in range(3)))
    else:
        padding = tuple((r.randint(0, 3), r.randint(0, 3)) for _ in range(3))
    mode = "replicate" if operator != "transposed" and r.random() < 0.2 else "zeros"
    extra = tuple(
        r.randint(0, max(s, d) - 1) if operator == "transposed" else 0
        for s, d in zip(stride, dilation, strict=True)
    )
    each = list(zip(sizes, kernel, stride, dilation, padding, extra, strict=True))
    if operator == "transposed":
        out = [(n - 1) * s - 2 * p[0] + d * (k - 1) + o + 1 for n, k, s, d, p, o in each]
    else:
        out = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p, _ in each]
    batch, training = r.randint(1, 3), operator != "act" and r.random() < 0.4
    if min(out) < 1 or (training and batch * math.prod(out) < 16):
        return None
    return Case(
        number, operator, (batch, channels, *sizes), filters, kernel, stride, dilation, padding, mode, groups,
        extra, r.choice(DTYPES), r.choice(("contiguous", "channels_last", "sliced")),
        r.choice(("contiguous", "channels_last")), r.choice(("relu", "silu", "leaky_relu", None)), training,
        r.random() < 0.7, r.random() < 0.5, r.random() < 0.4, "triton" if own else None,
    )  # fmt: skip


def laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last_3d)
    if layout == "sliced":
        return torch.stack([t, t], -1)[..., 0]
    return t


def make(c: Case) -> tuple[tuple[Tensor | None, ...], Any, Tensor]:
    generator = torch.Generator().manual_seed(c.number)

    def randn(*shape: int, dtype: torch.dtype = c.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    wide, k = torch.promote_types(c.dtype, torch.float32), c.filters
    channels = c.shape[1]
    first = (channels, k // c.groups) if c.operator == "transposed" else (k, channels // c.groups)
    x = laid_out(randn(*c.shape), c.layout)
    weight = laid_out(randn(*first, *c.kernel) * 0.4, c.weight_layout)
    bias = randn(k) if c.bias else None
    z = convolve(c, x, weight, None)
    vectors: tuple[Tensor | None, ...] = (None, None)
    running = None
    if c.operator != "act":
        running = (randn(k, dtype=wide), randn(k, dtype=wide).abs() + 0.5)
        if c.affine:
            vectors = (randn(k, dtype=wide), randn(k, dtype=wide))
    residual = randn(*z.shape) if c.residual else None
    return (x, weight, bias, *vectors, residual), running, randn(*z.shape)


def convolve(c: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if c.operator == "transposed":
        padding = [p for p, _ in c.padding]
        return F.conv_transpose3d(
            x, weight, bias, c.stride, padding, c.output_padding, c.groups, c.dilation
        )
    sides = [side for pair in reversed(c.padding) for side in pair]
    x = F.pad(x, sides, "constant" if c.mode == "zeros" else c.mode)
    return F.conv3d(x, weight, bias, c.stride, 0, c.dilation, c.groups)


def ours(c: Case, running: Any) -> Any:
    def call(x, weight, bias, bn_weight, bn_bias, residual):
        options: dict[str, Any] = {
            "residual": residual, "activation": c.activation, "stride": c.stride, "dilation": c.dilation,
            "groups": c.groups, "backend": c.backend,
        }  # fmt: skip
        if c.operator == "transposed":
            padding = tuple(p for p, _ in c.padding)
            return sk.conv_transpose3d_bn_act(
                x, weight, bn_weight, bn_bias, *running, bias=bias, training=c.training, padding=padding,
                output_padding=c.output_padding, **options,
            )  # fmt: skip
        options |= {"padding": c.padding, "padding_mode": c.mode}
        if c.operator == "act":
            return sk.conv3d_act(x, weight, bias, **options)
        return sk.conv3d_bn_act(
            x, weight, bn_weight, bn_bias, *running, bias=bias, training=c.training, **options
        )

    return call


def stock(c: Case, running: Any, mask: Tensor | None = None) -> Any:
    def call(x, weight, bias, bn_weight, bn_bias, residual):
        y = convolve(c, x, weight, bias)
        if running is not None:
            y = F.batch_norm(y, *running, bn_weight, bn_bias, c.training)
        y = y if residual is None else y + residual
        if mask is None:
            return activate(y, c.activation, 0.01)
        return activate_like(y, mask, c.activation, 0.01)

    return call


def run(call: Any, inputs: Any, dz: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    z = call(*leaves)
    found = iter(torch.autograd.grad(z, [t for t in leaves if t is not None], dz.to(z.dtype)))
    return z.detach(), [None if t is None else next(found) for t in leaves]


def copied(tensors: Any, dtype: torch.dtype | None = None) -> Any:
    if tensors is None:
        return None
    return tuple(None if t is None else t.to(dtype or t.dtype, copy=True) for t in tensors)


def compare(ours: Tensor, plain: Tensor, true: Tensor, **options: Any) -> None:
    """By the 2x rule; in fp64 plain torch is the truth itself."""
    if ours.dtype == torch.float64:
        assert_close(ours, true, "transform_fp64", name=options["name"])
    else:
        assert_within_2x(ours, plain, true, **options)


@pytest.mark.parametrize("number", range(FIRST, LAST + 1))
def test_random_convolution(number):
    c = random_case(number)
    if c is None:
        return
    if c.backend and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    inputs, running, dz = make(c)
    exact, wide = copied(inputs, torch.float64), torch.float64
    mine, plain, true = copied(running), copied(running), copied(running, wide)
    z, grads = run(ours(c, mine), inputs, dz)
    plain_z, plain_grads = run(stock(c, plain), inputs, dz)
    true_z, _ = run(stock(c, true), exact, dz)
    compare(z, plain_z, true_z, name=f"z of {c}")
    with torch.no_grad():
        alone = ours(c, copied(running))(*inputs)
    compare(alone, plain_z, true_z, name=f"z without gradients of {c}")
    if c.training:
        for ours_, p, t in zip(mine, plain, true, strict=True):
            compare(ours_, p, t, name=f"running of {c}", storage=c.dtype)
    truths = [run(stock(c, copied(running, wide), m), exact, dz)[1] for m in (z, plain_z)]
    norm = dz.double().square().sum((0, 2, 3, 4)).max().sqrt().item()
    for name, g, p, t, pt in zip(NAMES, grads, plain_grads, *truths, strict=True):
        if name == "bias" and c.training and g is not None:
            assert torch.count_nonzero(g) == 0
        elif t is not None:
            terms = norm if g.dim() == 1 else 0.0
            compare(g, p, t, name=f"d{name} of {c}", storage=c.dtype, plain_truth=pt, terms=terms)
