"""Autograd around a pair of registered ops: the one road from every public function to its kernels.

A plain ``autograd.Function`` outside the op is the cheapest boundary, but left to itself it is silently
wrong under functorch. Three rules mend that:

1. While a ``torch.func`` transform is active, or an input is a forward-mode dual tensor, the call runs the
   reference: vmap, grad, jvp and their compositions are right by construction. An operator may know better
   for some of them (``Pair.transformed``).
2. Under ``torch.compile`` nothing of this is looked at: Dynamo traces the Function, or inlines the op. An exported
   or traced graph holds the op itself, which has the same gradients registered.
3. The backward op has a Function of its own, whose backward is autograd of the reference: gradients of any
   order exist, and the first order always comes from the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling, is_exporting

Tensors = Sequence[Tensor | None]


class Pair(NamedTuple):
    """What an operator supplies. ``flags`` is the tuple of its non-tensor arguments.

    Attributes:
        forward: ``(tensors, flags, tapes, backend) -> outputs + tapes`` through the registered op;
            ``tapes=False`` says that no backward will come.
        save: ``(tensors, results, flags, backend) -> saved``. The first ``len(tensors)`` entries stand for the inputs
            (``None`` where backward needs no value), the rest are tapes.
        backward: ``(grads, saved, needs, flags, backend) -> one gradient an input`` (anything where not
            needed) through the registered op. ``grads`` holds ``None`` for outputs nobody used.
        reference: ``(tensors, flags) -> outputs``, differentiable plain torch.
        recompute: ``(saved, flags) -> (outputs, inputs)`` for second derivatives: the reference again, from
            what was saved. ``inputs`` are the tensors to differentiate by: the saved ones, or a stand-in for one
            whose value was not kept because no derivative depends on it.
        num_outputs: how many of forward's results are the caller's; the rest are tapes. Negative: how many are
            tapes, if the outputs' number differs from call to call.
        transformed: ``(tensors, flags, backend) -> outputs`` by the kernels where transforms are active, or None
            where the reference must run.
    """

    forward: Callable[[Tensors, tuple, bool, str], Tensors]
    save: Callable[[Tensors, Tensors, tuple, str], Tensors]
    backward: Callable[[Tensors, Tensors, Sequence[bool], tuple, str], Tensors]
    reference: Callable[[Tensors, tuple], Tensors]
    recompute: Callable[[Tensors, tuple], tuple[Tensors, Tensors]]
    num_outputs: int
    transformed: Callable[[Tensors, tuple, str], Tensors | None] | None = None


def differentiable(pair: Pair) -> Callable[[Tensors, tuple, str], Tensors]:
    """``call(tensors, flags, backend) -> outputs``: the op with gradients, by the rules above."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, flags, backend, needs, num_grads, *tensors):
            ctx.flags, ctx.needs, ctx.num_grads = flags, needs, num_grads
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)
            found = pair.backward(tensors[:num_grads], tensors[num_grads:], needs, flags, backend)
            return tuple(g if n else None for g, n in zip(found, needs, strict=True))

        @staticmethod
        def backward(ctx, *seconds):
            third = torch.is_grad_enabled()
            result: list[Tensor | None] = [None] * len(ctx.saved_tensors)
            if all(second is None for second in seconds):
                return (None, None, None, None, *result)
            with torch.enable_grad():
                tensors = _aliases(ctx.saved_tensors)
                grads, saved = tensors[: ctx.num_grads], tensors[ctx.num_grads :]
                outputs, inputs = pair.recompute(saved, ctx.flags)
                pairs = [
                    (out, g)
                    for out, g in zip(outputs, grads, strict=True)
                    if g is not None and out is not None and out.requires_grad
                ]
                wanted = [
                    (t, second)
                    for t, second, need in zip(inputs, seconds, ctx.needs, strict=True)
                    if need and t is not None and second is not None
                ]
                first = torch.autograd.grad(
                    [out for out, _ in pairs],
                    [t for t, _ in wanted],
                    [g for _, g in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
                linked = [
                    (f, s)
                    for f, (_, s) in zip(first, wanted, strict=True)
                    if f is not None and f.requires_grad
                ]
                leaves = [
                    (i, t) for i, t in enumerate(tensors) if t is not None and t.requires_grad
                ]
                if linked and leaves:
                    found = torch.autograd.grad(
                        [f for f, _ in linked],
                        [t for _, t in leaves],
                        [s for _, s in linked],
                        create_graph=third,
                        allow_unused=True,
                    )
                    for (i, _), g in zip(leaves, found, strict=True):
                        result[i] = g
            return (None, None, None, None, *result)

    def by_definition(
        flags: tuple, grads: Tensors, saved: Tensors, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """First derivatives by autograd of the reference."""
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            outputs, inputs = pair.recompute(_aliases(saved), flags)
            pairs = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if o is not None and g is not None
            ]
            wanted = [t for t, n in zip(inputs, needs, strict=True) if n and t is not None]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=graph,
                    allow_unused=True,
                )
            )
        return [next(found) if n else None for n in needs]

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, flags, backend, *tensors):
            results = pair.forward(tensors, flags, True, backend)
            ctx.flags, ctx.backend = flags, backend
            ctx.num_inputs = len(tensors)
            ctx.save_for_backward(*pair.save(tensors, results, flags, backend))
            ctx.set_materialize_grads(False)
            return tuple(results[: pair.num_outputs])

        @staticmethod
        def backward(ctx, *grads):
            needs = list(ctx.needs_input_grad[2:])
            saved = ctx.saved_tensors
            if all(g is None for g in grads):
                return (None,) * (2 + len(needs))
            if not is_dynamo_compiling() and any(map(_is_batched, grads)):
                return (None, None, *by_definition(ctx.flags, grads, saved, needs))
            if not is_dynamo_compiling() and torch.is_grad_enabled():
                found = Backward.apply(ctx.flags, ctx.backend, needs, len(grads), *grads, *saved)
            else:
                found = pair.backward(grads, saved, needs, ctx.flags, ctx.backend)
            return (None, None, *[g if n else None for g, n in zip(found, needs, strict=True)])

    def call(tensors: Tensors, flags: tuple, backend: str) -> Tensors:
        if not is_dynamo_compiling() and transformed(tensors):
            found = pair.transformed and pair.transformed(tensors, flags, backend)
            return found or pair.reference(tensors, flags)
        # An exported graph holds the op, whose gradients are its own (schema.differentiate).
        if torch.is_grad_enabled() and not is_exporting():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return Forward.apply(flags, backend, *tensors)
        return pair.forward(tensors, flags, False, backend)[: pair.num_outputs]

    return call


def _aliases(tensors: Tensors) -> list[Tensor | None]:
    """They cut the graph: an input that was computed from another one is not followed."""
    return [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]


def _is_batched(grad: Tensor | None) -> bool:
    """Of ``is_grads_batched`` and ``jacobian(vectorize=True)``: no memory that a kernel could read."""
    return grad is not None and is_legacy_batchedtensor(grad)


def transformed(tensors: Tensors) -> bool:
    """Whether a ``torch.func`` transform is active or an input carries a forward-mode tangent."""
    if peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
