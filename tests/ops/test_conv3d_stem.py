"""The stem's Triton kernel: windows, epilogues, statistics, padding, order, keys. In the interpreter, tiles small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import _tuning
from sora_kernels.testing import (
    assert_close,
    assert_within_2x,
    poisoned,
    shuffled_programs,
    tolerance,
)

pytest.importorskip("triton", exc_type=ImportError)

from sora_kernels.ops.conv3d_bn_act import stem  # noqa: E402
from sora_kernels.ops.conv3d_bn_act.window import Window  # noqa: E402

pytestmark = pytest.mark.triton

SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
ONE = (1, 1, 1)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# name -> window, channels, filters, [N, T, H, W]
FORMS: dict[str, tuple[Window, int, int, tuple[int, ...]]] = {
    "3x7x7": (Window((3, 7, 7), (1, 2, 2), (1, 3, 3), (1, 3, 3)), 3, 20, (1, 3, 9, 11)),
    "1x7x7": (Window((1, 7, 7), (1, 2, 2), (0, 3, 3), (0, 3, 3)), 3, 45, (2, 2, 7, 7)),
    "1x3x3": (Window((1, 3, 3), ONE, (0, 1, 1), (0, 1, 1)), 3, 16, (1, 1, 5, 7)),
    "3x3x3, one channel": (Window((3, 3, 3), ONE, ONE, ONE), 1, 1, (1, 3, 4, 5)),
    "two channels, no padding": (Window((2, 2, 3)), 2, 5, (2, 3, 4, 5)),
    "four channels": (Window((3, 1, 5), ONE, (1, 0, 2), (1, 0, 2)), 4, 8, (1, 4, 3, 6)),
    "1x1x1": (Window(ONE), 3, 17, (1, 2, 3, 5)),
    "stride past the kernel": (Window((1, 2, 2), (2, 3, 3)), 3, 4, (1, 3, 8, 7)),
    "dilation": (Window((2, 3, 3), ONE, (2, 0, 1), (0, 2, 1), (2, 2, 1)), 3, 6, (1, 3, 5, 4)),
    "causal, uneven": (Window((3, 3, 4), (1, 1, 2), (2, 1, 0), (0, 0, 3)), 3, 6, (1, 3, 4, 5)),
    "kernel past the map": (Window((3, 7, 7), (1, 2, 2), (1, 3, 3), (1, 3, 3)), 3, 4, (1, 1, 2, 3)),
    "nine taps along w": (Window((1, 1, 9), ONE, (0, 0, 4), (0, 0, 4)), 3, 4, (1, 1, 2, 7)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(_tuning, "config", lambda *args: SMALL)
    stem.forget_plans()
    yield
    stem.forget_plans()


def make(form: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Window]:
    window, c, k, (n, *sizes) = FORMS[form]
    return (
        torch.randn(n, c, *sizes).to(dtype),
        torch.randn(k, c, *window.kernel).to(dtype),
        window,
    )


def stock(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    sides = [p for axis in (2, 1, 0) for p in (window.before[axis], window.after[axis])]
    return F.conv3d(F.pad(x, sides), weight, None, window.stride, 0, window.dilation)


def check(x: Tensor, weight: Tensor, window: Window) -> None:
    z = stem.forward(x, weight, window)
    assert z.is_contiguous(memory_format=torch.channels_last_3d)
    assert_within_2x(z, stock(x, weight, window), stock(x.double(), weight.double(), window))


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    with poisoned():
        check(*make(form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    check(*make("3x7x7", dtype))


@pytest.mark.parametrize("pixel", [3, 4, 5, 8])
def test_whatever_lies_past_the_channels(pixel):
    """A pixel of four elements may be a view of something else: what is past its channels is never multiplied."""
    x, weight, window = make("1x3x3")
    room = x.new_full((1, 1, 5, 7, pixel), float("nan"))
    room[..., :3] = x.permute(0, 2, 3, 4, 1)
    check(room[..., :3].permute(0, 4, 1, 2, 3), weight, window)


def test_four_channels_are_not_copied():
    x, _, _ = make("four channels")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    assert stem._pixels(x).data_ptr() == x.data_ptr()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in silu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["", "relu", "silu", "leaky_relu"])
def test_affine_epilogue(activation, dtype):
    x, weight, window = make("1x7x7", dtype)
    k = weight.shape[0]
    bias, mean, bn_weight, bn_bias = torch.randn(4, k)
    variance = torch.rand(k) + 0.5
    residual = torch.randn(stock(x, weight, window).shape).to(dtype)
    residual = residual.contiguous(memory_format=torch.channels_last_3d)

    def compose(kind: torch.dtype) -> Tensor:
        y = stock(x.to(kind), weight.to(kind), window) + bias.to(kind).view(-1, 1, 1, 1)
        others = [v.to(kind) for v in (mean, variance, bn_weight, bn_bias)]
        z = F.batch_norm(y, *others, False, 0.0, 1e-3) + residual.to(kind)
        if activation == "leaky_relu":
            return F.leaky_relu(z, 0.1)
        return getattr(F, activation)(z) if activation else z

    z = stem.forward(
        x, weight, window, bias=bias, mean=mean, variance=variance, bn_weight=bn_weight, bn_bias=bn_bias,
        eps=1e-3, residual=residual, activation=activation, negative_slope=0.1,
    )  # fmt: skip
    assert_within_2x(z, compose(dtype), compose(torch.float64))


@pytest.mark.parametrize("form", ["3x7x7", "1x7x7", "3x3x3, one channel"])
def test_statistics(form):
    """Of each tile's rows, from the values as they were rounded."""
    x, weight, window = make(form, torch.bfloat16)
    with poisoned():
        y, part, rows = stem.forward_with_statistics(x, weight, window)
    assert torch.equal(y, stem.forward(x, weight, window))
    tiles = y.double().movedim(1, -1).reshape(-1, y.shape[1]).split(rows)
    assert len(tiles) == part.shape[0] > 1
    for tile, found in zip(tiles, part, strict=True):
        assert_close(found[1], tile.mean(0), "composition_fp32", name="mean")
        assert_close(found[2], (tile - tile.mean(0)).square().sum(0), "composition_fp32", name="M2")


