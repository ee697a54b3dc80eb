"""The layers through csrc/lstm/lstm_resident.h: torch's GEMMs over all steps, and one launch for the
chain over time that keeps ``w_hh`` in the registers of a CTA. CUDA; nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..common.dtypes import DTYPE_CODES
from .arguments import Sizes
from .cells import GRU, Cell
from .plans import resident_can_run
from .pointers import all_pointable, pointable, pointer, stream
from .precision import of_products
from .products import Chain, gates_of, input_products
from .reference import Result, packed_sizes, state_dtype

# kMostRows and kMostMembers of csrc/lstm/lstm_resident.cu.
MOST_ROWS, MOST_MEMBERS = 1 << 30, 65535


class Steps(NamedTuple):
    """Which (row, step) pairs run and where they lie, for the kernel and for torch.

    Attributes:
        shape: of x without its last axis: (T, B), or (N,) if packed.
        lengths: int32 [B] on the device, or None for T.
        offsets: int64 [T] on the device: the first row of each step if packed, else None.
        live: bool [T, B] on the device, where rows end before T; None elsewhere.
    """

    shape: tuple[int, ...]
    T: int
    B: int
    lengths: Tensor | None = None
    offsets: Tensor | None = None
    live: Tensor | None = None
    batch_sizes: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> Steps:
        device = x.device
        if batch_sizes is not None:
            sizes = packed_sizes(batch_sizes, x)
            T, B = len(sizes), sizes[0]
            rows = torch.arange(B, device="cpu")
            own = T - torch.searchsorted(batch_sizes.flip(0), rows, right=True)
            offsets = batch_sizes.cumsum(0) - batch_sizes
            return cls(
                (len(x),), T, B, own.to(torch.int32).to(device, non_blocking=True),
                offsets.to(device, non_blocking=True), None, batch_sizes,
            )  # fmt: skip
        T, B = x.shape[:2]
        if lengths is None:
            return cls((T, B), T, B)
        own = lengths.to(device, torch.int32, non_blocking=True)
        live = torch.arange(T, device=device)[:, None] < own
        return cls((T, B), T, B, own, None, live)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.offsets is not None else self.T * self.B

    def new(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """For the kernel to fill; 0 where it will not."""
        make = torch.empty if self.live is None else torch.zeros
        return make(shape, dtype=dtype or like.dtype, device=like.device)

    def within(self, t: Tensor) -> Tensor:
        """``t`` [..., *shape, I] with 0 past a row's length, where it may hold anything."""
        return t if self.live is None else torch.where(self.live[..., None], t, 0)

    def previous_states(self, d: int, y: Tensor, h0: Tensor | None, reset: Tensor | None) -> Tensor:
        """The h that each step of direction ``d`` started from, [..., rows, H]; ``y`` [..., *shape, H],
        ``h0`` [..., D, B, H].
        """
        if h0 is None:
            lead = y.shape[: y.dim() - len(self.shape) - 1]
            first = y.new_zeros(*lead, self.B, y.shape[-1])
        else:
            first = h0.select(-3, d)
        if self.batch_sizes is not None:
            return self._previous_packed(d, y, first, reset)
        if d == 0:
            states = torch.cat((first.unsqueeze(-3), y[..., :-1, :, :]), -3)
            clear = reset
        else:
            states = torch.cat((y[..., 1:, :, :], first.unsqueeze(-3)), -3)
            clear = None if reset is None else torch.cat((reset[1:], reset.new_zeros(1, self.B)))
            if self.live is not None:  # a row begins at its own last step
                goes_on = torch.cat((self.live[1:], self.live.new_zeros(1, self.B)))
                states = torch.where(goes_on[..., None], states, first.unsqueeze(-3))
                clear = None if clear is None else clear & goes_on
        if clear is not None:
            states = states.masked_fill(clear[..., None], 0)
        return states.flatten(-3, -2)

    def _previous_packed(self, d: int, y: Tensor, first: Tensor, reset: Tensor | None) -> Tensor:
        assert self.batch_sizes is not None
        sizes, N = self.batch_sizes, self.rows
        step = torch.repeat_interleave(torch.arange(self.T), sizes, output_size=N)
        row = torch.arange(N) - (sizes.cumsum(0) - sizes)[step]
        beside = (
            torch.cat((sizes.new_zeros(1), sizes)) if d == 0 else torch.cat((sizes, sizes[:1] * 0))
        )
        if d == 0:
            begins = step == 0
            earlier = torch.arange(N) - beside[step]
        else:
            begins = row >= beside[step + 1]
            earlier = torch.arange(N) + sizes[step]
        # Rows N .. N + B - 1 of the source are the initial states.
        source = torch.where(begins, N + row, earlier).to(y.device, non_blocking=True)
        states = torch.cat((y, first), -2).index_select(-2, source)
        if reset is None:
            return states
        if d == 0:
            clear = reset
        else:
            clear = torch.cat((reset, reset.new_zeros(self.B))).index_select(0, source)
        return states.masked_fill(clear[:, None], 0)


def takes(x: Tensor, H: int, members: int = 0) -> bool:
    """Whether there is a kernel for x, with products as torch's flags want them inside ``settled``."""
    exact = of_products() if x.dtype == torch.float32 else ""
    return (
        x.is_cuda
        and resident_can_run(x.dtype, H, exact).ok
        and x.shape[1 if members else 0 : -1].numel() <= MOST_ROWS
        and members <= MOST_MEMBERS
    )


