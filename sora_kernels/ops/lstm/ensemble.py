"""Layers with an axis of members before all their tensors, or with rows of several members in one batch: what
``members.py`` runs once every transform has been taken in.

Members with weights of their own are one launch where ``resident.py`` takes them, and else run one by one through
the registered ops. Rows of several members (groups) are one call of the layer as ever; for the gradient of the weights
of each, the chain over time is one call too, and the products after it are one GEMM a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only

from ... import _env
from ..._dispatch import BackendError
from ..common.gradient import Pair, Tensors
from ..common.schema import has_memory
from . import ensemble_cpu, native, resident, steps
from .arguments import operator_of
from .backends import CHOSEN, OPERATORS
from .cells import GRU, Cell
from .pointers import all_pointable, pointable
from .precision import settled
from .products import Chain

ROWS = {".": -2, "l": -1, "r": -1}  # where members' rows go, of a kind of tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of one cell, as ``op.Layer`` sets it up.

    The kinds of its tensors: "." features of rows or states, their last axis but one counts the batch (or
    a packed batch's rows); "s" batch_sizes; "l" lengths and "r" reset, whose last axis does; "w" a weight.
    """

    cell: Cell
    pair: Pair
    with_cells: bool
    select: Callable[..., Any]  # op.Layer._select

    @property
    def num_outputs(self) -> int:
        return self.pair.num_outputs

    @property
    def rows_at(self) -> int:
        """Where batch_sizes, lengths and reset are among the tensors."""
        return 2 + self.cell.has_c

    @property
    def tapes_count(self) -> int:
        return 1 + self.cell.has_c + (self.cell.tape > 0)

    def kinds(self, tensors: Tensors) -> str:
        return "." * self.rows_at + "slr" + "w" * (len(tensors) - self.rows_at - 3)

    def inputs_of(self, given: Tensors) -> Tensors:
        """Of gradients of outputs, tensors and tapes."""
        return given[self.num_outputs : len(given) - self.tapes_count]

    def kinds_of_backward(self, given: Tensors) -> str:
        return "." * self.num_outputs + self.kinds(self.inputs_of(given)) + "." * self.tapes_count

    def parts(self, tensors: Tensors) -> Any:
        """x, h0, c0, weights, batch_sizes, lengths, reset: as an implementation takes them."""
        at = self.rows_at
        x, h0, c0 = (*tensors[:at], None)[:3]
        return (x, h0, c0, tensors[at + 3 :], *tensors[at : at + 3])

    def takes(self, tensors: Tensors, flags: tuple, backend: str, grad: bool) -> bool:
        """Whether a backend other than the reference runs this."""
        x, _, _, weights, batch_sizes, *_ = self.parts(tensors)
        if x.device.type not in ("cpu", "cuda"):
            return False
        if batch_sizes is not None and is_functorch_wrapped_tensor(batch_sizes):
            return False
        if x.device.type == "cpu" and not self._requested(backend):
            # The reference's time is its steps', and ours at first what torch.func does around a Function.
            steps = (x if batch_sizes is None else batch_sizes).shape[0]
            if steps < (6 if weights[1].shape[0] < 64 * self.cell.gates else 4):
                return False
        impl = self.impl(backend, tensors, flags, grad)
        return impl is not None and impl is not CHOSEN["=reference"]

    def chains(self, tensors: Tensors, flags: tuple, backend: str) -> bool:
        """Whether the native kernels may run this past the registered ops, chain and products apart."""
        plain = 4 if flags[0] else 2
        return (
            self._requested(backend) in ("", "native")
            and len(tensors) - self.rows_at - 3 in (plain, 2 * plain)  # no projection
            and has_memory(*tensors)
            and self.impl("native", tensors, flags, True) is not None
        )

    def _requested(self, backend: str) -> str:
        name = operator_of(self.cell)
        return backend or _env.requested_backend(name, OPERATORS[name].backends)

    def impl(self, backend: str, tensors: Tensors, flags: tuple, grad: bool) -> Any:
        (bias, precision, recompute), cell = flags, self.cell
        x, h0, _, weights, *rows = self.parts(tensors)
        tapes = self.with_cells or (grad and not recompute and cell.tape > 0)
        try:
            return self.select(
                backend, tapes, grad, x, h0, weights, *rows, False, recompute, bias, precision
            )
        except BackendError:
            return None


