"""What evaluation on the CPU keeps beside a weight, as long as that lives: BatchNorm folded into it, and how each kind
of call runs.

Every call looks whether it is still true: statistics and vectors are compared value by value, for ``nn.BatchNorm3d``
writes its own without counting a version; the weight by version and by a sample, for a write through ``.data``, as
moving averages do it, counts none either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folded import scale_and_shift, scaled
from .window import Window

PLANS = 4  # kinds of call whose ordered weights are kept
_RUNS, _RUN = 64, 4  # elements of a weight that are compared; each run is one look at memory

Run = Callable[[Tensor, "Tensor | None"], Tensor]  # (x, residual) -> z
Vectors = Sequence["Tensor | None"]  # bias, bn_weight, bn_bias, mean, variance


class _Place(NamedTuple):
    """Where a vector is, and what was there."""

    tensor: Tensor
    address: int
    memory: memoryview  # keeps it alive: nothing else comes to the address
    value: bytes


class Folded:
    """Of one weight.

    Attributes:
        weight, bias: of the folded convolution; without normalisation the weight's own memory.
        plans: kind of call -> how it runs.
    """

    def __init__(self, weight: Tensor, vectors: Vectors, eps: float, window: Window) -> None:
        self._form = _form(weight)
        self._rest = _rest(eps, window)
        sample = _sample(weight)
        # Where it is a view of the weight, the next look needs no new one.
        self._sampled = sample if sample.untyped_storage().data_ptr() == self._form[1] else None
        self._sample = sample.clone()
        self._values = tuple(None if v is None else v.clone() for v in vectors)
        self._places = tuple(None if v is None else _place(v) for v in vectors)
        bias, bn_weight, bn_bias, mean, variance = vectors
        self.weight, self.bias = weight.detach(), None
        if mean is not None and variance is not None:
            scale, shift = scale_and_shift(
                bias, bn_weight, bn_bias, mean, variance, eps, torch.float32
            )
            self.weight = scaled(weight, scale, window).contiguous()
            self.bias = shift.to(weight.dtype)
        elif bias is not None:
            self.bias = bias.detach().clone()
        self.plans: dict[Hashable, Run] = {}
        self._calls: dict[Hashable, Run] = {}

    def stands_for(self, weight: Tensor, vectors: Vectors, eps: float, window: Window) -> bool:
        """Whether folding these would give the same."""
        if self._rest != _rest(eps, window):
            return False
        for v, was in zip(vectors, self._values, strict=True):
            if v is not was and (
                v is None or was is None or v.dtype != was.dtype or not v.equal(was)
            ):
                return False
        return self._is_of(weight)

    def again(self, call: Hashable, weight: Tensor, vectors: Vectors) -> Run | None:
        """How a call runs that is known, if these are the tensors that it was known of and nothing was written."""
        run = self._calls.get(call)
        if run is None:
            return None
        for v, place in zip(vectors, self._places, strict=True):
            if v is not None and place is not None:
                tensor, address, memory, value = place
                if v is not tensor or v.data_ptr() != address or memory.tobytes() != value:
                    return None
            elif v is not place:
                return None
        return run if self._is_of(weight) else None

    def remember(self, call: Hashable, kind: Hashable, vectors: Vectors) -> None:
        """That a call with these tensors is of a kind that has a plan."""
        known = (None if place is None else place.tensor for place in self._places)
        if kind in self.plans and all(v is t for v, t in zip(vectors, known, strict=True)):
            self._calls[call] = self.plans[kind]

    def add(self, kind: Hashable, run: Run) -> None:
        """A plan, in place of the oldest where there are enough."""
        self.plans = dict([*self.plans.items(), (kind, run)][-PLANS:])
        self._calls = {c: r for c, r in self._calls.items() if r in self.plans.values()}

    def _is_of(self, weight: Tensor) -> bool:
        if _form(weight) != self._form:
            return False
        sampled = _sample(weight) if self._sampled is None else self._sampled
        return sampled.equal(self._sample)


def _form(weight: Tensor) -> tuple[Any, ...]:
    # A tensor made in inference mode counts no versions.
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape


def _rest(eps: float, window: Window) -> tuple[Any, ...]:
    return eps, window.transposed, window.groups


def _sample(weight: Tensor) -> Tensor:
    """Elements from all over it: where it is dense a view, which keeps its memory alive and not the tensor."""
    w = weight.data
    flat = (w if w.is_contiguous() else w.permute(0, 2, 3, 4, 1)).flatten()
    if flat.numel() <= _RUNS * _RUN:
        return flat
    return flat.unfold(0, _RUN, flat.numel() // _RUNS)


def _place(v: Tensor) -> _Place | None:
    if not v.is_contiguous():
        return None
    memory = memoryview(v.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return _Place(v, v.data_ptr(), memory, memory.tobytes())


# By id: a weak dictionary of torch's takes 3 us to look into.
_FOLDED: dict[int, tuple[weakref.ref[Tensor], Folded]] = {}


def find(weight: Tensor) -> Folded | None:
    """What is kept beside a weight, be it true or not."""
    entry = _FOLDED.get(id(weight))
    return entry[1] if entry is not None and entry[0]() is weight else None


def fold(weight: Tensor, vectors: Vectors, eps: float, window: Window) -> Folded:
    """What is kept beside a weight, made anew if it is not true; mean and variance None: no normalisation."""
    found = find(weight)
    if found is None or not found.stands_for(weight, vectors, eps, window):
        found = Folded(weight, vectors, eps, window)
        number = id(weight)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if number in _FOLDED and _FOLDED[number][0] is reference:
                del _FOLDED[number]

        _FOLDED[number] = weakref.ref(weight, forget), found
    return found
