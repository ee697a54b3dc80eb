"""What ``LSTM``, ``GRU`` and ``RNN`` share: torch's checks and packing around one call of the stack."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from ..ops.lstm import stack
from ..ops.lstm.arguments import States, autocast, operator_of, validate
from ..ops.lstm.backends import OPERATORS
from ..ops.lstm.cells import CELLS, Cell
from ..ops.lstm.int8 import Int8Cache

_CELLS = {name.upper(): cell for name, cell in CELLS.items()}  # by nn.RNNBase.mode

R = TypeVar("R", bound="Recurrent")


class Recurrent(nn.RNNBase):
    """Base of the drop-ins; subclasses name torch's class and have the public signatures.

    ``nn.RNNBase`` owns the parameters, their names and initialisation, pickling and repr. It is the
    base rather than ``nn.LSTM`` because Dynamo refuses every subclass of torch's three.
    """

    torch_class: ClassVar[type[nn.RNNBase]]

    # Defaults for modules that were pickled before the option existed.
    backend: str | None = None
    memory: str = "save"
    int8: bool = False

    def __init__(
        self, mode: str, *args: Any, backend: str | None, memory: str, int8: bool, **kwargs: Any
    ) -> None:
        OPERATORS[operator_of(_CELLS[mode])].check_name(backend)
        if memory not in ("save", "recompute"):
            raise ValueError(f"memory must be 'save' or 'recompute', got {memory!r}")
        super().__init__(mode, *args, **kwargs)
        self.backend = backend
        self.memory = memory
        self.int8 = int8
        self._int8_weights = Int8Cache()
        self._shapes: tuple[Any, list[torch.Size]] = (None, [])
        self._weight_shapes()  # not first in a graph, which would guard on what it finds

    @classmethod
    def from_torch(
        cls: type[R],
        module: Any,
        *,
        backend: str | None = None,
        memory: str = "save",
        int8: bool = False,
    ) -> R:
        """The same layer over the same Parameter objects."""
        expected = cls.torch_class
        if not isinstance(module, expected):
            raise TypeError(
                f"module: expected torch.nn.{expected.__name__}, got {type(module).__name__}"
            )
        new: Any = cls(
            **_arguments(module), device="meta", backend=backend, memory=memory, int8=int8
        )
        return _share(new, module)

    def to_torch(self) -> Any:
        """Torch's module over the same Parameter objects, for tools that look for its class."""
        return _share(self.torch_class(**_arguments(self), device="meta"), self)

    def extra_repr(self) -> str:
        options = [
            f", {name}={getattr(self, name)!r}"
            for name in ("backend", "memory", "int8")
            if getattr(self, name) != getattr(Recurrent, name)
        ]
        return super().extra_repr() + "".join(options)

    def _run(
        self,
        input: Any,
        hx: Any,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> Any:
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths, reset, return_cells)
        cell = _CELLS[self.mode]
        rank = input.dim()
        if rank != 3 and rank != 2:
            noun = " tensor" if cell.gates == 1 else ""
            name = self.mode.partition("_")[0]
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}D{noun} instead")
        states = hx if cell.has_c or hx is None else (hx,)
        if states is not None:
            self._check_rank(cell, rank, states)
        if rank == 3:
            y, states, cells = self._dense(cell, input, states, lengths, reset, return_cells)
        else:
            axis = 0 if self.batch_first else 1
            y, states, cells = self._dense(
                cell,
                input.unsqueeze(axis),
                None if states is None else tuple(s.unsqueeze(1) for s in states),
                None if lengths is None else lengths.unsqueeze(0),
                None if reset is None else reset.unsqueeze(axis),
                return_cells,
            )
            y, states = y.squeeze(axis), tuple(s.squeeze(1) for s in states)
            cells = None if cells is None else cells.squeeze(axis)
        hidden = states if cell.has_c else states[0]
        return (y, hidden, cells) if return_cells else (y, hidden)

    def _dense(
        self,
        cell: Cell,
        x: Tensor,
        states: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_cells: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        weights = self._weights()
        if torch._C._is_any_autocast_enabled():
            x, states, weights = _autocast(cell, x, states, weights, False)
        self._check_input(x, weights)
        steps, batch = x.shape[:2]
        if self.batch_first:
            steps, batch = batch, steps
        if states is not None:
            self._check_states(cell, x, states, batch)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None or reset is not None:
            validate(
                cell, x, states, weights, self.bias, self.num_layers, self.bidirectional,
                self.batch_first, self.proj_size, self.dropout, lengths, reset, self.memory, None,
            )  # fmt: skip
        return stack.run(
            cell, x, states, weights, self.bias, self.num_layers, self.bidirectional,
            self.batch_first, self.proj_size, self.dropout, self.training, lengths=lengths,
            reset=reset, return_cells=return_cells, memory=self.memory, backend=self._backend(cell),
            int8=self._int8_weights if self.int8 else None,
        )  # fmt: skip

    def _packed(
        self,
        input: PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_cells: bool,
    ) -> Any:
        cell = _CELLS[self.mode]
        for name, given in (("lengths", lengths), ("reset", reset)):
            if given is not None:
                raise ValueError(
                    f"{cell.name}: {name} must be None with a PackedSequence, got a tensor"
                )
        data, batch_sizes, order, back = input
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        weights = self._weights()
        states = hx if cell.has_c or hx is None else (hx,)
        batch = _batch_of_graph(order, states) if is_compiling() else None
        batch = int(batch_sizes[0]) if batch is None else batch
        if torch._C._is_any_autocast_enabled():
            data, states, weights = _autocast(cell, data, states, weights, True)
        self._check_input(data, weights)
        if states is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            sizes = self._state_sizes(cell)
            states = tuple(data.new_zeros(count, batch, size) for size in sizes)
        else:
            self._check_states(cell, data, states, batch)
            if order is not None:
                states = tuple(s.index_select(1, order) for s in states)
        y, states, cells = stack.run(
            cell, data, states, weights, self.bias, self.num_layers, self.bidirectional,
            False, self.proj_size, self.dropout, self.training, batch_sizes=batch_sizes,
            return_cells=return_cells, memory=self.memory, backend=self._backend(cell),
            int8=self._int8_weights if self.int8 else None,
        )  # fmt: skip
        if back is not None:
            states = tuple(s.index_select(1, back) for s in states)
        hidden = states if cell.has_c else states[0]
        result = PackedSequence(y, batch_sizes, order, back)
        if cells is None:
            return result, hidden
        return result, hidden, PackedSequence(cells, batch_sizes, order, back)

    def _backend(self, cell: Cell) -> str:
        chosen = self.backend
        return OPERATORS[operator_of(cell)].check_name(chosen) if chosen else ""

    def __getstate__(self) -> dict[str, Any]:
        # What is packed for this machine's kernels stays here.
        return super().__getstate__() | {"_int8_weights": Int8Cache()}

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__({"_int8_weights": Int8Cache()} | d)

    def _weights(self) -> list[Tensor]:
        # The dict of parameters is five times faster than getattr, and functional_call writes
        # there; parametrised, pruned and replicated weights are attributes alone.
        parameters: Any = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]

    def _weight_shapes(self) -> list[torch.Size]:
        """By the sizes as they are: pruning writes smaller ones."""
        sizes = self.input_size, self.hidden_size, self.proj_size
        if self._shapes[0] != sizes:
            I, H, P = sizes  # noqa: E741
            rows = _CELLS[self.mode].gates * H
            found: list[tuple[int, ...]] = []
            for layer in range(self.num_layers):
                for _ in range(2 if self.bidirectional else 1):
                    width = (P or H) * (2 if self.bidirectional else 1) if layer else I
                    found += [(rows, width), (rows, P or H)]
                    found += [(rows,), (rows,)] if self.bias else []
                    found += [(P, H)] if P else []
            self._shapes = sizes, [torch.Size(shape) for shape in found]
        return self._shapes[1]

    def _state_sizes(self, cell: Cell) -> tuple[int, ...]:
        output = self.proj_size or self.hidden_size
        return (output, self.hidden_size) if cell.has_c else (output,)

    # Torch's own errors, in its order and words.

    @staticmethod
    def _check_rank(cell: Cell, rank: int, states: Any) -> None:
        if cell.has_c:
            h, c = states[0].dim(), states[1].dim()
            if len(states) != 2:
                raise RuntimeError("lstm expects two hidden states")
            if h == rank and c == rank:
                return
            both, got = "hx and cx should also be", f"({h}-D, {c}-D) tensors"
        else:
            h = states[0].dim()
            if h == rank:
                return
            both, got = "hx should also be", f"{h}-D tensor"
        kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
        raise RuntimeError(f"For {kind} input, {both} {rank}-D but got {got}")

    def _check_input(self, x: Tensor, weights: list[Tensor]) -> None:
        dtype, device, first = x.dtype, x.device, weights[0]
        if first is None:
            raise self._misfit(x, weights)
        if dtype != first.dtype:
            raise ValueError(
                f"RNN input dtype ({dtype}) does not match weight dtype ({first.dtype}). "
                f"Convert input: input.to({first.dtype}), or convert model: model.to({dtype})"
            )
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {x.shape[-1]}"
            )
        if device != first.device:
            raise self._misplaced(x, first)
        for w, shape in zip(weights, self._weight_shapes(), strict=True):
            if w is None or w.shape != shape or w.dtype is not dtype or w.device != device:
                raise self._misfit(x, weights)

    def _misfit(self, x: Tensor, weights: list[Tensor]) -> Exception:
        """For a weight that was assigned, and is not what the constructor made."""
        own = zip(self._flat_weights_names, weights, self._weight_shapes(), strict=True)
        for name, w, shape in own:
            if w is None:
                return TypeError(f"{name}: expected a tensor, got None")
            if w.shape != shape:
                return RuntimeError(f"Expected {name} size {tuple(shape)}, got {list(w.shape)}")
            if w.device != x.device:
                return self._misplaced(x, w)
            if w.dtype != x.dtype:
                break
        return RuntimeError(
            "Input and parameter tensors are not the same dtype, found input tensor with "
            f"{x.dtype} and parameter tensor with {w.dtype}"
        )

    @staticmethod
    def _misplaced(x: Tensor, weight: Tensor) -> Exception:
        return RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{x.device} and parameter tensor at {weight.device}"
        )

    def _check_states(self, cell: Cell, x: Tensor, states: Any, batch: int) -> None:
        count = self.num_layers * (2 if self.bidirectional else 1)
        for k, size in enumerate(self._state_sizes(cell)):
            state = states[k]
            if state.shape != (count, batch, size):
                which = f"hidden[{k}]" if cell.has_c else "hidden"
                raise RuntimeError(
                    f"Expected {which} size {(count, batch, size)}, got {list(state.shape)}"
                )
            if state.device != x.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, found input tensor at "
                    f"{x.device} and hidden tensor at {state.device}"
                )
            if state.dtype != x.dtype:
                raise RuntimeError(
                    "Input and hidden tensors are not the same dtype, found input tensor with "
                    f"{x.dtype} and hidden tensor with {state.dtype}"
                )


