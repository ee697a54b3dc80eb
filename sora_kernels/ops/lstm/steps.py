"""A layer a step at a time: one GEMM and one kernel a step, on the current stream. Every cell and
feature but projections. Nothing synchronises, and what the device knows (lengths, resets) stays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..common.dtypes import DTYPE_CODES
from .cells import GRU, LSTM, Cell
from .pointers import all_pointable, pointable, pointer, stream
from .products import input_products
from .reference import Result, state_dtype
from .rows import Rows

MOST = 4  # steps that are faster one by one on the CPU


def faster(T: int, B: int, H: int) -> bool:
    """Whether the CPU's sequence kernel would take longer to pack ``w_hh`` than it gains; it packs
    nothing for one step.
    """
    return H >= 192 and 1 < T <= (MOST if B == 1 else 2)


class Walk(NamedTuple):
    """Which rows run at which step: LstmSteps of csrc/lstm.

    Attributes:
        N: data rows, one for each (step, row) pair: T * B of x [T, B, I], all of a packed x.
        sizes, offsets: rows of each step, and int64 [T + 1] on the CPU, if x is packed.
        lengths: int64 [B], where x is. reset: bool [N].
    """

    cell: Cell
    T: int
    B: int
    H: int
    N: int
    sizes: list[int] | None = None
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None

    @classmethod
    def of(
        cls, cell: Cell, x: Tensor, h0: Tensor | None, H: int, batch_sizes: Tensor | None,
        lengths: Tensor | None, reset: Tensor | None,
    ) -> Walk:  # fmt: skip
        if reset is not None:
            reset = reset.contiguous()
        if batch_sizes is None:
            T, B, _ = x.shape
            if lengths is not None:
                lengths = lengths.to(x.device, torch.int64, non_blocking=True).contiguous()
            return cls(cell, T, B, H, T * B, None, None, lengths, reset)
        rows = Rows.of(x, h0, batch_sizes, None)
        offsets = torch.zeros(rows.T + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(batch_sizes, 0, out=offsets[1:])
        return cls(cell, rows.T, rows.B, H, rows.N, batch_sizes.tolist(), offsets, None, reset)

    @property
    def ragged(self) -> bool:
        """Whether some rows may not run at some steps."""
        return self.sizes is not None or self.lengths is not None

    def steps(self, d: int) -> range:
        return range(self.T) if d == 0 else range(self.T - 1, -1, -1)

    def address(self, d: int) -> tuple[int, ...]:
        return (
            self.cell.code, self.T, self.B, self.H, d, pointer(self.offsets), pointer(self.lengths),
            pointer(self.reset),
        )  # fmt: skip

    def by_step(self, t: Tensor) -> Sequence[Tensor]:
        """[N, ...] -> the rows of each step."""
        if self.sizes is None:
            return t.unflatten(0, (self.T, self.B)).unbind(0)
        return t.split(self.sizes)

    def late(self, d: int, t: Tensor, first: Tensor) -> Tensor:
        """[N, ...] -> of each pair what ``t`` holds of the step before in direction d, and ``first``
        [B, ...] where that is none. Lengths are not looked at.
        """
        sizes, offsets = self.sizes, self.offsets
        if sizes is None or offsets is None:
            rest = t[: self.N - self.B] if d == 0 else t[self.B :]
            return torch.cat((first, rest) if d == 0 else (rest, first))
        starts: list[int] = offsets.tolist()
        pieces, begin, end = [], 0, 0  # rows begin .. end - 1 of t come next
        for s, n in enumerate(sizes):
            earlier = s - 1 if d == 0 else s + 1
            kept = min(n, sizes[earlier]) if 0 <= earlier < self.T else 0
            if kept:
                if starts[earlier] != end:
                    pieces.append(t[begin:end])
                    begin = starts[earlier]
                end = starts[earlier] + kept
            if kept < n:
                pieces += [t[begin:end], first[kept:n]]
                begin = end
        pieces.append(t[begin:end])
        return torch.cat(pieces)

    def previous_states(self, d: int, y: Tensor, h0: Tensor | None) -> Tensor:
        """The h that each step of direction d started from, after any reset: [N, H]. Of a pair that
        does not run it means nothing.
        """
        own = y.view(self.N, y.shape[-1])[:, d * self.H : (d + 1) * self.H]
        return self.cut(d, self.before(d, own, None if h0 is None else h0[d]))

    def before(self, d: int, t: Tensor, first: Tensor | None) -> Tensor:
        """[N, W] -> of each pair what ``t`` holds of its row's step before in direction d, and ``first``
        [B, W], or 0, where that is none. Of a pair that does not run it means nothing.
        """
        width = t.shape[1]
        if first is None:
            first = t.new_zeros(self.B, width)
        found = self.late(d, t, first)
        if d == 1 and self.lengths is not None:
            later = torch.arange(1, self.T + 1, device=t.device)[:, None]
            begins = (later >= self.lengths)[..., None]
            found = torch.where(begins, first, found.view(self.T, self.B, width)).flatten(0, 1)
        return found

    def cut(self, d: int, t: Tensor) -> Tensor:
        """[N, W] with 0 at the pairs before which direction d clears its state."""
        if self.reset is None:
            return t
        clear = self.reset.view(-1, 1)
        return t.masked_fill(clear if d == 0 else self.before(1, clear, None), 0)


def forward(
    cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    tapes: bool,
) -> Result:  # fmt: skip
    """As ``reference.layer``, without projections."""
    weights, per, H = all_pointable(x, weights), 4 if bias else 2, weights[1].shape[1]
    walk = Walk.of(cell, x, h0, H, batch_sizes, lengths, reset)
    D, B, sizes, state = len(weights) // per, walk.B, walk.sizes, state_dtype(x.dtype)
    G, code, (device, queue) = cell.gates, DTYPE_CODES[x.dtype], stream(x)
    width = (cell.tape if tapes else 0) or G
    flat = x.flatten(0, 1) if sizes is None else x
    inputs = input_products(flat, weights, D, G * H, width * H)
    rows = x.shape[:-1]
    y, h_n, c_n, cells, c = x.new_empty(*rows, D * H), x.new_empty(D, B, H), None, None, None
    _begin(h_n, h0)
    if cell is LSTM:
        c_n = x.new_empty(D, B, H)
        c = c_n if state == x.dtype else x.new_empty(D, B, H, dtype=state)
        _begin(c, c0)
        cells = x.new_empty(*rows, D * H, dtype=state) if tapes else None
    hidden = x.new_empty(B, G * H)
    size, state_size, at = x.element_size(), state.itemsize, hidden.data_ptr()
    for d in range(D):
        _, w_hh, *biases = weights[d * per : (d + 1) * per]
        given = inputs.data_ptr() + d * walk.N * width * H * size
        b_ih, b_hh = (b.data_ptr() for b in biases) if bias else (0, 0)
        h, w = h_n[d], w_hh.t()
        step = _native.module().LstmForwardSteps(
            code, walk.address(d), given, width * H, b_ih, b_hh, h.data_ptr(), h.data_ptr(),
            _at(c, d), y.data_ptr() + d * H * size, D * H,
            0 if cells is None else cells.data_ptr() + d * H * state_size, D * H,
            given if tapes and cell.tape else 0, device, queue,
        )  # fmt: skip
        begun, n, own, out = h0 is not None, B, h, hidden
        for t in walk.steps(d):
            if sizes is not None and sizes[t] != n:
                n = sizes[t]
                own, out = h[:n], hidden[:n]
            if begun:
                torch.mm(own, w, out=out)
            step(t, at if begun else 0)
            begun = True
    if c is not None and c is not c_n:
        c_n = c.to(x.dtype)
    gates = inputs.view(D, *rows, cell.tape * H) if tapes and cell.tape else None
    return Result(y, h_n, c_n, cells, gates)


def backward(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """As ``reference.layer_backward``, for what ``needs`` says of x, the states and each weight."""
    weights, per, H = all_pointable(x, weights), 4 if bias else 2, weights[1].shape[1]
    walk, y = Walk.of(cell, x, h0, H, batch_sizes, lengths, reset), y.contiguous()
    D, G, first = len(weights) // per, cell.gates, 2 + cell.has_c
    again = cell.tape > 0 and gates is None
    h_prev = [
        walk.previous_states(d, y, h0)
        if again or cell is GRU or needs[first + d * per + 1]
        else None
        for d in range(D)
    ]
    if again:
        cells, gates = tapes_again(walk, x, c0, weights, bias, h_prev)
    if cells is not None:
        dcells = pointable(cells, dcells)
    dgates, dh0, dc0 = walk_back(
        walk, dy, dh_n, dc_n, dcells, c0, weights[1::per], y, h_prev, cells, gates, needs[1]
    )
    dx: Tensor | None = None
    dweights: list[Tensor | None] = [None] * len(weights)
    flat = x
    if walk.sizes is None:
        if walk.lengths is not None and any(needs[first::per]):  # what lies behind may be NaN
            live = torch.arange(walk.T, device=x.device)[:, None] < walk.lengths
            flat = torch.where(live[..., None], x, 0)
        flat = flat.flatten(0, 1)
    for d in range(D):
        start, of_x, of_h = d * per, dgates[d, :, : G * H], dgates[d, :, -G * H :]
        wanted = needs[first + start : first + start + per]
        if needs[0]:
            w_ih = _rolled(walk, weights[start], 1)
            dx = of_x @ w_ih if dx is None else dx.addmm_(of_x, w_ih)
        if wanted[0]:
            dweights[start] = _rolled(walk, of_x.t() @ flat, -1)
        if wanted[1]:
            states = h_prev[d]
            assert states is not None
            dweights[start + 1] = of_h.t() @ states
        if bias and (wanted[2] or wanted[3]):
            db = dgates[d].sum(0)
            dweights[start + 2] = _rolled(walk, db[: G * H], -1)
            dweights[start + 3] = db[-G * H :].clone()
    return None if dx is None else dx.view(x.shape), dh0, dc0, dweights


def _begin(states: Tensor, given: Tensor | None) -> None:
    if given is None:
        states.zero_()
    else:
        states.copy_(given)


def _at(states: Tensor | None, d: int) -> int:
    """Address of direction d's of [D, B, H]."""
    return 0 if states is None else states[d].data_ptr()


