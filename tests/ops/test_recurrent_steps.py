"""The way that walks every layer on CUDA, one GEMM and one kernel a step, run on the CPU by its own kernels."""

from __future__ import annotations

import pytest
import torch

from sora_kernels.ops.lstm import native, reference, steps
from sora_kernels.ops.lstm.cells import CELLS
from sora_kernels.testing import assert_close, poisoned, tolerance

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LENGTHS = torch.tensor([3, 0, 5])
RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
PACKED_RESET = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
CASES = {
    "even": {"H": 9},
    "one_step": {"T": 1, "H": 18},
    "no_states_no_bias": {"states": False, "bias": False, "bidirectional": True, "H": 17},
    "both": {"bidirectional": True, "layers": 2},
    "lengths": {"lengths": LENGTHS, "H": 20, "bidirectional": True},
    "lengths_past_both_ends": {"lengths": torch.tensor([7, -1, 1]).int(), "bidirectional": True},
    "packed": {"packed": [5, 4, 2], "H": 20, "bidirectional": True},
    "packed_one_row": {"packed": [3], "B": 1, "T": 3, "bias": False},
    "reset": {"reset": RESET, "bidirectional": True},
    "reset_lengths": {"reset": RESET, "lengths": LENGTHS, "bidirectional": True, "states": False},
    "reset_packed": {"reset": PACKED_RESET, "packed": [5, 4, 2], "bidirectional": True},
    "many_rows": {"T": 3, "B": 40, "H": 33, "I": 5},
}
CELL_CASES = ("both", "lengths", "reset_lengths", "reset_packed")


@pytest.fixture(autouse=True)
def walked(monkeypatch):
    """Sends every call without a projection step by step; the list of the passes that went so."""
    passes = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(steps, name, recording(passes, getattr(steps, name)))
    monkeypatch.setattr(steps, "MOST", 1 << 30)
    monkeypatch.setattr(steps, "faster", lambda T, B, H: True)
    monkeypatch.setattr(native, "walks_steps", lambda *call: True)
    return passes


def recording(passes, function):
    def call(*args):
        passes.append(function.__name__)
        return function(*args)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(recurrent, kind, case, memory, dtype, walked):
    recurrent(kind, dtype=dtype, memory=memory, **case).check("native", "reference")
    assert set(walked) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("name", CELL_CASES)
def test_gradients_of_all_cells(recurrent, name, memory, dtype):
    call = recurrent("lstm", dtype=dtype, memory=memory, return_cells=True, **CASES[name])
    call.check("native", "reference")


def test_random_calls(recurrent, kind):
    """Sizes and features as they come, against the definition in fp64."""
    generator = torch.Generator().manual_seed(CELLS[kind].code)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    for _ in range(25):
        T, B, H = 1 + below(6), 1 + below(6), 1 + below(37)
        case = {"T": T, "B": B, "H": H, "I": 1 + below(4), "bidirectional": bool(below(2))}
        case |= {"bias": below(4) > 0, "states": below(4) > 0}
        case |= {"memory": ("save", "recompute")[below(2)]}
        sizes = (T, B)
        rows = below(3)
        if rows == 1:
            case["lengths"] = torch.randint(T + 1, (B,), generator=generator)
        elif rows == 2:
            lengths = torch.randint(1, T + 1, (B,), generator=generator)
            lengths[below(B)] = T
            case["packed"] = sorted(lengths.tolist(), reverse=True)
            sizes = (sum(case["packed"]),)
        if below(2):
            case["reset"] = torch.rand(sizes, generator=generator) < 0.3
        recurrent(kind, dtype=torch.float64, **case).check("native", "reference")


@pytest.mark.parametrize("case", ("both", "lengths", "reset_packed"))
def test_gradcheck(recurrent, kind, case):
    small = CASES[case] | {"H": 2, "I": 2, "T": 5, "layers": 1}
    call = recurrent(kind, dtype=torch.float64, **small)
    if kind == "rnn_relu":  # away from its kink
        call = call.with_inputs(**{n: t + 2 for n, t in call.inputs.items() if "bias" in n})
    keys, leaves = list(call.inputs), [t.requires_grad_() for t in call.inputs.values()]

    def function(*tensors):
        return call.call(dict(zip(keys, tensors, strict=True)), backend="native")

    assert torch.autograd.gradcheck(
        function, leaves, atol=tolerance("gradcheck_fp64"), fast_mode=True
    )


