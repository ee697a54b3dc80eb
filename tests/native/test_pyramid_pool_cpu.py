"""The C++ kernels of ``pyramid_pool3d``: values, places and gradients against the definition, in every layout."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sora_kernels import _native
from sora_kernels.ops.pyramid_pool import definition, layout, native
from sora_kernels.ops.pyramid_pool.layout import Form
from sora_kernels.ops.pyramid_pool.levels import parse
from sora_kernels.ops.pyramid_pool.op import MODES
from sora_kernels.testing import assert_within_2x, poisoned

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


# What a tensor [B, C, T, H, W] may look like in memory: same values, other strides.
def sliced(x: Tensor) -> Tensor:
    B, C, T, H, W = x.shape
    wide = x.new_full((B, C + 1, T + 1, H + 2, W + 1), NAN)
    wide[:, 1:, 1:, 1:-1, :W] = x
    return wide[:, 1:, 1:, 1:-1, :W]


def every_second(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:4], 2 * x.shape[4]), NAN)
    wide[..., ::2] = x
    return wide[..., ::2]


def sliced_channels_last(x: Tensor) -> Tensor:
    B, C, T, H, W = x.shape
    wide = x.new_full((B, T, H, W, C + 3), NAN)
    wide[..., 2:-1] = x.movedim(1, -1)
    return wide[..., 2:-1].movedim(-1, 1)


def unaligned(x: Tensor) -> Tensor:
    return torch.cat((x.new_full((1,), NAN), x.flatten()))[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "sliced": sliced,
    "every_second": every_second,
    "sliced_channels_last": sliced_channels_last,
    "transposed": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "frames_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed_axes": lambda x: x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    "unaligned": unaligned,
}


@dataclass
class Problem:
    x: Tensor  # [B, C, T, H, W], any strides
    form: Form
    valid_size: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, x=self.x.to(dtype))


def problem(
    x: Tensor, levels: Sequence, mode: str = "max", output: str = "flat", ndhwc: bool = False,
    valid_size: Tensor | None = None,
) -> Problem:  # fmt: skip
    inner = x.stride(1) < x.stride(4)
    form = Form(parse(levels, output), mode, output == "flat", ndhwc, inner, False)
    return Problem(x, form, valid_size)


def gradients(p: Problem, missing: bool) -> list[Tensor | None]:
    """Of the results; with ``missing``, not of every second map."""
    B, C, *sizes = p.x.shape
    generator = torch.Generator().manual_seed(1)
    grads: list[Tensor | None] = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(p.x.dtype)
        for s in layout.shapes(p.form, B, C, sizes)
    ]
    if missing and not p.form.flat:
        grads[1::2] = [None] * len(grads[1::2])
    return grads


def check(p: Problem, missing: bool = False) -> None:
    """Forward with and without tapes, and backward, into memory full of NaN."""
    with poisoned():
        ours = native.forward(p.x, p.valid_size, p.form, True)
        plain_only = native.forward(p.x, p.valid_size, p.form, False)
    plain = definition.forward(p.x, p.valid_size, p.form, True)
    assert plain_only.indices is None
    for a, b in zip(ours.results, plain_only.results, strict=True):
        assert torch.equal(bits(a), bits(b)), "the tapes change the results"
    if p.form.has_max:
        assert torch.equal(ours.indices, plain.indices)
        assert ours.indices.stride() == plain.indices.stride()
    compare_results(p, ours.results, plain.results)
    grads = gradients(p, missing)
    arguments = (plain.indices, plain.codes, p.valid_size, p.form, p.x.shape)
    with poisoned():
        dx = native.backward(grads, *arguments)
    memory = torch.channels_last_3d if p.form.inner else torch.contiguous_format
    assert dx.is_contiguous(memory_format=memory)
    wide = [None if g is None else g.double() for g in grads]
    truth = definition.backward(wide, *arguments)
    assert_within_2x(dx, definition.backward(grads, *arguments), truth, name="dx")


def compare_results(p: Problem, ours: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Maxima bit for bit (NaN is NaN), means by the 2x rule."""
    B, C, *sizes = p.x.shape
    assert [t.shape for t in ours] == [t.shape for t in plain]
    assert all(t.is_contiguous() for t in ours)
    wide = p.to(torch.float64)
    truth = definition.forward(wide.x, wide.valid_size, wide.form, False).results
    sides = [layout.parts(p.form, side, C, sizes) for side in (ours, plain, truth)]
    for parts in zip(*sides, strict=True):
        a, b, c = (elements(part, B, C, p.form, sizes) for part in parts)
        if parts[0].kind == "max":
            assert torch.equal(bits(a), bits(b)), f"maxima of level {parts[0].level}"
        else:
            assert_within_2x(a, b, c, name=f"means of level {parts[0].level}")


def elements(part: layout.Part, B: int, C: int, form: Form, sizes: Sequence[int]) -> Tensor:
    count = layout.volume(layout.bins(form.levels[part.level], sizes))
    strides = (part.batch_stride, part.channel_stride, part.bin_stride)
    return part.tensor.as_strided((B, C, count), strides, part.offset)


