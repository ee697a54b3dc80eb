"""Layers with an axis of members through the CPU kernel: every product is one batched GEMM over the members, and the
chain over time one call of the kernel a member, on memory that is there already. Of many small layers the time goes
to the host's work between kernels, and this has next to none.

Every floating-point tensor has the axis of members in front; batch_sizes, lengths and reset are common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from ..common.dtypes import DTYPE_CODES
from . import native
from .arguments import Sizes
from .cells import GRU, Cell
from .pointers import all_pointable, pointable, pointer
from .products import Chain, gates_of
from .reference import Result, state_dtype
from .rows import Rows


def forward(
    cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    tapes: bool,
) -> Result:  # fmt: skip
    """As ``reference.layer`` of each member."""
    h0, c0, weights = pointable(x, h0), pointable(x, c0), all_pointable(x, weights)
    rows, sizes = _sizes(cell, x, h0, weights, batch_sizes, lengths, bias)
    (D, H, _), G, M = sizes, cell.gates, len(x)
    one_step = native.is_one_step(rows, H, reset)  # h is known: nothing is worth packing for
    width = (cell.tape if one_step or (tapes and rows.places is None) else 0) or G
    inputs, packed_x = x.new_empty(M, D, rows.N, width * H), _packed(rows, x)
    for d in range(D):
        w_ih = weights[d * len(weights) // D]
        torch.bmm(packed_x, w_ih.transpose(1, 2), out=inputs[:, d, :, : G * H])
    if one_step:
        _add_known_products(cell, inputs, h0, weights, D)
    make = x.new_empty if rows.places is None else x.new_zeros
    gates: Tensor | None = None
    if tapes and cell.tape:
        gates = inputs if rows.places is None else make(M, D, rows.T * rows.B, cell.tape * H)
    cells, c_n = None, None
    if cell.has_c:
        c_n = x.new_empty(M, D, rows.B, H)
        if tapes:
            cells = make(M, *rows.shape, D * H, dtype=state_dtype(x.dtype))
    y, h_n = make(M, *rows.shape, D * H), x.new_empty(M, D, rows.B, H)
    shape, keep = native.shape_of(cell, rows, sizes, reset)
    run, threads = _native.module().lstm_forward_cpu, _native.num_threads()
    arrays = _addresses(
        weights, sizes, bias, one_step, M, h0, c0, gates, y, cells, h_n, c_n
    )  # fmt: skip
    for m, (own, of) in enumerate(arrays):
        given = inputs.data_ptr() + m * D * rows.N * width * H * x.element_size()
        run(DTYPE_CODES[x.dtype], shape, given, width * H, own, *of, threads)
    del keep
    if gates is not None:
        gates = gates.view(M, D, *rows.shape, cell.tape * H)
    return Result(y, h_n, c_n, cells, gates)


def chain(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> Chain:  # fmt: skip
    """What ``native.backward`` does before its products, of each member; rows are x's."""
    if cell.tape and gates is None:
        _, _, _, cells, gates = forward(
            cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias, True
        )
    h0, c0, dy, dh_n, dc_n = (pointable(x, t) for t in (h0, c0, dy, dh_n, dc_n))
    weights, y = all_pointable(x, weights), y.contiguous()
    if cells is not None:
        cells, dcells = cells.contiguous(), pointable(cells, dcells)
    gates = pointable(x, gates)
    rows, sizes = _sizes(cell, x, h0, weights, batch_sizes, lengths, bias)
    (D, H, _), M, size = sizes, len(x), x.element_size()
    dgates = x.new_empty(M, D, rows.N, (4 if cell is GRU else cell.gates) * H)
    h_prev, dh0 = x.new_empty(M, D, rows.N, H), x.new_empty(M, D, rows.B, H)
    dc0 = x.new_empty(M, D, rows.B, H) if cell.has_c else None
    shape, keep = native.shape_of(cell, rows, sizes, reset)
    module, threads = _native.module(), _native.num_threads()
    one_step = native.is_one_step(rows, H, reset)
    arrays = _addresses(
        weights, sizes, bias, one_step, M, gates, cells, y, h0, c0, dy, dcells, dh_n, dc_n, dgates,
        None, dh0, dc0,
    )  # fmt: skip
    for m, (own, of) in enumerate(arrays):
        module.lstm_backward_cpu(DTYPE_CODES[x.dtype], shape, *of[:3], own, *of[3:], threads)
        for d in range(D):
            into = h_prev.data_ptr() + (m * D + d) * rows.N * H * size
            module.lstm_previous_states_cpu(size, shape, d, of[2], of[3], into)
    del keep
    packed_x = _packed(rows, x)
    if rows.places is not None:  # the kernel left out what does not run
        packed_x, dgates, h_prev = (_given(rows, t) for t in (packed_x, dgates, h_prev))
    of_x, of_h = gates_of(cell, dgates)
    if one_step and needs[1]:
        for d in range(D):
            w_hh = weights[d * len(weights) // D + 1]
            for g, w in zip(of_h[d], w_hh.split([g.shape[-1] for g in of_h[d]], 1), strict=True):
                dh0[:, d] += g @ w
    return Chain(of_x, of_h, h_prev.unbind(1), packed_x, dh0, dc0)


def _add_known_products(
    cell: Cell, inputs: Tensor, h0: Tensor | None, weights: Sequence[Tensor], D: int
) -> None:
    """Adds h W_hh^T to inputs [M, D, B, G*H]; of a GRU [M, D, B, 4*H], whose W_hn h stays by itself."""
    H = inputs.shape[-1] // (cell.tape or 1)
    added = 2 * H if cell is GRU else inputs.shape[-1]
    for d in range(D):
        own = inputs[:, d]
        if h0 is not None:
            w_hh = weights[d * len(weights) // D + 1].transpose(1, 2)
            own[..., :added] += h0[:, d] @ w_hh[..., :added]
            if cell is GRU:
                torch.bmm(h0[:, d], w_hh[..., added:], out=own[..., 3 * H :])
        elif cell is GRU:
            own[..., 3 * H :] = 0


def _sizes(
    cell: Cell, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, bias: bool,
) -> tuple[Rows, Sizes]:  # fmt: skip
    """Of one member."""
    rows = Rows.of(x[0], None if h0 is None else h0[0], batch_sizes, lengths)
    return rows, Sizes.of_layer(cell, [w[0] for w in weights], bias)


def _packed(rows: Rows, x: Tensor) -> Tensor:
    """[M, *shape, I] -> [M, N, I]."""
    flat = x.flatten(1, -2)
    return flat if rows.places is None else flat.index_select(1, rows.places)


def _given(rows: Rows, t: Tensor) -> Tensor:
    """[..., N, I] -> [..., T * B, I], 0 past a row's length."""
    assert rows.places is not None
    return t.new_zeros(*t.shape[:-2], rows.T * rows.B, t.shape[-1]).index_copy_(-2, rows.places, t)


def _addresses(
    weights: Sequence[Tensor], sizes: Sizes, bias: bool, one_step: bool, M: int,
    *arrays: Tensor | None,
) -> list[tuple[tuple[int, ...], list[int]]]:  # fmt: skip
    """Of each member: the weights' addresses as ``native.py`` hands them on, and the arrays'."""
    first, size = native.addresses_of(weights, sizes, bias), weights[0].element_size()
    if one_step:
        first = (0, 0, *first[2:])
    square, column = weights[1][0].numel() * size, len(weights[1][0]) * size
    steps = [square, square, *(column,) * 4, *(0,) * 6]
    steps = [step if start else 0 for step, start in zip(steps, first, strict=True)]
    steps += [0 if t is None else t.nbytes // M for t in arrays]
    starts = torch.tensor([*first, *map(pointer, arrays)], device="cpu")
    places = torch.arange(M, device="cpu")[:, None]
    table = (starts + places * torch.tensor(steps, device="cpu")).tolist()
    return [(tuple(row[: len(first)]), row[len(first) :]) for row in table]
