"""Random recurrent calls: a number stands for one configuration, and always for the same."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sora_kernels as sk

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FORMS = ("dense", "lengths", "packed", "packed, unsorted", "unbatched")
STATES = ("none", "given", "strided", "learned", "strided and learned")


@dataclass(frozen=True)
class Configuration:
    """One call of a module or of a function.

    Attributes:
        form: how rows and lengths come in; ``"unbatched"`` has no batch axis.
        module: through ``sk.nn``, else through ``sk.lstm`` and its like.
        states: of hx: not given, or contiguous, or a view with other strides; learned: it requires grad.
        grad: with every gradient, else under ``no_grad``.
        x_grad: x requires grad as well as the weights.
        frozen: weights that do not, as indices modulo their number.
        x_strided: x is a view with other strides.
        used: which outputs the loss sees, as indices modulo their number.
        reset, cells: ask for what torch does not have.
    """

    number: int
    kind: str
    form: str
    module: bool
    dtype: torch.dtype
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    proj: int
    lengths: tuple[int, ...] | None
    states: str
    grad: bool
    x_grad: bool
    frozen: tuple[int, ...]
    x_strided: bool
    used: tuple[int, ...]
    memory: str
    backend: str | None
    reset: bool = False
    cells: bool = False

    @property
    def cell(self) -> str:
        return self.kind.partition("_")[0]

    @property
    def shape(self) -> dict[str, object]:
        """What the module's constructor and the function are both told."""
        found: dict[str, object] = {
            "num_layers": self.layers,
            "bias": self.bias,
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
        }
        if self.cell == "lstm":
            found["proj_size"] = self.proj
        if self.cell == "rnn":
            found["nonlinearity"] = self.kind.partition("_")[2]
        return found


def against_torch(number: int) -> Configuration:
    """A configuration that torch's own modules can run as well."""
    r = random.Random(number)
    kind = r.choice(KINDS)
    form = r.choices(FORMS, (5, 3, 3, 3, 1))[0]
    H = _size(r)  # noqa: N806
    large = H > 128
    T = r.choice((1, r.randint(2, 12)))
    B = 1 if form == "unbatched" else r.choice((1, r.randint(1, 4 if large else 20)))
    if form == "dense" and r.random() < 0.04:
        B = 0
    lengths = None
    if form not in ("dense", "unbatched"):
        lengths = tuple(r.randint(1, T) for _ in range(B))
        if form == "packed":
            lengths = tuple(sorted(lengths, reverse=True))
    return Configuration(
        number, kind, form,
        module=form not in ("dense", "lengths") or r.random() < 0.6,
        dtype=r.choices((torch.float32, torch.float64, torch.bfloat16), (5, 2, 3))[0],
        T=T, B=B, I=min(_size(r), 70), H=H,
        layers=r.choices((1, 2, 3), (6, 3, 0 if large else 1))[0],
        bidirectional=r.random() < 0.4, bias=r.random() < 0.75, batch_first=r.random() < 0.4,
        proj=r.randint(1, H - 1) if kind == "lstm" and H > 1 and r.random() < 0.3 else 0,
        lengths=lengths, states=r.choice(STATES),
        grad=r.random() < 0.75, x_grad=r.random() < 0.8,
        used=tuple(r.sample(range(6), r.randint(1, 6))),
        memory=r.choice(("save", "recompute")), backend=r.choice((None, "native")),
        frozen=tuple(r.sample(range(1, 16), r.choice((0, 0, 0, 1, 5)))),
        x_strided=r.random() < 0.25,
    )  # fmt: skip


def beyond_torch(number: int) -> Configuration:
    """A configuration with resets, empty rows or every cell state: the reference's territory."""
    r = random.Random(-1 - number)
    c = against_torch(number)
    T, B = min(c.T, 8), min(c.B, 9)
    form = r.choice(("dense", "lengths"))
    lengths = tuple(r.choice((0, r.randint(0, T))) for _ in range(B)) if form == "lengths" else None
    return dataclasses.replace(
        c, form=form, module=r.random() < 0.5, T=T, B=B, I=min(c.I, 20), H=min(c.H, 40),
        proj=min(c.proj, min(c.H, 40) - 1), lengths=lengths, reset=r.random() < 0.8,
        cells=c.cell == "lstm" and r.random() < 0.6,
    )  # fmt: skip


def _size(r: random.Random) -> int:
    """Mostly anything up to 70; else multiples of a vector, and a few beyond 128."""
    pick = r.random()
    if pick < 0.6:
        return r.randint(1, 70)
    return 16 * r.randint(1, 4) if pick < 0.92 else r.randint(129, 200)


class Inputs:
    """The tensors of a configuration, rounded to its dtype; torch's module as it initialises itself."""

    def __init__(self, c: Configuration) -> None:
        torch.manual_seed(c.number)
        self.c = c
        module = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[c.cell]
        self.stock: nn.RNNBase = module(c.I, c.H, **c.shape).to(c.dtype)  # type: ignore[arg-type]
        rows = (c.B, c.T) if c.batch_first else (c.T, c.B)
        self.x = torch.randn(*rows, c.I).to(c.dtype)
        if c.x_strided:
            self.x = torch.randn(c.I, *rows, 2).to(c.dtype)[..., 1].movedim(0, -1)
        if c.form == "unbatched":
            self.x = self.x.squeeze(0 if c.batch_first else 1)
        self.reset = torch.rand(rows) < 0.3 if c.reset else None
        self.lengths = None
        if c.lengths is not None:
            self.lengths = torch.tensor(c.lengths, dtype=(torch.int64, torch.int32)[c.number % 2])
            if c.form == "lengths" and c.number % 3 == 0:  # padding may hold anything
                past = torch.arange(c.T)[:, None] >= self.lengths
                self.x[past.t() if c.batch_first else past] = float("nan")
        count = c.layers * (1 + c.bidirectional)
        self.states: list[Tensor] = []
        if c.states != "none":
            sizes = (c.proj or c.H, c.H) if c.cell == "lstm" else (c.H,)
            self.states = [self._state(count, size) for size in sizes]

    def _state(self, count: int, size: int) -> Tensor:
        c = self.c
        if c.states.startswith("strided"):
            t = torch.randn(c.B, count, 2 * size).to(c.dtype)[..., ::2].transpose(0, 1)
        else:
            t = torch.randn(count, c.B, size).to(c.dtype)
        return t.squeeze(1) if c.form == "unbatched" else t

    def ours(self, dtype: torch.dtype, backend: str | None) -> nn.Module:
        """``sk.nn``'s module with the same weights."""
        c = self.c
        module = getattr(sk.nn, c.cell.upper())(
            c.I, c.H, **c.shape, backend=backend, memory=c.memory
        )
        module.to(dtype).load_state_dict(self.stock.state_dict())
        return module
