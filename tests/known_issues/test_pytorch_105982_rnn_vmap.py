"""pytorch/pytorch 105982 (and functorch 1089): nn.LSTM and nn.GRU cannot be vmapped: no ensembles of them."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, stack_module_state

import sora_kernels as sk
from sora_kernels.ops.lstm import reference
from sora_kernels.testing import assert_close


def ensemble(kind, models, x):
    base = kind(5, 7).to("meta")
    state = stack_module_state(models)
    return torch.vmap(lambda p, b: functional_call(base, (p, b), (x,))[0])(*state)


@pytest.mark.native
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_it_is_the_kernels_that_run(name, monkeypatch):
    """And for each sample's gradients, which torch cannot give either."""
    kind = getattr(sk.nn, name)
    model, x = kind(5, 7), torch.randn(20, 3, 5)
    weights = {key: p.detach() for key, p in model.named_parameters()}

    def loss(weights, sample):
        return functional_call(model, weights, (sample.unsqueeze(1),))[0].square().sum()

    def each():
        return torch.vmap(torch.func.grad(loss), (None, 1))(weights, x)

    model.backend = "reference"
    want = each()
    model.backend = None
    monkeypatch.setattr(reference, "layer", lambda *_: pytest.fail("the reference ran"))
    for key, found in each().items():
        assert_close(found, want[key], "composition_fp32", name=key)


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_an_ensemble_runs_under_vmap(name):
    kind, own = getattr(sk.nn, name), getattr(torch.nn, name)
    x = torch.randn(4, 3, 5)
    stock = [own(5, 7) for _ in range(3)]
    ours = [kind.from_torch(m) for m in stock]
    want = torch.stack([m(x)[0] for m in stock])
    assert_close(ensemble(kind, ours, x), want, "composition_fp32")
    try:
        ensemble(own, stock, x)
    except RuntimeError as e:
        assert name.lower() in str(e).lower()
    else:
        pytest.skip(f"ours runs, and torch {torch.__version__} has mended its own")
