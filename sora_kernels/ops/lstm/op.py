"""``lstm``, ``gru``, ``rnn``: backends and their order; one layer of each cell as a registered op."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._dispatch import YES, Backend, Operator, Verdict, no
from ..common.gradient import Pair, Tensors, differentiable
from ..common.schema import register
from . import native, reference, stock
from .arguments import Sizes, States, autocast, operator_of
from .cells import CELLS, Cell


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    cell: str
    device: torch.device
    dtype: torch.dtype
    steps: int
    batch: int
    hidden_size: int
    proj_size: int
    directions: int
    grad: bool
    tapes: bool  # the call is the registered op's and a backward op will want what it saves
    ragged: bool  # lengths were given, or x is packed
    reset: bool
    cells: bool
    recompute: bool
    precision: str


_HAS_CELLS = "cell" in inspect.signature(native.forward).parameters


def _native_can_run(facts: Facts) -> Verdict:
    if not _HAS_CELLS:
        return no("the native kernels are being rewritten")
    kind = facts.device.type
    if kind == "cpu":
        if facts.dtype not in native.CPU_DTYPES:
            return no(
                f"x is {facts.dtype} on the CPU; the native kernels take fp32, fp64 and bf16 there"
            )
        status = _native.status()
        return YES if status.ok else no(status.why)
    if kind != "cuda":
        return no(f"x is on {facts.device}; the native kernels run on the CPU and on CUDA")
    if facts.cell != "lstm":
        return no(f"the cell is {facts.cell}; the native CUDA kernels are LSTM's alone")
    if facts.ragged:
        return no("lengths were given or x is packed; the native CUDA kernels take even rows")
    if facts.reset:
        return no("reset was given; the native CUDA kernels do not reset")
    if facts.proj_size:
        return no(f"proj_size is {facts.proj_size}; the native CUDA kernels have no projection")
    if facts.dtype not in native.DTYPE_CODES:
        return no(f"x is {facts.dtype}; the native kernels take fp16, bf16, fp32 and fp64")
    status = _native.cuda_status()
    return YES if status.ok else no(status.why)


def _torch_can_run(facts: Facts) -> Verdict:
    if facts.tapes:
        return no(
            "torch's layer keeps no gates for a backward op, so a compiled training step cannot "
            "use it with memory='save'"
        )
    if facts.reset:
        return no("reset was given; torch's layer cannot reset")
    if facts.cells:
        return no("return_cells is True; torch's layer returns the last cell state alone")
    if facts.precision and facts.device.type == "cuda":
        return no(
            f"precision is {facts.precision!r}; torch's layer follows torch.backends.cudnn alone"
        )
    return YES


class _TorchFrom(NamedTuple):
    """Where oneDNN's blocked GEMM has enough rows to win on the CPU, even rows only."""

    batch: int
    batch_grad: int
    hidden_size: int


_TORCH_FROM = {
    ("lstm", torch.float32): _TorchFrom(batch=9, batch_grad=17, hidden_size=33),
    ("lstm", torch.bfloat16): _TorchFrom(batch=0, batch_grad=0, hidden_size=0),
}
_NATIVE_FIRST = ("native", "torch", "reference")
_TORCH_FIRST = ("torch", "native", "reference")


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md has the measurements behind each line."""
    if facts.device.type != "cpu":
        # cuDNN's loop over steps is never slower than ours, but it is not bitwise repeatable.
        return _NATIVE_FIRST if torch.are_deterministic_algorithms_enabled() else _TORCH_FIRST
    start = _TORCH_FROM.get((facts.cell, facts.dtype))
    if start is None or facts.ragged or facts.proj_size or (facts.recompute and facts.grad):
        return _NATIVE_FIRST  # torch runs those step by step
    if facts.hidden_size < start.hidden_size:
        return _NATIVE_FIRST
    if facts.batch < (start.batch_grad if facts.grad else start.batch):
        return _NATIVE_FIRST
    if facts.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return _NATIVE_FIRST  # neither has dot products of bf16
    return _TORCH_FIRST


class _Reference:
    forward = staticmethod(reference.layer)

    @staticmethod
    def backward(*args: Any) -> Any:
        return reference.layer_backward(*args[:-1])  # every gradient, whatever is needed


_IMPLS: dict[str, Any] = {"native": native, "torch": stock, "reference": _Reference}
# A backend's name as stack.py hands it on after asking about this very call: the op need not ask again.
_CHOSEN = {f"={name}": impl for name, impl in _IMPLS.items()}


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of one layer's forward pass: w_hh once, gates in (out if kept), y out."""
    H, D, cell = facts.hidden_size, facts.directions, CELLS[facts.cell]
    kept = cell.tape if facts.grad and not facts.recompute else 0
    rows = facts.steps * facts.batch * D
    values = cell.gates * H * (facts.proj_size or H) * D + rows * (cell.gates + kept + 1) * H
    return values * facts.dtype.itemsize


def facts_of(
    cell: Cell, x: Tensor, hx: States, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    bidirectional: bool, proj_size: int, lengths: Tensor | None, reset: Tensor | None,
    return_cells: bool, memory: str, precision: str | None,
) -> Facts:  # fmt: skip
    """Of a call of all layers; x is time first or packed."""
    sizes = x.shape
    if batch_sizes is None:
        steps, batch = sizes[0], sizes[1]
    else:
        assert hx is not None
        steps, batch = batch_sizes.shape[0], hx[0].shape[1]
    return Facts(
        cell.name, x.device, x.dtype, steps, batch, weights[1].shape[0] // cell.gates, proj_size,
        2 if bidirectional else 1, torch.is_grad_enabled() and _wants_grad(x, hx, weights), False,
        lengths is not None or batch_sizes is not None, reset is not None, return_cells,
        memory == "recompute", precision or "",
    )  # fmt: skip


