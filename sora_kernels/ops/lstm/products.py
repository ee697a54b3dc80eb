"""GEMMs over all steps at once that every way to walk the steps shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import GRU, Cell


def input_products(x: Tensor, weights: Sequence[Tensor], D: int, used: int, width: int) -> Tensor:
    """x W_ih^T of each direction in the first ``used`` columns of [D, N, width]; no axis D for one."""
    if D == 1 and used == width:
        return torch.mm(x, weights[0].t())
    per, products = len(weights) // D, x.new_empty(D, len(x), width)
    for d in range(D):
        torch.mm(x, weights[d * per].t(), out=products[d, :, :used])
    return products


def dw_hh(cell: Cell, dgates: Tensor, h_prev: Tensor) -> Tensor:
    """sum over pairs of the gradient of W_hh h, times h: [G*H, P]."""
    if cell is not GRU:
        return dgates.t() @ h_prev
    H = dgates.shape[1] // 4
    dw = h_prev.new_empty(3 * H, h_prev.shape[1])
    torch.mm(dgates[:, : 2 * H].t(), h_prev, out=dw[: 2 * H])
    torch.mm(dgates[:, 3 * H :].t(), h_prev, out=dw[2 * H :])
    return dw


def db(cell: Cell, dgates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of b_ih and b_hh, in memory of their own."""
    total = dgates.sum(0)
    if cell is not GRU:
        return total, total.clone()
    H = dgates.shape[1] // 4
    return total[: 3 * H].clone(), torch.cat((total[: 2 * H], total[3 * H :]))
