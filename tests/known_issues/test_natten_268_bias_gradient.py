"""NATTEN issue 268: relative position bias left NATTEN in 0.20, for want of a fused backward pass. Ours has one;
its gradient is autograd's of the definition, and repeats bit for bit.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from sora_kernels.ops.neighborhood_attention import neighborhood_attention3d
from sora_kernels.testing import assert_within_2x

WINDOW, HEADS = (3, 5, 5), 2
ROWS = 5 * 9 * 9
BACKENDS = [None, "torch", pytest.param("triton", marks=pytest.mark.triton)]


def gradient(dtype: torch.dtype, backend: str | None) -> torch.Tensor:
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 3, 6, 5, HEADS, 16).to(dtype)
    table = torch.randn(ROWS, HEADS).to(dtype).requires_grad_()
    out = neighborhood_attention3d(q, k, v, WINDOW, bias_table=table, backend=backend)
    return torch.autograd.grad(out, table, dout)[0]


def test_stock_has_none():
    natten = pytest.importorskip("natten", minversion="0.20")
    found = inspect.signature(natten.NeighborhoodAttention3D).parameters
    assert "rel_pos_bias" not in found  # its name up to 0.17


@pytest.mark.parametrize("backend", BACKENDS)
def test_ours(backend):
    ours = gradient(torch.float32, backend)
    truth, plain = (gradient(dtype, "reference") for dtype in (torch.float64, torch.float32))
    assert truth.count_nonzero() == truth.numel() == ROWS * HEADS
    assert_within_2x(ours, plain, truth)
    assert torch.equal(ours, gradient(torch.float32, backend))
