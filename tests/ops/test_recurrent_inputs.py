"""Inputs as they come: strided, empty, NaN, infinite, any size; every output written; the same bits again."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sora_kernels.ops.lstm.cells import CELLS
from sora_kernels.testing import assert_close, poisoned

NATIVE = pytest.param("native", marks=pytest.mark.native)
KERNELS = (NATIVE, "reference")
BACKENDS = (NATIVE, "torch", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LENGTHS = torch.tensor([3, 0, 5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(recurrent, kind, backend):
    """Strided, sliced and expanded inputs, and output gradients that are not contiguous."""
    call = recurrent(kind, T=4, B=3, I=5, H=7, dtype=torch.float64)
    rows, wide = 7 * call.cell.gates, {"dtype": torch.float64}
    odd = {
        "x": torch.randn(5, 3, 4, **wide).permute(2, 1, 0),
        "h_0": torch.randn(1, 7, 6, **wide).transpose(1, 2)[:, ::2],
        "weight_hh_l0": call.inputs["weight_hh_l0"].t().contiguous().t(),
        "weight_ih_l0": torch.randn(rows, 10, **wide)[:, ::2],
        "bias_ih_l0": torch.randn(rows, 3, **wide)[:, 1],
    }
    if call.cell.has_c:
        odd["c_0"] = torch.randn(1, 1, 7, **wide).expand(1, 3, 7)
    call = call.with_inputs(**odd)
    weight = torch.randn(7, 4, 3, **wide)

    def grads(inputs, name):
        leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
        y, *last = call.call(leaves, backend=name)
        loss = (y.permute(2, 0, 1) * weight).sum() + last[-1].sum()
        return (y, *torch.autograd.grad(loss, leaves.values()))

    plain = {name: t.contiguous() for name, t in call.inputs.items()}
    for ours, other in zip(grads(call.inputs, backend), grads(plain, "reference"), strict=True):
        assert_close(ours, other, "transform_fp64")


@pytest.mark.parametrize("backend", KERNELS)
def test_odd_lengths_and_reset(recurrent, kind, backend):
    """Sliced ``lengths`` and ``reset``, an expanded output gradient."""
    reset = torch.rand(3, 5) < 0.4
    lengths = torch.stack((LENGTHS, LENGTHS), 1)[:, 0]
    call = recurrent(
        kind, bidirectional=True, lengths=lengths, reset=reset.t(), dtype=torch.float64
    )

    def grads(name, **options):
        leaves = {k: t.detach().requires_grad_() for k, t in call.inputs.items()}
        y = call.call(leaves, backend=name, **options)[0]
        return (y, *torch.autograd.grad(y.sum(), leaves.values()))

    plain = grads("reference", lengths=LENGTHS, reset=reset.t().contiguous())
    for ours, other in zip(grads(backend), plain, strict=True):
        assert_close(ours, other, "transform_fp64")


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_first_and_no_states(recurrent, kind, backend):
    call = recurrent(kind, layers=2, bidirectional=True, states=False, dtype=torch.float64)
    y, *last = call.call(backend=backend, lengths=LENGTHS)
    zeros = {name: t * 0 for name, t in zip(("h_0", "c_0"), last, strict=False)}
    # The weights come last.
    inputs = {"x": call.inputs["x"].transpose(0, 1), **zeros, **call.inputs}
    inputs["x"] = call.inputs["x"].transpose(0, 1)
    turned = call.call(inputs, batch_first=True, backend=backend, lengths=LENGTHS)
    for ours, other in zip(turned, (y.transpose(0, 1), *last), strict=True):
        assert_close(ours, other, "transform_fp64")


@pytest.mark.parametrize("backend", KERNELS)
def test_batch_first_reset_and_cells(recurrent, backend):
    call = recurrent("lstm", return_cells=True, dtype=torch.float64)
    reset = torch.rand(5, 3) < 0.4
    y, h_n, c_n, cells = call.call(reset=reset, backend=backend)
    x = call.inputs["x"].transpose(0, 1)
    turned = call.with_inputs(x=x).call(reset=reset.t(), batch_first=True, backend=backend)
    for ours, other in zip(
        turned, (y.transpose(0, 1), h_n, c_n, cells.transpose(0, 1)), strict=True
    ):
        assert_close(ours, other, "transform_fp64")


@pytest.mark.parametrize(
    "options", ({}, {"lengths": torch.zeros(0, dtype=torch.int64)}), ids=("dense", "lengths")
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(recurrent, kind, backend, options):
    found = recurrent(kind, B=0, bidirectional=True, **options).run(backend=backend)
    assert found["y"].shape == (5, 0, 12) and found["dx"].shape == (5, 0, 4)
    assert torch.count_nonzero(found["dweight_hh_l0"]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_out_of_range(recurrent, kind, backend):
    """Below 0 is 0, above T is T, without a look at the values on the way."""
    call = recurrent(kind, bidirectional=True, dtype=torch.float64)
    ours = call.run(backend=backend, lengths=torch.tensor([9, -2, 5]))
    plain = call.run(backend="reference", lengths=torch.tensor([5, 0, 5]))
    for name in plain:
        assert_close(ours[name], plain[name], "transform_fp64", name=name)


@pytest.mark.parametrize("backend", KERNELS)
def test_all_rows_empty(recurrent, kind, backend):
    """Nothing runs: states go through, gradients of the weights are zero."""
    call = recurrent(kind, bidirectional=True, lengths=torch.zeros(3, dtype=torch.int64))
    found = call.run(backend=backend)
    assert torch.count_nonzero(found["y"]) == 0
    assert torch.equal(found["h_n"], call.inputs["h_0"])
    assert torch.equal(found["dh_0"], call.output_grads(tuple(found[n] for n in call.outputs))[1])
    assert all(
        torch.count_nonzero(found[f"d{n}"]) == 0 for n in call.inputs if "l0" in n or n == "x"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(recurrent, kind, backend):
    call = recurrent(kind, H=20)
    call.inputs["x"][2, 1, 0] = float("nan")
    y, h_n, *_ = call.call(backend=backend)
    assert y[2:, 1].isnan().all() and h_n[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any() and not y[:2].isnan().any()


@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(recurrent, kind, backend, memory):
    """What lies past a row's length, in x and in the gradient of y, may be NaN."""
    call = recurrent(
        kind, H=9, bidirectional=True, lengths=LENGTHS, memory=memory, dtype=torch.float64
    )
    past = torch.arange(5)[:, None] >= LENGTHS

    def grads(value):
        leaves = {k: t.detach().clone() for k, t in call.inputs.items()}
        leaves["x"][past] = value
        leaves = {k: t.requires_grad_() for k, t in leaves.items()}
        outputs = call.call(leaves, backend=backend)
        dy, *others = call.output_grads(outputs)
        dy[past] = value
        return (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), (dy, *others)))

    for ours, clean in zip(grads(float("nan")), grads(0.0), strict=True):
        assert torch.equal(ours, clean)


