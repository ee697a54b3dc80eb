"""``ops.common.dropout``: the generator, the kernel's bits, and everything autograd and compilers do with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sora_kernels import _native
from sora_kernels.ops.common.dropout import (
    _FEW,
    _differentiable,
    dropout,
    philox4x32,
    reference,
)
from sora_kernels.testing import assert_close, assert_within_2x, poisoned, tolerance

OP = torch.ops.sora_kernels.dropout.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BIG = 2 * _FEW  # what dropout() sends to the op

# kat_vectors of the Random123 library: philox4x32, 10 rounds.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def seed(value: int = 0x299F31D0A4093822) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_known_answers(counter, key, words):
    found = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in found) == words


def test_first_words_decide():
    """Through the op: element k is kept at p up to word k, and dropped just above."""
    words = PUBLISHED[0][2]
    for k, word in enumerate(words):
        for above in (0, 1):
            kept = OP(torch.ones(4), seed(0), (word + above) / 2**32)[k] != 0
            assert kept == (above == 0)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_kernel_and_reference_have_the_same_bits(dtype):
    for count in (0, 1, 3, 4, 31, 32, 33, 255, 257, 70_001):
        for p in (0.0, 1e-12, 0.1, 0.5, 1 - 2**-32, 1 - 2**-40, 1.0):
            x = torch.randn(count + 1).to(dtype)[1:]  # aligned to an element alone
            own = torch.randint(-(2**63), 2**63 - 1, ())
            with poisoned():
                y = OP(x, own, p)
            assert torch.equal(bits(y), bits(reference(x, own, p))), (count, p)


@pytest.mark.native
def test_threads_do_not_matter():
    """Parts begin at whole vectors, whatever the team."""
    x, own = torch.randn(200_003), seed()
    expected = reference(x, own, 0.3)
    y = torch.empty_like(x)
    for threads in (1, 2, 3):
        y.fill_(math.nan)
        _native.module().dropout(
            0, x.numel(), x.data_ptr(), own.data_ptr(), 0.3, y.data_ptr(), -1, 0, threads
        )
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_torchs(dtype):
    """Kept elements are x / (1 - p), dropped ones are x * 0, NaN and infinity as torch has them."""
    x = torch.randn(BIG).to(dtype)
    x[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    y = dropout(x, 0.25)
    assert y.dtype == dtype
    kept = (y != 0) & torch.isfinite(x)
    assert_within_2x(y[kept], (x / 0.75)[kept], x[kept].double() / 0.75)
    assert y[0].isnan() and not y[1:3].isfinite().any() and y[3] == 0
    assert OP(torch.tensor([math.inf, 1.0]), seed(), 1.0)[0].isnan()
    assert F.dropout(torch.tensor([math.inf]), 1.0).isnan()


def test_keep_rate_and_independence():
    """Fixed seeds: bounds of five standard deviations cannot flake. Neighbours and seeds are uncorrelated."""
    n = 1 << 18
    for p in (0.02, 0.5, 0.9):
        masks = torch.stack([(OP(torch.ones(n), seed(s), p) != 0).double() for s in range(8)])
        sigma = math.sqrt(p * (1 - p) / n)
        assert ((masks.mean(1) - (1 - p)).abs() < 5 * sigma).all()
        z = (masks - (1 - p)) / math.sqrt(p * (1 - p))
        lags = [(z[0, lag:] * z[0, :-lag]).mean().abs() for lag in (1, 2, 3, 4, 8, 64)]
        seeds = [(z[0] * other).mean().abs() for other in z[1:]]
        assert max(*lags, *seeds) < 5 / math.sqrt(n)
        assert abs((OP(torch.ones(n), seed(9), p)).mean() - 1) < 5 * sigma / (1 - p)


def test_edges():
    x = torch.randn(BIG)
    assert dropout(x, 0) is x and dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x)) and torch.equal(dropout(x, 1), x * 0)
    for shape in ((0,), (3, 0, 2)):
        assert dropout(torch.randn(shape), 0.5).shape == shape
        assert OP(torch.randn(shape), seed(), 0.5).shape == shape
    assert OP(torch.tensor(2.0), seed(), 0.5) in (0.0, 4.0)


def test_errors():
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got"):
            dropout(torch.randn(3), p)
    with pytest.raises(ValueError, match="dropout: x must be floating point, got torch.int64"):
        dropout(torch.arange(3), 0.5)
    for bad in (torch.tensor([1, 2]), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="dropout: seed must be one int64 on cpu, got"):
            OP(torch.randn(3), bad, 0.5)


def test_the_mask_goes_by_place():
    x = torch.randn(70, 90)
    expected = OP(x, seed(), 0.4)
    for other in (x.t().contiguous().t(), x.repeat(1, 2)[:, :90], x.expand(1, 70, 90)):
        assert torch.equal(OP(other, seed(), 0.4).view(70, 90), expected)
    assert torch.equal(reference(x.t().contiguous().t(), seed(), 0.4), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", (BIG, 100))
def test_gradient_has_the_forward_mask(count, dtype):
    x = torch.randn(count).to(dtype).requires_grad_()
    y = dropout(x, 0.3)
    dy = torch.rand(count).to(dtype) + 1
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == dtype and torch.equal(dx == 0, y == 0)
    kept = dx != 0
    assert_within_2x(dx[kept], (dy / 0.7)[kept], dy[kept].double() / 0.7)


def test_second_derivatives():
    x = torch.randn(BIG, dtype=torch.float64, requires_grad=True)
    w = torch.randn(BIG, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x * w, 0.3)
    factor = (y / (x * w)).detach()
    dx, dw = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
    assert_close(dx, factor * w, "transform_fp64")
    again = torch.autograd.grad((dx * dw).sum(), (x, w))  # factor^2 x w
    assert_close(again[0], factor**2 * w, "transform_fp64")
    assert_close(again[1], factor**2 * x, "transform_fp64")
    small = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def linear(x):
        return _differentiable(x, seed(), 0.3)

    assert torch.autograd.gradcheck(linear, small, atol=tolerance("gradcheck_fp64"))
    assert torch.autograd.gradgradcheck(linear, small, atol=tolerance("gradcheck_fp64"))


def test_repeats_with_torchs_seed():
    x = torch.randn(BIG)
    torch.manual_seed(7)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(dropout(x, 0.5), first) and torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    third = dropout(x, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5), third)


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("count", (BIG, 100))
def test_checkpoint_repeats_the_mask(count, reentrant):
    x = torch.randn(count, requires_grad=True)
    y = checkpoint(lambda t: dropout(t, 0.5) * t, x, use_reentrant=reentrant)
    y.sum().backward()
    dropped = x.grad == 0
    assert torch.equal(dropped, y == 0) and 0.3 < dropped.float().mean() < 0.7


def test_opcheck():
    for x in (torch.randn(5, 3), torch.randn(3, 5).t(), torch.randn(0), torch.randn(4).bfloat16()):
        torch.library.opcheck(OP, (x, seed(), 0.3))


def test_compiles_without_a_break_or_a_second_time():
    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(x):
        return dropout(x, 0.3).sin()

    for rows in (3, 70, 200):
        x = torch.randn(rows, 50, requires_grad=True)
        y = step(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx == 0, y == 0) and 0.1 < (dx == 0).float().mean() < 0.5
    assert backend.frame_count == 1


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x):
            return dropout(x, 0.3)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), (torch.randn(5, 9),), dynamic_shapes={"x": {0: batch}})
    module, x = program.module(), torch.randn(800, 9)
    y = module(x)
    zero = (y == 0).float().mean()
    assert y.shape == x.shape and 0.25 < zero < 0.35


def test_vmap_follows_torchs_rules():
    x = torch.randn(4, BIG)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda t: dropout(t, 0.5))(x)
    same = torch.func.vmap(lambda t: dropout(t, 0.5), randomness="same")(x) == 0
    assert torch.equal(same, same[:1].expand_as(same)) and 0.4 < same.float().mean() < 0.6
    different = torch.func.vmap(lambda t: dropout(t, 0.5), randomness="different")(x) == 0
    assert 0.4 < (different[0] != different[1]).float().mean() < 0.6


def test_transforms():
    x, t = torch.randn(2, BIG, dtype=torch.float64)
    torch.manual_seed(1)
    y = dropout(x, 0.4)
    factor = y / x
    torch.manual_seed(1)
    out, tangent = torch.func.jvp(lambda x: dropout(x, 0.4), (x,), (t,))
    assert_close(out, y, "transform_fp64")
    assert_close(tangent, factor * t, "transform_fp64")
    torch.manual_seed(1)
    dx = torch.func.grad(lambda x: dropout(x, 0.4).square().sum())(x)
    assert_close(dx, 2 * factor * y, "transform_fp64")
    torch.manual_seed(1)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(dropout(forward_ad.make_dual(x, t), 0.4))
    assert_close(found.tangent, factor * t, "transform_fp64")
    leaf = x.requires_grad_()
    y = dropout(leaf, 0.4)
    batched = torch.stack((t, 2 * t))
    (dx,) = torch.autograd.grad(y, leaf, batched, is_grads_batched=True)
    assert_close(dx, batched * (y / leaf).detach(), "transform_fp64")


def test_autocast_leaves_it_alone():
    x = torch.randn(BIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert dropout(x, 0.5).dtype == F.dropout(x, 0.5).dtype == torch.float32


def test_meta_and_fake():
    x = torch.randn(BIG, 2, device="meta", requires_grad=True)
    y = dropout(x, 0.5)
    assert y.shape == x.shape and y.device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert dropout(torch.empty(BIG), 0.5).shape == (BIG,)
    assert OP(x.detach(), torch.zeros((), dtype=torch.int64, device="meta"), 0.5).shape == x.shape


@pytest.mark.gpu
@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_has_the_same_bits(dtype):
    for count in (0, 1, 5, 70_001):
        for first in (0, 1):
            x, own = torch.randn(count + first).to(dtype), seed()
            y = OP(x.cuda()[first:], own.cuda(), 0.3)
            assert torch.equal(bits(y.cpu()), bits(reference(x[first:], own, 0.3)))


@pytest.mark.gpu
@pytest.mark.native
def test_graph_replays_draw_new_masks():
    x = torch.randn(BIG, device="cuda")
    dropout(x, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout(x, 0.5)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append((y == 0).clone())
    assert 0.4 < (masks[0] != masks[1]).float().mean() < 0.6
