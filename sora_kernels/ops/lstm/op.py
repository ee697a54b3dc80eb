"""``lstm``: schema, backends, gradient, public function. The registered op is one layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from ..._dispatch import YES, Backend, Operator, Verdict, no
from ..common.gradient import Pair, Tensors, differentiable, transformed
from ..common.schema import register
from . import native, reference, stock
from .arguments import Sizes, autocast, validate

_CPU = torch.device("cpu")


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    steps: int
    batch: int
    hidden_size: int
    proj_size: int
    directions: int
    grad: bool
    keeps_gates: bool  # the call is the registered op's and a backward op will want its tapes
    lengths: bool
    reset: bool
    cells: bool
    precision: str


def _native_can_run(facts: Facts) -> Verdict:
    if facts.lengths:
        return no("lengths were given; the native kernels take rows of one length")
    if facts.reset:
        return no("reset was given; the native kernels do not reset")
    if facts.proj_size:
        return no(f"proj_size is {facts.proj_size}; the native kernels have no projection")
    if facts.device == _CPU:
        if facts.dtype not in native.CPU_DTYPES:
            return no(
                f"x is {facts.dtype} on the CPU; the native kernels take fp32, fp64 and bf16 there"
            )
        status = _native.status()
    elif facts.device.type == "cuda":
        if facts.dtype not in native.DTYPE_CODES:
            return no(f"x is {facts.dtype}; the native kernels take fp16, bf16, fp32 and fp64")
        status = _native.cuda_status()
    else:
        return no(f"x is on {facts.device}; the native kernels run on the CPU and on CUDA")
    return YES if status.ok else no(status.why)


def _torch_can_run(facts: Facts) -> Verdict:
    if facts.keeps_gates:
        return no(
            "torch's LSTM keeps no gates for a backward op, "
            "so a compiled training step cannot use it"
        )
    if facts.reset:
        return no("reset was given; torch's LSTM cannot reset")
    if facts.cells:
        return no("return_cells is True; torch's LSTM returns the last cell state alone")
    if facts.precision and facts.device.type == "cuda":
        return no(
            f"precision is {facts.precision!r}; torch's LSTM follows torch.backends.cudnn alone"
        )
    return YES


def _prefer(facts: Facts) -> tuple[str, ...]:
    """Fastest first; README.md has the measurements behind each line."""
    if facts.device != _CPU:
        # cuDNN's loop over steps is never slower than ours, but it is not bitwise repeatable.
        if torch.are_deterministic_algorithms_enabled():
            return ("native", "torch", "reference")
        return ("torch", "native", "reference")
    # oneDNN's blocked GEMM wins where there are enough rows to fill it.
    rows = 16 if facts.grad else 8
    if facts.dtype == torch.float32 and facts.batch > rows and facts.hidden_size > 32:
        return ("torch", "native", "reference")
    if facts.dtype == torch.bfloat16 and _cpu_has_bf16():
        return ("torch", "native", "reference")
    return ("native", "torch", "reference")


def _cpu_has_bf16() -> bool:
    """Whether oneDNN has bf16 dot products to use here; our kernels widen to fp32."""
    return torch.cpu._is_avx512_bf16_supported()


class _Native:
    @staticmethod
    def forward(x, h0, c0, weights, lengths, reset, bias, tapes):
        return native.forward(x, h0, c0, weights, bias, tapes)

    @staticmethod
    def backward(
        dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset, y, cells, gates, bias, needs
    ):
        return native.backward(
            dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, cells, gates, bias, needs
        )


class _Torch:
    @staticmethod
    def forward(x, h0, c0, weights, lengths, reset, bias, tapes):
        sizes = Sizes.of_layer(x, weights, bias)
        hx = sizes.states(x, h0, c0)
        found = stock.lstm(x, hx, weights, bias, 1, 0.0, False, sizes.directions == 2, lengths)
        return tuple(t.contiguous() for t in found)


class _Reference:
    @staticmethod
    def forward(x, h0, c0, weights, lengths, reset, bias, tapes):
        found = reference.layer(x, h0, c0, weights, lengths, reset, bias)
        return found if tapes else found[:3]

    @staticmethod
    def backward(
        dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset, y, cells, gates, bias, needs
    ):
        return reference.layer_backward(
            dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset, y, cells, gates, bias
        )


def _floor_bytes(facts: Facts) -> int:
    """Least traffic of one layer's forward pass: w_hh once, gates in (out if kept), y out."""
    H, D = facts.hidden_size, facts.directions
    rows = facts.steps * facts.batch * D
    return (4 * H * H * D + rows * (4 * H * (1 + facts.grad) + H)) * facts.dtype.itemsize


