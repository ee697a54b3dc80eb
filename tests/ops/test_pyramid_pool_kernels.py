"""pyramid_pool3d's Triton kernels themselves, in the interpreter: forms, tiles, tapes, order, offsets, keys."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import _tuning
from sora_kernels.ops.pyramid_pool import definition, tapes
from sora_kernels.ops.pyramid_pool.layout import Form
from sora_kernels.ops.pyramid_pool.levels import parse
from sora_kernels.testing import assert_within_2x, poisoned, shuffled_programs, tolerance

pytest.importorskip("triton", exc_type=ImportError)

from triton.runtime import interpreter  # noqa: E402

from sora_kernels.ops.pyramid_pool import launches, plans  # noqa: E402

pytestmark = pytest.mark.triton

LEVELS: dict[str, Any] = {
    "nested": (1, 2, 4),
    "overlapping": (1, (2, 3, 2), (3, 5, 4)),
    "more bins than elements": (3, (1, 9, 2), (2, 18, 4)),
    "whole axes": ((None, 1, 1), (None, 2, 2), (2, None, 4), (1, None, 2)),
}
SHAPE = (2, 3, 3, 4, 5)
VALID = torch.tensor([[2, 4, 3], [0, 9, 1]])
SMALL = {"TILE": 32, "BLOCK_C": 2, "num_warps": 4}  # several tiles a level, several lanes a bin


@pytest.fixture(params=["one launch", "two launches"])
def launched(request, monkeypatch) -> Iterator[str]:
    """Either form of the forward pass."""
    monkeypatch.setattr(plans, "NEST_FROM", 0 if request.param == "two launches" else 1 << 60)
    launches.forget_plans()
    yield request.param
    launches.forget_plans()


@pytest.fixture
def small_tiles(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(_tuning, "config", lambda *args: SMALL)
    launches.forget_plans()
    yield
    launches.forget_plans()


def form_of(
    levels: Any, mode: str, *, inner: bool = False, codes: bool = True, maps: bool = False
) -> Form:
    parsed = parse(levels, "maps")
    whole = any(None in level for level in levels if not isinstance(level, int))
    return Form(parsed, mode, not (maps or whole), inner, inner, codes and mode != "avg")


def few_values(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Many ties; sums that every dtype holds exactly."""
    return torch.randint(-3, 4, tuple(shape)).to(dtype)


def in_memory(x: Tensor, form: Form) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d) if form.inner else x


def run(
    backend: Any, x: Tensor, form: Form, valid: Tensor | None, grads: list[Tensor] | None = None
):
    """Results, indices, codes, dx."""
    found = backend.forward(in_memory(x, form), valid, form, True)
    if grads is None:
        torch.manual_seed(1)
        grads = [few_values(r.shape, r.dtype) for r in found.results]
    dx = backend.backward(grads, found.indices, found.codes, valid, form, x.shape)
    return (*found.results, *(t for t in found[1:] if t is not None), dx)


def assert_equal(x: Tensor, form: Form, valid: Tensor | None = None) -> None:
    ours, want = run(launches, x, form, valid), run(definition, x, form, valid)
    assert len(ours) == len(want)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)), number


@pytest.mark.parametrize(
    ("inner", "valid"), [(False, VALID), (True, None)], ids=["NCDHW, regions", "NDHWC"]
)
@pytest.mark.parametrize("levels", LEVELS)
def test_maxima_places_and_gradients(launched, levels, valid, inner):
    """Bitwise: every sum of these values is exact."""
    assert_equal(few_values(SHAPE), form_of(LEVELS[levels], "max", inner=inner), valid)


@pytest.mark.parametrize("inner", [False, True], ids=["NCDHW", "NDHWC"])
def test_tiles_do_not_show(launched, small_tiles, inner):
    assert_equal(few_values(SHAPE), form_of(LEVELS["nested"], "max", inner=inner))


@pytest.mark.parametrize("inner", [False, True], ids=["NCDHW", "NDHWC"])
def test_no_overflow(launched, checked_overflow, inner):
    """As the test above, with every integer operation checked."""
    assert_equal(few_values(SHAPE), form_of(LEVELS["overlapping"], "max", inner=inner), VALID)