def bits(t: Tensor) -> Tensor:
    """What ``torch.equal`` can compare: every NaN the same one; -0 and 0 differ."""
    t = torch.where(t.isnan(), torch.full_like(t, NAN), t)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def values(kind: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=generator).double()
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        return torch.where(x > 0, 0.0, -0.0).double()
    odd = torch.rand(shape, generator=generator)
    if kind == "nan":
        x = torch.where(odd < 0.2, NAN, x)
    if kind == "infinite":
        x = torch.where(odd < 0.7, -INF, torch.where(odd > 0.95, INF, x))
    return x


def random_problem(number: int) -> tuple[Problem, bool]:
    """Sizes, levels, layout, values and everything else from a seed."""
    choose = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    dtype, mode = choose.choice(DTYPES), choose.choice(MODES)
    output = choose.choice(("flat", "maps"))
    B, C = choose.choice((1, 1, 2, 3)), choose.choice((1, 2, 3, 4, 5, 8, 9, 16, 17, 20, 33))
    sizes = [choose.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 17)) for _ in range(3)]

    def bins(axis: int) -> int | None:
        if output == "maps" and choose.random() < 0.2:
            return None
        return choose.choice((1, 1, 2, 2, 3, 4, 6, 8, sizes[axis], sizes[axis] + 2))

    levels: list = []
    for _ in range(choose.randint(1, 4)):
        cube = choose.random() < 0.5
        levels.append(choose.choice((1, 2, 3, 4, 6, 8)) if cube else tuple(map(bins, range(3))))
    valid = None
    if choose.random() < 0.4:
        valid = torch.tensor([[choose.randint(-1, n + 1) for n in sizes] for _ in range(B)])
        valid = valid.to(choose.choice((torch.int32, torch.int64)))
    kinds = ("normal", "normal", "ties", "zeros", "nan", "infinite")
    x = values(choose.choice(kinds), (B, C, *sizes), generator).to(dtype)
    if valid is not None:
        for b, region in enumerate(valid.tolist()):
            outside = torch.ones(sizes, dtype=torch.bool)
            t, h, w = (max(v, 0) for v in region)
            outside[:t, :h, :w] = False
            x[b, :, outside] = NAN
    if choose.random() < 0.1:
        x = (
            x[:, :, :1].expand(B, C, *sizes)
            if choose.random() < 0.5
            else x[..., :1].expand(x.shape)
        )
    else:
        x = LAYOUTS[choose.choice(list(LAYOUTS))](x)
    return problem(x, levels, mode, output, choose.random() < 0.5, valid), choose.random() < 0.3


def check_random(first: int, last: int) -> None:
    for number in range(first, last):
        p, missing = random_problem(number)
        try:
            check(p, missing)
        except Exception as error:
            about = f"case {number}: {p.form} x {p.x.dtype} {tuple(p.x.shape)} {p.x.stride()}"
            raise AssertionError(f"{about} valid_size {p.valid_size}: {error}") from error


@pytest.mark.parametrize("part", range(8))
def test_random_problems(part):
    check_random(40 * part, 40 * part + 40)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode, name):
    """Channels around a vector's lanes; levels of which some follow from others."""
    generator = torch.Generator().manual_seed(3)
    for C in (5, 16, 18):
        x = values("ties", (2, C, 4, 6, 9), generator)
        for dtype in DTYPES:
            for ndhwc in (False, True):
                check(
                    problem(LAYOUTS[name](x.to(dtype)), (1, 3, 2, (4, 6, 4)), mode, "maps", ndhwc)
                )
            check(problem(LAYOUTS[name](x.to(dtype)), (1, 2, 4), mode))


def test_expanded():
    x = torch.randn(2, 7, 3, 1, 5)
    for view in (
        x.expand(2, 7, 3, 4, 5),
        x[:, :1].expand(2, 20, 3, 1, 5),
        x[:1, :1, :1, :, :1].expand(3, 4, 5, 6, 7),
    ):
        for mode in MODES:
            check(problem(view, (2, 1, 3), mode))


@pytest.mark.parametrize("valid", (False, True))
def test_whole_axes_and_more_bins_than_elements(valid):
    generator = torch.Generator().manual_seed(4)
    levels = (
        (None, 1, 2),
        (None, 3, 4),
        (None, None, None),
        (1, 9, None),
        (8, 2, 11),
        (4, 2, 11),
        1,
    )
    for kind in ("ties", "nan", "infinite"):
        x = values(kind, (3, 6, 5, 3, 4), generator).float()
        regions = torch.tensor([[3, 3, 2], [0, 1, 1], [7, -1, 4]]) if valid else None
        for name in ("contiguous", "channels_last"):
            for mode in MODES:
                check(
                    problem(LAYOUTS[name](x), levels, mode, "maps", valid_size=regions),
                    missing=valid,
                )


