"""The layer through ``sora_kernels._C``: torch's GEMMs, and csrc/lstm for the chain over time.

Two ways to walk the steps. *Sequence*: one call of the CPU kernel, which packs ``w_hh``, keeps sums
in registers and threads over rows or units. *Steps*: one GEMM and one cell kernel a step, on the
current stream; the way on CUDA, and on the CPU where there are too few steps to pay for packing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from .reference import Result, state_dtype

# As enum DType in csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    tapes: bool,
) -> Result | tuple[Tensor, Tensor, Tensor]:
    """As ``reference.layer`` without lengths, resets and projection; its first three without tapes."""
    T, B, width = x.shape
    per = 4 if bias else 2
    D, H = len(weights) // per, weights[1].shape[1]
    h0, c0 = _pointable(x, h0), _pointable(x, c0)
    if D == 1:
        gates = F.linear(x, weights[0], weights[2] + weights[3] if bias else None)
    else:
        flat, gates = x.reshape(T * B, width), x.new_empty(D, T, B, 4 * H)
        for d in range(D):
            _project(flat, weights[d * per : (d + 1) * per], bias, gates[d].view(T * B, 4 * H))
    y, h_n, c_n = x.new_empty(T, B, D * H), x.new_empty(D, B, H), x.new_empty(D, B, H)
    cells = x.new_empty(T, B, D * H, dtype=state_dtype(x.dtype)) if tapes else None
    if x.is_cuda or not _worth_packing(T, B, H):
        _forward_steps(
            h0,
            c0,
            weights[1::per],
            gates.view(D, T, B, 4 * H),
            y,
            cells,
            h_n,
            c_n,
        )
    else:
        w_hh = _pointable(x, weights[1])
        w_hh_reverse = _pointable(x, weights[per + 1]) if D == 2 else None
        _native.module().lstm_forward_cpu(
            DTYPE_CODES[x.dtype], T, B, H, D, gates.data_ptr(), _pointer(w_hh),
            _pointer(w_hh_reverse), _pointer(h0), _pointer(c0), y.data_ptr(), _pointer(cells),
            h_n.data_ptr(), c_n.data_ptr(), _native.num_threads(),
        )  # fmt: skip
    if cells is None:
        return y, h_n, c_n
    return Result(y, h_n, c_n, cells, gates.view(D, T, B, 4 * H))


def backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    y: Tensor, cells: Tensor, gates: Tensor, bias: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """As ``reference.layer_backward``, for what ``needs`` says of x, h0, c0 and each weight."""
    T, B, width = x.shape
    per = 4 if bias else 2
    D, H = len(weights) // per, weights[1].shape[1]
    h0, c0, dy, dh_n, dc_n = (_pointable(x, t) for t in (h0, c0, dy, dh_n, dc_n))
    dcells = _pointable(cells, dcells)
    dgates = torch.empty_like(gates)
    dh0, dc0 = x.new_empty(D, B, H), x.new_empty(D, B, H)
    if x.is_cuda or not _worth_packing(T, B, H):
        _backward_steps(dy, dh_n, dc_n, dcells, c0, weights[1::per], cells, gates, dgates, dh0, dc0)
    else:
        w_hh = _pointable(x, weights[1])
        w_hh_reverse = _pointable(x, weights[per + 1]) if D == 2 else None
        _native.module().lstm_backward_cpu(
            DTYPE_CODES[x.dtype], T, B, H, D, gates.data_ptr(), cells.data_ptr(), _pointer(w_hh),
            _pointer(w_hh_reverse), _pointer(c0), _pointer(dy), _pointer(dcells), _pointer(dh_n),
            _pointer(dc_n), dgates.data_ptr(), dh0.data_ptr(), dc0.data_ptr(),
            _native.num_threads(),
        )  # fmt: skip

    flat = x.reshape(T * B, width)
    dx: Tensor | None = None
    dweights: list[Tensor | None] = [None] * len(weights)
    for d in range(D):
        own = dgates[d].view(T * B, 4 * H)
        if needs[0]:
            w_ih = weights[d * per]
            dx = own @ w_ih if dx is None else dx.addmm_(own, w_ih)
        needs_own = needs[3 + d * per : 3 + (d + 1) * per]
        if needs_own[0]:
            dweights[d * per] = own.t() @ flat
        if needs_own[1]:
            dweights[d * per + 1] = _dw_hh(own, y, h0, d, H)
        if bias and (needs_own[2] or needs_own[3]):
            db = own.sum(0)
            dweights[d * per + 2] = db
            dweights[d * per + 3] = db.clone() if needs_own[2] and needs_own[3] else db
    return None if dx is None else dx.view(T, B, width), dh0, dc0, dweights


def _pointable(like: Tensor, t: Tensor | None) -> Tensor | None:
    """``t`` as memory that a kernel may read beside ``like``: the last check before pointers."""
    if t is None:
        return None
    if t.dtype != like.dtype or t.device != like.device:
        raise ValueError(
            f"lstm: expected every tensor to be {like.dtype} on {like.device}, "
            f"got {t.dtype} on {t.device}"
        )
    return t if t.is_contiguous() else t.contiguous()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _project(x: Tensor, weights: Sequence[Tensor], bias: bool, out: Tensor) -> Tensor:
    """[T*B, I] -> x W_ih^T + b_ih + b_hh, [T*B, 4H]."""
    w = weights[0].t()
    if bias:
        return torch.addmm(weights[2] + weights[3], x, w, out=out)
    return torch.mm(x, w, out=out)


def _worth_packing(T: int, B: int, H: int) -> bool:
    """Whether one CPU kernel beats T times GEMM and cell: it packs 4 H^2 values first."""
    return H < 192 or T > (4 if B == 1 else 2)


def _previous_rows(y: Tensor, d: int, H: int, T: int, B: int) -> tuple[Tensor, slice]:
    """Direction d's outputs that some step started from, [(T-1)*B, H], and those steps' rows."""
    rows = (y[:-1] if d == 0 else y[1:]).view((T - 1) * B, y.shape[-1])
    return rows[:, d * H : (d + 1) * H], slice(B, None) if d == 0 else slice(0, (T - 1) * B)


def _dw_hh(dgates: Tensor, y: Tensor, h0: Tensor | None, d: int, H: int) -> Tensor:
    """sum over t of dgates(t)^T h(t-1), [4H, H]: y is h, a step late."""
    T, B = y.shape[:2]
    rows, steps = _previous_rows(y, d, H, T, B)
    dw = dgates[steps].t() @ rows
    if h0 is not None:
        first = dgates[:B] if d == 0 else dgates[-B:] if B else dgates
        dw.addmm_(first.t(), h0[d])
    return dw


def _stream(t: Tensor) -> tuple[int, int]:
    """Device index (-1 for the CPU) and raw handle of the current stream."""
    if not t.is_cuda:
        return -1, 0
    index = t.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _forward_steps(
    h0: Tensor | None, c0: Tensor | None, w_hh: Sequence[Tensor], gates: Tensor, y: Tensor,
    cells: Tensor | None, h_n: Tensor, c_n: Tensor,
) -> None:  # fmt: skip
    D, T, B, H4 = gates.shape
    H, code, state = H4 // 4, DTYPE_CODES[gates.dtype], state_dtype(gates.dtype)
    cell = _native.module().lstm_cell_forward
    device, stream = _stream(gates)
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
                device, stream,
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
    device, stream = _stream(gates)
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
                device, stream,
            )  # fmt: skip
            dh = torch.mm(own_dgates[t], w)
        dh0[d].copy_(dh)  # type: ignore[arg-type]
        dc0[d].copy_(dc)
