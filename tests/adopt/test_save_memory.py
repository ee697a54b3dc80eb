"""``sk.save_memory()``: what is kept, and that gradients do not change."""

from __future__ import annotations

import contextlib
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks as hooks
from torch.utils.checkpoint import checkpoint

import sora_kernels as sk
from sora_kernels.ops.conv3d_bn_act import recipes
from sora_kernels.testing import assert_close

SHAPE = (2, 8, 4, 12, 12)
BACKENDS = (pytest.param("hybrid", marks=pytest.mark.triton), "torch", "reference")


class Chain(nn.Module):
    def __init__(self, length=6, activation="relu", backend=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            sk.nn.ConvBNAct3d(
                8, 8, 3, padding=1, bias=False, activation=activation, backend=backend
            )
            for _ in range(length)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Module):
    def __init__(self, length=4):
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.ModuleList(sk.nn.ConvBNAct3d(8, 8, 3, padding=1, bias=False) for _ in range(2))
            for _ in range(length)
        )

    def forward(self, x):
        for first, second in self.pairs:
            x = second(first(x), residual=x)
        return x


def kept(run, monkeypatch, saving) -> int:
    """Bytes of the distinct activations, by storage, that ``run()`` keeps for backward."""
    module = sys.modules["sora_kernels.adopt.save_memory"]
    pack, found = module._pack, {}

    def counting(t):
        value = pack(t) if saving else t
        held = value.y if isinstance(value, recipes.Recipe) else value
        if held.dim() == 5 and not isinstance(t, nn.Parameter):
            found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        return value

    monkeypatch.setattr(module, "_pack", counting)
    with sk.save_memory() if saving else hooks(counting, lambda t: t):
        out = run()
    monkeypatch.undo()
    del out
    return sum(found.values())


def gradients(model, x, saving, loss=lambda z: z.square().sum()):
    x = x.clone().requires_grad_()
    with sk.save_memory() if saving else contextlib.nullcontext():
        z = model(x)
    return torch.autograd.grad(loss(z), [x, *model.parameters()])


@pytest.mark.parametrize(
    ("model", "most"),
    [(Chain(), Fraction(55, 100)), (Residual(), Fraction(13, 17))],
    ids=["chain", "residual"],
)
def test_kept_activations(monkeypatch, model, most):
    """Against the stock modules, in place where torch can be, and against ourselves."""
    x = torch.randn(SHAPE, requires_grad=True)
    ours = kept(lambda: model(x), monkeypatch, True)
    plain = kept(lambda: model(x), monkeypatch, False)
    stock = kept(lambda: stock_of(model)(x), monkeypatch, False)
    assert plain == stock
    assert Fraction(ours, stock) <= most, f"{ours} of {stock} bytes"


def stock_of(model):
    """The same network of nn.Conv3d, nn.BatchNorm3d and F.relu in place."""

    def block(b, x, residual=None):
        y = F.conv3d(x, b.conv.weight, None, 1, 1)
        y = F.batch_norm(y, None, None, b.bn.weight, b.bn.bias, True)
        return F.relu(y if residual is None else y + residual, inplace=True)

    def chain(x):
        for b in model.blocks:
            x = block(b, x)
        return x

    def residual(x):
        for first, second in model.pairs:
            x = block(second, block(first, x), x)
        return x

    return chain if isinstance(model, Chain) else residual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_gradients_do_not_change(backend, activation):
    model = Chain(3, activation, backend)
    x = torch.randn(2, 8, 2, 5, 6)
    for format_ in (torch.contiguous_format, torch.channels_last_3d):
        inputs = x.contiguous(memory_format=format_)
        want, got = (gradients(model, inputs, saving) for saving in (False, True))
        for w, g in zip(want, got, strict=True):
            if backend == "hybrid" and activation != "relu":
                assert torch.equal(w, g)
            assert_close(g, w, "composition_fp32")


