"""How the library decides that a kernel is right. Public: use it for your own kernels.

The *2x rule*: against the reference in fp64, our largest and our RMS error may each be at most twice those of
plain torch in the same dtype, plus a floor of a few units in the last place at the largest true value.
A tolerance is thereby never a matter of taste; the few numbers that remain are in :data:`TOLERANCES`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    value: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "factor": Tolerance(2.0, "room for another summation order, none for a lost digit"),
    "floor_ulp_16bit": Tolerance(1.0, "one rounding of a 16-bit output, where torch's happens to be exact"),
    "floor_eps_32bit": Tolerance(8.0, "a handful of fp32 roundings, where torch's error is almost zero"),
    "floor_eps_64bit": Tolerance(64.0, "fp64 is compared with itself: both errors are rounding noise"),
    "gradcheck_fp64": Tolerance(1e-6, "central differences, step 1e-6, leave about 1e-9 x curvature"),
    "transform_fp64": Tolerance(1e-10, "the same formula in fp64 through another transform: summation order"),
    "composition_fp32": Tolerance(1e-5, "fp32 through some ten layers: 1e2 roundings of 6e-8, random signs"),
    "window_attention_fp32": Tolerance(1e-6, "two projections and a softmax in fp32, beside the same in another order"),
    "training_fp32": Tolerance(1e-3, "20 optimiser steps multiply rounding noise; a wrong gradient shows at 1e-1"),
    "variance_relative": Tolerance(1e-6, "Chan's merge holds at mean/std = 1000, where a sum of squares loses 0.18"),
}  # fmt: skip


def tolerance(name: str) -> float:
    """The number behind a name in :data:`TOLERANCES`."""
    return TOLERANCES[name].value


def floor(dtype: torch.dtype, scale: float) -> float:
    """The error that is always allowed for an output of ``dtype`` whose largest true value is ``scale``."""
    names = {2: "floor_ulp_16bit", 4: "floor_eps_32bit", 8: "floor_eps_64bit"}
    return tolerance(names[dtype.itemsize]) * torch.finfo(dtype).eps * scale


def assert_within_2x(
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    name: str = "output",
    kink: bool = False,
    storage: torch.dtype | None = None,
    plain_truth: Tensor | None = None,
    terms: float = 0.0,
) -> dict[str, float]:
    """Asserts the 2x rule; returns the errors, for a benchmark row.

    Args:
        ours, plain: our result and plain torch's, of one dtype and shape.
        truth: the reference in fp64, on the same (already rounded) inputs.
        name: what is compared, for the message.
        kink: gradients through ReLU or max. A pre-activation within rounding of zero may fall on the other side,
            which moves single elements by O(1): only the RMS error is compared then.
        storage: the activations' dtype, for the gradient of a wider parameter: a sum of a few rounded values
            is no more exact than they are, so the floor is theirs.
        plain_truth: what plain torch is measured against, where that is not ``truth``: behind a kink each side
            is judged by the reference given its own mask.
        terms: the norm of the terms of a sum that may cancel: its rounding follows them, not its value.
    """
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        raise AssertionError(
            f"{name}: expected {tuple(truth.shape)} {plain.dtype}, "
            f"got {tuple(ours.shape)} {ours.dtype}"
        )
    if truth.numel() == 0:
        return {"max": 0.0, "plain_max": 0.0, "rms": 0.0, "plain_rms": 0.0}
    dtype, truth = ours.dtype, truth.double()
    same = torch.isnan(ours) == torch.isnan(truth)
    if not same.all():
        raise AssertionError(f"{name}: NaN differs at {(~same).nonzero()[0].tolist()}")
    right = truth if plain_truth is None else plain_truth.double()
    finite = torch.isfinite(truth) & torch.isfinite(right)
    infinite = torch.isinf(truth)
    if not torch.equal(ours[infinite].double(), truth[infinite]):
        raise AssertionError(f"{name}: infinities differ")
    if not finite.any():
        return {"max": 0.0, "plain_max": 0.0, "rms": 0.0, "plain_rms": 0.0}
    want = truth[finite]
    error, plain_error = (ours[finite].double() - want), (plain - right)[finite]
    coarse = dtype if storage is None or storage.itemsize > dtype.itemsize else storage
    allowed = floor(coarse, max(want.abs().max().item(), terms))
    report = {
        "max": error.abs().max().item(),
        "plain_max": plain_error.abs().max().item(),
        "rms": error.square().mean().sqrt().item(),
        "plain_rms": plain_error.square().mean().sqrt().item(),
    }
    for kind in ("rms",) if kink else ("max", "rms"):
        limit = tolerance("factor") * report[f"plain_{kind}"] + allowed
        if not report[kind] <= limit:
            worst = error.abs().argmax()
            raise AssertionError(
                f"{name} ({dtype}): {kind} error {report[kind]:.3e} against fp64, limit {limit:.3e} "
                f"(plain torch {report[f'plain_{kind}']:.3e}); worst element: ours "
                f"{ours[finite][worst].item():.6g}, truth {want[worst].item():.6g}"
            )
    return report


def assert_close(ours: Tensor, other: Tensor, tolerance_name: str, *, name: str = "output") -> None:
    """Asserts that two results agree to a named tolerance, relative to the largest value of ``other``."""
    if ours.shape != other.shape:
        raise AssertionError(f"{name}: shapes {tuple(ours.shape)} and {tuple(other.shape)}")
    if not torch.equal(torch.isnan(ours), torch.isnan(other)):
        raise AssertionError(f"{name}: NaN differs")
    if other.numel() == 0:
        return
    difference = (ours.double() - other.double()).nan_to_num().abs().max().item()
    scale = max(other.double().nan_to_num().abs().max().item(), 1.0)
    if not difference <= tolerance(tolerance_name) * scale:
        raise AssertionError(
            f"{name}: difference {difference:.3e} at scale {scale:.3e}, "
            f"tolerance {tolerance_name} = {tolerance(tolerance_name):.1e}"
        )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every ``torch.empty*`` inside is filled with NaN, so that an output nobody wrote shows.

    Uses torch's own switch, which needs deterministic mode; the mode is put back afterwards.
    """
    was = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(was, warn_only=warn_only)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter in this process (``TRITON_INTERPRET=1``)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Runs the programs of every interpreted Triton launch in a seeded random order.

    The interpreter walks the grid in order, which hides a program that relies on an earlier one.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []
    dims = [1, 1, 1]
    generator = random.Random(seed)

    def shuffled_dim(nx, ny, nz):
        dims[:] = nx, ny, nz
        order[:] = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        generator.shuffle(order)
        set_dim(nx, ny, nz)

    def shuffled_idx(x, y, z):
        set_idx(*order[(x * dims[1] + y) * dims[2] + z])

    builder.set_grid_dim, builder.set_grid_idx = shuffled_dim, shuffled_idx
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