def _wants_grad(x: Tensor, hx: States, weights: Sequence[Tensor]) -> bool:
    if x.requires_grad:
        return True
    for w in weights:
        if w.requires_grad:
            return True
    return hx is not None and any(t.requires_grad for t in hx)


def _operator(name: str) -> Operator:
    def facts(
        x: Tensor, hx: Any, weights: Sequence[Tensor], *, nonlinearity: str = "tanh",
        bidirectional: bool = False, batch_first: bool = False, proj_size: int = 0,
        lengths: Tensor | None = None, reset: Tensor | None = None, return_cells: bool = False,
        memory: str = "save", precision: str | None = None, **_: Any,
    ) -> Facts:  # fmt: skip
        """The public function's arguments -> facts."""
        cell = CELLS[f"rnn_{nonlinearity}" if name == "rnn" else name]
        states = hx if cell.has_c or hx is None else (hx,)
        x, states, weights = autocast(cell, x, states, weights)
        return facts_of(
            cell, x.transpose(0, 1) if batch_first else x, states, weights, None, bidirectional,
            proj_size, lengths, reset, return_cells, memory, precision,
        )  # fmt: skip

    backends = [
        Backend("native", _native_can_run, native, floor_bytes=_floor_bytes),
        Backend("torch", _torch_can_run, stock, floor_bytes=_floor_bytes),
        Backend("reference", lambda facts: YES, _Reference),
    ]
    return Operator(name, backends, prefer=_prefer, facts=facts)


OPERATORS = {name: _operator(name) for name in ("lstm", "gru", "rnn")}


@contextlib.contextmanager
def _settled(x: Tensor, precision: str) -> Iterator[None]:
    """No autocast, which would cast single GEMMs of a layer whose dtype is settled, and torch's GEMM
    flag for this call. The flag is global: other threads see it meanwhile.
    """
    switches = precision and x.is_cuda and x.dtype == torch.float32
    was = torch.backends.cuda.matmul.allow_tf32 if switches else False
    with contextlib.ExitStack() as stack:
        if torch._C._is_any_autocast_enabled() and not x.is_meta:
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if switches:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            yield
        finally:
            if switches:
                torch.backends.cuda.matmul.allow_tf32 = was


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
        self.call, self.infer = self._pair(False)
        if cell.has_c:
            self.call_with_cells, self.infer_with_cells = self._pair(True)

    def _define(self, name: str, inputs: str, results: str, impl: Any) -> Any:
        """Registers an op whose ``impl`` takes and gives everything that any cell has."""
        has = [entry.split()[1] not in self.lacks for entry in inputs.split(", ")]
        gives = [entry.split()[1] not in self.lacks for entry in results.split(", ")]
        position = itertools.count()
        # The last of what this picks from is None, for every argument that the cell has not.
        widen = itemgetter(*(next(position) if here else -1 for here in has))
        narrow = itemgetter(*(k for k, here in enumerate(gives) if here))
        fake = self._backward_fake if impl == self._backward else self._forward_fake

        def run(*args: Any) -> Any:
            return narrow(impl(*widen((*args, None))))

        def run_fake(*args: Any) -> Any:
            return narrow(fake(*widen((*args, None))))

        texts = (
            ", ".join(itertools.compress(text.split(", "), kept))
            for text, kept in ((inputs, has), (results, gives))
        )
        return register("{}({}) -> ({})".format(name, *texts), run, run_fake)

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
            precision,
        )  # fmt: skip
        return self.operator.select(backend, facts).impl

    def _forward(
        self, tapes, x, h0, c0, weights, batch_sizes, lengths, reset, bias, precision, backend
    ):  # fmt: skip
        impl = _CHOSEN.get(backend) or self._select(
            backend, tapes, tapes, x, h0, weights, batch_sizes, lengths, reset, False, False, bias,
            precision,
        )  # fmt: skip
        args = (self.cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias, tapes)
        if precision or torch._C._is_any_autocast_enabled():
            with _settled(x, precision):
                return impl.forward(*args)
        return impl.forward(*args)

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
        impl = _CHOSEN.get(backend) or self._select(
            backend, not recompute, True, x, h0, weights, batch_sizes, lengths, reset,
            dcells is not None, recompute, bias, precision,
        )  # fmt: skip
        with _settled(x, precision):
            dx, dh0, dc0, dweights = impl.backward(
                self.cell, dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, lengths, reset,
                y, cells, gates, bias, needs,
            )  # fmt: skip
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

    def _pair(self, with_cells: bool) -> tuple[Any, Any]:
        """Calls with and without gradients."""
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

        def save(tensors: Tensors, results: Tensors, flags: tuple) -> Tensors:
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
            assert x is not None
            with _settled(x, flags[1]):
                found = reference.layer(
                    cell, x, h0, c0, tensors[weights_at:], *tensors[states + 1 : weights_at],  # type: ignore[arg-type]
                    flags[0], with_cells,
                )  # fmt: skip
            return found[:outputs]

        def recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
            inputs = saved[:-tapes_count]
            return definition(inputs, flags), inputs

        def infer(tensors: Tensors, flags: tuple, backend: str) -> Tensors:
            return forward(tensors, flags, False, backend)[:outputs]

        pair = Pair(forward, save, backward, definition, recompute, num_outputs=outputs)
        return differentiable(pair), infer


def _batch(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> int:
    if batch_sizes is None:
        return x.shape[1]
    if h0 is None:
        raise ValueError("h0: expected a tensor beside batch_sizes, got None")
    return h0.shape[1]


LAYERS = {name: Layer(cell) for name, cell in CELLS.items()}
