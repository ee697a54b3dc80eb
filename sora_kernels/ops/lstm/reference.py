"""The recurrent layers' definition in plain torch: all directions of one layer, any device and dtype.

``layer`` is a differentiable loop over time; ``layer_backward`` is its gradient written by hand,
from the tapes that every backend saves. Neither writes in place, so that vmap, jvp and export take
them.

Shapes: ``x`` [T, B, I], ``h0`` [D, B, P], ``c0`` [D, B, H], weights by direction ``w_ih`` [G*H, I],
``w_hh`` [G*H, P], then ``b_ih``, ``b_hh`` [G*H] if ``bias``, then ``w_hr`` [P, H] if there is a
projection (LSTM; else P = H). Gates G: LSTM i, f, g, o; GRU r, z, n; RNN one. Cell states are kept
and gates computed in fp32 for 16-bit tensors, else in the tensors' own dtype; h is rounded to x's.

Packed: ``x`` [N, I] with ``batch_sizes`` as in ``PackedSequence``; every [T, B, ...] is [N, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import GRU, LSTM, RNN_TANH, Cell

State = TypeVar("State", bound="Tensor | None")


class Weights(NamedTuple):
    """One direction's weights."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Result(NamedTuple):
    """``y`` [T, B, D*P], ``h_n`` [D, B, P], LSTM's ``c_n`` [D, B, H]; for backward (and ``cells`` for
    the caller who asks): ``cells`` [T, B, D*H] in the state dtype and ``gates`` [D, T, B, tape*H],
    see ``Cell.tape``. What a cell has not, or nobody wants, is None. ``y`` and ``cells`` are 0 past
    a row's length; ``gates`` mean nothing there.
    """

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    cells: Tensor | None
    gates: Tensor | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of cell states, and of the arithmetic on gates."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def split_weights(weights: Sequence[Tensor], bias: bool) -> list[Weights]:
    """A layer's flat list, by direction. One or two directions are told apart by the number of
    entries.
    """
    per = 4 if bias else 2
    if len(weights) not in (per, 2 * per):
        per += 1
    directions = []
    for start in range(0, len(weights), per):
        own = list(weights[start : start + per])
        b_ih, b_hh = (own[2], own[3]) if bias else (None, None)
        w_hr = own[-1] if per % 2 else None
        directions.append(Weights(own[0], own[1], b_ih, b_hh, w_hr))
    return directions


def packed_sizes(batch_sizes: Tensor, x: Tensor) -> list[int]:
    """``batch_sizes`` as numbers, once they fit ``x`` [N, I]."""
    sizes: list[int] = batch_sizes.tolist()
    if sum(sizes) != len(x) or min(sizes) < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(
            f"batch_sizes: expected {len(x)} rows in steps of at least one, none larger than the one "
            f"before, got {sizes}"
        )
    return sizes


class Packing:
    """Between [N, ...], the rows of ``PackedSequence``, and [T, B, ...] with ``lengths``."""

    def __init__(self, batch_sizes: Tensor, x: Tensor) -> None:
        sizes, device = packed_sizes(batch_sizes, x), x.device
        T, B = len(sizes), sizes[0]
        starts, rows = batch_sizes.cumsum(0) - batch_sizes, torch.arange(B, device="cpu")
        live = rows < batch_sizes[:, None]
        step = torch.repeat_interleave(torch.arange(T, device="cpu"), batch_sizes)
        at = step * B + torch.arange(len(step), device="cpu") - starts[step]
        self.sizes = (T, B)
        self.lengths = live.sum(0).to(device)
        self._live = live.to(device)
        self._source = torch.where(live, starts[:, None] + rows, 0).flatten().to(device)
        self._at = at.to(device)

    def pad(self, t: Tensor, axis: int = 0) -> Tensor:
        """[..., N, ...] -> [..., T, B, ...], 0 past a row's length."""
        padded = t.index_select(axis, self._source).unflatten(axis, self.sizes)
        live = self._live.reshape(*self.sizes, *(1,) * (t.dim() - 1 - axis))
        return torch.where(live, padded, torch.zeros((), dtype=t.dtype, device=t.device))

    def take(self, t: Tensor, axis: int = 0) -> Tensor:
        """[..., T, B, ...] -> [..., N, ...]."""
        return t.flatten(axis, axis + 1).index_select(axis, self._at)


