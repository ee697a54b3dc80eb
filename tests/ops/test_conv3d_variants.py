"""conv3d_act, conv_transpose3d_bn_act and padding inside the operators, against their stock compositions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.conv3d_bn_act import folded, reference
from sora_kernels.ops.conv3d_bn_act.window import Window
from sora_kernels.testing import assert_close, assert_within_2x, tolerance

HYBRID = pytest.param("hybrid", marks=pytest.mark.triton)
BACKENDS = (HYBRID, "torch", "reference")
NAMES = ("x", "weight", "bias", "bn_weight", "bn_bias", "residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def pad(x: Tensor, padding: Any, mode: str) -> Tensor:
    """By hand, for windows that ``F.conv3d`` has not."""
    sides = [s for pair in reversed(padding) for s in pair]
    return F.pad(x, sides, "constant" if mode == "zeros" else mode)


def stock_conv(x, weight, bias, window):
    options = dict(window)
    if options.pop("transposed", False):
        return F.conv_transpose3d(x, weight, bias, **options)
    mode, padding = options.pop("padding_mode", "zeros"), options.pop("padding", 0)
    if not isinstance(padding, int):
        x, padding = pad(x, padding, mode), 0
    return F.conv3d(x, weight, bias, padding=padding, **options)


def stock(window, running, activation, training, mask=None):
    def call(x, weight, bias, bn_weight, bn_bias, residual):
        y = stock_conv(x, weight, bias, window)
        if running is not None:
            y = F.batch_norm(y, *running, bn_weight, bn_bias, training)
        y = y if residual is None else y + residual
        if mask is not None:
            return reference.activate_like(y, mask, activation, 0.01)
        return reference.activate(y, activation, 0.01)

    return call


def ours(window, running, activation, training, backend):
    def call(x, weight, bias, bn_weight, bn_bias, residual):
        options = {k: v for k, v in window.items() if k != "transposed"}
        options |= dict(residual=residual, activation=activation, backend=backend)
        if running is None:
            return sk.conv3d_act(x, weight, bias, **options)
        function = sk.conv_transpose3d_bn_act if "transposed" in window else sk.conv3d_bn_act
        return function(
            x, weight, bn_weight, bn_bias, *running, bias=bias, training=training, **options
        )

    return call


def run(call: Callable, inputs, dz):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    z = call(*leaves)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(z, wanted, dz.to(z.dtype), allow_unused=True))
    return z.detach(), [None if t is None else next(found) for t in leaves]


def double(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def make(
    window,
    dtype=torch.float32,
    norm=True,
    residual=True,
    affine=True,
    channels_last=False,
    size=(4, 6, 5),
):
    groups, transposed = window.get("groups", 1), window.get("transposed", False)
    c, k, wide = 4, 6, torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, c, *size, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    shape = (c, k // groups, 2, 3, 2) if transposed else (k, c // groups, 2, 3, 2)
    weight, bias = torch.randn(shape, dtype=dtype) * 0.3, torch.randn(k, dtype=dtype)
    with torch.no_grad():
        dz = torch.randn_like(stock_conv(x, weight, bias, window))
    vectors = (
        (torch.rand(k, dtype=wide) + 0.5, torch.randn(k, dtype=wide)) if affine else (None, None)
    )
    running = (torch.randn(k, dtype=wide), torch.rand(k, dtype=wide) + 0.5) if norm else None
    inputs = (
        x,
        weight,
        bias,
        *(vectors if norm else (None, None)),
        torch.randn_like(dz) if residual else None,
    )
    return inputs, running, dz


def check(window, backend, *, dtype=torch.float32, activation="relu", training=False, **options):
    inputs, running, dz = make(window, dtype, **options)
    each = [copy.deepcopy(running) for _ in range(2)]
    true = None if running is None else double(running)
    z, grads = run(ours(window, each[0], activation, training, backend), inputs, dz)
    plain_z, plain_grads = run(stock(window, each[1], activation, training), inputs, dz)
    true_z, _ = run(stock(window, true, activation, training), double(inputs), dz)
    assert_within_2x(z, plain_z, true_z, name="z")
    with torch.no_grad():
        assert_within_2x(
            ours(window, copy.deepcopy(running), activation, training, backend)(*inputs),
            plain_z, true_z, name="z without gradients",
        )  # fmt: skip
    truths = [
        run(stock(window, None if running is None else double(running), activation, training, m),
            double(inputs), dz)[1]
        for m in (z, plain_z)
    ]  # fmt: skip
    norm = dz.double().square().sum((0, 2, 3, 4)).max().sqrt().item()
    for name, g, p, t, pt in zip(NAMES, grads, plain_grads, *truths, strict=True):
        if name == "bias" and training:
            assert torch.count_nonzero(g) == 0
        elif t is not None:
            terms = norm if g.dim() == 1 else 0.0
            assert_within_2x(g, p, t, name=f"d{name}", storage=dtype, plain_truth=pt, terms=terms)


WINDOWS = {
    "plain": dict(padding=1),
    "causal": dict(padding=((1, 0), (1, 1), (0, 1))),
    "replicate": dict(padding=((2, 0), (1, 2), (1, 1)), padding_mode="replicate"),
    "strided, dilated, grouped": dict(padding=((2, 1), (1, 2), (0, 1)), stride=(2, 1, 2), dilation=(1, 2, 1), groups=2),
}  # fmt: skip
TRANSPOSED = {
    "stride 2": dict(transposed=True, stride=2, padding=(0, 1, 0)),
    "output padding": dict(transposed=True, stride=(2, 3, 1), padding=(1, 0, 1), output_padding=(1, 2, 0)),
    "grouped, dilated": dict(transposed=True, groups=2, dilation=(2, 1, 1), padding=1),
}  # fmt: skip


def cases(*axes: list) -> list:
    """Every combination for the quick backends; through the interpreter every value of each axis."""
    quick = [(b, *rest) for b in ("torch", "reference") for rest in itertools.product(*axes)]
    longest = max(map(len, axes))
    slow = [tuple(axis[i % len(axis)] for axis in axes) for i in range(longest)]
    return [*quick, *(pytest.param("hybrid", *s, marks=pytest.mark.triton) for s in slow)]


@pytest.mark.parametrize(
    ("backend", "activation", "name"), cases(["relu", "silu", "leaky_relu", None], list(WINDOWS))
)
def test_without_normalisation(backend, activation, name):
    residual = name in ("plain", "replicate")
    dtype = DTYPES[list(WINDOWS).index(name) % 3]
    check(WINDOWS[name], backend, dtype=dtype, activation=activation, norm=False, residual=residual)


@pytest.mark.parametrize(("backend", "training", "name"), cases([False, True], list(TRANSPOSED)))
def test_transposed(backend, training, name):
    dtype = DTYPES[list(TRANSPOSED).index(name)]
    for activation, channels_last in (("relu", True), ("silu", False)):
        check(
            TRANSPOSED[name], backend, dtype=dtype, activation=activation, training=training,
            residual=activation == "silu", channels_last=channels_last,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "training", "name"), cases([False, True], [n for n in WINDOWS if n != "plain"])
)
def test_padding_inside_the_operator(backend, training, name):
    check(WINDOWS[name], backend, training=training, channels_last=True)


@pytest.mark.parametrize(
    ("backend", "affine", "dtype"),
    cases([True, False], [torch.float32, torch.bfloat16, torch.float16]),
)
def test_running_statistics_with_gradients(backend, affine, dtype):
    """The gradients that come from the weight's instead of from y."""
    for activation in ("relu", "leaky_relu", None):
        check(
            WINDOWS["strided, dilated, grouped"], backend, dtype=dtype, activation=activation, affine=affine
        )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "activation", "name"), cases(["silu", "relu"], ["act", "transposed", "frozen"])
)
def test_gradcheck(backend, activation, name):
    window = {"transposed": TRANSPOSED["output padding"]}.get(name, WINDOWS["causal"])
    size = (1, 1, 2) if name == "transposed" else (1, 2, 2)
    inputs, running, _ = make(window, torch.float64, norm=name != "act", size=size)
    inputs = tuple(None if t is None else t.requires_grad_() for t in inputs)
    call = ours(window, running, activation, False, backend)
    wanted = [t for t in inputs if t is not None]

    def of_some(*tensors):
        it = iter(tensors)
        return call(*(None if t is None else next(it) for t in inputs))

    atol = tolerance("gradcheck_fp64")
    assert torch.autograd.gradcheck(of_some, wanted, atol=atol, fast_mode=True)
    if backend == "torch":  # second derivatives come from the reference, whichever ran the first
        assert torch.autograd.gradgradcheck(of_some, wanted, atol=atol, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["act", "transposed"])
