"""``pyramid_pool3d`` by every backend: values, gradients, layouts, regions, ties, transforms, errors."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sora_kernels as sk
from sora_kernels import BackendError
from sora_kernels.ops.pyramid_pool import levels as plans
from sora_kernels.ops.pyramid_pool import reference, tapes
from sora_kernels.ops.pyramid_pool.decomposition import DECOMPOSITIONS
from sora_kernels.ops.pyramid_pool.layout import Form
from sora_kernels.testing import assert_close, assert_within_2x, poisoned, tolerance

BACKENDS = [
    "reference",
    "torch",
    pytest.param("native", marks=pytest.mark.native),
]  # Triton's kernels, slow in the interpreter: test_pyramid_pool_kernels.py
MODES = ("max", "avg", "maxavg")
NESTED, OVERLAPPING, MORE_THAN_THERE_ARE = (
    (1, 2, 4),
    ((1, 1, 1), (2, 3, 2), (3, 5, 4)),
    (5, (1, 9, 2)),
)
LEVELS = [
    pytest.param(NESTED, id="nested"),
    pytest.param(OVERLAPPING, id="overlapping"),
    pytest.param(MORE_THAN_THERE_ARE, id="more bins than elements"),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def skip_fp16(backend: str, dtype: torch.dtype) -> None:
    if backend == "native" and dtype == torch.float16:
        x = torch.zeros(1, 1, 1, 1, 1, dtype=dtype)
        rows = {row.backend: row for row in sk.explain("pyramid_pool3d", x).rows}
        if not rows["native"].usable:
            pytest.skip(rows["native"].why)


def by_aten(x: Tensor, levels: Any, mode: str) -> Tensor:
    """What a user writes today."""
    pools = {"max": F.adaptive_max_pool3d, "avg": F.adaptive_avg_pool3d}
    kinds = ("max", "avg") if mode == "maxavg" else (mode,)
    return torch.cat([pools[k](x, level).flatten(1) for level in levels for k in kinds], 1)


def run(x: Tensor, call: Any, last: bool = False) -> dict[str, Tensor]:
    """Outputs by number and dx, for fixed output gradients; of maps that have their channels ``last``."""
    leaf = x.detach().requires_grad_()
    found = call(leaf)
    found = [found] if isinstance(found, Tensor) else found
    generator = torch.Generator().manual_seed(3)
    grads = []
    for t in found:
        first = t.movedim(-1, 1) if last else t
        grad = torch.randn(first.shape, generator=generator).to(t.dtype)
        grads.append(grad.movedim(1, -1) if last else grad)
    (dx,) = torch.autograd.grad(found, leaf, grads)
    return {f"output {k}": t.detach() for k, t in enumerate(found)} | {"dx": dx}


def assert_2x(ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name in truth:
        assert_within_2x(ours[name], plain[name], truth[name], name=name)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_as_atens_pools(backend, dtype, mode, levels):
    skip_fp16(backend, dtype)
    x = torch.randn(2, 5, 4, 7, 6).to(dtype)
    with poisoned():
        ours = run(x, lambda t: sk.pyramid_pool3d(t, levels, mode=mode, backend=backend))
    plain, truth = (run(t, lambda t: by_aten(t, levels, mode)) for t in (x, x.double()))
    if mode == "max":
        assert torch.equal(ours["output 0"], plain["output 0"])
    assert_2x(ours, plain, truth)


@pytest.mark.parametrize("levels", [NESTED, OVERLAPPING], ids=["nested", "overlapping"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_by_matrix_product(dtype, levels):
    x = torch.randn(2, 5, 4, 7, 6).to(dtype)
    ours = run(x, lambda t: sk.pyramid_pool3d(t, levels, mode="avg", backend="gemm"))
    plain, truth = (run(t, lambda t: by_aten(t, levels, "avg")) for t in (x, x.double()))
    assert_2x(ours, plain, truth)


@pytest.mark.triton
@pytest.mark.parametrize("mode", MODES)
def test_by_triton(mode):
    x = torch.randn(1, 2, 2, 3, 4)
    ours = run(x, lambda t: sk.pyramid_pool3d(t, (1, 2), mode=mode, backend="triton"))
    plain, truth = (run(t, lambda t: by_aten(t, (1, 2), mode)) for t in (x, x.double()))
    assert_2x(ours, plain, truth)


FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "sliced": lambda x: x.repeat(1, 2, 1, 2, 2)[:, ::2, :, : x.shape[3], 1::2],
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "transposed": lambda x: x.contiguous().transpose(2, 4).contiguous().transpose(2, 4),
}


@pytest.mark.parametrize("data_format", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_any_strides_and_both_data_formats(backend, mode, layout, data_format):
    x = FORMATS[layout](torch.randn(2, 6, 4, 5, 8))
    levels = ((2, 2, 4), (None, 1, 2), 1)
    want = run(x, lambda t: reference.maps(t, plans.parse(levels, "maps"), mode, None))
    last = data_format == "NDHWC"
    own = x.movedim(1, -1) if last else x
    options: dict[str, Any] = {"mode": mode, "data_format": data_format, "backend": backend}
    with poisoned():
        ours = run(own, lambda t: sk.pyramid_pool3d(t, levels, output="maps", **options), last)
    for name, t in want.items():
        back = ours[name].movedim(-1, 1) if last else ours[name]
        assert ours[name].is_contiguous() or name == "dx"
        assert_close(back, t, "composition_fp32", name=name)
    dx = ours["dx"].movedim(-1, 1) if last else ours["dx"]
    if layout in ("contiguous", "channels_last_3d"):
        assert dx.stride() == x.stride()
    flat = sk.pyramid_pool3d(own, (1, (2, 5, 3)), **options)
    assert_close(flat, by_aten(x, (1, (2, 5, 3)), mode), "composition_fp32")


def test_flat_is_the_maps_side_by_side(backend):
    x = torch.randn(2, 3, 4, 5, 6)
    for mode in MODES:
        flat = sk.pyramid_pool3d(x, NESTED, mode=mode, backend=backend)
        maps = sk.pyramid_pool3d(x, NESTED, mode=mode, output="maps", backend=backend)
        assert torch.equal(flat, torch.cat([m.flatten(1) for m in maps], 1))


def test_whole_axes(backend):
    x = torch.randn(2, 3, 5, 4, 6)
    levels = ((None, 2, 3), (5, None, None), (None, None, None))
    maps = sk.pyramid_pool3d(x, levels, output="maps", backend=backend)
    sizes = ((5, 2, 3), (5, 4, 6), (5, 4, 6))
    for found, size in zip(maps, sizes, strict=True):
        assert torch.equal(found, F.adaptive_max_pool3d(x, size))


@pytest.mark.parametrize("kind", ["ties", "constant", "nan", "infinite", "negative infinity"])
def test_ties_nan_and_infinity_go_where_torch_puts_them(backend, kind):
    x = {
        "ties": torch.randint(-2, 2, (2, 5, 4, 7, 6)).float(),
        "constant": torch.full((2, 5, 4, 7, 6), 3.0),
        "nan": torch.where(torch.rand(2, 5, 4, 7, 6) < 0.2, torch.nan, torch.randn(2, 5, 4, 7, 6)),
        "infinite": torch.randn(2, 5, 4, 7, 6).bernoulli(0.2).log(),
        "negative infinity": torch.full((2, 5, 4, 7, 6), -torch.inf),
    }[kind]
    for levels in (NESTED, OVERLAPPING, MORE_THAN_THERE_ARE):
        ours = run(x, lambda t: sk.pyramid_pool3d(t, levels, backend=backend))  # noqa: B023
        want = run(x, lambda t: by_aten(t, levels, "max"))  # noqa: B023
        assert_close(ours["dx"], want["dx"], "composition_fp32")
        assert torch.equal(ours["dx"] != 0, want["dx"] != 0)
        both_nan = ours["output 0"].isnan() & want["output 0"].isnan()
        assert torch.all((ours["output 0"] == want["output 0"]) | both_nan)


def places_by(backend: str, x: Tensor, levels: Any, codes: bool = False) -> list[Tensor]:
    form = Form(plans.parse(levels, "maps"), "max", False, False, False, codes)
    arguments = [o for level in form.levels for o in level], *form[1:], backend
    _, indices, found = torch.ops.sora_kernels.pyramid_pool3d_fwd(x, None, *arguments)
    return tapes.unpack(indices, found, form, x.shape[2:])


def test_places_are_torchs(backend):
    x = torch.randint(-4, 4, (2, 5, 4, 7, 6)).float()
    x[0, 1, :2, 3:5] = torch.nan
    for levels in (NESTED, OVERLAPPING, MORE_THAN_THERE_ARE):
        for level, at in zip(levels, places_by(backend, x, levels), strict=True):
            assert torch.equal(at, F.adaptive_max_pool3d(x, level, return_indices=True)[1])


def test_child_codes_tell_the_same_places():
    x = torch.randint(-4, 4, (2, 5, 4, 7, 6)).float()
    x[0, 1, :2, 3:5] = torch.nan
    for levels in (NESTED, (1, 2, 3, 6), ((None, 1, 1), (None, 3, 3), (4, 3, 3))):
        plain = places_by("reference", x, levels)
        for at, want in zip(places_by("reference", x, levels, True), plain, strict=True):
            assert torch.equal(at, want)


def test_a_coarse_bin_is_the_union_of_its_fine_ones():
    """360 random cases: maxima and places of nested levels follow from the finer level's, with ties and NaN."""
    generator = torch.Generator().manual_seed(5)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    derived = 0
    for case in range(360):
        sizes = [pick(1, 11) for _ in range(3)]
        coarse = tuple(pick(1, 3) for _ in range(3))
        fine = tuple(o * pick(1, 4) for o in coarse)
        x = torch.randint(-3, 3, (1, 2, *sizes), generator=generator).double()
        if case % 3 == 0:
            x[torch.rand(x.shape, generator=generator) < 0.1] = torch.nan
        source = plans.plan((coarse, fine), sizes).source
        assert source == ((1, -1) if fine != coarse else (-1, 0))
        form = Form((coarse, fine), "max", False, False, False, True)
        places = [F.adaptive_max_pool3d(x, o, return_indices=True)[1] for o in (coarse, fine)]
        derived += fine != coarse
        # A code exists for every coarse bin, and leads back to the same place.
        indices, codes = tapes.pack(places, form, x, sizes)
        for at, want in zip(tapes.unpack(indices, codes, form, sizes), places, strict=True):
            assert torch.equal(at, want)
    assert derived > 300


