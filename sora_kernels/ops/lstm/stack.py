"""``lstm``, ``gru``, ``rnn``: the public functions, and the loop over layers under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.dropout import dropout as drop
from ..common.gradient import transformed
from ..common.schema import goes_straight
from . import stock
from .arguments import Sizes, States, autocast, validate
from .backends import OPERATORS, facts_of, runs_int8
from .cells import GRU, LSTM, RNN_RELU, RNN_TANH, Cell
from .int8 import Int8Cache, Int8Weights
from .op import LAYERS


def run(
    cell: Cell, x: Tensor, hx: States, weights: Sequence[Tensor], bias: bool, num_layers: int,
    bidirectional: bool, batch_first: bool, proj_size: int, dropout: float, training: bool, *,
    lengths: Tensor | None = None, batch_sizes: Tensor | None = None, reset: Tensor | None = None,
    return_cells: bool = False, memory: str = "save", precision: str | None = None,
    backend: str = "", int8: Int8Cache | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    """The public functions on arguments that are known to be good.

    Args:
        hx: the states that the cell has, [L*D, B, ...] each, or None.
        batch_sizes: int64 [T] on the CPU, not increasing: x [N, I] and reset [N] are packed, and
            batch_first has no meaning.
        int8: where the weights' int8 form is kept, if it may be used.

    Returns:
        y, the last states, and the last layer's cells if return_cells.
    """
    turned = batch_first and batch_sizes is None
    if turned:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    if hx is None and batch_sizes is not None:
        sizes = Sizes(2 if bidirectional else 1, weights[1].shape[0] // cell.gates, proj_size)
        hx = sizes.zeros(cell, x, int(batch_sizes[0]), num_layers)
    layer, recompute = LAYERS[cell.name], memory == "recompute"
    found: Any = ()
    recorded = True  # by autograd; also the way under compile and torch.func
    narrow: Sequence[Int8Weights] = ()
    straight: Any = None  # the implementation to call, past the op and what it is for
    if torch._C._get_tracing_state() is not None:
        recorded = False  # a trace holds the op, under the name that was asked for
    elif not torch.compiler.is_compiling() and not transformed((x, *(hx or ()), *weights)):
        facts = facts_of(
            cell, x, hx, weights, batch_sizes, bidirectional, proj_size, lengths, reset,
            return_cells, memory, precision,
        )  # fmt: skip
        name = "native"
        plain = (int8 is not None or not facts.grad) and goes_straight(x, *(hx or ()), *weights)
        if int8 is not None and plain and runs_int8(backend, facts):
            narrow = int8.of(cell, weights[1 :: len(weights) // (num_layers * facts.directions)])
        else:
            chosen = layer.operator.select(backend, facts)
            name = chosen.name
            if not facts.grad and not torch.is_grad_enabled() and not facts.precision:
                if plain and not torch._C._is_any_autocast_enabled():
                    straight = chosen.impl.forward
        if name == "torch" and not (recompute and facts.grad):  # it has gradients of its own
            if hx is None:
                sizes = Sizes(facts.directions, facts.hidden_size, proj_size)
                hx = sizes.zeros(cell, x, x.shape[1], num_layers)
            y, *found = stock.layers(
                cell, x, hx, weights, batch_sizes, lengths, bias, num_layers, dropout, training,
                bidirectional,
            )  # fmt: skip
            return y.transpose(0, 1) if turned else y, tuple(found), None
        backend, recorded = "=" + name, facts.grad

    precision, last = precision or "", num_layers - 1
    flags = (bias, precision, recompute)
    given: Sequence[Tensor | None] = hx or ((None, None) if cell.has_c else (None,))
    directions, per_layer = 2 if bidirectional else 1, len(weights) // num_layers
    y, every = x, []
    for k in range(num_layers):
        own, own_weights = given, weights
        if last:
            rows = slice(k * directions, (k + 1) * directions)
            own = [None if state is None else state[rows] for state in given]
            own_weights = weights[k * per_layer : (k + 1) * per_layer]
            if k and dropout and training:
                y = drop(y, dropout)
        with_cells = return_cells and k == last
        if narrow:
            found = layer.int8(
                y, own, own_weights, batch_sizes, lengths, reset, bias,
                narrow[k * directions : (k + 1) * directions],
            )  # fmt: skip
        elif straight is not None:
            found = straight(
                cell, y, own[0], own[1] if cell.has_c else None, own_weights, batch_sizes, lengths,
                reset, bias, with_cells,
            )  # fmt: skip
            if not cell.has_c:
                found = found[:2]
        elif recorded:
            call = layer.call_with_cells if with_cells else layer.call
            found = call((y, *own, batch_sizes, lengths, reset, *own_weights), flags, backend)
        else:
            op = layer.fwd if with_cells else layer.plain
            found = op(
                y, *own, list(own_weights), batch_sizes, lengths, reset, bias, precision, backend
            )
        y = found[0]
        every.append(found[1 : 1 + len(given)])
    states = (
        every[0] if not last else tuple(torch.cat(column) for column in zip(*every, strict=True))
    )
    cells = found[1 + len(given)].to(y.dtype) if return_cells else None
    if turned:
        y = y.transpose(0, 1)
        cells = None if cells is None else cells.transpose(0, 1)
    return y, states, cells


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
        memory: "save" keeps gates and cell states for backward, 5 H values a row, step and
            direction; "recompute" makes them again there, from x and y.
        precision: of fp32 matrix products on CUDA: "tf32", "ieee", or None for torch's flags.
        backend: "native", "torch", "reference", or None for the fastest that can run.

    Returns:
        ``(y, (h_n, c_n))``, with ``return_cells`` ``(y, (h_n, c_n), cells)``: y ``[T, B, D*P]``,
        h_n ``[L*D, B, P]``, c_n ``[L*D, B, H]``, cells ``[T, B, D*H]``, in x's dtype; y and cells
        ``[B, T, ...]`` if ``batch_first``.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        BackendError: the named backend cannot run this call; the message says why.

    Cell states are kept in fp32 (fp64 for fp64). Under autocast x, hx and weights are cast to its
    dtype. Gradients of any order exist on "native" and "reference". ``torch.vmap`` (ensembles) and
    one level of ``torch.func.grad`` (per-sample gradients) run the kernels, every other transform the
    reference. "torch" has torch's own limits.

    Source: Hochreiter and Schmidhuber (1997), the forget gate of Gers et al. (2000), the projection
    of Sak et al. (2014).
    """
    backend = OPERATORS["lstm"].check_name(backend) if backend else ""
    states: States = hx
    if torch._C._is_any_autocast_enabled():
        x, states, weights = autocast(LSTM, x, states, weights)
    validate(
        LSTM, x, states, weights, bias, num_layers, bidirectional, batch_first, proj_size, dropout,
        lengths, reset, memory, precision,
    )  # fmt: skip
    y, last, cells = run(
        LSTM, x, states, weights, bias, num_layers, bidirectional, batch_first, proj_size, dropout,
        training, lengths=lengths, reset=reset, return_cells=return_cells, memory=memory,
        precision=precision, backend=backend,
    )  # fmt: skip
    return (y, last, cells) if return_cells else (y, last)