@pytest.mark.parametrize("memory", ("save", "recompute"))
def test_what_may_not_be_read_may_be_nan(recurrent, kind, memory):
    """x and y's gradient past a row's length; and the state that a reset clears."""
    lengths, reset = LENGTHS, torch.zeros(5, 3, dtype=torch.bool)
    reset[0, 2] = True
    call = recurrent(kind, lengths=lengths, reset=reset, memory=memory, dtype=torch.float64)
    live = torch.arange(5)[:, None] < lengths

    def run(fill):
        states = {n: t.clone() for n, t in call.inputs.items() if n in ("h_0", "c_0")}
        for t in states.values():
            t[:, 2] = fill
        x = call.inputs["x"].masked_fill(~live[..., None], fill)
        leaves = {**call.inputs, "x": x, **states}
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        found = call.call(leaves, backend="native")
        grads = call.output_grads(found)
        grads[0] = grads[0].masked_fill(~live[..., None], fill)
        return [*found, *torch.autograd.grad(found, leaves.values(), grads)]

    for plain, poisonous in zip(run(1.0), run(float("nan")), strict=True):
        assert torch.equal(plain, poisonous)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_bits_without_tapes_and_in_any_memory(recurrent, kind, case):
    call = recurrent(kind, **case)
    first = call.run(backend="native")
    with poisoned():
        again = call.run(backend="native")
    for name in first:
        assert torch.equal(first[name], again[name]), name
    with torch.no_grad():
        for name, alone in zip(call.outputs, call.call(backend="native"), strict=True):
            assert torch.equal(first[name], alone), name


@pytest.mark.parametrize("case", ("even", "lengths", "reset_packed"))
def test_only_what_is_needed(recurrent, kind, case):
    call = recurrent(kind, dtype=torch.float64, **CASES[case])
    every = call.run(backend="native")
    for wanted in call.inputs:
        leaves = {n: t.detach().requires_grad_(n == wanted) for n, t in call.inputs.items()}
        found = call.call(leaves, backend="native")
        torch.autograd.backward(found, call.output_grads(found))
        assert_close(leaves[wanted].grad, every[f"d{wanted}"], "transform_fp64", name=wanted)


def test_recompute_makes_the_tapes_again(kind):
    """Of every step at once, as forward left them."""
    cell = CELLS[kind]
    if not cell.tape:
        pytest.skip("it has none")
    T, B, H, D = 4, 3, 19, 2
    shapes = [(cell.gates * H, n) for n in (3, H)] + [(cell.gates * H,)] * 2
    weights = [torch.randn(s, dtype=torch.float64) / 4 for s in shapes * D]
    x, h0 = torch.randn(T, B, 3, dtype=torch.float64), torch.randn(D, B, H, dtype=torch.float64)
    c0 = torch.randn(D, B, H, dtype=torch.float64) if cell.has_c else None
    lengths, reset = torch.tensor([4, 0, 2]), torch.rand(T, B) < 0.4
    found = steps.forward(cell, x, h0, c0, weights, None, lengths, reset, True, True)
    truth = reference.layer(cell, x, h0, c0, weights, None, lengths, reset, True)
    walk = steps.Walk.of(cell, x, h0, H, None, lengths, reset)
    h_prev = [walk.previous_states(d, found.y, h0) for d in range(D)]
    cells, gates = steps.tapes_again(walk, x, c0, weights, True, h_prev)
    live = (torch.arange(T)[:, None] < lengths)[..., None]
    for kept in (found.gates, gates):
        wanted = truth.gates * live
        assert_close(torch.where(live, kept, 0), wanted, "transform_fp64", name="gates")
    if cell.has_c:
        assert_close(cells, truth.cells, "transform_fp64", name="cells")


def test_empty_batch(recurrent, kind):
    for case in ({}, {"lengths": torch.zeros(0, dtype=torch.int64)}):
        found = recurrent(kind, B=0, bidirectional=True, **case).run(backend="native")
        for name, t in found.items():
            assert not t.any(), name


def test_one_gemm_a_step(recurrent, kind, monkeypatch):
    """And direction, forward as backward."""
    T, products = 5, []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (products.append(1), mm(*a, **k))[1])
    call = recurrent(kind, T=T, bidirectional=True)
    leaves = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
    found = call.call(leaves, backend="native")
    assert len(products) == 2 * (T + 1)  # and x W_ih^T
    products.clear()
    torch.autograd.grad(found, list(leaves.values()), call.output_grads(found))
    assert len(products) == 2 * T
