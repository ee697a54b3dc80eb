"""Backend ``triton`` through the operators: each kind of window, one launch in evaluation, what the table says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import sora_kernels as sk
from sora_kernels.ops.conv3d_bn_act import choice, op
from sora_kernels.ops.conv3d_bn_act.reference import activate, activate_like
from sora_kernels.ops.conv3d_bn_act.window import Window
from sora_kernels.testing import assert_close, assert_within_2x, tolerance

pytest.importorskip("triton", exc_type=ImportError)

from triton.runtime import interpreter  # noqa: E402

from sora_kernels.ops.conv3d_bn_act import gemm  # noqa: E402

pytestmark = pytest.mark.triton

# channels, filters, kernel, options of F.conv3d
KINDS = {
    "depthwise": (6, 6, (3, 3, 3), dict(padding=1, groups=6)),
    "depthwise strided": (5, 5, (3, 3, 3), dict(padding=1, groups=5, stride=(1, 2, 2))),
    "stem": (3, 7, (3, 5, 5), dict(padding=(1, 2, 2), stride=(1, 2, 2))),
    "pointwise": (9, 20, (1, 1, 1), dict()),
    "temporal": (8, 5, (3, 1, 1), dict(padding=(1, 0, 0))),
    "spatial": (5, 17, (1, 3, 3), dict(padding=(0, 1, 1))),
    "grouped": (8, 6, (2, 3, 1), dict(groups=2, dilation=(2, 1, 1), padding=(1, 1, 0))),
    "dense": (17, 4, (3, 3, 3), dict(padding=1)),
}
NAMES = ("x", "weight", "bias", "bn_weight", "bn_bias", "residual")


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """Names of the kernels launched inside."""
    found: list[str] = []
    call = interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        found.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counting
    try:
        yield found
    finally:
        interpreter.GridExecutor.__call__ = call


@pytest.fixture
def own_gradients(monkeypatch):
    """dgrad and wgrad by our kernels wherever they can be."""
    config = dict.fromkeys(("forward", "dgrad", "wgrad"), "triton")
    monkeypatch.setattr(choice, "table", lambda *args: config)


def make(kind, dtype=torch.float32, residual=True):
    c, k, kernel, options = KINDS[kind]
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, c, 3, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(k, c // options.get("groups", 1), *kernel, dtype=dtype) * 0.3
    dz = torch.randn_like(F.conv3d(x, weight, None, **options))
    vectors = (torch.rand(k, dtype=wide) + 0.5, torch.randn(k, dtype=wide))
    running = (torch.randn(k, dtype=wide), torch.rand(k, dtype=wide) + 0.5)
    bias = torch.randn(k, dtype=dtype)
    return (x, weight, bias, *vectors, torch.randn_like(dz) if residual else None), running, dz


def ours(kind, running, activation, training, backend="triton"):
    def call(x, weight, bias, bn_weight, bn_bias, residual):
        return sk.conv3d_bn_act(
            x, weight, bn_weight, bn_bias, *running, bias=bias, residual=residual, activation=activation,
            training=training, backend=backend, **KINDS[kind][3],
        )  # fmt: skip

    return call


def stock(kind, running, activation, training, mask=None):
    def call(x, weight, bias, bn_weight, bn_bias, residual):
        y = F.conv3d(x, weight, bias, **KINDS[kind][3])
        y = F.batch_norm(y, *running, bn_weight, bn_bias, training)
        y = y if residual is None else y + residual
        return (
            activate(y, activation, 0.01)
            if mask is None
            else activate_like(y, mask, activation, 0.01)
        )

    return call


def run(call, inputs, dz):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    z = call(*leaves)
    found = iter(torch.autograd.grad(z, [t for t in leaves if t is not None], dz.to(z.dtype)))
    return z.detach(), [None if t is None else next(found) for t in leaves]


def double(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def clone(tensors):
    return tuple(t.clone() for t in tensors)


def check(kind, dtype, activation, residual, training):
    inputs, running, dz = make(kind, dtype, residual)
    mine, plain, true = clone(running), clone(running), double(running)
    z, grads = run(ours(kind, mine, activation, training), inputs, dz)
    plain_z, plain_grads = run(stock(kind, plain, activation, training), inputs, dz)
    true_z, _ = run(stock(kind, true, activation, training), double(inputs), dz)
    assert z.is_contiguous(memory_format=torch.channels_last_3d)
    assert_within_2x(z, plain_z, true_z, name="z")
    with torch.no_grad():
        again = ours(kind, clone(running), activation, training)(*inputs)
    assert_within_2x(again, plain_z, true_z, name="z without gradients")
    truths = [
        run(stock(kind, double(running), activation, training, m), double(inputs), dz)[1]
        for m in (z, plain_z)
    ]
    norm = dz.double().square().sum((0, 2, 3, 4)).max().sqrt().item()
    for name, g, p, t, pt in zip(NAMES, grads, plain_grads, *truths, strict=True):
        if name == "bias" and training:
            assert torch.count_nonzero(g) == 0
        elif t is not None:
            terms = norm if g.dim() == 1 else 0.0
            assert_within_2x(g, p, t, name=f"d{name}", storage=dtype, plain_truth=pt, terms=terms)
    for name, m, p, t in zip(("running_mean", "running_var"), mine, plain, true, strict=True):
        if training:
            assert_within_2x(m, p, t, name=name, storage=dtype)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(own_gradients, kind, training):
    i = list(KINDS).index(kind) + training
    dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
    activation = ("relu", "silu", "leaky_relu", None)[i % 4]
    check(kind, dtype, activation, i % 2 == 0, training)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_one_launch(kind):
    inputs, running, _ = make(kind)
    with torch.no_grad(), launched() as found:
        ours(kind, running, "relu", False)(*inputs)
    assert len(found) == 1 and found[0].endswith("fwd_kernel"), found


def test_training_reads_y_for_nothing_but_the_normalisation():
    inputs, running, _ = make("dense")
    with torch.no_grad(), launched() as found:
        ours("dense", running, "relu", True)(*inputs)
    assert found == ["_conv3d_gemm_fwd_kernel", "_bn_finalize_kernel", "_bn_act_fwd_kernel"]


def test_gradcheck(own_gradients):
    inputs, running, _ = make("grouped", torch.float64)
    inputs = tuple(t[:1, :, :2, :2, :2] if i == 0 else t for i, t in enumerate(inputs[:5]))
    leaves = [t.clone().requires_grad_() for t in inputs]

    def call(*tensors):
        return ours("grouped", clone(running), "silu", True)(*tensors, None)

    assert torch.autograd.gradcheck(call, leaves, atol=tolerance("gradcheck_fp64"), fast_mode=True)


def test_opcheck():
    (x, weight, bias, bn_weight, bn_bias, residual), running, _ = make("pointwise")
    window = ([1, 1, 1], [0] * 6, False, [1, 1, 1], 1, False, [0, 0, 0])
    for norm in ("running", "batch"):
        arguments = (
            x, weight, bias, residual, bn_weight, bn_bias, *clone(running), *window,
            norm, "relu", 0.01, 0.1, 1e-5, "", "triton",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.sora_kernels.conv3d_bn_act.default, arguments)
        torch.library.opcheck(torch.ops.sora_kernels.conv3d_bn_act_fwd.default, arguments)
        z, y, mean, invstd = op._fwd(*arguments)
        torch.library.opcheck(
            torch.ops.sora_kernels.conv3d_bn_act_bwd.default,
            (torch.randn_like(z), x, weight, y, mean, invstd, z, None, bias, bn_weight, bn_bias, *window,
             norm, "relu", 0.01, 0.1, 1e-5, "", [True] * 6, "triton"),
        )  # fmt: skip


def test_gradients_repeat_bit_for_bit(own_gradients):
    inputs, running, dz = make("dense")
    first, again = (run(ours("dense", clone(running), "relu", True), inputs, dz) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_contiguous_input_is_copied_once_and_right():
    inputs, running, dz = make("temporal")
    contiguous = (inputs[0].contiguous(), *inputs[1:])
    z, grads = run(ours("temporal", clone(running), "relu", True), contiguous, dz)
    want, want_grads = run(stock("temporal", clone(running), "relu", True), contiguous, dz)
    assert_close(z, want, "composition_fp32")
    for g, w in zip(grads, want_grads, strict=True):
        assert_close(g, w, "composition_fp32")


def test_an_activation_without_normalisation_and_replicate_padding():
    x = torch.randn(2, 4, 3, 5, 4, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    padding = ((2, 0), (1, 1), (1, 1))
    z = sk.conv3d_act(
        x, weight, bias, padding=padding, padding_mode="replicate", activation="silu", backend="triton"
    )  # fmt: skip
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), "replicate")
    want = F.silu(F.conv3d(padded, weight, bias))
    assert_close(z.detach(), want.detach(), "composition_fp32")
    dz = torch.randn_like(want)
    for g, w in zip(
        torch.autograd.grad(z, (x, weight, bias), dz),
        torch.autograd.grad(want, (x, weight, bias), dz),
        strict=True,
    ):
        assert_close(g, w, "composition_fp32")


def test_the_table(monkeypatch):
    """Memory-bound windows are ours, dense ones and plain fp32 cuDNN's; depthwise is ours in any dtype."""

    def where(c, k, kernel, dtype=torch.bfloat16, **options):
        window = Window(kernel, **options)
        return choice.table(torch.device("cpu"), window, c, k, dtype)

    assert where(64, 64, (3, 3, 3))["forward"] == "aten"
    assert where(64, 256, (1, 1, 1))["forward"] == "triton"
    assert where(64, 144, (1, 3, 3))["forward"] == "triton"
    assert where(256, 256, (1, 3, 3))["forward"] == "aten"
    assert where(144, 64, (3, 1, 1)) == {"forward": "triton", "dgrad": "triton", "wgrad": "aten"}
    assert where(3, 64, (3, 7, 7))["forward"] == "triton"
    for dtype in (torch.float32, torch.bfloat16):
        found = where(54, 54, (3, 3, 3), dtype, groups=54)
        assert set(found.values()) == {"triton"}
    for precision, forward in (("tf32", "triton"), ("ieee", "aten")):
        monkeypatch.setattr(gemm, "precision", lambda dtype, found=precision: found)
        assert where(144, 64, (3, 1, 1), torch.float32)["forward"] == forward
    assert not choice.has_dgrad(Window((1, 3, 3), (1, 2, 2)), 64, 64)
    assert choice.has_dgrad(Window((3, 3, 3), (1, 2, 2), groups=54), 54, 54)


def test_explain_says_why_not():
    x, weight = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 6, 2, 2, 2)
    ones = torch.ones(6)
    explained = sk.explain("conv_transpose3d_bn_act", x, weight, None, None, ones, ones)
    row = next(row for row in explained.rows if row.backend == "triton")
    assert not row.usable and "transposed" in row.why
    with pytest.raises(sk.BackendError, match="transposed"):
        sk.conv_transpose3d_bn_act(x, weight, None, None, ones, ones, backend="triton")
