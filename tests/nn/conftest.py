"""The recurrent modules beside torch's: one ``Kind`` a cell, one ``case`` a cell and constructor options."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import sora_kernels as sk
from sora_kernels.testing import assert_close


class Kind(NamedTuple):
    """One cell: how to build it, ours and torch's, and what its states look like."""

    name: str
    fixed: dict[str, Any]

    @property
    def ours(self) -> Any:
        return getattr(sk.nn, self.name)

    @property
    def theirs(self) -> Any:
        return getattr(nn, self.name)

    @property
    def has_c(self) -> bool:
        return self.name == "LSTM"

    def pair(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
        """Ours and torch's, 4 features in, 6 hidden, with the same weights."""
        options = {"input_size": 4, "hidden_size": 6, "dtype": dtype} | self.fixed | options
        theirs = self.theirs(**options)
        ours = self.ours(**options)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def states(self, module: Any, batch: int | None = 3, dtype: torch.dtype = torch.float64) -> Any:
        """Random hx for the module; no batch axis for ``batch=None``."""
        count = module.num_layers * (1 + module.bidirectional)
        rows = () if batch is None else (batch,)
        h = torch.randn(count, *rows, module.proj_size or module.hidden_size, dtype=dtype)
        return (h, torch.randn(count, *rows, module.hidden_size, dtype=dtype)) if self.has_c else h

    def both(self, h: Tensor) -> Any:
        """hx from one tensor that stands for each of the states."""
        return (h, h) if self.has_c else h

    @classmethod
    def flat(cls, found: Any) -> list[Tensor]:
        """Every tensor of a module's result in order, packed data too."""
        if isinstance(found, Tensor):
            return [found]
        if isinstance(found, PackedSequence):
            return [found.data]
        return [t for part in found for t in cls.flat(part)]

    @classmethod
    def assert_same(cls, found: Any, wanted: Any, tolerance: str = "transform_fp64") -> None:
        for k, (a, b) in enumerate(zip(cls.flat(found), cls.flat(wanted), strict=True)):
            assert a.dtype == b.dtype
            assert_close(a, b, tolerance, name=f"tensor {k}")

    @classmethod
    def gradients(cls, module: Any, found: Any, *tensors: Tensor) -> list[Tensor]:
        """Of a sum of squares over all that the module returned, by the tensors and the parameters."""
        loss = sum((t * t).sum() for t in cls.flat(found))
        return list(torch.autograd.grad(loss, [*tensors, *module.parameters()]))


KINDS = {
    "LSTM": Kind("LSTM", {}),
    "GRU": Kind("GRU", {}),
    "RNN_TANH": Kind("RNN", {}),
    "RNN_RELU": Kind("RNN", {"nonlinearity": "relu"}),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True, "num_layers": 2},
]
CASES = [(kind, options) for kind in KINDS for options in OPTIONS]
CASES += [
    ("LSTM", {"proj_size": 2, "num_layers": 2}),
    ("LSTM", {"proj_size": 3, "bidirectional": True, "batch_first": True}),
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Kind, dict[str, Any]]:
    name, options = request.param
    return KINDS[name], options
