"""The convolutions on a CUDA device, kernels as compiled: ``pytest -m gpu``."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sora_kernels as sk
from sora_kernels import _tuning
from sora_kernels.ops.conv3d_bn_act import choice, reference
from sora_kernels.testing import assert_within_2x

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

# channels, filters, kernel, sizes, options of F.conv3d
LAYERS: dict[str, tuple[int, int, tuple[int, int, int], tuple[int, int, int], dict[str, Any]]] = {
    "dense 64": (64, 64, (3, 3, 3), (8, 28, 28), dict(padding=1)),
    "dense 128": (128, 128, (3, 3, 3), (4, 14, 14), dict(padding=1)),
    "dense strided": (64, 128, (3, 3, 3), (8, 28, 28), dict(padding=1, stride=2)),
    "odd channels": (45, 230, (3, 1, 1), (5, 13, 11), dict(padding=(1, 0, 0))),
    "spatial": (64, 144, (1, 3, 3), (4, 28, 28), dict(padding=(0, 1, 1))),
    "pointwise": (54, 24, (1, 1, 1), (8, 28, 28), {}),
    "stem": (3, 64, (3, 7, 7), (8, 56, 56), dict(padding=(1, 3, 3), stride=(1, 2, 2))),
    "depthwise 54": (54, 54, (3, 3, 3), (8, 28, 28), dict(padding=1, groups=54)),
    "depthwise strided": (108, 108, (3, 3, 3), (7, 29, 27), dict(padding=1, groups=108, stride=(1, 2, 2))),
    "grouped, dilated": (64, 96, (3, 3, 3), (6, 15, 14), dict(padding=2, dilation=2, groups=4)),
}  # fmt: skip
NAMES = ("x", "weight", "bn_weight", "bn_bias", "residual")


@pytest.fixture
def own_gradients(monkeypatch):
    """dgrad and wgrad by our kernels wherever they can be."""
    own = dict.fromkeys(("forward", "dgrad", "wgrad"), "triton")
    monkeypatch.setattr(choice, "table", lambda *args: own)


def make(name: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], Tensor]:
    c, k, kernel, sizes, options = LAYERS[name]
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(to)

    x = randn(2, c, *sizes).contiguous(memory_format=torch.channels_last_3d)
    weight = randn(k, c // options.get("groups", 1), *kernel) * 0.1
    dz = torch.randn_like(F.conv3d(x, weight, None, **options))
    inputs = (x, weight, randn(k, to=wide).abs() + 0.5, randn(k, to=wide), torch.randn_like(dz))
    return inputs, (randn(k, to=wide), randn(k, to=wide).abs() + 0.5), dz


def call(name, backend, running, training, activation="relu"):
    def ours(x, weight, bn_weight, bn_bias, residual):
        return sk.conv3d_bn_act(
            x, weight, bn_weight, bn_bias, *running, residual=residual, training=training,
            activation=activation, backend=backend, **LAYERS[name][-1],
        )  # fmt: skip

    return ours


def stock(name, running, training, mask=None):
    def composed(x, weight, bn_weight, bn_bias, residual):
        y = F.conv3d(x, weight, None, **LAYERS[name][-1])
        y = F.batch_norm(y, *running, bn_weight, bn_bias, training) + residual
        return F.relu(y) if mask is None else reference.activate_like(y, mask, "relu", 0.0)

    return composed


def run(function, inputs, dz):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    z = function(*leaves)
    return z.detach(), torch.autograd.grad(z, leaves, dz.to(z.dtype))


def clone(tensors):
    return tuple(t.clone() for t in tensors)


def double(tensors):
    return tuple(t.double() for t in tensors)


def check(name, backend, dtype, training):
    inputs, running, dz = make(name, dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        mine, plain, true = clone(running), clone(running), double(running)
        z, grads = run(call(name, backend, mine, training), inputs, dz)
        again = run(call(name, backend, clone(running), training), inputs, dz)
        plain_z, plain_grads = run(stock(name, plain, training), inputs, dz)
        true_z, _ = run(stock(name, true, training), double(inputs), dz.double())
        assert torch.equal(z, again[0])
        assert_within_2x(z, plain_z, true_z, name="z")
        for each, p, t in zip(mine, plain, true, strict=True):
            assert_within_2x(each, p, t, name="running", storage=dtype)
        truths = [
            run(stock(name, double(running), training, m), double(inputs), dz.double())[1]
            for m in (z, plain_z)
        ]
    norm = dz.double().square().sum((0, 2, 3, 4)).max().sqrt().item()
    for n, g, p, t, pt in zip(NAMES, grads, plain_grads, *truths, strict=True):
        terms = norm if g.dim() == 1 else 0.0
        assert_within_2x(g, p, t, name=f"d{n}", storage=dtype, plain_truth=pt, terms=terms)
    return grads, again[1]


# Every layer in bf16; the other dtypes where other kernels run. Each case compiles its kernels: few are enough.
CASES = [
    *((name, torch.bfloat16, training) for name in LAYERS for training in (True, False)),
    *(
        (name, dtype, True)
        for name in ("dense 128", "depthwise 54", "stem")
        for dtype in (torch.float16, torch.float32)
    ),
]


@pytest.mark.parametrize(("name", "dtype", "training"), CASES)
def test_our_convolutions(own_gradients, name, dtype, training):
    check(name, "triton", dtype, training)


@pytest.mark.parametrize("name", ["dense strided", "depthwise strided"])
def test_gradients_by_the_table(name):
    check(name, "triton", torch.bfloat16, True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["dense 64", "depthwise 54", "odd channels"])
def test_passes_around_cudnn(name, training):
    check(name, "hybrid", torch.bfloat16, training)


@pytest.mark.parametrize("name", ["dense 64", "depthwise 54"])
def test_own_gradients_repeat_bit_for_bit(own_gradients, name):
    first, again = check(name, "triton", torch.bfloat16, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("block", [64, 128])
def test_tiles_of_four_and_eight_warps(monkeypatch, warps, block):
    """triton#1254: eight warps in a loop that is not unrolled were once wrong."""
    config = _tuning.config

    def forced(op, kernel, arch, key):
        found = dict(config(op, kernel, arch, key))
        if kernel == "_conv3d_gemm_fwd_kernel":
            found |= {"BLOCK_M": 128, "BLOCK_N": block, "BLOCK_K": 64, "num_warps": warps}
        return found

    from sora_kernels.ops.conv3d_bn_act import gemm

    monkeypatch.setattr(_tuning, "config", forced)
    gemm.forget_plans()
    try:
        check("dense 128", "triton", torch.bfloat16, True)
        check("dense 128", "triton", torch.bfloat16, False)
    finally:
        gemm.forget_plans()


def test_saved_memory_is_made_again_bit_for_bit():
    block = sk.nn.ConvBNAct3d(64, 64, 3, padding=1, bias=False, backend="hybrid").cuda()
    head = torch.nn.Conv3d(64, 8, 1).cuda()
    x = torch.randn(2, 64, 4, 14, 14, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    found = []
    with torch.backends.cudnn.flags(deterministic=True):
        for saving in (False, True):
            with sk.save_memory() if saving else contextlib.nullcontext():
                loss = head(block(x)).square().sum()
            found.append(torch.autograd.grad(loss, [*block.parameters(), *head.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_in_a_cuda_graph_and_without_synchronising():
    inputs, running, dz = make("depthwise 54", torch.bfloat16)
    ours = call("depthwise 54", None, running, True)
    explained = sk.explain(
        "conv3d_bn_act", *inputs[:4], *running, training=True, **LAYERS["depthwise 54"][-1]
    )
    assert explained.chosen == "triton"
    run(ours, inputs, dz)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ours, inputs, dz)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(ours(*leaves), leaves, dz)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = torch.autograd.grad(ours(*leaves), leaves, dz)
    for g in grads:
        g.zero_()
    graph.replay()
    want = torch.autograd.grad(ours(*leaves), leaves, dz)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
