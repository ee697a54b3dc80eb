"""Random pools by the automatic backend. The test command runs 200, ``make fuzz`` five a number: 10,000.

Maxima and their gradients' places against ATen's exactly, means and every gradient by the 2x rule; regions against
the definition, which tests/ops/test_pyramid_pool.py holds to a loop over samples.
"""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.pyramid_pool import reference
from sora_kernels.ops.pyramid_pool.levels import bins, parse
from sora_kernels.testing import assert_within_2x, poisoned

FIRST, LAST = (int(n) for n in os.environ.get("SORA_FUZZ", "0:199").split(":"))
CASES = 5 if "SORA_FUZZ" in os.environ else 1
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    number: int
    shape: tuple[int, ...]
    levels: tuple[Any, ...]
    mode: str
    flat: bool
    data_format: str
    layout: str
    values: str
    dtype: torch.dtype
    valid: list[list[int]] | None
    used: tuple[int, ...]


def random_case(number: int) -> Case:
    r = random.Random(number)
    big = r.random() < 0.1
    sizes = tuple(r.randint(1, 40 if big else 9) for _ in range(3))
    shape = (r.randint(1, 3), r.choice((1, 2, 3, 5, 8, 15, 16, 17, 33)), *sizes)
    flat = r.random() < 0.5
    levels: list[Any] = []
    for _ in range(r.randint(1, 4)):
        if r.random() < 0.5:
            levels.append(r.randint(1, 9))
        elif levels and r.random() < 0.3:
            base = levels[-1] if isinstance(levels[-1], tuple) else (levels[-1],) * 3
            levels.append(tuple(o if o is None else o * r.randint(1, 2) for o in base))
        else:
            whole = 0.0 if flat else 0.25
            levels.append(tuple(None if r.random() < whole else r.randint(1, 7) for _ in range(3)))
    valid = None
    if r.random() < 0.25:
        least = 0 if r.random() < 0.3 else 1
        valid = [[r.randint(least, n + 1) for n in sizes] for _ in range(shape[0])]
    return Case(
        number, shape, tuple(levels), r.choice(("max", "max", "avg", "maxavg")), flat,
        r.choice(("NCDHW", "NDHWC")), r.choice(("contiguous", "inner", "sliced", "expanded", "turned")),
        r.choice(("normal", "normal", "ties", "nan", "infinite")), r.choice(DTYPES), valid,
        () if flat else tuple(k for k in range(len(levels)) if r.random() < 0.8) or (0,),
    )  # fmt: skip


def clip(c: Case) -> Tensor:
    """[B, C, T, H, W] in the case's memory layout."""
    generator = torch.Generator().manual_seed(c.number)
    B, C, *sizes = c.shape

    def made(*shape: int) -> Tensor:
        if c.values == "ties":
            x = torch.randint(-2, 3, shape, generator=generator).double()
        else:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
        special = torch.rand(shape, generator=generator) < 0.1
        if c.values == "nan":
            x[special] = torch.nan
        if c.values == "infinite" and c.mode == "max":
            x[special] = -torch.inf
        return x.to(c.dtype)

    if c.layout == "inner":
        return made(B, *sizes, C).movedim(-1, 1)
    if c.layout == "sliced":
        T, H, W = sizes
        return made(B, C + 1, T, H + 2, 2 * W)[:, 1:, :, 1:-1, ::2]
    if c.layout == "expanded":
        return made(1, 1, *sizes).expand(c.shape)
    if c.layout == "turned":
        T, H, W = sizes
        return made(W, C, B, H, T).permute(2, 1, 4, 3, 0)
    return made(*c.shape)


def plain(c: Case, x: Tensor) -> list[Tensor]:
    """Maps [B, C', t, h, w] by ATen, or by the definition where there are regions."""
    levels = parse(c.levels, "maps")
    if c.valid is not None:
        return reference.maps(x, levels, c.mode, torch.tensor(c.valid))
    pools = [p for k, p in (("max", F.adaptive_max_pool3d), ("avg", F.adaptive_avg_pool3d)) if k in c.mode]  # fmt: skip
    return [torch.cat([pool(x, bins(o, x.shape[2:])) for pool in pools], 1) for o in levels]


def ours(c: Case, x: Tensor) -> list[Tensor]:
    """The same maps by the public function."""
    last = c.data_format == "NDHWC"
    found = sk.pyramid_pool3d(
        x.movedim(1, -1) if last else x, c.levels, mode=c.mode, output="flat" if c.flat else "maps",
        data_format=c.data_format, valid_size=None if c.valid is None else torch.tensor(c.valid),
    )  # fmt: skip
    if not c.flat:
        return [m.movedim(-1, 1) if last else m for m in found]
    widths = c.shape[1] * (1 + (c.mode == "maxavg"))
    counted = [bins(o, c.shape[2:]) for o in parse(c.levels, "flat")]
    split = found.split([widths * torch.Size(o).numel() for o in counted], 1)
    return [part.view(c.shape[0], widths, *o) for part, o in zip(split, counted, strict=True)]


def run(c: Case, x: Tensor, call: Any) -> tuple[list[Tensor], Tensor]:
    leaf = x.detach().requires_grad_()
    maps = call(c, leaf)
    generator = torch.Generator().manual_seed(c.number + 1)
    # Positive, so that none cancel: an element is zero where it is nobody's maximum, and only there.
    grads = [torch.rand(m.shape, generator=generator).add(0.25).to(c.dtype) for m in maps]
    grads = [g.to(m.dtype) for g, m in zip(grads, maps, strict=True)]
    used = [k for k in c.used or range(len(maps)) if maps[k].requires_grad]  # not of empty regions
    if not used:
        return [m.detach() for m in maps], torch.zeros_like(x)
    (dx,) = torch.autograd.grad([maps[k] for k in used], leaf, [grads[k] for k in used])
    return [m.detach() for m in maps], dx


def check(c: Case) -> None:
    x = clip(c)
    truth_maps, truth_dx = run(c, x.double(), plain)
    plain_maps, plain_dx = run(c, x, plain)
    with poisoned():
        our_maps, our_dx = run(c, x, ours)
    assert len(our_maps) == len(c.levels) and our_dx.shape == x.shape
    for a, b, t in zip(our_maps, plain_maps, truth_maps, strict=True):
        if c.mode == "max":
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        assert_within_2x(a, b, t, name="map")
    assert_within_2x(our_dx, plain_dx, truth_dx, name="dx")
    if c.mode == "max":
        assert torch.equal(our_dx != 0, truth_dx != 0)


@pytest.mark.parametrize("number", range(FIRST, LAST + 1))
def test_random_pools(number):
    for k in range(CASES):
        c = random_case(number * CASES + k)
        try:
            check(c)
        except Exception as error:
            raise AssertionError(f"{error}\n{c}") from error
