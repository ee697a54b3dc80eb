"""Outputs, states and every gradient of ``sk.nn.LSTM``, ``GRU`` and ``RNN`` against torch's modules."""

from __future__ import annotations

import copy

import pytest
import torch

import sora_kernels as sk
from sora_kernels.testing import assert_close, assert_within_2x

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


@pytest.mark.parametrize("given", (False, True), ids=("zeros", "hx"))
@pytest.mark.parametrize("batched", (True, False), ids=("batched", "unbatched"))
def test_same_as_torch(case, batched, given):
    kind, options = case
    ours, theirs = kind.pair(**options)
    x = torch.randn(*((5, 3) if batched else (5,)), 4, dtype=torch.float64, requires_grad=True)
    hx, leaves = None, [x]
    if given:
        hx = kind.states(ours, (5 if ours.batch_first else 3) if batched else None)
        leaves += [h.requires_grad_() for h in kind.flat(hx)]
    found, wanted = ours(x, hx), theirs(x, hx)
    assert isinstance(found, tuple) and len(found) == 2
    kind.assert_same(found, wanted)
    kind.assert_same(kind.gradients(ours, found, *leaves), kind.gradients(theirs, wanted, *leaves))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_error_is_at_most_twice_torchs(case, dtype):
    kind, options = case
    ours, theirs = kind.pair(dtype, **options)
    truth = copy.deepcopy(theirs).double()
    data = torch.randn(9, 7, 4).to(dtype)
    batch = 9 if ours.batch_first else 7
    h = [t.to(dtype) for t in kind.flat(kind.states(ours, batch))]
    results = []
    for module in (ours, theirs, truth):
        x = data.to(module.weight_ih_l0.dtype).requires_grad_()
        leaves = [t.to(x.dtype).requires_grad_() for t in h]
        found = module(x, tuple(leaves) if kind.has_c else leaves[0])
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape).to(t)).sum()
                   for t in kind.flat(found))  # fmt: skip
        names = ["y", "h_n", "c_n"][: 1 + len(leaves)]
        names += ["dx", "dh_0", "dc_0"][: 1 + len(leaves)]
        names += [f"d{name}" for name, _ in module.named_parameters()]
        grads = torch.autograd.grad(loss, [x, *leaves, *module.parameters()])
        results.append([*kind.flat(found), *grads])
    kink = kind.fixed.get("nonlinearity") == "relu"
    for name, a, b, c in zip(names, *results, strict=True):
        assert_within_2x(a, b, c, name=name, kink=kink and name.startswith("d"))


def test_hx_may_be_strided_and_a_list(kind):
    ours, theirs = kind.pair(num_layers=2)
    x = torch.randn(5, 3, 8, dtype=torch.float64)[..., ::2]
    h = torch.randn(6, 3, 2, dtype=torch.float64).transpose(0, 2)
    assert not h.is_contiguous() and not x.is_contiguous()
    hx = [h, h] if kind.has_c else h
    kind.assert_same(ours(x, hx), theirs(x, hx))


def test_weights_may_be_strided(kind):
    ours, theirs = kind.pair()
    for name, weight in [*ours.named_parameters()]:
        wide = weight.detach().repeat_interleave(2, -1)[..., ::2]
        assert not wide.is_contiguous()
        setattr(ours, name, torch.nn.Parameter(wide))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    found, wanted = ours(x), theirs(x)
    kind.assert_same(found, wanted)
    kind.assert_same(kind.gradients(ours, found), kind.gradients(theirs, wanted))


@pytest.mark.parametrize("shape", ((5, 0, 4), (1, 1, 4), (1, 0, 4)), ids=str)
def test_empty_and_single(case, shape):
    kind, options = case
    ours, theirs = kind.pair(**options | {"batch_first": False})
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, wanted = ours(x), theirs(x)
    kind.assert_same(found, wanted)
    for a, b in zip(kind.flat(found), kind.flat(wanted), strict=True):
        assert a.shape == b.shape
    for g, p in zip(kind.gradients(ours, found, x), (x, *ours.parameters()), strict=True):
        assert g.shape == p.shape and (shape[1] or not g.any())


def test_nan_stays_in_its_row(kind):
    ours, theirs = kind.pair()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    x[2, 1] = float("nan")
    kind.assert_same(ours(x), theirs(x))
    assert ours(x)[0].isnan().any(-1).nonzero().tolist() == [[2, 1], [3, 1], [4, 1]]


def test_dropout_only_between_layers_and_in_training(kind):
    x = torch.randn(5, 3, 4)
    with pytest.warns(UserWarning, match="dropout option"):
        one = kind.ours(4, 6, dropout=0.9, **kind.fixed)
    assert torch.equal(one(x)[0], one.eval()(x)[0])
    two = kind.ours(4, 6, 2, dropout=0.5, **kind.fixed)
    assert not torch.equal(two(x)[0], two(x)[0])
    torch.manual_seed(3)
    first = two(x)[0]
    torch.manual_seed(3)
    assert torch.equal(two(x)[0], first)
    assert torch.equal(two.eval()(x)[0], two(x)[0])
    all_gone = kind.ours(4, 6, 2, dropout=1.0, **kind.fixed)
    y, theirs = all_gone(x)[0], all_gone.to_torch()(x)[0]
    assert_close(y, theirs, "composition_fp32")


