"""What runs on CUDA and what it is expected to cost, as far as no GPU is needed to ask."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from sora_kernels import _native, _tuning
from sora_kernels.ops.lstm import backends, native, plans, precision, resident, steps
from sora_kernels.ops.lstm.cells import CELLS, LSTM

H200 = plans.Gpu("sm90", 132, 1.755)
CUDA = torch.device("cuda")


def layer(**changed):
    plain = plans.Layer("lstm", torch.bfloat16, 16, 128, 1, False, False, 0, "")
    return plain._replace(**changed)


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "exact", "why"),
    [
        (torch.bfloat16, 128, "", ""),
        (torch.float16, 1, "", ""),
        (torch.float32, 64, "tf32", ""),
        (torch.bfloat16, 129, "", "hidden_size is 129; registers hold weights up to 128"),
        (torch.float32, 65, "tf32", "hidden_size is 65; registers hold weights up to 64"),
        (torch.float32, 64, "ieee", "precision is 'ieee'"),
        (torch.float64, 8, "", "x is torch.float64"),
    ],
)
def test_weights_in_registers(dtype, hidden_size, exact, why):
    verdict = plans.resident_can_run(dtype, hidden_size, exact)
    assert verdict.ok == (not why) and verdict.why.startswith(why)


@pytest.mark.parametrize(
    ("dtype", "H", "tf32", "walk"),
    [
        (torch.bfloat16, 128, False, resident),
        (torch.bfloat16, 192, False, steps),
        (torch.float32, 64, True, resident),
        (torch.float32, 64, False, steps),
        (torch.float64, 8, False, steps),
    ],
)
def test_the_walk_follows_the_settled_flag(monkeypatch, dtype, H, tf32, walk):
    monkeypatch.setattr(resident, "of_products", lambda: "tf32" if tf32 else "ieee")
    weights = [torch.zeros(4 * H, 3, dtype=dtype), torch.zeros(4 * H, H, dtype=dtype)]
    x = SimpleNamespace(dtype=dtype, is_cuda=True, shape=torch.Size([2, 1 << 29, 3]))
    assert native._walk_on_cuda(LSTM, x, weights).forward is walk.forward
    more = SimpleNamespace(dtype=dtype, is_cuda=True, shape=torch.Size([2, (1 << 29) + 1, 3]))
    assert native._walk_on_cuda(LSTM, more, weights).forward is steps.forward


@pytest.mark.parametrize(
    ("changed", "algorithm"),
    [
        ({"hidden_size": 192}, "small_h"),
        ({"hidden_size": 193}, "standard"),
        ({"hidden_size": 384, "cell": "rnn_tanh"}, "small_h"),
        ({"hidden_size": 256, "dtype": torch.float16}, "persistent"),
        ({"hidden_size": 256, "dtype": torch.float16, "directions": 2}, "standard"),
        ({"hidden_size": 256, "dtype": torch.float16, "batch": 12}, "standard"),
        ({"hidden_size": 256, "dtype": torch.float16, "cell": "gru"}, "standard"),
        ({"hidden_size": 1152, "dtype": torch.float16}, "standard"),
        ({"proj_size": 64}, "standard"),
        ({"dtype": torch.float64}, "standard"),
        ({"ragged": True}, "packed"),
    ],
)
def test_what_torch_asks_of_cudnn(changed, algorithm):
    assert plans.cudnn_algorithm(layer(**changed)) == algorithm


def test_every_call_has_a_prediction():
    for cell, dtype, B, H, D, ragged in itertools.product(
        CELLS, (torch.float16, torch.float32, torch.float64), (0, 1, 4096), (1, 64, 2048), (1, 2), (False, True)
    ):  # fmt: skip
        asked = layer(cell=cell, dtype=dtype, batch=B, hidden_size=H, directions=D, ragged=ragged)
        assert plans.native_us(asked, H200) > 0 and plans.cudnn_us(asked, H200) > 0


def test_the_table_says_where_it_is_from_and_rows_grow_with_the_work():
    assert "estimate" in " ".join(_tuning.rows("lstm", "default")["about"]).lower()
    one = plans.native_us(layer(), H200)
    assert plans.native_us(layer(hidden_size=32), H200) < one
    assert plans.native_us(layer(ragged=True), H200) > one
    assert plans.native_us(layer(batch=8 * 132), H200) == one  # a CTA an SM
    assert plans.native_us(layer(batch=8 * 132 + 1), H200) == 2 * one
    assert plans.native_us(layer(batch=8 * 66 + 1, directions=2), H200) == 2 * one
    assert plans.native_us(layer(hidden_size=512), H200) > 4 * one


@pytest.fixture
def h200(monkeypatch):
    """A machine with one, as far as ``explain`` asks."""
    asked = []

    def plan(*arguments):
        asked.append(arguments)
        return {"units": 128, "ctas": 4, "threads": 256, "registers": 215, "shared_bytes": 4096}

    monkeypatch.setattr(_native, "cuda_device_status", lambda device: _native.Status("ok"))
    monkeypatch.setattr(_native, "module", lambda: SimpleNamespace(lstm_resident_plan=plan))
    monkeypatch.setattr(plans, "gpu_of", lambda device: H200)
    return asked


def facts(**changed):
    plain = backends.Facts(
        "lstm", CUDA, torch.bfloat16, 50, 16, 128, 0, 2, True, False, False, False, False, False, ""
    )
    return plain._replace(**changed)


def test_explain_shows_the_plan(h200):
    found = backends.OPERATORS["lstm"].explain(facts(reset=True))
    native_row = next(row for row in found.rows if row.backend == "native")
    assert found.chosen == "native" and native_row.config.startswith("resident: forward 128 units")
    assert "256 threads x 215 registers, 4 KiB shared" in native_row.config
    assert "4 CTAs; " in native_row.config and native_row.config.endswith("us a step predicted")
    code, shape, backward, device = h200[-1]
    assert (code, backward, device) == (3, True, 0)
    assert shape[:7] == (0, 50, 16, 128, 2, 1, 800) and [bool(n) for n in shape[7:]] == [
        False,
        False,
        True,
    ]


def test_explain_says_why_steps_and_what_cudnn_does(h200):
    found = backends.OPERATORS["lstm"].explain(facts(hidden_size=160, batch=44))
    rows = {row.backend: row for row in found.rows}
    assert found.chosen == "native"  # cuDNN's small_h is far slower there
    assert (
        rows["native"].config.startswith("steps: ")
        and "hidden_size is 160" in rows["native"].config
    )
    assert rows["torch"].config.startswith("cuDNN small_h; ")
    assert not h200


def test_precision_is_resolved_once(monkeypatch):
    monkeypatch.setattr(precision, "of_cudnn", lambda: "tf32")
    for asked, device, dtype, found in (
        ("", CUDA, torch.float32, "tf32"),
        ("ieee", CUDA, torch.float32, "ieee"),
        ("ieee", CUDA, torch.bfloat16, ""),
        ("ieee", torch.device("cpu"), torch.float32, ""),
    ):
        assert precision.resolved(asked, device, dtype) == found


@pytest.mark.parametrize("was", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_products_are_as_exact_as_the_layer_and_the_flag_comes_back(monkeypatch, was, asked):
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    x = SimpleNamespace(device=CUDA, dtype=torch.float32, is_meta=False)
    flags.fp32_precision = was
    try:
        for leave in ("normally", "by an error"):
            try:
                with precision.settled(x, asked):
                    assert precision.of_products() == asked
                    assert leave == "normally"
            except AssertionError:
                assert leave == "by an error"
            assert flags.fp32_precision == was
    finally:
        flags.fp32_precision = before