def test_empty_batch(backend, name):
    window = TRANSPOSED["stride 2"] if name == "transposed" else WINDOWS["causal"]
    inputs, running, dz = make(window, norm=name != "act")
    empty = tuple(
        t[:0] if t is not None and t.dim() == 5 and i != 1 else t for i, t in enumerate(inputs)
    )
    z, grads = run(ours(window, running, "relu", False, backend), empty, dz[:0])
    assert z.shape == (0, *dz.shape[1:])
    for g, t in zip(grads, empty, strict=True):
        assert t is None or (g.shape == t.shape and torch.count_nonzero(g) == 0)


@pytest.mark.parametrize("backend", [HYBRID, None])
@pytest.mark.parametrize("name", ["act", "transposed", "causal"])
def test_compile_fullgraph_without_recompiling(backend, name):
    torch._dynamo.reset()
    window = TRANSPOSED["stride 2"] if name == "transposed" else WINDOWS["causal"]
    (_, *rest), running, _ = make(window, norm=name != "act", residual=False)
    rest = [None if t is None else t.requires_grad_() for t in rest]
    call = ours(window, running, "relu", False, backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for i, (n, *size) in enumerate(((3, 7, 9, 11), (5, 8, 10, 12), (8, 9, 5, 7))):
        x = torch.randn(n, 4, *size)
        for axis in (0, 2, 3, 4):
            torch._dynamo.maybe_mark_dynamic(x, axis)
        found = []
        for function in (compiled, call):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                z = function(x, *rest)
            leaves = [t for t in rest if t is not None]
            found.append((z, *torch.autograd.grad(z.square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_export_and_training_the_exported_graph():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = sk.nn.ConvTransposeBNAct3d(4, 6, 2, stride=2)
            self.act = sk.nn.ConvAct3d(6, 4, 3, padding=((2, 0), (1, 1), (1, 1)))

        def forward(self, x):
            return self.act(self.up(x))

    model, x = Model().eval(), torch.randn(2, 4, 2, 3, 3)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    exported(x).square().sum().backward()
    got = {name: p.grad for name, p in exported.named_parameters()}
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert_close(got[name], p.grad, "composition_fp32", name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["act", "transposed"])
def test_functorch(backend, name):
    window = TRANSPOSED["stride 2"] if name == "transposed" else WINDOWS["replicate"]
    inputs, running, _ = make(window, torch.float64, norm=name != "act", residual=False)
    x, weight, *rest = inputs
    clips = torch.randn(3, *x.shape, dtype=torch.float64)
    found = []
    for call in (
        ours(window, running, "silu", False, backend),
        stock(window, running, "silu", False),
    ):
        grad = torch.func.grad(lambda w, f=call: f(x, w, *rest).square().sum())(weight)
        found.append((grad, torch.vmap(lambda c, f=call: f(c, weight, *rest))(clips)))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, "transform_fp64")


def test_folding_is_the_algebra_it_says():
    """``scaled`` and ``_inner`` filter by filter, as F.conv3d and F.conv_transpose3d see them."""
    for transposed in (False, True):
        window = Window((1, 2, 2), groups=3, transposed=transposed)
        weight = torch.randn(6, 4, 1, 2, 2, dtype=torch.float64)
        k = window.filters(weight.shape)
        scale, x = (
            torch.rand(k, dtype=torch.float64) + 0.5,
            torch.randn(1, 6 if transposed else 12, 2, 3, 3).double(),
        )
        got = reference.convolve(x, folded.scaled(weight, scale, window), window)
        want = reference.convolve(x, weight, window) * scale.view(1, -1, 1, 1, 1)
        assert_close(got, want, "transform_fp64")
        da = torch.randn_like(want)
        leaf = weight.clone().requires_grad_()
        y = reference.convolve(x, leaf, window)
        (raw,) = torch.autograd.grad(y, leaf, da)
        want = (da * y.detach()).sum((0, 2, 3, 4))
        assert_close(folded._inner(raw, weight, window, torch.float64), want, "transform_fp64")


def error_cases():
    x, w, v = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 6, 2, 2, 2), torch.zeros(6)
    one = v + 1
    transposed = lambda **o: sk.conv_transpose3d_bn_act(x, w, None, None, v, one, **o)  # noqa: E731
    yield lambda: transposed(output_padding=1), "output_padding: expected less than stride"
    yield (
        lambda: transposed(padding=((1, 0), (0, 0), (0, 0))),
        "padding: a transposed convolution takes",
    )
    yield (
        lambda: transposed(groups=3),
        "groups: expected a divisor of weight's 4 input channels, got 3",
    )
    yield lambda: transposed(residual=x), r"residual: expected \(1, 6, 3, 4, 4\)"
    yield lambda: transposed(padding=3), "x: too small"
    yield (
        lambda: sk.conv_transpose3d_bn_act(x[:, :3], w, None, None, v, one),
        "x: expected 4 channels",
    )
    yield (
        lambda: sk.conv_transpose3d_bn_act(x, w[0], None, None, v, one),
        r"weight: .*\[C, K / groups",
    )
    yield lambda: sk.conv3d_act(x, w), "x: expected 6 channels"
    yield lambda: sk.conv3d_act(x, w[:, :4], v), r"bias: expected \(4,\)"
    yield lambda: sk.conv3d_act(x, w[:, :4], activation="gelu"), "activation: expected one of"
    yield lambda: sk.conv3d_act(x, w[:, :4], backend="cudnn"), "conv3d_act: backend must be one of"


@pytest.mark.parametrize("case", range(len(list(error_cases()))))
def test_errors_name_the_argument(case):
    call, message = list(error_cases())[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_explain_knows_every_operator():
    x, w = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 4, 2, 2, 2)
    v = torch.ones(4)
    assert sk.explain("conv3d_act", x, w).chosen == "torch"
    assert (
        sk.explain(sk.conv_transpose3d_bn_act, x, w, None, None, v, v, stride=2).chosen == "torch"
    )