def _batch_of_graph(order: Tensor | None, states: States) -> int | None:
    """B as a shape, where there is one: a graph had better not read a size from a tensor's value."""
    if order is not None:
        return order.shape[0]
    return None if states is None else states[0].shape[1]


def _autocast(
    cell: Cell, x: Tensor, states: States, weights: Any, packed: bool
) -> tuple[Tensor, States, Any]:
    """Torch's casts. On the CPU it casts single products of GRU and of packed LSTM, which come out in
    the dtype of the states.
    """
    x, states, weights = autocast(cell, x, states, weights, packed)
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return x, states, weights
    dtype = (x if states is None else states[0]).dtype
    states = None if states is None else tuple(s.to(dtype) for s in states)
    return x.to(dtype), states, [w.to(dtype) for w in weights]


def refuse_projection(proj_size: Any) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _arguments(module: nn.RNNBase) -> dict[str, Any]:
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional"]
    if module.mode == "LSTM":
        names.append("proj_size")
    found = {name: getattr(module, name) for name in names}
    if module.mode.startswith("RNN"):
        found["nonlinearity"] = module.mode[4:].lower()
    return found


def _share(new: Any, module: nn.RNNBase) -> Any:
    new.dropout = module.dropout  # not by the constructor, which would warn again
    for name in module._flat_weights_names:
        weight = getattr(module, name)
        if not isinstance(weight, nn.Parameter):
            raise TypeError(
                f"{name}: expected a Parameter, got a parametrised {type(weight).__name__}"
            )
        setattr(new, name, weight)
    return new.train(module.training)