def _facts_of_call(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor], *, bias: bool = True,
    num_layers: int = 1, bidirectional: bool = False, batch_first: bool = False, proj_size: int = 0,
    lengths: Tensor | None = None, reset: Tensor | None = None, return_cells: bool = False,
    precision: str | None = None, **_: Any,
) -> Facts:  # fmt: skip
    """The public arguments -> facts."""
    x, hx, weights = autocast(x, hx, weights)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *(hx or ()), *weights))
    T, B = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    return Facts(
        x.device, x.dtype, T, B, weights[1].shape[0] // 4, proj_size, 1 + bidirectional, grad,
        False, lengths is not None, reset is not None, return_cells, precision or "",
    )  # fmt: skip


OPERATOR = Operator(
    "lstm",
    [
        Backend("native", _native_can_run, _Native, floor_bytes=_floor_bytes),
        Backend("torch", _torch_can_run, _Torch, floor_bytes=_floor_bytes),
        Backend("reference", lambda facts: YES, _Reference),
    ],
    prefer=_prefer,
    facts=_facts_of_call,
)


# The backend as `run` hands it on after asking about this very call: the op need not ask again.
_ASKED = {f"{name} asked": backend.impl for name, backend in OPERATOR.backends.items()}


def _impl(backend, x, weights, lengths, reset, bias, tapes, precision) -> Any:
    if backend in _ASKED:
        return _ASKED[backend]
    facts = _facts_of_layer(x, weights, lengths, reset, bias, tapes, precision)
    return OPERATOR.select(backend, facts).impl


def _facts_of_layer(x, weights, lengths, reset, bias, tapes, precision) -> Facts:
    sizes = Sizes.of_layer(x, weights, bias)
    return Facts(
        x.device, x.dtype, x.shape[0], x.shape[1], sizes.hidden_size, sizes.proj_size,
        sizes.directions, tapes, tapes, lengths is not None, reset is not None, False, precision,
    )  # fmt: skip


def _run_forward(tapes, x, h0, c0, weights, lengths, reset, bias, precision, backend):
    impl = _impl(backend, x, weights, lengths, reset, bias, tapes, precision)
    if not precision:
        return tuple(impl.forward(x, h0, c0, weights, lengths, reset, bias, tapes))
    with _matmul_precision(x, precision):
        return tuple(impl.forward(x, h0, c0, weights, lengths, reset, bias, tapes))


def _plain_impl(*args: Any) -> Tensors:
    return _run_forward(False, *args)


def _fwd_impl(*args: Any) -> Tensors:
    return _run_forward(True, *args)


def _plain_fake(x, h0, c0, weights, lengths, reset, bias, precision, backend):
    T, B = x.shape[:2]
    sizes = Sizes.of_layer(x, weights, bias)
    D, H, P = sizes.directions, sizes.hidden_size, sizes.output_size
    return x.new_empty(T, B, D * P), x.new_empty(D, B, P), x.new_empty(D, B, H)


def _fwd_fake(x, h0, c0, weights, lengths, reset, bias, precision, backend):
    T, B = x.shape[:2]
    sizes = Sizes.of_layer(x, weights, bias)
    D, H = sizes.directions, sizes.hidden_size
    return (
        *_plain_fake(x, h0, c0, weights, lengths, reset, bias, precision, backend),
        x.new_empty(T, B, D * H, dtype=reference.state_dtype(x.dtype)),
        x.new_empty(D, T, B, 4 * H),
    )


def _bwd_impl(
    dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset, y, cells, gates, bias, needs,
    precision, backend
):  # fmt: skip
    impl = _impl(backend, x, weights, lengths, reset, bias, True, precision)
    with _matmul_precision(x, precision):
        dx, dh0, dc0, dweights = impl.backward(
            dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset, y, cells, gates, bias, needs
        )
    found = [g if n else None for g, n in zip((dx, dh0, dc0, *dweights), needs, strict=True)]
    full = [x.new_empty(0) if g is None else g.contiguous() for g in found]
    return full[0], full[1], full[2], full[3:]


