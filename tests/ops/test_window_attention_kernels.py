"""window_attention3d's Triton kernels themselves, in the interpreter, with tiles so small that windows have several."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sora_kernels import _tuning, audit
from sora_kernels.ops.window_attention import reference, stock
from sora_kernels.ops.window_attention.options import Options
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
from triton.runtime import interpreter  # noqa: E402

from sora_kernels.ops.window_attention import launches, plans, slots  # noqa: E402
from sora_kernels.ops.window_attention.kernels import _kept  # noqa: E402

pytestmark = pytest.mark.triton

TILES = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}
SMALL: dict[str, dict[str, int]] = {
    plans.FORWARD: {**TILES, "WINDOWS_INNER": 1},
    plans.DELTA: {"BLOCK_M": 32},
    plans.DQ: {**TILES, "WINDOWS_INNER": 0},
    plans.DKV: {**TILES, "WINDOWS_INNER": 1},
    plans.DBIAS: TILES,
    plans.SMALL: {"num_warps": 4},
    plans.DTABLE: {"BLOCK_R": 32, "BLOCK_T": 32},
}
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(_tuning, "config", lambda op, kernel, arch, key: SMALL[kernel])
    monkeypatch.setattr(plans, "ONE_TILE", 0)
    monkeypatch.setattr(plans, "FILL", 16)
    plans.plan_step.cache_clear()
    yield
    plans.plan_step.cache_clear()


def asked(window: tuple[int, ...], shift=(0, 0, 0), dim: int = 16, **others: Any) -> Options:
    own = {
        "num_heads": 1, "table_window": window, "bias_index": "torchvision", "border": "cyclic", "pad": "kv",
        "causal_t": False, "scale": dim**-0.5, "dropout_p": 0.0,
    }  # fmt: skip
    return Options(window=window, shift=shift, **{**own, **others})  # type: ignore[arg-type]


# name -> map, options, whether there is a bias
FORMS: dict[str, tuple[tuple[int, int, int], Options, bool]] = {
    "one window": ((2, 4, 5), asked((2, 4, 5)), True),
    "shifted in time": ((4, 4, 4), asked((2, 4, 4), (1, 2, 1)), True),
    "shifted, padded": ((3, 5, 4), asked((2, 4, 3), (1, 2, 1)), True),
    "whole tiles, no bias": ((4, 4, 4), asked((2, 4, 4)), False),
    "part of a tile, no bias": ((2, 6, 3), asked((2, 3, 3)), False),
    "clipped": ((3, 3, 2), asked((4, 4, 4), (2, 2, 2)), True),
    "clipped, exact": ((3, 3, 2), asked((4, 4, 4), (2, 2, 2), bias_index="exact"), True),
    "pads left out": ((3, 5, 4), asked((2, 4, 3), (1, 2, 1), pad="mask"), True),
    "ragged": ((3, 5, 4), asked((2, 4, 3), (1, 2, 1), border="ragged"), False),
    "grid": ((4, 3, 5), asked((2, 3, 4), border="grid"), True),
    "causal": ((6, 4, 2), asked((4, 4, 2), (2, 2, 1), causal_t=True), True),
    "few": ((2, 3, 2), asked((2, 2, 2), (0, 1, 0)), True),
    "causal, whole map": ((8, 2, 4), asked((8, 2, 4), causal_t=True), False),
}  # fmt: skip


class Call:
    """Tensors of a call."""

    def __init__(
        self,
        form: str,
        dtype: torch.dtype = torch.float32,
        dim: int = 16,
        batch: int = 1,
        **others: Any,
    ):
        size, options, bias = FORMS[form]
        self.options = options._replace(scale=dim**-0.5, **others)
        heads = self.options.num_heads
        self.qkv = torch.randn(batch, *size, 3 * heads * dim).to(dtype)
        self.pad_kv = torch.randn(2, heads * dim).to(dtype)
        rows = math.prod(2 * n - 1 for n in options.table_window)
        wide = torch.promote_types(dtype, torch.float32)
        self.table = torch.randn(rows, heads, dtype=wide) if bias else None
        self.seed = torch.tensor(-(2**62) + 987654321) if self.options.dropout_p else None
        self.dout = torch.randn(batch, *size, heads * dim).to(dtype)

    def run(self, backend: Any, needs=ALL) -> list[Tensor]:
        """out, dqkv, dtable, dpad_kv, without those that there are not."""
        out, lse = backend.forward(self.qkv, self.table, self.pad_kv, self.seed, self.options, True)
        grads = backend.backward(
            self.dout, self.qkv, self.table, self.pad_kv, self.seed, out, lse, needs, self.options
        )
        return [t for t in (out, *grads) if t is not None]

    def truth(self) -> list[Tensor]:
        given = [None if t is None else t.double() for t in (self.qkv, self.table, self.pad_kv)]
        leaves = [t.requires_grad_() for t in given if t is not None]
        out = reference.window_attention3d(*given, self.seed, self.options)
        grads = torch.autograd.grad(out, leaves, self.dout.double(), allow_unused=True)
        grads = (
            torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)
        )
        return [out.detach(), *grads]

    def check(self) -> None:
        with poisoned():
            ours = self.run(launches)
        plain, truth = self.run(stock), self.truth()
        names = ["out", "dqkv", *(["dtable"] if self.table is not None else []), "dpad_kv"]
        for a, b, c, name in zip(ours, plain, truth, names, strict=True):
            if a.dtype == torch.float64:
                assert_close(a, c, "transform_fp64", name=name)
            else:
                assert_within_2x(a, b, c, name=name, storage=self.qkv.dtype)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    Call(form).check()


@pytest.mark.parametrize("form", ["shifted, padded", "clipped"])
def test_gathered_bias(form, monkeypatch):
    monkeypatch.setattr(plans, "DENSE_BYTES", 0)
    Call(form).check()


@pytest.mark.parametrize(
    "form", ["shifted, padded", "causal", "part of a tile, no bias", "pads left out"]
)
def test_one_kernel(form, monkeypatch):
    monkeypatch.setattr(plans, "ONE_TILE", 64)
    Call(form).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["shifted, padded", "causal", "part of a tile, no bias"])
def test_dtypes(form, dtype):
    """In 16 bits the mask is a matrix product."""
    Call(form, dtype).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_one_kernel_in_other_dtypes(dtype, monkeypatch):
    monkeypatch.setattr(plans, "ONE_TILE", 64)
    Call("shifted, padded", dtype, batch=2, num_heads=2).check()


@pytest.mark.parametrize("dim", [8, 24, 64])
def test_head_dims(dim):
    Call("shifted, padded", dim=dim, num_heads=2 if dim == 24 else 1).check()


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale(scale):
    call = Call("shifted, padded", torch.float64)
    call.options = call.options._replace(scale=scale)
    call.check()


@pytest.mark.parametrize("one_tile", [0, 64], ids=["tiled", "one kernel"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p, one_tile, monkeypatch):
    monkeypatch.setattr(plans, "ONE_TILE", one_tile)
    Call("shifted, padded", torch.float64, dropout_p=p).check()


@triton.jit
def _kept_kernel(seed_ptr, row_ptr, key_ptr, out_ptr, THRESHOLD: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    row, key = tl.load(row_ptr + offs)[:, None], tl.load(key_ptr + offs)[None, :]
    kept = _kept(tl.load(seed_ptr), row, key, THRESHOLD, 4 / 3, tl.float64)
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], kept)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 2, 123456789])
def test_dropped_weights_are_those_of_the_definition(seed):
    row = torch.randint(0, 2**40, (16,))
    key = torch.arange(16, dtype=torch.int32)
    out, seed = torch.empty(16, 16, dtype=torch.float64), torch.tensor(seed)
    _kept_kernel[(1,)](seed, row, key, out, THRESHOLD=int(0.25 * 2**32), SIZE=16)
    assert torch.equal(out, reference.kept(row[:, None], key[None, :].long(), seed, 0.25))


def test_strides():
    """Tokens evenly spaced are read where they lie, others from a copy."""
    call = Call("shifted, padded")
    want = call.run(launches)
    wide = torch.full((*call.qkv.shape[:-1], call.qkv.shape[-1] + 5), float("nan"))
    wide[..., 2:-3] = call.qkv
    call.qkv = wide[..., 2:-3]
    assert plans.token_stride(call.qkv) == wide.shape[-1]
    assert all(torch.equal(a, b) for a, b in zip(call.run(launches), want, strict=True))
    call.qkv = call.qkv.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1)
    call.dout = call.dout.transpose(1, 2).contiguous().transpose(1, 2)
    assert plans.token_stride(call.qkv) is None
    assert all(torch.equal(a, b) for a, b in zip(call.run(launches), want, strict=True))


@pytest.mark.parametrize("one_tile", [0, 64], ids=["tiled", "one kernel"])
def test_any_order_of_programs(one_tile, monkeypatch):
    monkeypatch.setattr(plans, "ONE_TILE", one_tile)
    call = Call("shifted, padded", torch.bfloat16)
    want = call.run(launches)
    for seed in (1, 2):
        with shuffled_programs(seed):
            again = call.run(launches)
        assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.parametrize("number", range(3))
def test_one_gradient_alone(number):
    call = Call("shifted, padded")
    want = call.run(launches)
    needs = tuple(k == number for k in range(3))
    _, found = call.run(launches, needs)
    assert torch.equal(found, want[1 + number])


@pytest.mark.parametrize("one_tile", [0, 64], ids=["tiled", "one kernel"])
def test_gradcheck(one_tile, monkeypatch):
    monkeypatch.setattr(plans, "ONE_TILE", one_tile)
    call = Call("few", torch.float64, dropout_p=0.4)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            out, lse = launches.forward(*leaves, call.seed, call.options, True)
            ctx.save_for_backward(*leaves, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            *leaves, out, lse = ctx.saved_tensors
            return launches.backward(dout, *leaves, call.seed, out, lse, ALL, call.options)

    leaves = [t.requires_grad_() for t in (call.qkv, call.table, call.pad_kv)]
    assert torch.autograd.gradcheck(
        Attention.apply, leaves, fast_mode=True, atol=tolerance("gradcheck_fp64")
    )


def seen_by(form: str) -> tuple[np.ndarray, tuple]:
    """bool ``[kinds, queries, keys]`` from the codes, and what plans are kept by."""
    size, options, _ = FORMS[form]
    who = options.plan(size), options.pads_take_part, options.causal_t
    found = slots.kinds(*who)
    apart = found.code[:, :, None] - found.code[:, None, :]
    far = found.code == slots._FAR
    return (apart >= 0) & (apart < found.span) & ~far[:, :, None] & ~far[:, None, :], who


@pytest.mark.parametrize("form", FORMS)
def test_mask_as_a_product(form):
    seen, who = seen_by(form)
    n = seen.shape[1]
    for dtype in (torch.float16, torch.bfloat16):
        ask, hide = slots.pair(*who, 64, dtype, torch.device("cpu"))
        scores = ask.double() @ hide.double().transpose(1, 2)
        asks = torch.as_tensor(seen.any(2))
        want = torch.where(torch.as_tensor(seen), 0.0, -(slots.LARGE**2)).double()
        assert torch.equal(scores[:, :n, :n][asks], want[asks])
        assert (scores[:, :n, n:][asks] == -(slots.LARGE**2)).all()


@pytest.mark.parametrize("form", FORMS)
def test_bounds_hold_all_that_is_seen(form):
    seen, who = seen_by(form)
    for of_keys in (False, True):
        found = slots.bounds(*who, 16, 8, of_keys, torch.device("cpu"))
        if found is None:
            continue
        block, other = (8, 16) if of_keys else (16, 8)
        pairs = seen.transpose(0, 2, 1) if of_keys else seen
        kind, row, column = np.nonzero(pairs)
        first, end = found.numpy()[kind, row // block].T
        assert ((first <= column // other) & (column // other < end)).all()


@pytest.mark.parametrize("form", ["shifted in time", "causal, whole map"])
def test_tiles_in_which_nothing_is_seen_are_skipped(form):
    _, who = seen_by(form)
    found = slots.bounds(*who, 16, 16, False, torch.device("cpu"))
    assert found is not None
    assert not slots.visible_tiles(*who, 16, 16).all()


def test_offsets_past_int32():
    assert not plans.is_wide(1 << 20, 2046, 96)
    assert plans.is_wide(1 << 20, 2047, 96) and plans.is_wide(1 << 20, 96, 2047)
    key = plans.Key(
        "default", asked((2, 4, 4)), (1, 2, 4, 4, 96), (0, 1 << 26), torch.float32, torch.device("cpu"),
        False, True, False, False, "ieee",
    )  # fmt: skip
    assert plans.plan_step(plans.FORWARD, key).constants["INDEX"] == tl.int64
    assert (
        plans.plan_step(plans.FORWARD, key._replace(strides=(0, 96))).constants["INDEX"] == tl.int32
    )


def test_no_overflow(checked_overflow):
    Call("causal").check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 3, 5, 4, 95)}, "qkv: expected"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 3 * 129)}, "head_dim is 129"),
        ({"table": torch.zeros(7, 2)}, "bias_table: expected"),
        ({"pad_kv": torch.zeros(2, 33)}, "pad_kv: expected"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected"),
        ({"dout": torch.zeros(1, 3, 5, 4, 15)}, "dout: expected"),
    ],
)
def test_errors(change, message):
    call = Call("shifted, padded")
    vars(call).update(change)
    with pytest.raises(ValueError, match=message):
        call.run(launches)


def test_launches_say_what_they_look_up(monkeypatch):
    """The kernels whose configs a launch asks for are those that it names, and the shipped file has rows for them."""
    monkeypatch.undo()
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    names: set[str] = set()
    lookup = _tuning.config

    def recorded(op, kernel, arch, key):
        names.add(kernel)
        return lookup(op, kernel, arch, key)

    monkeypatch.setattr(_tuning, "config", recorded)
    layers, found = audit.shapes(launches.SHAPES), set()
    for layer in ("swin_t16.stage3.shifted", "n49.shifted", *launches.GATED):
        for launch in launches.launches(layer, layers[layer], device="meta"):
            names.clear()
            launches.forget_plans()
            with launches.as_on("sm90"):
                launch.run()
            assert names == set(launch.kernels), launch.label
            assert launch.key["layout"] in launches.CANDIDATES
            found |= names
    assert found == _tuning.rows(launches.OP, "default").keys()
    gated = [
        launch.label.partition(", ")
        for layer in launches.GATED
        for launch in launches.launches(layer, layers[layer], device="meta", gated=True)
    ]
    assert [(a, c) for a, _, c in gated] == [
        (layer, label)
        for layer, labels in launches.GATED.items()
        for label in sorted(labels, key=lambda label: label.startswith("fp32"))
    ]
