"""pytorch/pytorch 105982 (and functorch 1089): nn.LSTM cannot be vmapped, so there are no ensembles of it."""

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


def test_an_ensemble_runs_under_vmap():
    x = torch.randn(4, 3, 5)
    stock = [torch.nn.LSTM(5, 7) for _ in range(3)]
    ours = [sk.nn.LSTM(5, 7) for _ in range(3)]
    for a, b in zip(ours, stock, strict=True):
        a.load_state_dict(b.state_dict())
    want = torch.stack([m(x)[0] for m in stock])
    assert_close(ensemble(sk.nn.LSTM, ours, x), want, "composition_fp32")
    try:
        ensemble(torch.nn.LSTM, stock, x)
    except RuntimeError as e:
        assert "lstm" in str(e).lower()
    else:
        pytest.skip(f"ours runs, and torch {torch.__version__} has mended its own")
