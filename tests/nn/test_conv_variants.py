"""ConvAct3d, ConvTransposeBNAct3d and CausalConvBNAct3d beside the stock modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sora_kernels as sk
from sora_kernels.testing import assert_close


def both(ours, stock, x, *args, steps=2):
    """Some steps of training, then evaluation, through both modules; states of one layout."""
    stock.load_state_dict(ours.state_dict())
    optimisers = [torch.optim.SGD(m.parameters(), 0.05) for m in (ours, stock)]
    for _ in range(steps):
        for module, optimiser in zip((ours, stock), optimisers, strict=True):
            optimiser.zero_grad()
            module(x, *args).square().mean().backward()
            optimiser.step()
    for key, value in stock.state_dict().items():
        assert_close(ours.state_dict()[key], value, "composition_fp32", name=key)
    want = stock.eval()(x, *args)
    assert_close(ours.eval()(x, *args), want, "composition_fp32", name="evaluation")
    with torch.no_grad():
        assert_close(ours(x, *args), want, "composition_fp32", name="without gradients")


class Stock(nn.Module):
    def __init__(self, conv, bn=None, activation=F.relu):
        super().__init__()
        self.conv, self.activation = conv, activation
        if bn is not None:
            self.bn = bn

    def forward(self, x, *args):
        y = self.conv(x, *args)
        return self.activation(self.bn(y) if hasattr(self, "bn") else y)


TRANSPOSED = {
    "default": dict(),
    "stride 2": dict(stride=2, bias=False),
    "grouped": dict(stride=(1, 2, 2), padding=1, output_padding=(0, 1, 1), groups=2, dilation=(2, 1, 1)),
    "silu": dict(activation="silu"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_transpose(name, channels_last):
    options = dict(TRANSPOSED[name])
    ours = sk.nn.ConvTransposeBNAct3d(4, 6, 3, **options)
    activation = {"silu": F.silu}.get(options.pop("activation", ""), F.relu)
    stock = Stock(nn.ConvTranspose3d(4, 6, 3, **options), nn.BatchNorm3d(6), activation)
    x = torch.randn(2, 4, 3, 5, 4)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    both(ours, stock, x)
    shared = sk.nn.ConvTransposeBNAct3d.from_modules(stock.conv, stock.bn, nn.SiLU())
    assert shared.conv is stock.conv and not shared.training
    assert_close(shared(x), F.silu(stock.bn(stock.conv(x))), "composition_fp32")


def test_conv_transpose_to_a_size():
    ours = sk.nn.ConvTransposeBNAct3d(4, 6, 3, stride=2)
    stock = Stock(nn.ConvTranspose3d(4, 6, 3, stride=2), nn.BatchNorm3d(6))
    x = torch.randn(2, 4, 3, 5, 4)
    both(ours, stock, x, [8, 11, 10])
    assert ours(x, (8, 12, 9)).shape[2:] == (8, 12, 9)
    with pytest.raises(ValueError, match="output size"):
        ours(x, (3, 3, 3))
    residual = torch.randn(2, 6, 7, 11, 9)
    want = F.relu(stock.bn(stock.conv(x)) + residual)
    assert_close(ours(x, residual=residual), want, "composition_fp32")


@pytest.mark.parametrize("padding", [1, "same", (2, 0, 1)], ids=str)
def test_conv_act(padding):
    ours = sk.nn.ConvAct3d(4, 6, 3, padding=padding, padding_mode="replicate")
    stock = Stock(nn.Conv3d(4, 6, 3, padding=padding, padding_mode="replicate"))
    x = torch.randn(2, 4, 3, 5, 4)
    both(ours, stock, x)
    shared = sk.nn.ConvAct3d.from_modules(stock.conv, nn.LeakyReLU(0.3))
    assert_close(shared(x), F.leaky_relu(stock.conv(x), 0.3), "composition_fp32")
    assert "activation='leaky_relu', negative_slope=0.3" in repr(shared)
    with pytest.raises(TypeError, match="conv: expected nn.Conv3d, got Linear"):
        sk.nn.ConvAct3d.from_modules(nn.Linear(2, 2))


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("stride", [1, (2, 1, 1)])
@pytest.mark.parametrize("dilation", [1, (2, 1, 1)])
def test_frame_by_frame_equals_the_whole_clip(padding_mode, stride, dilation):
    first = sk.nn.CausalConvBNAct3d(3, 5, 3, stride, 1, dilation, padding_mode=padding_mode)
    second = sk.nn.CausalConvBNAct3d(5, 5, (2, 3, 1), padding=((1, 1), (0, 0)), activation="silu")
    for block in (first, second):
        block.bn.running_mean.normal_()
        block.eval()
    clip = torch.randn(2, 3, 12, 6, 5)
    whole = second(first(clip))
    s = first.conv.stride[0]
    for pieces in ([s] * (12 // s), [4, 2, 6]):
        caches, found = [None, None], []
        with torch.no_grad():
            for frames in clip.split(pieces, 2):
                z, caches[0] = first.step(frames, caches[0])
                z, caches[1] = second.step(z, caches[1])
                found.append(z)
        assert_close(torch.cat(found, 2), whole, "composition_fp32")
    changed = clip.clone()
    changed[:, :, 8:] += 1
    seen = 8 // s
    assert torch.equal(second(first(changed))[:, :, :seen], whole[:, :, :seen])


def test_a_step_keeps_only_its_frames_and_takes_a_residual():
    block = sk.nn.CausalConvBNAct3d(4, 4, (3, 1, 1)).eval()
    x = torch.randn(1, 4, 9, 3, 3)
    z, cache = block.step(x, residual=x)
    assert_close(z, block(x, residual=x), "composition_fp32")
    assert cache.shape == (1, 4, 2, 3, 3) and torch.equal(cache, x[:, :, -2:])
    assert cache.untyped_storage().nbytes() == cache.numel() * 4
    pointwise = sk.nn.CausalConvBNAct3d(4, 4, 1).eval()
    z, cache = pointwise.step(x)
    assert torch.equal(z, pointwise(x)) and cache.shape[2] == 0
    copied = copy.deepcopy(block)
    assert torch.equal(copied.step(x)[0], block.step(x)[0])


def test_causal_errors():
    block, x = sk.nn.CausalConvBNAct3d(4, 4, 3, stride=(2, 1, 1)), torch.randn(1, 4, 4, 3, 3)
    with pytest.raises(RuntimeError, match="step: expected evaluation mode"):
        block.step(x)
    block.eval()
    for frames in (x[:, :, :3], x[:, :, :0], x[0]):
        with pytest.raises(ValueError, match="x: expected .* multiple of the stride 2"):
            block.step(frames)
    with pytest.raises(
        ValueError, match=r"cache: expected \(1, 4, 2, 3, 3\), got \(1, 4, 4, 3, 3\)"
    ):
        block.step(x, x)
    with pytest.raises(ValueError, match=r"padding: expected an int, \(h, w\)"):
        sk.nn.CausalConvBNAct3d(4, 4, 3, padding=(1, 1, 1))
    with pytest.raises(TypeError, match="pads both ends of time"):
        sk.nn.CausalConvBNAct3d.from_modules(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4))
