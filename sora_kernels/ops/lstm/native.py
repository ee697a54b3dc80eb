"""The layers through ``sora_kernels._C``: torch's GEMMs, and csrc/lstm for the chain over time.

Three ways to walk the steps. *Sequence*: one call of the CPU kernel, which packs ``w_hh``, keeps sums
in registers and threads over rows or units; every cell and feature. *Resident* (resident.py): one
launch on CUDA, where registers hold ``w_hh`` (plans.py). *Steps* (steps.py): one GEMM and one kernel a
step; on CUDA otherwise, and of an LSTM on the CPU where there are too few steps to pay for packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ..common.dtypes import CPU_DTYPES, DTYPE_CODES
from ..common.lazy import Lazy
from . import steps
from .arguments import Sizes
from .cells import GRU, LSTM, Cell
from .int8 import Int8Weights
from .pointers import all_pointable, pointable, pointer
from .products import db, dw_hh, input_products
from .reference import Result, state_dtype
from .rows import Rows

_projection, _resident = Lazy(".projection", __package__), Lazy(".resident", __package__)
_linear = torch._C._nn.linear  # F.linear without its detour

__all__ = ["CPU_DTYPES", "DTYPE_CODES", "backward", "forward"]


def forward(
    cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    tapes: bool, int8: Sequence[Int8Weights] = (),
) -> Result:  # fmt: skip
    """As ``reference.layer``; on the CPU with each direction's w_hh as int8 numbers, if there are any."""
    h0, c0 = pointable(x, h0), pointable(x, c0)
    plain = len(weights) == 4 and bias and not (tapes or int8 or x.is_cuda)
    if plain and batch_sizes is None and lengths is None and reset is None:
        T, B, _ = x.shape
        if T > steps.MOST or (T > 1 and not steps.faster(T, B, weights[1].shape[1])):
            return _forward_plain(cell, x, h0, c0, weights)
    if x.is_cuda:
        walk, args = _walk_on_cuda(cell, x, weights), (batch_sizes, lengths, reset, bias, tapes)
        if Sizes.of_layer(cell, weights, bias).proj_size:
            return _projection.forward(walk, x, h0, c0, weights, *args)
        return walk.forward(cell, x, h0, c0, weights, *args)
    if not int8 and walks_steps(cell, x, weights, batch_sizes, lengths, reset, bias):
        return steps.forward(cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias, tapes)
    rows, sizes = Rows.of(x, h0, batch_sizes, lengths), Sizes.of_layer(cell, weights, bias)
    (D, H, _), O, G = sizes, sizes.output_size, cell.gates  # noqa: E741
    weights = all_pointable(x, weights)
    addresses = addresses_of(weights, sizes, bias, int8)
    if not int8 and is_one_step(rows, H, reset):  # h is known: nothing is worth packing for
        h_prev = [None if h0 is None else h0[d] for d in range(D)]
        inputs, width = _all_products(cell, rows.packed(x), weights, D, h_prev), cell.tape or G
        addresses = (0, 0, *addresses[2:])
    else:
        width = (cell.tape if tapes and rows.places is None else 0) or G
        inputs = input_products(rows.packed(x), weights, D, G * H, width * H)
    y, gates, cells, c_n = rows.empty(x, D * O), None, None, None
    if tapes and cell.tape:
        # Zero past a row's length: an op's outputs must not differ from run to run.
        gates = inputs if rows.places is None else x.new_zeros(D, rows.T * rows.B, cell.tape * H)
    if cell.has_c:
        c_n = x.new_empty(D, rows.B, H)
        cells = rows.empty(x, D * H, state_dtype(x.dtype)) if tapes else None
    h_n = x.new_empty(D, rows.B, O)
    shape, keep = shape_of(cell, rows, sizes, reset)
    _native.module().lstm_forward_cpu(
        DTYPE_CODES[x.dtype], shape, inputs.data_ptr(), width * H, addresses, pointer(h0),
        pointer(c0), pointer(gates), y.data_ptr(), pointer(cells), h_n.data_ptr(), pointer(c_n),
        _native.num_threads(),
    )  # fmt: skip
    del keep
    if gates is not None:
        gates = gates.view(D, *rows.shape, cell.tape * H)
    return Result(y, h_n, c_n, cells, gates)