def _bwd_fake(
    dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset, y, cells, gates, bias, needs,
    precision, backend
):  # fmt: skip
    sizes = Sizes.of_layer(x, weights, bias)
    B, D = x.shape[1], sizes.directions
    shapes = [
        x.shape,
        (D, B, sizes.output_size),
        (D, B, sizes.hidden_size),
        *(w.shape for w in weights),
    ]
    full = [x.new_empty(s if n else (0,)) for s, n in zip(shapes, needs, strict=True)]
    return full[0], full[1], full[2], full[3:]


@contextlib.contextmanager
def _switched_matmul(value: str) -> Iterator[None]:
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = value == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def _matmul_precision(x: Tensor, precision: str) -> contextlib.AbstractContextManager[None]:
    """Torch's GEMM flag for this call. It is global: other threads see it meanwhile."""
    if precision and x.is_cuda and x.dtype == torch.float32:
        return _switched_matmul(precision)
    return contextlib.nullcontext()


_ARGUMENTS = (
    "(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? reset, bool bias, "
    "str precision, str backend) -> (Tensor y, Tensor h_n, Tensor c_n"
)
# Two schemas rather than optional outputs: without a backward to come there are no tapes to return.
_plain = register("lstm" + _ARGUMENTS + ")", _plain_impl, _plain_fake)
_fwd = register("lstm_fwd" + _ARGUMENTS + ", Tensor cells, Tensor gates)", _fwd_impl, _fwd_fake)
_bwd = register(
    "lstm_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, "
    "Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? reset, Tensor y, Tensor cells, "
    "Tensor gates, bool bias, bool[] needs, str precision, str backend) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)",
    _bwd_impl,
    _bwd_fake,
)

# Order of an op call's tensors: x, h0, c0, lengths, reset, then the weights. Flags: bias,
# precision, cells wanted.
_FIXED = 5


def _forward(tensors: Tensors, flags: tuple, tapes: bool, backend: str) -> Tensors:
    x, h0, c0, lengths, reset, *weights = tensors
    bias, precision, cells = flags
    if tapes or cells:
        return _fwd(x, h0, c0, weights, lengths, reset, bias, precision, backend)
    return (*_plain(x, h0, c0, weights, lengths, reset, bias, precision, backend), None)


def _save(tensors: Tensors, results: Tensors, flags: tuple) -> Tensors:
    y, _, _, cells, gates = results
    return (*tensors, y, cells, gates)


def _backward(
    grads: Tensors, saved: Tensors, needs: Sequence[bool], flags: tuple, backend: str
) -> Tensors:
    x, h0, c0, lengths, reset, *weights, y, cells, gates = saved
    bias, precision, _ = flags
    dx, dh0, dc0, dweights = _bwd(
        *grads, x, h0, c0, weights, lengths, reset, y, cells, gates, bias,
        [*needs[:3], *needs[_FIXED:]], precision, backend,
    )  # fmt: skip
    return (dx, dh0, dc0, None, None, *dweights)


def _reference(tensors: Tensors, flags: tuple) -> Tensors:
    x, h0, c0, lengths, reset, *weights = tensors
    assert x is not None
    return reference.layer(x, h0, c0, weights, lengths, reset, flags[0])[:4]  # type: ignore[arg-type]


def _recompute(saved: Tensors, flags: tuple) -> tuple[Tensors, Tensors]:
    inputs = saved[:-3]
    return _reference(inputs, flags), inputs