def test_large_planes():
    """Rows longer than a slab, and slabs that end within a frame."""
    generator = torch.Generator().manual_seed(5)
    for shape in ((1, 3, 1, 2, 700), (1, 17, 2, 40, 30)):
        for name in ("contiguous", "channels_last"):
            for mode in MODES:
                x = LAYOUTS[name](values("normal", shape, generator).float())
                check(problem(x, (1, 2, 4, 8), mode))


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_pyramid_pool_cpu as tests
from sora_kernels import _native
found = _native.module().pyramid_pool_cpu_isa()
assert found == sys.argv[2], found
tests.check_random(1000, 1040)
"""


def test_each_instruction_set(on_other_isa):
    """The best one is every other test's."""
    on_other_isa(_native.module().pyramid_pool_cpu_isa(), PROGRAM)


@pytest.mark.parametrize("name", ("contiguous", "channels_last"))
@pytest.mark.parametrize("mode", MODES)
def test_threads_agree(mode, name):
    generator = torch.Generator().manual_seed(6)
    x = LAYOUTS[name](values("normal", (3, 40, 6, 10, 9), generator).float())
    for valid_size in (None, torch.tensor([[6, 10, 9], [2, 3, 9], [5, 7, 1]])):
        p = problem(x, (1, 2, (3, 4, 5), 8), mode, valid_size=valid_size)
        found = []
        for threads in (1, 2, 3):
            was = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                out = native.forward(p.x, p.valid_size, p.form, True)
                dx = native.backward(
                    gradients(p, False), out.indices, None, p.valid_size, p.form, p.x.shape
                )
            finally:
                torch.set_num_threads(was)
            found.append([*out.results, *([] if out.indices is None else [out.indices]), dx])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_all_gradients_missing_but_one():
    x = torch.randn(2, 5, 3, 4, 4)
    p = problem(x, (1, 2, 3), "maxavg", "maps")
    out = definition.forward(x, None, p.form, True)
    for kept in range(3):
        grads = [g if k == kept else None for k, g in enumerate(gradients(p, False))]
        arguments = (out.indices, out.codes, None, p.form, x.shape)
        dx, plain = native.backward(grads, *arguments), definition.backward(grads, *arguments)
        truth = definition.backward([None if g is None else g.double() for g in grads], *arguments)
        assert_within_2x(dx, plain, truth, name=f"dx of level {kept} alone")


def test_the_gil_is_released(monkeypatch):
    """Another Python thread gets on while one long call runs."""
    module, during = _native.module(), {}
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.0005)
            ticks += 1

    class Counting:
        def __getattr__(self, name):
            def call(*args):
                before = ticks
                getattr(module, name)(*args)
                during[name] = ticks - before

            return call

    p = problem(torch.zeros(1).expand(1, 256, 64, 40, 40), ((16, 20, 20),), "maxavg")
    monkeypatch.setattr(_native, "module", Counting)
    other = threading.Thread(target=tick)
    other.start()
    try:
        out = native.forward(p.x, None, p.form, True)
        native.backward(out.results, out.indices, out.codes, None, p.form, p.x.shape)
    finally:
        done.set()
        other.join()
    assert sorted(during) == ["pyramid_pool_backward_cpu", "pyramid_pool_forward_cpu"]
    assert min(during.values()) > 0


def test_errors():
    x = torch.randn(2, 3, 4, 4, 4)
    p = problem(x, (1, 2))
    with pytest.raises(ValueError, match="take fp32, fp64 and bf16, got torch.float16"):
        native.forward(x.half(), None, p.form, False)
    with pytest.raises(ValueError, match="keep indices, not codes"):
        native.forward(x, None, p.form._replace(codes=True), True)
    with pytest.raises(ValueError, match="run on the CPU, got meta"):
        native.forward(x.to("meta"), None, p.form, True)
    out = native.forward(x, None, p.form, True)
    g = torch.randn_like(out.results[0])
    shape = x.shape
    with pytest.raises(
        ValueError, match=r"expected a gradient \(2, 27\) torch.float32, got \(2, 26\)"
    ):
        native.backward([g[:, 1:]], out.indices, None, None, p.form, shape)
    for wrong, got in ((None, "None"), (out.indices.long(), "int64"), (out.indices[:, :, 1:], "8")):
        with pytest.raises(ValueError, match=rf"expected int32 indices \(2, 3, 9\), got .*{got}"):
            native.backward([g], wrong, None, None, p.form, shape)
    module, pool = _native.module(), (2, 3, 4, 4, 4, 0, 0, 0, 0, 0)
    with pytest.raises(
        RuntimeError, match="pyramid_pool_forward_cpu: no kernel for this element type"
    ):
        module.pyramid_pool_forward_cpu(2, pool, 0, (0,) * 5, [], 0, 1)
    with pytest.raises(
        RuntimeError, match="pyramid_pool_backward_cpu: no kernel for this element type"
    ):
        module.pyramid_pool_backward_cpu(2, pool, [], 0, 0, 1)
