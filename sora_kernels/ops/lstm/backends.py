"""``lstm``, ``gru``, ``rnn``: the backends, what each can run, and which comes first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _env, _native
from ..._dispatch import YES, Backend, Operator, Verdict, no
from . import native, plans, precision, reference, stock
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
    precision: str  # of fp32 on CUDA: "tf32" or "ieee", asked for or torch's flag; else ""


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
    if facts.dtype not in native.DTYPE_CODES:
        return no(f"x is {facts.dtype}; the native kernels take fp16, bf16, fp32 and fp64")
    status = _native.cuda_device_status(facts.device)
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
    if facts.ragged and facts.device.type == "meta":
        return no("x is on meta; torch packs rows by lengths that it reads")
    if facts.precision and facts.precision != precision.of_cudnn():
        return no(
            f"precision is {facts.precision!r}; torch's layer follows torch.backends.cudnn alone, "
            f"where it is {precision.of_cudnn()!r}"
        )
    return YES


_Span = tuple[int, int]  # from and to, both included
_ANY = (0, 1 << 62)


class _Region(NamedTuple):
    """Calls on the CPU for even rows; with and without gradients where ``grad`` is None."""

    batch: _Span = _ANY
    hidden_size: _Span = _ANY
    steps: _Span = _ANY
    grad: bool | None = None

    def holds(self, batch: int, hidden_size: int, steps: int, grad: bool) -> bool:
        (least_b, most_b), (least_h, most_h), (least_t, most_t), _ = self
        return (
            least_t <= steps <= most_t
            and least_b <= batch <= most_b
            and least_h <= hidden_size <= most_h
            and self.grad in (None, grad)
        )


def _from(least: int) -> _Span:
    return least, _ANY[1]


# Of a single step GEMM and host work are all there is, and torch's host work is in C++.
_ONE_STEP = _Region(steps=(1, 1))
# Where torch is faster on the CPU, as measured (README.md). LSTM: oneDNN's blocked GEMM, with rows
# enough to fill it; it does not take ragged rows.
_TORCH_FASTER: dict[str, dict[torch.dtype, tuple[_Region, ...]]] = {
    "lstm": {
        torch.float32: (
            _Region(batch=_from(8), hidden_size=(97, 199), steps=_from(16), grad=False),
            _Region(batch=_from(10), hidden_size=_from(200), steps=_from(16), grad=False),
            _Region(batch=_from(20), hidden_size=(49, 96), steps=_from(16), grad=False),
            _Region(batch=_from(48), hidden_size=(25, 48), steps=_from(16), grad=False),
            _Region(batch=_from(200), hidden_size=(1, 24), steps=_from(16), grad=False),
            _Region(batch=_from(32), hidden_size=_from(200), grad=False),
            _Region(batch=_from(48), hidden_size=(97, 199), grad=False),
            _Region(batch=_from(128), hidden_size=(49, 96), grad=False),
            _Region(batch=_from(1024), hidden_size=(25, 48), grad=False),
            _Region(batch=(15, 160), hidden_size=(97, 199), steps=_from(16), grad=True),
            _Region(batch=(32, 160), hidden_size=(49, 96), steps=_from(16), grad=True),
            _Region(batch=(48, 512), hidden_size=(97, 199), grad=True),
            _Region(batch=(160, 512), hidden_size=(49, 96), steps=(1, 15), grad=True),
        ),
    },
    "gru": {torch.float32: (_ONE_STEP,), torch.bfloat16: (_ONE_STEP,)},
    "rnn_tanh": {
        torch.float32: (_ONE_STEP, _Region(batch=_from(128), hidden_size=_from(200), grad=True)),
        torch.bfloat16: (_ONE_STEP,),
    },
    "rnn_relu": {
        torch.float32: (_ONE_STEP, _Region(batch=_from(128), hidden_size=_from(200), grad=True)),
        torch.bfloat16: (_ONE_STEP,),
    },
}
if torch.cpu._is_avx512_bf16_supported():  # oneDNN has dot products of bf16 there, we have not
    _TORCH_FASTER["lstm"][torch.bfloat16] = (_Region(),)

_NATIVE_FIRST = ("native", "torch", "reference")
_TORCH_FIRST = ("torch", "native", "reference")


@lru_cache(maxsize=1024)
def _torch_is_faster(
    cell: str, dtype: torch.dtype, batch: int, hidden_size: int, steps: int, grad: bool
) -> bool:
    """Of even rows on the CPU."""
    regions = _TORCH_FASTER[cell].get(dtype, ())
    return any(region.holds(batch, hidden_size, steps, grad) for region in regions)


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md has the measurements behind each line."""
    if not _on_cpu(facts):
        return _NATIVE_FIRST if _faster_than_cudnn(facts) else _TORCH_FIRST
    # Torch has no projections in oneDNN, and to recompute runs the whole layer again.
    if facts.ragged or facts.proj_size or (facts.recompute and facts.grad):
        return _NATIVE_FIRST
    torch_first = _torch_is_faster(
        facts.cell, facts.dtype, facts.batch, facts.hidden_size, facts.steps, facts.grad
    )
    return _TORCH_FIRST if torch_first else _NATIVE_FIRST


def _layer_of(facts: Facts) -> plans.Layer:
    return plans.Layer(
        facts.cell, facts.dtype, facts.batch, facts.hidden_size, facts.directions, facts.ragged,
        facts.reset, facts.proj_size, facts.precision,
    )  # fmt: skip


def _faster_than_cudnn(facts: Facts) -> bool:
    """By prediction, of a device that is not the CPU."""
    if facts.device.type != "cuda" or not _native.cuda_device_status(facts.device).ok:
        return False
    layer, gpu = _layer_of(facts), plans.gpu_of(facts.device)
    return plans.native_us(layer, gpu) < plans.cudnn_us(layer, gpu)


def _native_config(facts: Facts) -> str:
    if facts.device.type != "cuda":
        return ""
    return plans.describe_native(_layer_of(facts), facts.steps, facts.device)


def _torch_config(facts: Facts) -> str:
    if facts.device.type != "cuda":
        return ""
    return plans.describe_cudnn(_layer_of(facts), facts.device)


def int8_pays(batch: int, hidden_size: int) -> bool:
    """Whether a step's weights are worth more than what it does with them; README.md has the rows."""
    return batch <= MAX_BATCH and hidden_size >= max(192, 64 * batch)


def runs_int8(backend: str, facts: Facts) -> bool:
    """Whether a call of a module with ``int8=True`` goes by int8 weights."""
    backend = backend or _env.requested_backend(facts.cell.partition("_")[0], _IMPLS)
    return (
        backend in ("", "native")
        and not (facts.grad or facts.cells)
        and facts.dtype in (torch.float32, torch.bfloat16)
        and int8_pays(facts.batch, facts.hidden_size)
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
    return_cells: bool, memory: str, asked: str | None,
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
        memory == "recompute", precision.resolved(asked or "", x.device, x.dtype),
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
        Backend(
            "native",
            _native_can_run,
            _IMPLS["native"],
            config=_native_config,
            floor_bytes=_floor_bytes,
        ),
        Backend(
            "torch",
            _torch_can_run,
            _IMPLS["torch"],
            config=_torch_config,
            floor_bytes=_floor_bytes,
            deterministic=_on_cpu,  # cuDNN's layer does not promise the same bits
        ),
        Backend("reference", lambda facts: YES, _IMPLS["reference"]),
    ]
    return Operator(name, backends, prefer=_prefer, facts=facts)


OPERATORS = {name: _operator(name) for name in ("lstm", "gru", "rnn")}