@pytest.mark.parametrize("mode", ["max", "avg", "maxavg"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, mode):
    inner = dtype in (torch.bfloat16, torch.float64)
    form = form_of(LEVELS["overlapping"], mode, inner=inner, maps=dtype == torch.float16)
    x = torch.randn(SHAPE).to(dtype)
    grads = [
        torch.randn(r.shape).to(dtype) for r in definition.forward(x, None, form, False).results
    ]
    ours = run(launches, x, form, None, grads)
    plain = run(definition, x, form, None, grads)
    truth = run(definition, x.double(), form, None, [g.double() for g in grads])
    for a, b, c in zip(ours, plain, truth, strict=True):
        if a.is_floating_point():
            assert_within_2x(a, b, c)
        else:
            assert torch.equal(a, b)
    if mode == "max":
        assert torch.equal(ours[0], plain[0])


@pytest.mark.parametrize("mode", ["avg", "maxavg"])
@pytest.mark.parametrize("levels", ["more bins than elements", "whole axes"])
def test_means(levels, mode):
    form = form_of(LEVELS[levels], mode, inner=mode == "avg")
    x = few_values(SHAPE)
    ours, want = run(launches, x, form, VALID), run(definition, x, form, VALID)
    truth = run(definition, x.double(), form, VALID)
    for a, b, c in zip(ours, want, truth, strict=True):
        if a.is_floating_point():
            assert_within_2x(a, b, c)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "values", [(float("nan"), 1.0), (float("-inf"), float("nan"), 2.0), (0.0,)]
)
def test_ties_nan_and_infinity(launched, small_tiles, values):
    x = torch.tensor(values)[torch.randint(0, len(values), (1, 4, 2, 4, 5))]
    x[0, 0] = float("-inf")
    assert_equal(x, form_of((1, 2, (2, 4, 2)), "max"))


def test_what_lies_beyond_the_region_does_not_matter(launched):
    x, form = few_values(SHAPE), form_of(LEVELS["nested"], "max")
    want = run(launches, x, form, VALID)
    beyond = x.clone()
    beyond[0, :, 2:], beyond[0, :, :, :, 3:], beyond[1] = float("nan"), float("nan"), float("nan")
    for a, b in zip(run(launches, beyond, form, VALID.int()), want, strict=True):
        assert torch.equal(a, b)


def test_values_alone_are_the_same(launched):
    """Without tapes, maxima take another way."""
    x = torch.randn(SHAPE)
    x[0, 1, 2, 3, 4] = float("nan")
    form = form_of(LEVELS["nested"], "max")
    plain = launches.forward(x, None, form, False)
    assert plain.indices is None and plain.codes is None
    want = definition.forward(x, None, form, False).results[0]
    assert torch.equal(plain.results[0].nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(plain.results[0].isnan(), want.isnan())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, :, 1:, ::2],
        lambda x: x.expand(2, *x.shape[1:]),
        lambda x: x.transpose(2, 4),
        lambda x: x.permute(0, 4, 1, 2, 3),
    ],
    ids=["sliced", "expanded", "transposed", "channels inner"],
)
def test_any_strides(view):
    x = view(few_values((1, 4, 3, 4, 6)))
    inner = x.stride(1) < x.stride(4)
    form = form_of((1, (1, 2, 3)), "max", inner=inner)
    found = launches.forward(x, None, form, True)
    want = definition.forward(x, None, form, True)
    assert torch.equal(found.results[0], want.results[0])
    assert torch.equal(found.indices, want.indices) and torch.equal(found.codes, want.codes)


