"""``int8=True``: recurrent weights as int8 numbers where no gradient is wanted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import sora_kernels as sk
from sora_kernels.ops.lstm import backends, native
from sora_kernels.ops.lstm.backends import int8_pays
from sora_kernels.ops.lstm.int8 import MAX_BATCH
from sora_kernels.testing import assert_close

pytestmark = pytest.mark.native

MODULES = {"lstm": sk.nn.LSTM, "gru": sk.nn.GRU, "rnn": sk.nn.RNN}


@pytest.fixture(autouse=True)
def small_sizes_too(monkeypatch):
    monkeypatch.setattr(backends, "int8_pays", lambda batch, hidden_size: batch <= MAX_BATCH)


@pytest.fixture(params=MODULES)
def make(request):
    return MODULES[request.param]


@pytest.fixture
def used(monkeypatch):
    """Whether each kernel call had int8 weights."""
    calls: list[bool] = []
    forward = native.forward

    def spy(*args):
        calls.append(len(args) > 10 and bool(args[10]))
        return forward(*args)

    monkeypatch.setattr(native, "forward", spy)
    return calls


def rounded(module):
    """The module with every w_hh as its int8 form has it."""
    exact = copy.deepcopy(module)
    exact.int8 = False
    with torch.no_grad():
        for name, w in exact.named_parameters():
            if name.startswith("weight_hh"):
                w.copy_(rounded_rows(w))
    return exact


def rounded_rows(w):
    scale = w.float().abs().amax(1, keepdim=True) / 127
    return (w / scale).round() * scale


def outputs(found):
    y, hidden = found
    return [y, *(hidden if isinstance(hidden, tuple) else (hidden,))]


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"proj_size": 5},
    ),
    ids=("plain", "no_bias", "deep", "projected"),
)
def test_is_the_module_with_rounded_weights(make, options, used):
    """All but the rounding of w_hh is as ever, ragged rows and states included."""
    if "proj_size" in options and make is not sk.nn.LSTM:
        pytest.skip("LSTM alone has projections")
    module = make(7, 19, int8=True, **options)
    plain = rounded(module)
    x = torch.randn(3, 6, 7) if options.get("batch_first") else torch.randn(6, 3, 7)
    with torch.no_grad():
        for given in ({}, {"lengths": torch.tensor([4, 6, 1])}):
            for a, b in zip(outputs(module(x, **given)), outputs(plain(x, **given)), strict=True):
                assert_close(a, b, "composition_fp32")
    layers = options.get("num_layers", 1)
    assert used == ([True] * layers + [False] * layers) * 2


def test_packed(make):
    module = make(4, 20, int8=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 3, 1]))
    with torch.no_grad():
        assert_close(module(packed)[0].data, rounded(module)(packed)[0].data, "composition_fp32")


@pytest.mark.parametrize("H", (64, 256))
def test_error_against_full_weights(make, H):
    """Weights are off by up to half a step of 1/127 of a row's largest, which for uniform weights is
    1/2^8.7 of their deviation a product: the states' error stays near a hundredth of their size.
    """
    module = make(H, H, int8=True)
    x = torch.randn(50, 4, H)
    with torch.no_grad():
        y = module(x)[0]
        module.int8 = False
        full = module(x)[0]
    relative = (y - full).square().mean().sqrt() / full.square().mean().sqrt()
    assert 1e-5 < relative < 1e-2


def test_only_where_no_gradient_is_wanted_and_rows_are_few(make, used):
    module = make(4, 6, int8=True)
    module(torch.randn(3, 2, 4))  # parameters want gradients
    with torch.no_grad():
        module(torch.randn(3, MAX_BATCH + 1, 4))
        module.double()(torch.randn(3, 2, 4, dtype=torch.float64))
        module.float()
        module.backend = "reference"
        module(torch.randn(3, 2, 4))
        assert not any(used)
        module.backend = None
        module(torch.randn(3, MAX_BATCH, 4))
        assert used[-1]
        module.bfloat16()(torch.randn(3, 2, 4, dtype=torch.bfloat16))
        assert used[-1]


def test_only_where_it_pays():
    pays = {(1, 191): False, (1, 192): True, (4, 255): False, (4, 256): True, (8, 512): True}
    for (batch, hidden_size), expected in {**pays, (9, 4096): False}.items():
        assert int8_pays(batch, hidden_size) == expected


def test_weights_that_change_are_seen(make):
    module, x = make(4, 6, int8=True), torch.randn(5, 2, 4)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh_l0.mul_(-1)
        changed = module(x)[0]
        assert not torch.equal(before, changed)
        assert_close(changed, rounded(module)(x)[0], "composition_fp32")
        module.weight_hh_l0 = torch.nn.Parameter(torch.zeros_like(module.weight_hh_l0))
        zero = module(x)[0]
        module.int8 = False
        assert_close(zero, module(x)[0], "composition_fp32")
        module.int8 = True
        module.load_state_dict(make(4, 6).state_dict())
        assert_close(module(x)[0], rounded(module)(x)[0], "composition_fp32")


def test_another_weight_at_the_same_address_is_another_weight(make):
    """Memory that was freed comes back, with version 0."""
    module, x = make(64, 256, int8=True), torch.randn(3, 1, 64)
    stock = rounded(module)
    with torch.no_grad():
        for _ in range(8):
            fresh = {"weight_hh_l0": torch.randn_like(module.weight_hh_l0) * 0.06}
            ours = torch.func.functional_call(module, fresh, (x,))[0]
            stock.weight_hh_l0.copy_(rounded_rows(fresh["weight_hh_l0"]))
            del fresh
            assert_close(ours, stock(x)[0], "composition_fp32")


def test_inference_tensors_default_devices_and_fake_tensors(make):
    x = torch.randn(3, 1, 4)
    with torch.inference_mode():
        module = make(4, 6, int8=True)
        before = module(x)[0]
        module.weight_hh_l0.mul_(-1)
        assert not torch.equal(before, module(x)[0])
    module = make(4, 6, int8=True)
    with torch.no_grad():
        want = module(x)[0]
        module._int8_weights = type(module._int8_weights)()
        with torch.device("meta"):
            assert torch.equal(module(x)[0], want)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert module(fake.from_tensor(x))[0].shape == (3, 1, 6)


def test_a_backend_asked_for_from_outside(make, used, monkeypatch):
    module = make(4, 6, int8=True)
    monkeypatch.setenv("SORA_BACKEND", "reference")
    with torch.no_grad():
        module(torch.randn(3, 2, 4))
    assert not any(used)


def test_nan_in_a_weight_is_nan_in_its_unit(make):
    module = make(4, 6, int8=True)
    with torch.no_grad():
        module.weight_hh_l0[2, 3] = float("nan")
        y = module(torch.randn(3, 2, 4))[0]
    assert y[0, :, 2].isnan().all() and not y[0, :, [0, 1, 3, 4, 5]].isnan().any()


def test_copies_pickles_and_compiles(make):
    module, x = make(4, 6, int8=True), torch.randn(5, 2, 4)
    with torch.no_grad():
        y = module(x)[0]
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.int8 and torch.equal(other(x)[0], y)
    assert "int8=True" in repr(module)
    assert list(module.state_dict()) == list(make(4, 6).state_dict())


def test_autocast(used):
    module, x = sk.nn.LSTM(4, 6, int8=True), torch.randn(5, 2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)[0]
    assert y.dtype == torch.bfloat16 and used == [True]
