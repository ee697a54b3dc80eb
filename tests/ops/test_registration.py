"""Who sees an operator as one node, and who is spared the dispatcher (ops/common/schema.py)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sora_kernels as sk


def block(x):
    weight, running = torch.ones(4, 3, 1, 1, 1), (torch.zeros(4), torch.ones(4))
    return sk.conv3d_bn_act(x, weight, None, None, *running)


def recurrence(function, rows):
    def call(x):
        w = [torch.ones(rows, 3), torch.ones(rows, 2), torch.zeros(rows), torch.zeros(rows)]
        return function(x, None, w, backend="reference")[0]

    return call


CALLS = [
    pytest.param(
        block, torch.randn(1, 3, 2, 2, 2), "sora_kernels.conv3d_bn_act", id="conv3d_bn_act"
    ),
    *(
        pytest.param(recurrence(function, rows), torch.randn(2, 1, 3), name, id=name[13:])
        for function, rows, name in (
            (sk.lstm, 8, "sora_kernels.lstm"),
            (sk.gru, 6, "sora_kernels.gru"),
            (sk.rnn, 2, "sora_kernels.rnn_tanh"),
        )
    ),
]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("call", "x", "name"), CALLS)
def test_a_dispatch_mode_sees_the_operator(call, x, name):
    with Seen() as seen:
        call(x)
    assert f"{name}.default" in seen.names


@pytest.mark.parametrize(("call", "x", "name"), CALLS)
def test_the_profiler_names_the_operator(call, x, name):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    assert name.replace(".", "::") in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("call", "x", "name"), CALLS)
def test_a_trace_records_the_operator(call, x, name):
    traced = torch.jit.trace(call, (x,), check_trace=False)
    assert name.replace(".", "::") in str(traced.graph)
    assert torch.equal(traced(x), call(x))


@pytest.mark.parametrize(("call", "x", "name"), CALLS)
def test_a_tensor_subclass_sees_the_operator(call, x, name):
    seen = []

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            unwrapped = torch.utils._pytree.tree_map_only(Wrapper, lambda t: t.inner, args)
            return func(*unwrapped, **(kwargs or {}))

    call(Wrapper(x))
    assert f"{name}.default" in seen


@pytest.mark.parametrize(("call", "x", "name"), CALLS)
def test_an_ordinary_call_gives_the_same(call, x, name):
    eager = call(x)
    with Seen():
        assert torch.equal(call(x), eager)


def test_selective_checkpoint_can_save_the_operator():
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    calls = []
    forward = torch.ops.sora_kernels.conv3d_bn_act_fwd.default

    def policy(ctx, op, *args, **kwargs):
        if op is forward and not ctx.is_recompute:
            calls.append(op)
        return CheckpointPolicy.MUST_SAVE if op is forward else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    z = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    z.sum().backward()
    assert calls == [forward]
    (want,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(x.grad, want)
