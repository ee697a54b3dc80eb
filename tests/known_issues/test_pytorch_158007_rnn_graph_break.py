"""pytorch/pytorch 158007 (and 149909, 167275, ...): nn.LSTM, nn.GRU and nn.RNN break the graph under torch.compile."""

from __future__ import annotations

import pytest
import torch

import sora_kernels as sk
from sora_kernels.testing import assert_close


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_compiles_into_one_graph(name):
    stock, x = getattr(torch.nn, name)(5, 7), torch.randn(4, 3, 5)
    ours = getattr(sk.nn, name).from_torch(stock)
    torch._dynamo.reset()
    y, _ = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    assert_close(y, stock(x)[0], "composition_fp32")
    torch._dynamo.reset()
    try:
        torch.compile(stock, fullgraph=True, backend="aot_eager")(x)
    except torch._dynamo.exc.Unsupported as e:
        assert "RNN, GRU, or LSTM" in str(e) or name.lower() in str(e).lower()
    else:
        pytest.skip(f"ours compiles, and torch {torch.__version__} has mended its own")
