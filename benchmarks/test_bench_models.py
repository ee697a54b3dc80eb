"""Whole models: ``backend="torch"`` against ``backend="sora"``, the same weights in both."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import sora_models

from . import cases, shapes, timers

CLIPS = sorted(shapes.load("crnn", "cuda"))


def build(
    clip: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = shapes.load("crnn", device, tiny)[clip]
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    master = sora_models.build("crnn", backend="torch").to(device, dtype)
    x = torch.rand(shape["batch"], *shape["input"], device=device).to(dtype)
    with torch.no_grad():
        size = cases.outputs(master.eval()(x))[0].shape
    dy = torch.randn(size, device=device).to(dtype)

    def module(provider: str) -> nn.Module:
        backend = "torch" if provider in ("torch", "compile") else "sora"
        own = sora_models.build("crnn", backend=backend).to(device, dtype)
        own.load_state_dict(master.state_dict())
        own.train(training)
        return torch.compile(own) if provider == "compile" else own

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (x.to(dtype, copy=True),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), inputs(dtype), grads(dtype))

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = torch.float64
        truth = cases.evaluate(module("torch").double(), inputs(wide), grads(wide))
        return truth, cases.evaluate(module("torch"), inputs(dtype), grads(dtype))

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(provider), inputs(dtype), grads(dtype))
        ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
        return cases.compare(ours, plain, truth, kink=True)

    counter = _Counter()
    with torch.no_grad(), counter:
        master(x)
    passes = 3 if training else 1
    weights = sum(p.numel() for p in master.parameters())
    return cases.Case(
        f"crnn/{clip}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers},
        check,
        # Only the clip, the weights and the answer must move: what is between could stay on chip.
        (x.numel() + weights + dy.numel()) * dtype.itemsize * passes,
        counter.flops * passes,
        {"op": "crnn", "layer": clip, "mode": mode, "device": device, "dtype": dtype_name,
         "shape": shape},
    )  # fmt: skip


class _Counter:
    """Arithmetic of convolutions, products and LSTMs by torch's own counter."""

    def __enter__(self) -> _Counter:
        from torch.utils.flop_counter import FlopCounterMode

        self._mode = FlopCounterMode(display=False)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        self.flops = self._mode.get_total_flops()


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("clip", CLIPS)
def test_crnn(measured, provider, clip, mode, device, dtype, tiny):
    measured(build, provider, clip, mode, device, dtype, tiny)