def test_variance_survives_a_large_mean(monkeypatch):
    monkeypatch.setattr(_tuning, "config", lambda *args: {**SMALL, "BLOCK_M": 128})
    x = torch.randn(1, 1, 2, 24, 30) + 1000.0
    y, part, rows = stem.forward_with_statistics(x, torch.ones(2, 1, 1, 1, 1), Window(ONE))
    low, mean, m2 = part.double().unbind(1)
    mean, m2 = mean + low, m2.sum(0)
    counts = torch.tensor([len(t) for t in y[0, 0].reshape(-1).split(rows)]).double()[:, None]
    total = (mean * counts).sum(0) / counts.sum()
    variance = (m2 + (counts * (mean - total).square()).sum(0)) / counts.sum()
    true = y.double().var((0, 2, 3, 4), correction=0)
    assert (variance / true - 1).abs().max() < tolerance("variance_relative")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 1, 1, 4, 5), (0, 2, 2, 8, 10)], ids=["within", "last"])
def test_nan_and_inf_go_where_taps_carry_them(value, where):
    """And no further: the last pixel lies in the next row's and the next tap's reach."""
    x, weight, window = make("3x7x7")
    x[where] = value
    check(x, weight, window)


def test_every_element_is_written_in_any_program_order():
    x, weight, window = make("1x7x7")

    def everything() -> tuple[Tensor, ...]:
        return (
            stem.forward(x, weight, window),
            *stem.forward_with_statistics(x, weight, window)[:2],
        )

    first = everything()
    with poisoned(), shuffled_programs(1):
        again = everything()
    for a, b in zip(first, again, strict=True):
        assert not torch.isnan(b).any() and torch.equal(a, b)


def test_no_overflow(checked_overflow):
    check(*make("kernel past the map"))


