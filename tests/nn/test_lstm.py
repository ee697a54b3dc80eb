from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sora_kernels import BackendError
from sora_kernels.nn.lstm import LSTM
from sora_kernels.testing import assert_close

CONFIGS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"proj_size": 2, "num_layers": 2},
    {"proj_size": 3, "bidirectional": True, "batch_first": True},
]


def pair(**options) -> tuple[LSTM, nn.LSTM]:
    """Ours and torch's, with the same weights."""
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 6, dtype=torch.float64, **options)
    ours = LSTM(4, 6, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(module, batch: int | None = 3):
    count = module.num_layers * (1 + module.bidirectional)
    rows = () if batch is None else (batch,)
    size = module.proj_size or module.hidden_size
    return tuple(
        torch.randn(count, *rows, s, dtype=torch.float64) for s in (size, module.hidden_size)
    )


def assert_same(ours, theirs) -> None:
    flat = lambda found: (found[0], *found[1])  # noqa: E731
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert_close(a, b, "transform_fp64")


@pytest.mark.parametrize("given", (False, True), ids=("zeros", "hx"))
@pytest.mark.parametrize("batched", (True, False), ids=("batched", "unbatched"))
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_same_as_torch(options, batched, given):
    ours, theirs = pair(**options)
    x = torch.randn(*((5, 3) if batched else (5,)), 4, dtype=torch.float64, requires_grad=True)
    hx = None
    if given:
        batch = (5 if ours.batch_first else 3) if batched else None
        hx = states(ours, batch)
    found, wanted = ours(x, hx), theirs(x, hx)
    assert_same(found, wanted)
    grads = [torch.autograd.grad(y.square().sum() + h.sum(), [x, *m.parameters()])
             for m, (y, (h, _)) in ((ours, found), (theirs, wanted))]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, "transform_fp64")


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_packed_sequence(options):
    ours, theirs = pair(**options)
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([2, 5, 1, 5, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=ours.batch_first, enforce_sorted=False)
    hx = states(ours, 5)
    (a, hidden), (b, wanted) = ours(packed, hx), theirs(packed, hx)
    assert torch.equal(a.batch_sizes, b.batch_sizes)
    assert torch.equal(a.unsorted_indices, b.unsorted_indices)
    assert_same((pad_packed_sequence(a)[0], hidden), (pad_packed_sequence(b)[0], wanted))
    assert_same((ours(packed)[0].data, hidden), (theirs(packed)[0].data, hidden))


def test_packed_sequence_refusals():
    ours, _ = pair()
    packed = pack_padded_sequence(torch.randn(5, 3, 4, dtype=torch.float64), [5, 3, 1])
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 4, 6\]"
    ):
        ours(packed, states(ours, 4))
    narrow = pack_padded_sequence(torch.randn(5, 3, 2, dtype=torch.float64), [5, 3, 1])
    with pytest.raises(RuntimeError, match="must be equal to input_size. Expected 4, got 2"):
        ours(narrow)
    ours.backend = "reference"
    with pytest.raises(BackendError, match="'reference' cannot run: the input is a PackedSequence"):
        ours(packed)