VALID = torch.tensor([[2, 7, 3], [4, 1, 6], [0, 3, 3], [9, 5, 2]])


def by_regions(x: Tensor, levels: Any, mode: str, valid_size: Tensor) -> list[Tensor]:
    """Sample by sample, by ATen; whole axes by hand."""
    found = []
    for level in levels:
        rows = []
        for b, given in enumerate(valid_size.tolist()):
            t, h, w = (min(v, n) for v, n in zip(given, x.shape[2:], strict=True))
            sizes = [n if o is None else o for o, n in zip(level, x.shape[2:], strict=True)]
            out = x.new_zeros(1, x.shape[1] * (1 + (mode == "maxavg")), *sizes)
            if t and h and w:
                own = [v if o is None else o for o, v in zip(level, (t, h, w), strict=True)]
                region = x[b : b + 1, :, :t, :h, :w].contiguous()
                pooled = by_aten(region, [own], mode).view(1, -1, *own)
                out[:, :, : own[0], : own[1], : own[2]] = pooled
            rows.append(out)
        found.append(torch.cat(rows))
    return found


@pytest.mark.parametrize("data_format", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("mode", MODES)
def test_valid_sizes(backend, mode, data_format):
    """Against a loop over samples; what lies outside a region may be NaN and has no gradient."""
    levels = ((2, 2, 2), (1, 1, 1), (3, 5, 4), (None, 2, 1), (None, 1, None))
    x = torch.randn(4, 3, 4, 7, 6)
    inside = torch.zeros(4, 1, 4, 7, 6, dtype=torch.bool)
    for b, (t, h, w) in enumerate(VALID.tolist()):
        inside[b, :, :t, :h, :w] = bool(t and h and w)
    want = run(x, lambda t: by_regions(t, levels, mode, VALID))
    x = x.where(inside, torch.nan)
    last = data_format == "NDHWC"
    own = x.movedim(1, -1).contiguous() if last else x
    for valid_size in (VALID, VALID.int()):
        call = lambda t: sk.pyramid_pool3d(  # noqa: E731
            t, levels, mode=mode, output="maps", data_format=data_format,
            valid_size=valid_size, backend=backend,  # noqa: B023
        )  # fmt: skip
        if backend == "torch":
            with pytest.raises(BackendError, match="valid_size was given"):
                call(own)
            return
        with poisoned():
            ours = run(own, call, last)
        for name, t in want.items():
            back = ours[name].movedim(-1, 1) if last else ours[name]
            assert_close(back, t, "composition_fp32", name=name)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (1, 1, 1, 1, 1), (1, 3, 1, 9, 1)]
)
def test_sizes_of_nought_and_one(backend, shape):
    x = torch.randn(shape)
    for mode in MODES:
        found = run(x, lambda t: sk.pyramid_pool3d(t, NESTED, mode=mode, backend=backend))  # noqa: B023
        parts = 2 if mode == "maxavg" else 1
        assert found["output 0"].shape == (shape[0], shape[1] * parts * 73)
        assert found["dx"].shape == shape
        if x.numel():
            assert_close(found["output 0"], by_aten(x, NESTED, mode), "composition_fp32")


