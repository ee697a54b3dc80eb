"""A layer under ``torch.vmap`` and at most one ``torch.func.grad`` or ``vjp``, by the kernels.

The rule of vmap for a layer is one of two. Where the weights are common, members are more rows: they fold
into the batch, and what asks for each member's gradient of the weights gets it by groups of rows. Where the
weights differ, every tensor gets an axis of members in front, which ensemble.py runs. Either is the same
``autograd.Function`` again, with what the rule did in its ``Call``: transforms nest, and gradients go through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch._functorch.pyfunctorch import (
    GradInterpreter,
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
)
from torch.autograd import forward_ad

from ..common.gradient import Tensors
from . import ensemble
from .ensemble import Call, Layer

__all__ = ["Layer", "under_transforms"]


def under_transforms(layer: Layer) -> Callable[[Tensors, tuple, str], Tensors | None]:
    """``Pair.transformed`` of a layer."""

    def call(tensors: Tensors, flags: tuple, backend: str) -> Tensors | None:
        if torch.compiler.is_compiling():  # an export: a graph of ATen's ops holds any transform
            return None
        grad = _grad(tensors)
        if not _kernels_follow() or not layer.takes(tensors, flags, backend, grad):
            return None
        tapes = grad and not flags[2]
        packed = tensors[layer.rows_at] is not None
        found = Forward.apply(Call(layer, flags, backend, tapes, packed), *tensors)
        return found[: layer.num_outputs]

    return call


def _kernels_follow() -> bool:
    """Whether what is active here is vmap, of any member at all, and at most one reverse-mode transform."""
    if forward_ad._current_level >= 0:
        return False
    reverse = 0
    for interpreter in retrieve_all_functorch_interpreters():
        if isinstance(interpreter, GradInterpreter):
            reverse += 1
        elif not isinstance(interpreter, VmapInterpreter) or not interpreter.batch_size():
            return False
    return reverse <= 1


def _grad(tensors: Tensors) -> bool:
    """Whether a backward pass may come, of whatever level."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        while t is not None:
            if t.requires_grad:
                return True
            t = get_unwrapped(t) if is_functorch_wrapped_tensor(t) else None
    return any(isinstance(i, GradInterpreter) for i in retrieve_all_functorch_interpreters())


class Forward(torch.autograd.Function):
    """(call, *tensors) -> outputs and tapes."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return ensemble.forward(call, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call, count = call, call.layer.num_outputs
        ctx.mark_non_differentiable(*output[count:])
        ctx.save_for_backward(*call.layer.pair.save(tensors, output, call.flags, call.backend))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, call = ctx.needs_input_grad[1:], ctx.call
        grads = grads[: call.layer.num_outputs]
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        given = (*grads, *ctx.saved_tensors)
        legacy = any(g is not None and is_legacy_batchedtensor(g) for g in grads)
        run = Backward.apply if _kernels_follow() and not legacy else first_derivatives
        found = iter(run(replace(call, needs=needs), *given))
        return (None, *(next(found) if need else None for need in needs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Call, *tensors: Tensor | None) -> tuple:
        axes = _Axes(call.layer.kinds(tensors), in_dims[1:], call, info.batch_size)
        # Groups are of a backward pass: here the members' gradients of common weights are one sum.
        found = Forward.apply(replace(axes.call, groups=0), *axes.inward(tensors))
        return axes.outward(found, "." * len(found))


class Backward(torch.autograd.Function):
    """(call, *gradients of the outputs, *tensors, *tapes) -> the gradients that ``call.needs`` names."""

    @staticmethod
    def forward(call: Call, *given: Tensor | None) -> tuple[Tensor, ...]:
        return ensemble.backward(call, given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.call, *given = inputs
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of what the tensors and the outputs' gradients make of ``first_derivatives``."""
        given, call = ctx.saved_tensors, ctx.call
        tapes = len(given) - call.layer.tapes_count
        leaves = [k for k in range(tapes) if ctx.needs_input_grad[1 + k]]
        wanted = [k for k, second in enumerate(seconds) if second is not None]
        result: list[Tensor | None] = [None] * (1 + len(given))
        if leaves and wanted:

            def first(*values: Tensor) -> list[Tensor]:
                now = list(given)
                for k, value in zip(leaves, values, strict=True):
                    now[k] = value
                found = first_derivatives(call, *now)
                return [found[k] for k in wanted]

            pull: Any = torch.func.vjp(first, *(given[k] for k in leaves))[1]
            found = pull([seconds[k] for k in wanted])
            for k, g in zip(leaves, found, strict=True):
                result[1 + k] = g
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Call, *given: Tensor | None) -> tuple:
        kinds = call.layer.kinds_of_backward(given)
        axes = _Axes(kinds, in_dims[1:], call, info.batch_size)
        found = Backward.apply(axes.call, *axes.inward(given))
        inputs = call.layer.kinds(call.layer.inputs_of(given))
        gives = "".join(kind for kind, need in zip(inputs, call.needs, strict=True) if need)
        return axes.outward(found, gives)


