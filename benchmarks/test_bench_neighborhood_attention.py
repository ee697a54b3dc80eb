"""Neighborhood attention: SDPA over the whole map under a dense mask against ours; beside it SDPA without a mask."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels.ops.neighborhood_attention import neighborhood_attention3d
from sora_kernels.ops.neighborhood_attention.options import Options
from sora_kernels.ops.neighborhood_attention.reference import allowed, table_rows

from . import cases, rivals, shapes, timers

LAYERS = sorted(shapes.load("neighborhood_attention3d", "cuda"))
# Elements of a dense mask beyond which nobody would write it.
DENSE = 1 << 29


class Attention(nn.Module):
    """``[B, T, H, W, 3, heads, head_dim]`` -> ``[B, T, H, W, heads, head_dim]``.

    Args:
        form: "dense": SDPA under bias and mask, in evaluation made once; "full": SDPA over all pairs, another function;
            "sora": ours.
    """

    def __init__(self, form: str, shape: dict[str, Any], backend: str | None = None) -> None:
        super().__init__()
        self.form, self.backend = form, backend
        window, stride, dilation = (
            tuple(shape.get(name, (1, 1, 1))) for name in ("window", "stride", "dilation")
        )
        scale = shape["head_dim"] ** -0.5
        self.options = Options(window, stride, dilation, bool(shape.get("causal")), scale)
        self.bias_table: nn.Parameter | None = None
        if shape.get("bias"):
            rows = math.prod(2 * n - 1 for n in window)
            self.bias_table = nn.Parameter(torch.randn(rows, shape["heads"]))
        self._made: Tensor | None = None

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(4)
        if self.form == "sora":
            window, stride, dilation, causal, _ = self.options
            return neighborhood_attention3d(
                q, k, v, window, stride=stride, dilation=dilation, causal_t=causal,
                bias_table=self.bias_table, backend=self.backend,
            )  # fmt: skip
        mask = None if self.form == "full" else self._mask(qkv)
        q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).unflatten(1, qkv.shape[1:4])

    def _mask(self, qkv: Tensor) -> Tensor:
        if self._made is not None and not (self.training and self.bias_table is not None):
            return self._made
        size = qkv.shape[1:4]
        mask = seen(size, self.options, qkv.device)
        if self.bias_table is not None:
            bias = self.bias_table[table_rows(size, self.options, qkv.device)].permute(2, 0, 1)
            mask = bias.masked_fill(~mask, float("-inf"))
        if not (self.training and self.bias_table is not None):
            self._made = mask.detach()
        return mask


def seen(size: Any, options: Options, device: torch.device) -> Tensor:
    """bool ``[queries, keys]``: which pairs attend."""
    found = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis, (n, w, s, d) in enumerate(
        zip(size, options.window, options.stride, options.dilation, strict=True)
    ):
        pairs = allowed(n, w, s, d, options.causal_t and axis == 0, device)
        found = (found[:, None, :, None] & pairs[None, :, None, :]).flatten(2).flatten(0, 1)
    return found


def build(
    layer: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = shapes.load("neighborhood_attention3d", device, tiny).get(layer)
    if shape is None:
        pytest.skip("a GPU row")
    tokens, heads = math.prod(shape["size"]), shape["heads"]
    elements = tokens**2 * (heads if shape.get("bias") else 1)
    if elements > DENSE:
        pytest.skip(f"not measured: a dense mask would have {elements:.1e} elements")
    rivals.forget_compiled()
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    size = (shape["batch"], *shape["size"])
    x = torch.randn(*size, 3, heads, shape["head_dim"], device=device).to(dtype)
    dy = torch.randn(*size, heads, shape["head_dim"], device=device).to(dtype)
    master = Attention("dense", shape)

    def module(name: str) -> nn.Module:
        kind, _, backend = name.partition(":")
        form = "dense" if kind in ("torch", "compile") else kind
        own = Attention(form, shape, backend or None)
        own.load_state_dict(master.state_dict())
        own = own.to(device=device, dtype=dtype).train(training)
        if form == "full":
            own.bias_table = None
        return torch.compile(own) if kind == "compile" else own

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (x.to(dtype, copy=True).requires_grad_(training),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(name: str) -> timers.Call:
        return cases.module_call(module(name), inputs(dtype), grads(dtype))

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = torch.float64
        truth = cases.evaluate(module("torch").double(), inputs(wide), grads(wide))
        return truth, cases.evaluate(module("torch"), inputs(dtype), grads(dtype))

    def check(name: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(name), inputs(dtype), grads(dtype))
        ours = {key.replace("_orig_mod.", ""): t for key, t in ours.items()}
        return cases.compare(ours, plain, truth, kink=False)

    # What is asked for without a mask is another function: nothing to check.
    makers, missing = rivals.built(["full"], call, lambda name: None, device)
    pairs = int(seen(shape["size"], master.options, torch.device("cpu")).sum())
    values = (12 if training else 4) * dy.numel()
    return rivals.Case(
        f"neighborhood_attention3d/{layer}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {name: functools.partial(call, name) for name in providers} | makers,
        check,
        values * dtype.itemsize,
        int(4 * shape["batch"] * heads * pairs * shape["head_dim"] * (3.5 if training else 1)),
        {"op": "neighborhood_attention3d", "layer": layer, "mode": mode, "device": device,
         "dtype": dtype_name, "shape": shape, **({"not_measured": missing} if missing else {})},
        layout="dense",
        rivals=tuple(makers),
        saved=(lambda name: rivals.saved_bytes(module(name), inputs(dtype))) if training else None,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_neighborhood_attention3d(measured, benchmark, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, layer, mode, device, dtype, tiny)
    rivals.complete(benchmark, provider)
