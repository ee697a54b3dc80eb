"""Recurrent calls for the tests of ``lstm``, ``gru`` and ``rnn``: inputs by name, outputs and gradients by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from sora_kernels.ops.lstm import gru, lstm, rnn, stack
from sora_kernels.ops.lstm.cells import CELLS
from sora_kernels.testing import assert_within_2x

KINDS = tuple(CELLS)
MODULES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
FUNCTIONS = {"lstm": lstm, "gru": gru, "rnn": rnn}


class Recurrent:
    """One call of one cell kind.

    ``inputs`` holds x, h_0, LSTM's c_0 and the weights of torch's module under their own names; ``options`` what goes
    to the public function. With ``packed``, x is made of rows of those lengths and goes the way of ``PackedSequence``.
    """

    def __init__(
        self, kind: str, T: int = 5, B: int = 3, I: int = 4, H: int = 6, layers: int = 1,  # noqa: E741
        bidirectional: bool = False, bias: bool = True, proj: int = 0, states: bool = True,
        dtype: torch.dtype = torch.float32, packed: list[int] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.kind, self.cell, self.operator = kind, CELLS[kind], kind.partition("_")[0]
        self.function = FUNCTIONS[self.operator]
        shape: dict[str, Any] = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
        own = {"nonlinearity": kind.partition("_")[2]} if self.operator == "rnn" else {}
        if proj:
            own["proj_size"] = proj
        module = MODULES[self.operator](I, H, **shape, **own)
        self.options: dict[str, Any] = {**shape, **own, **options}
        x, self.batch_sizes = torch.randn(T, B, I), None
        if packed is not None:
            x, self.batch_sizes, *_ = pack_padded_sequence(x, torch.tensor(packed))
        count = layers * (1 + bidirectional)
        self.inputs = {"x": x}
        if states:
            self.inputs["h_0"] = torch.randn(count, B, proj or H)
        if states and self.cell.has_c:
            self.inputs["c_0"] = torch.randn(count, B, H)
        self.inputs |= {name: p.detach().clone() for name, p in module.named_parameters()}
        self.inputs = {name: t.to(dtype) for name, t in self.inputs.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what ``call`` returns."""
        names = ("y", "h_n", "c_n") if self.cell.has_c else ("y", "h_n")
        return (*names, "cells") if self.options.get("return_cells") else names

    def with_inputs(self, **changed: Tensor) -> Recurrent:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.inputs = {**self.inputs, **changed}
        return other

    def with_options(self, **changed: Any) -> Recurrent:
        other = self.with_inputs()
        other.options = {**self.options, **changed}
        return other

    def to(self, dtype: torch.dtype) -> Recurrent:
        return self.with_inputs(**{name: t.to(dtype) for name, t in self.inputs.items()})

    def split(self, inputs: dict[str, Tensor] | None = None) -> tuple[Tensor, Any, list[Tensor]]:
        """x, hx as the public function takes it, weights."""
        inputs = self.inputs if inputs is None else inputs
        hx: Any = None
        if "h_0" in inputs:
            hx = (inputs["h_0"], inputs["c_0"]) if self.cell.has_c else inputs["h_0"]
        weights = [t for name, t in inputs.items() if name not in ("x", "h_0", "c_0")]
        return inputs["x"], hx, weights

    def call(self, inputs: dict[str, Tensor] | None = None, **options: Any) -> tuple[Tensor, ...]:
        """y, the last states, cells: flat."""
        x, hx, weights = self.split(inputs)
        options = {**self.options, **options}
        if self.batch_sizes is None:
            y, last, *cells = self.function(x, hx, weights, **options)
            return (y, *(last if self.cell.has_c else (last,)), *cells)
        states = hx if self.cell.has_c or hx is None else (hx,)
        backend = options.pop("backend", None) or ""
        shape = [options.pop(n) for n in ("bias", "num_layers", "bidirectional")]
        proj = options.pop("proj_size", 0)
        options.pop("nonlinearity", None)
        y, last, found = stack.run(
            self.cell, x, states, weights, *shape, False, proj, options.pop("dropout", 0.0),
            options.pop("training", False), batch_sizes=self.batch_sizes, backend=backend, **options,
        )  # fmt: skip
        return (y, *last) if found is None else (y, *last, found)

    def run(self, **options: Any) -> dict[str, Tensor]:
        """Outputs and every gradient by name, for fixed random output gradients."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.inputs.items()}
        found = self.call(leaves, **options)
        grads = torch.autograd.grad(found, list(leaves.values()), self.output_grads(found))
        named = dict(zip(self.with_options(**options).outputs, found, strict=True))
        return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}

    def check(self, backend: str, plain_backend: str) -> None:
        """Every output and gradient of ``backend`` by the 2x rule, plain torch being ``plain_backend``."""
        call, kink = self, self.kind == "rnn_relu"
        for _ in range(20):
            truth = call.to(torch.float64).run(backend="reference")
            plain = call.run(backend=plain_backend)
            ours = call.run(backend=backend)
            mask = truth["y"] > 0
            if not kink or (torch.equal(ours["y"] > 0, mask) and torch.equal(plain["y"] > 0, mask)):
                break
            # A unit within rounding of zero fell on the other side of relu: its gradient is another.
            x = call.inputs["x"]
            call = call.with_inputs(x=torch.randn(x.shape).to(x))
        assert list(ours) == list(truth) == [*call.outputs, *(f"d{name}" for name in call.inputs)]
        for name in ours:
            rough = kink and name not in call.outputs
            assert_within_2x(ours[name], plain[name], truth[name], name=name, kink=rough)

    @staticmethod
    def output_grads(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(o.shape, generator=generator).to(o) for o in outputs]


@pytest.fixture
def recurrent() -> type[Recurrent]:
    return Recurrent


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every cell."""
    return request.param