def test_strides_in_units():
    form = form_of((1, 2), "max", inner=True)
    x = in_memory(few_values((2, 16, 2, 3, 2)), form)
    step = plans.plan_forward("default", form, tuple(x.shape), x.stride(), x.dtype, True)[0]
    assert step.constants["UNIT"] == plans.UNIT
    assert_equal(x, form)
    odd = in_memory(few_values((2, 17, 2, 3, 2)), form)[:, :16]
    assert_equal(odd, form)


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels launched inside."""
    launched: list[str] = []
    call = interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counting
    try:
        yield launched
    finally:
        interpreter.GridExecutor.__call__ = call


@pytest.mark.parametrize("mode", ["max", "avg", "maxavg"])
@pytest.mark.parametrize("codes", [False, True])
def test_launches(launched, mode, codes):
    form = form_of(LEVELS["nested"], mode, codes=codes)
    x = few_values((1, 2, 2, 3, 4))
    with counted() as names:
        found = launches.forward(x, None, form, True)
    nested = mode == "max" and launched == "two launches"
    assert names == [plans.FORWARD, plans.NESTED][: 1 + nested]
    with counted() as names:
        launches.backward(found.results, found.indices, found.codes, None, form, x.shape)
    assert names == [plans.PUSH, plans.GATHER][not form.codes :]


@pytest.mark.parametrize("inner", [False, True], ids=["NCDHW", "NDHWC"])
def test_every_element_is_written_in_any_program_order(launched, small_tiles, inner):
    form = form_of((1, 2, (2, 4, 2)), "maxavg" if launched == "one launch" else "max", inner=inner)
    x = torch.randn(1, 3, 2, 3, 5)
    first = run(launches, x, form, None)
    with poisoned(), shuffled_programs(0):
        again = run(launches, x, form, None)
    for a, b in zip(first, again, strict=True):
        assert not torch.isnan(b).any(), "an element was not written"
        assert torch.equal(a, b), "not bitwise repeatable"


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_and_indices_give_the_same_gradient(levels):
    """Bitwise, where sums are exact: the same terms, in another order."""
    x = few_values(SHAPE)
    by_code, by_index = (
        form_of(LEVELS[levels], "max", codes=codes, inner=True) for codes in (True, False)
    )
    coded, indexed = (run(launches, x, form, None) for form in (by_code, by_index))
    assert coded[-2].numel() > 0 and torch.equal(coded[-1], indexed[-1])
    for a, b in zip(
        tapes.unpack(*coded[-3:-1], by_code, x.shape[2:]),
        tapes.unpack(*indexed[-3:-1], by_index, x.shape[2:]),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("missing", [(0,), (2,), (0, 1)], ids=str)
def test_missing_gradients_are_skipped(missing):
    x, form = few_values(SHAPE), form_of(LEVELS["nested"], "maxavg", maps=True)
    found = launches.forward(x, None, form, True)
    grads = [
        None if k in missing else few_values(r.shape).mul(8) for k, r in enumerate(found.results)
    ]
    dx, want = (
        backend.backward(grads, found.indices, found.codes, None, form, x.shape)
        for backend in (launches, definition)
    )
    assert_within_2x(dx, want, want)


class Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, form, valid):
        found = launches.forward(x, valid, form, True)
        ctx.kept = found.indices, found.codes, valid, form, x.shape
        return tuple(found.results)

    @staticmethod
    def backward(ctx, *grads):
        given = [None if g is None else g.contiguous() for g in grads]
        return launches.backward(given, *ctx.kept), None, None


@pytest.mark.parametrize(
    ("mode", "fast"), [("max", True), ("avg", True), ("maxavg", True), ("maxavg", False)]
)
def test_gradcheck(mode, fast):
    levels = (1, (1, 2, 2), (2, 3, 2)) if fast else (1, (1, 1, 2))
    form = form_of(levels, mode, maps=fast)
    shape = (1, 2, 2, 4, 3) if fast else (1, 1, 1, 2, 3)
    valid = VALID[:1] if fast else None
    x = torch.randperm(torch.Size(shape).numel()).double().view(shape).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: Pool.apply(t, form, valid), x, fast_mode=fast, atol=tolerance("gradcheck_fp64")
    )


def test_offsets_are_64_bit_where_a_sample_is_large(launched, monkeypatch):
    form = form_of(LEVELS["nested"], "max")
    x = few_values(SHAPE)
    want = run(launches, x, form, None)
    monkeypatch.setattr(plans, "WIDEST", 0)
    launches.forget_plans()
    for a, b in zip(run(launches, x, form, None), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "strides", "levels", "wide"),
    [
        ((4, 512, 64, 128, 128), None, (1, 2), False),
        ((1, 512, 64, 256, 256), None, (1, 2), True),  # elements of a sample
        ((1, 2, 4, 4, 4), (0, 1, 2**30, 4, 2), (1,), True),  # a stride
        ((1, 1, 1, 1, 2**20), None, ((1, 1, 4096),), True),  # bins times elements
        ((2, 512, 4, 4, 4), None, (180,), True),  # outputs of a sample
    ],
)
def test_which_samples_are_large(shape, strides, levels, wide):
    form = form_of(levels, "max")
    strides = strides or torch.empty(shape, device="meta").stride()
    for step in plans.plan_forward("default", form, shape, strides, torch.float32, True):
        assert ("int64" in str(step.constants["INDEX"])) == wide


def test_samples_do_not_end_at_32_bits():
    """A sample's base passes 2^31 elements where its own offsets do not."""
    x = few_values((1, 2, 2, 2, 3)).expand(3, -1, -1, -1, -1)
    far = x.as_strided(x.shape, (0, *x.stride()[1:]))
    form = form_of((1, 2), "max")
    _, (_, *numbers), constants = plans.plan_forward(
        "default", form, tuple(far.shape), (2**33, *x.stride()[1:]), x.dtype, True
    )[0]
    assert 2**33 in numbers and "int32" in str(constants["INDEX"])
    assert_equal(far, form)