def layer(
    cell: Cell,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    bias: bool,
    tapes: bool = True,
) -> Result:
    """Runs one layer; ``None`` states are zero.

    Args:
        batch_sizes: int64 [T] on the CPU, not increasing: x is packed.
        lengths: int [B]; row b ends before step ``lengths[b]``: its states stop there (the reverse
            direction starts there) and its outputs are 0 from there on.
        reset: bool [T, B]; true at t means that a new sequence starts at t: the forward direction
            clears its state before step t, the reverse direction before step t - 1.
        tapes: whether ``cells`` and ``gates`` are wanted.
    """
    if batch_sizes is not None:
        packing = Packing(batch_sizes, x)
        reset = None if reset is None else packing.pad(reset)
        padded = layer(
            cell, packing.pad(x), h0, c0, weights, None, packing.lengths, reset, bias, tapes
        )
        y, h_n, c_n, cells, gates = padded
        cells = None if cells is None else packing.take(cells)
        gates = None if gates is None else packing.take(gates, 1)
        return Result(packing.take(y), h_n, c_n, cells, gates)
    T, B = x.shape[:2]
    x = _within(x, lengths)
    state = state_dtype(x.dtype)
    per_direction = []
    for d, w in enumerate(split_weights(weights, bias)):
        H, P = w.w_hh.shape[0] // cell.gates, w.w_hh.shape[1]
        h = x.new_zeros(B, P) if h0 is None else h0[d]
        c: Tensor | None = None
        if cell.has_c:
            c = x.new_zeros(B, H, dtype=state) if c0 is None else c0[d].to(state)
        inputs = F.linear(x, w.w_ih, w.b_ih)
        steps: list[tuple[Tensor | None, ...]] = []
        for t in range(T) if d == 0 else reversed(range(T)):
            live = None if lengths is None else (t < lengths)[:, None]
            clear = _clear_before(t, d, T, lengths, reset)
            h_prev, c_prev = _cleared(h, clear), _cleared(c, clear)
            new: Any = _step(cell, inputs[t], h_prev, c_prev, w, state)
            if live is None:
                h, c = new[0], new[1]
            else:
                h = torch.where(live, new[0], h_prev)
                c = None if c_prev is None else torch.where(live, new[1], c_prev)
                new = tuple(None if v is None else torch.where(live, v, 0) for v in new)
            steps.append(new if tapes else (new[0], None, None))
        if d == 1:
            steps.reverse()
        per_direction.append((h, c, *zip(*steps, strict=True)))
    h_n, c_n, y, cells_of, gates_of = zip(*per_direction, strict=True)
    stacked = [[_stack(column) for column in kind] for kind in (y, cells_of, gates_of)]
    return Result(
        torch.cat(stacked[0], -1),  # type: ignore[arg-type]
        torch.stack(h_n),
        torch.stack(c_n).to(x.dtype) if cell.has_c else None,
        torch.cat(stacked[1], -1) if tapes and cell.has_c else None,  # type: ignore[arg-type]
        torch.stack(stacked[2]) if tapes and cell.tape else None,  # type: ignore[arg-type]
    )