@dataclass(frozen=True, eq=False)
class Call:
    """What a call is, beside its tensors.

    Attributes:
        flags: bias, precision, recompute.
        tapes: whether a backward pass may come that wants them.
        packed: whether there are batch_sizes, and so one axis for the rows of all steps.
        members: length of the first axis of each tensor; 0 if there is none. batch_sizes has none; lengths
            and reset have it, or are common.
        groups: of a backward pass: row b belongs to group b % groups, and weights' gradients have an axis of groups
            before their own; 0 for one sum.
        needs: of a backward pass: for each tensor, whether its gradient is wanted.
    """

    layer: Layer
    flags: tuple[bool, str, bool]
    backend: str
    tapes: bool
    packed: bool
    members: int = 0
    groups: int = 0
    needs: tuple[bool, ...] = ()

    def has_members(self, kind: str, t: Tensor, beside: int = 0) -> bool:
        """Whether ``t`` has the axis of members; it has ``beside`` others that are not a layer's."""
        if kind in "lr":
            return t.dim() - beside > (1 if kind == "l" or self.packed else 2)
        return self.members > 0 and kind != "s"


def forward(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """Outputs, then tapes."""
    layer = call.layer
    if not call.members:
        return _there(layer.pair.forward(tensors, call.flags, call.tapes, call.backend))
    bias, precision, recompute = call.flags
    tapes = layer.with_cells or (call.tapes and not recompute)
    x, *rest = layer.parts(tensors)
    args: Any = (layer.cell, x, *rest, bias, tapes)
    with settled(x, precision):
        way = _together(call, tensors)
        if way is resident:
            return _there(resident.forward(*(*args, call.members)))
        if way is ensemble_cpu:
            return _there(ensemble_cpu.forward(*args))
        return _one_by_one(call, layer.kinds(tensors), tensors, forward)


def backward(call: Call, given: Tensors) -> tuple[Tensor, ...]:
    """The gradients that are wanted, from those of the outputs, the tensors and the tapes."""
    layer, cell, needs = call.layer, call.layer.cell, call.needs
    inputs, at = layer.inputs_of(given), layer.rows_at
    bias, precision, _ = call.flags
    x, _, _, weights, *_ = layer.parts(inputs)
    with settled(x, precision):
        run = _chain(call, inputs)
        if run is None and call.members:
            return _one_by_one(call, layer.kinds_of_backward(given), given, backward)
        if run is None:
            return _by_op(call, given)
        needed = (*needs[:at], *needs[at + 3 :])
        dy, dh_n, dc_n, dcells = (*given[: layer.num_outputs], None, None)[:4]
        y, *tapes = given[len(given) - layer.tapes_count :]
        cells, gates = (tapes[0] if cell.has_c else None), (tapes[-1] if tapes else None)
        chain = run(
            cell, dy, dh_n, dc_n, dcells, *layer.parts(inputs), y, cells, gates, bias, needed
        )
        dx, dweights = chain.gradients(weights, bias, needed, call.groups)
    found = (None if dx is None else dx.view(x.shape), chain.dh0, chain.dc0)
    every = (*found[:at], None, None, None, *dweights)
    return _there(g for g, need in zip(every, needs, strict=True) if need)


def _there(found: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(t for t in found if t is not None)


def _member(call: Call, kind: str, t: Tensor | None, m: int) -> Tensor | None:
    return t[m] if t is not None and call.has_members(kind, t) else t


def _one_by_one(
    call: Call, kinds: str, tensors: Tensors, run: Callable[[Call, Tensors], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    alone = replace(call, members=0)
    each = [
        run(alone, [_member(call, k, t, m) for k, t in zip(kinds, tensors, strict=True)])
        for m in range(call.members)
    ]
    return tuple(torch.stack(of_all) for of_all in zip(*each, strict=True))


def _by_op(call: Call, given: Tensors) -> tuple[Tensor, ...]:
    """``backward`` without an axis of members, through the registered op."""
    layer, needs = call.layer, call.needs
    of_weights = needs[layer.rows_at + 3 :]
    if call.groups and any(of_weights):
        return _group_by_group(call, given)
    # The kernels leave tapes without gaps, and read them so; a rule of vmap may have moved axes.
    at = len(given) - layer.tapes_count
    tapes = [t if t is None else t.contiguous() for t in given[at:]]
    grads, inputs = given[: layer.num_outputs], given[layer.num_outputs : at]
    found = layer.pair.backward(grads, [*inputs, *tapes], needs, call.flags, call.backend)
    return _there(g for g, need in zip(found, needs, strict=True) if need)


def by_group(kind: str, t: Tensor | None, groups: int) -> Tensor | None:
    """``t`` with groups as an axis of their own, behind the batch."""
    if t is None or kind == "w":
        return t
    if kind == "s":
        return t // groups
    at = ROWS[kind]
    return t.unflatten(at, (t.shape[at] // groups, groups))


def _group_by_group(call: Call, given: Tensors) -> tuple[Tensor, ...]:
    alone, kinds = replace(call, groups=0), call.layer.kinds_of_backward(given)
    split = [by_group(k, t, call.groups) for k, t in zip(kinds, given, strict=True)]
    each = [
        backward(
            alone,
            [
                t if t is None or k in "sw" else t.select(ROWS[k], g)
                for k, t in zip(kinds, split, strict=True)
            ],
        )
        for g in range(call.groups)
    ]
    gives = zip(call.layer.kinds(call.layer.inputs_of(given)), call.needs, strict=True)
    return tuple(
        torch.stack(of_all) if kind == "w" else torch.stack(of_all, -2).flatten(-3, -2)
        for kind, of_all in zip(
            (k for k, need in gives if need), zip(*each, strict=True), strict=True
        )
    )


def _together(call: Call, tensors: Tensors) -> Any:
    """What runs all members at once: ``resident``, ``ensemble_cpu``, or None."""
    layer, (x, _, _, weights, _, lengths, reset) = call.layer, call.layer.parts(tensors)
    if any(t is not None and call.has_members(k, t) for k, t in (("l", lengths), ("r", reset))):
        return None
    alone = [_member(call, k, t, 0) for k, t in zip(layer.kinds(tensors), tensors, strict=True)]
    if not layer.chains(alone, call.flags, call.backend):
        return None
    if _resident(call, x, weights):
        return resident
    own_x, _, _, own, sizes, lengths, reset = layer.parts(alone)
    if not x.is_cpu:
        return None
    if native.walks_steps(layer.cell, own_x, own, sizes, lengths, reset, call.flags[0]):
        return None
    # Without tapes oneDNN may be faster; backends.py has where.
    torchs = not call.needs and layer.impl(call.backend, alone, call.flags, call.tapes)
    return None if torchs is CHOSEN["=torch"] else ensemble_cpu


def _resident(call: Call, x: Tensor, weights: Sequence[Tensor]) -> bool:
    some = x.shape[1 if call.members else 0 : -1].numel() > 0
    return some and resident.takes(x, weights[1].shape[-1], call.members)


def _chain(call: Call, tensors: Tensors) -> Callable[..., Chain] | None:
    """What walks the steps of backward apart from its products: of all members at once, or where each group of
    rows wants gradients of the weights. None where the registered op is to be called.
    """
    layer, cell, bias = call.layer, call.layer.cell, call.flags[0]
    x, _, _, weights, batch_sizes, lengths, reset = layer.parts(tensors)
    if call.members:
        way = _together(call, tensors)
        if way is resident:
            return partial(resident.chain, members=call.members)
        return None if way is None else way.chain
    if not call.groups or not any(call.needs[layer.rows_at + 3 :]):
        return None
    if not layer.chains(tensors, call.flags, call.backend):
        return None
    if _resident(call, x, weights):
        return resident.chain
    if native.walks_steps(cell, x, weights, batch_sizes, lengths, reset, bias):
        return _chain_of_steps
    return _chain_of_one


def _chain_of_one(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> Chain:  # fmt: skip
    """``ensemble_cpu.chain`` without an axis of members."""

    given = (dy, dh_n, dc_n, dcells, x, h0, c0)
    arguments: Any = (
        cell, *map(_as_member, given), list(map(_as_member, weights)), batch_sizes, lengths, reset,
        *map(_as_member, (y, cells, gates)), bias, needs,
    )  # fmt: skip
    return tree_map_only(Tensor, lambda t: t.squeeze(0), ensemble_cpu.chain(*arguments))


def _as_member(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.unsqueeze(0)


def _chain_of_steps(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> Chain:  # fmt: skip
    """``steps.backward`` up to its products."""
    h0, c0, dy, dh_n, dc_n = (pointable(x, t) for t in (h0, c0, dy, dh_n, dc_n))
    weights, y, gates = all_pointable(x, weights), y.contiguous(), pointable(x, gates)
    per, H = 4 if bias else 2, weights[1].shape[1]
    walk = steps.Walk.of(cell, x, h0, H, batch_sizes, lengths, reset)
    h_prev = [walk.previous_states(d, y, h0) for d in range(len(weights) // per)]
    if cell.tape and gates is None:
        cells, gates = steps.tapes_again(walk, x, c0, weights, bias, h_prev)
    if cells is not None:
        cells, dcells = cells.contiguous(), pointable(cells, dcells)
    dgates, dh0, dc0 = steps.walk_back(
        walk, dy, dh_n, dc_n, dcells, c0, weights[1::per], y, h_prev, cells, gates, needs[1]
    )
    if walk.lengths is not None:
        live = torch.arange(walk.T, device=x.device)[:, None] < walk.lengths
        x = torch.where(live[..., None], x, 0)
    flat = x if walk.sizes is not None else x.flatten(0, 1)
    own = dgates.unbind(0)
    if cell is not GRU:
        return Chain([(g,) for g in own], [(g,) for g in own], h_prev, flat, dh0, dc0)
    # Its gates are n, r, z, and what n is of W_hh h.
    of_x = [(g[:, H : 3 * H], g[:, :H]) for g in own]
    return Chain(of_x, [(g[:, H:],) for g in own], h_prev, flat, dh0, dc0)
