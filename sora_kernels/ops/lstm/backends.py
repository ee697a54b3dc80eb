"""``lstm``, ``gru``, ``rnn``: the backends, what each can run, and which comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._dispatch import YES, Backend, Operator, Verdict, no
from . import native, reference, stock
from .arguments import States, autocast
from .cells import CELLS, Cell
from .int8 import MAX_BATCH


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


_CPU = torch.device("cpu")


def _on_cpu(facts: Facts) -> bool:
    # The name of a device is a string made anew, half a microsecond each time.
    return facts.device == _CPU or facts.device.type == "cpu"


def _native_can_run(facts: Facts) -> Verdict:
    if _on_cpu(facts):
        if facts.dtype not in native.CPU_DTYPES:
            return no(
                f"x is {facts.dtype} on the CPU; the native kernels take fp32, fp64 and bf16 there"
            )
        status = _native.status()
        return YES if status.ok else no(status.why)
    if facts.device.type != "cuda":
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


class _Region(NamedTuple):
    """CPU calls of at least so many rows, units and steps; of both kinds where a flag is None."""

    batch: int = 0
    hidden_size: int = 0
    steps: int = 0
    grad: bool | None = None
    ragged: bool | None = False

    def holds(self, facts: Facts) -> bool:
        return (
            facts.batch >= self.batch
            and facts.hidden_size >= self.hidden_size
            and facts.steps >= self.steps
            and (self.grad is None or facts.grad == self.grad)
            and (self.ragged is None or facts.ragged == self.ragged)
        )


# Where torch is faster on the CPU: oneDNN's blocked GEMM with enough rows to fill it. It takes LSTM
# on even rows alone; all else runs step by step there.
_TORCH_FASTER: dict[str, dict[torch.dtype, tuple[_Region, ...]]] = {
    "lstm": {
        torch.float32: (
            _Region(batch=9, hidden_size=33, grad=False),
            _Region(batch=17, hidden_size=33, grad=True),
        ),
    },
    "gru": {},
    "rnn_tanh": {},
    "rnn_relu": {},
}
if torch.cpu._is_avx512_bf16_supported():  # oneDNN has dot products of bf16 there, we have not
    _TORCH_FASTER["lstm"][torch.bfloat16] = (_Region(),)

_NATIVE_FIRST = ("native", "torch", "reference")
_TORCH_FIRST = ("torch", "native", "reference")


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md has the measurements behind each line."""
    if not _on_cpu(facts):
        # cuDNN's loop over steps is never slower than ours, but it is not bitwise repeatable.
        return _NATIVE_FIRST if torch.are_deterministic_algorithms_enabled() else _TORCH_FIRST
    for region in _TORCH_FASTER[facts.cell].get(facts.dtype, ()):
        if region.holds(facts):
            # Torch has no projections in oneDNN, and to recompute runs the whole layer again.
            again = facts.recompute and facts.grad
            return _NATIVE_FIRST if facts.proj_size or again else _TORCH_FIRST
    return _NATIVE_FIRST


def runs_int8(backend: str, facts: Facts) -> bool:
    """Whether a call of a module with ``int8=True`` goes by int8 weights."""
    return (
        backend in ("", "native")
        and not (facts.grad or facts.cells)
        and facts.batch <= MAX_BATCH
        and facts.dtype in (torch.float32, torch.bfloat16)
        and _on_cpu(facts)
        and _native.status().ok
    )


class _Reference:
    forward = staticmethod(reference.layer)

    @staticmethod
    def backward(*args: Any) -> Any:
        return reference.layer_backward(*args[:-1])  # every gradient, whatever is needed


_IMPLS: dict[str, Any] = {"native": native, "torch": stock, "reference": _Reference}
# A backend's name as stack.py hands it on after asking about this very call: the op need not ask again.
CHOSEN = {f"={name}": impl for name, impl in _IMPLS.items()}


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
        Backend("native", _native_can_run, _IMPLS["native"], floor_bytes=_floor_bytes),
        Backend("torch", _torch_can_run, _IMPLS["torch"], floor_bytes=_floor_bytes),
        Backend("reference", lambda facts: YES, _IMPLS["reference"]),
    ]
    return Operator(name, backends, prefer=_prefer, facts=facts)


OPERATORS = {name: _operator(name) for name in ("lstm", "gru", "rnn")}
