"""Windowed attention, the core and with its projections, and Video Swin-T: torchvision's form against ours.

Each case is also timed against SDPA with bias and region mask summed in memory (``sdpa_mask``) and, where
``shapes.yaml`` says ``compiled``, torch.compile of the baseline and on a GPU FlexAttention. torchvision masks with
-100: on a CPU its masked weights are denormal numbers, which are slow, or zeros, by what the scores happen to be.
There shifted modules are timed against the same maths with -inf too (``eager_inf``).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sora_kernels as sk
from sora_models.layers._window import fit

from . import cases, rivals, shapes, swin, timers, windows

LAYERS = sorted(shapes.load("window_attention3d", "cuda"))
MODELS = sorted(shapes.load("swin3d", "cuda"))
# The smoke test's: every stage has a token, the first two windows.
TINY = {"batch": 1, "input": [3, 16, 32, 32]}

# Least speed-ups: tokens of a window -> (inference, training) of the module over eager, on one CPU thread.
CPU_GATES = {392: (3.0, 1.7), 343: (2.5, 1.6), 98: (1.15, 0.97), 64: (1.15, 0.97), 49: (1.15, 0.97)}
# Of the core in bf16, 392 tokens and shifted, on an H200; of Video Swin-T there.
GPU_GATES = {
    "inference": {"eager": 6.0, "compile": 2.0, "sdpa_mask": 2.5},
    "backward": {"eager": 2.5},
}
GPU_MODEL_GATE = {"eager": 1.6}


def gate(
    part: str, mode: str, shape: dict[str, Any], device: str, dtype_name: str
) -> dict[str, float]:
    """Rival -> the least speed-up over it; empty where none is asked for."""
    window, shift = fit(shape["input"], shape["window"], shape.get("shift", (0, 0, 0)))
    tokens = math.prod(window)
    if device == "cuda":
        asked = (part, tokens, any(shift), dtype_name) == ("core", 392, True, "bf16")
        return GPU_GATES.get(mode, {}) if asked else {}
    if part != "module" or tokens not in CPU_GATES or (tokens == 392 and not any(shift)):
        return {}
    inference, training = CPU_GATES[tokens]
    return {"eager": inference if mode == "inference" else training}


def build(
    part: str, layer: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = shapes.load("window_attention3d", device, tiny).get(layer)
    if shape is None or (mode == "backward" and device == "cpu" and not tiny):
        pytest.skip("a GPU row")
    if part == "core" and not shape.get("core", True):
        pytest.skip("measured as a module on a CPU")
    rivals.forget_compiled()
    dtype, training = cases.DTYPES[dtype_name], mode != "inference"
    torch.manual_seed(0)
    heads, window, shift = shape["heads"], shape["window"], shape.get("shift", [0, 0, 0])
    dim = heads * shape["head_dim"]
    channels = 3 * dim if part == "core" else dim
    x = torch.randn(shape["batch"], *shape["input"], channels, device=device).to(dtype)
    dy = torch.randn(*x.shape[:-1], dim, device=device).to(dtype)

    def bare(kind: str, backend: str | None = None) -> nn.Module:
        stock = kind in ("torch", "compile")
        form = "eager" if stock or kind == "eager_inf" else kind
        if kind == "sora" and part == "core":
            return windows.OursCore(heads, window, shift, backend)
        if kind == "sora":
            return sk.nn.ShiftedWindowAttention3d(dim, window, shift, heads, backend=backend)
        if part == "core":
            return windows.Core(form, heads, window, shift)
        if stock:
            return windows.stock(dim, heads, window, shift)
        return windows.Attention(form, dim, heads, window, shift)

    master = bare("torch").state_dict()
    master["relative_position_bias_table"].normal_()

    def module(name: str) -> nn.Module:
        kind, _, backend = name.partition(":")
        own = bare(kind, backend or None)
        own.load_state_dict(master)
        own = own.to(device=device, dtype=dtype).train(training)
        return torch.compile(own) if kind in ("compile", "flex") else own

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (x.to(dtype, copy=True).requires_grad_(training),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(name: str) -> timers.Call:
        if mode == "backward":
            return cases.backward_call(module(name), inputs(dtype), (dy,))
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

    names = ["sdpa_mask"]
    if device == "cpu" and part == "module" and any(fit(shape["input"], window, shift)[1]):
        names.append("eager_inf")
    if shape.get("compiled") and not tiny:
        names += ["compile", "flex"] if device == "cuda" else ["compile"] * (part == "module")
    names = [name for name in names if name not in providers]
    makers, missing = rivals.built(names, call, check, device)

    tokens, slots = x.shape[:-1].numel(), math.prod(fit(shape["input"], window, shift)[0])
    count = math.prod(-(-n // w) for n, w in zip(shape["input"], window, strict=True))
    scores = shape["batch"] * count * heads * slots**2
    passes = {"inference": 1.0, "train": 3.5, "backward": 2.5}[mode]
    flops = 4 * scores * shape["head_dim"] * passes
    # Core: qkv in, out; backward dout, qkv, out in, dqkv out. The module's x, y and weights besides.
    width = {"inference": 4, "train": 12, "backward": 8}[mode] * dim
    if part == "module":
        training_passes = 3 if training else 1
        width = 2 * dim * training_passes
        flops += 8 * tokens * dim**2 * training_passes
    weights = sum(t.numel() for t in master.values() if t.is_floating_point())
    return rivals.Case(
        f"window_attention3d/{part}/{layer}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {name: functools.partial(call, name) for name in providers} | makers,
        check,
        (tokens * width + weights * (2 if training else 1)) * dtype.itemsize,
        int(flops),
        {"op": "window_attention3d", "part": part, "layer": layer, "mode": mode, "device": device,
         "dtype": dtype_name, "shape": shape, "stock": windows.source() if part == "module" else "eager",
         **({"not_measured": missing} if missing else {})},
        layout="eager",
        rivals=tuple(makers),
        saved=(lambda name: rivals.saved_bytes(module(name), inputs(dtype))) if training else None,
        gate=gate(part, mode, shape, device, dtype_name),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "train", "backward"])
@pytest.mark.parametrize("layer", LAYERS)
def test_core(measured, benchmark, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, "core", layer, mode, device, dtype, tiny)
    rivals.complete(benchmark, provider)


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_module(measured, benchmark, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, "module", layer, mode, device, dtype, tiny)
    rivals.complete(benchmark, provider)


def build_model(
    model: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = TINY if tiny else shapes.load("swin3d", device)[model]
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    rivals.forget_compiled()
    torch.manual_seed(0)
    width = 24 if tiny else 96
    x = torch.randn(shape["batch"], *shape["input"], device=device).to(dtype)
    dy = torch.randn(shape["batch"], 400, device=device).to(dtype)
    master = swin.build("torch", width=width).state_dict()

    def module(provider: str) -> nn.Module:
        kind, _, backend = provider.partition(":")
        own = swin.build(
            "sora" if kind == "sora" else "torch", width=width, backend=backend or None
        )
        own.load_state_dict(master)
        own.to(device=device, dtype=dtype).train(training)
        return torch.compile(own) if kind == "compile" else own

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), (x.clone(),), grads(dtype))

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = torch.float64
        truth = cases.evaluate(module("torch").double(), (x.to(wide),), grads(wide))
        return truth, cases.evaluate(module("torch"), (x,), grads(dtype))

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(provider), (x,), grads(dtype))
        ours = {key.replace("_orig_mod.", ""): t for key, t in ours.items()}
        return cases.compare(ours, plain, truth, kink=False)

    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module("torch")(x)
    passes = 3 if training else 1
    weights = sum(t.numel() for t in master.values() if t.is_floating_point())
    asked = (device, dtype_name, mode) == ("cuda", "bf16", "inference")
    return rivals.Case(
        f"{model}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers},
        check,
        # Only the clip, the weights and the answer must move: what is between could stay on chip.
        (x.numel() + weights + dy.numel()) * dtype.itemsize * passes,
        counter.get_total_flops() * passes,
        {"op": "swin3d", "layer": model, "mode": mode, "device": device, "dtype": dtype_name,
         "shape": shape, "stock": windows.source()},
        layout="eager",
        saved=(lambda name: rivals.saved_bytes(module(name), (x,))) if training else None,
        gate=GPU_MODEL_GATE if asked else {},
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("model", MODELS)
def test_model(measured, benchmark, provider, model, mode, device, dtype, tiny):
    if not tiny and model not in shapes.load("swin3d", device):
        pytest.skip(f"{model} is not for {device}")
    measured(build_model, provider, model, mode, device, dtype, tiny)
    rivals.complete(benchmark, provider)
