"""Checks and casts of a recurrent call's arguments, and torch's settings around it: what depends on no
backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import GRU, LSTM, Cell

States = tuple[Tensor, ...] | None


class Sizes(NamedTuple):
    """Of one layer."""

    directions: int
    hidden_size: int
    proj_size: int

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    @classmethod
    def of_layer(cls, cell: Cell, weights: Sequence[Tensor], bias: bool) -> Sizes:
        """From a flat list: 2 entries a direction, 2 more with biases, 1 more with a projection."""
        plain = 4 if bias else 2
        directions = 1 if len(weights) <= plain + 1 else 2
        rows, columns = weights[1].shape
        projects = len(weights) > plain * directions
        return cls(directions, rows // cell.gates, columns if projects else 0)

    def zeros(self, cell: Cell, x: Tensor, batch: int, num_layers: int = 1) -> tuple[Tensor, ...]:
        """The states of who gives none, in x's dtype."""
        count = num_layers * self.directions
        h0 = x.new_zeros(count, batch, self.output_size)
        return (h0, x.new_zeros(count, batch, self.hidden_size)) if cell.has_c else (h0,)


def casts(cell: Cell, x: Tensor, packed: bool = False) -> bool:
    """Whether autocast, as it is now, casts this cell's arguments. As in torch: all cells on CUDA; on
    the CPU RNN, and LSTM on dense data. fp64 stays as it is.
    """
    if not torch._C._is_any_autocast_enabled() or x.is_meta or x.dtype == torch.float64:
        return False
    kind = x.device.type
    if kind == "cpu" and (cell is GRU or (cell is LSTM and packed)):
        return False
    return torch.is_autocast_enabled(kind)


def autocast(
    cell: Cell, x: Tensor, hx: States, weights: Sequence[Tensor], packed: bool = False
) -> tuple[Tensor, States, Sequence[Tensor]]:
    """Everything in autocast's dtype where it ``casts``."""
    if not casts(cell, x, packed):
        return x, hx, weights
    dtype = torch.get_autocast_dtype(x.device.type)
    hx = None if hx is None else tuple(t.to(dtype) for t in hx)
    return x.to(dtype), hx, [w.to(dtype) for w in weights]


def validate(
    cell: Cell, x: Tensor, hx: States, weights: Sequence[Tensor], bias: bool, num_layers: int,
    bidirectional: bool, batch_first: bool, proj_size: int, dropout: float, lengths: Tensor | None,
    reset: Tensor | None, memory: str, precision: str | None,
) -> None:  # fmt: skip
    """Raises one error that names the argument, what was expected and what came."""
    if memory not in ("save", "recompute"):
        raise _error(cell, f"memory must be 'save' or 'recompute', got {memory!r}")
    if precision not in (None, "tf32", "ieee"):
        raise _error(cell, f"precision must be None, 'tf32' or 'ieee', got {precision!r}")
    if not 0 <= dropout <= 1:
        raise _error(cell, f"dropout must be in [0, 1], got {dropout}")
    if num_layers < 1:
        raise _error(cell, f"num_layers must be at least 1, got {num_layers}")
    sizes, dtype, device = x.shape, x.dtype, x.device
    if len(sizes) != 3:
        axes = "[B, T, I]" if batch_first else "[T, B, I]"
        raise _error(cell, f"x must be {axes}, got {tuple(sizes)}")
    if not dtype.is_floating_point:
        raise _error(cell, f"x must be floating point, got {dtype}")
    T, B, width = sizes
    if batch_first:
        T, B = B, T
    if T == 0:
        raise _error(cell, f"x must have at least one step, got {tuple(sizes)}")
    directions = 2 if bidirectional else 1
    per = (4 if bias else 2) + (1 if proj_size else 0)
    if len(weights) != num_layers * directions * per:
        raise _error(
            cell,
            f"weights must be {num_layers} layers x {directions} directions x {per} tensors "
            f"for bias={bias}{f', proj_size={proj_size}' if cell is LSTM else ''}, "
            f"got {len(weights)}",
        )
    recurrent, gates = weights[1].shape, cell.gates
    if len(recurrent) != 2 or recurrent[0] % gates:
        form = f"[{gates}*H, H]" if gates > 1 else "[H, H]"
        raise _error(cell, f"weights[1] (w_hh) must be {form}, got {tuple(recurrent)}")
    rows = recurrent[0]
    H = rows // gates
    if not 0 <= proj_size < max(H, 1):
        raise _error(cell, f"proj_size must be in 0..hidden_size - 1 = {H - 1}, got {proj_size}")
    P = proj_size or H
    own: list[tuple[int, ...]] = [(rows, width), (rows, P)]
    if bias:
        own += [(rows,), (rows,)]
    if proj_size:
        own.append((P, H))
    first_layer = per * directions
    for k, w in enumerate(weights):
        if k == first_layer:
            own[0] = (rows, directions * P)
        if w.shape != own[k % per] or w.dtype != dtype or w.device != device:
            raise _mismatch(cell, f"weights[{k}]", w, own[k % per], x)
    if hx is not None:
        _validate_states(cell, x, hx, num_layers * directions, B, P, H)
    if lengths is not None and not isinstance(lengths, Tensor):
        raise _error(cell, f"lengths must be an int tensor [{B}], got {_described(lengths)}")
    if lengths is not None and (
        lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise _error(
            cell,
            f"lengths must be int32 or int64 [{B}], got {lengths.dtype} {tuple(lengths.shape)}",
        )
    if reset is not None and (
        reset.shape != sizes[:2] or reset.dtype != torch.bool or reset.device != device
    ):
        raise _error(
            cell,
            f"reset must be bool {tuple(sizes[:2])} on {device}, "
            f"got {reset.dtype} {tuple(reset.shape)} on {reset.device}",
        )


def _validate_states(
    cell: Cell, x: Tensor, hx: tuple[Tensor, ...], count: int, B: int, P: int, H: int
) -> None:
    if cell.has_c:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise _error(cell, f"hx must be (h_0, c_0) or None, got {_described(hx)}")
        names: tuple[str, ...] = ("h_0", "c_0")
    else:
        if not isinstance(hx[0], Tensor):
            raise _error(cell, f"hx must be a tensor or None, got {_described(hx[0])}")
        names = ("hx",)
    for name, t, size in zip(names, hx, (P, H), strict=False):
        if t.shape != (count, B, size) or t.dtype != x.dtype or t.device != x.device:
            raise _mismatch(cell, name, t, (count, B, size), x)


def _described(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} tensors"
    return f"a {type(value).__name__}"


def operator_of(cell: Cell) -> str:
    """The public function's name."""
    return cell.name.partition("_")[0]


def _error(cell: Cell, text: str) -> ValueError:
    return ValueError(f"{operator_of(cell)}: {text}")


def _mismatch(cell: Cell, name: str, t: Tensor, shape: tuple[int, ...], x: Tensor) -> ValueError:
    return _error(
        cell,
        f"{name} must be {shape} {x.dtype} on {x.device}, "
        f"got {tuple(t.shape)} {t.dtype} on {t.device}",
    )