def gru(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    memory: str = "save",
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units over a sequence, ``num_layers`` deep, in one or both directions.

    Equivalent to ``torch.nn.GRU``, whose reset gate acts on ``w_hn h + b_hn``::

        y, h_n = torch._VF.gru(x, hx, weights, bias, num_layers, dropout, training, bidirectional,
                               batch_first)

    Args:
        x: ``[T, B, I]``, or ``[B, T, I]`` if ``batch_first``; T >= 1, any B; fp16, bf16, fp32 or
            fp64.
        hx: ``h_0 [L*D, B, H]``, or None for zeros.
        weights: in torch's order: by layer, by direction ``w_ih [3H, I or D*H]``, ``w_hh [3H, H]``,
            then ``b_ih``, ``b_hh [3H]`` if ``bias``. Gate order r, z, n.
        dropout: probability of an output being zeroed between layers, where ``training``.
        lengths: int ``[B]`` in 0..T: row b ends before step ``lengths[b]``. y is 0 from there, h_n
            is that of the row's last step, and the reverse direction starts at it.
        reset: bool, shaped as x's first two axes: a new sequence starts at a true entry. The state
            is cleared before that step (in the reverse direction: before the step ahead of it).
        memory: "save" keeps the gates for backward, 4 H values a row, step and direction;
            "recompute" makes them again there, from x and y.
        precision: of fp32 matrix products on CUDA: "tf32", "ieee", or None for torch's flags.
        backend: "native", "torch", "reference", or None for the fastest that can run.

    Returns:
        ``(y, h_n)``: y ``[T, B, D*H]``, ``[B, T, D*H]`` if ``batch_first``, and h_n ``[L*D, B, H]``,
        in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        BackendError: the named backend cannot run this call; the message says why.

    Gates are computed in fp32 (fp64 for fp64). Under autocast on CUDA x, hx and weights are cast to
    its dtype; on the CPU torch casts no GRU, and neither does this. Gradients of any order exist on
    "native" and "reference"; ``torch.func`` as :func:`lstm`. "torch" has torch's own limits.

    Source: Cho et al. (2014), in the form of cuDNN.
    """
    return _without_c(
        GRU, x, hx, weights, bias, num_layers, bidirectional, batch_first, dropout, training,
        lengths, reset, memory, precision, backend,
    )  # fmt: skip


def rnn(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    memory: str = "save",
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman's recurrent layer over a sequence, ``num_layers`` deep, in one or both directions.

    Equivalent to ``torch.nn.RNN``::

        y, h_n = torch._VF.rnn_tanh(x, hx, weights, bias, num_layers, dropout, training,
                                    bidirectional, batch_first)

    Args:
        x, hx, dropout, training, lengths, reset, precision, backend: as :func:`gru`.
        weights: in torch's order: by layer, by direction ``w_ih [H, I or D*H]``, ``w_hh [H, H]``,
            then ``b_ih``, ``b_hh [H]`` if ``bias``.
        nonlinearity: "tanh" or "relu".
        memory: "save" and "recompute" are the same: backward needs x and y alone.

    Returns:
        ``(y, h_n)``, as :func:`gru`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is off.
        BackendError: the named backend cannot run this call; the message says why.

    Sums are kept in fp32 (fp64 for fp64). Under autocast x, hx and weights are cast to its dtype.
    Gradients: as :func:`gru`.

    Source: Elman (1990).
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return _without_c(
        RNN_TANH if nonlinearity == "tanh" else RNN_RELU, x, hx, weights, bias, num_layers,
        bidirectional, batch_first, dropout, training, lengths, reset, memory, precision, backend,
    )  # fmt: skip


def _without_c(
    cell: Cell, x: Tensor, hx: Tensor | None, weights: Sequence[Tensor], bias: bool,
    num_layers: int, bidirectional: bool, batch_first: bool, dropout: float, training: bool,
    lengths: Tensor | None, reset: Tensor | None, memory: str, precision: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    backend = LAYERS[cell.name].operator.check_name(backend) if backend else ""
    states: States = None if hx is None else (hx,)
    if torch._C._is_any_autocast_enabled():
        x, states, weights = autocast(cell, x, states, weights)
    validate(
        cell, x, states, weights, bias, num_layers, bidirectional, batch_first, 0, dropout, lengths,
        reset, memory, precision,
    )  # fmt: skip
    y, (h_n,), _ = run(
        cell, x, states, weights, bias, num_layers, bidirectional, batch_first, 0, dropout,
        training, lengths=lengths, reset=reset, memory=memory, precision=precision, backend=backend,
    )  # fmt: skip
    return y, h_n
