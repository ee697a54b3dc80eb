"""The networks of the benchmarks: as published, and the same function in both builds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sora_kernels as sk
from benchmarks import stacks
from sora_kernels.testing import assert_close, assert_within_2x

# Parameters with 400 classes: torchvision's, and for X3D-M PyTorchVideo's.
PARAMETERS = {"r3d_18": 33_371_472, "r2plus1d_18": 31_505_325, "x3d_m": 3_794_274}


def convolutions(model: nn.Module) -> list[nn.Conv3d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv3d)]


@pytest.mark.parametrize("kind", ["torch", "sora"])
@pytest.mark.parametrize("name", stacks.STACKS)
def test_it_is_the_published_network(name, kind):
    with torch.device("meta"):
        model = stacks.build(name, kind)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_widths_that_no_vector_load_fits():
    """What these networks are measured for."""
    with torch.device("meta"):
        found = {name: convolutions(stacks.build(name, "torch")) for name in stacks.STACKS}
    assert {45, 144, 230, 460, 921} <= {conv.out_channels for conv in found["r2plus1d_18"]}
    depthwise = [conv for conv in found["x3d_m"] if conv.groups > 1]
    assert {conv.groups for conv in depthwise} == {24, 54, 108, 216, 432}
    assert len(depthwise) == 1 + 3 + 5 + 11 + 7
    assert all(conv.in_channels == conv.groups == conv.out_channels for conv in depthwise)


@pytest.mark.parametrize("name", stacks.STACKS)
def test_builds_share_their_description(name):
    stock, ours = (stacks.build(name, kind, width=0.125) for kind in ("torch", "sora"))
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (stock, ours)]
    assert shapes[0] == shapes[1]
    fused = [m for m in ours.modules() if isinstance(m, sk.nn.ConvBNAct3d)]
    norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm3d)]
    assert len(fused) == len(norms)
    assert not any(isinstance(m, stacks.Stock) for m in ours.modules())
    for a, b in zip(convolutions(stock), convolutions(ours), strict=True):
        assert (a.stride, a.padding, a.groups) == (b.stride, b.padding, b.groups)


def run(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, every gradient and, where training, what became of the buffers."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    wanted = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(out, list(wanted.values()), dy)
    found = {"output": out.detach()}
    found |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return found | {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("name", stacks.STACKS)
def test_builds_agree(name, mode, layout):
    """In fp64, where nothing but the order of sums may differ."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 32, 32).double().to(memory_format=layout)
    dy = torch.randn(2, 11).double()
    stock, ours = (
        stacks.build(name, kind, width=0.125, classes=11).double().to(memory_format=layout)
        for kind in ("torch", "sora")
    )
    stacks.settle(stock, x)
    ours.load_state_dict(stock.state_dict())
    before = {name: b.clone() for name, b in stock.named_buffers()}
    fresh = torch.randn_like(x)
    want, found = (run(m.train(mode == "train"), fresh, dy) for m in (stock, ours))
    assert list(want) == list(found)
    for key, value in want.items():
        assert_close(found[key], value, "transform_fp64", name=key)
    # Gradients that vanish and statistics that stand still would agree too.
    assert all(want[f"d{key}"].abs().max() > 0 for key, _ in stock.named_parameters())
    moved = {key for key, b in before.items() if not want[key].equal(b)}
    assert moved == (set(before) if mode == "train" else set())


@pytest.mark.parametrize("name", stacks.STACKS)
def test_inference_within_2x(name):
    """In fp32 without gradients, which goes ways of its own."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 32, 32).to(memory_format=torch.channels_last_3d)
    stock, ours = (
        stacks.build(name, kind, width=0.125).to(memory_format=torch.channels_last_3d)
        for kind in ("torch", "sora")
    )
    stacks.settle(stock, x)
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        found, plain = (m.eval()(x) for m in (ours, stock))
        assert_within_2x(found, plain, stock.double()(x.double()))


@pytest.mark.parametrize("name", stacks.STACKS)
def test_settled_networks_are_alive(name):
    """With torch's initial values an evaluated network of this depth answers with its biases alone."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 32, 32)
    model = stacks.build(name, "torch", width=0.125, classes=11)
    stacks.settle(model, x)
    assert model.training and all(
        m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm3d)
    )
    with torch.no_grad():
        one, two = model.eval()(x)
    assert (one - two).abs().max() > 0.01 * one.abs().max()