def forward(
    cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    tapes: bool, members: int = 0,
) -> Result:  # fmt: skip
    """As ``reference.layer``. With ``members`` every floating-point tensor, of the result too, has a
    first axis of that length: as many layers, in one launch, and as many products in one GEMM.
    """
    h0, c0 = pointable(x, h0), pointable(x, c0)
    weights = all_pointable(x, weights)
    steps, sizes, lead = _sizes(cell, x, weights, batch_sizes, lengths, bias, members)
    D, H, _ = sizes
    width = cell.gates * H
    flat = x.flatten(-1 - len(steps.shape), -2)
    if members:
        gx = x.new_empty(*lead, D, steps.rows, width)
        for d in range(D):
            w_ih = weights[d * len(weights) // D]
            torch.bmm(flat, w_ih.transpose(1, 2), out=gx[:, d])
    else:
        gx = input_products(flat, weights, D, width, width)
    y, h_n = steps.new(x, *lead, *steps.shape, D * H), x.new_empty(*lead, D, steps.B, H)
    c_n = x.new_empty(*lead, D, steps.B, H) if cell.has_c else None
    gates = None
    if tapes and cell.tape:
        gates = steps.new(x, *lead, D, *steps.shape, cell.tape * H)
    cells = None
    if tapes and cell.has_c:
        cells = steps.new(x, *lead, *steps.shape, D * H, dtype=state_dtype(x.dtype))
    shape, keep = _shape(cell, steps, sizes, reset, members)
    b_ih, b_hh = (2, 3) if bias else (-1, -1)
    _native.module().lstm_resident_forward(
        DTYPE_CODES[x.dtype],
        (
            *shape, gx.data_ptr(), *_addresses(weights, D, 1), *_addresses(weights, D, b_ih),
            *_addresses(weights, D, b_hh), pointer(h0), pointer(c0), pointer(gates), y.data_ptr(),
            pointer(cells), h_n.data_ptr(), pointer(c_n),
        ),
        *stream(x),
    )  # fmt: skip
    del keep
    return Result(y, h_n, c_n, cells, gates)


def backward(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """As ``reference.layer_backward``, for what ``needs`` says of x, the states and each weight."""
    found = chain(
        cell, dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, lengths, reset, y, cells,
        gates, bias, needs,
    )  # fmt: skip
    dx, dweights = found.gradients(weights, bias, needs)
    return None if dx is None else dx.view(x.shape), found.dh0, found.dc0, dweights


def chain(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
    members: int = 0,
) -> Chain:  # fmt: skip
    """What ``backward`` has to do step by step; with ``members`` as ``forward``."""
    if cell.tape and gates is None:
        _, _, _, cells, gates = forward(
            cell, x, h0, c0, weights, batch_sizes, lengths, reset, bias, True, members
        )
    h0, c0, dy, dh_n, dc_n = (pointable(x, t) for t in (h0, c0, dy, dh_n, dc_n))
    weights, y = all_pointable(x, weights), y.contiguous()
    if cells is not None:
        cells, dcells = cells.contiguous(), pointable(cells, dcells)
    gates = pointable(x, gates)
    steps, sizes, lead = _sizes(cell, x, weights, batch_sizes, lengths, bias, members)
    (D, H, _), G = sizes, cell.gates
    columns = 4 if cell is GRU else G
    dgates = steps.new(x, *lead, D, steps.rows, columns * H)
    dh0 = x.new_empty(*lead, D, steps.B, H)
    dc0 = x.new_empty(*lead, D, steps.B, H) if cell.has_c else None
    shape, keep = _shape(cell, steps, sizes, reset, members)
    _native.module().lstm_resident_backward(
        DTYPE_CODES[x.dtype],
        (
            *shape, pointer(gates), pointer(cells), y.data_ptr(), *_addresses(weights, D, 1),
            pointer(h0), pointer(c0), pointer(dy), pointer(dcells), pointer(dh_n), pointer(dc_n),
            dgates.data_ptr(), dh0.data_ptr(), pointer(dc0),
        ),
        *stream(x),
    )  # fmt: skip
    del keep
    per, first = len(weights) // D, 2 + cell.has_c  # of the weights in needs
    flat = steps.within(x).flatten(-1 - len(steps.shape), -2) if any(needs[first::per]) else None
    h_prev = [
        steps.previous_states(d, y[..., d * H : (d + 1) * H], h0, reset)
        if needs[first + d * per + 1]
        else None
        for d in range(D)
    ]
    return Chain(*gates_of(cell, dgates), h_prev, flat, dh0, dc0)


def _sizes(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    lengths: Tensor | None, bias: bool, members: int,
) -> tuple[Steps, Sizes, tuple[int, ...]]:  # fmt: skip
    """Which rows run, the layer's sizes, and the axis before those of a single layer, if there is one."""
    steps = Steps.of(x[0] if members else x, batch_sizes, lengths)
    own = [w[0] for w in weights] if members else weights
    return steps, Sizes.of_layer(cell, own, bias), (members,) if members else ()


def _shape(
    cell: Cell, steps: Steps, sizes: Sizes, reset: Tensor | None, members: int
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """The numbers of LstmResidentShape, and what must live until the launch is queued."""
    if reset is not None:
        reset = reset.contiguous()
    shape = (
        cell.code, steps.T, steps.B, sizes.hidden_size, sizes.directions, members or 1, steps.rows,
        pointer(steps.lengths), pointer(steps.offsets), pointer(reset),
    )  # fmt: skip
    return shape, (steps.lengths, steps.offsets, reset)


def _addresses(weights: Sequence[Tensor], D: int, k: int) -> tuple[int, int]:
    """Of each direction's k-th weight; -1: none."""
    if k < 0:
        return 0, 0
    per = len(weights) // D
    return weights[k].data_ptr(), weights[per + k].data_ptr() if D == 2 else 0