_call = differentiable(Pair(_forward, _save, _backward, _reference, _recompute, num_outputs=4))


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    memory: str = "save",
    precision: str | None = None,
    backend: str | None = None,
) -> Any:
    """Long short-term memory over a sequence, ``num_layers`` deep, in one or both directions.

    Equivalent to ``torch.nn.LSTM``::

        y, h_n, c_n = torch._VF.lstm(x, hx, weights, bias, num_layers, dropout, training,
                                     bidirectional, batch_first)

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` if ``batch_first``; T >= 1, any B; fp16, bf16, fp32 or
            fp64.
        hx: ``(h_0, c_0)``, ``[L*D, B, P]`` and ``[L*D, B, H]`` (P = proj_size or H), or None for
            zeros.
        weights: in torch's order: by layer, by direction ``w_ih [4H, I or D*P]``, ``w_hh [4H, P]``,
            then ``b_ih``, ``b_hh [4H]`` if ``bias``, then ``w_hr [P, H]`` if ``proj_size``. Gate
            order i, f, g, o.
        dropout: probability of an output being zeroed between layers, where ``training``.
        lengths: int ``[B]`` in 0..T: row b ends before step ``lengths[b]``. y is 0 from there, h_n
            and c_n are those of the row's last step, and the reverse direction starts at it.
        reset: bool, shaped as x's first two axes: a new sequence starts at a true entry. The state
            is cleared before that step (in the reverse direction: before the step ahead of it).
        return_cells: also return the last layer's cell state at every step, differentiable.
        memory: "save" keeps the gates for backward.
        precision: of fp32 matrix products on CUDA: "tf32", "ieee", or None for torch's flags.
        backend: "native", "torch", "reference", or None for the fastest that can run.

    Returns:
        ``(y, (h_n, c_n))``, with ``return_cells`` ``(y, (h_n, c_n), cells)``: y ``[T, B, D*P]``,
        h_n ``[L*D, B, P]``, c_n ``[L*D, B, H]``, cells ``[T, B, D*H]``, in x's dtype; y and cells
        ``[B, T, ...]`` if ``batch_first``.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        NotImplementedError: memory="recompute".
        BackendError: the named backend cannot run this call; the message says why.

    Cell states are kept in fp32 (fp64 for fp64). Under autocast x, hx and weights are cast to its
    dtype. Gradients of any order exist on "native" and "reference"; inside ``torch.func`` the
    reference runs. "torch" has torch's own limits.

    Source: Hochreiter and Schmidhuber (1997), the forget gate of Gers et al. (2000), the projection
    of Sak et al. (2014).
    """
    backend = OPERATOR.check_name(backend) if backend else ""
    if torch._C._is_any_autocast_enabled():
        x, hx, weights = autocast(x, hx, weights)
    validate(
        x, hx, weights, bias, num_layers, bidirectional, batch_first, proj_size, dropout, lengths,
        reset, memory, precision,
    )  # fmt: skip
    return run(
        x, hx, weights, bias, num_layers, bidirectional, batch_first, proj_size, dropout, training,
        lengths, reset, return_cells, precision, backend,
    )  # fmt: skip


def run(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor], bias: bool,
    num_layers: int, bidirectional: bool, batch_first: bool, proj_size: int, dropout: float,
    training: bool, lengths: Tensor | None = None, reset: Tensor | None = None,
    return_cells: bool = False, precision: str | None = None, backend: str = "",
) -> Any:  # fmt: skip
    """``lstm`` on arguments that are known to be good."""
    directions = 2 if bidirectional else 1
    if batch_first:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    cells, stock_layers = None, False
    if not torch.compiler.is_compiling() and not transformed((x, *(hx or ()), *weights)):
        grad = torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for t in (*weights, *(hx or ())))
        )
        facts = Facts(
            x.device, x.dtype, x.shape[0], x.shape[1], weights[1].shape[0] // 4, proj_size,
            directions, grad, False, lengths is not None, reset is not None, return_cells,
            precision or "",
        )  # fmt: skip
        name = OPERATOR.select(backend, facts).name
        stock_layers, backend = name == "torch", name + " asked"
    if stock_layers:  # it has gradients of its own
        sizes = Sizes(directions, weights[1].shape[0] // 4, proj_size)
        h0, c0 = hx or (None, None)
        hx = sizes.states(x, h0, c0, num_layers)
        y, h_n, c_n = stock.lstm(
            x, hx, weights, bias, num_layers, dropout, training, bidirectional, lengths
        )
    else:
        per_layer = len(weights) // num_layers
        flags = (bias, precision or "", return_cells)
        y, h_all, c_all = x, [], []
        h0, c0 = hx or (None, None)
        for layer in range(num_layers):
            if layer and dropout and training:
                y = F.dropout(y, dropout)
            if num_layers > 1 and hx is not None:
                own = slice(layer * directions, (layer + 1) * directions)
                h0, c0 = hx[0][own], hx[1][own]
            own_weights = weights
            if num_layers > 1:
                own_weights = weights[layer * per_layer : (layer + 1) * per_layer]
            found: Any = _call((y, h0, c0, lengths, reset, *own_weights), flags, backend)
            y, h_n, c_n, cells = found
            h_all.append(h_n)
            c_all.append(c_n)
        if num_layers > 1:
            h_n, c_n = torch.cat(h_all), torch.cat(c_all)
    if batch_first:
        y = y.transpose(0, 1)
    if not return_cells:
        return y, (h_n, c_n)
    assert cells is not None
    cells = cells.to(y.dtype)
    return y, (h_n, c_n), cells.transpose(0, 1) if batch_first else cells
