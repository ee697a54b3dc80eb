"""Every error message, every backend's reason, and which backend is chosen."""

from __future__ import annotations

import pytest
import torch

from sora_kernels import BackendError, _native, explain
from sora_kernels.ops.lstm import backends, gru, lstm, plans, rnn
from sora_kernels.testing import assert_close

NATIVE = pytest.mark.native
RESET = torch.zeros(5, 3, dtype=torch.bool)
LENGTHS = torch.tensor([5, 3, 1])

BAD_OPTIONS = [
    ({"memory": "keep"}, "memory must be 'save' or 'recompute', got 'keep'"),
    ({"precision": "tf16"}, "precision must be None, 'tf32' or 'ieee', got 'tf16'"),
    ({"backend": "cudnn"}, "backend must be one of native, torch, reference or None, got 'cudnn'"),
    ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"num_layers": 2}, "weights must be 2 layers x 1 directions x 4 tensors .* got 4"),
    ({"bidirectional": True}, "weights must be 1 layers x 2 directions x 4 tensors .* got 4"),
    ({"bias": False}, "weights must be 1 layers x 1 directions x 2 tensors for bias=False"),
    ({"lengths": torch.tensor([1, 2])}, r"lengths must be int32 or int64 \[3\], got .* \(2,\)"),
    ({"lengths": torch.ones(3)}, r"lengths must be int32 or int64 \[3\], got torch.float32"),
    ({"reset": torch.zeros(5, 3)}, r"reset must be bool \(5, 3\) on cpu, got torch.float32"),
    ({"reset": torch.zeros(3, 5, dtype=torch.bool)}, r"reset must be bool \(5, 3\)"),
    ({"reset": RESET.to("meta")}, r"reset must be bool \(5, 3\) on cpu, got .* on meta"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(recurrent, kind, options, message):
    call = recurrent(kind)
    with pytest.raises(ValueError, match=f"^{call.operator}: {message}"):
        call.call(**options)


BAD_TENSORS = [
    ("x", lambda t: t[0], r"x must be \[T, B, I\], got \(3, 4\)"),
    ("x", lambda t: t[:0], r"x must have at least one step, got \(0, 3, 4\)"),
    ("x", lambda t: t.int(), "x must be floating point, got torch.int32"),
    ("h_0", lambda t: t[:, :2], r"\w+ must be \(1, 3, 6\) torch.float32 on cpu, got \(1, 2, 6\)"),
    ("h_0", lambda t: t.to("meta"), r"\w+ must be .* on cpu, got .* on meta"),
    ("weight_ih_l0", lambda t: t[:, :3], r"weights\[0\] must be \(\d+, 4\) .* got \(\d+, 3\)"),
    ("bias_hh_l0", lambda t: t.half(), r"weights\[3\] must be .* got \(\d+,\) torch.float16"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_TENSORS)
def test_bad_tensors(recurrent, kind, name, change, message):
    call = recurrent(kind)
    with pytest.raises(ValueError, match=f"^{call.operator}: {message}"):
        call.with_inputs(**{name: change(call.inputs[name])}).call()


def test_bad_recurrent_weight(recurrent, kind):
    call = recurrent(kind)
    change, form = (lambda t: t[:-1]), f"{call.cell.gates}*H"
    if call.cell.gates == 1:
        change, form = (lambda t: t[0]), "H"
    message = rf"weights\[1\] \(w_hh\) must be \[{form}, H\], got".replace("*", r"\*")
    with pytest.raises(ValueError, match=message):
        call.with_inputs(weight_hh_l0=change(call.inputs["weight_hh_l0"])).call()


def test_bad_arguments_of_one_operator(recurrent):
    call = recurrent("lstm")
    x, (h, c), weights = call.split()
    with pytest.raises(ValueError, match=r"lstm: hx must be \(h_0, c_0\) or None, got 1 tensors"):
        lstm(x, (h,), weights)
    with pytest.raises(ValueError, match=r"lstm: hx must be \(h_0, c_0\) or None, got a Tensor"):
        lstm(x, h, weights)
    with pytest.raises(ValueError, match=r"lstm: c_0 must be .* got \(1, 3, 6\) torch.float64"):
        lstm(x, (h, c.double()), weights)
    with pytest.raises(
        ValueError, match="lstm: proj_size must be in 0..hidden_size - 1 = 5, got 9"
    ):
        lstm(x, None, [*weights, weights[0]], proj_size=9)
    with pytest.raises(ValueError, match="lstm: .* bias=False, proj_size=6, got 4"):
        lstm(x, None, weights, proj_size=6, bias=False)
    for function, kind in ((gru, "gru"), (rnn, "rnn_tanh")):
        x, h, weights = recurrent(kind).split()
        with pytest.raises(
            ValueError, match=f"{kind[:3]}: hx must be a tensor or None, got 2 tensors"
        ):
            function(x, (h, h), weights)
        with pytest.raises(TypeError, match="proj_size"):
            function(x, h, weights, proj_size=2)
    with pytest.raises(ValueError, match="rnn: nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        rnn(x, None, weights, nonlinearity="gelu")


@pytest.mark.parametrize(
    "batch_sizes", ([3, 2, 2], [2, 3, 1], [3, 4, -1], [6, 6], [3, 3, 0]), ids=str
)
@pytest.mark.parametrize("backend", (pytest.param("native", marks=NATIVE), "reference"))
def test_bad_batch_sizes(recurrent, kind, backend, batch_sizes):
    """Six rows, and sizes that do not describe them."""
    call = recurrent(kind, T=2, packed=[2, 2, 2])
    call.batch_sizes = torch.tensor(batch_sizes)
    with pytest.raises((ValueError, RuntimeError), match="batch_sizes"):
        call.call(backend=backend)


def refused(call, backend, why, **options):
    """The named backend says why, and so does ``explain``."""
    operator = call.operator
    with pytest.raises(BackendError, match=f"{operator}: backend '{backend}' cannot run: .*{why}"):
        call.call(backend=backend, **options)
    explanation = explain(operator, *call.split(), **call.options, **options)
    row = next(row for row in explanation.rows if row.backend == backend)
    assert not row.usable and why in row.why
    assert explanation.chosen != backend


def test_torch_says_why(recurrent, kind):
    refused(recurrent(kind), "torch", "torch's layer cannot reset", reset=RESET)
    if kind == "lstm":
        refused(recurrent(kind), "torch", "return_cells is True", return_cells=True)


@NATIVE
def test_native_says_why_on_the_cpu(recurrent, kind):
    call = recurrent(kind, dtype=torch.float16)
    refused(call, "native", "x is torch.float16 on the CPU")
    call = recurrent(kind)
    meta = call.with_inputs(**{name: t.to("meta") for name, t in call.inputs.items()})
    refused(meta, "native", "x is on meta")


def facts(**changed):
    """Of a call that every backend takes on CUDA."""
    plain = {
        "cell": "lstm", "device": torch.device("cuda"), "dtype": torch.float32, "steps": 50,
        "batch": 3, "hidden_size": 64, "proj_size": 0, "directions": 1, "grad": False,
        "tapes": False, "ragged": False, "reset": False, "cells": False, "recompute": False,
        "precision": "tf32",
    }  # fmt: skip
    return backends.Facts(**{**plain, **changed})


CUDA = [
    ("native", {"dtype": torch.float8_e4m3fn}, "x is torch.float8_e4m3fn"),
    ("torch", {"precision": "ieee"}, "precision is 'ieee'"),
    ("torch", {"tapes": True}, "keeps no gates"),
]


@pytest.mark.parametrize(("backend", "changed", "why"), CUDA)
def test_reasons_on_cuda(backend, changed, why):
    verdict = backends.OPERATORS["lstm"].backends[backend].can_run(facts(**changed))
    assert not verdict.ok and why in verdict.why


CPU = torch.device("cpu")
FIRST = [
    ({}, "torch"),
    ({"device": CPU, "batch": 8}, "native"),
    ({"device": CPU, "batch": 64}, "torch"),
    ({"device": CPU, "batch": 64, "grad": True}, "torch"),
    ({"device": CPU, "batch": 64, "grad": True, "recompute": True}, "native"),
    ({"device": CPU, "batch": 64, "ragged": True}, "native"),
    ({"device": CPU, "batch": 64, "proj_size": 8}, "native"),
    ({"device": CPU, "batch": 64, "dtype": torch.float64}, "native"),
    ({"device": CPU, "batch": 64, "cell": "gru"}, "native"),
    ({"device": CPU, "batch": 64, "cell": "rnn_relu"}, "native"),
    ({"device": CPU, "batch": 64, "cell": "gru", "steps": 1}, "torch"),
    ({"device": CPU, "batch": 64, "steps": 5}, "native"),
    ({"device": CPU, "batch": 1024, "grad": True}, "native"),
]


@pytest.mark.parametrize(("changed", "first"), FIRST)
def test_preference(changed, first):
    assert backends._prefer(facts(**changed))[0] == first


@pytest.fixture
def h200(monkeypatch):
    """The choice as on one."""
    monkeypatch.setattr(_native, "cuda_device_status", lambda device: _native.Status("ok"))
    monkeypatch.setattr(plans, "gpu_of", lambda device: plans.Gpu("sm90", 132, 1.755))


def test_choices_on_cuda(h200):
    """Weights in registers first, then cuDNN where it can run the call and is not slow."""
    wide = {"hidden_size": 512}
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        for changed, name in (
            ({}, "native"),
            ({"dtype": torch.bfloat16, "hidden_size": 128, "precision": ""}, "native"),
            ({"ragged": True}, "native"),
            (wide, "torch"),
            ({"precision": "ieee", "hidden_size": 512}, "native"),  # not what cuDNN's flag says
            (wide | {"dtype": torch.float64, "precision": ""}, "torch"),
            (wide | {"ragged": True}, "native"),
            (wide | {"reset": True}, "native"),
            (wide | {"reset": True, "ragged": True, "recompute": True, "grad": True}, "native"),
            (wide | {"tapes": True}, "native"),
            (wide | {"precision": "ieee", "proj_size": 2}, "native"),
        ):
            asked = facts(cell=cell, **changed)
            found = backends.OPERATORS[cell.partition("_")[0]].select("", asked).name
            assert found == name, changed


def test_deterministic_mode_passes_over_cudnn(h200):
    torch.use_deterministic_algorithms(True)
    try:
        for changed, name in (
            ({}, "native"),
            ({"ragged": True}, "native"),
            ({"cell": "gru"}, "native"),
            ({"proj_size": 2}, "native"),
            ({"cell": "gru", "device": CPU, "steps": 1}, "torch"),
        ):
            asked = facts(**changed)
            assert backends.OPERATORS[asked.cell].select("", asked).name == name
    finally:
        torch.use_deterministic_algorithms(False)


def test_sora_backend(recurrent, kind, monkeypatch):
    call = recurrent(kind, reset=RESET)
    monkeypatch.setenv("SORA_BACKEND", f"{call.operator}=torch")
    with pytest.raises(BackendError, match="torch's layer cannot reset"):
        call.call()
    monkeypatch.setenv("SORA_BACKEND", "reference")
    found = call.call()
    monkeypatch.delenv("SORA_BACKEND")
    for ours, other in zip(found, call.call(backend="reference"), strict=True):
        assert torch.equal(ours, other)


EVERYTHING = {
    "plain": {"layers": 2, "bidirectional": True},
    "ragged": {"lengths": LENGTHS, "reset": RESET},
    "packed": {"packed": [5, 4, 2], "bias": False},
    "recompute": {"memory": "recompute", "B": 20, "H": 40},
    "half": {"dtype": torch.float16},
    "wide": {"B": 20, "H": 40},
}


@pytest.mark.parametrize("case", EVERYTHING.values(), ids=EVERYTHING)
def test_the_automatic_choice_runs_everything(recurrent, kind, case):
    call = recurrent(kind, **{"dtype": torch.float64, **case})
    ours = call.run()
    if "dtype" in case:
        assert all(t.isfinite().all() and t.dtype == case["dtype"] for t in ours.values())
        return
    plain = call.run(backend="reference")
    for name in plain:
        assert_close(ours[name], plain[name], "transform_fp64", name=name)
