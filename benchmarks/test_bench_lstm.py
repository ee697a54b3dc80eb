"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` against the modules of ``sora_kernels.nn``, packed sequences too."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import sora_kernels as sk

from . import cases, shapes, timers

MODULES: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ROWS = {op: sorted(shapes.load(op, "cuda")) for op in MODULES}
BF16 = [
    (op, name) for op in MODULES for name, row in shapes.load(op, "cpu").items() if "bf16" in row
]
# Layers of the same sizes over one input.
ENSEMBLES = {
    "m8_h64": {"members": 8, "batch": 16, "time": 50, "input": 64, "hidden": 64},
    "m64_h16": {"members": 64, "batch": 4, "time": 16, "input": 16, "hidden": 16},
}
INT8 = [("lstm", "torch.b1_h512"), ("gru", "torch.b1_h256")]


def build(
    op: str, layer: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str],
    int8: bool = False,
) -> cases.Case:  # fmt: skip
    shape = shapes.load(op, device, tiny).get(layer)
    if shape is None:
        pytest.skip("a GPU row")
    dtype, training = cases.DTYPES[dtype_name], mode == "train"
    torch.manual_seed(0)
    size = {
        "num_layers": shape.get("layers", 1),
        "bidirectional": shape.get("bidirectional", False),
    }
    if "projection" in shape:
        size["proj_size"] = shape["projection"]
    stock = MODULES[op](shape["input"], shape["hidden"], **size).to(device, dtype).train(training)
    rows, batch_sizes = _rows(shape)
    x = torch.randn(*rows, shape["input"], device=device).to(dtype)
    directions = 1 + size["bidirectional"]
    width = directions * shape.get("projection", shape["hidden"])
    dy = torch.randn(*rows, width, device=device).to(dtype)

    def module(provider: str) -> nn.Module:
        if provider in ("torch", "compile"):
            own = copy.deepcopy(stock)
            own.flatten_parameters()
            return own if provider == "torch" else torch.compile(own)
        backend = provider.partition(":")[2] or None
        kind = getattr(sk.nn, op.upper())
        ours = kind(shape["input"], shape["hidden"], **size, backend=backend, int8=int8)
        ours.to(device, dtype).load_state_dict(stock.state_dict())
        return ours.train(training)

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        own = x.to(dtype, copy=True).requires_grad_(training)
        return (own if batch_sizes is None else PackedSequence(own, batch_sizes),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def call(provider: str) -> timers.Call:
        return cases.module_call(module(provider), inputs(dtype), grads(dtype))

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        exact, wide = copy.deepcopy(stock).double(), torch.float64
        truth = cases.evaluate(exact, inputs(wide), grads(wide))
        return truth, cases.evaluate(module("torch"), inputs(dtype), grads(dtype))

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        ours = cases.evaluate(module(provider), inputs(dtype), grads(dtype))
        ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
        return _int8_errors(ours, truth) if int8 else cases.compare(ours, plain, truth, kink=False)

    weights = sum(p.numel() for p in stock.parameters())
    products = sum(p.numel() for name, p in stock.named_parameters() if "weight" in name)
    passes = 3 if training else 1
    return cases.Case(
        f"{op}/{layer}/{mode}/{device}/{dtype_name}" + "/int8" * int8,
        device,
        dtype,
        {provider: functools.partial(call, provider) for provider in providers},
        check,
        # Forward: x, weights in, y out. Backward: dy, x, weights, y in, dx, dweights out.
        (x.numel() + weights + dy.numel()) * dtype.itemsize * passes,
        2 * x.shape[:-1].numel() * products * passes,
        {"op": op, "layer": layer, "mode": mode, "device": device, "dtype": dtype_name,
         "shape": shape},
        within_2x=not int8,
    )  # fmt: skip


class Looped(nn.Module):
    """What torch's layers ask for: vmap does not take them."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x)[0] for member in self.members])


class Stacked(nn.Module):
    """Members by ``torch.vmap`` over their weights."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.names = [name for name, _ in members[0].named_parameters()]
        self.weights = nn.ParameterList(torch.func.stack_module_state(members)[0].values())
        self.call = functools.partial(
            torch.func.functional_call, copy.deepcopy(members[0]).to("meta")
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.weights, strict=True))
        return torch.vmap(lambda weights: self.call(weights, (x,))[0])(weights)


