"""Random windows by the automatic backend: outputs and every gradient against the definition by the 2x rule.

The test command runs 100, ``make fuzz`` 2,000. tests/ops/test_window_attention.py holds the definition to a loop over
tokens.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sora_kernels as sk
from sora_kernels.ops.window_attention import reference
from sora_kernels.ops.window_attention.op import facts_of_call
from sora_kernels.testing import assert_within_2x, poisoned

FIRST, LAST = (int(n) for n in os.environ.get("SORA_FUZZ", "0:99").split(":"))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_case(number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.dtype]:
    """Tensors by name in fp64, already rounded to the dtype; the other arguments."""
    r = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    size = [r.randint(1, 9) for _ in range(3)]
    window = tuple(r.randint(1, 5) for _ in range(3))
    border = r.choice(("cyclic", "cyclic", "ragged", "grid"))
    shift = tuple(0 if border == "grid" else r.randint(0, w - 1) for w in window)
    heads, dim = r.randint(1, 3), r.choice((1, 4, 7, 8))
    table_window = tuple(w + r.choice((0, 0, 2)) for w in window)
    options: dict[str, Any] = {
        "num_heads": heads, "window_size": window, "shift_size": shift, "border": border,
        "pad": r.choice(("kv", "kv", "mask")), "causal_t": r.random() < 0.3, "table_window": table_window,
        "bias_index": r.choice(("torchvision", "exact")),
        "scale": r.choice((None, None, 0.3)),
        "dropout_p": r.choice((0.0, 0.0, 0.0, 0.4)), "training": r.random() < 0.7,
    }  # fmt: skip
    dtype = r.choice(DTYPES)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).double()

    qkv = made(r.randint(1, 3), *size, 3 * heads * dim)
    tensors = {"qkv": qkv}
    if r.random() < 0.8:
        tensors["bias_table"] = made(math.prod(2 * w - 1 for w in table_window), heads)
    if r.random() < 0.7:
        tensors["pad_kv"] = made(2, heads * dim)
    return tensors, options, dtype


@pytest.mark.parametrize("number", range(FIRST, LAST + 1))
def test_random_windows(number):
    tensors, options, dtype = random_case(number)

    def ours(**leaves: torch.Tensor) -> torch.Tensor:
        return sk.window_attention3d(**leaves, **options)

    def plain(**leaves: torch.Tensor) -> torch.Tensor:
        given = facts_of_call(**leaves, **options).options
        seed = torch.randint(0, 2**63 - 1, ()) if given.dropout_p else None
        table, pad_kv = leaves.get("bias_table"), leaves.get("pad_kv")
        return reference.window_attention3d(leaves["qkv"], table, pad_kv, seed, given)

    def run(call: Callable[..., torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        torch.manual_seed(number)
        out = call(**leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), weight, materialize_grads=True)
        return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))

    with poisoned():
        found = run(ours, dtype)
    other, truth = run(plain, dtype), run(plain, torch.float64)
    # Each term of a bias' gradient is a difference of two sums over a head's channels, which may cancel whole.
    terms = (tensors["qkv"].shape[-1] / 3 / options["num_heads"]) ** 0.5 * tensors[
        "qkv"
    ].abs().max().item()
    for name in truth:
        sums = terms if name == "bias_table" else 0.0
        assert_within_2x(
            found[name], other[name], truth[name], name=name, storage=dtype, terms=sums
        )