def test_batch_first_output_has_torchs_values_and_shape(kind):
    ours, theirs = kind.pair(batch_first=True, bidirectional=True)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    assert ours(x)[0].shape == theirs(x)[0].shape == (3, 5, 12)
    time_first = ours.to_torch()
    time_first.batch_first = False
    assert_close(ours(x)[0], time_first(x.transpose(0, 1))[0].transpose(0, 1), "transform_fp64")


def test_bitwise_repeatable_in_deterministic_mode(kind):
    ours, _ = kind.pair(torch.float32, num_layers=2, bidirectional=True)
    x = torch.randn(9, 5, 4, requires_grad=True)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [kind.flat(found := ours(x)) + kind.gradients(ours, found, x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(was)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("memory", ("save", "recompute"))
def test_ragged_rows_are_rows_of_their_own(case, memory, backend):
    kind, options = case
    ours, theirs = kind.pair(**options)
    ours.backend, ours.memory = backend, memory
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    if ours.batch_first:
        x = x.detach().transpose(0, 1).contiguous().requires_grad_()
    hx, lengths = kind.states(ours), torch.tensor([5, 0, 3])
    found = ours(x, hx, lengths=lengths)
    y = found[0] if not ours.batch_first else found[0].transpose(0, 1)
    rows = x if not ours.batch_first else x.transpose(0, 1)
    loss = 0.0
    for row, length in enumerate(lengths.tolist()):
        assert not y[length:, row].any()
        own = [h[:, row : row + 1].contiguous() for h in kind.flat(hx)]
        if not length:
            kind.assert_same([h[:, row : row + 1] for h in kind.flat(found)[1:]], own)
            loss = loss + sum((h * h).sum() for h in own)
            continue
        own_x = rows[:length, row : row + 1]
        if ours.batch_first:
            own_x = own_x.transpose(0, 1)
        wanted = theirs(own_x, tuple(own) if kind.has_c else own[0])
        got = [y[:length, row : row + 1], *(h[:, row : row + 1] for h in kind.flat(found)[1:])]
        want = kind.flat(wanted)
        want[0] = want[0].transpose(0, 1) if ours.batch_first else want[0]
        kind.assert_same(got, want)
        loss = loss + sum((t * t).sum() for t in kind.flat(wanted))
    wanted_grads = torch.autograd.grad(loss, [x, *theirs.parameters()])
    kind.assert_same(kind.gradients(ours, found, x), wanted_grads)


def test_resets_start_sequences_of_their_own(kind):
    ours, theirs = kind.pair()
    x = torch.randn(7, 2, 4, dtype=torch.float64)
    hx = kind.states(ours, 2)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[3, 0] = True
    y = ours(x, hx, reset=reset)[0]
    first = theirs(x[:3], hx)[0]
    assert_close(y[:3], first, "transform_fp64")
    assert_close(y[3:, 0], theirs(x[3:, 0])[0], "transform_fp64")
    assert_close(y[:, 1:], theirs(x, hx)[0][:, 1:], "transform_fp64")


def test_ragged_unbatched(kind):
    ours, theirs = kind.pair(bidirectional=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    y, hidden = ours(x, lengths=torch.tensor(3))
    assert not y[3:].any()
    kind.assert_same((y[:3], hidden), theirs(x[:3]))
    y = ours(x, reset=torch.tensor([False, False, True, False, False]))[0]
    assert_close(y[:2], theirs(x[:2])[0], "transform_fp64")
    assert_close(y[2:], theirs(x[2:])[0], "transform_fp64")


@pytest.mark.parametrize("options", ({}, {"num_layers": 2, "bidirectional": True}), ids=str)
def test_every_cell_state(options):
    ours = sk.nn.LSTM(4, 6, dtype=torch.float64, **options)
    theirs = ours.to_torch()
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    y, (h_n, c_n), cells = ours(x, return_cells=True)
    assert cells.shape == (5, 3, 6 * (1 + ours.bidirectional))
    assert_close(cells[-1, :, :6], c_n[-2 if ours.bidirectional else -1], "transform_fp64")
    if not options:
        steps, hx = [], None
        for step in x:
            _, hx = theirs(step[None], hx)
            steps.append(hx[1][0])
        wanted = torch.stack(steps)
        assert_close(cells, wanted, "transform_fp64")
        grads = [torch.autograd.grad((c**3).sum() + y.sum(), [x, *ours.parameters()])
                 for c, y in ((cells, y), (wanted, theirs(x)[0]))]  # fmt: skip
        for a, b in zip(*grads, strict=True):
            assert_close(a, b, "transform_fp64")
    unbatched = ours(x[:, 0], return_cells=True)[2]
    assert_close(unbatched, cells[:, 0], "transform_fp64")


def test_what_lengths_and_reset_must_be(kind):
    ours, _ = kind.pair()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for lengths in (torch.tensor([5, 3]), torch.tensor([5.0, 3.0, 1.0])):
        with pytest.raises(ValueError, match="lengths must be int32 or int64"):
            ours(x, lengths=lengths)
    for reset in (torch.zeros(5, 3), torch.zeros(3, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="reset must be bool"):
            ours(x, reset=reset)
    if not kind.has_c:
        with pytest.raises(TypeError, match="return_cells"):
            ours(x, return_cells=True)
