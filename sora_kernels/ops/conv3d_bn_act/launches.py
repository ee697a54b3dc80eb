"""Every kernel through its launcher, for one layer: what ``audit`` compiles and ``tune`` times. The passes are here,
the convolutions in ``conv_launches.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..._launches import Launch
from . import conv_launches, passes
from .conv_launches import DTYPES

OP = passes.OP
GATED_LAYER = "r3d_18.layer1"
PLAIN = ("backward",)  # of the contiguous layout
# A volume that is no multiple of 16 is a specialisation of its own: scalar accesses, where registers run out first.
GATED_ODD = "r3d_18.layer4", "contiguous, bf16, backward, residual"

# Configs that ``tune`` tries, by layout. Of the convolutions none yet: theirs were chosen by what the compiler made.
CANDIDATES: dict[str, dict[str, Sequence[int]]] = {
    "channels_last": {
        "BLOCK_M": (16, 32, 64, 128), "BLOCK_C": (32, 64, 128), "ITERATIONS": (1, 4, 16, 64),
        "num_warps": (4, 8),
    },
    "contiguous": {
        "BLOCK_M": (512, 1024, 2048, 4096), "BLOCK_C": (1,), "ITERATIONS": (1, 2, 4, 8),
        "num_warps": (4, 8),
    },
    "convolution": {"num_warps": ()},
}  # fmt: skip


def launches(
    layer: str, shape: dict[str, Any], *, device: str, gated: bool = False
) -> Iterator[Launch]:
    """The launches of one layer of ``shapes.yaml``.

    Args:
        device: ``"meta"`` or ``"cuda"``.
        gated: only those that the test command compiles: one of each specialisation.
    """
    yield from _passes(layer, shape, device, gated)
    yield from conv_launches.launches(layer, shape, device=device, gated=gated)


def _passes(layer: str, shape: dict[str, Any], device: str, gated: bool) -> Iterator[Launch]:
    if gated and layer not in (GATED_LAYER, GATED_ODD[0]):
        return
    _, *sizes = shape["input"]
    size = [shape["batch"], shape["channels"], *conv_launches.window_of(shape).output(sizes)]
    for layout, memory_format in (
        ("channels_last", torch.channels_last_3d),
        ("contiguous", torch.contiguous_format),
    ):
        for name, dtype in DTYPES.items():
            if gated and name == "fp32":
                continue
            plain = gated and layout == "contiguous"
            y, residual, dz = (
                _dense(size, dtype, memory_format, device, shift) for shift in (0.5, -0.2, 0.0)
            )
            key = {"layout": layout, "channels": size[1], "itemsize": dtype.itemsize}
            for variant, names, run in _variants(y, residual, dz):
                label = f"{layout}, {name}, {variant}"
                if gated and layer == GATED_ODD[0]:
                    wanted = label == GATED_ODD[1]
                else:
                    wanted = not plain or variant in PLAIN
                if wanted:
                    yield Launch(f"{layer}, {label}", names, key, run)


def _variants(
    y: Tensor, residual: Tensor, dz: Tensor
) -> Iterator[tuple[str, tuple[str, ...], Callable[[], tuple[Tensor | None, ...]]]]:
    channels = y.shape[1]
    vectors = torch.linspace(0.5, 1.5, 2 * channels, device=y.device).view(2, channels)
    mean, var = vectors
    weight, bias = vectors.flip(1)
    relu: dict[str, Any] = {"activation": "relu", "negative_slope": 0.01}
    forward, reduce = ("_bn_act_fwd_kernel",), "_bn_act_bwd_reduce_kernel"
    backward = (reduce, "_bn_act_bwd_apply_kernel")

    def fwd(extra: Tensor | None, is_var: bool) -> Callable[[], tuple[Tensor | None, ...]]:
        return lambda: (
            passes.launch_fwd(
                y, extra, mean, var, weight, bias, eps=1e-5, invstd_is_var=is_var, **relu
            ),
        )

    def bwd(
        other: Tensor | None, mask: str, activation: str
    ) -> Callable[[], tuple[Tensor | None, ...]]:
        return lambda: passes.launch_bwd(
            dz, y, other, mean, var, weight, bias, mask=mask, activation=activation,
            negative_slope=0.01, batch_stats=True, needs_dy=True,
            needs_dresidual=other is not None, needs_parameters=True,
        )  # fmt: skip

    running = mean.clone(), var.clone()
    yield (
        "statistics",
        ("_bn_stats_kernel",),
        lambda: passes.launch_stats(y, None, *running, 0.1, 1e-5),
    )
    yield "forward", forward, fwd(None, False)
    yield "forward, residual", forward, fwd(residual, False)
    yield "evaluation", forward, fwd(None, True)
    yield "backward", backward, bwd(None, "y", "relu")
    yield "backward, residual", backward, bwd(residual, "output", "relu")
    yield "backward, residual, silu", backward, bwd(residual, "residual", "silu")
    yield (
        "backward, masked",
        ("_act_bwd_kernel",),
        lambda: passes.launch_masked(dz, y, activation="relu", negative_slope=0.01),
    )


@contextlib.contextmanager
def as_on(arch: str) -> Iterator[None]:
    """Plans inside are those of ``arch`` (``"sm90"``), whatever device the tensors are on."""
    with mock.patch.object(passes, "arch_of", lambda device: arch):  # the one that all modules ask
        yield


def forget_plans() -> None:
    """After a change of the configs."""
    passes.plan.cache_clear()
    conv_launches.forget_plans()


def _dense(
    size: list[int], dtype: torch.dtype, memory_format: Any, device: str, shift: float
) -> Tensor:
    t = torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)
    return t if device == "meta" else t.normal_().add_(shift)
