"""GEMMs over all steps at once that every way to walk the steps shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Chain(NamedTuple):
    """What a backward pass walks the steps for; everything else is a product over all steps.

    Attributes:
        of_x, of_h: of each direction, gradients [..., N, columns] that side by side are those of
            w_ih x + b_ih and of w_hh h + b_hh, in torch's order of gates.
        h_prev: of each direction the h that a step started from, [..., N, H], where it is wanted.
        x: [..., N, I] beside them, 0 where they are 0 and x may hold anything; None if not wanted.
        dh0, dc0: [..., D, B, H].
    """

    of_x: Sequence[tuple[Tensor, ...]]
    of_h: Sequence[tuple[Tensor, ...]]
    h_prev: Sequence[Tensor | None]
    x: Tensor | None
    dh0: Tensor
    dc0: Tensor | None

    def gradients(
        self, weights: Sequence[Tensor], bias: bool, needs: Sequence[bool], groups: int = 0
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx [..., N, I], and of each weight that ``needs`` names.

        Args:
            groups: where not 0, weights' gradients have an axis more, of this length, before their own:
                row n counts for entry n % groups.
        """
        D, first = len(self.of_x), 2 + (self.dc0 is not None)
        per, dx = len(weights) // D, None
        dweights: list[Tensor | None] = [None] * len(weights)
        for d, (of_x, of_h, h_prev) in enumerate(
            zip(self.of_x, self.of_h, self.h_prev, strict=True)
        ):
            start = d * per
            wanted = needs[first + start : first + start + per]
            if needs[0]:
                rows = weights[start].split([g.shape[-1] for g in of_x], -2)
                for g, w_ih in zip(of_x, rows, strict=True):
                    if dx is None:
                        dx = g @ w_ih
                    else:
                        (dx.addmm_ if dx.dim() == 2 else dx.baddbmm_)(g, w_ih)
            if wanted[0]:
                dweights[start] = _products_of_groups(of_x, self.x, groups)
            if wanted[1]:
                dweights[start + 1] = _products_of_groups(of_h, h_prev, groups)
            for k, columns in ((2, of_x), (3, of_h)):
                if bias and wanted[k]:
                    sums = [_by_group(g, groups).sum(-2) for g in columns]
                    dweights[start + k] = torch.cat(sums, -1)
        return dx, dweights


def gates_of(
    cell: Cell, dgates: Tensor
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """``Chain``'s of_x and of_h from dgates [..., D, N, A*H], of a GRU r, z, n and what n is in of_h."""
    own = dgates.unbind(-3)
    if cell is not GRU:
        return [(g,) for g in own], [(g,) for g in own]
    H = dgates.shape[-1] // 4
    return [(g[..., : 3 * H],) for g in own], [(g[..., : 2 * H], g[..., 3 * H :]) for g in own]


def _by_group(t: Tensor, groups: int) -> Tensor:
    """[..., N, columns] -> [..., groups, N / groups, columns]."""
    if not groups:
        return t
    return t.unflatten(-2, (t.shape[-2] // groups, groups)).transpose(-3, -2)


def _products_of_groups(columns: Sequence[Tensor], of: Tensor | None, groups: int) -> Tensor:
    assert of is not None
    rows = _by_group(of, groups)
    found = [_by_group(g, groups).mT @ rows for g in columns]
    return found[0] if len(found) == 1 else torch.cat(found, -2)