@dataclass
class _Axes:
    """One vmap's axis of every tensor: in which way the call takes it in.

    Attributes:
        kinds: a letter a tensor, see ``Layer.kinds``.
        dims: the axis of each, or None where a tensor is common to the members.
        given: the call so far.
        M: members of this vmap.
    """

    kinds: str
    dims: Sequence[int | None]
    given: Call
    M: int

    def __post_init__(self) -> None:
        pairs = zip(self.kinds, self.dims, strict=True)
        self.apart = any(kind == "w" and dim is not None for kind, dim in pairs)
        members, groups = self.given.members, self.given.groups
        if self.apart:
            self.call = replace(self.given, members=self.M * max(members, 1))
        else:
            self.call = replace(self.given, groups=self.M * max(groups, 1))

    def inward(self, tensors: Tensors) -> list[Tensor | None]:
        take = self._in_front if self.apart else self._into_rows
        return [
            None if t is None else take(kind, t, dim)
            for kind, t, dim in zip(self.kinds, tensors, self.dims, strict=True)
        ]

    def outward(
        self, found: Sequence[Tensor], kinds: str
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Results with this vmap's axis apart again, and where it is."""
        give = self._from_front if self.apart else self._from_rows
        pairs = [give(kind, t) for kind, t in zip(kinds, found, strict=True)]
        return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)

    def _into_rows(self, kind: str, t: Tensor, dim: int | None) -> Tensor:
        """Members beside each other, behind the batch: row b of member m is row b * M + m."""
        if kind == "w":
            return t
        if kind == "s":
            return t * self.M
        at = ensemble.ROWS[kind]
        t = t.unsqueeze(at) if dim is None else t.movedim(dim, at)
        if dim is None:
            t = t.expand(*t.shape[:at], self.M, *t.shape[at:][1:])
        return t.flatten(at - 1, at)

    def _from_rows(self, kind: str, t: Tensor) -> tuple[Tensor, int]:
        if kind == "w":
            dim, before = (1 if self.given.members else 0), self.given.groups
            return (t.unflatten(dim, (before, self.M)), dim + 1) if before else (t, dim)
        return t.unflatten(-2, (t.shape[-2] // self.M, self.M)), t.dim() - 1

    def _in_front(self, kind: str, t: Tensor, dim: int | None) -> Tensor:
        members = self.given.members
        has_members = members and self.given.has_members(kind, t, dim is not None)
        if kind == "s" or (kind in "lr" and dim is None and not has_members):
            return t
        t = t.expand(self.M, *t.shape) if dim is None else t.movedim(dim, 0)
        if not members:
            return t
        if not has_members:
            t = t.unsqueeze(1).expand(-1, members, *t.shape[1:])
        return t.flatten(0, 1)

    def _from_front(self, kind: str, t: Tensor) -> tuple[Tensor, int]:
        members = self.given.members
        return (t.unflatten(0, (self.M, members)) if members else t), 0


def first_derivatives(call: Call, *given: Tensor | None) -> tuple[Tensor, ...]:
    """As ``Backward``, by autograd of the reference: any transform goes through it."""
    inputs = call.layer.inputs_of(given)
    return _of_reference(call, *given[: call.layer.num_outputs], *inputs)


def _of_reference(call: Call, *given: Tensor | None) -> tuple[Tensor, ...]:
    """``given`` without tapes, which depend on the rest."""
    if call.members or call.groups:
        return _of_each(call, given)
    layer, count = call.layer, call.layer.num_outputs
    grads, inputs = given[:count], given[count:]
    places = [k for k, need in enumerate(call.needs) if need]
    used = [k for k, g in enumerate(grads) if g is not None]

    def outputs(*values: Tensor) -> list[Tensor | None]:
        now = list(inputs)
        for k, value in zip(places, values, strict=True):
            now[k] = value
        found = layer.pair.reference(now, call.flags)
        return [found[k] for k in used]

    pull: Any = torch.func.vjp(outputs, *(inputs[k] for k in places))[1]
    return pull([grads[k] for k in used])


def _of_each(call: Call, given: Tensors) -> tuple[Tensor, ...]:
    """Each member, or else each group of rows, by itself."""
    layer = call.layer
    inputs = layer.kinds(given[layer.num_outputs :])
    kinds = "." * layer.num_outputs + inputs
    if call.members:
        alone = replace(call, members=0)
        dims = [
            0 if t is not None and call.has_members(k, t) else None
            for k, t in zip(kinds, given, strict=True)
        ]
        return torch.vmap(partial(_of_reference, alone), tuple(dims))(*given)
    alone = replace(call, groups=0)
    given = [ensemble.by_group(k, t, call.groups) for k, t in zip(kinds, given, strict=True)]
    dims = [
        None if t is None or k in "sw" else t.dim() + ensemble.ROWS[k]
        for k, t in zip(kinds, given, strict=True)
    ]
    found = torch.vmap(partial(_of_reference, alone), tuple(dims))(*given)
    gives = [k for k, need in zip(inputs, call.needs, strict=True) if need]
    return tuple(
        t if k == "w" else t.movedim(0, -2).flatten(-3, -2)
        for k, t in zip(gives, found, strict=True)
    )
