"""Weights of ``sk.nn.LSTM``, ``GRU`` and ``RNN``: changed, shared, moved, copied, stored; the next call sees it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import sora_kernels as sk
from sora_kernels.testing import assert_close


class Beside:
    """Ours, and torch's module with whatever weights ours has at the moment."""

    def __init__(self, kind, **options) -> None:
        self.kind = kind
        self.ours, self.theirs = kind.pair(**options)
        self.x = torch.randn(5, 3, 4, dtype=torch.float64)
        self.packed = pack_sequence([self.x[:, 0], self.x[:3, 1]], enforce_sorted=False)

    def check(self, module=None) -> None:
        ours = self.ours if module is None else module
        state = {name: getattr(ours, name).detach() for name in ours._flat_weights_names}
        self.theirs.load_state_dict(state)
        for x in (self.x, self.packed):
            self.kind.assert_same(ours(x), self.theirs(x))


@pytest.fixture
def beside(kind) -> Beside:
    return Beside(kind, num_layers=2)


def test_assignment_and_writing_in_place(beside):
    ours = beside.ours
    ours.weight_hh_l0 = nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    assert ours._flat_weights[1] is ours.weight_hh_l0
    beside.check()
    with torch.no_grad():
        ours.bias_ih_l1.add_(1)
    beside.check()
    ours.weight_ih_l0.data = torch.randn_like(ours.weight_ih_l0)
    beside.check()
    nn.init.orthogonal_(ours.weight_hh_l1)
    beside.check()
    optimizer = torch.optim.SGD(ours.parameters(), 0.5)
    ours(beside.x)[0].square().sum().backward()
    optimizer.step()
    beside.check()


def test_loading(beside):
    ours = beside.ours
    other = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    for assign in (False, True):
        ours.load_state_dict({name: p.clone() for name, p in other.items()}, assign=assign)
        beside.check()
        assert torch.equal(ours.weight_ih_l0, other["weight_ih_l0"])
        other = {name: torch.randn_like(p) for name, p in other.items()}


