"""``conv3d_bn_act`` in evaluation on the CPU: one convolution by oneDNN, and what it keeps beside the weights."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sora_kernels as sk
from sora_kernels.ops.conv3d_bn_act import kept, onednn, run
from sora_kernels.ops.conv3d_bn_act.options import Options
from sora_kernels.ops.conv3d_bn_act.window import Window
from sora_kernels.testing import assert_close, assert_within_2x

pytestmark = pytest.mark.skipif(
    not onednn.takes(torch.zeros(1)), reason="this torch has no oneDNN, or not the ops"
)

CHANNELS_LAST = torch.channels_last_3d
ACTIVATIONS = {
    None: lambda t: t,
    "relu": torch.relu,
    "silu": F.silu,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.01),
}
# in, out, kernel, stride, padding, groups
GEOMETRIES = {
    "dense": (6, 8, 3, 1, 1, 1),
    "strided depthwise": (8, 8, 3, 2, 1, 8),
    "pointwise": (6, 9, 1, 1, 0, 1),
    "stem": (3, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2), 1),
    "temporal, grouped": (8, 12, (3, 1, 1), 1, (1, 0, 0), 4),
    "one channel": (1, 1, 3, 1, 1, 1),
}


def module(geometry: str = "dense", activation: str | None = "relu") -> sk.nn.ConvBNAct3d:
    *sizes, groups = GEOMETRIES[geometry]
    made = sk.nn.ConvBNAct3d(*sizes, groups=groups, activation=activation)
    bn = made.bn
    for t in (bn.running_mean, bn.weight, bn.bias):
        nn.init.normal_(t)
    nn.init.uniform_(bn.running_var, 0.5, 2.0)
    return made.eval()


def stock(m: sk.nn.ConvBNAct3d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    out = m.bn(m.conv(x))
    return ACTIVATIONS[m.activation](out if residual is None else out + residual)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_as_the_stock_modules(dtype, geometry, activation, with_residual, memory_format):
    if not onednn.takes(torch.zeros(1, dtype=dtype)):
        pytest.skip("oneDNN has no bf16 on this CPU")
    m = module(geometry, activation).to(dtype)
    x = torch.randn(2, m.conv.in_channels, 4, 7, 9).to(dtype, memory_format=memory_format)
    residual = torch.randn_like(m.conv(x)) if with_residual else None
    exact = copy.deepcopy(m).double()
    truth = stock(exact, x.double(), None if residual is None else residual.double())
    z = m(x, residual)
    assert_within_2x(z, stock(m, x, residual), truth)
    assert z.is_contiguous(memory_format=memory_format)


@torch.no_grad()
def test_again_with_what_was_kept_and_other_sizes():
    m = module().to(memory_format=CHANNELS_LAST)
    for sizes in 2 * ((4, 7, 9), (5, 6, 7), (1, 3, 3), (2, 8, 8), (3, 9, 4), (6, 5, 5)):
        x = torch.randn(1, 6, *sizes).contiguous(memory_format=CHANNELS_LAST)
        assert_close(m(x), stock(m, x), "composition_fp32")
    assert len(kept.find(m.conv.weight).plans) == kept.PLANS


def training_of_the_stock_batch_norm(m: sk.nn.ConvBNAct3d) -> None:
    m.bn.train()
    m.bn(torch.randn(2, 8, 4, 4, 4) * 3 + 5)  # counts no version of its running statistics
    m.bn.eval()


WRITES = {
    "optimiser": lambda m: torch.optim.SGD(m.parameters(), 1.0, weight_decay=0.5).step(),
    "moving average through .data": lambda m: m.conv.weight.data.mul_(0.9).add_(0.1),
    "training of the stock batch norm": training_of_the_stock_batch_norm,
    "load_state_dict": lambda m: m.load_state_dict(module().state_dict()),
    "variance through .data": lambda m: m.bn.running_var.data.mul_(2),
    "bias": lambda m: m.conv.bias.add_(1),
    "weight put in another place": lambda m: setattr(
        m.conv, "weight", nn.Parameter(torch.randn_like(m.conv.weight))
    ),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "affine taken away": lambda m: setattr(m.bn, "weight", None),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_what_was_folded_is_dropped_when_its_source_is_written(write, memory_format):
    m = module().to(memory_format=memory_format)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    x = torch.randn(2, 6, 4, 5, 5).contiguous(memory_format=memory_format)
    before = m(x)
    WRITES[write](m)
    after = m(x)
    assert not torch.equal(before, after)
    assert_close(after, stock(m, x), "composition_fp32")


@torch.no_grad()
def test_what_was_folded_goes_with_the_weight():
    gc.collect()
    count = len(kept._FOLDED)
    m = module()
    m(torch.randn(1, 6, 4, 5, 5))
    assert len(kept._FOLDED) == count + 1
    del m
    gc.collect()
    assert len(kept._FOLDED) == count


def test_inference_mode():
    with torch.inference_mode():
        m, x = module(), torch.randn(1, 6, 4, 5, 5)
        before = m(x)
        m.conv.weight.mul_(2)
        assert_close(m(x), stock(m, x), "composition_fp32")
        assert not torch.equal(before, m(x))


@torch.no_grad()
def test_compiled_code_has_the_same_layout():
    m = module().to(memory_format=CHANNELS_LAST)
    compiled = torch.compile(lambda x: m(x) * 2, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(1, 6, 4, 5, 5), torch.zeros(0, 6, 4, 5, 5)):
        x = x.contiguous(memory_format=CHANNELS_LAST)
        ours, want = compiled(x), m(x) * 2
        assert torch.equal(ours, want) and ours.stride() == want.stride()


def refusing(m: sk.nn.ConvBNAct3d) -> None:
    """Makes what is kept beside m's weight unusable."""

    def refuse(*_):
        pytest.fail("this call is not oneDNN's")

    folded = kept.find(m.conv.weight)
    assert folded._calls, "nothing was remembered"
    folded._calls = dict.fromkeys(folded._calls, refuse)
    folded.plans = dict.fromkeys(folded.plans, refuse)


