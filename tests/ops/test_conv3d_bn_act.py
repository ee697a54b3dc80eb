from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import sora_kernels as sk
from sora_kernels.ops.common import triton_backend
from sora_kernels.ops.conv3d_bn_act import op, reference
from sora_kernels.ops.conv3d_bn_act.convolution import layout
from sora_kernels.testing import (
    assert_close,
    assert_within_2x,
    tolerance,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HYBRID = pytest.param("hybrid", marks=pytest.mark.triton)
BACKENDS = (HYBRID, "torch", "reference")
GRADS = ("dx", "dweight", "dbn_weight", "dbn_bias", "dbias", "dresidual")
ACTIVATIONS = ("relu", "silu", "leaky_relu", None)


def make(
    n=2, c=3, k=6, size=(3, 5, 4), kernel=3, dtype=torch.float32, channels_last=False, residual=True
):
    """(x, weight, bn_weight, bn_bias, bias, residual), (running_mean, running_var), dz."""
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, c, *size, dtype=dtype)
    weight = torch.randn(k, c, kernel, kernel, kernel, dtype=dtype) * 0.2
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    z = (n, k, *size)
    inputs = (
        x,
        weight,
        torch.rand(k, dtype=wide) + 0.5,
        torch.randn(k, dtype=wide),
        torch.randn(k, dtype=dtype),
        torch.randn(z, dtype=dtype) if residual else None,
    )
    running = (torch.randn(k, dtype=wide), torch.rand(k, dtype=wide) + 0.5)
    return inputs, running, torch.randn(z, dtype=dtype)


def ours(running, *, kernel=3, **options):
    def call(x, weight, bn_weight, bn_bias, bias, residual):
        return sk.conv3d_bn_act(
            x, weight, bn_weight, bn_bias, *running, bias=bias, residual=residual, padding=kernel // 2, **options
        )  # fmt: skip

    return call


def stock(running, *, activation, training, kernel=3, mask=None):
    """The composition that the operator replaces; with ``mask``, on that output's side of the kink."""

    def call(x, weight, bn_weight, bn_bias, bias, residual):
        y = F.conv3d(x, weight, bias, 1, kernel // 2)
        y = F.batch_norm(y, *running, bn_weight, bn_bias, training)
        y = y if residual is None else y + residual
        if mask is not None:
            return reference.activate_like(y, mask, activation, 0.01)
        return reference.activate(y, activation, 0.01)

    return call


def run(call, inputs, dz):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    z = call(*leaves)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(z, wanted, dz.to(z.dtype)))
    return z.detach(), [None if t is None else next(found) for t in leaves]