def test_frozen_blocks_keep_neither_y_nor_more_than_stock(monkeypatch):
    """Running statistics: x and z alone, with or without save_memory."""
    model = Chain().eval()
    x = torch.randn(SHAPE, requires_grad=True)
    one = x.numel() * x.element_size()
    assert kept(lambda: model(x), monkeypatch, False) == (1 + len(model.blocks)) * one


def test_an_output_for_several_consumers():
    block = sk.nn.ConvBNAct3d(8, 8, 1)
    weights = [torch.randn(8, 8, 1, 1, 1, requires_grad=True) for _ in range(3)]
    x = torch.randn(2, 8, 2, 4, 4)

    def found(saving):
        with sk.save_memory() if saving else contextlib.nullcontext():
            z = block(x)
            total = sum(F.conv3d(z, w).square().sum() for w in weights) + z.square().sum()
        return torch.autograd.grad(total, [*weights, *block.parameters()])

    for w, g in zip(found(False), found(True), strict=True):
        assert_close(g, w, "composition_fp32")


def test_an_output_changed_in_place_is_kept():
    block, weight = sk.nn.ConvBNAct3d(8, 8, 1), torch.randn(8, 8, 1, 1, 1, requires_grad=True)
    x = torch.randn(2, 8, 2, 4, 4)

    def loss(saving):
        with sk.save_memory() if saving else contextlib.nullcontext():
            z = block(x)
            z += 1.0
            out = F.conv3d(z, weight)
        return torch.autograd.grad(out.square().sum(), weight)[0]

    assert torch.equal(loss(True), loss(False))


def test_a_parameter_changed_before_backward_is_refused():
    model = Chain(2)
    x = torch.randn(2, 8, 2, 4, 4)
    with sk.save_memory():
        z = model(x)
    with torch.no_grad():
        model.blocks[0].bn.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_an_address_used_again_is_not_mistaken():
    """Outputs that died leave nothing behind; what comes to lie at their address is kept as it is."""
    block, weight = sk.nn.ConvBNAct3d(8, 8, 1), torch.randn(8, 8, 1, 1, 1, requires_grad=True)
    x = torch.randn(2, 8, 2, 4, 4, requires_grad=True)
    with sk.save_memory():
        for _ in range(20):
            z = block(x)
            shape = z.shape
            del z
            assert not recipes._RECIPES
            t = torch.randn(shape, requires_grad=True)
            (grad,) = torch.autograd.grad(F.conv3d(t, weight).square().sum(), weight)
            (want,) = torch.autograd.grad(F.conv3d(t.clone(), weight).square().sum(), weight)
            assert torch.equal(grad, want)


def test_with_checkpoint_and_nested():
    model = Chain(3)
    x = torch.randn(2, 8, 2, 5, 6)
    want = gradients(model, x, False)

    def in_pieces(t):
        with sk.save_memory():
            return checkpoint(model, t, use_reentrant=False)

    in_pieces.parameters = model.parameters  # type: ignore[attr-defined]
    for w, g in zip(want, gradients(in_pieces, x, True), strict=True):
        assert_close(g, w, "composition_fp32")


def test_compiled_code_is_left_alone():
    torch._dynamo.reset()
    model = Chain(2)
    x = torch.randn(2, 8, 2, 5, 6)
    compiled = torch.compile(model, backend="aot_eager")
    want = gradients(model, x, False)
    with sk.save_memory():
        got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for w, g in zip(want[1:], got, strict=True):
        assert_close(g, w, "composition_fp32")


def test_tensors_without_an_address_pass():
    block = sk.nn.ConvBNAct3d(8, 8, 1)
    x = torch.randn(2, 8, 2, 4, 4)
    with sk.save_memory():
        z = block(x)
        meta = torch.randn(3, device="meta", requires_grad=True).exp()
        sparse = (torch.eye(3).to_sparse().requires_grad_() * 2).sum()
        z.sum().backward()
    sparse.backward()
    assert meta.requires_grad and block.conv.weight.grad is not None


def test_nothing_is_recorded_outside():
    z = sk.nn.ConvBNAct3d(8, 8, 1)(torch.randn(2, 8, 2, 4, 4))
    assert z.requires_grad and not recipes._RECIPES