@torch.no_grad()
def test_where_it_is_not_asked_for(monkeypatch):
    m, x = module(), torch.randn(1, 6, 4, 5, 5)
    want = stock(m, x)
    m(x)
    refusing(m)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(m(x), want, "composition_fp32")
    m.backend = "reference"
    assert_close(m(x), want, "composition_fp32")
    m.backend = None
    monkeypatch.setenv("SORA_BACKEND", "conv3d_bn_act=reference")
    assert_close(m(x), want, "composition_fp32")
    monkeypatch.delenv("SORA_BACKEND")
    with torch.enable_grad():
        assert_close(m(x).detach(), want, "composition_fp32")
    assert m.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@torch.no_grad()
def test_a_known_call_takes_the_short_way(monkeypatch, memory_format):
    m = module().to(memory_format=memory_format)
    x, other = torch.randn(2, 1, 6, 4, 5, 5).unbind()
    x = x.contiguous(memory_format=memory_format)
    residual = torch.randn_like(m.conv(x))
    m(x), m(x, residual)
    monkeypatch.setattr(run, "forward", lambda *_: pytest.fail("a known call"))
    assert_close(m(x), stock(m, x), "composition_fp32")
    assert_close(m(x, residual), stock(m, x, residual), "composition_fp32")
    before = residual.clone()
    assert m(x, residual).data_ptr() != residual.data_ptr() and torch.equal(residual, before)
    with torch.enable_grad():
        frozen = m.requires_grad_(False)
        assert_close(frozen(x), stock(m, x), "composition_fp32")
    monkeypatch.undo()
    assert_close(m(other), stock(m, other), "composition_fp32")  # another layout, or other values


@torch.no_grad()
def test_a_known_call_is_still_checked():
    m, x = module(), torch.randn(1, 6, 4, 5, 5)
    residual = torch.randn_like(m.conv(x))
    m(x), m(x, residual)
    refusing(m)
    for arguments, message in (
        ((x.double(),), "weight: expected torch.float64"),
        ((x[:, :5],), "x: expected 6 channels"),
        ((x.to("meta"),), "weight: expected torch.float32 on meta"),
        ((x, residual[:, :7]), "residual: expected"),
        ((x, residual.bfloat16()), "residual: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            m(*arguments)
    m.activation = "gelu"
    with pytest.raises(ValueError, match="activation: expected one of"):
        m(x)
    m.activation, m.conv.groups = "relu", 5
    with pytest.raises(ValueError, match="groups: expected a divisor"):
        m(x)


@torch.no_grad()
def test_a_known_call_is_seen_by_whoever_looks_on():
    m, x = module(), torch.randn(1, 6, 4, 5, 5)
    want = m(x)
    with torch.profiler.profile() as profile:
        assert torch.equal(m(x), want)
    assert "sora_kernels::conv3d_bn_act" in {event.name for event in profile.events()}
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        assert torch.equal(m(x), want)
    assert torch.ops.sora_kernels.conv3d_bn_act.default in seen
    with torch.autocast("cpu", torch.bfloat16):
        assert m(x).dtype == torch.bfloat16
    stacked = torch.stack([x, 2 * x])
    assert_close(torch.func.vmap(m)(stacked)[1], m(2 * x), "composition_fp32")


@torch.no_grad()
def test_a_window_equal_to_the_known_one_is_not_padded_twice():
    m, x = module(), torch.randn(1, 6, 4, 5, 5)
    window = Window((3, 3, 3), before=(1, 1, 1), after=(1, 1, 1))
    options = Options("none", "relu", 0.01, 0.0, 0.0)
    arguments = (x, m.conv.weight, m.conv.bias, None, None, None, None, None)
    for own in (window, Window(*window)):
        z = onednn.forward(*arguments, own, options, torch.contiguous_format)
        assert_close(z, m.conv(x).relu(), "composition_fp32")


@torch.no_grad()
def test_lists_are_no_keys_and_no_errors():
    m, x = module(), torch.randn(1, 6, 4, 5, 5)
    for _ in range(2):
        z = sk.conv3d_act(x, m.conv.weight, m.conv.bias, stride=[1, 1, 1], padding=[1, 1, 1])
        assert_close(z, m.conv(x).relu(), "composition_fp32")
