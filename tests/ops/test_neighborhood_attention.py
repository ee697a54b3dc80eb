"""``neighborhood_attention3d``: the definition against loops, backend "torch" against it, what surrounds an op."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sora_kernels as sk
from sora_kernels import BackendError
from sora_kernels.ops.neighborhood_attention import geometry, neighborhood_attention3d, reference
from sora_kernels.ops.neighborhood_attention.groups import groups
from sora_kernels.ops.neighborhood_attention.options import Options
from sora_kernels.testing import assert_close, assert_within_2x, poisoned, tolerance

# size, window, stride, dilation, causal_t
CASES: dict[str, tuple[Any, Any, Any, Any, bool]] = {
    "odd sizes": ((3, 5, 7), (3, 3, 5), 1, 1, False),
    "even window": ((4, 6, 5), (2, 4, 4), 1, 1, False),
    "larger than the map": ((2, 3, 5), 7, 1, 1, False),
    "one frame": ((1, 6, 6), (1, 3, 3), 1, 1, False),
    "causal": ((6, 3, 4), (3, 3, 3), 1, 1, True),
    "dilated": ((5, 6, 7), 3, 1, (1, 2, 3), False),
    "dilated, larger than a class": ((3, 7, 5), (2, 4, 3), 1, (4, 2, 2), False),
    "strided": ((4, 7, 8), (2, 3, 4), (2, 3, 2), 1, False),
    "stride of the window": ((4, 5, 6), (2, 3, 3), (2, 3, 3), 1, False),
    "causal, strided, dilated": ((7, 5, 4), (3, 3, 2), (2, 2, 1), (2, 1, 2), True),
}
BACKENDS = ["reference", "torch"]


def options_of(case: str) -> Options:
    _, window, stride, dilation, causal = CASES[case]
    triples = (x if isinstance(x, tuple) else (x, x, x) for x in (window, stride, dilation))
    return Options(*triples, causal, 0.5)


def inputs(
    case: str, *, bias: bool = True, heads: int = 2, dim: int = 8, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:  # fmt: skip
    """q, k, v, table; the table fp32 beside 16 bits."""
    shape = (batch, *CASES[case][0], heads, dim)
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    return [q, k, v, torch.randn(options_of(case).rows, heads, dtype=wide) if bias else None]


def attend(tensors: Any, case: str, backend: str | None = None) -> Tensor:
    _, window, stride, dilation, causal = CASES[case]
    return neighborhood_attention3d(
        *tensors[:3], window, stride=stride, dilation=dilation, causal_t=causal, bias_table=tensors[3],
        scale=0.5, backend=backend,
    )  # fmt: skip


def run(tensors: Any, case: str, backend: str | None = None) -> dict[str, Tensor]:
    """Output and gradients by name, for a fixed output gradient; "definition" is the reference by autograd."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    if backend == "definition":
        out = reference.neighborhood_attention3d(*leaves, options_of(case))
    else:
        out = attend(leaves, case, backend)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    names = [n for n, t in zip(("dq", "dk", "dv", "dtable"), leaves, strict=True) if t is not None]
    grads = torch.autograd.grad(out, [t for t in leaves if t is not None], dout)
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def doubled(tensors: Any) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def window_of(i: int, n: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The keys of query i of an axis, by NATTEN's words."""
    own = [x for x in range(n) if x % dilation == i % dilation]
    at = own.index(i)
    window = min(window, len(own))
    group = range(at - at % stride, min(at - at % stride + stride, len(own)))
    if causal:
        return [own[j] for j in range(len(own)) if group[-1] - window < j <= at]
    leader = min(group.start + stride // 2, len(own) - 1)
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window > len(own):
        first -= 1
    return own[first : first + window]


def by_loops(tensors: Any, case: str) -> Tensor:
    q, k, v, table = tensors
    o = options_of(case)
    size, causal = CASES[case][0], (o.causal_t, False, False)
    out = torch.zeros_like(q)
    for query in itertools.product(*map(range, size)):
        axes = [
            window_of(*given)
            for given in zip(query, size, o.window, o.stride, o.dilation, causal, strict=True)
        ]
        keys = list(itertools.product(*axes))
        t, h, w = (torch.tensor(x) for x in zip(*keys, strict=True))
        scores = torch.einsum("bnd,bknd->bnk", q[(slice(None), *query)], k[:, t, h, w]) * o.scale
        if table is not None:
            rows = []
            for key in keys:
                row = 0
                for a, b, n, d in zip(query, key, o.window, o.dilation, strict=True):
                    row = row * (2 * n - 1) + (a - b) // d + n - 1
                rows.append(row)
            scores = scores + table[torch.tensor(rows)].t()
        out[(slice(None), *query)] = torch.einsum(
            "bnk,bknd->bnd", scores.softmax(-1), v[:, t, h, w]
        )
    return out


@pytest.mark.parametrize("case", CASES)
def test_definition_against_loops(case):
    tensors = inputs(case, dtype=torch.float64)
    for given in (tensors, [*tensors[:3], None]):
        assert_close(attend(given, case, "reference"), by_loops(given, case), "transform_fp64")


def test_axes_against_the_definition():
    """Both directions, every small axis: 2400 of them."""
    grid = itertools.product(range(1, 9), range(1, 6), range(1, 6), range(1, 5), (False, True))
    for n, w, s, d, causal in grid:
        if s > w:
            continue
        axis = geometry.axis(n, w, s, d, causal)
        want = reference.allowed(n, w, s, d, causal)
        place = torch.as_tensor(axis.place)
        for found, order in ((axis, False), (geometry.turned(axis), True)):
            at = torch.arange(n)
            start, end = torch.as_tensor(found.start), torch.as_tensor(found.end)
            seen = (start[:, None] <= at) & (at < end[:, None])
            own = want[place][:, place]
            assert torch.equal(seen, own.t() if order else own), (n, w, s, d, causal)


def test_as_full_attention():
    tensors = inputs("larger than the map", bias=False)
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in tensors[:3])
    want = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)
    for backend in BACKENDS:
        out = attend(tensors, "larger than the map", backend)
        assert_close(out.flatten(1, 3), want, "composition_fp32")


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_2x(backend, case, bias):
    tensors = inputs(case, bias=bias)
    with poisoned():
        ours = run(tensors, case, backend)
    plain, truth = (run(x, case, "definition") for x in (tensors, doubled(tensors)))
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_within_2x(ours[name], plain[name], truth[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    tensors = inputs("odd sizes", dtype=dtype)
    ours, plain = (run(tensors, "odd sizes", b) for b in ("torch", "definition"))
    truth = run(doubled(tensors), "odd sizes", "definition")
    for name in truth:
        assert ours[name].dtype == plain[name].dtype
        assert_within_2x(ours[name], plain[name], truth[name], name=name, storage=dtype)


@pytest.mark.parametrize("steps", [1, 7, 1 << 9])
def test_steps_of_the_torch_backend_do_not_show(monkeypatch, steps):
    from sora_kernels.ops.neighborhood_attention import stock

    tensors = inputs("strided", heads=6, dtype=torch.float64)
    want = run(tensors, "strided", "definition")
    monkeypatch.setattr(stock, "_STEP", steps)
    monkeypatch.setattr(stock, "_COPIED", steps)
    for name, found in run(tensors, "strided", "torch").items():
        assert_close(found, want[name], "transform_fp64", name=name)


def test_full_attention_as_on_a_gpu(monkeypatch):
    """By SDPA whole, both ways, eager and below the dispatcher."""
    from sora_kernels.ops.neighborhood_attention import stock

    case = "larger than the map"
    tensors = inputs(case, bias=False, dtype=torch.float64)
    want = run(tensors, case, "definition")
    monkeypatch.setattr(stock, "_whole", lambda q, table, options: table is None)
    ours = run(tensors, case, "torch")
    flags = [*map(list, options_of(case)[:3]), False, 0.5]
    ops = torch.ops.sora_kernels
    out, lse = ops.neighborhood_attention3d_fwd(*tensors, *flags, "torch")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    given = (dout, *tensors, out, lse, *flags, [True, True, True, False], "torch")
    dq, dk, dv, _ = ops.neighborhood_attention3d_bwd(*given)
    raw = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    for name in want:
        assert_close(ours[name], want[name], "transform_fp64", name=name)
        assert_close(raw[name], want[name], "transform_fp64", name=name)


@pytest.mark.parametrize("size", [(5, 11, 9), (1, 1, 13)])
@pytest.mark.parametrize("case", ["odd sizes", "causal, strided, dilated"])
def test_groups_hold_every_query_once(case, size):
    found = groups(size, options_of(case), True, torch.device("cpu"))
    queries = torch.cat([g.queries.reshape(-1) for g in found])
    assert torch.equal(queries.sort().values, torch.arange(math.prod(size)))
    tokens = torch.arange(math.prod(size)).view(size)
    for group in found:
        for keys, box in zip(group.keys, group.boxes, strict=True):
            assert torch.equal(tokens[box].reshape(-1), keys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    tensors = inputs("causal", batch=1, heads=1, dim=2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    call = lambda *args: attend(args, "causal", backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, atol=tolerance("gradcheck_fp64"))
    assert torch.autograd.gradgradcheck(
        call, leaves, fast_mode=True, atol=tolerance("gradcheck_fp64")
    )


VIEWS = {
    "one projection": lambda q, k, v: torch.stack((q, k, v), 4).unbind(4),
    "heads first": lambda *x: [t.permute(0, 4, 1, 2, 3, 5).contiguous().permute(0, 2, 3, 4, 1, 5) for t in x],
    "sliced": lambda *x: [t.repeat(1, 1, 2, 1, 1, 2)[:, :, ::2, ..., ::2] for t in x],
    "expanded": lambda *x: [t[:1].expand(t.shape) for t in x],
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view):
    tensors = inputs("odd sizes")
    given = [*VIEWS[view](*tensors[:3]), tensors[3].t().contiguous().t()]
    dense = [t.contiguous() for t in given]
    ours, want = (run(x, "odd sizes", "torch") for x in (given, dense))
    for name in want:
        assert_close(ours[name], want[name], "composition_fp32", name=name)
    assert ours["out"].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none(backend):
    found = run(inputs("odd sizes", batch=0), "odd sizes", backend)
    assert found["out"].shape == (0, 3, 5, 7, 2, 8)
    assert found["dtable"].shape == (225, 2) and not found["dtable"].any()


def test_gradients_that_nobody_needs():
    tensors = inputs("odd sizes")
    want = run(tensors, "odd sizes", "torch")
    for k, name in enumerate(("dq", "dk", "dv", "dtable")):
        leaves = [t.clone().requires_grad_(i == k) for i, t in enumerate(tensors)]
        out = attend(leaves, "odd sizes", "torch")
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (found,) = torch.autograd.grad(out, leaves[k], dout)
        assert_close(found, want[name], "composition_fp32", name=name)


def test_repeats_bit_for_bit():
    tensors = inputs("dilated")
    first, second = (run(tensors, "dilated", "torch") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast():
    tensors = inputs("odd sizes")
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(tensors, "odd sizes")
    cast = [t.bfloat16() for t in tensors[:3]]
    want = run([*cast, tensors[3]], "odd sizes")
    assert ours["out"].dtype == torch.bfloat16 and torch.equal(ours["out"], want["out"])
    assert ours["dq"].dtype == torch.float32 and torch.equal(ours["dtable"], want["dtable"])


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph_without_recompiling(training):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return neighborhood_attention3d(q.tanh(), k, v, 3, dilation=(1, 2, 1), bias_table=table)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for size in ((3, 4, 5), (4, 6, 7), (5, 3, 9)):
        leaves = [torch.randn(2, *size, 2, 8).requires_grad_(training) for _ in range(3)]
        leaves.append(torch.randn(125, 2).requires_grad_(training))
        ours, want = compiled(*leaves), call(*leaves)
        assert torch.equal(ours, want)
        if training:
            found = [torch.autograd.grad(o.square().sum(), leaves) for o in (ours, want)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(125, 2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention3d(q, k, v, 3, bias_table=self.table)


def test_export():
    module, given = Attention(), [torch.randn(1, 3, 4, 5, 2, 8) for _ in range(3)]
    axes = {1: torch.export.Dim("T", min=2), 2: torch.export.Dim("H", min=2)}
    program = torch.export.export(module, tuple(given), dynamic_shapes=(axes,) * 3)
    op = torch.ops.sora_kernels.neighborhood_attention3d.default
    assert any(node.target is op for node in program.graph.nodes)
    other = [torch.randn(1, 5, 7, 5, 2, 8, requires_grad=True) for _ in range(3)]
    found = program.module()(*other)
    assert torch.equal(found, module(*other))
    assert torch.isfinite(torch.autograd.grad(found.sum(), other[0])[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v, table = inputs("causal, strided, dilated", batch=1)
    flags = [*map(list, options_of("causal, strided, dilated")[:3]), True, 0.5]
    ops = torch.ops.sora_kernels
    leaves = [t.clone().requires_grad_() for t in (q, k, v, table)]
    torch.library.opcheck(ops.neighborhood_attention3d.default, (*leaves, *flags, backend))
    torch.library.opcheck(ops.neighborhood_attention3d.default, (q, k, v, None, *flags, backend))
    torch.library.opcheck(
        ops.neighborhood_attention3d_fwd.default, (q, k, v, table, *flags, backend)
    )
    out, lse = ops.neighborhood_attention3d_fwd(q, k, v, table, *flags, backend)
    for needs in ([True] * 4, [False, True, False, False]):
        arguments = (torch.randn_like(out), q, k, v, table, out, lse, *flags, needs, backend)
        torch.library.opcheck(ops.neighborhood_attention3d_bwd.default, arguments)


def test_transforms():
    tensors = inputs("causal", dtype=torch.float64)
    q, k, v, table = tensors
    call = lambda *args: attend(args, "causal")  # noqa: E731
    mapped = torch.func.vmap(lambda q: call(q[None], k[:1], v[:1], table)[0])(q)
    want = torch.cat([call(q[i : i + 1], k[:1], v[:1], table) for i in range(2)])
    assert_close(mapped, want, "transform_fp64")
    grad = torch.func.grad(lambda t: call(q, k, v, t).square().sum())(table)
    leaf = table.clone().requires_grad_()
    (want,) = torch.autograd.grad(call(q, k, v, leaf).square().sum(), leaf)
    assert_close(grad, want, "transform_fp64")
    _, tangent = torch.func.jvp(lambda t: call(t, k, v, table), (q,), (torch.ones_like(q),))
    step = 1e-6
    difference = (call(q + step, k, v, table) - call(q - step, k, v, table)) / (2 * step)
    assert_close(tangent, difference, "gradcheck_fp64")


def test_explain():
    found = sk.explain("neighborhood_attention3d", *inputs("causal")[:3], 3, causal_t=True)
    assert found.chosen == "torch"
    rows = {row.backend: row for row in found.rows}
    assert rows.keys() == {"triton", "torch", "reference"}
    wide = torch.empty(1, 2, 2, 2, 1, 256)
    rows = {r.backend: r for r in sk.explain("neighborhood_attention3d", wide, wide, wide, 3).rows}
    assert "head_dim is 256" in rows["triton"].why
    with pytest.raises(BackendError, match="head_dim is 256"):
        neighborhood_attention3d(wide, wide, wide, 3, backend="triton")


Q = torch.zeros(1, 3, 4, 5, 2, 8)
ERRORS = [
    (lambda: neighborhood_attention3d(Q[0], Q[0], Q[0], 3), "q must be"),
    (lambda: neighborhood_attention3d(Q.int(), Q.int(), Q.int(), 3), "q must be fp16"),
    (lambda: neighborhood_attention3d(Q[:, :0], Q[:, :0], Q[:, :0], 3), "q must have elements"),
    (lambda: neighborhood_attention3d(Q, Q[..., :4], Q, 3), "k must be as q"),
    (lambda: neighborhood_attention3d(Q, Q, Q.double(), 3), "v must be as q"),
    (lambda: neighborhood_attention3d(Q, Q, Q, (3, 3)), "window_size must be an int or three"),
    (lambda: neighborhood_attention3d(Q, Q, Q, 0), "window_size must be at least 1"),
    (lambda: neighborhood_attention3d(Q, Q, Q, 3, stride=(1, 4, 1)), "stride must be at most"),
    (lambda: neighborhood_attention3d(Q, Q, Q, 3, dilation=0), "dilation must be at least 1"),
    (lambda: neighborhood_attention3d(Q, Q, Q, 3, bias_table=Q), r"bias_table must be .*\(125, 2\)"),
    (lambda: neighborhood_attention3d(Q, Q, Q, 3, backend="cuda"), "backend must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