def double(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def clone(tensors):
    return tuple(t.clone() for t in tensors)


def check(backend, dtype, channels_last, activation, residual, training, **sizes):
    inputs, running, dz = make(dtype=dtype, channels_last=channels_last, residual=residual, **sizes)
    kernel = sizes.get("kernel", 3)
    options = {"activation": activation, "training": training, "kernel": kernel}
    mine, plain, true = clone(running), clone(running), double(running)
    z, grads = run(ours(mine, backend=backend, **options), inputs, dz)
    plain_z, plain_grads = run(stock(plain, **options), inputs, dz)
    true_z, _ = run(stock(true, **options), double(inputs), dz)
    y = F.conv3d(*inputs[:2], None, 1, kernel // 2)
    assert z.is_contiguous(memory_format=layout(y)), "not in the layout of ATen's convolution"
    assert_within_2x(z, plain_z, true_z, name="z")
    truth, plain_truth = (
        run(stock(double(running), mask=m, **options), double(inputs), dz)[1] for m in (z, plain_z)
    )
    norm = dz.double().square().sum((0, 2, 3, 4)).max().sqrt().item()
    for name, g, p, t, pt in zip(GRADS, grads, plain_grads, truth, plain_truth, strict=True):
        if name == "dbias" and training:
            assert torch.count_nonzero(g) == 0, "batch statistics take any bias away"
        elif t is not None:
            terms = norm if g.dim() == 1 else 0.0
            assert_within_2x(g, p, t, name=name, storage=dtype, plain_truth=pt, terms=terms)
    for name, m, p, t in zip(("running_mean", "running_var"), mine, plain, true, strict=True):
        if training:
            assert_within_2x(m, p, t, name=name, storage=dtype)
        else:
            assert torch.equal(m, dict(zip(("running_mean", "running_var"), running, strict=True))[name])  # fmt: skip


# Every pair of values of two axes occurs: the interpreter is too slow for the whole product.
PAIRS = [
    (DTYPES[i % 4], bool((i // 2) % 2), ACTIVATIONS[(i + i // 4) % 4], bool((i + i // 8) % 2), i % 3 != 0)
    for i in range(16)
]  # fmt: skip


@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "channels_last", "activation", "residual", "training"), PAIRS)
def test_fused_passes(dtype, channels_last, activation, residual, training):
    check("hybrid", dtype, channels_last, activation, residual, training)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_stock_passes(backend, dtype, channels_last, training):
    for activation, residual in itertools.product(ACTIVATIONS, (False, True)):
        check(backend, dtype, channels_last, activation, residual, training)


SIZES = {
    "one channel": dict(k=1),
    "45 channels, as r2plus1d has": dict(k=45, size=(1, 3, 3)),
    "one frame, one column": dict(size=(1, 7, 1)),
    "several tiles of rows, a ragged tail": dict(n=1, c=2, k=2, size=(5, 23, 29), kernel=1),
    "one sample": dict(n=1),
}


@pytest.mark.triton
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_passes_at_odd_sizes(sizes, channels_last):
    check("hybrid", torch.float32, channels_last, "relu", True, True, **sizes)


@pytest.mark.triton
def test_more_channels_than_a_tile_holds():
    sizes = dict(n=1, c=2, k=130, size=(1, 2, 3), kernel=1)
    check("hybrid", torch.float32, True, "relu", True, True, **sizes)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 5),
    k=st.integers(1, 7),
    size=st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(1, 5)),
    kernel=st.sampled_from([1, 3]),
    activation=st.sampled_from(ACTIVATIONS),
    channels_last=st.booleans(),
    residual=st.booleans(),
    training=st.booleans(),
)
def test_random_sizes(n, c, k, size, kernel, activation, channels_last, residual, training):
    # Over a handful of values batch statistics take away almost the whole gradient: only noise is left to compare.
    assume(not training or n * math.prod(size) >= 16)
    torch.manual_seed(0)
    check(
        "torch", torch.float32, channels_last, activation, residual, training,
        n=n, c=c, k=k, size=size, kernel=kernel,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_gradcheck(backend, training, activation):
    inputs, running, _ = make(
        n=2, c=1, k=2, size=(1, 2, 2), dtype=torch.float64, residual=activation == "silu", kernel=1
    )
    # Away from the kink, where a difference quotient means nothing.
    inputs = (*inputs[:3], inputs[3] + 3.0, *inputs[4:])
    leaves = [None if t is None else t.requires_grad_() for t in inputs]

    def call(*tensors):
        it = iter(tensors)
        args = [None if t is None else next(it) for t in leaves]
        options = dict(activation=activation, training=training, backend=backend, kernel=1)
        return ours(clone(running), **options)(*args)

    given_leaves = tuple(t for t in leaves if t is not None)
    atol = tolerance("gradcheck_fp64")
    fast = not (backend == "hybrid" and activation == "silu")
    assert torch.autograd.gradcheck(call, given_leaves, atol=atol, fast_mode=fast)
    if fast and not (backend == "hybrid" and training):  # they come from the reference anyway
        assert torch.autograd.gradgradcheck(call, given_leaves, atol=atol, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_second_derivative_with_residual_and_relu(backend, training):
    """The residual is not kept for ReLU: the output's sign stands in for it."""
    inputs, running, _ = make(dtype=torch.float64)

    def penalty(call):
        leaves = [t.clone().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        loss = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(loss, leaves)

    options = {"activation": "relu", "training": training}
    mine = penalty(ours(clone(running), backend=backend, **options))
    other = penalty(stock(clone(running), **options))
    for name, g, o in zip(GRADS, mine, other, strict=True):
        assert_close(g, o, "transform_fp64", name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_at_a_tie_is_torchs(backend):
    x = torch.randn(1, 1, 1, 3, 3)
    weight = torch.zeros(2, 1, 1, 1, 1)  # every pre-activation is exactly zero
    bias = torch.zeros(2, requires_grad=True)
    running = (torch.zeros(2), torch.ones(2))
    for activation in ("relu", "leaky_relu"):
        z = sk.conv3d_bn_act(x, weight, None, bias, *running, activation=activation, backend=backend)  # fmt: skip
        (g,) = torch.autograd.grad(z.sum(), bias)
        plain = reference.activate(torch.zeros(9) + bias[0], activation, 0.01)
        (p,) = torch.autograd.grad(plain.sum(), bias)
        assert_close(g[0], p[0], "composition_fp32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass(backend):
    inputs, running, _ = make(residual=False, kernel=1)
    inputs[0][0, 0, 0, 0, 0] = torch.nan
    inputs[0][1, 0, 0, 0, 0] = torch.inf
    for activation in ACTIVATIONS:
        options = {"activation": activation, "training": False, "kernel": 1}
        z = ours(running, backend=backend, **options)(*inputs)
        plain = stock(running, **options)(*inputs)
        assert torch.equal(torch.isnan(z), torch.isnan(plain))
        assert torch.equal(torch.isinf(z), torch.isinf(plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(backend, training):
    inputs, running, dz = make(n=0)
    mine = clone(running)
    z, grads = run(ours(mine, training=training, backend=backend), inputs, dz)
    assert z.shape == dz.shape
    for g, t in zip(grads, inputs, strict=True):
        assert g.shape == t.shape and torch.count_nonzero(g) == 0
    assert all(torch.equal(a, b) for a, b in zip(mine, running, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_running_statistics(backend):
    inputs, _, _ = make()
    for training in (False, True):
        z = ours((None, None), training=training, backend=backend)(*inputs)
        plain = stock((None, None), activation="relu", training=True)(*inputs)
        assert_close(z, plain, "composition_fp32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_parameters_and_buffers(backend):
    inputs, running, dz = make(dtype=torch.bfloat16)
    low = [t.bfloat16() for t in inputs]
    buffers = tuple(t.bfloat16() for t in running)
    mine, plain, true = clone(buffers), clone(buffers), double(buffers)
    z, grads = run(ours(mine, training=True, backend=backend), low, dz)
    plain_z, _ = run(stock(plain, activation="relu", training=True), low, dz)
    true_z, _ = run(stock(true, activation="relu", training=True), double(low), dz)
    assert_within_2x(z, plain_z, true_z)
    assert all(g.dtype == torch.bfloat16 for g in grads)
    assert_within_2x(mine[0], plain[0], true[0], name="running_mean")
    assert_within_2x(mine[1], plain[1], true[1], name="running_var")


@pytest.mark.parametrize("backend", BACKENDS)
def test_geometry(backend):
    """stride, dilation, groups, asymmetric and replicate padding, against the tensor padded by hand."""
    x = torch.randn(2, 4, 4, 6, 5)
    weight = torch.randn(6, 2, 2, 3, 2)
    running = (torch.randn(6), torch.rand(6) + 0.5)
    for padding, mode in ((((1, 0), (1, 1), (0, 2)), "zeros"), ((1, 2, 0), "replicate"), (1, "zeros")):  # fmt: skip
        each = (padding,) * 3 if isinstance(padding, int) else padding
        pairs = [(p, p) if isinstance(p, int) else p for p in each]
        sides = [s for pair in reversed(pairs) for s in pair]
        padded = F.pad(x, sides, "constant" if mode == "zeros" else mode)
        want = F.conv3d(padded, weight, None, (1, 2, 1), 0, (1, 1, 2), 2)
        want = F.relu(F.batch_norm(want, *running))
        got = sk.conv3d_bn_act(
            x, weight, None, None, *running, stride=(1, 2, 1), padding=padding, padding_mode=mode,
            dilation=(1, 1, 2), groups=2, backend=backend,
        )  # fmt: skip
        assert_close(got, want, "composition_fp32", name=f"{padding} {mode}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    x = torch.randn(2, 5, 6, 8, 3)[..., ::2, :].permute(0, 4, 1, 2, 3)  # neither layout
    inputs, running, _ = make(size=tuple(x.shape[2:]))
    residual = torch.randn(1, 6, 1, 1, 1).expand(2, 6, *x.shape[2:])
    inputs = (x, *inputs[1:5], residual)
    dz = torch.randn(()).expand(2, 6, *x.shape[2:])
    z, grads = run(ours(clone(running), training=True, backend=backend), inputs, dz)
    dense = tuple(t.contiguous() for t in inputs)
    want_z, want = run(stock(clone(running), activation="relu", training=True), dense, dz)
    assert_close(z, want_z, "composition_fp32")
    for name, g, w in zip(GRADS, grads, want, strict=True):
        assert_close(g, w, "composition_fp32", name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    inputs, running, dz = make(dtype=torch.float64)
    _, want = run(ours(clone(running), training=True, backend=backend), inputs, dz)
    for wanted in ((0,), (3,), (5,), (4, 5), (1, 2)):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        z = ours(clone(running), training=True, backend=backend)(*leaves)
        z.backward(dz)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is None) == (i not in wanted)
            if i in wanted:
                assert torch.equal(leaf.grad, want[i]), GRADS[i]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    inputs, running, dz = make(channels_last=True)
    x, weight, bn_weight, bn_bias, bias, residual = inputs
    window = ([1, 1, 1], [1, 1, 1, 0, 1, 2], True, [1, 1, 1], 1, False, [0, 0, 0])
    every = backend == "reference"  # what the schemas say does not depend on it
    for norm, activation in (("running", "silu"), ("batch", "relu")):
        options = (norm, activation, 0.01, 0.1, 1e-5, "")
        residual = torch.randn(2, 6, 2, 5, 5)
        arguments = (
            x, weight, bias, residual, bn_weight, bn_bias, *clone(running), *window, *options, backend
        )  # fmt: skip
        torch.library.opcheck(torch.ops.sora_kernels.conv3d_bn_act.default, arguments)
        torch.library.opcheck(torch.ops.sora_kernels.conv3d_bn_act_fwd.default, arguments)
        z, y, mean, invstd = op._fwd(*arguments)
        kept = (z, None) if activation == "relu" else (None, residual)
        for needs in ([True] * 6, [False, True, False, True, False, True])[: 1 + every]:
            torch.library.opcheck(
                torch.ops.sora_kernels.conv3d_bn_act_bwd.default,
                (torch.randn_like(z), x, weight, y, mean, invstd, *kept, bias, bn_weight, bn_bias, *window,
                 *options, needs, backend),
            )  # fmt: skip


@pytest.mark.parametrize("backend", [HYBRID, None])
@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph_without_recompiling(backend, training):
    torch._dynamo.reset()

    def step(running, *inputs):
        return ours(running, training=training, backend=backend)(*inputs) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    # No size equals another or a channel count: equal ones would share a symbol.
    for n, size in ((2, (7, 5, 4)), (4, (2, 5, 3)), (3, (4, 3, 2))):
        inputs, running, dz = make(n=n, size=size)
        mine, plain = clone(running), clone(running)
        with torch._dynamo.config.patch(error_on_recompile=n != 2):
            z, grads = run(lambda *t, m=mine: compiled(m, *t), inputs, dz)
        want_z, want = run(lambda *t, m=plain: step(m, *t), inputs, dz)
        assert torch.equal(z, want_z)
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs, running, dz = make(channels_last=True)
    eager, compiled = clone(running), clone(running)
    call = torch.compile(ours(compiled, training=True), fullgraph=True)
    z, grads = run(call, inputs, dz)
    want_z, want = run(ours(eager, training=True), inputs, dz)
    assert_close(z, want_z, "composition_fp32")
    for name, g, w in zip(GRADS, grads, want, strict=True):
        assert_close(g, w, "composition_fp32", name=name)
    assert_close(compiled[0], eager[0], "composition_fp32", name="running_mean")


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = sk.nn.ConvBNAct3d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.block(x)

    model = Model().eval()
    batch, frames = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("frames", min=2)
    program = torch.export.export(
        model, (torch.randn(2, 3, 4, 5, 6),), dynamic_shapes={"x": {0: batch, 2: frames}}
    )
    assert "sora_kernels.conv3d_bn_act" in str(program.graph)
    x = torch.randn(5, 3, 7, 5, 6)
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_transforms(backend):
    inputs, running, _ = make(dtype=torch.float64, residual=False)
    x, weight, bn_weight, bn_bias, bias, _ = inputs

    def call(x, weight, training=False):
        return sk.conv3d_bn_act(
            x, weight, bn_weight, bn_bias, None if training else running[0],
            None if training else running[1], bias=bias, padding=1, training=training, backend=backend,
        )  # fmt: skip

    def plain(x, weight, training=False):
        return F.relu(
            F.batch_norm(
                F.conv3d(x, weight, bias, 1, 1),
                None if training else running[0],
                None if training else running[1],
                bn_weight,
                bn_bias,
                training,
            )
        )

    clips = torch.randn(3, *x.shape, dtype=torch.float64)
    for training in (False, True):
        got = torch.vmap(lambda c, t=training: call(c, weight, t))(clips)
        assert_close(
            got, torch.stack([plain(c, weight, training) for c in clips]), "transform_fp64"
        )
        for transform in (torch.func.grad, torch.func.jacrev):
            got = transform(lambda w, t=training: call(x, w, t).square().sum())(weight)
            want = transform(lambda w, t=training: plain(x, w, t).square().sum())(weight)
            assert_close(got, want, "transform_fp64", name=transform.__name__)
        tangent = torch.randn_like(x)
        got = torch.func.jvp(lambda v, t=training: call(v, weight, t), (x,), (tangent,))
        want = torch.func.jvp(lambda v, t=training: plain(v, weight, t), (x,), (tangent,))
        assert_close(got[1], want[1], "transform_fp64", name="jvp")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got = forward_ad.unpack_dual(call(dual, weight)).tangent
        want = forward_ad.unpack_dual(plain(dual, weight)).tangent
    assert_close(got, want, "transform_fp64", name="forward-mode AD")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    inputs, running, _ = make()
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        z = ours(clone(running), training=True, backend=backend)(*leaves)
    assert z.dtype == torch.bfloat16
    low = [t.bfloat16() if i in (0, 1, 4, 5) else t for i, t in enumerate(inputs)]
    assert torch.equal(z, ours(clone(running), training=True, backend=backend)(*low))
    z.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_checkpoint_and_two_forwards_before_backward():
    from torch.utils.checkpoint import checkpoint

    inputs, running, dz = make()
    _, want = run(ours(clone(running), training=True), inputs, dz)
    call = ours(clone(running), training=True)
    _, got = run(lambda *t: checkpoint(call, *t, use_reentrant=False), inputs, dz)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # Running statistics move between forward and backward: nothing saved may notice.
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = call(*leaves)
    call(*leaves)
    first.backward(dz)
    assert torch.equal(leaves[1].grad, want[1])


def test_backend_choice(monkeypatch):
    inputs, running, _ = make()
    x, weight = inputs[:2]
    explained = sk.explain(sk.conv3d_bn_act, x, weight, None, None, *running, padding=1)
    assert explained.chosen == "torch"
    usable = {row.backend: row.usable for row in explained.rows}
    assert usable["torch"] and usable["reference"]
    assert "hybrid" in str(explained) and "(2, 6, 3, 5, 4)" in str(explained)
    monkeypatch.setenv("SORA_BACKEND", "conv3d_bn_act=reference")
    assert sk.explain("conv3d_bn_act", x, weight, None, None, *running).chosen == "reference"
    monkeypatch.setenv("SORA_BACKEND", "native")  # this operator has none: not bound
    assert sk.explain("conv3d_bn_act", x, weight, None, None, *running).chosen == "torch"
    monkeypatch.setenv("SORA_BACKEND", "conv3d_bn_act=native")
    with pytest.raises(
        ValueError, match="SORA_BACKEND: conv3d_bn_act has the backends triton, hybrid"
    ):
        ours(running)(*inputs)
    monkeypatch.setenv("SORA_BACKEND", "=torch")
    with pytest.raises(ValueError, match="SORA_BACKEND: expected"):
        ours(running)(*inputs)


def test_a_named_backend_runs_or_says_why(monkeypatch):
    inputs, running, _ = make()
    monkeypatch.setattr(triton_backend, "installed", lambda: False)
    with pytest.raises(sk.BackendError, match="'hybrid' cannot run: Triton is not installed"):
        ours(running, backend="hybrid")(*inputs)
    monkeypatch.undo()
    monkeypatch.setattr("sora_kernels.testing.interpreting", lambda: False)
    monkeypatch.setattr(triton_backend, "installed", lambda: True)
    with pytest.raises(sk.BackendError, match="x is on the CPU"):
        ours(running, backend="hybrid")(*inputs)


def error_cases():
    x, w, v = torch.randn(2, 3, 3, 4, 4), torch.randn(6, 3, 3, 3, 3), torch.randn(6)
    yield (
        "backend",
        dict(backend="cudnn"),
        "backend must be one of triton, hybrid, torch, reference",
    )
    yield "rank", dict(x=x[0]), r"x: expected 5 dimensions .* got \(3, 3, 4, 4\)"
    yield "weight rank", dict(weight=w[0]), "weight: expected 5 dimensions"
    yield "x dtype", dict(x=x.long()), "x: expected fp16, bf16, fp32 or fp64, got .*int64"
    yield "dtype", dict(weight=w.half()), "weight: expected torch.float32 on cpu like x, got .*float16"  # fmt: skip
    yield "channels", dict(x=x[:, :2]), r"x: expected 3 channels .* got \(2, 2"
    yield "groups", dict(groups=4), "groups: expected a divisor of weight's 6 .* got 4"
    yield "activation", dict(activation="gelu"), "activation: expected one of .* got 'gelu'"
    yield "vector", dict(bn_weight=v[:5]), r"bn_weight: expected \(6,\) .* got \(5,\)"
    yield "vector dtype", dict(running_var=v.double()), "running_var: expected"
    yield "one buffer", dict(running_mean=None), "running_mean: expected both running statistics"
    yield "residual", dict(residual=x), r"residual: expected \(2, 6, 3, 4, 4\)"
    yield "residual dtype", dict(residual=torch.zeros(2, 6, 3, 4, 4).half()), "residual: .*float16"
    yield "stride", dict(stride=0), "stride: expected an int or 3 ints >= 1, got"
    yield "dilation", dict(dilation=(1, 2)), "dilation: expected"
    yield "padding", dict(padding=((0, 1), (0, 1))), "padding: expected"
    yield "padding sign", dict(padding=-1), "padding: expected"
    yield "padding mode", dict(padding_mode="circular"), "padding_mode: expected 'zeros' or"
    yield "too small", dict(padding=0, x=x[:, :, :2]), "x: too small for the kernel"


@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in error_cases()], ids=[c[0] for c in error_cases()]
)
def test_errors_name_the_argument(change, message):
    v = torch.zeros(6)
    arguments = dict(
        x=torch.randn(2, 3, 3, 4, 4), weight=torch.randn(6, 3, 3, 3, 3), bn_weight=v, bn_bias=v,
        running_mean=v.clone(), running_var=v + 1, padding=1, training=True,
    )  # fmt: skip
    before = arguments["running_mean"].clone()
    with pytest.raises(ValueError, match=message):
        sk.conv3d_bn_act(**(arguments | change))
    assert torch.equal(arguments["running_mean"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_a_channel_is_refused_before_anything_changes(backend):
    running = (torch.zeros(2), torch.ones(2))
    x, weight = torch.randn(1, 3, 1, 1, 1), torch.randn(2, 3, 1, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        sk.conv3d_bn_act(x, weight, None, None, *running, training=True, backend=backend)
    assert torch.equal(running[0], torch.zeros(2)) and torch.equal(running[1], torch.ones(2))
