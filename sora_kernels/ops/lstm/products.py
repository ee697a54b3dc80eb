"""GEMMs over all steps at once that every way to walk the steps shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def input_products(x: Tensor, weights: Sequence[Tensor], D: int, used: int, width: int) -> Tensor:
    """x W_ih^T of each direction in the first ``used`` columns of [D, N, width]; no axis D for one."""
    if D == 1 and used == width:
        return torch.mm(x, weights[0].t())
    per, products = len(weights) // D, x.new_empty(D, len(x), width)
    for d in range(D):
        torch.mm(x, weights[d * per].t(), out=products[d, :, :used])
    return products
