"""LSTMs with projections by kernels that know none, as on CUDA: here over the CPU's step by step kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels.ops.lstm import native, projection, steps
from sora_kernels.ops.lstm.cells import LSTM
from sora_kernels.ops.lstm.op import LAYERS
from sora_kernels.testing import assert_close, poisoned, tolerance

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LENGTHS = torch.tensor([3, 0, 5])
RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
PACKED_RESET = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
CASES = {
    "even": {},
    "one_step": {"T": 1, "bidirectional": True},
    "no_states": {"states": False, "bidirectional": True},
    "no_states_one_direction": {"states": False, "lengths": LENGTHS},
    "no_bias": {"bias": False, "bidirectional": True, "layers": 2},
    "to_one": {"proj": 1, "H": 2, "B": 17},
    "hardly_narrower": {"proj": 19, "bidirectional": True},
    "lengths": {"lengths": LENGTHS},
    "lengths_both": {"lengths": LENGTHS, "bidirectional": True, "layers": 2},
    "lengths_past_both_ends": {"lengths": torch.tensor([7, -1, 1]).int(), "bidirectional": True},
    "packed": {"packed": [5, 4, 2], "bidirectional": True},
    "packed_alike": {"packed": [4, 4, 1], "T": 4},
    "packed_one_row": {"packed": [3], "B": 1, "T": 3, "bias": False},
    "reset": {"reset": RESET, "bidirectional": True},
    "reset_lengths": {"reset": RESET, "lengths": LENGTHS, "bidirectional": True},
    "reset_lengths_no_states": {"reset": RESET, "lengths": LENGTHS, "states": False},
    "reset_packed": {"reset": PACKED_RESET, "packed": [5, 4, 2], "bidirectional": True},
    "many_rows": {"T": 3, "B": 40, "H": 33, "I": 5, "proj": 12},
}


@pytest.fixture(autouse=True)
def folded(monkeypatch):
    """Sends every call over the core that CUDA has; the list of the passes that went so."""
    passes = []
    for name in ("forward", "backward"):
        function = getattr(projection, name)
        monkeypatch.setattr(native, name, over_steps(passes, function))
    return passes


def over_steps(passes, function):
    def call(cell, *args):
        assert cell is LSTM
        passes.append(function.__name__)
        return function(steps, *args)

    return call


@pytest.fixture
def projected(recurrent):
    def make(**case):
        return recurrent("lstm", **{"proj": 7, "H": 20, **case})

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(projected, case, memory, dtype, folded):
    projected(dtype=dtype, memory=memory, **case).check("native", "reference")
    assert set(folded) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("name", ("even", "reset_lengths", "reset_packed"))
def test_gradients_of_all_cells(projected, name, memory, dtype):
    call = projected(dtype=dtype, memory=memory, return_cells=True, **CASES[name])
    call.check("native", "reference")


def test_random_calls(projected):
    """Sizes and features as they come, against the definition in fp64."""
    generator = torch.Generator().manual_seed(0)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    for _ in range(40):
        T, B, H = 1 + below(6), 1 + below(6), 2 + below(36)
        case = {"T": T, "B": B, "H": H, "I": 1 + below(4), "bidirectional": bool(below(2))}
        case |= {"proj": 1 + below(H - 1), "bias": below(4) > 0, "states": below(4) > 0}
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
        projected(dtype=torch.float64, **case).check("native", "reference")


@pytest.mark.parametrize("case", ("no_bias", "lengths_both", "reset_packed"))
def test_gradcheck(projected, case):
    small = CASES[case] | {"H": 3, "proj": 2, "I": 2, "T": 5, "layers": 1}
    call = projected(dtype=torch.float64, **small)
    keys, leaves = list(call.inputs), [t.requires_grad_() for t in call.inputs.values()]

    def function(*tensors):
        return call.call(dict(zip(keys, tensors, strict=True)), backend="native")

    assert torch.autograd.gradcheck(
        function, leaves, atol=tolerance("gradcheck_fp64"), fast_mode=True
    )


@pytest.mark.parametrize("memory", ("save", "recompute"))
@pytest.mark.parametrize("bidirectional", (False, True))
def test_what_may_not_be_read_may_be_nan(projected, bidirectional, memory):
    """x and the outputs' gradients past a row's length; and the state that a reset clears."""
    reset = torch.zeros(5, 3, dtype=torch.bool)
    reset[0, 2] = True
    call = projected(
        lengths=LENGTHS, reset=reset, memory=memory, bidirectional=bidirectional, return_cells=True,
        dtype=torch.float64,
    )  # fmt: skip
    live = (torch.arange(5)[:, None] < LENGTHS)[..., None]

    def run(fill):
        states = {n: t.clone() for n, t in call.inputs.items() if n in ("h_0", "c_0")}
        for t in states.values():
            t[0, 2] = fill
        x = call.inputs["x"].masked_fill(~live, fill)
        leaves = {**call.inputs, "x": x, **states}
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        found = call.call(leaves, backend="native")
        grads = call.output_grads(found)
        for k in (0, 3):
            grads[k] = grads[k].masked_fill(~live, fill)
        return [*found, *torch.autograd.grad(found, leaves.values(), grads)]

    for plain, poisonous in zip(run(1.0), run(float("nan")), strict=True):
        assert torch.equal(plain, poisonous)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_bits_whatever_is_saved_and_in_any_memory(projected, case):
    call = projected(dtype=torch.bfloat16, **case)
    first = call.run(backend="native")
    with poisoned():
        for memory in ("save", "recompute"):
            again = call.run(backend="native", memory=memory)
            for name in first:
                assert torch.equal(first[name], again[name]), name
    with torch.no_grad():
        for name, alone in zip(call.outputs, call.call(backend="native"), strict=True):
            assert torch.equal(first[name], alone), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_states_are_the_last_outputs(projected, dtype):
    y, h_n, _ = projected(bidirectional=True, lengths=LENGTHS, dtype=dtype).call(backend="native")
    for b, length in enumerate(LENGTHS.tolist()):
        if length:
            assert torch.equal(h_n[0, b], y[length - 1, b, :7])
            assert torch.equal(h_n[1, b], y[0, b, 7:])
    call = projected(bidirectional=True, packed=[5, 4, 2], dtype=dtype)
    y, h_n, _ = call.call(backend="native")
    starts = call.batch_sizes.cumsum(0) - call.batch_sizes
    for b, length in enumerate((5, 4, 2)):
        assert torch.equal(h_n[0, b], y[starts[length - 1] + b, :7])
    assert torch.equal(h_n[1], y[:3, 7:])


@pytest.mark.parametrize("case", ("even", "no_states", "lengths_both", "reset_packed"))
def test_only_what_is_needed(projected, case):
    call = projected(dtype=torch.float64, **CASES[case])
    every = call.run(backend="native")
    for wanted in call.inputs:
        leaves = {n: t.detach().requires_grad_(n == wanted) for n, t in call.inputs.items()}
        found = call.call(leaves, backend="native")
        torch.autograd.backward(found, call.output_grads(found))
        assert_close(leaves[wanted].grad, every[f"d{wanted}"], "transform_fp64", name=wanted)


def test_gradients_of_outputs_may_be_missing(projected):
    """Each alone; together they are the whole."""
    call = projected(
        bidirectional=True, lengths=LENGTHS, reset=RESET, return_cells=True, dtype=torch.float64
    )
    leaves = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
    found = call.call(leaves, backend="native")
    grads = call.output_grads(found)

    def gradients(outputs):
        return torch.autograd.grad(
            [found[k] for k in outputs], leaves.values(), [grads[k] for k in outputs],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip

    alone = [gradients([k]) for k in range(len(found))]
    for name, whole, *parts in zip(leaves, gradients(range(len(found))), *alone, strict=True):
        assert_close(sum(parts), whole, "transform_fp64", name=name)


@pytest.mark.parametrize("name", ("no_bias", "lengths_both", "reset_packed"))
def test_shapes_are_those_of_the_op(projected, name):
    """As the fake implementations say, tapes too."""
    call = projected(dtype=torch.bfloat16, **{**CASES[name], "layers": 1})
    x, (h0, c0), weights = call.split()
    rows = (call.batch_sizes, call.options.get("lengths"), call.options.get("reset"))
    bias = call.options["bias"]
    found = projection.forward(steps, x, h0, c0, weights, *rows, bias, True)
    fake = LAYERS["lstm"]._forward_fake(x, h0, c0, weights, *rows, bias, "", "")
    for field, ours, wanted in zip(found._fields, found, fake, strict=True):
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), field
    needs = [True] * (3 + len(weights))
    *inputs, dweights = projection.backward(
        steps, *(torch.randn_like(t) for t in found[:4]), x, h0, c0, weights, *rows, found.y,
        found.cells, found.gates, bias, needs,
    )  # fmt: skip
    for ours, wanted in zip((*inputs, *dweights), (x, h0, c0, *weights), strict=True):
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)


class NothingRead(TorchDispatchMode):
    """Refuses operations whose result the host must see."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(waits in name for waits in self.WAITS), name
        mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert not mask, "index by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ("save", "recompute"))
def test_nothing_waits(projected, memory):
    """Lengths and resets stay where they are."""
    call = projected(lengths=LENGTHS, reset=RESET, bidirectional=True, memory=memory)
    leaves = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
    with NothingRead():
        found = call.call(leaves, backend="native")
        torch.autograd.grad(found, list(leaves.values()), call.output_grads(found))


def test_empty_batch(projected):
    for case in ({}, {"lengths": torch.zeros(0, dtype=torch.int64)}):
        found = projected(B=0, bidirectional=True, **case).run(backend="native")
        for name, t in found.items():
            assert not t.any(), name
