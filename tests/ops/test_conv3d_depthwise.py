"""The depthwise convolution's Triton kernels: windows, epilogues, statistics, both gradients, order, keys. In the
interpreter, with tiles so small that every test has several of them."""

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

from sora_kernels.ops.conv3d_bn_act import depthwise, passes  # noqa: E402
from sora_kernels.ops.conv3d_bn_act.window import Window  # noqa: E402

pytestmark = pytest.mark.triton

SMALL = {"BLOCK_L": 32, "BLOCK_C": 4, "FRAMES": 2, "COLUMNS": 2, "num_warps": 4}
ONE = (1, 1, 1)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# name -> window, channels, [N, T, H, W]
FORMS: dict[str, tuple[Window, int, tuple[int, ...]]] = {
    "3x3x3": (Window((3, 3, 3), ONE, ONE, ONE), 5, (1, 3, 3, 4)),
    "1x3x3": (Window((1, 3, 3), ONE, (0, 1, 1), (0, 1, 1)), 6, (2, 1, 3, 7)),
    "3x1x1": (Window((3, 1, 1), ONE, (1, 0, 0), (1, 0, 0)), 3, (1, 5, 2, 3)),
    "5x3x3": (Window((5, 3, 3), ONE, (2, 1, 1), (2, 1, 1)), 2, (1, 4, 3, 4)),
    "1x5x5": (Window((1, 5, 5), ONE, (0, 2, 2), (0, 2, 2)), 2, (1, 1, 5, 5)),
    "taps in pieces": (Window((4, 2, 5), ONE, (1, 0, 2), (2, 1, 2)), 1, (1, 4, 2, 4)),
    "1x1x1": (Window(ONE), 5, (2, 2, 3, 3)),
    "stride": (Window((3, 3, 3), (1, 2, 2), ONE, ONE), 4, (1, 3, 5, 6)),
    "stride in time": (Window((3, 3, 1), (2, 1, 3), (1, 1, 0), (1, 1, 0)), 3, (1, 5, 3, 5)),
    "stride past the kernel": (Window((1, 2, 2), (2, 3, 3)), 2, (1, 3, 6, 5)),
    "dilation": (Window((2, 3, 3), ONE, (1, 2, 0), (1, 2, 3), (2, 2, 1)), 3, (1, 3, 4, 4)),
    "dilation and stride": (Window((3, 3, 3), (2, 2, 1), (2, 1, 3), (2, 1, 3), (2, 1, 3)), 2, (1, 4, 4, 4)),
    "causal": (Window((3, 3, 3), ONE, (2, 1, 1), (0, 1, 1)), 4, (1, 3, 3, 4)),
    "more padding than taps": (Window((2, 1, 2), ONE, (3, 1, 2), (2, 0, 3)), 2, (1, 2, 3, 3)),
    "kernel past the map": (Window((3, 3, 3), ONE, ONE, ONE), 8, (2, 1, 1, 2)),
    "45 channels": (Window((1, 3, 1), ONE, (0, 1, 0), (0, 1, 0)), 45, (1, 1, 3, 2)),
    "54 channels": (Window((3, 1, 1), ONE, (1, 0, 0), (1, 0, 0)), 54, (1, 3, 1, 2)),
    "replicate": (Window((3, 3, 3), (1, 2, 1), (2, 1, 0), (0, 1, 3), replicate=True), 4, (1, 3, 4, 3)),
    "replicate, dilation": (Window((2, 1, 3), ONE, (2, 0, 2), ONE, (2, 1, 2), replicate=True), 2, (2, 3, 1, 4)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(_tuning, "config", lambda *args: SMALL)
    monkeypatch.setattr(depthwise, "FILL", 6)
    monkeypatch.setattr(depthwise, "MERGED_TILES", 4)
    depthwise.forget_plans()
    yield
    depthwise.forget_plans()


def inner(x: Tensor, pixel: int = 0) -> Tensor:
    """x with its channels innermost, ``pixel`` elements a pixel; NaN in what is between."""
    n, c, *sizes = x.shape
    room = x.new_full((n, *sizes, pixel or c), float("nan"))
    room[..., :c] = x.permute(0, 2, 3, 4, 1)
    return room[..., :c].permute(0, 4, 1, 2, 3)


def make(
    form: str, dtype: torch.dtype = torch.float32, pixel: int = 0
) -> tuple[Tensor, Tensor, Window]:
    window, c, (n, *sizes) = FORMS[form]
    x = inner(torch.randn(n, c, *sizes).to(dtype), pixel)
    return x, torch.randn(c, 1, *window.kernel).to(dtype), window._replace(groups=c)


def stock(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    sides = [p for axis in (2, 1, 0) for p in (window.before[axis], window.after[axis])]
    x = F.pad(x, sides, "replicate" if window.replicate else "constant")
    return F.conv3d(x, weight, None, window.stride, 0, window.dilation, window.groups)


def stock_grads(x: Tensor, weight: Tensor, window: Window, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(stock(*leaves, window), leaves, dy)


def check(x: Tensor, weight: Tensor, window: Window, dy: Tensor | None = None) -> None:
    """Forward and both gradients by the 2x rule."""
    z = depthwise.forward(x, weight, window)
    assert z.is_contiguous(memory_format=torch.channels_last_3d)
    assert_within_2x(z, stock(x, weight, window), stock(x.double(), weight.double(), window))
    dy = inner(torch.randn(z.shape).to(x.dtype)) if dy is None else dy
    plain = stock_grads(x, weight, window, dy)
    dx, dw = stock_grads(x.double(), weight.double(), window, dy.double())
    assert_within_2x(depthwise.wgrad(x, dy, window), plain[1], dw, name="dweight")
    if not window.replicate:
        ours = depthwise.dgrad(dy, weight, window, x.shape[2:])
        assert_within_2x(ours, plain[0], dx, name="dx")


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    with poisoned():
        check(*make(form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    check(*make("1x3x3", dtype))


@pytest.mark.parametrize("pixel", [7, 8, 16])
def test_padded_pixels(pixel):
    """Whatever lies past the channels, whole vectors are read where there is room, and it shows nowhere."""
    x, weight, window = make("1x3x3", torch.float32, pixel)
    dy = inner(torch.randn(stock(x, weight, window).shape), pixel)
    check(x, weight, window, dy)
    y, part, rows = depthwise.forward_with_statistics(x, weight, window)
    assert_within_2x(y, stock(x, weight, window), stock(x.double(), weight.double(), window))
    assert torch.isfinite(part).all()


def test_shipped_config(monkeypatch):
    """The tiles that a GPU gets: four frames by two columns, a tile wider than the channels."""
    monkeypatch.undo()
    depthwise.forget_plans()
    x = inner(torch.randn(1, 6, 5, 2, 3))
    window = Window((3, 1, 3), ONE, (1, 0, 1), (1, 0, 1), groups=6)
    check(x, torch.randn(6, 1, 3, 1, 3), window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["", "relu", "silu", "leaky_relu"])
def test_affine_epilogue(activation, dtype):
    x, weight, window = make("3x1x1", dtype)
    c = x.shape[1]
    bias, mean, bn_weight, bn_bias = torch.randn(4, c)
    variance = torch.rand(c) + 0.5
    residual = inner(torch.randn(stock(x, weight, window).shape).to(dtype), c + 3)

    def compose(kind: torch.dtype) -> Tensor:
        y = stock(x.to(kind), weight.to(kind), window) + bias.to(kind).view(-1, 1, 1, 1)
        others = [v.to(kind) for v in (mean, variance, bn_weight, bn_bias)]
        z = F.batch_norm(y, *others, False, 0.0, 1e-3) + residual.to(kind)
        if activation == "leaky_relu":
            return F.leaky_relu(z, 0.1)
        return getattr(F, activation)(z) if activation else z

    z = depthwise.forward(
        x, weight, window, bias=bias, mean=mean, variance=variance, bn_weight=bn_weight, bn_bias=bn_bias,
        eps=1e-3, residual=residual, activation=activation, negative_slope=0.1,
    )  # fmt: skip
    assert_within_2x(z, compose(dtype), compose(torch.float64))


@pytest.mark.parametrize("form", ["1x3x3", "stride", "45 channels", "kernel past the map"])
def test_statistics(form):
    x, weight, window = make(form, torch.bfloat16)
    with poisoned():
        y, part, rows = depthwise.forward_with_statistics(x, weight, window)
    assert torch.equal(y, depthwise.forward(x, weight, window))
    true = y.double()
    assert part.shape == (1, 3, y.shape[1]) and rows == y.numel() // y.shape[1]
    assert_close(part[0, 1], true.mean((0, 2, 3, 4)), "composition_fp32", name="mean")
    assert_close(
        part[0, 2] / rows, true.var((0, 2, 3, 4), correction=0), "composition_fp32", name="variance"
    )


def test_variance_survives_a_large_mean():
    x = inner(torch.randn(2, 3, 5, 6, 7) + 1000.0)
    window = Window((1, 1, 1), groups=3)
    y, part, rows = depthwise.forward_with_statistics(x, torch.ones(3, 1, 1, 1, 1), window)
    true = y.double().var((0, 2, 3, 4), correction=0)
    assert (part[0, 2].double() / rows / true - 1).abs().max() < tolerance("variance_relative")


def test_statistics_go_on_to_the_passes():
    """What the finalize of passes.py makes of them."""
    x, weight, window = make("3x3x3")
    y, part, rows = depthwise.forward_with_statistics(x, weight, window)
    c = y.shape[1]
    mean, invstd = torch.empty(2, c)
    passes._bn_finalize_kernel[(1,)](
        part, mean, invstd, None, None, None, c, 1, 1, rows, rows, 0.1, 0.0,
        EPS=1e-5, ROWS=rows, HAS_RUNNING=False, HAS_BIAS=False, BLOCK_T=4, BLOCK_C=8,
        ACC=passes.tl.float32,
    )  # fmt: skip
    variance = y.double().var((0, 2, 3, 4), correction=0)
    assert_close(invstd, (variance + 1e-5).rsqrt(), "composition_fp32")


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf * 0
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 1, 2, 0, 1), (0, 1, 4, 1, 2)], ids=["within", "last"])
def test_nan_and_inf_go_where_taps_carry_them(value, where):
    """And nowhere else: outputs past the end are worked on, with gradients of zero."""
    x, weight, window = make("3x1x1")
    x[where] = value
    check(x, weight, window)


def everything(x: Tensor, weight: Tensor, window: Window, dy: Tensor) -> tuple[Tensor, ...]:
    return (
        depthwise.forward(x, weight, window, activation="silu"),
        *depthwise.forward_with_statistics(x, weight, window)[:2],
        depthwise.dgrad(dy, weight, window, x.shape[2:]),
        depthwise.wgrad(x, dy, window),
    )


def test_every_element_is_written_in_any_program_order():
    x, weight, window = make("stride")
    dy = inner(torch.randn(stock(x, weight, window).shape))
    first = everything(x, weight, window, dy)
    with poisoned(), shuffled_programs(1):
        again = everything(x, weight, window, dy)
    for a, b in zip(first, again, strict=True):
        assert not torch.isnan(b).any() and torch.equal(a, b)


def test_wide_lanes_give_the_same(monkeypatch):
    """Past 2^31 lanes they are numbered in int64."""
    x, weight, window = make("1x3x3")
    dy = inner(torch.randn(stock(x, weight, window).shape))
    first = everything(x, weight, window, dy)
    monkeypatch.setattr(depthwise, "WIDEST", 0)
    depthwise.forget_plans()
    for a, b in zip(first, everything(x, weight, window, dy), strict=True):
        assert torch.equal(a, b)


def test_no_overflow(checked_overflow):
    check(*make("stride past the kernel"))


def test_which_maps_have_wide_lanes():
    """Those of more vectors than int32 numbers; elements, of which there are more, are int64 always."""
    for n, wide in ((1, False), (64, True)):
        walk = depthwise._walk(Window((3, 3, 3), ONE, ONE, ONE, groups=512), 512, 512, 512, 512)
        big = (64, 256, 256)
        placed = depthwise.Placed(0, 2**22, 2**16, 256, 1)
        plan = depthwise.plan_forward("default", walk, n, big, big, placed, torch.bfloat16, False)
        assert n * 2**22 * 512 >= 2**31
        assert ("int64" in str(plan.constants["INDEX"])) == wide


@pytest.mark.parametrize(
    ("change", "channels", "filters", "dtype", "why"),
    [
        ({}, 4, 4, torch.int8, "x is torch.int8"),
        ({}, 4, 8, torch.float32, "4 channels, 8 filters and 4 groups"),
        ({"groups": 2}, 4, 4, torch.float32, "4 channels, 4 filters and 2 groups"),
        ({"kernel": (17, 1, 1)}, 4, 4, torch.float32, "kernel is (17, 1, 1)"),
        ({"transposed": True}, 4, 4, torch.float32, "transposed"),
    ],
)
def test_what_cannot_run_says_why(change, channels, filters, dtype, why):
    window = Window((3, 3, 3), groups=4)
    assert depthwise.can_run(window, 4, 4, torch.bfloat16).ok
    verdict = depthwise.can_run(window._replace(**change), channels, filters, dtype)
    assert not verdict.ok and why in verdict.why


def test_launchers_look_again_before_taking_pointers():
    x, weight, window = make("3x3x3")
    z = depthwise.forward(x, weight, window)
    bad: list[tuple[str, Any]] = [
        ("x: expected channels innermost", lambda: depthwise.forward(x.contiguous(), weight, window)),
        ("weight: expected", lambda: depthwise.forward(x, weight[..., :2], window)),
        ("weight: expected", lambda: depthwise.forward(x, weight.double(), window)),
        ("residual: expected", lambda: depthwise.forward(x, weight, window, residual=z[..., :2])),
        ("mean, variance", lambda: depthwise.forward(x, weight, window, mean=weight[:, 0, 0, 0, 0])),
        ("activation: expected", lambda: depthwise.forward(x, weight, window, activation="tanh")),
        ("bias: expected", lambda: depthwise.forward(x, weight, window, bias=torch.zeros(6))),
        ("x: expected at least one", lambda: depthwise.forward(x[:0], weight, window)),
        ("dy: expected sizes", lambda: depthwise.dgrad(z, weight, window, (3, 4, 6))),
        ("padding of zeros", lambda: depthwise.dgrad(z, weight, window._replace(replicate=True), (3, 4, 5))),
        ("dy: expected", lambda: depthwise.wgrad(x, z[:, :, :2], window)),
    ]  # fmt: skip
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


SWEEP = """
import json, torch
from sora_kernels import _launches, audit
from sora_kernels.ops.conv3d_bn_act import depthwise, launches
from sora_kernels.ops.conv3d_bn_act.window import Window
from triton.runtime.jit import JITFunction

keys = {}

def compile(self, key, *args, **kwargs):
    keys.setdefault(self.__name__, set()).add(key)

JITFunction._do_compile = compile
window = Window((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), groups=54)
with audit._offline("sm_90"), launches.as_on("sm90"):
    for n, t, h, w in ((8, 16, 56, 56), (1, 1, 7, 7), (2, 5, 9, 11), (16, 32, 16, 1), (16, 64, 256, 256)):
        x = torch.empty(n, t, h, w, 54, dtype=torch.bfloat16, device="meta").permute(0, 4, 1, 2, 3)
        weight = torch.empty(54, 1, 3, 3, 3, dtype=x.dtype, device="meta")
        with _launches.record(launch=False) as records:
            y = depthwise.forward(x, weight, window)
            depthwise.forward_with_statistics(x, weight, window)
            depthwise.dgrad(y, weight, window, x.shape[2:])
            depthwise.wgrad(x, y, window)
        for r in records:
            r.kernel.run(*r.args, grid=r.grid, warmup=True, **r.kwargs)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def test_a_sweep_of_sizes_takes_one_compilation():
    """Of each epilogue; dgrad is the affine one, its window that of the convolution turned round."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        depthwise.FORWARD: 2, depthwise.WGRAD: 1,
        "_conv3d_depthwise_merge_kernel": 1, "_conv3d_depthwise_reduce_kernel": 1,
    }  # fmt: skip
