"""``NeighborhoodAttention3d``: the projections around the operator, full windows as torch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sora_kernels as sk
from sora_kernels.testing import assert_close


def test_a_window_that_covers_the_map_is_full_attention():
    ours = sk.nn.NeighborhoodAttention3d(8, 2, (3, 9, 9), proj_drop=0.5).eval()
    stock = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        stock.in_proj_weight.copy_(ours.qkv.weight)
        stock.in_proj_bias.copy_(ours.qkv.bias)
        stock.out_proj.weight.copy_(ours.proj.weight)
        stock.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(2, 3, 4, 5, 8)
    rows = x.flatten(1, 3)
    want = stock(rows, rows, rows, need_weights=False)[0].view(x.shape)
    assert_close(ours(x), want, "composition_fp32")
    assert not torch.equal(ours.train()(x), ours(x))


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_out_of_sight_does_not_matter(causal):
    """And every parameter learns, the bias too."""
    module = sk.nn.NeighborhoodAttention3d(
        8, 2, (3, 3, 3), dilation=(1, 1, 2), is_causal=causal, relative_bias=True
    )
    x = torch.randn(1, 6, 5, 9, 8)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = module(x), module(changed)
    last = 5 if causal else 4
    assert torch.equal(before[:, :last], after[:, :last])
    assert not torch.equal(before[:, 5], after[:, 5])
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_repr_and_errors():
    module = sk.nn.NeighborhoodAttention3d(8, 2, 3, stride=(1, 2, 2))
    assert module.extra_repr() == (
        "kernel_size=(3, 3, 3), stride=(1, 2, 2), dilation=(1, 1, 1), num_heads=2, is_causal=False"
    )
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim 8, got 3"):
        sk.nn.NeighborhoodAttention3d(8, 3, 3)
    with pytest.raises(ValueError, match="stride must be at most window_size"):
        sk.nn.NeighborhoodAttention3d(8, 2, 3, stride=4)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, H, W, 8\], got \(2, 3, 8\)"):
        module(torch.zeros(2, 3, 8))
