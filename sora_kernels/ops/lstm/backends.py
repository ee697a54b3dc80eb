"""``lstm``, ``gru``, ``rnn``: the backends, what each can run, and which comes first."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._dispatch import YES, Backend, Operator, Verdict, no
from . import native, reference, stock
from .arguments import States, autocast
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


_CPU = torch.device("cpu")


def _on_cpu(facts: Facts) -> bool:
    # The name of a device is a string made anew, half a microsecond each time.
    return facts.device == _CPU or facts.device.type == "cpu"


_HAS_CELLS = "cell" in inspect.signature(native.forward).parameters


def _native_can_run(facts: Facts) -> Verdict:
    if not _HAS_CELLS:
        return no("the native kernels are being rewritten")
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


class _TorchFrom(NamedTuple):
    """Where oneDNN's blocked GEMM has enough rows to win on the CPU, even rows only."""

    batch: int
    batch_grad: int
    hidden_size: int


_TORCH_FROM = {
    "lstm": {
        torch.float32: _TorchFrom(batch=9, batch_grad=17, hidden_size=33),
        torch.bfloat16: _TorchFrom(batch=0, batch_grad=0, hidden_size=0),
    },
}
_NATIVE_FIRST = ("native", "torch", "reference")
_TORCH_FIRST = ("torch", "native", "reference")


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md has the measurements behind each line."""
    if not _on_cpu(facts):
        # cuDNN's loop over steps is never slower than ours, but it is not bitwise repeatable.
        return _NATIVE_FIRST if torch.are_deterministic_algorithms_enabled() else _TORCH_FIRST
    start = _TORCH_FROM.get(facts.cell, {}).get(facts.dtype)
    if start is None or facts.ragged or facts.proj_size:
        return _NATIVE_FIRST  # torch runs those step by step
    rows = start.batch_grad if facts.grad else start.batch
    if facts.batch < rows or facts.hidden_size < start.hidden_size:
        return _NATIVE_FIRST
    if facts.recompute and facts.grad:
        return _NATIVE_FIRST  # torch would run the whole layer again
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
        Backend("native", _native_can_run, native, floor_bytes=_floor_bytes),
        Backend("torch", _torch_can_run, stock, floor_bytes=_floor_bytes),
        Backend("reference", lambda facts: YES, _Reference),
    ]
    return Operator(name, backends, prefer=_prefer, facts=facts)


OPERATORS = {name: _operator(name) for name in ("lstm", "gru", "rnn")}
