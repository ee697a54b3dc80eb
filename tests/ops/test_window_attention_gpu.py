"""``window_attention3d`` on a CUDA device, kernels as compiled: ``pytest -m gpu``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.window_attention import reference
from sora_kernels.ops.window_attention.op import facts_of_call
from sora_kernels.testing import assert_within_2x

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

# size, window, shift, heads, head_dim, other options
CASES: dict[str, tuple[Any, ...]] = {
    "video swin": ((8, 14, 14), (8, 7, 7), (4, 3, 3), 3, 32, {}),
    "time shifted, padded": ((12, 10, 9), (8, 7, 7), (4, 3, 3), 2, 32, {}),
    "7x7x7": ((7, 14, 7), (7, 7, 7), (0, 3, 0), 2, 64, {}),
    "98": ((4, 14, 14), (2, 7, 7), (1, 3, 3), 2, 32, {}),
    "64": ((8, 8, 12), (4, 4, 4), (2, 2, 2), 2, 16, {}),
    "49": ((3, 14, 15), (1, 7, 7), (0, 3, 3), 2, 128, {}),
    "clipped": ((5, 5, 9), (8, 7, 7), (4, 3, 3), 2, 32, {"bias_index": "torchvision"}),
    "causal": ((10, 9, 8), (8, 4, 4), (3, 2, 2), 2, 48, {"causal_t": True, "pad": "mask"}),
    "grid": ((8, 15, 14), (4, 7, 7), (0, 0, 0), 2, 32, {"border": "grid"}),
    "dropout": ((8, 14, 7), (8, 7, 7), (4, 3, 0), 2, 32, {"dropout_p": 0.2, "training": True}),
}


def tensors(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    size, window, shift, heads, dim, others = CASES[name]
    width = heads * dim
    found = {
        "qkv": torch.randn(2, *size, 3 * width, device="cuda").to(dtype),
        "bias_table": torch.randn(math.prod(2 * w - 1 for w in window), heads, device="cuda").to(
            dtype
        ),
        "pad_kv": torch.randn(2, width, device="cuda").to(dtype),
    }
    return found, {"num_heads": heads, "window_size": window, "shift_size": shift, **others}


def run(call: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    torch.manual_seed(4)
    out = call(**leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=True)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_as_plain_torch(name, dtype):
    given, options = tensors(name, dtype)

    def plain(**leaves: Tensor) -> Tensor:
        own = facts_of_call(**leaves, **options).options
        seed = torch.randint(0, 2**63 - 1, (), device="cuda") if own.dropout_p else None
        return reference.window_attention3d(
            leaves["qkv"], leaves["bias_table"], leaves["pad_kv"], seed, own
        )

    def ours(**leaves: Tensor) -> Tensor:
        return sk.window_attention3d(**leaves, **options, backend="triton")

    found, again = run(ours, given), run(ours, given)
    other = run(plain, given)
    truth = run(plain, {key: t.double() for key, t in given.items()})
    for key in truth:
        assert torch.equal(found[key], again[key]), key
        assert_within_2x(found[key], other[key], truth[key], name=key, storage=dtype)


@pytest.mark.parametrize("name", ["video swin", "dropout", "64"])
def test_captures_into_a_cuda_graph_without_synchronising(name):
    given, options = tensors(name, torch.bfloat16)
    options.pop("dropout_p", None)
    call = lambda: sk.window_attention3d(**given, **options, backend="triton")  # noqa: E731
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    given["qkv"].normal_()
    graph.replay()
    assert torch.equal(out, call())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_full_attention_without_a_bias_goes_to_sdpa(dtype):
    qkv = torch.randn(2, 4, 8, 8, 3 * 64, device="cuda", dtype=dtype)
    assert sk.explain("window_attention3d", qkv, 2, (4, 8, 8)).chosen == "torch"
    assert sk.explain("window_attention3d", qkv, 2, (4, 4, 8)).chosen == "triton"
    leaf = qkv.clone().requires_grad_()
    by_sdpa = (
        dtype != torch.float32
    )  # its gradients are those of the fused kernels in 16 bits alone
    assert (sk.explain("window_attention3d", leaf, 2, (4, 8, 8)).chosen == "torch") == by_sdpa

    def ours(qkv: Tensor) -> Tensor:
        return sk.window_attention3d(qkv, 2, (4, 8, 8))

    def plain(qkv: Tensor) -> Tensor:
        options = facts_of_call(qkv, 2, (4, 8, 8)).options
        return reference.window_attention3d(qkv, None, None, None, options)

    given = {"qkv": qkv}
    found, other = run(ours, given), run(plain, given)
    truth = run(plain, {"qkv": qkv.double()})
    for key in truth:
        assert_within_2x(found[key], other[key], truth[key], name=key, storage=dtype)


def test_no_scores_are_stored():
    """Peak memory of a training step stays linear in the tokens."""
    module = sk.nn.ShiftedWindowAttention3d(
        96, (8, 7, 7), (4, 3, 3), 3, device="cuda", dtype=torch.bfloat16
    )
    x = torch.randn(2, 8, 28, 28, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()  # compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(x).sum().backward()
    scores = 2 * 16 * 3 * 392**2 * 2  # bytes of one bf16 matrix of them
    assert torch.cuda.max_memory_allocated() - before < scores
