"""``PackedSequence`` through ``sk.nn.LSTM``, ``GRU`` and ``RNN``: torch's results on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import sora_kernels as sk
from sora_kernels.testing import assert_close

LENGTHS = [2, 5, 1, 5, 3]
BACKENDS = [
    None,
    pytest.param("native", marks=pytest.mark.native),
    "torch",
    "reference",
]


def packed(lengths=LENGTHS, width=4, dtype=torch.float64, enforce_sorted=False, **options):
    rows = [torch.randn(n, width, dtype=dtype) for n in lengths]
    data, *rest = pack_sequence(rows, enforce_sorted)
    return PackedSequence(data.requires_grad_(), *rest)


def assert_same_order(a: PackedSequence, b: PackedSequence) -> None:
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        mine, own = getattr(a, name), getattr(b, name)
        assert (mine is None and own is None) or torch.equal(mine, own), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", ([5, 5, 3, 2, 1], LENGTHS), ids=("sorted", "unsorted"))
def test_same_as_torch(case, lengths, backend):
    kind, options = case
    ours, theirs = kind.pair(**options)
    ours.backend = backend
    x = packed(lengths, enforce_sorted=lengths != LENGTHS)
    hx = kind.states(ours, 5)
    leaves = [x.data, *(h.requires_grad_() for h in kind.flat(hx))]
    found, wanted = ours(x, hx), theirs(x, hx)
    assert isinstance(found[0], PackedSequence)
    assert_same_order(found[0], wanted[0])
    kind.assert_same(found, wanted)
    kind.assert_same(kind.gradients(ours, found, *leaves), kind.gradients(theirs, wanted, *leaves))
    kind.assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("lengths", ([1], [4], [1, 1, 1], [3, 3, 3], [9, 1]), ids=str)
def test_odd_lengths(kind, lengths):
    ours, theirs = kind.pair(bidirectional=True)
    x = packed(lengths)
    found, wanted = ours(x), theirs(x)
    kind.assert_same(found, wanted)
    kind.assert_same(kind.gradients(ours, found, x.data), kind.gradients(theirs, wanted, x.data))


def test_same_as_lengths(case):
    kind, options = case
    ours, _ = kind.pair(**options)
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    hx, lengths = kind.states(ours, 5), torch.tensor(LENGTHS)
    as_packed = pack_padded_sequence(x, lengths, ours.batch_first, enforce_sorted=False)
    found, hidden = ours(as_packed, hx)
    y, other = ours(x, hx, lengths=lengths)
    padded, _ = nn.utils.rnn.pad_packed_sequence(found, ours.batch_first)
    kind.assert_same((padded, hidden), (y, other))


def test_memory_recompute(case):
    kind, options = case
    ours, theirs = kind.pair(**options)
    ours.memory = "recompute"
    x = packed()
    found, wanted = ours(x), theirs(x)
    kind.assert_same(found, wanted)
    kind.assert_same(kind.gradients(ours, found, x.data), kind.gradients(theirs, wanted, x.data))


def test_hx_is_the_callers_rows_not_the_sorted_ones(kind):
    """Row b of hx belongs to row b of what was packed, and so do the results."""
    ours, theirs = kind.pair()
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in LENGTHS]
    hx = kind.states(ours, 5)
    found, hidden = ours(pack_sequence(rows, enforce_sorted=False), hx)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(found)
    assert lengths.tolist() == LENGTHS
    for b, row in enumerate(rows):
        own = [h[:, b] for h in kind.flat(hx)]
        y, last = theirs(row, tuple(own) if kind.has_c else own[0])
        assert_close(padded[: len(row), b], y, "transform_fp64", name=f"y of row {b}")
        kind.assert_same([h[:, b] for h in kind.flat(hidden)], last)


@pytest.mark.parametrize("enforce_sorted", (True, False))
def test_hx_of_another_batch_is_an_error(kind, enforce_sorted):
    """Torch takes the first rows of a larger hx without a word where the lengths were unsorted."""
    ours, theirs = kind.pair()
    x = packed([5, 3, 1], enforce_sorted=enforce_sorted)
    which = r"hidden\[0\]" if kind.has_c else "hidden"
    for rows in (2, 4):
        with pytest.raises(
            RuntimeError, match=rf"Expected {which} size \(1, 3, 6\), got \[1, {rows}, 6\]"
        ):
            ours(x, kind.states(ours, rows))
    with pytest.raises(RuntimeError, match=rf"Expected {which} size \(1, 3, 6\), got \[1, 6\]"):
        ours(x, kind.states(ours, None))
    if not enforce_sorted:
        theirs(x, kind.states(ours, 4))


def test_errors_are_torchs(kind):
    ours, theirs = kind.pair()
    odd = [
        packed([5, 3, 1], width=2),
        packed([5, 3, 1], dtype=torch.float32),
        pack_padded_sequence(torch.zeros(5, 3, 2, 4, dtype=torch.float64), [5, 3, 1]),
    ]
    for x in odd:
        with pytest.raises((RuntimeError, ValueError)) as mine:
            ours(x)
        with pytest.raises((RuntimeError, ValueError)) as own:
            theirs(x)
        # torch's LSTM checks none of this for packed input and fails inside a product.
        if kind.name != "LSTM":
            assert str(mine.value) == str(own.value)
        else:
            assert "mat" in str(own.value) or "size of tensor" in str(own.value)


def test_not_with_lengths_or_reset(kind):
    ours, _ = kind.pair()
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence"):
        ours(packed(), lengths=torch.tensor(LENGTHS))
    with pytest.raises(ValueError, match="reset must be None with a PackedSequence"):
        ours(packed(), reset=torch.zeros(16, dtype=torch.bool))


@pytest.mark.parametrize("batch_sizes", ([3, 2, 2], [3, 3, 3], [2, 3, 1], [3, 4, -1]), ids=str)
def test_batch_sizes_that_do_not_fit_are_an_error(kind, batch_sizes):
    """A PackedSequence made by hand: six rows of data, none of these describes them."""
    ours, _ = kind.pair()
    data = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError)):
        ours(PackedSequence(data, torch.tensor(batch_sizes)))


def test_every_cell_state():
    ours = sk.nn.LSTM(4, 6, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    cells = ours(pack_padded_sequence(x, lengths, enforce_sorted=False), return_cells=True)[2]
    padded, _ = nn.utils.rnn.pad_packed_sequence(cells)
    assert_close(padded, ours(x, lengths=lengths, return_cells=True)[2], "transform_fp64")


def test_chained_modules(kind):
    """The output of one is the input of the next, as in a model."""
    first, own_first = kind.pair(bidirectional=True)
    second, own_second = kind.pair(input_size=12)
    x = packed()
    kind.assert_same(second(first(x)[0]), own_second(own_first(x)[0]))


@pytest.mark.parametrize(
    "case, sorted_by",
    [(("LSTM", {}), by) for by in ("caller", "torch", "caller, with hx")]
    + [(("GRU", {"num_layers": 2}), "torch"), (("RNN_TANH", {}), "caller")],
    indirect=["case"],
    ids=str,
)
def test_compiles_into_one_graph(case, sorted_by):
    """B is a shape of sorted_indices or of hx; with neither it is read from batch_sizes."""
    torch._dynamo.reset()
    kind, options = case
    ours, _ = kind.pair(**options)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 3, 1], [6, 4, 2, 2]):
        x = packed(lengths, enforce_sorted=sorted_by != "torch")
        hx = kind.states(ours, len(lengths)) if "hx" in sorted_by else None
        with torch._dynamo.config.patch(error_on_recompile=len(lengths) == 4):
            found = compiled(x, hx)
        wanted = ours(x, hx)
        kind.assert_same(found, wanted)
        kind.assert_same(kind.gradients(ours, found, x.data), kind.gradients(ours, wanted, x.data))