def _rolled(walk: Walk, t: Tensor, gates: int) -> Tensor:
    """A GRU's gates r, z, n along the first axis in the order of dgates, n, r, z, or back (-1)."""
    return t.roll(gates * walk.H, 0) if walk.cell is GRU else t


def tapes_again(
    walk: Walk, x: Tensor, c0: Tensor | None, weights: Sequence[Tensor], bias: bool,
    h_prev: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """cells and gates from x and y: with every h known, the products of all steps are one GEMM, and
    a GRU's steps do not wait for each other.
    """
    cell, (_, T, B, H, N, *_) = walk.cell, walk
    G, per, state, size = cell.gates, 4 if bias else 2, state_dtype(x.dtype), x.element_size()
    D, rows, (device, queue) = len(weights) // per, x.shape[:-1], stream(x)
    flat = x.flatten(0, 1) if walk.sizes is None else x
    gates = input_products(flat, weights, D, G * H, cell.tape * H).view(D, N, cell.tape * H)
    cells, c = None, None
    if cell is LSTM:
        cells = x.new_empty(*rows, D * H, dtype=state)
        c = x.new_empty(D, B, H, dtype=state)
        _begin(c, c0)
    starts = [t * B for t in range(T)] if walk.offsets is None else walk.offsets.tolist()
    for d in range(D):
        states = h_prev[d]
        assert states is not None
        _, w_hh, *biases = weights[d * per : (d + 1) * per]
        hidden = states @ w_hh.t()
        at_once = (cell.code, 1, N, H, 0, 0, 0, 0)
        step = _native.module().LstmForwardSteps(
            DTYPE_CODES[x.dtype], at_once if c is None else walk.address(d), gates[d].data_ptr(),
            cell.tape * H, *((b.data_ptr() for b in biases) if bias else (0, 0)),
            states.data_ptr(), 0, _at(c, d), 0, 0,
            0 if cells is None else cells.data_ptr() + d * H * state.itemsize, D * H,
            gates[d].data_ptr(), device, queue,
        )  # fmt: skip
        for t in (0,) if c is None else walk.steps(d):
            step(t, hidden.data_ptr() + starts[t] * G * H * size)
    return cells, gates.view(D, *rows, cell.tape * H)


def walk_back(
    walk: Walk, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    c0: Tensor | None, w_hh: Sequence[Tensor], y: Tensor, h_prev: Sequence[Tensor | None],
    cells: Tensor | None, gates: Tensor | None, needs_dh0: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dgates [D, N, A*H], see LstmStepBackward, and the gradients of the first states."""
    cell, (_, _, B, H, N, *_) = walk.cell, walk
    D, G, A = len(w_hh), cell.gates, cell.tape or 1
    state, (device, queue) = state_dtype(y.dtype), stream(y)

    def at(t: Tensor | None, d: int, row: int = 1) -> int:
        return 0 if t is None else t.data_ptr() + d * row * H * t.element_size()

    def states(given: Tensor | None, into: Tensor) -> Tensor:
        t = into if state == y.dtype else torch.empty_like(into, dtype=state)
        _begin(t, given)
        return t

    dgates, dh0 = y.new_empty(D, N, A * H), y.new_empty(D, B, H)
    # Where every row runs at every step, what is not in the product is nothing.
    carries = cell is GRU or walk.ragged or walk.reset is not None
    dh, dc, dc0 = states(None, dh0) if carries else None, None, None
    if cell is LSTM:
        dc0 = y.new_empty(D, B, H)
        dc = states(dc_n, dc0)
    product = y.new_empty(B, H)
    for d in range(D):
        kept_h, stride = at(y, d), D * H
        if cell is GRU:
            kept_h, stride = pointer(h_prev[d]), H
        step = _native.module().LstmBackwardSteps(
            DTYPE_CODES[y.dtype], walk.address(d), at(gates, d, 4 * N), at(cells, d), D * H,
            at(c0, d, B), kept_h, stride, at(dy, d), D * H, at(dcells, d), D * H, at(dh, d, B),
            at(dc, d, B), at(dgates, d, A * N), device, queue,
        )  # fmt: skip
        own = walk.by_step(dgates[d, :, -G * H :])
        last, sent, n, out = walk.steps(d)[0], at(dh_n, d, B), B, product
        for t in reversed(walk.steps(d)):
            step(t, sent)
            if t == last and not carries:
                if needs_dh0:
                    torch.mm(own[t], w_hh[d], out=dh0[d])
                break
            if walk.sizes is not None and walk.sizes[t] != n:
                n = walk.sizes[t]
                out = product[:n]
            torch.mm(own[t], w_hh[d], out=out)
            sent = product.data_ptr()
        if carries:
            step(-1 if d == 0 else walk.T, sent)
    if dh is not None and dh is not dh0:
        dh0.copy_(dh)
    if dc is not None and dc is not dc0:
        dc0 = dc.to(y.dtype)
    return dgates, dh0, dc0