@pytest.mark.parametrize("backend", KERNELS)
def test_saturation(recurrent, kind, backend):
    """Gates at infinity: 0, 1 and +-1, not NaN (relu: infinite, where its definition is)."""
    call = recurrent(kind, H=20, states=False)
    for value in (1e4, -1e4, float("inf"), -float("inf")):
        bias = torch.full_like(call.inputs["bias_ih_l0"], value)
        big = call.with_inputs(bias_ih_l0=bias)
        ours, wide = big.call(backend=backend), big.to(torch.float64).call(backend="reference")
        for a, b in zip(ours, wide, strict=True):
            a, b = a.double(), b.double()
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
            scale = b[b.isfinite()].abs().max().clamp(min=1) if b.isfinite().any() else 1
            finite = b.isfinite()
            assert_close(a[finite] / scale, b[finite] / scale, "composition_fp32")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written(recurrent, kind, backend, dtype):
    """``torch.empty`` gives NaN: each value that comes out has been computed."""
    for case in (
        {"H": 19, "bidirectional": True},
        {"T": 2, "H": 200},
        {"H": 19, "lengths": LENGTHS, "bidirectional": True},
        {"H": 9, "packed": [5, 4, 2], "bidirectional": True},
        {"H": 9, "lengths": LENGTHS, "memory": "recompute"},
        {"H": 9, "reset": torch.rand(5, 3) < 0.4},
    ):
        call = recurrent(kind, dtype=dtype, **case)
        clean = call.run(backend=backend)
        with poisoned():
            found = call.run(backend=backend)
        for name in clean:
            assert torch.equal(found[name], clean[name]), name


