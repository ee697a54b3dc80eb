from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sora_kernels as sk
from sora_kernels.testing import assert_close


def pair(*args, act=None, backend=None, **kwargs):
    """Ours and torch's modules with one state."""
    ours = sk.nn.ConvBNAct3d(*args, backend=backend, **kwargs)
    of_bn = {"eps", "momentum", "affine", "track_running_stats"}
    bn_options = {k: kwargs.pop(k) for k in of_bn & set(kwargs)}
    kwargs.pop("activation", None)
    conv, bn = nn.Conv3d(*args, **kwargs), nn.BatchNorm3d(args[1], **bn_options)
    stock = nn.Sequential(conv, bn, act or nn.ReLU())
    if ours.bn.affine:
        nn.init.uniform_(ours.bn.weight, 0.5, 1.5)
        nn.init.normal_(ours.bn.bias)
    state = ours.state_dict()
    stock.load_state_dict(
        {k.replace("conv.", "0.").replace("bn.", "1."): v for k, v in state.items()}
    )
    return ours, stock


VARIANTS = {
    "default": {},
    "no bias": dict(bias=False),
    "not affine": dict(affine=False),
    "no running statistics": dict(track_running_stats=False),
    "cumulative average": dict(momentum=None),
    "eps and momentum": dict(eps=1e-3, momentum=0.001),
    "strided, dilated, grouped": dict(stride=(1, 2, 1), dilation=(2, 1, 1), groups=2),
    "same": dict(padding="same"),
    "replicate": dict(padding=(2, 1, 0), padding_mode="replicate"),
    "silu": dict(activation="silu"),
    "identity": dict(activation=None),
}
ACTS = {"silu": nn.SiLU(), "identity": nn.Identity()}


INTERPRETED = ("default", "no running statistics", "strided, dilated, grouped", "silu")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, None) for name in VARIANTS),
        *(pytest.param(name, "hybrid", marks=pytest.mark.triton) for name in INTERPRETED),
    ],
)
def test_three_steps_then_evaluation(name, backend):
    """Parameters, buffers and outputs stay with torch's modules through training and evaluation."""
    options = {"padding": 1} | VARIANTS[name]
    ours, stock = pair(4, 6, 3, act=ACTS.get(name), backend=backend, **options)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, stock)]
    for step in range(3):
        x = torch.randn(2 + step, 4, 5, 6, 5)
        for module, optimiser in zip((ours, stock), optimisers, strict=True):
            optimiser.zero_grad()
            module(x).square().mean().backward()
            optimiser.step()
    theirs = dict(stock.state_dict())
    for key, value in ours.state_dict().items():
        other = theirs[key.replace("conv.", "0.").replace("bn.", "1.")]
        assert_close(value, other, "composition_fp32", name=key)
    x = torch.randn(2, 4, 5, 6, 5)
    assert_close(ours.eval()(x), stock.eval()(x), "composition_fp32", name="evaluation")
    before = copy.deepcopy(ours.state_dict())
    ours(x)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} moved in evaluation"


def test_state_dicts_load_both_ways_strictly():
    class Stock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)

    ours, stock = sk.nn.ConvBNAct3d(3, 4, 3), Stock()
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(stock.state_dict())


def test_from_modules_shares_the_parameters():
    conv, bn = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4).eval()
    ours = sk.nn.ConvBNAct3d.from_modules(conv, bn, nn.LeakyReLU(0.2))
    assert ours.conv is conv and ours.bn is bn and not ours.training
    x = torch.randn(1, 3, 2, 4, 4)
    want = nn.functional.leaky_relu(bn(conv(x)), 0.2)
    assert_close(ours(x), want, "composition_fp32")
    assert sk.nn.ConvBNAct3d.from_modules(conv, bn).activation is None
    for arguments, message in (
        ((nn.Conv2d(3, 4, 3), bn), "conv: expected nn.Conv3d, got Conv2d"),
        ((conv, nn.BatchNorm2d(4)), "bn: expected nn.BatchNorm3d"),
        ((conv, bn, nn.GELU()), "act: expected ReLU"),
    ):
        with pytest.raises(TypeError, match=message):
            sk.nn.ConvBNAct3d.from_modules(*arguments)
    with pytest.raises(ValueError, match="bn: expected 4 features, got 5"):
        sk.nn.ConvBNAct3d.from_modules(conv, nn.BatchNorm3d(5))
    with pytest.raises(ValueError, match="padding_mode 'zeros' or 'replicate', got 'circular'"):
        circular = nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular")
        sk.nn.ConvBNAct3d.from_modules(circular, bn)


def test_asymmetric_padding_makes_a_causal_block():
    block = sk.nn.ConvBNAct3d(3, 4, 3, padding=((2, 0), (1, 1), (1, 1))).eval()
    x = torch.randn(1, 3, 6, 4, 4)
    whole = block(x)
    x[:, :, 4:] += 1.0
    changed = block(x)
    assert whole.shape == (1, 4, 6, 4, 4)
    assert torch.equal(whole[:, :, :4], changed[:, :, :4])
    assert not torch.equal(whole[:, :, 4:], changed[:, :, 4:])


def test_residual_copy_pickle_and_repr():
    block = sk.nn.ConvBNAct3d(3, 3, 3, padding="same", activation="leaky_relu", negative_slope=0.2)
    x = torch.randn(2, 3, 4, 5, 6)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other.eval()(x, residual=x), copy.deepcopy(block).eval()(x, residual=x))
    text = repr(block)
    assert "activation='leaky_relu', negative_slope=0.2" in text
    assert "(conv): Conv3d(3, 3" in text and "(bn): BatchNorm3d(3" in text


def test_half_precision_module_and_device_arguments():
    block = sk.nn.ConvBNAct3d(3, 4, 3, padding=1, dtype=torch.bfloat16, device="cpu")
    z = block(torch.randn(2, 3, 2, 4, 4, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16 and block.bn.weight.dtype == torch.bfloat16
    assert sk.nn.ConvBNAct3d(3, 4, 1, device="meta").conv.weight.is_meta


def test_constructor_errors():
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros' or 'replicate', got 'reflect'"):  # fmt: skip
        sk.nn.ConvBNAct3d(3, 4, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match="activation: expected one of .* got 'gelu'"):
        sk.nn.ConvBNAct3d(3, 4, 3, activation="gelu")
