"""pytorch/pytorch 149194: a packed LSTM is slower than the padded one, though it has less to do.

Two layers over rows of triangular lengths, as in the issue. Torch runs a product and a pointwise kernel a step,
and its backward a graph node a step; ours runs the ragged rows as it runs even ones.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import sora_kernels as sk
from sora_kernels.testing import assert_within_2x

LENGTHS = range(2, 66, 2)


@pytest.fixture
def one_thread():
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def step(module, data):
    """Forward and backward over packed rows: every row's output, and the gradient of every weight."""
    module.zero_grad()
    packed, _ = module(pack_sequence(data, enforce_sorted=False))
    packed.data.square().sum().backward()
    return [packed.data.detach(), *(p.grad for p in module.parameters())]


def seconds(module, data) -> float:
    start = time.perf_counter()
    step(module, data)
    return time.perf_counter() - start


@pytest.mark.native
def test_packed_rows_are_right_and_not_slower(one_thread, record_property):
    stock = torch.nn.LSTM(64, 64, num_layers=2)
    ours = sk.nn.LSTM(64, 64, num_layers=2)
    truth = torch.nn.LSTM(64, 64, num_layers=2).double()
    for module in (ours, truth):
        module.load_state_dict(stock.state_dict())
    rows = [torch.randn(length, 64) for length in LENGTHS]
    results = [step(m, rows) for m in (ours, stock)]
    wanted = step(truth, [row.double() for row in rows])
    names = ["output", *(name for name, _ in stock.named_parameters())]
    for name, found, plain, right in zip(names, *results, wanted, strict=True):
        assert_within_2x(found, plain, right, name=name)
    ratio = statistics.median(seconds(stock, rows) / seconds(ours, rows) for _ in range(15))
    record_property("torch_over_ours", round(ratio, 2))
    print(f"packed LSTM, forward and backward: torch / ours = {ratio:.2f}")
    assert ratio > 1
