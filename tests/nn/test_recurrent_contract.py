"""Constructor, state dict and errors of ``sk.nn.LSTM``, ``GRU`` and ``RNN``: torch's own, word for word."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from torch import nn

import sora_kernels as sk


def error_of(function) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function()
    return caught.type, str(caught.value)


def zeros(*shape, dtype=torch.float64, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


def test_signature_is_the_documented_one(kind):
    text = kind.theirs.__doc__.splitlines()[0]
    ours = [
        p for p in inspect.signature(kind.ours).parameters.values() if p.kind is not p.KEYWORD_ONLY
    ]
    documented = re.fullmatch(r"__init__\((.*)\)", text)[1].split(",")
    assert [p.name for p in ours] == [p.partition("=")[0] for p in documented]
    defaults = [repr(p.default) for p in ours if p.default is not p.empty]
    assert defaults == [p.partition("=")[2] for p in documented if "=" in p]


POSITIONAL = {
    "LSTM": (4, 6, 2, True, True, 0.1, True, 2),
    "GRU": (4, 6, 2, False, True, 0.1, True),
    "RNN": (4, 6, 2, "relu", True, True, 0.1, True),
}


@pytest.mark.parametrize("positional", (True, False), ids=("positional", "keyword"))
def test_what_the_constructor_makes(kind, positional):
    args = POSITIONAL[kind.name] if positional else (4, 6)
    options = {} if positional else {"num_layers": 3, "bias": False} | kind.fixed
    ours, theirs = kind.ours(*args, **options), kind.theirs(*args, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert not list(ours.buffers()) and not list(ours.children())
    own = ("nonlinearity",) if kind.name == "RNN" else ()
    for name in (*kind.theirs.__constants__, *own, "_flat_weights_names", "_all_weights"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("_flat_weights", "all_weights"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name)), name
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert ours.flatten_parameters() is None


def test_same_initial_weights(kind):
    options = kind.fixed | {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(5)
    ours = kind.ours(4, 6, **options)
    torch.manual_seed(5)
    theirs = kind.theirs(4, 6, **options)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    torch.manual_seed(5)
    ours.reset_parameters()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_state_dicts_load_both_ways(case):
    kind, options = case
    ours, theirs = kind.pair(**options)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    del (missing := ours.state_dict())["weight_hh_l0"]
    with pytest.raises(RuntimeError, match='Missing key.*"weight_hh_l0"'):
        ours.load_state_dict(missing)


def test_repr_names_what_is_not_torchs(kind):
    ours = kind.ours(4, 6, backend="reference", memory="recompute", **kind.fixed)
    assert repr(ours) == f"{kind.name}(4, 6, backend='reference', memory='recompute')"


BAD_ARGUMENTS = [
    {"dropout": True}, {"dropout": 1.5}, {"dropout": "x"}, {"input_size": 0}, {"hidden_size": 0},
    {"num_layers": 0}, {"bias": 1}, {"batch_first": 0}, {"input_size": 4.0}, {"hidden_size": 6.0},
    {"proj_size": -1}, {"proj_size": 6}, {"proj_size": 2}, {"nonlinearity": "cosine"},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", POSITIONAL)
def test_constructor_errors(name, change):
    if (change == {"proj_size": 2} and name == "LSTM") or (
        "nonlinearity" in change and name != "RNN"
    ):
        return  # an ordinary argument here, or nobody's
    options = {"input_size": 4, "hidden_size": 6} | change
    mine, own = getattr(sk.nn, name), getattr(nn, name)
    assert error_of(lambda: mine(**options)) == error_of(lambda: own(**options))


def test_dropout_on_a_single_layer_warns(kind):
    caught = []
    for cls in (kind.ours, kind.theirs):
        with pytest.warns(UserWarning) as found:
            cls(4, 6, dropout=0.5)
        caught.append([str(w.message) for w in found])
    assert caught[0] == caught[1] and "after all but last recurrent layer" in caught[0][0]


def test_options_that_torch_has_not(kind):
    with pytest.raises(
        ValueError, match="backend must be one of native, torch, reference or None, got 'x'"
    ):
        kind.ours(4, 6, backend="x")
    with pytest.raises(ValueError, match="memory must be 'save' or 'recompute', got 'none'"):
        kind.ours(4, 6, memory="none")
    with pytest.raises(TypeError):
        kind.ours(4, 6, unknown=1)


BAD_CALLS = {
    "rank_1": lambda both: (zeros(4),),
    "rank_4": lambda both: (zeros(2, 5, 3, 4),),
    "input_size": lambda both: (zeros(5, 3, 7),),
    "input_size_unbatched": lambda both: (zeros(5, 7),),
    "dtype": lambda both: (zeros(5, 3, 4, dtype=torch.float16),),
    "integers": lambda both: (zeros(5, 3, 4, dtype=torch.int64),),
    "no_steps": lambda both: (zeros(0, 3, 4),),
    "no_steps_unbatched": lambda both: (zeros(0, 4),),
    "hx_rank": lambda both: (zeros(5, 3, 4), both(zeros(1, 6))),
    "hx_rank_unbatched": lambda both: (zeros(5, 4), both(zeros(1, 1, 6))),
    "hx_batch": lambda both: (zeros(5, 3, 4), both(zeros(1, 2, 6))),
    "hx_layers": lambda both: (zeros(5, 3, 4), both(zeros(2, 3, 6))),
    "hx_width": lambda both: (zeros(5, 3, 4), both(zeros(1, 3, 5))),
    "hx_unbatched": lambda both: (zeros(5, 4), both(zeros(1, 5))),
    "hx_is_a_list_of_3": lambda both: (zeros(5, 3, 4), [zeros(1, 3, 6)] * 3),
    "device": lambda both: (zeros(5, 3, 4, device="meta"),),
    "hx_device": lambda both: (zeros(5, 3, 4), both(zeros(1, 3, 6, device="meta"))),
    "not_a_tensor": lambda both: (None,),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_call_errors(kind, name):
    ours, theirs = kind.pair()
    args = BAD_CALLS[name](kind.both)
    assert error_of(lambda: ours(*args)) == error_of(lambda: theirs(*args))


def test_errors_of_one_state_of_two():
    ours, theirs = sk.nn.LSTM(4, 6, dtype=torch.float64), nn.LSTM(4, 6, dtype=torch.float64)
    x, h = zeros(5, 3, 4), zeros(1, 3, 6)
    for hx in ((h, zeros(1, 3, 5)), (zeros(1, 2, 6), h), (h, zeros(1, 6)), (h, h.to("meta"))):
        assert error_of(lambda: ours(x, hx)) == error_of(lambda: theirs(x, hx))  # noqa: B023


def test_hx_of_another_dtype(kind):
    """Torch fails here too, inside a matrix product; ours says which tensor it is."""
    ours, theirs = kind.pair()
    args = zeros(5, 3, 4), kind.both(zeros(1, 3, 6, dtype=torch.float32))
    with pytest.raises(RuntimeError):
        theirs(*args)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        ours(*args)


BAD_WEIGHTS = {
    "fewer_rows": zeros(5, 6),
    "fewer_columns": zeros(24, 5),
    "a_vector": zeros(24),
    "dtype": zeros(24, 6, dtype=torch.float32),
    "device": zeros(24, 6, device="meta"),
    "none": None,
}


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_a_weight_that_does_not_fit_is_an_error(kind, name, backend):
    """Never a read past its end: nn.LSTM returns garbage for the first of these."""
    ours, _ = kind.pair()
    ours.backend = backend
    bad = BAD_WEIGHTS[name]
    ours.weight_hh_l0 = None if bad is None else nn.Parameter(bad)
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises((RuntimeError, ValueError, TypeError)):
            ours(zeros(5, 3, 4))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_from_and_to_torch_share_parameters(case):
    kind, options = case
    with warnings.catch_warnings(record=True):  # of dropout on one layer, where there is one
        theirs = kind.theirs(4, 6, dropout=0.2, **kind.fixed, **options).eval()
    theirs.weight_ih_l0.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = kind.ours.from_torch(theirs, backend="reference", memory="recompute")
        back = ours.to_torch()
    assert (ours.backend, ours.memory) == ("reference", "recompute")
    assert type(ours) is kind.ours and type(back) is kind.theirs
    assert repr(back) == repr(theirs) and vars(back).keys() == vars(theirs).keys()
    assert not ours.training and not back.training and ours.dropout == back.dropout == 0.2
    for name, parameter in theirs.named_parameters():
        assert getattr(ours, name) is parameter and getattr(back, name) is parameter
    x = torch.randn(3, 5, 4)
    assert torch.equal(theirs(x)[0], back(x)[0])


def test_from_torch_refuses_other_classes(kind):
    other = nn.LSTM if kind.name == "GRU" else nn.GRU
    with pytest.raises(
        TypeError, match=f"module: expected torch.nn.{kind.name}, got {other.__name__}"
    ):
        kind.ours.from_torch(other(4, 6))
    ours, _ = kind.pair()
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    with pytest.raises(TypeError, match="weight_hh_l0: expected a Parameter, got a parametrised"):
        ours.to_torch()
