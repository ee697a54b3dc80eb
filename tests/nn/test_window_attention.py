"""The windowed attention modules: torchvision's beside ours, divided space-time attention, the block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sora_kernels as sk
from sora_kernels.testing import assert_close, assert_within_2x

CASES = {
    "shifted": ((4, 8, 8), (2, 4, 4), (1, 2, 2)),
    "padded": ((5, 9, 7), (2, 4, 4), (1, 2, 2)),
    "one axis": ((4, 8, 6), (2, 4, 3), (0, 2, 0)),
    "clipped": ((3, 3, 2), (2, 4, 4), (1, 2, 2)),
    "one window": ((2, 4, 4), (2, 4, 4), (1, 2, 2)),
    "video swin": ((8, 14, 7), (8, 7, 7), (4, 3, 3)),
    "wide": ((2, 3, 17), (2, 3, 4), (1, 1, 2)),
}


@pytest.fixture(scope="module")
def swin():
    """torchvision's module of Video-Swin."""
    from benchmarks.torchvision_models import video_swin

    return video_swin() or pytest.skip("torchvision is not installed")


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    names, leaves = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, [leaf, *leaves], weight)
    return {"out": out.detach()} | dict(zip(("x", *names), grads, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_as_torchvisions(swin, name):
    """Outputs and every gradient in fp32, and state dicts strictly both ways."""
    size, window, shift = CASES[name]
    theirs = swin.ShiftedWindowAttention3d(16, list(window), list(shift), 2)
    nn.init.normal_(theirs.relative_position_bias_table)
    ours = sk.nn.ShiftedWindowAttention3d(16, window, shift, 2)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 16)
    want = gradients(theirs, x)
    found = gradients(ours, x)
    truth = gradients(theirs.double(), x.double())
    for key in want:
        assert_close(found[key], want[key], "window_attention_fp32", name=key)
        assert_within_2x(found[key], want[key], truth[key], name=key)


@pytest.mark.parametrize("biases", [(False, True), (True, False)])
def test_without_biases(swin, biases):
    theirs = swin.ShiftedWindowAttention3d(8, [2, 3, 3], [1, 1, 1], 2, *biases)
    ours = sk.nn.ShiftedWindowAttention3d(8, [2, 3, 3], [1, 1, 1], 2, *biases)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 5, 5, 8)
    assert_close(ours(x), theirs(x), "window_attention_fp32")


def test_a_block_as_torchvisions(swin):
    from torchvision.models.swin_transformer import SwinTransformerBlock

    theirs = SwinTransformerBlock(
        16, 2, [2, 4, 4], [1, 2, 2], norm_layer=partial(nn.LayerNorm, eps=1e-5),
        attn_layer=swin.ShiftedWindowAttention3d,
    )  # fmt: skip
    ours = sk.nn.SwinBlock3d(16, 2, (2, 4, 4), (1, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 9, 7, 16)
    want, found = gradients(theirs, x), gradients(ours, x)
    for key in want:
        assert_close(found[key], want[key], "composition_fp32", name=key)


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    block = sk.nn.SwinBlock3d(8, 2, (2, 2, 2), (1, 1, 1), stochastic_depth_prob=0.5)
    x = torch.randn(64, 2, 2, 2, 8)
    changed = (block(x) != x).flatten(1).any(1)
    assert 0 < changed.sum() < 64
    block.eval()
    assert (block(x) != x).flatten(1).any(1).all()
    with pytest.raises(ValueError, match=r"stochastic_depth_prob: expected \[0, 1\), got 1"):
        sk.nn.SwinBlock3d(8, 2, (2, 2, 2), (1, 1, 1), stochastic_depth_prob=1)


@pytest.mark.parametrize("kind", ["time", "space", "rows"])
def test_divided_attention_is_attention_along_an_axis(kind):
    """Against torch's own multi-head attention over the folded axes."""
    T, H, W, C = 3, 4, 5, 8
    window = {"time": (T, 1, 1), "space": (1, H, W), "rows": (1, 1, W)}[kind]
    ours = sk.nn.WindowAttention3d(C, window, 2, relative_bias=False)
    stock = nn.MultiheadAttention(C, 2, batch_first=True)
    with torch.no_grad():
        stock.in_proj_weight.copy_(ours.qkv.weight)
        stock.in_proj_bias.copy_(ours.qkv.bias)
        stock.out_proj.weight.copy_(ours.proj.weight)
        stock.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(2, T, H, W, C)
    order = {"time": (0, 2, 3, 1, 4), "space": (0, 1, 2, 3, 4), "rows": (0, 1, 2, 3, 4)}[kind]
    moved = x.permute(order)
    rows = moved.reshape(-1, {"time": T, "space": H * W, "rows": W}[kind], C)
    want = stock(rows, rows, rows, need_weights=False)[0].view(moved.shape)
    back = want.permute([order.index(d) for d in range(5)])
    assert_close(ours(x), back, "composition_fp32")


def test_a_causal_module_does_not_see_the_future():
    module = sk.nn.WindowAttention3d(8, (3, 2, 2), 2, (1, 1, 1), causal_t=True)
    x = torch.randn(1, 7, 5, 4, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_autocast_in_training(swin):
    """No further from fp64 than torchvision's module under the same autocast; parameters keep fp32 gradients."""
    theirs = swin.ShiftedWindowAttention3d(16, [2, 4, 4], [1, 2, 2], 2)
    ours = sk.nn.ShiftedWindowAttention3d(16, (2, 4, 4), (1, 2, 2), 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 9, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        want, found = gradients(theirs, x), gradients(ours, x)
    truth = gradients(theirs.double(), x.double())
    for key in want:
        assert found[key].dtype == want[key].dtype
        assert_within_2x(found[key], want[key], truth[key], name=key, storage=torch.bfloat16)


def test_dropout_of_weights_and_output():
    module = sk.nn.ShiftedWindowAttention3d(
        8, (2, 3, 3), (1, 1, 1), 2, attention_dropout=0.5, dropout=0.5
    )
    x = torch.randn(2, 3, 7, 7, 8)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(0)
    first = module(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), module(x))


def test_several_clip_sizes_in_one_graph():
    torch._dynamo.reset()
    module = sk.nn.ShiftedWindowAttention3d(8, (2, 3, 3), (1, 1, 1), 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for size in ((3, 5, 7), (2, 4, 9), (4, 7, 11)):
        x = torch.randn(2, *size, 8)
        assert_close(compiled(x), module(x), "composition_fp32")
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # within the first call Dynamo may start afresh


def test_repr_and_errors():
    module = sk.nn.WindowAttention3d(8, (2, 3, 3), 2, border="ragged")
    assert module.extra_repr() == (
        "window_size=(2, 3, 3), shift_size=(0, 0, 0), num_heads=2, bias_index='exact', border='ragged', "
        "pad='mask'"
    )
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim 8, got 3"):
        sk.nn.ShiftedWindowAttention3d(8, (2, 3, 3), (0, 0, 0), 3)
    with pytest.raises(ValueError, match="shift_size must be less than window_size"):
        sk.nn.ShiftedWindowAttention3d(8, (2, 3, 3), (2, 0, 0), 2)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, H, W, 8\], got \(2, 3, 8\)"):
        module(torch.zeros(2, 3, 8))
