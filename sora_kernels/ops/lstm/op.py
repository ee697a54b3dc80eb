"""One layer of each cell as registered ops: schemas, implementations, gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..common.gradient import Pair, Tensors, differentiable
from ..common.lazy import Lazy
from ..common.schema import differentiate, register
from . import native, reference, stock
from .arguments import Sizes, operator_of
from .backends import CHOSEN, OPERATORS, Facts
from .cells import CELLS, Cell
from .int8 import Int8Weights
from .precision import resolved, settled

_members = Lazy(".members", __package__)

_CALL = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? reset, "
)
_FORWARD = _CALL + "bool bias, str precision, str backend"
_BACKWARD = (
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, "
    + _CALL
    + "Tensor y, Tensor? cells, Tensor? gates, bool bias, bool[] needs, str precision, str backend"
)
_RESULTS = "Tensor y, Tensor h_n, Tensor c_n"
_GRADIENTS = "Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights"


class Layer:
    """One layer of one cell: its registered ops, and calls of them with and without gradients.

    The ops are ``lstm``, ``lstm_fwd`` (with tapes) and ``lstm_bwd``, ``gru`` likewise; ``rnn_tanh``
    and ``rnn_relu`` have no tapes and so no ``_fwd``. What a cell has not is not in its schemas.

    ``call(tensors, flags, backend)`` returns y and the last states, ``call_with_cells`` c at every
    step too. Tensors: x, the states, batch_sizes, lengths, reset, then the weights. Flags: bias,
    precision, whether to recompute.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell, self.operator = cell, OPERATORS[operator_of(cell)]
        lacks = set() if cell.has_c else {"c0", "c_n", "dc_n", "dcells", "cells", "dc0"}
        self.lacks = lacks if cell.tape else {*lacks, "gates"}
        name, tapes = cell.name, _RESULTS + ", Tensor cells, Tensor gates"
        self.plain = self._define(name, _FORWARD, _RESULTS, partial(self._forward, False))
        self.fwd = self.plain
        if cell.tape:
            self.fwd = self._define(name + "_fwd", _FORWARD, tapes, partial(self._forward, True))
        self.bwd = self._define(name + "_bwd", _BACKWARD, _GRADIENTS, self._backward)
        self.call = self._pair(False)
        differentiate(name, self._call_as_op)
        if cell.has_c:
            self.call_with_cells = self._pair(True)

    def _define(self, name: str, inputs: str, results: str, impl: Any) -> Any:
        """Registers an op whose ``impl`` takes and gives everything that any cell has."""
        has = [entry.split()[1] not in self.lacks for entry in inputs.split(", ")]
        gives = [entry.split()[1] not in self.lacks for entry in results.split(", ")]
        narrow = itemgetter(*(k for k, here in enumerate(gives) if here))

        def given_all(function: Any) -> Any:
            if all(has):
                return function
            position = itertools.count()
            # The last of what this picks from is None, for every argument that the cell has not.
            pick = itemgetter(*(next(position) if here else -1 for here in has))
            return lambda *args: function(*pick((*args, None)))

        run = given_all(impl)
        fake = given_all(self._backward_fake if impl == self._backward else self._forward_fake)
        texts = (
            ", ".join(itertools.compress(text.split(", "), kept))
            for text, kept in ((inputs, has), (results, gives))
        )
        return register(
            "{}({}) -> ({})".format(name, *texts),
            lambda *args: narrow(run(*args)),
            lambda *args: narrow(fake(*args)),
        )

    def _select(
        self, backend: str, tapes: bool, grad: bool, x: Tensor, h0: Tensor | None,
        weights: Sequence[Tensor], batch_sizes: Tensor | None, lengths: Tensor | None,
        reset: Tensor | None, cells: bool, recompute: bool, bias: bool, precision: str,
    ) -> Any:  # fmt: skip
        """The implementation of one layer's call where stack.py has chosen none."""
        sizes = Sizes.of_layer(self.cell, weights, bias)
        steps = (x if batch_sizes is None else batch_sizes).shape[0]
        facts = Facts(
            self.cell.name, x.device, x.dtype, steps, _batch(x, h0, batch_sizes),
            sizes.hidden_size, sizes.proj_size, sizes.directions, grad, tapes,
            lengths is not None or batch_sizes is not None, reset is not None, cells, recompute,
            resolved(precision, x.device, x.dtype),
        )  # fmt: skip
        return self.operator.select(backend, facts).impl

    def _forward(
        self, tapes, x, h0, c0, weights, batch_sizes, lengths, reset, bias, precision, backend
    ):  # fmt: skip
        impl = CHOSEN.get(backend) or self._select(
            backend, tapes, tapes, x, h0, weights, batch_sizes, lengths, reset, False, False, bias,
            precision,
        )  # fmt: skip
        args = (self.cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias, tapes)
        if resolved(precision, x.device, x.dtype) or torch._C._is_any_autocast_enabled():
            with settled(x, precision):
                return impl.forward(*args)
        return impl.forward(*args)

    def int8(
        self, x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor],
        batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
        int8: Sequence[Int8Weights],
    ) -> Tensors:  # fmt: skip
        """y and the last states, without gradients, by int8 weights of each direction."""
        h0, c0 = (*states, None)[:2]
        with settled(x, ""):
            found = native.forward(
                self.cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias, False, int8
            )
        return found[: 1 + len(states)]

    def _forward_fake(
        self, x, h0, c0, weights, batch_sizes, lengths, reset, bias, precision, backend
    ):
        cell, sizes = self.cell, Sizes.of_layer(self.cell, weights, bias)
        B, (D, H, _), P = _batch(x, h0, batch_sizes), sizes, sizes.output_size
        rows, state = x.shape[:-1], reference.state_dtype(x.dtype)
        return (
            x.new_empty(*rows, D * P),
            x.new_empty(D, B, P),
            x.new_empty(D, B, H),
            x.new_empty(*rows, D * H, dtype=state),
            x.new_empty(D, *rows, cell.tape * H),
        )

    def _backward(
        self, dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, lengths, reset, y, cells,
        gates, bias, needs, precision, backend,
    ):  # fmt: skip
        recompute = gates is None
        impl = CHOSEN.get(backend) or self._select(
            backend, not recompute, True, x, h0, weights, batch_sizes, lengths, reset,
            dcells is not None, recompute, bias, precision,
        )  # fmt: skip
        args = (
            self.cell, dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, lengths, reset, y,
            cells, gates, bias, needs,
        )  # fmt: skip
        if resolved(precision, x.device, x.dtype) or torch._C._is_any_autocast_enabled():
            with settled(x, precision):
                dx, dh0, dc0, dweights = impl.backward(*args)
        else:
            dx, dh0, dc0, dweights = impl.backward(*args)
        states = (dh0, dc0) if self.cell.has_c else (dh0,)
        found = [
            g.contiguous() if need else x.new_empty(0)
            for g, need in zip((dx, *states, *dweights), needs, strict=True)
        ]
        return found[0], found[1], found[2], found[1 + len(states) :]

    def _backward_fake(
        self, dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, lengths, reset, y, cells,
        gates, bias, needs, precision, backend,
    ):  # fmt: skip
        sizes, B = Sizes.of_layer(self.cell, weights, bias), _batch(x, h0, batch_sizes)
        shapes = [x.shape, (sizes.directions, B, sizes.output_size)]
        if self.cell.has_c:
            shapes.append((sizes.directions, B, sizes.hidden_size))
        count = len(shapes)
        shapes += [w.shape for w in weights]
        found = [x.new_empty(s if n else (0,)) for s, n in zip(shapes, needs, strict=True)]
        return found[0], found[1], found[2], found[count:]

    def _call_as_op(self, *args: Any) -> Tensors:
        """``call`` on the arguments of the op without tapes."""
        states = 1 + self.cell.has_c
        x, h0, c0 = (*args[: 1 + states], None)[:3]
        weights, batch_sizes, lengths, reset, bias, precision, backend = args[1 + states :]
        rows = (batch_sizes, lengths, reset)
        if backend == "torch":  # whose layer has gradients of its own, and no tapes
            return stock.forward(self.cell, x, h0, c0, weights, *rows, bias, False)[: 1 + states]
        return self.call((*args[: 1 + states], *rows, *weights), (bias, precision, False), backend)

    def _pair(self, with_cells: bool) -> Callable[[Tensors, tuple, str], Tensors]:
        cell, plain, fwd, bwd = self.cell, self.plain, self.fwd, self.bwd
        states = 1 + cell.has_c
        outputs = 1 + states + with_cells
        weights_at = states + 4  # behind x, batch_sizes, lengths, reset
        tapes_count = 1 + cell.has_c + (cell.tape > 0)

        def forward(tensors: Tensors, flags: tuple, tapes: bool, backend: str) -> Tensors:
            bias, precision, recompute = flags
            run = fwd if with_cells or (tapes and not recompute) else plain
            return run(
                *tensors[: states + 1], list(tensors[weights_at:]),
                *tensors[states + 1 : weights_at], bias, precision, backend,
            )  # fmt: skip

        def save(tensors: Tensors, results: Tensors, flags: tuple, backend: str) -> Tensors:
            if flags[2] or not cell.tape:
                return (*tensors, results[0], *(None,) * (tapes_count - 1))
            return (*tensors, results[0], *results[1 + states :])

        def backward(
            grads: Tensors, saved: Tensors, needs: Sequence[bool], flags: tuple, backend: str
        ) -> Tensors:
            bias, precision, _ = flags
            if cell.has_c and not with_cells:
                grads = (*grads, None)
            inputs, tapes = saved[:-tapes_count], saved[-tapes_count:]
            *found, dweights = bwd(
                *grads, *inputs[: states + 1], list(inputs[weights_at:]),
                *inputs[states + 1 : weights_at], *tapes, bias,
                [*needs[: states + 1], *needs[weights_at:]], precision, backend,
            )  # fmt: skip
            return (*found, None, None, None, *dweights)

        def definition(tensors: Tensors, flags: tuple) -> Tensors:
            x, h0, c0 = (*tensors[: states + 1], None)[:3]
            batch_sizes, lengths, reset = tensors[states + 1 : weights_at]
            weights: Any = tensors[weights_at:]
            assert x is not None
            with settled(x, flags[1]):
                return reference.layer(
                    cell, x, h0, c0, weights, batch_sizes, lengths, reset, flags[0], with_cells
                )[:outputs]

        def recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
            inputs = saved[:-tapes_count]
            return definition(inputs, flags), inputs

        pair = Pair(forward, save, backward, definition, recompute, num_outputs=outputs)

        @cache
        def under_transforms() -> Callable[[Tensors, tuple, str], Tensors | None]:
            layer = _members.Layer(cell, pair, with_cells, self._select)
            return _members.under_transforms(layer)

        transformed = lambda *args: under_transforms()(*args)  # noqa: E731
        return differentiable(pair._replace(transformed=transformed))


def _batch(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> int:
    if batch_sizes is None:
        return x.shape[1]
    if h0 is None:
        raise ValueError("h0: expected a tensor beside batch_sizes, got None")
    return h0.shape[1]


LAYERS = {name: Layer(cell) for name, cell in CELLS.items()}