@pytest.mark.native
@pytest.mark.parametrize("threads", (1, 2))
def test_bitwise_repeatable(recurrent, kind, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ragged = torch.randint(0, 9, (17,))
    try:
        for case in (
            {"B": 17, "H": 64, "T": 8},
            {"B": 1, "H": 300, "T": 6},
            {"B": 17, "H": 64, "T": 8, "lengths": ragged, "bidirectional": True},
            {"B": 4, "H": 64, "T": 8, "memory": "recompute"},
        ):
            call = recurrent(kind, **case)
            first, second = (call.run(backend="native") for _ in range(2))
            for name in first:
                assert torch.equal(first[name], second[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
def test_two_python_threads(recurrent, kind):
    calls = [recurrent(kind, B=4, H=40, T=30), recurrent(kind, B=2, H=33, T=40, bidirectional=True)]
    expected = [call.run(backend="native") for call in calls]
    wrong: list[str] = []

    def work(k):
        for _ in range(5):
            found = calls[k].run(backend="native")
            wrong.extend(n for n in found if not torch.equal(found[n], expected[k][n]))

    workers = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_dropout(recurrent, kind):
    call = recurrent(kind, layers=3, T=4, B=8, H=8)
    for backend in ("reference", "torch"):
        evaluated = call.call(dropout=0.5, backend=backend)[0]
        assert torch.equal(evaluated, call.call(backend=backend)[0])
        trained = call.call(dropout=0.5, training=True, backend=backend)[0]
        assert not torch.equal(evaluated, trained)
    options = {"dropout": 0.3, "training": True, "backend": "reference"}
    torch.manual_seed(3)
    first = call.run(**options)
    torch.manual_seed(3)
    second = call.run(memory="recompute", **options)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # All outputs of a layer dropped: the next sees zeros.
    options["dropout"] = 1.0
    changed = call.with_inputs(x=call.inputs["x"] + 1)
    assert torch.equal(call.call(**options)[0], changed.call(**options)[0])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(sorted(CELLS)), T=st.integers(1, 9), B=st.integers(0, 9),
    I=st.integers(1, 20), H=st.integers(1, 70), two=st.booleans(), bias=st.booleans(),
    ragged=st.sampled_from(("", "lengths", "packed")), memory=st.sampled_from(("save", "recompute")),
)  # fmt: skip
@pytest.mark.native
def test_random_sizes(recurrent, name, T, B, I, H, two, bias, ragged, memory):  # noqa: E741
    options = {"memory": memory}
    if ragged == "lengths":
        options["lengths"] = torch.randint(0, T + 1, (B,))
    elif ragged and B:
        options["packed"] = [
            T,
            *torch.randint(1, T + 1, (B - 1,)).sort(descending=True)[0].tolist(),
        ]
    shape = {"T": T, "B": B, "I": I, "H": H, "bidirectional": two, "bias": bias}
    call = recurrent(name, dtype=torch.float64, **shape, **options)
    ours, plain = call.run(backend="native"), call.run(backend="reference")
    for key in plain:
        assert_close(ours[key], plain[key], "transform_fp64", name=key)