SWEEP = """
import json, os, torch
from sora_kernels import _launches, audit
from sora_kernels.ops.pyramid_pool import launches, layout
from sora_kernels.ops.pyramid_pool.layout import Form
from triton.runtime.jit import JITFunction

keys = {}

def compile(self, key, *args, **kwargs):
    keys.setdefault(self.__name__, set()).add(key)

JITFunction._do_compile = compile
with audit._offline("sm_90"), launches.as_on("sm90"):
    for sizes in ((8, 14, 14), (4, 7, 7), (16, 28, 28), (5, 9, 11), (32, 56, 56), (1, 1, 3)):
        for batch in (1, 2, 8):
            for channels in (64, 96, 2048):
                x = torch.empty(batch, channels, *sizes, device="meta")
                x = x.contiguous(memory_format=torch.channels_last_3d if INNER else torch.contiguous_format)
                form = Form(((1, 1, 1), (2, 2, 2), (4, 4, 4)), "max", FLAT, INNER, INNER, True)
                with _launches.record(launch=False) as records:
                    found = launches.forward(x, None, form, True)
                    launches.backward(found.results, found.indices, found.codes, None, form, x.shape)
                for r in records:
                    r.kernel.run(*r.args, grid=r.grid, warmup=True, **r.kwargs)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


@pytest.mark.parametrize("inner", [False, True], ids=["NCDHW", "NDHWC"])
def test_a_sweep_of_sizes_takes_few_compilations(inner):
    """Sizes are run-time arguments. What makes a specialisation: one launch or two (the forward kernel's levels), and
    a volume that is or is not a multiple of 16 (the backward kernel's)."""
    source = f"INNER, FLAT = {inner}, {not inner}\n{SWEEP}"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {plans.FORWARD: 2, plans.NESTED: 1, plans.PUSH: 1, plans.GATHER: 2}


def test_every_tuned_kernel_is_launched_in_every_layout():
    """What the shipped file has rows for is what ``launches`` says it looks up."""
    shape = {"batch": 8, "input": [512, 8, 14, 14], "levels": [1, 2, 4, 8]}
    found = {
        (kernel, launch.key["layout"])
        for launch in launches.launches("layer", shape, device="meta")
        for kernel in launch.kernels
    }
    shipped = _tuning.rows(plans.OP, "default")
    assert found == {
        (kernel, row["match"]["layout"]) for kernel, rows in shipped.items() for row in rows
    }


def test_launchers_look_again_before_taking_pointers():
    x, form = few_values(SHAPE), form_of(LEVELS["nested"], "max")
    with pytest.raises(ValueError, match=r"x: expected \[B, C, T, H, W\]"):
        launches.forward(x[0], None, form, True)
    with pytest.raises(ValueError, match=r"valid_size: expected int32 or int64 \(2, 3\)"):
        launches.forward(x, VALID[:1], form, True)
    found = launches.forward(x, None, form, True)
    tail = None, form, x.shape
    with pytest.raises(ValueError, match="grads: expected contiguous torch.float32"):
        launches.backward([found.results[0].t()], found.indices, found.codes, *tail)
    with pytest.raises(ValueError, match="indices: expected contiguous torch.int32"):
        launches.backward(found.results, found.indices.long(), found.codes, *tail)
    with pytest.raises(ValueError, match="codes: expected a tape"):
        launches.backward(found.results, found.indices, None, *tail)