def test_parametrisations(beside):
    ours = beside.ours
    parametrizations.weight_norm(ours, "weight_hh_l0")
    with torch.no_grad():
        ours.parametrizations.weight_hh_l0.original0.mul_(2)
    beside.check()
    parametrizations.orthogonal(ours, "weight_ih_l0")
    beside.check()
    ours(beside.x)[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0
    with parametrize.cached():
        beside.check()
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    beside.check()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_made_by_hooks(beside):
    """The older weight_norm, and pruning: the weight is an attribute that a pre-hook computes."""
    ours = beside.ours
    nn.utils.weight_norm(ours, "weight_hh_l0")
    with torch.no_grad():
        ours.weight_hh_l0_g.mul_(2)
    ours(beside.x)
    beside.check()
    nn.utils.remove_weight_norm(ours, "weight_hh_l0")
    beside.check()
    prune.random_unstructured(ours, "weight_ih_l1", amount=0.5)
    assert (ours.weight_ih_l1 == 0).any()
    beside.check()
    prune.remove(ours, "weight_ih_l1")
    beside.check()


def test_functional_call(beside):
    ours, theirs, x = beside.ours, beside.theirs, beside.x
    swapped = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    theirs.load_state_dict(swapped)
    beside.kind.assert_same(torch.func.functional_call(ours, swapped, (x,)), theirs(x))
    beside.kind.assert_same(
        torch.func.functional_call(ours, swapped, (beside.packed,)), theirs(beside.packed)
    )
    one = {"weight_hh_l1": swapped["weight_hh_l1"]}
    theirs.load_state_dict({name: p.detach() for name, p in ours.named_parameters()} | one)
    beside.kind.assert_same(torch.func.functional_call(ours, one, (x,)), theirs(x))
    beside.check()


def test_tied_weights(beside):
    ours = beside.ours
    ours.weight_hh_l1 = ours.weight_hh_l0
    assert len([*ours.parameters()]) == len(ours._flat_weights) - 1
    beside.check()
    ours(beside.x)[0].square().sum().backward()
    beside.theirs(beside.x)[0].square().sum().backward()
    both = beside.theirs.weight_hh_l0.grad + beside.theirs.weight_hh_l1.grad
    beside.kind.assert_same(ours.weight_hh_l0.grad, both)
    shared = beside.kind.ours.from_torch(ours.to_torch())
    assert shared.weight_hh_l1 is shared.weight_hh_l0
    copied = copy.deepcopy(ours)
    assert copied.weight_hh_l1 is copied.weight_hh_l0 is not ours.weight_hh_l0


def test_frozen_weights(beside):
    ours, x = beside.ours, beside.x.clone().requires_grad_()
    ours.requires_grad_(False)
    ours.weight_hh_l0.requires_grad_()
    loss = beside.kind.flat(ours(x))[0].square().sum()
    dx, dw = torch.autograd.grad(loss, [x, ours.weight_hh_l0], retain_graph=True)
    loss.backward()
    beside.theirs.load_state_dict(ours.state_dict())
    own = beside.theirs
    own_loss = own(x)[0].square().sum()
    wanted = torch.autograd.grad(own_loss, [x, own.weight_hh_l0])
    beside.kind.assert_same([dx, dw], wanted)
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == ["weight_hh_l0"]


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(beside, how):
    ours = beside.ours
    ours.backend, ours.memory, ours.dropout = "reference", "recompute", 0.25
    copied = COPIES[how](ours.eval())
    assert type(copied) is type(ours) and repr(copied) == repr(ours)
    assert (copied.backend, copied.memory, copied.training) == ("reference", "recompute", False)
    copied.backend = None
    beside.check(copied)
    if how == "copy":
        assert copied.weight_hh_l0 is ours.weight_hh_l0
        return
    with torch.no_grad():
        copied.weight_hh_l0.zero_()
    beside.check(copied)
    beside.check(ours)
    assert ours.weight_hh_l0.abs().sum() > 0
    copied(beside.x)[0].sum().backward()
    assert ours.weight_hh_l0.grad is None


def test_casts_and_devices(beside):
    ours, x = beside.ours, beside.x
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours.to(dtype)
        assert {t.dtype for t in beside.kind.flat(ours(x.to(dtype)))} == {dtype}
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    beside.check()
    on_meta = ours.to("meta")(x.to("meta"))
    for t, wanted in zip(
        beside.kind.flat(on_meta), beside.kind.flat(beside.theirs(x)), strict=True
    ):
        assert t.is_meta and t.shape == wanted.shape and t.dtype == wanted.dtype


def test_built_on_meta_and_materialised(kind):
    with torch.device("meta"):
        ours = kind.ours(4, 6, 2, **kind.fixed)
    assert ours.weight_hh_l1.is_meta
    ours.to_empty(device="cpu")
    torch.manual_seed(1)
    ours.reset_parameters()
    torch.manual_seed(1)
    wanted = kind.theirs(4, 6, 2, **kind.fixed)
    x = torch.randn(5, 3, 4)
    kind.assert_same(ours(x), wanted(x), "composition_fp32")


def test_replicas_of_data_parallel(beside):
    """Their weights are plain tensors, derived from the module's, set as attributes."""
    replica = beside.ours._replicate_for_data_parallel()
    assert not replica._parameters
    for name in replica._flat_weights_names:
        setattr(replica, name, getattr(beside.ours, name) * 2)
    beside.check(replica)


def test_hooks_run(beside):
    seen = []
    beside.ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    beside.ours.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    beside.ours.register_full_backward_hook(lambda module, gi, go: seen.append("backward"))
    x = beside.x.requires_grad_()
    beside.ours(x)[0].sum().backward()
    assert seen == ["before", 2, "backward"]


def test_smaller_weights_after_structured_pruning():
    """Sizes are those of now, as in torch's modules."""
    stock, x = torch.nn.LSTM(4, 6, batch_first=True), torch.randn(2, 3, 4)
    ours = sk.nn.LSTM.from_torch(stock)
    kept = torch.cat([torch.arange(3) + 6 * gate for gate in range(4)])
    for module in (stock, ours):
        weights = {name: p.detach()[kept] for name, p in module.named_parameters()}
        weights["weight_hh_l0"] = weights["weight_hh_l0"][:, :3]
        for name, w in weights.items():
            setattr(module, name, torch.nn.Parameter(w))
        module.hidden_size = 3
    assert_close(ours(x)[0], stock(x)[0], "composition_fp32")


def test_a_weight_that_is_not_there():
    module = sk.nn.GRU(4, 5)
    module.weight_ih_l0 = None
    with pytest.raises(TypeError, match="weight_ih_l0: expected a tensor, got None"):
        module(torch.randn(3, 2, 4))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_where_another_device_is_the_default(backend):
    """Small tensors that are made on the way do not land there."""
    module = sk.nn.LSTM(4, 5, backend=backend)
    x, lengths = torch.randn(6, 2, 4), torch.tensor([6, 3])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    want, packed_want = module(x, lengths=lengths)[0], module(packed)[0].data
    with torch.device("meta"):
        assert torch.equal(module(x, lengths=lengths)[0], want)
        assert torch.equal(module(packed)[0].data, packed_want)
