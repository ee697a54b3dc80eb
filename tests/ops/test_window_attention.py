"""``window_attention3d`` by every backend: plans, values, gradients, borders, dropout, transforms, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sora_kernels as sk
from sora_kernels import BackendError
from sora_kernels.ops.window_attention import pieces, reference
from sora_kernels.ops.window_attention.decomposition import DECOMPOSITIONS
from sora_kernels.ops.window_attention.geometry import WindowPlan, plan
from sora_kernels.ops.window_attention.options import BORDERS, Options, fit
from sora_kernels.ops.window_attention.position import codes
from sora_kernels.testing import assert_close, assert_within_2x, poisoned, tolerance

BACKENDS = ["reference", "torch"]  # Triton's kernels: test_window_attention_kernels.py


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


class Call(NamedTuple):
    """Arguments of one call, tensors by name."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def __call__(self, tensors: dict[str, Tensor] | None = None, **changed: Any) -> Tensor:
        given = {**(tensors or self.tensors), **self.options, **changed}
        return sk.window_attention3d(given.pop("qkv"), **given)

    def run(self, **changed: Any) -> dict[str, Tensor]:
        """The output and every gradient by name, for a fixed random output gradient."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.tensors.items()}
        out = self(leaves, **changed)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=True)
        return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}

    def to(self, dtype: torch.dtype) -> Call:
        return self._replace(tensors={name: t.to(dtype) for name, t in self.tensors.items()})


def case(
    size: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int] = (0, 0, 0), *,
    heads: int = 2, dim: int = 4, batch: int = 2, bias: bool = True, pad_kv: bool = True,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Call:  # fmt: skip
    width = heads * dim
    tensors = {"qkv": torch.randn(batch, *size, 3 * width, dtype=dtype)}
    if bias:
        table = options.get("table_window", window)
        tensors["bias_table"] = torch.randn(math.prod(2 * n - 1 for n in table), heads, dtype=dtype)
    if pad_kv:
        tensors["pad_kv"] = torch.randn(2, width, dtype=dtype)
    return Call(
        tensors, {"num_heads": heads, "window_size": window, "shift_size": shift, **options}
    )


CASES: dict[str, dict[str, Any]] = {
    "whole windows": {"size": (4, 8, 8), "window": (2, 4, 4)},
    "shifted": {"size": (4, 8, 8), "window": (2, 4, 4), "shift": (1, 2, 2)},
    "shifted, padded": {"size": (5, 9, 7), "window": (2, 4, 4), "shift": (1, 2, 2)},
    "one axis shifted": {"size": (4, 7, 5), "window": (2, 3, 3), "shift": (0, 2, 0)},
    "pads past a window": {"size": (2, 5, 9), "window": (2, 4, 4), "shift": (0, 3, 3)},
    "clipped": {"size": (3, 3, 2), "window": (2, 4, 4), "shift": (1, 2, 2)},
    "clipped, exact": {"size": (3, 3, 2), "window": (2, 4, 4), "shift": (1, 2, 2), "bias_index": "exact"},
    "one window": {"size": (2, 4, 3), "window": (2, 4, 3), "shift": (1, 2, 1)},
    "larger table": {"size": (4, 6, 6), "window": (2, 3, 3), "table_window": (3, 4, 5), "bias_index": "exact"},
    "time": {"size": (5, 3, 4), "window": (5, 1, 1)},
    "space": {"size": (3, 4, 5), "window": (1, 4, 5)},
    "causal": {"size": (5, 4, 6), "window": (4, 2, 3), "shift": (1, 1, 1), "causal_t": True},
    "masked pads": {"size": (5, 9, 7), "window": (2, 4, 4), "shift": (1, 2, 2), "pad": "mask"},
    "ragged": {"size": (5, 9, 7), "window": (2, 4, 4), "shift": (1, 3, 2), "border": "ragged"},
    "grid": {"size": (5, 9, 7), "window": (2, 4, 4), "border": "grid"},
    "grid, masked": {"size": (5, 9, 7), "window": (2, 4, 4), "border": "grid", "pad": "mask"},
    "no bias": {"size": (4, 5, 6), "window": (2, 4, 4), "shift": (1, 2, 2), "bias": False, "pad_kv": False},
    "scaled": {"size": (2, 5, 5), "window": (2, 4, 4), "scale": 0.7, "heads": 3, "dim": 5},
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)


def visible(size: Any, window: Any, shift: Any, border: str) -> Tensor:
    """Which tokens see each other, bool [tokens, tokens], from each axis alone: the same window, and there the same
    side of the seam that the shift makes; pads are nobody.
    """
    together = torch.ones(1, 1, dtype=torch.bool)
    for n, w, s in zip(size, *fit(size, window, shift), strict=True):
        at = torch.arange(n)
        if border == "grid":
            label = at % -(-n // w)
        elif border == "ragged":
            label = (at - s).div(w, rounding_mode="floor")  # what starts at s, s + w, ...
        else:
            padded = -(-n // w) * w
            label = (at - s) % padded // w * 2 + (at < s)
        same = label[:, None] == label[None, :]
        together = (together[:, None, :, None] & same[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return together


sizes = st.tuples(*[st.integers(1, 9)] * 3)


@settings(max_examples=150, deadline=None)
@given(size=sizes, window=st.tuples(*[st.integers(1, 5)] * 3), data=st.data())
def test_plans_hold_every_token_once_among_its_own(size, window, data):
    """And so do their pieces; a ragged plan's windows are those of a map cut at the border."""
    border = data.draw(st.sampled_from(BORDERS))
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    shift = (0, 0, 0) if border == "grid" else shift
    found = plan(size, window, shift, border)
    volume = math.prod(size)
    token = torch.from_numpy(found.token)
    assert torch.equal(token[token >= 0].sort().values, torch.arange(volume))
    assert torch.equal((-1 - token[token < 0]).sort().values, torch.arange(found.pads))
    want = visible(size, window, shift, border)
    by_plan = torch.zeros(volume, volume, dtype=torch.bool)
    for row, region in zip(token, torch.from_numpy(found.region), strict=True):
        real = row >= 0
        same = region[real][:, None] == region[real][None, :]
        by_plan[row[real][:, None], row[real][None, :]] = same
    assert torch.equal(by_plan, want)
    frame = torch.from_numpy(found.frame)[token >= 0]
    assert torch.equal(frame, token[token >= 0] // (size[1] * size[2]))
    for pads_take_part in (True, False):
        by_pieces = torch.zeros(volume, volume, dtype=torch.bool)
        times = torch.zeros(volume, dtype=torch.int64)
        for piece in found.pieces(pads_take_part):
            for row in torch.from_numpy(piece.token):
                assert pads_take_part or (row >= 0).all()
                row = row[row >= 0]
                times[row] += 1
                by_pieces[row[:, None], row[None, :]] = True
        assert torch.equal(by_pieces, want) and (times == 1).all()


def test_a_plan_is_kept_and_shows_itself():
    first = plan((16, 56, 56), (8, 7, 7), (4, 3, 3), "cyclic")
    assert plan((16, 56, 56), (8, 7, 7), (4, 3, 3), "cyclic") is first
    assert first.grid == (2, 8, 8) and first.tokens == 392 and first.pads == 0 and first.mixed
    assert repr(first) == (
        "WindowPlan(size=(16, 56, 56), window=(8, 7, 7), shift=(4, 3, 3), border='cyclic'): "
        "128 windows of 392 tokens, 0 pads"
    )
    clipped = WindowPlan((8, 5, 9), (8, 7, 7), (4, 3, 3), "cyclic")
    assert clipped.window == (8, 5, 7) and clipped.shift == (0, 0, 3) and clipped.pads == 8 * 5 * 5


@pytest.mark.parametrize("window", [(2, 3, 4), (1, 3, 4), (2, 2, 4), (2, 3, 1)])
def test_position_codes(window):
    """Exact ones are true offsets; torchvision's are the first rows of the full window's index."""
    table = (2, 3, 4)
    slots = list(itertools.product(*map(range, window)))
    found = codes(window, table, "exact")
    assert found.rows == 3 * 5 * 7 and len(set(found.code.tolist())) == len(slots)
    index = found.pairs()
    for i, a in enumerate(slots):
        for j, b in enumerate(slots):
            t, h, w = (x - y + n - 1 for x, y, n in zip(a, b, table, strict=True))
            assert index[i, j] == (t * 5 + h) * 7 + w
    full = codes(table, table, "exact").pairs()
    n = len(slots)
    assert (codes(window, table, "torchvision").pairs() == full[:n, :n]).all()


def by_tokens(call: Call) -> Tensor:
    """Every token by itself, in fp64: no windows, pads as extra tokens of the padded map."""
    o = {"shift_size": (0, 0, 0), "bias_index": "torchvision", "border": "cyclic", "pad": "kv",
         "causal_t": False, "scale": None} | call.options  # fmt: skip
    qkv = call.tensors["qkv"].double()
    B, *size, width = qkv.shape
    heads = o["num_heads"]
    window, shift = fit(size, o["window_size"], o["shift_size"])
    table = o.get("table_window", o["window_size"])
    counts = [-(-n // w) for n, w in zip(size, window, strict=True)]
    padded = [c * w for c, w in zip(counts, window, strict=True)]
    pad_kv = call.tensors.get("pad_kv")
    row = torch.zeros(3, width // 3, dtype=torch.float64)
    if pad_kv is not None:
        row[1:] = pad_kv.double()
    everywhere = row.reshape(-1).expand(B, *padded, width).clone()
    T, H, W = size
    everywhere[:, :T, :H, :W] = qkv
    scale = (width // 3 // heads) ** -0.5 if o["scale"] is None else o["scale"]

    def place(p: int, n: int, w: int, s: int, c: int) -> tuple[tuple[int, bool], int]:
        """The window (and side of the seam) and the slot in it of a coordinate of the padded map."""
        if o["border"] == "grid":
            return (p % c, False), p // c
        rolled = (p - s) % (c * w)
        return (rolled // w, p < s), rolled % w

    def where(token: tuple[int, ...]) -> tuple[Any, int, tuple[int, ...]]:
        found = [place(*a) for a in zip(token, padded, window, shift, counts, strict=True)]
        slots = [slot for _, slot in found]
        number = (slots[0] * window[1] + slots[1]) * window[2] + slots[2]
        if o["bias_index"] == "torchvision":
            slots = [
                number // (table[1] * table[2]),
                number // table[2] % table[1],
                number % table[2],
            ]
        return tuple(key for key, _ in found), number, tuple(slots)

    tokens = list(itertools.product(*map(range, padded)))
    placed = {token: where(token) for token in tokens}
    real = {t: all(a < n for a, n in zip(t, size, strict=True)) for t in tokens}
    takes_part = o["pad"] == "kv" and o["border"] != "ragged"
    out = torch.zeros(B, *size, width // 3, dtype=torch.float64)
    for query in tokens:
        if not real[query]:
            continue
        q = everywhere[(slice(None), *query)].view(B, 3, heads, -1)[:, 0]
        keys = [
            key for key in tokens
            if placed[key][0] == placed[query][0] and (real[key] or takes_part)
            and not (o["causal_t"] and key[0] > query[0])
        ]  # fmt: skip
        rows = torch.stack([everywhere[(slice(None), *key)] for key in keys], 1)
        k, v = rows.view(B, len(keys), 3, heads, -1)[:, :, 1:].unbind(2)
        scores = torch.einsum("bhd,bkhd->bhk", q, k) * scale
        if "bias_table" in call.tensors:
            index = []
            for key in keys:
                t, h, w = (
                    a - b + n - 1
                    for a, b, n in zip(placed[query][2], placed[key][2], table, strict=True)
                )
                index.append((t * (2 * table[1] - 1) + h) * (2 * table[2] - 1) + w)
            scores = scores + call.tensors["bias_table"].double()[index].t()
        out[(slice(None), *query)] = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v).flatten(1)
    return out


@EVERY
def test_the_definition_is_what_a_loop_over_tokens_computes(name):
    call = case(**{**CASES[name], "batch": 1}, dtype=torch.float64)
    assert_close(call(backend="reference"), by_tokens(call), "transform_fp64")


@EVERY
@pytest.mark.parametrize("way", ["cut", "whole"])
def test_in_pieces(name, way, monkeypatch):
    """Windows cut up where regions meet, and whole and masked, in fp64."""
    monkeypatch.setattr(pieces, "CALL", 0 if way == "cut" else 1 << 60)
    pieces.pieces.cache_clear()
    call = case(**CASES[name], dtype=torch.float64)
    with poisoned():
        ours = call.run(backend="torch")
    pieces.pieces.cache_clear()
    for key, want in call.run(backend="reference").items():
        assert_close(ours[key], want, "transform_fp64", name=key)


@pytest.mark.parametrize("name", ["shifted, padded", "clipped", "causal", "masked pads", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_within_twice_of_plain_torch(name, dtype):
    call = case(**CASES[name]).to(dtype)
    ours, plain = call.run(backend="torch"), call.run(backend="reference")
    truth = call.to(torch.float64).run(backend="reference")
    for key in truth:
        assert_within_2x(ours[key], plain[key], truth[key], name=key, storage=dtype)


def test_many_windows_at_once_and_a_part_of_them(monkeypatch):
    """Backward in steps of some windows, head by head and all heads at once."""
    from sora_kernels.ops.window_attention import stock

    call = case(size=(4, 8, 9), window=(2, 4, 4), shift=(1, 2, 2), heads=3, dtype=torch.float64)
    want = call.run(backend="reference")
    for step, few in ((1 << 11, 0), (1 << 11, 1 << 30), (1, 0)):
        monkeypatch.setattr(stock, "_STEP", step)
        monkeypatch.setattr(stock, "_FEW", few)
        ours = call.run(backend="torch")
        for key in want:
            assert_close(ours[key], want[key], "transform_fp64", name=key)


def test_the_road_through_a_fused_attention_and_its_backward(monkeypatch):
    """As on CUDA, without a bias; here the CPU's fused attention stands in for it."""
    from sora_kernels.ops.window_attention import stock

    aten = torch.ops.aten

    def backward(do, q, k, v, out, lse, none, also_none, n, m, p, causal, seed, offset, *, scale):
        assert none is also_none is None and n == m == q.shape[2]
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, lse, p, causal, scale=scale
        )

    fused = lambda q, k, v, scale: stock._flash_cpu(q, k, v, 0.0, False, scale=scale)  # noqa: E731
    call = case(size=(4, 5, 6), window=(2, 4, 4), shift=(1, 2, 2), bias=False, dtype=torch.float64)
    want = call.run(backend="reference")
    monkeypatch.setattr(stock, "flash_can_run", lambda q: True)
    monkeypatch.setattr(stock, "_flash_cuda", fused)
    monkeypatch.setattr(stock, "_flash_cuda_backward", backward)
    ours = call.run(backend="torch")
    for key in want:
        assert_close(ours[key], want[key], "transform_fp64", name=key)


def test_gradcheck(backend):
    for name in ("shifted, padded", "ragged", "clipped"):
        call = case(**{**CASES[name], "size": (2, 3, 5), "dim": 2, "batch": 1}, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in call.tensors.values()]

        def function(*given):
            return call(dict(zip(call.tensors, given, strict=True)), backend=backend)  # noqa: B023

        assert torch.autograd.gradcheck(
            function, leaves, atol=tolerance("gradcheck_fp64"), fast_mode=True
        )
        assert torch.autograd.gradgradcheck(
            function, leaves, atol=tolerance("gradcheck_fp64"), fast_mode=True
        )


def test_only_what_is_wanted_gets_a_gradient(backend):
    call = case(size=(2, 5, 5), window=(2, 4, 4))
    full = call.run(backend=backend)
    for name in call.tensors:
        given = {n: t.detach().requires_grad_(n == name) for n, t in call.tensors.items()}
        out = call(given, backend=backend)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (grad,) = torch.autograd.grad(out, [given[name]], dout)
        assert_close(grad, full[f"d{name}"], "composition_fp32")


def test_gradients_repeat_bit_for_bit(backend):
    call = case(size=(4, 8, 9), window=(2, 4, 4), shift=(1, 2, 2))
    first, second = call.run(backend=backend), call.run(backend=backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded"])
def test_any_strides(backend, view):
    call = case(size=(2, 5, 6), window=(2, 4, 4), shift=(0, 2, 2))
    qkv = {
        "sliced": lambda x: x.repeat(1, 1, 2, 1, 2)[:, :, ::2, :, : x.shape[-1]],
        "transposed": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        "expanded": lambda x: x[:1].expand(x.shape),
    }[view](call.tensors["qkv"])
    other = call._replace(tensors={**call.tensors, "qkv": qkv})
    plain = call._replace(tensors={**call.tensors, "qkv": qkv.contiguous()})
    ours, want = other.run(backend=backend), plain.run(backend=backend)
    assert all(torch.equal(ours[name], want[name]) for name in want)
    assert ours["out"].is_contiguous()


def test_nan_stays_in_its_window(backend):
    call = case(size=(2, 8, 8), window=(2, 4, 4), pad_kv=False)
    call.tensors["qkv"][0, 1, 2, 5] = torch.nan
    out = call(backend=backend)
    inside = torch.zeros(out.shape, dtype=torch.bool)
    inside[0, :, :4, 4:] = True
    assert torch.equal(out.isnan(), inside)


def test_an_empty_batch(backend):
    call = case(size=(2, 5, 5), window=(2, 4, 4), batch=0)
    found = call.run(backend=backend)
    assert found["out"].shape == (0, 2, 5, 5, 8) and found["dqkv"].shape == (0, 2, 5, 5, 24)
    assert not found["dbias_table"].any() and not found["dpad_kv"].any()


def test_large_scores_of_one_sign(backend):
    """No overflow on the way to the softmax; the weights are one-hot."""
    call = case(size=(2, 4, 4), window=(2, 4, 4), bias=False, pad_kv=False)
    call.tensors["qkv"].mul_(1e4)
    ours, want = call.run(backend=backend), call.to(torch.float64).run(backend="reference")
    assert_close(ours["out"], want["out"], "composition_fp32")


def test_dropout(backend):
    """The same weights for every backend; expectation, seeds, and the gradient of what was kept."""
    call = case(
        size=(3, 8, 8), window=(2, 4, 4), shift=(1, 2, 2), dtype=torch.float64, dropout_p=0.4
    )
    assert torch.equal(call(backend=backend), call(backend=backend, dropout_p=0.0))  # evaluation
    torch.manual_seed(5)
    ours = call.run(backend=backend, training=True)
    torch.manual_seed(5)
    want = call.run(backend="reference", training=True)
    for key in want:
        assert_close(ours[key], want[key], "transform_fp64", name=key)
    assert not torch.equal(call(backend=backend, training=True), ours["out"])
    # Values of one: a row of kept weights sums to one in the mean.
    ones = call.tensors["qkv"].clone()
    ones.view(*ones.shape[:-1], 3, -1)[..., 2, :] = 1
    sums = call({"qkv": ones}, backend=backend, training=True, pad="mask")
    assert abs(sums.mean().item() - 1) < 5 * sums.std().item() / sums.numel() ** 0.5
    assert sums.std() > 0.05


def test_kept_share():
    seed = torch.tensor(123456789012345)
    factor = reference.kept(torch.arange(400)[:, None], torch.arange(500), seed, 0.3)
    share = (factor > 0).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.21 / factor.numel()) ** 0.5
    assert torch.equal(factor.unique(), torch.tensor([0.0, 1 / 0.7], dtype=torch.float64))


def test_checkpointing_repeats_the_dropout(backend):
    call = case(size=(2, 5, 5), window=(2, 4, 4), dropout_p=0.5, training=True)
    grads = []
    for again in (False, True):
        leaf = call.tensors["qkv"].clone().requires_grad_()
        step = lambda x: call({**call.tensors, "qkv": x}, backend=backend)  # noqa: E731
        torch.manual_seed(3)
        out = checkpoint(step, leaf, use_reentrant=False) if again else step(leaf)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_compile_fullgraph_without_recompiling(backend, training):
    """Several clip sizes in one graph: plans are built inside the op."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = case(size=(2, 5, 5), window=(2, 4, 4), shift=(1, 2, 2))

    def function(qkv: Tensor, bias_table: Tensor, pad_kv: Tensor) -> Tensor:
        given = {"qkv": qkv, "bias_table": bias_table, "pad_kv": pad_kv}
        return call(given, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for size in ((3, 5, 6), (4, 8, 9), (5, 7, 11)):
        call.tensors["qkv"] = torch.randn(2, *size, 24)
        found = []
        for way in (compiled, function):
            leaves = [t.clone().requires_grad_(training) for t in call.tensors.values()]
            out = way(*leaves)
            found.append(torch.autograd.grad(out.sin().sum(), leaves) if training else (out,))
        for ours, want in zip(*found, strict=True):
            assert torch.equal(ours, want)
    assert counter.frame_count == 1


def test_compile_with_inductor():
    torch._dynamo.reset()
    call = case(size=(2, 5, 6), window=(2, 4, 4), shift=(0, 2, 2))
    qkv = call.tensors["qkv"].requires_grad_()
    step = lambda x: call({**call.tensors, "qkv": x.tanh()}).square().sum()  # noqa: E731
    (ours,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(qkv), qkv)
    (want,) = torch.autograd.grad(step(qkv), qkv)
    assert_close(ours, want, "composition_fp32")


def raw(call: Call, dropout_p: float = 0.0) -> tuple[Any, ...]:
    """The registered op's arguments."""
    o = call.options
    t = call.tensors
    options = Options(
        o["num_heads"], o["window_size"], o["shift_size"], o["window_size"], "torchvision", "cyclic", "kv",
        False, 0.5, dropout_p,
    )  # fmt: skip
    seed = torch.tensor(7) if dropout_p else None
    flags = [list(f) if isinstance(f, tuple) else f for f in options]
    return (t["qkv"], t.get("bias_table"), t.get("pad_kv"), seed, *flags)


def test_opcheck(backend):
    ops = torch.ops.sora_kernels
    for call, p in (
        (case(size=(2, 5, 5), window=(2, 4, 4), shift=(1, 2, 2)), 0.0),
        (case(size=(2, 5, 5), window=(2, 4, 4), bias=False, pad_kv=False), 0.2),
    ):
        arguments = raw(call, p)
        torch.library.opcheck(ops.window_attention3d.default, (*arguments, backend))
        torch.library.opcheck(ops.window_attention3d_fwd.default, (*arguments, backend))
        out, lse = ops.window_attention3d_fwd(*arguments, backend)
        needs = [t is not None for t in arguments[:3]]
        torch.library.opcheck(
            ops.window_attention3d_bwd.default,
            (out, *arguments[:4], out, lse, *arguments[4:], needs, backend),
        )


def test_log_sum_exp_is_that_of_the_scores():
    arguments = raw(case(size=(3, 5, 5), window=(2, 4, 4), shift=(1, 2, 2), dtype=torch.float64))
    ops = torch.ops.sora_kernels
    _, ours = ops.window_attention3d_fwd(*arguments, "torch")
    _, want = ops.window_attention3d_fwd(*arguments, "reference")
    assert ours.shape == (2, 2, 75)
    assert_close(ours, want, "transform_fp64")


class Windows(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3 * 7 * 7, 2))

    def forward(self, qkv: Tensor) -> Tensor:
        return sk.window_attention3d(qkv, 2, (2, 4, 4), (1, 2, 2), bias_table=self.table)


def test_export_as_the_op_or_decomposed():
    model, qkv = Windows(), torch.randn(2, 3, 6, 7, 24)
    dim = torch.export.Dim
    program = torch.export.export(
        model, (qkv,), dynamic_shapes=({1: dim("T", min=2), 2: dim("H", min=2), 3: dim("W", min=2)},)
    )  # fmt: skip
    op = torch.ops.sora_kernels.window_attention3d.default
    assert any(node.target is op for node in program.graph.nodes)
    for size in ((3, 6, 7), (5, 4, 9)):
        x = torch.randn(2, *size, 24)
        assert torch.equal(program.module()(x), model(x))
    plain = torch.export.export(model, (qkv,)).run_decompositions(DECOMPOSITIONS)
    assert not any("sora_kernels" in str(node.target) for node in plain.graph.nodes)
    assert_close(plain.module()(qkv), model(qkv), "composition_fp32")
    # What was exported is trained.
    trained = program.module()
    (trained(qkv).square().sum()).backward()
    grads = [p.grad for p in trained.parameters()]
    (want,) = torch.autograd.grad(model(qkv).square().sum(), list(model.parameters()))
    assert_close(grads[0], want, "composition_fp32")


def test_functorch(backend):
    call = case(size=(2, 5, 5), window=(2, 4, 4), shift=(1, 2, 2), dtype=torch.float64)
    qkv, table = call.tensors["qkv"], call.tensors["bias_table"]

    def function(x: Tensor, t: Tensor) -> Tensor:
        return call({**call.tensors, "qkv": x, "bias_table": t}, backend=backend)

    many = torch.randn(3, *table.shape, dtype=torch.float64)
    batched = torch.func.vmap(function, (None, 0))(qkv, many)
    for k in range(3):
        assert_close(batched[k], function(qkv, many[k]), "transform_fp64")
    grad = torch.func.grad(lambda t: function(qkv, t).sin().sum())(table)
    leaf = table.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(qkv, leaf).sin().sum(), leaf)
    assert_close(grad, want, "transform_fp64")
    tangent = torch.randn_like(table)
    _, forward = torch.func.jvp(lambda t: function(qkv, t), (table,), (tangent,))
    cotangent = torch.randn_like(forward)
    (reverse,) = torch.autograd.grad(function(qkv, leaf), leaf, cotangent)
    assert_close((forward * cotangent).sum(), (reverse * tangent).sum(), "transform_fp64")


def test_autocast_casts_qkv_and_keeps_the_table(backend):
    call = case(size=(2, 5, 5), window=(2, 4, 4), shift=(1, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        ours = call.run(backend=backend)
    assert ours["out"].dtype == torch.bfloat16
    assert ours["dqkv"].dtype == ours["dbias_table"].dtype == torch.float32
    cast = {n: t if n == "bias_table" else t.bfloat16() for n, t in call.tensors.items()}
    want = call._replace(tensors=cast).run(backend=backend)
    assert torch.equal(ours["out"], want["out"])
    assert torch.equal(ours["dbias_table"], want["dbias_table"])


def test_tensors_kept_from_inference_mode_serve_training():
    pieces.pieces.cache_clear()
    call = case(size=(2, 5, 5), window=(2, 4, 4))
    with torch.inference_mode():
        call(backend="torch")
    assert call.run(backend="torch")["dqkv"].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 5, 24)}, r"qkv must be \[B, T, H, W, 3 \* 2 heads \* head_dim\], got \(2, 5, 5, 2"),
        ({"num_heads": 5}, "3 \\* 5 heads"),
        ({"qkv": torch.zeros(1, 2, 5, 5, 24, dtype=torch.int32)}, "qkv must be fp16, bf16, fp32 or fp64, got torch.i"),
        ({"qkv": torch.zeros(1, 2, 0, 5, 24)}, "qkv must have elements on T, H, W"),
        ({"window_size": (2, 4)}, r"window_size must be three ints \(t, h, w\), got \(2, 4\)"),
        ({"window_size": (2, 0, 4)}, "window_size must be at least 1 on every axis"),
        ({"shift_size": (2, 0, 0)}, r"shift_size must be less than window_size \(2, 4, 4\), got \(2, 0, 0\)"),
        ({"shift_size": (0, -1, 0)}, "shift_size must be at least 0"),
        ({"border": "grid"}, "shift_size must be .0, 0, 0. with border 'grid'"),
        ({"border": "torus"}, "border: expected one of cyclic, ragged, grid, got 'torus'"),
        ({"pad": "zeros"}, "pad: expected one of kv, mask, got 'zeros'"),
        ({"bias_index": "first"}, "bias_index: expected one of torchvision, exact, got 'first'"),
        ({"bias_table": torch.zeros(146, 2)}, r"bias_table must be floating point \(147, 2\) on cpu, got torch.float"),
        ({"table_window": (2, 3, 4)}, r"table_window must be at least window_size \(2, 4, 4\), got \(2, 3, 4\)"),
        ({"pad_kv": torch.zeros(2, 24)}, r"pad_kv must be floating point \(2, 8\) on cpu"),
        ({"dropout_p": 1.0, "training": True}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"backend": "cuda"}, "backend must be one of triton, torch, reference or None, got 'cuda'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changed, message):
    call = case(size=(2, 5, 5), window=(2, 4, 4), shift=(1, 2, 2))
    tensors = {n: changed.pop(n, t) for n, t in call.tensors.items()}
    with pytest.raises(ValueError, match=message):
        call(tensors, **changed)


def test_a_backend_that_cannot_run_says_why():
    call = case(size=(2, 5, 5), window=(2, 4, 4), heads=1, dim=160)
    with pytest.raises(BackendError, match="head_dim is 160; the kernels take up to 128"):
        call(backend="triton")


def test_explain():
    call = case(size=(2, 5, 5), window=(2, 4, 4))
    found = sk.explain("window_attention3d", **call.tensors, **call.options)
    assert found.chosen == "torch"
    rows = {row.backend: row for row in found.rows}
    assert rows["torch"].floor_bytes == 2 * 50 * (24 + 8) * 4
