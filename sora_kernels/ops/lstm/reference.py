"""The LSTM's definition in plain torch: one layer, all its directions, any device and dtype.

``layer`` is a differentiable loop over time; ``layer_backward`` is its gradient written by hand,
from the tapes that every backend saves. Neither writes in place, so that vmap, jvp and export take
them.

Shapes: ``x`` [T, B, I], ``h0`` [D, B, P], ``c0`` [D, B, H], weights by direction ``w_ih`` [4H, I],
``w_hh`` [4H, P], then ``b_ih``, ``b_hh`` [4H] if ``bias``, then ``w_hr`` [P, H] if there is a
projection (else P = H). Gate order i, f, g, o. States are kept and gates activated in fp32 for
16-bit tensors, else in the tensors' own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """One direction's weights."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Result(NamedTuple):
    """``y`` [T, B, D*P], ``h_n`` [D, B, P], ``c_n`` [D, B, H]; for the caller who asks, and for
    backward: ``cells`` [T, B, D*H] in the state dtype and ``gates`` [D, T, B, 4H] after activation
    (0 past a row's length)."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    cells: Tensor
    gates: Tensor


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


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    bias: bool,
) -> Result:
    """Runs one layer; ``None`` states are zero.

    Args:
        lengths: int [B]; row b ends before step ``lengths[b]``: its states stop there (the reverse
            direction starts there) and its outputs are 0 from there on.
        reset: bool [T, B]; true at t means that a new sequence starts at t: the forward direction
            clears its state before step t, the reverse direction before step t - 1.
    """
    T, B = x.shape[:2]
    per_direction = []
    for d, w in enumerate(split_weights(weights, bias)):
        H, P = w.w_hh.shape[0] // 4, w.w_hh.shape[1]
        state = state_dtype(x.dtype)
        h = x.new_zeros(B, P) if h0 is None else h0[d]
        c = x.new_zeros(B, H, dtype=state) if c0 is None else c0[d].to(state)
        inputs = F.linear(x, w.w_ih, w.b_ih)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(T) if d == 0 else reversed(range(T)):
            live = None if lengths is None else (t < lengths)[:, None]
            clear = _clear_before(t, d, T, lengths, reset)
            h_prev, c_prev = h, c
            if clear is not None:
                h_prev, c_prev = h.masked_fill(clear, 0), c.masked_fill(clear, 0)
            gates = (inputs[t] + F.linear(h_prev, w.w_hh, w.b_hh)).to(state)
            i, f, g, o = gates.chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c_new = f * c_prev + i * g
            h_new = (o * c_new.tanh()).to(x.dtype)
            if w.w_hr is not None:
                h_new = F.linear(h_new, w.w_hr)
            activated = torch.cat((i, f, g, o), -1).to(x.dtype)
            if live is None:
                h, c = h_new, c_new
                steps.append((h, c, activated))
            else:
                h, c = torch.where(live, h_new, h_prev), torch.where(live, c_new, c_prev)
                kept = (h_new, c_new, activated)
                steps.append(tuple(torch.where(live, v, 0) for v in kept))  # type: ignore[arg-type]
        if d == 1:
            steps.reverse()
        stacked = [torch.stack(column) for column in zip(*steps, strict=True)]
        per_direction.append((h, c.to(x.dtype), *stacked))
    h_n, c_n, y, cells, activations = zip(*per_direction, strict=True)
    return Result(
        torch.cat(y, -1),
        torch.stack(h_n),
        torch.stack(c_n),
        torch.cat(cells, -1),
        torch.stack(activations),
    )


def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    cells: Tensor,
    gates: Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of ``x``, ``h0``, ``c0`` and of every weight; ``None`` gradients of outputs are
    zero.
    """
    T, B = x.shape[:2]
    state = cells.dtype
    dx, dh0, dc0, dweights = [], [], [], []
    for d, w in enumerate(split_weights(weights, bias)):
        H, P = w.w_hh.shape[0] // 4, w.w_hh.shape[1]
        own_h, own_c = slice(d * P, (d + 1) * P), slice(d * H, (d + 1) * H)
        h_first = x.new_zeros(B, P) if h0 is None else h0[d]
        c_first = x.new_zeros(B, H, dtype=state) if c0 is None else c0[d].to(state)
        dh = x.new_zeros(B, P) if dh_n is None else dh_n[d]
        dc = x.new_zeros(B, H, dtype=state) if dc_n is None else dc_n[d].to(state)
        dgates, h_prevs, dhs = [], [], []
        for t in reversed(range(T)) if d == 0 else range(T):
            live = None if lengths is None else (t < lengths)[:, None]
            clear = _clear_before(t, d, T, lengths, reset)
            h_prev, c_prev = _previous(
                t, d, T, lengths, y[..., own_h], cells[..., own_c], h_first, c_first
            )
            if clear is not None:
                h_prev, c_prev = h_prev.masked_fill(clear, 0), c_prev.masked_fill(clear, 0)
            dh_now = dh if dy is None else dh + dy[t, :, own_h]
            dc_now = dc if dcells is None else dc + dcells[t, :, own_c]
            i, f, g, o = gates[d, t].to(state).chunk(4, -1)
            tanh_c = cells[t, :, own_c].tanh()
            dm = (dh_now if w.w_hr is None else dh_now @ w.w_hr).to(state)
            dc_now = dc_now + dm * o * (1 - tanh_c * tanh_c)
            di, df = dc_now * g * i * (1 - i), dc_now * c_prev * f * (1 - f)
            dg, do = dc_now * i * (1 - g * g), dm * tanh_c * o * (1 - o)
            da = torch.cat((di, df, dg, do), -1).to(x.dtype)
            dh_prev, dc_prev = da @ w.w_hh, dc_now * f
            if clear is not None:
                dh_prev, dc_prev = dh_prev.masked_fill(clear, 0), dc_prev.masked_fill(clear, 0)
            if live is None:
                dh, dc = dh_prev, dc_prev
            else:
                da, dh_now = torch.where(live, da, 0), torch.where(live, dh_now, 0)
                dh, dc = torch.where(live, dh_prev, dh), torch.where(live, dc_prev, dc)
            dgates.append(da)
            h_prevs.append(h_prev)
            dhs.append(dh_now)
        if d == 0:
            for column in (dgates, h_prevs, dhs):
                column.reverse()
        da, h_prev = torch.stack(dgates).flatten(0, 1), torch.stack(h_prevs).flatten(0, 1)
        dx.append((da @ w.w_ih).unflatten(0, (T, B)))
        dh0.append(dh)
        dc0.append(dc.to(x.dtype))
        dweights += [da.t() @ x.flatten(0, 1), da.t() @ h_prev]
        if bias:
            dweights += [da.sum(0), da.sum(0)]
        if w.w_hr is not None:
            m = gates[d, :, :, 3 * H :].to(state) * cells[..., own_c].tanh()
            dweights.append(torch.stack(dhs).flatten(0, 1).t() @ m.flatten(0, 1).to(x.dtype))
    return sum(dx[1:], dx[0]), torch.stack(dh0), torch.stack(dc0), dweights


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
    t: int,
    d: int,
    T: int,
    lengths: Tensor | None,
    y: Tensor,
    cells: Tensor,
    h_first: Tensor,
    c_first: Tensor,
) -> tuple[Tensor, Tensor]:
    """The states that step t of direction d started from, before any clearing."""
    earlier = t - 1 if d == 0 else t + 1
    if earlier in (-1, T):
        return h_first, c_first
    h, c = y[earlier], cells[earlier]
    if d == 1 and lengths is not None:
        first = (earlier >= lengths)[:, None]
        return torch.where(first, h_first, h), torch.where(first, c_first, c)
    return h, c
