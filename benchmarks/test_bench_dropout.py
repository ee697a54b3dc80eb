"""``F.dropout`` against the counter-based dropout between recurrent layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.common.dropout import dropout
from sora_kernels.testing import assert_within_2x

from . import cases, shapes, timers

LAYERS = sorted(shapes.load("dropout", "cuda"))
P = 0.25


def build(
    layer: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = shapes.load("dropout", device, tiny)[layer]
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    x = torch.randn(shape["time"], shape["batch"], shape["hidden"], device=device).to(dtype)
    dy = torch.randn_like(x)
    functions = {"torch": F.dropout, "sora": dropout}
    x.requires_grad_(training)
    if unknown := set(providers) - set(functions):
        pytest.skip(f"no provider {', '.join(sorted(unknown))} of dropout")

    def call(provider: str) -> timers.Call:
        function = functions[provider]

        def forward() -> Tensor:
            return function(x, P)

        def both() -> Any:
            return torch.autograd.grad(function(x, P), x, dy)

        return both if training else forward

    def check(provider: str) -> dict[str, dict[str, float]]:
        """Each with its own mask: what is kept is x / (1 - p), and the gradient has the same mask."""
        y = functions[provider](x, P)
        kept = y != 0
        errors = {"output": _against_exact(y.detach(), x.detach(), kept)}
        if training:
            (dx,) = torch.autograd.grad(y, x, dy)
            errors["dinput0"] = _against_exact(dx, dy, kept)
        return errors

    return cases.Case(
        f"dropout/{layer}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers},
        check,
        2 * x.numel() * dtype.itemsize * (2 if training else 1),
        x.numel() * (2 if training else 1),
        {"op": "dropout", "layer": layer, "mode": mode, "device": device, "dtype": dtype_name,
         "shape": shape},
    )  # fmt: skip


def _against_exact(found: Tensor, given: Tensor, kept: Tensor) -> dict[str, float]:
    plain = torch.where(kept, given / (1 - P), 0)
    return assert_within_2x(found, plain, torch.where(kept, given.double() / (1 - P), 0))


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_dropout(measured, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, layer, mode, device, dtype, tiny)
