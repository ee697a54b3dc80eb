"""neighborhood_attention3d's Triton kernels themselves, in the interpreter, and the tables that they walk."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from sora_kernels import _tuning
from sora_kernels.ops.neighborhood_attention import definition, reference
from sora_kernels.ops.neighborhood_attention.options import Options
from sora_kernels.testing import assert_within_2x, poisoned, shuffled_programs, tolerance

pytest.importorskip("triton", exc_type=ImportError)

from sora_kernels.ops.neighborhood_attention import launches, tiling, walks  # noqa: E402

pytestmark = pytest.mark.triton

CPU = torch.device("cpu")
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "STAGES": 1, "num_warps": 4}  # several tiles and steps
CASES = {
    "odd sizes": ((3, 5, 4), Options((3, 3, 3), (1, 1, 1), (1, 1, 1), False, 0.4)),
    "causal": ((5, 3, 4), Options((3, 2, 3), (1, 1, 1), (1, 1, 1), True, 0.4)),
    "strided": ((3, 5, 6), Options((2, 3, 4), (2, 2, 3), (1, 1, 1), False, 0.4)),
    "dilated": ((3, 5, 6), Options((3, 3, 2), (1, 1, 1), (2, 1, 3), False, 0.4)),
    "larger than the map": ((2, 3, 3), Options((5, 7, 3), (1, 1, 1), (1, 1, 1), False, 0.4)),
    "all at once": ((5, 4, 3), Options((2, 3, 2), (2, 1, 2), (2, 2, 1), True, 0.4)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(_tuning, "config", lambda *args: SMALL)


def inputs(
    case: str, *, bias: bool = True, batch: int = 1, heads: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:  # fmt: skip
    size, options = CASES[case]
    shape = (batch, *size, heads, dim)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    return [*tensors, torch.randn(options.rows, heads, dtype=wide) if bias else None]


def run(backend, tensors, case: str) -> dict[str, Tensor]:
    options = CASES[case][1]
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(tensors[0].shape, generator=generator).to(tensors[0].dtype)
    names = "dq", "dk", "dv", "dtable"
    if backend is reference:  # by autograd
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        out, lse = reference.attention_and_sums(*leaves, options)
        wanted = [t for t in leaves if t is not None]
        found = torch.autograd.grad(out, wanted, dout)
        wide = torch.promote_types(out.dtype, torch.float32)
        return {"out": out.detach(), "lse": lse.detach().to(wide)} | dict(
            zip(names, found, strict=False)
        )
    out, lse = backend.forward(*tensors, options, True)
    found = backend.backward(dout, *tensors, out, lse, (True,) * 4, options)
    grads = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    return {"out": out, "lse": lse} | grads


def assert_right(tensors, case: str) -> None:
    with poisoned():
        ours = run(launches, tensors, case)
    plain = run(reference, tensors, case)
    truth = run(reference, [None if t is None else t.double() for t in tensors], case)
    assert ours.keys() == truth.keys()
    for name in truth:
        dtype = tensors[0].dtype
        assert_within_2x(ours[name], plain[name], truth[name], name=name, storage=dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_within_2x(case, bias):
    assert_right(inputs(case, bias=bias, heads=2, batch=1 + bias), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    assert_right(inputs("odd sizes", dtype=dtype), "odd sizes")


@pytest.mark.parametrize("dim", [5, 24])
def test_head_dims(dim):
    assert_right(inputs("odd sizes", dim=dim), "odd sizes")


def test_no_overflow(checked_overflow):
    """Every integer operation checked."""
    assert_right(inputs("dilated", heads=1), "dilated")


def test_shipped_tiles(monkeypatch):
    monkeypatch.undo()
    assert_right(inputs("causal", heads=1), "causal")


def test_any_strides():
    """Views of one projection, tokens that are not evenly spaced, one sample for all."""
    q, k, v, table = inputs("odd sizes", batch=2, dim=4)
    q, _ = torch.stack((q, q), 4).unbind(4)
    k, v = k.transpose(1, 3).contiguous().transpose(1, 3), v[:1].expand(v.shape)
    ours = run(launches, [q, k, v, table], "odd sizes")
    want = run(launches, [*(t.contiguous() for t in (q, k, v)), table], "odd sizes")
    assert all(torch.equal(ours[name], want[name]) for name in want)


def test_one_projection_is_not_copied():
    qkv = torch.randn(2, 3, 4, 5, 3, 2, 8)
    assert all(launches._is_even(x) for x in qkv.unbind(4))
    assert launches._is_even(torch.randn(1, 1, 4, 1, 2, 8)[:, :, ::2])
    assert not launches._is_even(qkv[:, :, ::2, :, 0])


def test_repeats_in_any_program_order():
    tensors = inputs("strided")
    first = run(launches, tensors, "strided")
    with poisoned(), shuffled_programs(0):
        again = run(launches, tensors, "strided")
    for name in first:
        assert not again[name].isnan().any(), f"{name}: an element was not written"
        assert torch.equal(first[name], again[name]), name


def test_parts_of_the_bias_gradient_do_not_show(monkeypatch):
    tensors = inputs("odd sizes", batch=2, dtype=torch.float64)
    want = run(reference, tensors, "odd sizes")["dtable"]
    for fill in (1, 1 << 20):
        monkeypatch.setattr(launches, "FILL", fill)
        found = run(launches, tensors, "odd sizes")["dtable"]
        assert_within_2x(found, want, want, name=f"dtable in {fill}")


def test_gradients_that_nobody_needs():
    tensors, options = inputs("causal"), CASES["causal"][1]
    out, lse = launches.forward(*tensors, options, True)
    want = launches.backward(out, *tensors, out, lse, (True,) * 4, options)
    some = launches.backward(out, *tensors, out, lse, (True, False, False, True), options)
    assert some[1] is None and some[2] is None
    assert torch.equal(some[0], want[0]) and torch.equal(some[3], want[3])
    assert launches.forward(*tensors, options, False)[1] is None


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, options):
        out, lse = launches.forward(q, k, v, table, options, True)
        ctx.save_for_backward(q, k, v, table, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        found = launches.backward(dout.contiguous(), *ctx.saved_tensors, (True,) * 4, ctx.options)
        return (*found, None)


@pytest.mark.parametrize(("case", "fast"), [("all at once", True), ("larger than the map", False)])
def test_gradcheck(case, fast):
    size, options = CASES[case]
    if not fast:
        options = options._replace(window=(1, 2, 2))
        size = (1, 2, 3)
    q, k, v = (
        torch.randn(1, *size, 1, 1 + fast, dtype=torch.float64, requires_grad=True) for _ in "qkv"
    )
    table = torch.randn(options.rows, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: Attend.apply(*x, options), (q, k, v, table), fast_mode=fast,
        atol=tolerance("gradcheck_fp64"),
    )  # fmt: skip


def test_offsets_are_64_bit_where_a_sample_is_large(monkeypatch):
    tensors = inputs("odd sizes")
    want = run(launches, tensors, "odd sizes")
    monkeypatch.setattr(launches, "WIDEST", 0)
    for name, found in run(launches, tensors, "odd sizes").items():
        assert torch.equal(found, want[name])
    huge = torch.empty(1, 64, 256, 256, 8, 128, dtype=torch.bfloat16, device="meta")
    monkeypatch.undo()
    assert launches._constants(huge, huge, huge)["INDEX"] == launches.tl.int64
    assert launches._constants(*tensors[:3])["INDEX"] == launches.tl.int32


def decode(walk: walks.Walk, block_m: int) -> set[tuple[int, int, int]]:
    """(row's token, column's token, bias) of what a walk lets rows see, by the kernels' arithmetic."""
    rows = walk.rows.view(4, -1, block_m).numpy().astype(np.int64)
    found = []
    for tile, (first, columns, corner) in enumerate(walk.tiles.tolist()):
        token, low, high, bias = rows[:, tile]
        end = first + -(-columns // SMALL["BLOCK_N"]) * SMALL["BLOCK_N"]
        word, step, code = walk.slots.numpy()[:, first:end].astype(np.int64)
        seen = (word + low[:, None]) & (high[:, None] - word) & walk.guards
        for m, n in np.argwhere(seen == walk.guards).tolist():
            assert n < columns, "a slot beyond the box is seen"
            found.append((int(token[m]), int(corner + step[n]), int(bias[m] + code[n])))
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("size", [(3, 5, 4), (1, 17, 9), (7, 2, 13)])
@pytest.mark.parametrize("case", CASES)
def test_walks_hold_the_definitions_pairs(case, size):
    """Each pair once, seen from the queries and from the keys, with the same row of the table."""
    options = CASES[case][1]
    given = [
        walks.walk(size, options, by_key, SMALL["BLOCK_M"], SMALL["BLOCK_N"], CPU)
        for by_key in (False, True)
    ]
    by_query, by_key = (decode(walk, SMALL["BLOCK_M"]) for walk in given)
    assert by_query == {(q, k, row) for k, q, row in by_key}
    count = math.prod(size)
    table = torch.arange(options.rows, dtype=torch.float64)[:, None]
    q = k = torch.zeros(1, *size, 1, 1, dtype=torch.float64)
    # Weights of one query: the softmax of the table's rows that it is to see.
    for query in range(0, count, 7):
        v = torch.zeros(1, *size, 1, count, dtype=torch.float64)
        v.view(count, count).fill_diagonal_(1)
        out = definition.forward(q, k, v, table * 1e-3, options, False)[0].view(count, count)
        want = {(query, key) for key in out[query].nonzero().flatten().tolist()}
        own = {(a, b): row for a, b, row in by_query if a == query}
        assert own.keys() == want
        rows = torch.zeros(count, dtype=torch.float64)
        seen = torch.tensor([b for _, b in own])
        rows[seen] = (torch.tensor(list(own.values()), dtype=torch.float64) * 1e-3).softmax(0)
        assert_within_2x(rows, out[query], out[query], name=f"rows of query {query}")


def test_a_word_has_room():
    options = Options((18, 24, 24), (1, 1, 1), (1, 1, 1), False, 1.0)
    assert tiling.packed_bits((30, 48, 80), options) <= tiling.WORD
    assert (
        tiling.packed_bits((1 << 12, 1 << 12, 1 << 12), Options(*[(1 << 12,) * 3] * 3, False, 1.0))
        > tiling.WORD
    )


SWEEP = """
import json, torch
from sora_kernels import _launches, audit
from sora_kernels.ops.neighborhood_attention import launches
from triton.runtime.jit import JITFunction

keys = {}

def compile(self, key, *args, **kwargs):
    keys.setdefault(self.__name__, set()).add(key)

JITFunction._do_compile = compile
with audit._offline("sm_90"), launches.as_on("sm90"):
    for size in ((8, 14, 14), (4, 7, 7), (5, 9, 11), (1, 1, 3)):
        for window in ((3, 7, 7), (4, 4, 4)):
            for batch, heads in ((1, 1), (1, 4), (2, 3)):
                shape = {"batch": batch, "size": size, "heads": heads, "head_dim": 64, "bias": True}
                shape |= {"window": window, "causal": batch == 2, "dilation": (1, batch, 2)}
                with _launches.record(launch=False) as records:
                    for launch in launches.launches("sweep", shape, device="meta"):
                        launch.run()
                for r in records:
                    r.kernel.run(*r.args, grid=r.grid, warmup=True, **r.kwargs)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def test_a_sweep_takes_one_compilation_a_dtype():
    """Sizes, windows, dilation, heads and batch are run-time arguments."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    kernels = launches.FORWARD, launches.BY_QUERY, launches.BY_KEY, launches.FOLD, launches.SUM
    assert json.loads(done.stdout) == dict.fromkeys(kernels, 2)


def test_launchers_look_again_before_taking_pointers():
    tensors, options = inputs("odd sizes"), CASES["odd sizes"][1]
    q, k, v, table = tensors
    for given, message in (
        ([q[0], k, v, table], r"q: expected \[B, T, H, W"),
        ([q, k.double(), v, table], r"k: expected \[B, T, H, W"),
        ([q[:0], k[:0], v[:0], table], "q: expected fp16"),
        ([q, k, v, table[1:]], r"bias_table: expected \(125, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            launches.forward(*given, options, True)
    out, lse = launches.forward(*tensors, options, True)
    with pytest.raises(ValueError, match="dout: expected contiguous"):
        launches.backward(out[:, :2], *tensors, out, lse, (True,) * 4, options)
    with pytest.raises(ValueError, match="lse: expected contiguous"):
        launches.backward(out, *tensors, out, lse[..., :2], (True,) * 4, options)