def test_wide_rows_give_the_same(monkeypatch):
    """Past 2^31 rows they are numbered in int64."""
    x, weight, window = make("1x7x7")
    first = stem.forward(x, weight, window)
    monkeypatch.setattr(stem, "WIDEST", 0)
    stem.forget_plans()
    assert torch.equal(first, stem.forward(x, weight, window))


@pytest.mark.parametrize(
    ("change", "channels", "dtype", "why"),
    [
        ({}, 3, torch.int8, "x is torch.int8"),
        ({}, 5, torch.float32, "x has 5 channels"),
        ({"groups": 3}, 3, torch.float32, "groups is 3"),
        ({"dilation": (1, 1, 2)}, 3, torch.float32, "dilation is (1, 1, 2)"),
        ({"kernel": (1, 1, 33)}, 3, torch.float32, "kernel is (1, 1, 33)"),
        ({"replicate": True, "before": ONE}, 3, torch.float32, "padding is replicate"),
        ({"transposed": True}, 3, torch.float32, "transposed"),
    ],
)
def test_what_cannot_run_says_why(change, channels, dtype, why):
    window = Window((3, 7, 7))
    assert stem.can_run(window, 3, 64, torch.bfloat16).ok
    verdict = stem.can_run(window._replace(**change), channels, 64, dtype)
    assert not verdict.ok and why in verdict.why


def test_launchers_look_again_before_taking_pointers():
    x, weight, window = make("1x3x3")
    z = stem.forward(x, weight, window)
    bad: list[tuple[str, Any]] = [
        ("x: expected 5 dimensions", lambda: stem.forward(x[0], weight, window)),
        ("x has 6 channels", lambda: stem.forward(x.repeat(1, 2, 1, 1, 1), weight, window)),
        ("weight: expected", lambda: stem.forward(x, weight[:, :2], window)),
        ("residual: expected", lambda: stem.forward(x, weight, window, residual=z[..., :2])),
        ("residual: expected channels", lambda: stem.forward(x, weight, window, residual=z.contiguous())),
        ("mean, variance", lambda: stem.forward(x, weight, window, mean=torch.zeros(16))),
        ("activation: expected", lambda: stem.forward(x, weight, window, activation="tanh")),
        ("bias: expected", lambda: stem.forward(x, weight, window, bias=torch.zeros(5))),
        ("x: expected at least one", lambda: stem.forward(x[:0], weight, window)),
    ]  # fmt: skip
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture(params=["tf32", "ieee"])
def torch_precision(request) -> Iterator[str]:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = request.param
    yield request.param
    conv.fp32_precision = before


def test_tf32_only_where_torch_allows_it(torch_precision):
    x, weight, window = make("1x3x3")
    _, plan, _, _ = stem._prepare(x, weight, window)
    assert plan.constants["PRECISION"] == torch_precision
    _, plan, _, _ = stem._prepare(x.bfloat16(), weight.bfloat16(), window)
    assert plan.constants["PRECISION"] == "ieee"


SWEEP = """
import json, torch
from sora_kernels import _launches, audit
from sora_kernels.ops.conv3d_bn_act import stem, launches
from sora_kernels.ops.conv3d_bn_act.window import Window
from triton.runtime.jit import JITFunction

keys = set()

def compile(self, key, *args, **kwargs):
    keys.add(key)

JITFunction._do_compile = compile
window = Window((3, 7, 7), (1, 2, 2), (1, 3, 3), (1, 3, 3))
with audit._offline("sm_90"), launches.as_on("sm90"):
    for n, t, h, w in ((8, 16, 112, 112), (1, 1, 7, 7), (2, 5, 33, 45), (16, 32, 16, 1), (8, 64, 512, 512)):
        x = torch.empty(n, 3, t, h, w, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(64, 3, 3, 7, 7, dtype=x.dtype, device="meta")
        with _launches.record(launch=False) as records:
            stem.forward(x, weight, window)
            stem.forward_with_statistics(x, weight, window)
        for r in records:
            r.kernel.run(*r.args, grid=r.grid, warmup=True, **r.kwargs)
print(json.dumps(len(keys)))
"""


def test_a_sweep_of_sizes_takes_one_compilation():
    """Of each epilogue."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 2
