"""The implicit-GEMM convolution's Triton kernels: forms, epilogues, both gradients, precision, keys. In the
interpreter, with tiles so small that every test has several of them."""

from __future__ import annotations

import functools
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
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from sora_kernels.ops.conv3d_bn_act import epilogue, gemm, passes, pixels  # noqa: E402
from sora_kernels.ops.conv3d_bn_act.coordinates import pixel_number  # noqa: E402
from sora_kernels.ops.conv3d_bn_act.gemm_kernels import _axis_bits, _tap_bits  # noqa: E402
from sora_kernels.ops.conv3d_bn_act.window import Window  # noqa: E402

pytestmark = pytest.mark.triton

SMALL: dict[str, dict[str, int]] = {
    gemm.FORWARD: {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    gemm.WGRAD: {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_C": 16, "SHARE": 3, "num_warps": 4, "num_stages": 2},
}  # fmt: skip
ONE, TWO = (1, 1, 1), (2, 2, 2)

# name -> window, channels, filters, [N, T, H, W]
FORMS: dict[str, tuple[Window, int, int, tuple[int, ...]]] = {
    "3x3x3": (Window((3, 3, 3), before=ONE, after=ONE), 16, 32, (1, 3, 4, 5)),
    "1x1x1": (Window(ONE), 45, 38, (1, 2, 3, 7)),
    "54 channels": (Window((2, 1, 1)), 54, 16, (1, 2, 3, 4)),
    "1x1x1, stride": (Window(ONE, TWO), 16, 20, (2, 3, 5, 7)),
    "1x1x1, padding": (Window(ONE, before=(0, 1, 1), after=(1, 0, 1)), 16, 16, (1, 2, 3, 4)),
    "3x1x1": (Window((3, 1, 1), before=(1, 0, 0), after=(1, 0, 0)), 45, 16, (1, 3, 4, 5)),
    "1x3x3": (Window((1, 3, 3), before=(0, 1, 1), after=(0, 1, 1)), 16, 45, (2, 1, 5, 5)),
    "no padding": (Window((2, 3, 2)), 16, 16, (2, 3, 5, 4)),
    "causal": (Window((2, 3, 2), before=ONE, after=(0, 1, 0)), 16, 16, (1, 3, 4, 4)),
    "stride": (Window((2, 3, 3), (1, 2, 2), before=ONE, after=ONE), 20, 16, (1, 3, 7, 7)),
    "stride past the kernel": (Window((1, 2, 2), (2, 3, 3), before=ONE, after=ONE), 16, 16, (2, 4, 7, 7)),
    "dilation": (Window((2, 3, 3), dilation=(2, 1, 3), before=(1, 0, 4), after=(2, 1, 3)), 16, 16, (1, 4, 5, 6)),
    "kernel past the map": (Window((3, 4, 5), before=(1, 1, 2), after=(1, 2, 2)), 16, 16, (1, 1, 2, 2)),
    "several sets of bits": (Window((3, 4, 3), before=(1, 2, 1), after=(1, 1, 1)), 16, 16, (1, 2, 4, 4)),
    "groups": (Window((3, 1, 3), before=(1, 0, 1), after=(1, 0, 1), groups=3), 48, 24, (1, 2, 4, 4)),
    "replicate": (
        Window((2, 3, 2), (1, 2, 1), before=(2, 1, 0), after=(0, 3, 1), replicate=True), 16, 16, (1, 2, 5, 4),
    ),
    "one channel": (Window((1, 3, 3), before=(0, 1, 1), after=(0, 1, 1)), 1, 1, (1, 2, 4, 4)),
    "stem": (Window((1, 7, 7), (1, 2, 2), before=(0, 3, 3), after=(0, 3, 3)), 3, 16, (1, 2, 7, 7)),
}  # fmt: skip
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(_tuning, "config", lambda op, kernel, arch, key: SMALL[kernel])
    monkeypatch.setattr(gemm, "ROWS_PER_SPLIT", 20)
    monkeypatch.setattr(epilogue, "FINISHED", 4 * 32 * 16 // 4)  # half of a tile's columns at once
    gemm.forget_plans()
    yield
    gemm.forget_plans()


def inner(x: Tensor, stride: int = 0) -> Tensor:
    """x with its channels innermost, ``stride`` elements a pixel; NaN in what is between."""
    n, c, *sizes = x.shape
    room = x.new_full((n, *sizes, stride or c), float("nan"))
    room[..., :c] = x.permute(0, 2, 3, 4, 1)
    return room[..., :c].permute(0, 4, 1, 2, 3)


def make(
    form: str, dtype: torch.dtype = torch.float32, stride: int = 0
) -> tuple[Tensor, Tensor, Window]:
    window, c, k, (n, *sizes) = FORMS[form]
    x = inner(torch.randn(n, c, *sizes).to(dtype), stride)
    return x, torch.randn(k, c // window.groups, *window.kernel).to(dtype), window


def stock(x: Tensor, weight: Tensor, window: Window, bias: Tensor | None = None) -> Tensor:
    sides = [p for axis in (2, 1, 0) for p in (window.before[axis], window.after[axis])]
    x = F.pad(x, sides, "replicate" if window.replicate else "constant")
    return F.conv3d(x, weight, bias, window.stride, 0, window.dilation, window.groups)


def stock_grads(x: Tensor, weight: Tensor, window: Window, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(stock(*leaves, window), leaves, dy)


def check(x: Tensor, weight: Tensor, window: Window, **options: Any) -> None:
    """Forward, both gradients, by the 2x rule."""
    z = gemm.forward(x, weight, window, **options)
    assert z.is_contiguous(memory_format=torch.channels_last_3d)
    assert_within_2x(z, stock(x, weight, window), stock(x.double(), weight.double(), window))
    dy = inner(torch.randn(z.shape).to(x.dtype))
    plain = stock_grads(x, weight, window, dy)
    dx, dw = stock_grads(x.double(), weight.double(), window, dy.double())
    assert_within_2x(gemm.wgrad(x, dy, window), plain[1], dw, name="dweight")
    if max(window.stride) == 1 and not window.replicate:
        ours = gemm.dgrad(dy, weight, window, x.shape[2:])
        assert_within_2x(ours, plain[0], dx, name="dx")


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    check(*make(form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    check(*make("causal", dtype))


def test_many_channels(monkeypatch):
    monkeypatch.setitem(SMALL, gemm.FORWARD, SMALL[gemm.FORWARD] | {"BLOCK_K": 64})
    monkeypatch.setitem(SMALL, gemm.WGRAD, SMALL[gemm.WGRAD] | {"BLOCK_C": 128})
    window = Window((2, 1, 1), before=(1, 0, 0))
    x, weight = inner(torch.randn(1, 921, 2, 2, 3)), torch.randn(20, 921, 2, 1, 1)
    check(x, weight, window)


@pytest.mark.parametrize(
    ("form", "dtype", "stride"),
    [("1x1x1", torch.bfloat16, 48), ("1x1x1", torch.float32, 49), ("3x1x1", torch.bfloat16, 48)],
)
def test_padded_pixels(form, dtype, stride):
    """45 channels in pixels of 48 or 49 elements: whole vectors are read where there are any, and NaN lies there."""
    x, weight, window = make(form, dtype)
    c = x.shape[1]
    padded = inner(x, stride)
    z = gemm.forward(x, weight, window)
    assert torch.equal(gemm.forward(padded, weight, window), z)
    dy = torch.randn(z.shape).to(dtype)
    wide = inner(dy, dy.shape[1] + 2)
    assert torch.equal(gemm.wgrad(padded, wide, window), gemm.wgrad(x, inner(dy), window))
    sizes = x.shape[2:]
    assert torch.equal(
        gemm.dgrad(wide, weight, window, sizes), gemm.dgrad(inner(dy), weight, window, sizes)
    )
    residual = inner(torch.randn(z.shape).to(dtype), dy.shape[1] + 2)
    assert torch.equal(
        gemm.forward(x, weight, window, residual=residual),
        gemm.forward(x, weight, window, residual=inner(residual)),
    )
    zeros = torch.zeros(*x.shape[:1], *sizes, stride, dtype=dtype)
    zeros[..., :c] = x.permute(0, 2, 3, 4, 1)
    finite = zeros[..., :c].permute(0, 4, 1, 2, 3)
    assert torch.equal(gemm.forward(finite, weight, window, finite_tail=True), z)


def test_reads_stay_within_the_storage():
    """The last pixel of a tight storage has no whole vector."""
    tight = torch.empty(2 * 8 - 3).as_strided((1, 5, 1, 1, 2), (16, 1, 16, 16, 8))
    assert pixels.readable(tight, 8, 1) == 5
    roomy = torch.empty(2 * 8).as_strided((1, 5, 1, 1, 2), (16, 1, 16, 16, 8))
    assert pixels.readable(roomy, 8, 1) == 8


@pytest.mark.parametrize("activation", pixels.ACTIVATIONS)
@pytest.mark.parametrize("parts", ["all", "no residual", "bias", "mean and variance"])
def test_affine_epilogue(activation, parts):
    x, weight, window = make("1x3x3", torch.bfloat16)
    k = weight.shape[0]
    y = stock(x, weight, window)
    everything = {
        "bias": torch.randn(k).bfloat16(), "mean": torch.randn(k), "variance": torch.rand(k) * 9 + 3,
        "bn_weight": torch.randn(k), "bn_bias": torch.randn(k),
        "residual": inner(torch.randn(y.shape).bfloat16()),
    }  # fmt: skip
    names = {
        "all": tuple(everything), "no residual": tuple(everything)[:-1], "bias": ("bias",),
        "mean and variance": ("mean", "variance"),
    }[parts]  # fmt: skip
    given = {name: everything[name] for name in names}
    eps = 1e-3 if "variance" in given else 0.0
    z = gemm.forward(x, weight, window, eps=eps, activation=activation, negative_slope=0.1, **given)

    def want(dtype: torch.dtype) -> Tensor:
        p = {n: t.to(dtype if t.dtype == torch.bfloat16 else torch.promote_types(dtype, t.dtype))
             for n, t in given.items()}  # fmt: skip
        z = stock(x.to(dtype), weight.to(dtype), window, p.get("bias"))
        if "mean" in p:
            z = F.batch_norm(
                z, p["mean"], p["variance"], p.get("bn_weight"), p.get("bn_bias"), eps=eps
            )
        if "residual" in p:
            z = z + p["residual"]
        leaky = functools.partial(F.leaky_relu, negative_slope=0.1)
        return {"": lambda t: t, "relu": F.relu, "silu": F.silu, "leaky_relu": leaky}[activation](z)

    assert_within_2x(z, want(torch.bfloat16), want(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_statistics_describe_what_is_stored(dtype):
    x, weight, window = make("1x3x3", dtype)
    y, part, rows = gemm.forward_with_statistics(x, weight, window)
    assert torch.equal(y, gemm.forward(x, weight, window))
    flat = y.permute(0, 2, 3, 4, 1).reshape(-1, y.shape[1])
    for tile, (low, mean, m2) in zip(flat.split(rows), part, strict=True):
        assert (low.abs() <= mean.abs() * torch.finfo(mean.dtype).eps).all()
        for ours, of in (
            (mean, torch.mean),
            (m2, lambda t, axis: t.var(axis, correction=0) * len(t)),
        ):
            plain = of(tile.to(part.dtype), 0)
            assert_within_2x(ours, plain, of(tile.double(), 0), terms=tile.abs().max().item())


@pytest.mark.parametrize("size", [(2, 1, 8, 8), (1, 2, 16, 31), (2, 4, 32, 63)], ids=str)
def test_variance_survives_a_large_mean(monkeypatch, size):
    """Through the kernel that merges partials, at mean / std = 1000, of tiles as wide as the shipped ones: one tile,
    a few, many.
    """
    monkeypatch.setitem(SMALL, gemm.FORWARD, SMALL[gemm.FORWARD] | {"BLOCK_M": 128})
    n, *sizes = size
    x = torch.randn(n, 16, *sizes)
    x[:, 0] = 1.0
    weight = torch.randn(16, 16, 1, 1, 1) / 4
    weight[:, 0] = 1000.0
    y, part, rows = gemm.forward_with_statistics(inner(x), weight, Window(ONE))
    mean, invstd = torch.empty(2, 16)
    total = y.numel() // 16
    passes._bn_finalize_kernel[(1,)](
        part, mean, invstd, None, None, None, 16, part.shape[0], part.shape[0], total, total, 0.0, 0.0,
        EPS=0.0, ROWS=rows, BLOCK_T=64, BLOCK_C=16, HAS_RUNNING=False, HAS_BIAS=False, ACC=tl.float32,
    )  # fmt: skip
    true = y.double().var(dim=(0, 2, 3, 4), correction=0)
    relative = (invstd.double().pow(-2) / true - 1).abs().max().item()
    assert relative < tolerance("variance_relative")
    assert_close(mean, y.double().mean(dim=(0, 2, 3, 4)), "composition_fp32")


@pytest.mark.parametrize("form", ["1x1x1", "causal", "replicate"])
def test_nan_and_infinity_go_where_they_belong(form):
    """To the outputs whose window holds them, and to no other: not even beside them in a tile."""
    x, weight, window = make(form)
    x[0, 1, 0, 1, 1], x[0, 3, -1, -1, -1] = float("nan"), float("inf")
    z, want = gemm.forward(x, weight, window), stock(x, weight, window)
    assert torch.equal(z.isnan(), want.isnan()) and torch.equal(z.isinf(), want.isinf())
    assert z.isfinite().any()
    relu = gemm.forward(x, weight, window, activation="relu")
    assert torch.equal(relu.isnan(), want.isnan())
    dy = torch.randn(z.shape)
    dy[0, 2, 0, 0, 0] = float("nan")
    clean = x.nan_to_num(0.0, 0.0, 0.0)
    dw = gemm.wgrad(inner(clean), inner(dy), window)
    assert dw[2].isnan().any() and dw[:2].isfinite().all() and dw[3:].isfinite().all()


def every_launch(x: Tensor, weight: Tensor, window: Window, dy: Tensor) -> tuple[Tensor, ...]:
    y, part, _ = gemm.forward_with_statistics(x, weight, window)
    ours = gemm.forward(x, weight, window, activation="relu"), y, part, gemm.wgrad(x, dy, window)
    same = max(window.stride) == 1 and not window.replicate
    return (*ours, gemm.dgrad(dy, weight, window, x.shape[2:])) if same else ours


@pytest.mark.parametrize("form", ["1x1x1", "causal", "groups", "replicate"])
def test_every_element_is_written_in_any_program_order(form):
    x, weight, window = make(form)
    dy = inner(torch.randn(stock(x, weight, window).shape))
    first = every_launch(x, weight, window, dy)
    with poisoned(), shuffled_programs(0):
        again = every_launch(x, weight, window, dy)
    for a, b in zip(first, again, strict=True):
        assert not torch.isnan(b).any(), "an element was not written"
        assert torch.equal(a, b), "not bitwise repeatable"


def test_no_overflow(checked_overflow):
    """As the tests above, with every integer operation checked."""
    check(*make("causal", torch.float16))


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, window):
        ctx.save_for_backward(x, weight)
        ctx.window = window
        return gemm.forward(x, weight, window)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        return gemm.dgrad(dy, weight, ctx.window, x.shape[2:]), gemm.wgrad(x, dy, ctx.window), None


def test_gradcheck():
    window = Window((2, 1, 2), before=(1, 0, 0), after=(0, 0, 1))
    x = inner(torch.randn(1, 2, 2, 2, 3, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(3, 2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: Convolution.apply(x, w, window), (x, weight), fast_mode=True,
        atol=tolerance("gradcheck_fp64"),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["causal", "replicate", "stride past the kernel"])
def test_fp64_is_exact(form):
    x, weight, window = make(form, torch.float64)
    y = stock(x, weight, window)
    assert_close(gemm.forward(x, weight, window), y, "transform_fp64")
    dy = inner(torch.randn_like(y))
    dw = stock_grads(x, weight, window, dy)[1]
    assert_close(gemm.wgrad(x, dy, window), dw, "transform_fp64")


@triton.jit
def _store_pixels(out_ptr, T, H, W):
    n = tl.arange(0, 4).to(tl.int64)
    tl.store(out_ptr + tl.arange(0, 4), pixel_number(n, 1, 2, 3, T, H, W) * 64)


def test_offsets_are_64_bit():
    """A row's first element passes 2^31: by the kernels' own helper. The weight's gradient takes int64 only there."""
    out = torch.empty(4, dtype=torch.int64)
    _store_pixels[(1,)](out, 64, 1024, 1024)
    assert out.tolist() == [(((n * 64 + 1) * 1024 + 2) * 1024 + 3) * 64 for n in range(4)]
    plan = functools.partial(
        gemm.plan_wgrad, "default", Window(ONE), c=64, k=64, sizes=(16, 1024, 1024), dtype=torch.float32,
        stride_x=64, stride_dy=64, readable_x=64, readable_dy=64, precision="ieee",
    )  # fmt: skip
    assert plan(n=1).constants["INDEX"] == tl.int32 and plan(n=2).constants["INDEX"] == tl.int64


def test_64_bit_offsets_give_the_same_gradient(monkeypatch):
    x, weight, window = make("stride past the kernel")
    dy = inner(torch.randn(stock(x, weight, window).shape))
    want = gemm.wgrad(x, dy, window)
    plan = gemm.plan_wgrad

    def wide(*args: Any) -> gemm.Plan:
        found = plan(*args)
        return found._replace(constants={**found.constants, "INDEX": tl.int64})

    with monkeypatch.context() as patched:
        patched.setattr(gemm, "plan_wgrad", wide)
        assert torch.equal(gemm.wgrad(x, dy, window), want)


@triton.jit
def _store_bits(out_ptr, T, H, W, WINDOW: tl.constexpr):
    t = tl.arange(0, 8)
    axis = _axis_bits(t, T, WINDOW, 0)
    _, _, every = _tap_bits(t, t, t, T, H, W, WINDOW)
    tl.store(out_ptr + t, axis)
    tl.store(out_ptr + 8 + t, every)


def test_the_last_of_32_bits_counts():
    out = torch.empty(2, 8, dtype=torch.int32)
    _store_bits[(1,)](out, 4, 5, 6, WINDOW=Window((2, 4, 4), before=ONE, after=ONE))
    for at in range(8):
        taps = [
            at + t < 4 and at + h < 5 and at + w < 6
            for t in range(2) for h in range(4) for w in range(4)
        ]  # fmt: skip
        want = sum(inside << tap for tap, inside in enumerate(taps))
        assert out[1, at].item() & 0xFFFFFFFF == want
        assert out[0, at].item() == (at < 4) + 2 * (at + 1 < 4)


SWEEP = """
import json, torch
from sora_kernels import _launches, audit
from sora_kernels.ops.conv3d_bn_act import gemm, launches
from sora_kernels.ops.conv3d_bn_act.window import Window
from triton.runtime.jit import JITFunction

keys = {}
JITFunction._do_compile = lambda self, key, *a, **k: keys.setdefault(self.__name__, set()).add(key)
window = Window((3, 3, 3), before=(1, 1, 1), after=(1, 1, 1))
weight = torch.empty(64, 64, 3, 3, 3, dtype=torch.bfloat16, device="meta")
with audit._offline("sm_90"), launches.as_on("sm90"):
    for n in (1, 2, 8):
        for sizes in ((8, 14, 14), (1, 7, 7), (16, 56, 56), (5, 9, 1), (32, 112, 112)):
            x, dy = (
                torch.empty(n, 64, *sizes, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last_3d)
                for _ in range(2)
            )
            with _launches.record(launch=False) as records:
                gemm.forward(x, weight, window)
                gemm.dgrad(dy, weight, window, sizes)
                gemm.wgrad(x, dy, window)
            for r in records:
                r.kernel.run(*r.args, grid=r.grid, warmup=True, **r.kwargs)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def test_a_sweep_of_sizes_takes_few_compilations():
    """Sizes are run-time arguments. The weight's gradient: its partials are fp32, or, unsplit, in x's dtype."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        gemm.FORWARD: 1, gemm.WGRAD: 2, "_conv3d_gemm_wgrad_reduce_kernel": 1,
    }  # fmt: skip


def test_shipped_tiles_are_not_wider_than_the_layer():
    """144 filters make three tiles of 64, not two of 128; of 144 channels, blocks of 32 leave less to padding."""
    narrow, wasteful = gemm._unpadded, gemm._wastes
    assert [narrow(k) for k in (16, 64, 128, 144, 192, 230, 256, 512)] == [
        16,
        64,
        128,
        64,
        64,
        230,
        256,
        512,
    ]
    assert (
        wasteful(144, 64) and not wasteful(54, 64) and not wasteful(64, 64) and not wasteful(1, 16)
    )


def test_tf32_only_where_torch_allows_it():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for setting, want in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
            conv.fp32_precision = setting
            assert gemm.precision(torch.float32) == want
            assert gemm.precision(torch.bfloat16) == "ieee"
    finally:
        conv.fp32_precision = before


def test_what_cannot_run_says_why():
    window = Window((3, 3, 3), before=ONE, after=ONE)
    assert gemm.can_run(window, 64, 64, torch.bfloat16).ok
    for changed, channels, dtype, why in (
        ({}, 64, torch.int8, "x is torch.int8"),
        ({"groups": 3}, 64, torch.float32, "groups is 3; it must divide 64 channels"),
        ({"kernel": (1, 33, 1)}, 64, torch.float32, r"kernel is \(1, 33, 1\)"),
        ({"transposed": True}, 64, torch.float32, "window is transposed"),
    ):
        verdict = gemm.can_run(window._replace(**changed), channels, 63, dtype)
        assert not verdict.ok
        with pytest.raises(ValueError, match=why):
            raise ValueError(verdict.why)


def test_launchers_look_again_before_taking_pointers():
    x, weight, window = make("3x3x3")
    with pytest.raises(ValueError, match="x: expected channels innermost"):
        gemm.forward(x.contiguous(), weight, window)
    with pytest.raises(ValueError, match="x: expected channels innermost"):
        gemm.forward(x[..., ::2, :], weight, window)
    with pytest.raises(ValueError, match="x: expected 5 dimensions"):
        gemm.forward(x[0], weight, window)
    with pytest.raises(ValueError, match=r"weight: expected \(32, 16, 3, 3, 3\) torch.float32"):
        gemm.forward(x, weight.double(), window)
    with pytest.raises(ValueError, match=r"bias: expected \(32,\) contiguous"):
        gemm.forward(x, weight, window, bias=torch.zeros(16))
    with pytest.raises(ValueError, match="mean, variance: expected both"):
        gemm.forward(x, weight, window, mean=torch.zeros(32))
    with pytest.raises(ValueError, match="bn_weight, bn_bias: expected None"):
        gemm.forward(x, weight, window, bn_weight=torch.zeros(32))
    with pytest.raises(ValueError, match="activation: expected one of"):
        gemm.forward(x, weight, window, activation="gelu")
    with pytest.raises(ValueError, match=r"residual: expected \(1, 32, 3, 4, 5\)"):
        gemm.forward(x, weight, window, residual=x)
    with pytest.raises(ValueError, match="x: expected 1 to"):
        gemm.forward(x[:, :, :1], weight, Window((3, 3, 3)))
    dy = gemm.forward(x, weight, window)
    with pytest.raises(ValueError, match="window: expected stride 1"):
        gemm.dgrad(dy, weight, window._replace(stride=TWO), x.shape[2:])
    with pytest.raises(ValueError, match="window: expected stride 1"):
        gemm.dgrad(dy, weight, window._replace(replicate=True), x.shape[2:])
    with pytest.raises(ValueError, match=r"dy: expected \(1, 32, 3, 4, 6\)"):
        gemm.dgrad(dy, weight, window, (3, 4, 6))
    with pytest.raises(ValueError, match=r"dy: expected \(1, 32, 3, 4, 5\)"):
        gemm.wgrad(x, dy[:, :, :2], window)