def test_gradcheck(backend):
    x = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[2, 4, 2]])
    for mode in MODES:
        call = lambda t: sk.pyramid_pool3d(t, (1, (2, 3, 2)), mode=mode, backend=backend)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, x, atol=tolerance("gradcheck_fp64"))
        assert torch.autograd.gradgradcheck(call, x, atol=tolerance("gradcheck_fp64"))
        if backend != "torch":
            ragged = lambda t: sk.pyramid_pool3d(  # noqa: E731
                t, (1, (2, 3, 2)), mode=mode, valid_size=valid, backend=backend  # noqa: B023
            )  # fmt: skip
            assert torch.autograd.gradcheck(ragged, x, atol=tolerance("gradcheck_fp64"))


def test_gradients_repeat_bit_for_bit(backend):
    x = torch.randn(2, 5, 4, 7, 6)
    for mode in MODES:
        call = lambda t: sk.pyramid_pool3d(t, NESTED, mode=mode, backend=backend)  # noqa: B023, E731
        first, second = run(x, call), run(x, call)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_maps_nobody_used_have_no_gradient(backend):
    x = torch.randn(2, 3, 4, 6, 5, requires_grad=True)
    for mode in MODES:
        maps = sk.pyramid_pool3d(x, (1, 2, 4), mode=mode, output="maps", backend=backend)
        (dx,) = torch.autograd.grad(maps[1].sum(), x)
        (want,) = torch.autograd.grad(by_aten(x, (2,), mode).sum(), x)
        assert_close(dx, want, "composition_fp32")


