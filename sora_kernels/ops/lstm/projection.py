"""An LSTM layer with projections by a core that knows none: ``steps`` or ``resident``.

With m = o tanh(c) and h = W_hr m, W_hh h(t-1) is (W_hh W_hr) m(t-1): the LSTM over m, whose recurrent weights
are that product, has the same gates and the same c, and y is one GEMM over all steps. h_0 is W_hr of nothing
known: it enters as more columns of x, at each row's first step.

Backward sends the chain through the same LSTM. What h(t-1) gets, and the gradient of W_hh, are those of x and
W_ih widened by every step's h(t-1) and by W_hh, so that no gradient passes through the folded weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cells import LSTM
from .reference import Result, split_weights, state_dtype
from .steps import Walk


class Core(Protocol):
    """A layer without projections: its functions take what those of ``steps`` take."""

    @property
    def forward(self) -> Any: ...
    @property
    def backward(self) -> Any: ...


def forward(
    core: Core, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    tapes: bool,
) -> Result:  # fmt: skip
    """As ``reference.layer`` of an LSTM with projections."""
    layer = _Layer.of(core, x, h0, weights, batch_sizes, lengths, reset, bias)
    found = layer.over_m(x, h0, c0, tapes)
    y = layer.products(found.y, [w.t() for w in layer.w_hr])
    h_n = [layer.last(d, own, _of(h0, d)) for d, own in enumerate(layer.directions(y))]
    return found._replace(y=y, h_n=torch.stack(h_n))


def backward(
    core: Core, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """As ``reference.layer_backward``, for what ``needs`` says of x, the states and each weight."""
    layer = _Layer.of(core, x, h0, weights, batch_sizes, lengths, reset, bias)
    if cells is None or gates is None:
        *_, cells, gates = layer.over_m(x, h0, c0, True)
        assert cells is not None and gates is not None
    m = layer.m(cells, gates)
    per = 5 if bias else 3
    wanted = [needs[start : start + per] for start in range(3, len(needs), per)]
    sends = needs[1] or any(own[-1] for own in wanted)  # whether what h(t-1) gets is
    widened = sends or any(own[1] for own in wanted)
    core_needs = [needs[0] or sends, False, needs[2]]
    for own in wanted:
        core_needs += [own[0] or own[1], False, *own[2:-1]]
    dm = None if dy is None else layer.products(dy, layer.w_hr)
    dm_n = None
    if dh_n is not None:
        dm_n = torch.stack([dh @ w for dh, w in zip(dh_n, layer.w_hr, strict=True)])
    states = layer.previous_states(y, h0) if widened else ()
    dwide, _, dc0, found = core.backward(
        LSTM, dm, dm_n, dc_n, dcells, layer.wide(x, states), layer.no_h0(x), c0,
        layer.core_weights(widened), *layer.rows, m, cells, gates, bias, core_needs,
    )  # fmt: skip

    I, P = x.shape[-1], layer.walk.H  # noqa: E741
    dh0: list[Tensor] = []
    dweights: list[Tensor | None] = []
    for d, own in enumerate(wanted):
        columns = slice(I + d * P, I + (d + 1) * P)  # of the states of this direction
        dw_ih, _, *db = found[d * (per - 1) : (d + 1) * (per - 1)]
        dw_hr = None
        if sends:
            sent, last = layer.walk.cut(d, layer.flat(dwide)[:, columns]), _of(dh_n, d)
            dh0.append(layer.last(1 - d, sent, last))
            if own[-1]:
                dh = layer.walk.before(1 - d, sent, last)
                if dy is not None:
                    dh = dh + layer.directions(dy)[d]
                dw_hr = layer.live(dh).t() @ layer.live(layer.directions(m)[d])
        dweights += [dw_ih[:, :I] if own[0] else None, dw_ih[:, columns] if own[1] else None]
        dweights += [*db, dw_hr]
    dx = dwide[..., :I] if needs[0] else None
    return dx, torch.stack(dh0) if needs[1] else None, dc0, dweights


class _Layer(NamedTuple):
    """One call's rows and weights. Arrays by pairs are flat, [N, ...], in the order of x.

    Attributes:
        walk: of h, so that its H is the projection's size.
        rows: batch_sizes, lengths, reset as they were given.
        weights: of the core, before any is folded or widened; w_hr: [P, H] of each direction.
    """

    core: Core
    walk: Walk
    rows: tuple[Tensor | None, ...]
    weights: list[tuple[Tensor, ...]]
    w_hr: list[Tensor]
    bias: bool

    @classmethod
    def of(
        cls, core: Core, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor],
        batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    ) -> _Layer:  # fmt: skip
        own = split_weights(weights, bias)
        w_hr = [w.w_hr for w in own if w.w_hr is not None]
        walk = Walk.of(LSTM, x, h0, len(w_hr[0]), batch_sizes, lengths, reset)
        plain = [tuple(t for t in w[:4] if t is not None) for w in own]
        return cls(core, walk, (batch_sizes, lengths, reset), plain, w_hr, bias)

    def over_m(self, x: Tensor, h0: Tensor | None, c0: Tensor | None, tapes: bool) -> Result:
        """The layer without its projections; y and h_n are m's."""
        states: Sequence[Tensor] = ()
        if h0 is not None:
            nothing = x.new_zeros(()).expand(self.walk.N, len(self.w_hr) * self.walk.H)
            states = self.previous_states(nothing, h0)
        return self.core.forward(
            LSTM, self.wide(x, states), self.no_h0(x), c0, self.core_weights(h0 is not None),
            *self.rows, self.bias, tapes,
        )  # fmt: skip

    def no_h0(self, x: Tensor) -> Tensor | None:
        """m before the first step, by whose shape a packed batch says how many rows it has."""
        if self.walk.sizes is None:
            return None
        return x.new_zeros(len(self.w_hr), self.walk.B, self.w_hr[0].shape[1])

    def core_weights(self, widened: bool) -> list[Tensor]:
        """w_hh folded and, if ``widened``, w_ih with the columns of the states of ``wide``."""
        found = []
        for d, ((w_ih, w_hh, *biases), w_hr) in enumerate(
            zip(self.weights, self.w_hr, strict=True)
        ):
            if widened:
                blocks = [torch.zeros_like(w_hh)] * len(self.w_hr)
                blocks[d] = w_hh
                w_ih = torch.cat((w_ih, *blocks), 1)
            if self.walk.T == 1:  # there is no other step to send to
                folded = w_hh.new_zeros(len(w_hh), w_hr.shape[1])
            else:
                state = state_dtype(w_hh.dtype)
                folded = (w_hh.to(state) @ w_hr.to(state)).to(w_hh.dtype)
            found += [w_ih, folded, *biases]
        return found

    def wide(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """x with the states [N, P] of each direction behind its columns."""
        if not states:
            return x
        wide = torch.cat((self.flat(x), *states), 1)
        return wide.view(*x.shape[:-1], wide.shape[1])

    def m(self, cells: Tensor, gates: Tensor) -> Tensor:
        """o tanh(c), as forward had it but for the rounding of o."""
        o = gates[..., 3 * cells.shape[-1] // len(gates) :].movedim(0, -2)
        tanh_c = cells.tanh().view(o.shape)
        return (o * tanh_c).to(gates.dtype).flatten(-2)

    def flat(self, t: Tensor) -> Tensor:
        return t.reshape(self.walk.N, t.shape[-1])

    def directions(self, t: Tensor) -> Sequence[Tensor]:
        """[*rows, D * W] -> D times [N, W]."""
        return self.flat(t).chunk(len(self.w_hr), 1)

    def products(self, t: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Each direction's columns of ``t`` times its own matrix."""
        found = t.new_empty(*t.shape[:-1], len(matrices) * matrices[0].shape[1])
        sides = zip(self.directions(t), matrices, self.directions(found), strict=True)
        for own, matrix, out in sides:
            torch.mm(own, matrix, out=out)
        return found

    def live(self, t: Tensor) -> Tensor:
        """[N, W] with 0 past a row's length."""
        walk = self.walk
        if walk.lengths is None:
            return t
        live = torch.arange(walk.T, device=t.device)[:, None] < walk.lengths
        return torch.where(live.view(-1, 1), t, 0)

    def previous_states(self, y: Tensor, h0: Tensor | None) -> list[Tensor]:
        """The h that each step started from, after any reset, of each direction."""
        return [
            self.walk.cut(d, self.walk.before(d, own, _of(h0, d)))
            for d, own in enumerate(self.directions(y))
        ]

    def last(self, d: int, t: Tensor, none: Tensor | None) -> Tensor:
        """[N, W] -> [B, W], of each row what ``t`` holds of its last step in direction d; ``none``
        [B, W], or 0, of a row that has no step.
        """
        walk, width = self.walk, t.shape[1]
        if d == 1:
            found = t[: walk.B]
        elif walk.sizes is not None and walk.offsets is not None:
            # The rows that end at a step are its last ones.
            ends = zip(walk.offsets.tolist(), walk.sizes, [*walk.sizes[1:], 0], strict=False)
            found = torch.cat([t[at + goes_on : at + n] for at, n, goes_on in ends][::-1])
        elif walk.lengths is None:
            found = t[walk.N - walk.B :]
        else:
            step = walk.lengths.clamp(1, walk.T) - 1
            rows = torch.arange(walk.B, device=t.device)
            found = t.view(walk.T, walk.B, width)[step, rows]
        if walk.lengths is None:
            return found
        nothing = t.new_zeros(walk.B, width) if none is None else none
        return torch.where((walk.lengths < 1)[:, None], nothing, found)


def _of(states: Tensor | None, d: int) -> Tensor | None:
    return None if states is None else states[d]