def _forward_plain(
    cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> Result:
    """``forward`` of even rows in one direction, without tapes: what is called most often, and where
    the time between kernels shows.
    """
    w_ih, w_hh, b_ih, b_hh = all_pointable(x, weights)
    (T, B, _), (rows, H) = x.shape, w_hh.shape
    inputs = _linear(x, w_ih)
    y, h_n = x.new_empty(T, B, H), x.new_empty(1, B, H)
    c_n = x.new_empty(1, B, H) if cell.has_c else None
    _native.module().lstm_forward_cpu(
        DTYPE_CODES[x.dtype], (cell.code, T, B, H, 0, 1, 0, 0, 0), inputs.data_ptr(), rows,
        (w_hh.data_ptr(), 0, b_ih.data_ptr(), 0, b_hh.data_ptr(), 0, 0, 0, 0, 0, 0, 0), pointer(h0),
        pointer(c0), 0, y.data_ptr(), 0, h_n.data_ptr(), pointer(c_n), _native.num_threads(),
    )  # fmt: skip
    return Result(y, h_n, c_n, None, None)


def backward(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """As ``reference.layer_backward``, for what ``needs`` says of x, the states and each weight."""
    h0, c0, dy, dh_n, dc_n = (pointable(x, t) for t in (h0, c0, dy, dh_n, dc_n))
    by_steps = walks_steps(cell, x, weights, batch_sizes, lengths, reset, bias)
    if x.is_cuda and Sizes.of_layer(cell, weights, bias).proj_size:
        return _projection.backward(
            _walk_on_cuda(cell, x, weights), dy, dh_n, dc_n, dcells, x, h0, c0, weights,
            batch_sizes, lengths, reset, y, cells, gates, bias, needs,
        )  # fmt: skip
    if x.is_cuda or by_steps:
        walk = steps if by_steps else _walk_on_cuda(cell, x, weights)
        return walk.backward(
            cell, dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, lengths, reset, y,
            cells, gates, bias, needs,
        )  # fmt: skip
    rows, sizes = Rows.of(x, h0, batch_sizes, lengths), Sizes.of_layer(cell, weights, bias)
    (D, H, P), O, G = sizes, sizes.output_size, cell.gates  # noqa: E741
    weights, packed_x, y = all_pointable(x, weights), rows.packed(x), y.contiguous()
    shape, keep = shape_of(cell, rows, sizes, reset)
    per = len(weights) // D
    first = 2 + cell.has_c  # of the weights in needs
    h_prev: list[Tensor | None] = [None] * D
    again = cell.tape > 0 and gates is None
    for d in range(D):
        if again or needs[first + d * per + 1]:
            h_prev[d] = _previous_states(rows, shape, sizes, d, y, h0)
    if again:
        cells, gates = _tapes_again(
            cell, rows, sizes, shape, weights, bias, packed_x, h_prev, h0, c0
        )
    columns = 4 if cell is GRU else G  # of dgates, see LstmBackward
    dgates, dh = x.new_empty(D, rows.N, columns * H), x.new_empty(D, rows.N, P)
    dh0, dc0 = x.new_empty(D, rows.B, O), x.new_empty(D, rows.B, H) if cell.has_c else None
    if cells is not None:
        dcells = pointable(cells, dcells)
    addresses = addresses_of(weights, sizes, bias)
    one_step = is_one_step(rows, H, reset) and not P
    if one_step:
        addresses = (0, 0, *addresses[2:])
    _native.module().lstm_backward_cpu(
        DTYPE_CODES[x.dtype], shape, pointer(gates), pointer(cells), y.data_ptr(), addresses,
        pointer(h0), pointer(c0), pointer(dy), pointer(dcells), pointer(dh_n), pointer(dc_n),
        dgates.data_ptr(), pointer(dh), dh0.data_ptr(), pointer(dc0), _native.num_threads(),
    )  # fmt: skip
    del keep
    if one_step and needs[1]:
        for d in range(D):
            _add_dh(cell, dh0[d], dgates[d], weights[d * per + 1])

    dx: Tensor | None = None
    dweights: list[Tensor | None] = [None] * len(weights)
    for d in range(D):
        start, of_x = d * per, dgates[d, :, : G * H]
        w_ih = weights[start]
        wanted = needs[first + start : first + start + per]
        if needs[0]:
            dx = of_x @ w_ih if dx is None else dx.addmm_(of_x, w_ih)
        if wanted[0]:
            dweights[start] = of_x.t() @ packed_x
        if wanted[1]:
            states = h_prev[d]
            assert states is not None
            dweights[start + 1] = dw_hh(cell, dgates[d], states)
        if bias and (wanted[2] or wanted[3]):
            dweights[start + 2 : start + 4] = db(cell, dgates[d])
        if P and wanted[-1]:
            assert gates is not None and cells is not None
            o = rows.packed(gates.view(D, *rows.shape, 4 * H)[d][..., 3 * H :])
            c = rows.packed(cells.view(*rows.shape, D * H)[..., d * H : (d + 1) * H])
            dweights[start + per - 1] = dh[d].t() @ (o * c.tanh()).to(x.dtype)
    return None if dx is None else rows.given(dx), dh0, dc0, dweights


def _walk_on_cuda(cell: Cell, x: Tensor, weights: Sequence[Tensor]) -> Any:
    """resident.py or steps.py."""
    return _resident if _resident.takes(x, weights[1].shape[0] // cell.gates) else steps


def walks_steps(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    lengths: Tensor | None, reset: Tensor | None, bias: bool,
) -> bool:  # fmt: skip
    """Whether a call on the CPU goes step by step: where T times GEMM and cell beat one kernel, which
    packs 4 H^2 values first.
    """
    if x.is_cuda or cell is not LSTM or x.shape[0] > steps.MOST or batch_sizes is not None:
        return False
    if lengths is not None or reset is not None or len(weights) % 2:  # odd: a projection
        return False
    T, B, _ = x.shape
    H, P = weights[1].shape[0] // 4, weights[1].shape[1]
    return H == P and steps.faster(T, B, H)


def is_one_step(rows: Rows, H: int, reset: Tensor | None) -> bool:
    """Whether W_hh h is better made by GEMM: of one step, unless packing a small w_hh costs less."""
    return rows.T == 1 and H >= 64 and rows.places is None and reset is None


def shape_of(
    cell: Cell, rows: Rows, sizes: Sizes, reset: Tensor | None
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """LstmShape, and what must live as long as it is used."""
    D, H, P = sizes
    if reset is not None:
        reset = reset.contiguous()
    shape = (
        cell.code, rows.T, rows.B, H, P, D, pointer(rows.batch_sizes), pointer(rows.order),
        pointer(reset),
    )  # fmt: skip
    return shape, (rows.batch_sizes, rows.order, reset)


def addresses_of(
    weights: Sequence[Tensor], sizes: Sizes, bias: bool, int8: Sequence[Int8Weights] = ()
) -> tuple[int, ...]:
    """w_hh, b_ih, b_hh, w_hr, int8, its scale: both directions of each, 0 for what is not there."""
    if len(weights) == 4 and bias and not int8:
        _, w_hh, b_ih, b_hh = weights
        return w_hh.data_ptr(), 0, b_ih.data_ptr(), 0, b_hh.data_ptr(), 0, 0, 0, 0, 0, 0, 0
    D, per = sizes.directions, len(weights) // sizes.directions
    places = (
        -1 if int8 else 1,
        *((2, 3) if bias else (-1, -1)),
        per - 1 if sizes.proj_size else -1,
    )
    found = [
        weights[d * per + k].data_ptr() if k >= 0 and d < D else 0 for k in places for d in (0, 1)
    ]
    for k in (0, 1):
        found += [int8[d][k].data_ptr() if d < len(int8) else 0 for d in (0, 1)]
    return tuple(found)


def _previous_states(
    rows: Rows, shape: tuple[int, ...], sizes: Sizes, d: int, y: Tensor, h0: Tensor | None
) -> Tensor:
    """The h that each step of direction d started from, [N, P]."""
    h_prev = y.new_empty(rows.N, sizes.output_size)
    _native.module().lstm_previous_states_cpu(
        y.element_size(), shape, d, y.data_ptr(), pointer(h0), h_prev.data_ptr()
    )
    return h_prev


def _all_products(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], D: int, h_prev: Sequence[Tensor | None]
) -> Tensor:
    """x W_ih^T + h W_hh^T of each direction, where every h is known; None is zero. [D, N, G*H]; of a
    GRU [D, N, 4*H], whose W_hn h stays by itself behind.
    """
    G, columns = cell.gates, 4 if cell is GRU else cell.gates
    H, per = len(weights[1]) // G, len(weights) // D
    products = input_products(x, weights, D, G * H, columns * H).view(D, len(x), columns * H)
    added = 2 * H if cell is GRU else G * H
    for d in range(D):
        h, w_hh = h_prev[d], weights[d * per + 1].t()
        if h is not None:
            products[d, :, :added].addmm_(h, w_hh[:, :added])
        if cell is not GRU:
            continue
        if h is None:
            products[d, :, 3 * H :] = 0
        else:
            torch.mm(h, w_hh[:, added:], out=products[d, :, 3 * H :])
    return products


def _tapes_again(
    cell: Cell, rows: Rows, sizes: Sizes, shape: tuple[int, ...], weights: Sequence[Tensor],
    bias: bool, packed_x: Tensor, h_prev: Sequence[Tensor | None], h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """cells and gates from x and y: with every h known, the products of all steps are one GEMM."""
    (D, H, _), tape = sizes, cell.tape
    products = _all_products(cell, packed_x, weights, D, h_prev)
    gates = products
    if rows.places is not None:
        gates = packed_x.new_empty(D, rows.T * rows.B, tape * H)
    cells = None
    if cell.has_c:
        cells = rows.empty(packed_x, D * H, state_dtype(packed_x.dtype))
    addresses = (0, 0, *addresses_of(weights, sizes, bias)[2:6], *(0,) * 6)
    _native.module().lstm_forward_cpu(
        DTYPE_CODES[packed_x.dtype], shape, products.data_ptr(), tape * H, addresses, pointer(h0),
        pointer(c0), gates.data_ptr(), 0, pointer(cells), 0, 0, _native.num_threads(),
    )  # fmt: skip
    return cells, gates


def _add_dh(cell: Cell, dh: Tensor, dgates: Tensor, w_hh: Tensor) -> None:
    """Adds the gradient of W_hh h in h."""
    if cell is not GRU:
        dh.addmm_(dgates, w_hh)
        return
    H = dh.shape[1]
    dh.addmm_(dgates[:, : 2 * H], w_hh[: 2 * H])
    dh.addmm_(dgates[:, 3 * H :], w_hh[2 * H :])