def test_backward_does_not_hold_x(backend):
    x = torch.randn(2, 3, 4, 6, 5)
    for mode in MODES:
        own = (x * 1).requires_grad_()
        alive = weakref.ref(own.untyped_storage())
        held = own.grad_fn, sk.pyramid_pool3d(own * 1, NESTED, mode=mode, backend=backend)
        inner = held[1].grad_fn.saved_tensors
        assert all(t is None or t.untyped_storage().data_ptr() != own.data_ptr() for t in inner)
        assert not any(t is not None and t.numel() == x.numel() for t in inner)
        del own, held
        assert alive() is None


COMPILED = ["reference", "torch", pytest.param("native", marks=pytest.mark.native), None]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph_without_recompiling(backend, training):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor, y: Tensor) -> list[Tensor]:
        maps = sk.pyramid_pool3d(
            x, ((None, 2, 2), 1), mode="maxavg", output="maps", backend=backend
        )
        return [*maps, sk.pyramid_pool3d(y, (1, 2, 4), data_format="NDHWC", backend=backend)]

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ((4, 7, 6), (5, 8, 9), (3, 4, 11)):
        x, y = torch.randn(2, 3, *sizes), torch.randn(2, *sizes, 3)
        if not training:
            for ours, want in zip(compiled(x, y), call(x, y), strict=True):
                assert torch.equal(ours, want)
            continue
        found = []
        for function in (compiled, call):
            leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
            torch.manual_seed(0)
            results = function(*leaves)
            loss = sum((r * torch.randn_like(r)).sum() for r in results)
            found.append(torch.autograd.grad(loss, leaves))
        for ours, want in zip(*found, strict=True):
            assert torch.equal(ours, want)
    assert counter.frame_count == 1