def test_constructor_matches_torch():
    for arguments, options in (
        ((4, 6, 2, True, True, 0.1, True, 2), {}),
        ((4, 6), {"num_layers": 3, "bias": False}),
    ):
        ours, theirs = LSTM(*arguments, **options), nn.LSTM(*arguments, **options)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
        for name in (*nn.LSTM.__constants__, "_flat_weights_names", "_all_weights"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
    torch.manual_seed(5)
    ours = LSTM(4, 6, 2)
    torch.manual_seed(5)
    theirs = nn.LSTM(4, 6, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    ours.flatten_parameters()


BAD_ARGUMENTS = [
    {"dropout": True}, {"dropout": 1.5}, {"input_size": 0}, {"hidden_size": 0}, {"num_layers": 0},
    {"proj_size": -1}, {"proj_size": 6}, {"bias": 1}, {"batch_first": 0}, {"input_size": 4.0},
    {"hidden_size": 6.0},
]  # fmt: skip


def error_of(function) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("change", BAD_ARGUMENTS, ids=str)
def test_constructor_errors_are_torchs(change):
    options = {"input_size": 4, "hidden_size": 6} | change
    assert error_of(lambda: LSTM(**options)) == error_of(lambda: nn.LSTM(**options))


def test_constructor_backend_and_warning():
    with pytest.raises(
        ValueError, match="backend must be one of native, torch, reference or None, got 'x'"
    ):
        LSTM(4, 6, backend="x")
    with pytest.warns(
        UserWarning, match="dropout option adds dropout after all but last recurrent layer"
    ):
        LSTM(4, 6, dropout=0.5)


def zeros(*shape, dtype=torch.float64, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


BAD_CALLS = {
    "rank": lambda: (zeros(4),),
    "input_size": lambda: (zeros(5, 3, 7),),
    "dtype": lambda: (zeros(5, 3, 4, dtype=torch.float16),),
    "no_steps": lambda: (zeros(0, 3, 4),),
    "hx_rank": lambda: (zeros(5, 3, 4), (zeros(1, 6), zeros(1, 6))),
    "hx_rank_unbatched": lambda: (zeros(5, 4), (zeros(1, 1, 6), zeros(1, 1, 6))),
    "h_size": lambda: (zeros(5, 3, 4), (zeros(1, 2, 6), zeros(1, 3, 6))),
    "c_size": lambda: (zeros(5, 3, 4), (zeros(1, 3, 6), zeros(1, 3, 5))),
    "unbatched_size": lambda: (zeros(5, 4), (zeros(1, 5), zeros(1, 6))),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_call_errors_are_torchs(name):
    ours, theirs = pair()
    arguments = BAD_CALLS[name]()
    assert error_of(lambda: ours(*arguments)) == error_of(lambda: theirs(*arguments))


def test_mixed_devices_and_dtypes():
    ours, _ = pair()
    h, c = states(ours)
    x = zeros(5, 3, 4)
    with pytest.raises(RuntimeError, match="Input and parameter tensors .* found input .* meta"):
        ours(x.to("meta"))
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device"):
        ours(x, (h, c.to("meta")))
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        ours(x, (h.float(), c))


def test_every_way_to_change_a_weight_is_seen():
    ours, theirs = pair()
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    def check():
        theirs.load_state_dict({k: v for k, v in zip(theirs.state_dict(), weights(), strict=True)})
        assert_same(ours(x), theirs(x))

    def weights():
        return [getattr(ours, name).detach() for name in ours._flat_weights_names]

    ours.weight_hh_l0 = nn.Parameter(torch.randn(24, 6, dtype=torch.float64))
    check()
    with torch.no_grad():
        ours.bias_ih_l0.add_(1)
    check()
    parametrizations.weight_norm(ours, "weight_hh_l0")
    with torch.no_grad():
        ours.parametrizations.weight_hh_l0.original0.mul_(2)
    check()
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    check()
    swapped = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    theirs.load_state_dict(swapped)
    assert_same(torch.func.functional_call(ours, swapped, (x,)), theirs(x))
    check()
    ours.weight_ih_l0 = theirs.weight_ih_l0 = nn.Parameter(torch.randn(24, 4).double())
    check()


def test_copies_and_casts():
    ours, theirs = pair(num_layers=2)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
        assert_same(copied(x), theirs(x))
        assert copied.backend is None
    changed = copy.deepcopy(ours)
    with torch.no_grad():
        changed.weight_hh_l0.zero_()
    assert_same(ours(x), theirs(x))
    ours.float()
    assert ours(x.float())[0].dtype == torch.float32
    assert ours.to("meta")(x.float().to("meta"))[0].is_meta


def test_from_and_to_torch_share_parameters():
    theirs = nn.LSTM(4, 6, 2, dropout=0.2, bidirectional=True, batch_first=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LSTM.from_torch(theirs, backend="reference")
        back = ours.to_torch()
    assert ours.backend == "reference" and not ours.training and not back.training
    assert repr(ours) == repr(theirs) == repr(back)
    for name, parameter in theirs.named_parameters():
        assert getattr(ours, name) is parameter and getattr(back, name) is parameter
    x = torch.randn(3, 5, 4)
    assert torch.equal(theirs(x)[0], back(x)[0])
    with pytest.raises(TypeError, match="module: expected torch.nn.LSTM, got GRU"):
        LSTM.from_torch(nn.GRU(4, 6))
    parametrizations.weight_norm(ours, "weight_hh_l0")
    with pytest.raises(TypeError, match="weight_hh_l0: expected a Parameter"):
        ours.to_torch()


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_compile_fullgraph(options):
    ours, _ = pair(**options)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((5, 3), (6, 4)):
        shape = (B, T, 4) if ours.batch_first else (T, B, 4)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=(T == 6)):
            y, (h, _) = compiled(x)
        dx = torch.autograd.grad(y.sum() + h.sum(), x)[0]
        y, (h, _) = ours(x)
        assert_close(dx, torch.autograd.grad(y.sum() + h.sum(), x)[0], "transform_fp64")


def test_export():
    ours = LSTM(4, 6, batch_first=True, bidirectional=True)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(ours, (torch.randn(3, 5, 4),), dynamic_shapes=(sizes,))
    x = torch.randn(2, 9, 4)
    assert_close(program.module()(x)[0], ours(x)[0], "composition_fp32")


def test_vmap_over_an_ensemble():
    members = [LSTM(4, 6).double() for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(members)
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    def call(weights):
        return torch.func.functional_call(members[0], weights, (x,))[0]

    together = torch.vmap(call)(parameters)
    for k, member in enumerate(members):
        assert_close(together[k], member(x)[0], "transform_fp64")


def test_autocast():
    ours = LSTM(4, 6, bidirectional=True)
    theirs = ours.to_torch()
    x = torch.randn(5, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(x), theirs(x)
        packed = pack_padded_sequence(x, [5, 3, 1])
        assert ours(packed)[0].data.dtype == theirs(packed)[0].data.dtype
    assert [t.dtype for t in (found[0], *found[1])] == [t.dtype for t in (wanted[0], *wanted[1])]
    found[0].float().sum().backward()
    assert ours.weight_ih_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", (None, "reference"))
def test_eval_and_double_backward(backend):
    ours = LSTM(4, 6, dtype=torch.float64, backend=backend).eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x)[0].square().sum(), x, create_graph=True)
    if backend is None and ours_runs_torch(ours, x):
        pytest.skip("without the extension torch's LSTM runs, which this case is not about")
    dx.square().sum().backward()
    assert x.grad.abs().sum() > 0


def ours_runs_torch(module, x) -> bool:
    from sora_kernels import explain
    from sora_kernels.ops.lstm import lstm

    return explain(lstm, x, None, list(module.parameters())).chosen == "torch"


@pytest.mark.filterwarnings("ignore:dropout option")
def test_dropout_only_between_layers_and_in_training():
    x = torch.randn(5, 3, 4)
    one = LSTM(4, 6, dropout=0.9)
    assert torch.equal(one(x)[0], one.eval()(x)[0])
    two = LSTM(4, 6, 2, dropout=0.9)
    assert not torch.equal(two(x)[0], two(x)[0])
    assert torch.equal(two.eval()(x)[0], two(x)[0])


def test_empty_batch():
    ours = LSTM(4, 6, bidirectional=True)
    y, (h, c) = ours(torch.randn(5, 0, 4))
    assert y.shape == (5, 0, 12) and h.shape == c.shape == (2, 0, 6)