def layer_backward(
    cell: Cell,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    cells: Tensor | None,
    gates: Tensor | None,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Gradients of ``x``, ``h0``, ``c0`` and of every weight; ``None`` gradients of outputs are
    zero, ``None`` tapes are made again.
    """
    if cell.tape and gates is None:
        again = layer(cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias)
        cells, gates = again.cells, again.gates
    if batch_sizes is not None:
        packing = Packing(batch_sizes, x)
        x, y = packing.pad(x), packing.pad(y)
        dy, dcells, reset, cells = (
            None if t is None else packing.pad(t) for t in (dy, dcells, reset, cells)
        )
        gates = None if gates is None else packing.pad(gates, 1)
        dx, *others = layer_backward(
            cell, dy, dh_n, dc_n, dcells, x, h0, c0, weights, None, packing.lengths, reset,
            y, cells, gates, bias,
        )  # fmt: skip
        return (packing.take(dx), *others)  # type: ignore[return-value]
    T, B = x.shape[:2]
    x = _within(x, lengths)
    state = state_dtype(x.dtype)
    dxs, dh0, dc0, dweights = [], [], [], []
    for d, w in enumerate(split_weights(weights, bias)):
        H, P = w.w_hh.shape[0] // cell.gates, w.w_hh.shape[1]
        own_y = y[..., d * P : (d + 1) * P]
        own_cells = None if cells is None else cells[..., d * H : (d + 1) * H]
        own_gates = None if gates is None else gates[d].to(state)
        h_first = x.new_zeros(B, P) if h0 is None else h0[d]
        dh = x.new_zeros(B, P, dtype=state) if dh_n is None else dh_n[d].to(state)
        c_first: Tensor | None = None
        dc: Tensor | None = None
        if cell.has_c:
            c_first = x.new_zeros(B, H, dtype=state) if c0 is None else c0[d].to(state)
            dc = x.new_zeros(B, H, dtype=state) if dc_n is None else dc_n[d].to(state)
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for t in reversed(range(T)) if d == 0 else range(T):
            live = None if lengths is None else (t < lengths)[:, None]
            clear = _clear_before(t, d, T, lengths, reset)
            h_prev = _cleared(_previous(t, d, T, lengths, own_y, h_first), clear)
            c_prev = _cleared(_previous(t, d, T, lengths, own_cells, c_first), clear)
            dh_now = dh if dy is None else dh + dy[t, :, d * P : (d + 1) * P]
            dc_now = dc if dcells is None or dc is None else dc + dcells[t, :, d * H : (d + 1) * H]
            gates_t = None if own_gates is None else own_gates[t]
            c_t = None if own_cells is None else own_cells[t]
            da, db, dh_prev, dc_prev = _step_backward(
                cell, dh_now, dc_now, own_y[t], h_prev, c_t, c_prev, gates_t, w, x.dtype
            )
            dh_prev, dc_prev = _cleared(dh_prev, clear), _cleared(dc_prev, clear)
            if live is None:
                dh, dc = dh_prev, dc_prev
            else:
                da, db, dh_now = (torch.where(live, v, 0) for v in (da, db, dh_now))
                dh = torch.where(live, dh_prev, dh)
                dc = None if dc_prev is None else torch.where(live, dc_prev, dc)  # type: ignore[arg-type]
            steps.append((da, db, h_prev, dh_now))
        if d == 0:
            steps.reverse()
        da, db, h_prev, dh_now = (torch.cat(column) for column in zip(*steps, strict=True))
        dxs.append((da @ w.w_ih).unflatten(0, (T, B)))
        dh0.append(dh.to(x.dtype))
        dc0.append(None if dc is None else dc.to(x.dtype))
        dweights += [da.t() @ x.flatten(0, 1), db.t() @ h_prev]
        if bias:
            dweights += [da.sum(0), db.sum(0)]
        if w.w_hr is not None:
            assert own_gates is not None and own_cells is not None
            m = _within((own_gates[..., 3 * H :] * own_cells.tanh()).to(x.dtype), lengths)
            dweights.append(dh_now.to(x.dtype).t() @ m.flatten(0, 1))
    return (
        sum(dxs[1:], dxs[0]),
        torch.stack(dh0),
        torch.stack(dc0) if cell.has_c else None,  # type: ignore[arg-type]
        dweights,
    )


def _step(
    cell: Cell, a_x: Tensor, h: Tensor, c: Tensor | None, w: Weights, state: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step from ``a_x = w_ih x + b_ih``: h, c and what the tape keeps."""
    dtype, a_h = h.dtype, F.linear(h, w.w_hh, w.b_hh)
    if cell is LSTM:
        assert c is not None
        i, f, g, o = (a_x + a_h).to(state).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = (o * c.tanh()).to(dtype)
        if w.w_hr is not None:
            h = F.linear(h, w.w_hr)
        return h, c, torch.cat((i, f, g, o), -1).to(dtype)
    if cell is GRU:
        r_x, z_x, n_x = a_x.to(state).chunk(3, -1)
        r_h, z_h, q = a_h.to(state).chunk(3, -1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        n = (n_x + r * q).tanh()
        h = ((1 - z) * n + z * h.to(state)).to(dtype)
        return h, None, torch.cat((r, z, n, q), -1).to(dtype)
    a = (a_x + a_h).to(state)
    return (a.tanh() if cell is RNN_TANH else a.relu()).to(dtype), None, None


def _step_backward(
    cell: Cell, dh: Tensor, dc: Tensor | None, h: Tensor, h_prev: Tensor, c: Tensor | None,
    c_prev: Tensor | None, gates: Tensor | None, w: Weights, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of ``w_ih x + b_ih`` and of ``w_hh h + b_hh``, both [B, G*H] in ``dtype``, and of
    the states that the step started from. ``dh``, ``dc`` and what comes back for them are in the
    state dtype.
    """
    if cell is LSTM:
        assert dc is not None and c is not None and c_prev is not None and gates is not None
        i, f, g, o = gates.chunk(4, -1)
        tanh_c = c.tanh()
        dm = dh if w.w_hr is None else (dh.to(dtype) @ w.w_hr).to(dh.dtype)
        dc = dc + dm * o * (1 - tanh_c * tanh_c)
        di, df = dc * g * i * (1 - i), dc * c_prev * f * (1 - f)
        dg, do = dc * i * (1 - g * g), dm * tanh_c * o * (1 - o)
        da = torch.cat((di, df, dg, do), -1).to(dtype)
        return da, da, (da @ w.w_hh).to(dh.dtype), dc * f
    if cell is GRU:
        assert gates is not None
        r, z, n, q = gates.chunk(4, -1)
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (h_prev - n) * z * (1 - z)
        dr = dn * q * r * (1 - r)
        da = torch.cat((dr, dz, dn), -1).to(dtype)
        db = torch.cat((dr, dz, dn * r), -1).to(dtype)
        return da, db, dh * z + db @ w.w_hh, None
    grown = h.to(dh.dtype)
    # As torch's: NaN passes relu's gradient.
    da = dh * (1 - grown * grown) if cell is RNN_TANH else torch.where(grown <= 0, 0, dh)
    da = da.to(dtype)
    return da, da, (da @ w.w_hh).to(dh.dtype), None


def _within(t: Tensor, lengths: Tensor | None) -> Tensor:
    """[T, B, ...] with 0 past a row's length, where it may hold anything."""
    if lengths is None:
        return t
    live = torch.arange(t.shape[0], device=t.device)[:, None] < lengths
    return torch.where(live[..., None], t, 0)


def _stack(column: Sequence[Tensor | None]) -> Tensor | None:
    return None if column[0] is None else torch.stack(column)  # type: ignore[arg-type]


def _cleared(state: State, clear: Tensor | None) -> State:
    if state is None or clear is None:
        return state
    return state.masked_fill(clear, 0)  # type: ignore[return-value]


def _clear_before(
    t: int, d: int, T: int, lengths: Tensor | None, reset: Tensor | None
) -> Tensor | None:
    """[B, 1]: rows whose state is cleared before step t of direction d."""
    if reset is None:
        return None
    boundary = t if d == 0 else t + 1
    if boundary == T:
        return None
    clear = reset[boundary]
    if lengths is not None:
        clear = clear & (boundary < lengths)
    return clear[:, None]


def _previous(
    t: int, d: int, T: int, lengths: Tensor | None, states: Tensor | None, first: State
) -> State:
    """The state that step t of direction d started from, before any clearing."""
    earlier = t - 1 if d == 0 else t + 1
    if states is None or first is None or earlier in (-1, T):
        return first
    state = states[earlier]
    if d == 1 and lengths is not None:
        state = torch.where((earlier >= lengths)[:, None], first, state)
    return state  # type: ignore[return-value]
