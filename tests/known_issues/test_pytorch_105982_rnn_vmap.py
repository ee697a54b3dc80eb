"""pytorch/pytorch 105982 (and functorch 1089): nn.LSTM and nn.GRU cannot be vmapped: no ensembles of them."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, stack_module_state

import sora_kernels as sk
from sora_kernels.testing import assert_close


def ensemble(kind, models, x):
    base = kind(5, 7).to("meta")
    state = stack_module_state(models)
    return torch.vmap(lambda p, b: functional_call(base, (p, b), (x,))[0])(*state)


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
