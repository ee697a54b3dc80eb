"""``conv3d_bn_act`` trained on the CPU: autograd's own way through ATen's ops, where it is the same as the op's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sora_kernels as sk
from sora_kernels.ops.conv3d_bn_act import run, stock
from sora_kernels.testing import assert_close

CHANNELS_LAST = torch.channels_last_3d


def leaves(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bn_weight, bn_bias, residual."""
    torch.manual_seed(0)
    shapes = ((2, 6, 4, 7, 9), (8, 6, 3, 3, 3), (8,), (8,), (2, 8, 4, 7, 9))
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [
        (t.to(memory_format=memory_format) if t.dim() == 5 else t).requires_grad_() for t in made
    ]


def with_norm(tensors: list[Tensor], activation: str | None, with_residual: bool) -> list[Tensor]:
    x, w, g, b, r = tensors
    mean, var = torch.zeros_like(g), torch.ones_like(g)
    residual = r if with_residual else None
    z = sk.conv3d_bn_act(
        x, w, g, b, mean, var, residual=residual, activation=activation, padding=1, training=True
    )  # fmt: skip
    return [z, mean, var]


def with_bias(tensors: list[Tensor], activation: str | None, with_residual: bool) -> list[Tensor]:
    x, w, g, b, r = tensors
    mean, var = torch.zeros_like(g), torch.ones_like(g)
    bias, residual = g * 2, r if with_residual else None
    z = sk.conv3d_bn_act(
        x, w, g, b, mean, var, bias=bias, residual=residual, activation=activation, padding=1, training=True
    )  # fmt: skip
    (dbias,) = torch.autograd.grad(z, bias, torch.ones_like(z), retain_graph=True)
    assert not dbias.any()
    return [z, mean, var]


def without_norm(
    tensors: list[Tensor], activation: str | None, with_residual: bool
) -> list[Tensor]:
    x, w, _, b, r = tensors
    residual = r if with_residual else None
    return [sk.conv3d_act(x, w, b, residual=residual, activation=activation, padding=1)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("call", [with_norm, with_bias, without_norm])
def test_same_as_the_op(monkeypatch, call, activation, with_residual, memory_format):
    monkeypatch.setattr(run, "_hooked", lambda: False)  # not for the hooks below
    found = []
    for composed in (True, False):
        if not composed:
            monkeypatch.setattr(run, "is_composed", lambda *_: False)
        tensors, saved = leaves(memory_format), {}

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if t.dim() == 5:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results = call(tensors, activation, with_residual)
        assert (results[0].grad_fn.name() == "ForwardBackward") is not composed
        dz = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(results[0], tensors, dz, allow_unused=True)
        found.append(([*results, *grads], sum(saved.values())))
    (ours, kept), (ops, kept_by_op) = found
    for a, b in zip(ours, ops, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            assert_close(a, b, "composition_fp32")
    assert kept == kept_by_op


def call(**changes) -> Tensor:
    x, w, g, b, _ = leaves(torch.contiguous_format, changes.pop("dtype", torch.float32))
    mean, var = torch.zeros_like(g), torch.ones_like(g)
    if changes.pop("without_bn_bias", False):
        b = None
    options = {"padding": 1, "training": True} | changes
    return sk.conv3d_bn_act(x, w, g, b, mean, var, **options)


@pytest.mark.parametrize(
    "changes",
    [
        dict(activation="silu"),  # autograd would keep what goes into it beside y
        dict(bias=torch.zeros(8), without_bn_bias=True),  # nothing to link its gradient of zero to
        dict(training=False),  # no y is kept
        dict(padding=((2, 0), (1, 1), (1, 1))),  # the padded copy would be kept
        dict(dtype=torch.bfloat16),  # statistics in fp32
        dict(backend="reference"),
    ],
    ids=str,
)
def test_where_the_op_keeps_less_or_gives_more(monkeypatch, changes):
    monkeypatch.setattr(stock, "composed", lambda *_: pytest.fail("this call is the op's"))
    call(**changes)


def test_who_looks_on_sees_the_op(monkeypatch):
    monkeypatch.setattr(stock, "composed", lambda *_: pytest.fail("this call is the op's"))
    with sk.save_memory():
        call()
    with torch.autograd.graph.save_on_cpu():
        call()
    with torch.autocast("cpu", torch.bfloat16):
        call()
    with torch.profiler.profile() as profile:
        call()
    assert "sora_kernels::conv3d_bn_act_fwd" in {event.name for event in profile.events()}


def test_checkpointed_under_a_profiler_that_is_gone_in_backward():
    x, w, g, b, _ = leaves(torch.contiguous_format)
    mean, var = torch.zeros_like(g), torch.ones_like(g)

    def block(x: Tensor) -> Tensor:
        return sk.conv3d_bn_act(x, w, g, b, mean, var, padding=1, training=True)

    want = torch.autograd.grad(block(x).square().sum(), [x, w, g, b])
    with torch.profiler.profile():
        loss = checkpoint(block, x, use_reentrant=False).square().sum()
    for found, wanted in zip(torch.autograd.grad(loss, [x, w, g, b]), want, strict=True):
        assert_close(found, wanted, "composition_fp32")
