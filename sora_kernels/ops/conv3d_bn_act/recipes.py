"""How an output can be made again from what its own backward keeps anyway: what ``sk.save_memory()`` stores for it.

z = activation(BN(y)) of batch statistics, without a residual, is one elementwise pass over y away. While recording is
on, every such call leaves a recipe under its output's address, for as long as that output lives.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import Tensor

from . import backends
from .options import BATCH, Options
from .window import Window

_state = threading.local()


class Recipe:
    """Makes z ``[N, K, T', H', W']`` again."""

    def __init__(
        self, z: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None,
        bn_bias: Tensor | None, window: Window, options: Options, backend: str,
    ) -> None:  # fmt: skip
        self.z, self.version = weakref.ref(z), z._version
        self.strides, self.dtype = z.stride(), z.dtype
        self.y, self.mean, self.invstd = y, mean, invstd
        self.vectors = (bn_weight, bn_bias)
        self.versions = tuple(None if v is None else v._version for v in self.vectors)
        self.window, self.options, self.backend = window, options, backend

    def stands_for(self, t: Tensor) -> bool:
        """Whether t is z itself, as it was computed."""
        z = self.z()
        return (
            z is not None
            and z._version == self.version == t._version
            and t.shape == z.shape
            and t.stride() == self.strides
            and t.dtype == self.dtype
        )

    def make(self) -> Tensor:
        """z, in its own strides."""
        for name, v, version in zip(
            ("bn_weight", "bn_bias"), self.vectors, self.versions, strict=True
        ):
            if v is not None and v._version != version:
                raise RuntimeError(
                    f"{name}: expected as in the forward pass, got it modified by an inplace operation (at version "
                    f"{v._version}, expected {version}): save_memory() makes activations again from it"
                )
        z = backends.normalise(
            self.y, self.mean, self.invstd, *self.vectors, self.window, self.options, self.backend
        )
        if z.stride() != self.strides:
            z = z.new_empty_strided(z.shape, self.strides).copy_(z)
        return z


_RECIPES: dict[int, Recipe] = {}


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Calls of this thread leave recipes inside."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


def wanted(has_residual: bool, options: Options) -> bool:
    """Whether a call of this kind leaves a recipe now."""
    return getattr(_state, "depth", 0) > 0 and options.norm == BATCH and not has_residual


def remember(recipe: Recipe) -> None:
    z = recipe.z()
    assert z is not None
    address = z.data_ptr()
    _RECIPES[address] = recipe

    def forget() -> None:
        if _RECIPES.get(address) is recipe:
            del _RECIPES[address]

    weakref.finalize(z, forget).atexit = False


def find(t: Tensor) -> Recipe | None:
    """The recipe of t, where t is an output that can be made again."""
    if not _RECIPES or type(t) is not Tensor:  # another kind may have no address
        return None
    recipe = _RECIPES.get(t.data_ptr())
    return recipe if recipe is not None and recipe.stands_for(t) else None
