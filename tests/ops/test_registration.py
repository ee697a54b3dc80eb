"""Who sees an operator as one node, and who is spared the dispatcher (ops/common/schema.py)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sora_kernels as sk
from sora_kernels.testing import assert_close


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
    pytest.param(
        lambda x: sk.pyramid_pool3d(x, (1, 2)),
        torch.randn(1, 3, 4, 5, 6),
        "sora_kernels.pyramid_pool3d",
        id="pyramid_pool3d",
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


class Trained(torch.nn.Module):
    """An operator between two layers that have parameters."""

    def __init__(self, own, width, x):
        super().__init__()
        self.before, self.own = torch.nn.Conv1d(1, 1, 1), own
        self.after, self.x = torch.nn.Linear(width, 2), x

    def forward(self, x):
        x = self.before(x.flatten()[None, None]).view(x.shape)
        y = self.own(x)
        return self.after(y[0] if isinstance(y, tuple) else y)


X = torch.randn(2, 3, 4, 5, 6)
ROWS = torch.randn(5, 2, 3)
TRAINED = [
    pytest.param(lambda: Trained(sk.nn.ConvBNAct3d(3, 4, 3, bias=False), 4, X), id="conv3d_bn_act"),
    pytest.param(lambda: Trained(sk.nn.PyramidPool3d((1, 2), mode="maxavg"), 54, X), id="pyramid"),
    pytest.param(lambda: Trained(sk.nn.LSTM(3, 4, 2, bidirectional=True), 8, ROWS), id="lstm"),
    pytest.param(lambda: Trained(sk.nn.GRU(3, 4), 4, ROWS), id="gru"),
    pytest.param(lambda: Trained(sk.nn.RNN(3, 4), 4, ROWS), id="rnn"),
]


@pytest.mark.parametrize("way", ["export", "strict export", "trace"])
@pytest.mark.parametrize("make", TRAINED)
def test_exported_and_traced_graphs_train(make, way):
    """They hold the operator, and it has gradients."""
    module = make()
    x = module.x
    names = [name for name, _ in module.named_parameters()]
    want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    if way == "trace":
        graph = torch.jit.trace(module, (x,), check_trace=False)
    else:
        graph = torch.export.export(module, (x,), strict=way == "strict export").module()
    own = dict(graph.named_parameters())
    found = torch.autograd.grad(graph(x).square().sum(), [own[name] for name in names])
    for name, a, b in zip(names, found, want, strict=True):
        assert_close(a, b, "composition_fp32", name=name)


def smooth(module, x):
    """A function of x with a curvature."""
    module = module.double()

    def call(x):
        y = module(x.tanh())
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    return call, x.double()


SMALL = [
    pytest.param(
        sk.nn.ConvBNAct3d(2, 3, 2, activation="silu"), (1, 2, 3, 2, 2), id="conv3d_bn_act"
    ),
    pytest.param(sk.nn.PyramidPool3d((1, 2), mode="maxavg"), (1, 2, 3, 2, 2), id="pyramid"),
    pytest.param(sk.nn.LSTM(3, 4), (3, 2, 3), id="lstm"),
    pytest.param(sk.nn.GRU(3, 4), (3, 2, 3), id="gru"),
    pytest.param(sk.nn.RNN(3, 4), (3, 2, 3), id="rnn"),
]


@pytest.mark.parametrize(("module", "shape"), SMALL)
def test_batches_of_gradients(module, shape):
    """``is_grads_batched`` and ``vectorize`` send tensors without memory into backward."""
    call, x = smooth(module, torch.randn(shape))
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y = y[0] if isinstance(y, tuple) else y
    wanted = [leaf, *module.parameters()]
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, wanted, grads, is_grads_batched=True, retain_graph=True)
    for k, g in enumerate(grads):
        for a, b in zip(
            together, torch.autograd.grad(y, wanted, g, retain_graph=True), strict=True
        ):
            assert_close(a[k], b, "transform_fp64")
    ours = torch.autograd.functional.hessian(call, x, vectorize=True)
    assert_close(ours, torch.autograd.functional.hessian(call, x), "transform_fp64")