def build_ensemble(
    op: str, name: str, mode: str, device: str, dtype_name: str, tiny: bool, providers: list[str]
) -> cases.Case:
    shape = ENSEMBLES[name] | ({"members": 2, "time": 8} if tiny else {})
    dtype, training, M = cases.DTYPES[dtype_name], mode == "train", shape["members"]
    torch.manual_seed(0)
    sizes = (shape["input"], shape["hidden"])
    stock = [MODULES[op](*sizes).to(device, dtype) for _ in range(M)]
    x = torch.randn(shape["time"], shape["batch"], shape["input"], device=device).to(dtype)
    dy = torch.randn(M, shape["time"], shape["batch"], shape["hidden"], device=device).to(dtype)

    def module(provider: str, dtype: torch.dtype = dtype) -> nn.Module:
        members = [copy.deepcopy(member).to(dtype) for member in stock]
        if provider in ("torch", "compile"):
            looped = Looped(members)
            return looped if provider == "torch" else torch.compile(looped)
        backend = provider.partition(":")[2] or None
        own = [getattr(sk.nn, op.upper())(*sizes, backend=backend) for _ in members]
        for ours, member in zip(own, members, strict=True):
            ours.to(device, dtype).load_state_dict(member.state_dict())
        return Stacked(own)

    def inputs(dtype: torch.dtype) -> tuple[Tensor]:
        return (x.to(dtype, copy=True).requires_grad_(training),)

    def grads(dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        return (dy.to(dtype),) if training else None

    def evaluate(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Members' gradients stacked, under the names of either module's order."""
        found = cases.evaluate(model, inputs(dtype), grads(dtype))
        named = {k: found.pop(k) for k in list(found) if k.startswith(("dmembers", "dweights"))}
        if isinstance(model, Stacked):
            return found | {f"dweights.{k}": t for k, t in enumerate(named.values())}
        per = len(named) // M
        return found | {f"dweights.{k}": torch.stack([*named.values()][k::per]) for k in range(per)}

    @functools.cache
    def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = torch.float64
        return evaluate(module("torch", wide), wide), evaluate(module("torch"), dtype)

    def check(provider: str) -> dict[str, dict[str, float]]:
        truth, plain = expected()
        return cases.compare(evaluate(module(provider), dtype), plain, truth, kink=False)

    weights = sum(p.numel() for member in stock for p in member.parameters())
    products = sum(
        p.numel() for member in stock for key, p in member.named_parameters() if "weight" in key
    )
    passes = 3 if training else 1
    return cases.Case(
        f"{op}/ensemble.{name}/{mode}/{device}/{dtype_name}",
        device,
        dtype,
        {
            p: functools.partial(lambda p: cases.module_call(module(p), inputs(dtype), grads(dtype)), p)
            for p in providers
        },
        check,
        (x.numel() + weights + dy.numel()) * dtype.itemsize * passes,
        2 * shape["time"] * shape["batch"] * products * passes,
        {"op": op, "layer": f"ensemble.{name}", "mode": mode, "device": device, "dtype": dtype_name,
         "shape": shape},
    )  # fmt: skip


_build_int8 = functools.partial(build, int8=True)


def _int8_errors(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of rounded weights: not the 2x rule, but a hundredth of the output's size."""
    errors = {}
    for name, want in truth.items():
        error = (ours[name].double() - want).abs()
        errors[name] = {"max": error.max().item(), "rms": error.square().mean().sqrt().item()}
        if not errors[name]["rms"] <= 0.01 * want.square().mean().sqrt().item():
            raise AssertionError(f"{name}: int8 error {errors[name]}")
    return errors


def _rows(shape: dict[str, Any]) -> tuple[tuple[int, ...], Tensor | None]:
    """Axes of x before the features: time and batch, or the rows of a PackedSequence and its batch sizes."""
    time, batch = shape["time"], shape["batch"]
    if "shortest" not in shape:
        return (time, batch), None
    lengths = torch.linspace(time, min(shape["shortest"], time), batch).round().long()
    batch_sizes = pack_padded_sequence(torch.empty(time, batch), lengths).batch_sizes
    return (int(lengths.sum()),), batch_sizes


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", ROWS["lstm"])
def test_lstm(measured, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, "lstm", layer, mode, device, dtype, tiny)


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", ROWS["gru"])
def test_gru(measured, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, "gru", layer, mode, device, dtype, tiny)


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("layer", ROWS["rnn"])
def test_rnn(measured, provider, layer, mode, device, dtype, tiny):
    measured(build, provider, "rnn", layer, mode, device, dtype, tiny)


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize(("op", "layer"), BF16)
def test_cpu_bf16(measured, pytestconfig, provider, op, layer, mode, tiny):
    if pytestconfig.getoption("device") == "cuda":
        pytest.skip("a CPU row")
    measured(build, provider, op, layer, mode, "cpu", "bf16", tiny)


@pytest.mark.parametrize(("op", "layer"), INT8)
def test_cpu_int8(measured, pytestconfig, provider, op, layer, tiny):
    if pytestconfig.getoption("device") == "cuda":
        pytest.skip("a CPU row")
    measured(
        functools.partial(build, int8=True), provider, op, layer, "inference", "cpu", "fp32", tiny
    )


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("name", ENSEMBLES)
@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_ensemble(measured, provider, op, name, mode, device, dtype, tiny):
    measured(build_ensemble, provider, op, name, mode, device, dtype, tiny)
