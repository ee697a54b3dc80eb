"""LSTM a step at a time: one GEMM and one cell kernel, on the current stream. Even rows, no resets
and no projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from ..common.dtypes import DTYPE_CODES
from .pointers import pointable, stream
from .reference import Result, state_dtype

MOST = 4  # steps that are faster one by one on the CPU


def faster(T: int, B: int, H: int) -> bool:
    """Whether the CPU's sequence kernel would take longer to pack ``w_hh`` than it gains; it packs
    nothing for one step.
    """
    return H >= 192 and 1 < T <= (MOST if B == 1 else 2)


def forward(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], bias: bool,
    tapes: bool,
) -> Result:  # fmt: skip
    """As ``reference.layer`` for an LSTM with every row T steps long."""
    T, B, _ = x.shape
    per = 4 if bias else 2
    D, H = len(weights) // per, weights[1].shape[1]
    flat, gates = x.flatten(0, 1), x.new_empty(D, T, B, 4 * H)
    for d in range(D):
        w_ih, _, *biases = weights[d * per : (d + 1) * per]
        out = gates[d].view(T * B, 4 * H)
        if bias:
            torch.addmm(biases[0] + biases[1], flat, w_ih.t(), out=out)
        else:
            torch.mm(flat, w_ih.t(), out=out)
    y, h_n, c_n = x.new_empty(T, B, D * H), x.new_empty(D, B, H), x.new_empty(D, B, H)
    cells = x.new_empty(T, B, D * H, dtype=state_dtype(x.dtype)) if tapes else None
    _forward_steps(h0, c0, weights[1::per], gates, y, cells, h_n, c_n)
    return Result(y, h_n, c_n, cells, gates if tapes else None)


def backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None, x: Tensor,
    h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """As ``reference.layer_backward``, for what ``needs`` says of x, h0, c0 and each weight."""
    if gates is None:
        _, _, _, cells, gates = forward(x, h0, c0, weights, bias, True)
    assert cells is not None and gates is not None
    T, B, _ = x.shape
    per = 4 if bias else 2
    D, H = len(weights) // per, weights[1].shape[1]
    dcells = pointable(cells, dcells)
    dgates = torch.empty_like(gates)
    dh0, dc0 = x.new_empty(D, B, H), x.new_empty(D, B, H)
    _backward_steps(dy, dh_n, dc_n, dcells, c0, weights[1::per], cells, gates, dgates, dh0, dc0)
    flat = x.flatten(0, 1)
    dx: Tensor | None = None
    dweights: list[Tensor | None] = [None] * len(weights)
    for d in range(D):
        own, start = dgates[d].view(T * B, 4 * H), d * per
        if needs[0]:
            w_ih = weights[start]
            dx = own @ w_ih if dx is None else dx.addmm_(own, w_ih)
        wanted = needs[3 + start : 3 + start + per]
        if wanted[0]:
            dweights[start] = own.t() @ flat
        if wanted[1]:
            dweights[start + 1] = own.t() @ _previous_states(d, y, h0, H)
        if bias and (wanted[2] or wanted[3]):
            db = own.sum(0)
            dweights[start + 2 : start + 4] = db, db.clone()
    return None if dx is None else dx.view(x.shape), dh0, dc0, dweights


def _previous_states(d: int, y: Tensor, h0: Tensor | None, H: int) -> Tensor:
    """The h that each step of direction d started from, [T*B, H]: y, a step late."""
    first = y.new_zeros(1, y.shape[1], H) if h0 is None else h0[d : d + 1]
    rest = y[:-1, :, :H] if d == 0 else y[1:, :, H:]
    return torch.cat((first, rest) if d == 0 else (rest, first)).flatten(0, 1)


def _forward_steps(
    h0: Tensor | None, c0: Tensor | None, w_hh: Sequence[Tensor], gates: Tensor, y: Tensor,
    cells: Tensor | None, h_n: Tensor, c_n: Tensor,
) -> None:  # fmt: skip
    D, T, B, H4 = gates.shape
    H, code, state = H4 // 4, DTYPE_CODES[gates.dtype], state_dtype(gates.dtype)
    cell = _native.module().lstm_cell_forward
    device, queue = stream(gates)
    size, state_size = gates.element_size(), state.itemsize
    for d in range(D):
        w = w_hh[d].t()
        own_gates = gates[d].unbind(0)
        own_y = y.unflatten(-1, (D, H))[:, :, d].unbind(0)
        h = None if h0 is None else h0[d]
        c_state = None if c0 is None else c0[d].to(state, copy=True)
        if c_state is None and cells is None:
            c_state = torch.zeros(B, H, dtype=state, device=gates.device)
        c_prev, c_prev_stride = (0, H) if c_state is None else (c_state.data_ptr(), H)
        for t in range(T) if d == 0 else reversed(range(T)):
            if h is not None:
                own_gates[t].addmm_(h, w)
            c, c_stride = c_prev, H
            if cells is not None:
                c, c_stride = cells.data_ptr() + (t * B * D + d) * H * state_size, D * H
            cell(
                code, B, H, gates.data_ptr() + (d * T + t) * B * 4 * H * size, c_prev,
                c_prev_stride, c, c_stride, y.data_ptr() + (t * B * D + d) * H * size, D * H,
                device, queue,
            )  # fmt: skip
            h, c_prev, c_prev_stride = own_y[t], c, c_stride
        h_n[d].copy_(h)  # type: ignore[arg-type]
        last = T - 1 if d == 0 else 0
        c_n[d].copy_(c_state if cells is None else cells[last, :, d * H : (d + 1) * H])  # type: ignore[arg-type]


def _backward_steps(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    c0: Tensor | None, w_hh: Sequence[Tensor], cells: Tensor, gates: Tensor, dgates: Tensor,
    dh0: Tensor, dc0: Tensor,
) -> None:  # fmt: skip
    D, T, B, H4 = gates.shape
    H, code, state = H4 // 4, DTYPE_CODES[gates.dtype], cells.dtype
    cell = _native.module().lstm_cell_backward
    device, queue = stream(gates)
    size, state_size = gates.element_size(), state.itemsize
    for d in range(D):
        w = w_hh[d]
        own_dgates = dgates[d].unbind(0)
        c_first = None if c0 is None else c0[d].to(state)
        dh = None if dh_n is None else dh_n[d]
        dc = torch.zeros(B, H, dtype=state, device=gates.device)
        if dc_n is not None:
            dc.copy_(dc_n[d])
        for s in range(T):
            t = T - 1 - s if d == 0 else s
            row = (t * B * D + d) * H
            if s < T - 1:
                earlier = row - B * D * H if d == 0 else row + B * D * H
                c_prev, c_prev_stride = cells.data_ptr() + earlier * state_size, D * H
            else:
                c_prev, c_prev_stride = (0 if c_first is None else c_first.data_ptr()), H
            step = (d * T + t) * B * 4 * H * size
            cell(
                code, B, H, gates.data_ptr() + step, c_prev, c_prev_stride,
                cells.data_ptr() + row * state_size, D * H,
                0 if dy is None else dy.data_ptr() + row * size, D * H,
                0 if dcells is None else dcells.data_ptr() + row * state_size, D * H,
                0 if dh is None else dh.data_ptr(), dc.data_ptr(), dgates.data_ptr() + step,
                device, queue,
            )  # fmt: skip
            dh = torch.mm(own_dgates[t], w)
        dh0[d].copy_(dh)  # type: ignore[arg-type]
        dc0[d].copy_(dc)