def test_compile_with_inductor():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 4, 7, 6, requires_grad=True)
    step = lambda t: sk.pyramid_pool3d(t.tanh(), NESTED).sum()  # noqa: E731
    (dx,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), x)
    (want,) = torch.autograd.grad(step(x), x)
    assert_close(dx, want, "composition_fp32")


def test_opcheck(backend):
    x = torch.randn(2, 3, 4, 5, 6)
    options: tuple[Any, ...] = ([1, 1, 1, 2, 2, 2], "maxavg", False, False, False, False, backend)
    ops = torch.ops.sora_kernels
    torch.library.opcheck(ops.pyramid_pool3d.default, (x, None, *options))
    torch.library.opcheck(ops.pyramid_pool3d_fwd.default, (x, None, *options))
    maps, indices, codes = ops.pyramid_pool3d_fwd(x, None, *options)
    arguments = ([maps[0], None], indices, codes, None, list(x.shape), *options)
    torch.library.opcheck(ops.pyramid_pool3d_bwd.default, arguments)
    last = (*options[:3], True, True, *options[5:])
    y = x.movedim(1, -1).contiguous()
    torch.library.opcheck(ops.pyramid_pool3d_fwd.default, (y, None, *last))


class Pools(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sk.pyramid_pool3d(x, (1, (2, 3, 2)), mode="maxavg")


def test_export_as_the_op_or_decomposed():
    x = torch.randn(2, 3, 4, 7, 6)
    dim = torch.export.Dim
    program = torch.export.export(
        Pools(), (x,), dynamic_shapes=({2: dim("T", min=3), 3: dim("H", min=4), 4: dim("W", min=3)},)
    )  # fmt: skip
    op = torch.ops.sora_kernels.pyramid_pool3d.default
    assert any(node.target is op for node in program.graph.nodes)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not any("sora_kernels" in str(node.target) for node in plain.graph.nodes)
    assert not any("adaptive" in str(node.target) for node in plain.graph.nodes)
    for sizes in ((4, 7, 6), (5, 11, 9)):
        y = torch.randn(2, 3, *sizes)
        want = by_aten(y, (1, (2, 3, 2)), "maxavg")
        assert_close(program.module()(y), want, "composition_fp32")
        assert_close(plain.module()(y), want, "composition_fp32")


@pytest.mark.parametrize("mode", MODES)
def test_functional_transforms(mode):
    x = torch.randn(3, 2, 3, 4, 5, 4, dtype=torch.float64)
    call = lambda t: sk.pyramid_pool3d(t, (1, (2, 3, 2)), mode=mode)  # noqa: E731
    want = torch.stack([by_aten(t, (1, (2, 3, 2)), mode) for t in x])
    assert_close(torch.func.vmap(call)(x), want, "transform_fp64")
    per_sample = torch.func.vmap(torch.func.grad(lambda t: call(t).square().sum()))(x)
    for t, g in zip(x, per_sample, strict=True):
        leaf = t.clone().requires_grad_()
        assert_close(g, torch.autograd.grad(call(leaf).square().sum(), leaf)[0], "transform_fp64")
    tangent = torch.randn_like(x[0])
    out, derivative = torch.func.jvp(call, (x[0],), (tangent,))
    assert_close(out, want[0], "transform_fp64")
    step = 1e-6
    difference = (call(x[0] + step * tangent) - call(x[0] - step * tangent)) / (2 * step)
    assert_close(derivative, difference, "gradcheck_fp64")


def test_autocast_leaves_it_alone():
    x = torch.randn(2, 3, 4, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = sk.pyramid_pool3d(x, NESTED, mode="maxavg")
    assert found.dtype == torch.float32
    assert torch.equal(found, sk.pyramid_pool3d(x, NESTED, mode="maxavg"))


def test_checkpointing(backend):
    x = torch.randn(2, 3, 4, 5, 6)
    call = lambda t: sk.pyramid_pool3d(t.tanh(), NESTED, mode="maxavg", backend=backend)  # noqa: E731
    plain, again = run(x, call), run(x, lambda t: checkpoint(call, t, use_reentrant=False))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_deterministic_mode(backend):
    x = torch.randn(2, 3, 4, 5, 6)
    call = lambda t: sk.pyramid_pool3d(t, NESTED, mode="maxavg", backend=backend)  # noqa: E731
    plain = run(x, call)
    with poisoned():  # is deterministic mode
        again = run(x, call)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


X = torch.zeros(2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "sum"}, "mode must be one of max, avg, maxavg, got 'sum'"),
        ({"output": "list"}, "output must be one of flat, maps, got 'list'"),
        ({"data_format": "NHWC"}, "data_format must be one of NCDHW, NDHWC, got 'NHWC'"),
        ({"levels": ()}, "levels must be a non-empty sequence of ints or"),
        ({"levels": 4}, "levels must be a non-empty sequence of ints or"),
        ({"levels": (1, 0)}, "each level must be a positive int or .* got 0"),
        ({"levels": ((1, 2),)}, r"each level must be a positive int or .* got \(1, 2\)"),
        ({"levels": ((1.5, 2, 2),)}, "each level must be a positive int or"),
        ({"levels": ((None, 2, 2),)}, "None keeps an axis whole and needs output='maps'"),
        ({"x": X[0]}, r"x must be \[B, C, T, H, W\], got \(3, 4, 5, 6\)"),
        ({"x": X[0], "data_format": "NDHWC"}, r"x must be \[B, T, H, W, C\], got"),
        ({"x": X.int()}, "x must be fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"x": X[:, :, :0]}, r"x must have elements on T, H and W, got \(2, 3, 0, 5, 6\)"),
        ({"x": torch.zeros(1).expand(1, 1, 2048, 1024, 1024)}, r"less than 2\^31 elements"),
        ({"valid_size": torch.ones(2, 3)}, r"valid_size must be int32 or int64 \(2, 3\) on cpu, got torch.float32"),
        ({"valid_size": torch.ones(3, 3).int()}, r"valid_size must be .* got torch.int32 \(3, 3\)"),
        ({"backend": "cudnn"}, "backend must be one of triton, native, gemm, torch, reference or None, got 'cudnn'"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    given = {"x": X, "levels": (1, 2)} | arguments
    with pytest.raises(ValueError, match=message):
        sk.pyramid_pool3d(given.pop("x"), given.pop("levels"), **given)


@pytest.mark.parametrize(
    "backend, arguments, why",
    [
        ("gemm", {}, "mode is 'max'; a matrix product makes means alone"),
        ("gemm", {"mode": "avg", "levels": (8,)}, "there are 512 bins; the matrix product is for up to 128"),
        ("torch", {"valid_size": torch.ones(2, 3).int()}, "valid_size was given"),
    ],
)  # fmt: skip
def test_a_named_backend_runs_or_says_why_not(backend, arguments, why):
    given = {"levels": (1, 2)} | arguments
    with pytest.raises(BackendError, match=why):
        sk.pyramid_pool3d(X, given.pop("levels"), backend=backend, **given)


def test_explain():
    found = sk.explain(sk.pyramid_pool3d, X, (1, 2), mode="avg")
    rows = {row.backend: row for row in found.rows}
    assert set(rows) == {"triton", "native", "gemm", "torch", "reference"}
    assert found.chosen in ("native", "torch") and rows["torch"].floor_bytes == 4 * (X.numel() + 54)


def test_every_subset_of_gradients_of_a_flat_result_flows():
    """A second loss through a slice of the vector."""
    x = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    for lo, hi in itertools.pairwise((0, 3, 27, 219)):
        (ours,) = torch.autograd.grad(sk.pyramid_pool3d(x, NESTED)[:, lo:hi].sum(), x)
        (want,) = torch.autograd.grad(by_aten(x, NESTED, "max")[:, lo:hi].sum(), x)
        assert_close(ours, want, "composition_fp32")
