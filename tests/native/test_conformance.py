"""Every wrapper of csrc/common/*.cuh against what its instruction is documented to do: the host twins under the
emulation, and with ``-m gpu`` the instructions themselves.

The fragment layouts of mma come from Triton's linear layouts, those of ldmatrix from the PTX manual's figure and,
through mma's operands, from Triton again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import Emulated, Gpu, NoCompiler, build, build_cuda

SOURCE = Path(__file__).parent / "emulated" / "conformance.cu"
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
Device = Emulated | Gpu


@pytest.fixture(
    params=["plain", "race", pytest.param("gpu", marks=pytest.mark.gpu)],
)
def each_order(request) -> Callable[[Callable[[Device], None]], None]:
    """Runs a check on the device: emulated, in several orders."""
    if request.param == "gpu":
        device = Gpu(build_cuda(SOURCE))
        return lambda check: check(device)
    try:
        library = build(SOURCE, race=request.param == "race")
    except NoCompiler as why:
        pytest.skip(str(why))

    def run(check: Callable[[Device], None]) -> None:
        for seed in range(9):
            check(Emulated(library, race=request.param == "race", seed=seed))

    return run


@pytest.fixture(scope="module")
def layouts() -> dict[str, torch.Tensor]:
    """(row, column) of each lane's elements, ``[32, elements, 2]``: Triton's layouts of mma v2."""
    gluon = pytest.importorskip("triton.experimental.gluon.language._layouts")
    from triton._C.libtriton import gluon_ir, ir

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    accumulators = gluon.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    kinds = {"d": (accumulators, [16, 8])}
    for name, packed, k in (("16", 2, 16), ("tf32", 1, 8)):
        kinds[f"a{name}"] = (gluon.DotOperandLayout(0, accumulators, packed), [16, k])
        kinds[f"b{name}"] = (gluon.DotOperandLayout(1, accumulators, packed), [k, 8])
    found = {}
    for name, (layout, shape) in kinds.items():
        linear = builder.to_linear_layout(layout._to_ir(builder), shape)
        assert not linear.warp_bases and not linear.block_bases
        registers = _spanned(linear.reg_bases)
        lanes = _spanned(linear.lane_bases)
        found[name] = lanes[:, None] ^ registers[None]
    return found


def _spanned(bases: list[list[int]]) -> torch.Tensor:
    """What each number gives: the exclusive or of the bases of its bits."""
    spanned = torch.zeros(1, 2, dtype=torch.int64)
    for base in bases:
        spanned = torch.cat([spanned, spanned ^ torch.tensor(base)])
    return spanned


def fragments(matrix: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """``matrix`` as the registers of 32 lanes, int32."""
    elements = matrix[layout[..., 0], layout[..., 1]].contiguous()
    return elements.view(torch.int32)


@pytest.mark.parametrize("kind", DTYPES)
def test_mma_multiplies_fragments_in_tritons_layout(each_order, layouts, kind):
    dtype, k, name = (
        DTYPES[kind],
        (8 if kind == "tf32" else 16),
        ("tf32" if kind == "tf32" else "16"),
    )
    generator = torch.Generator().manual_seed(7)
    # Small integers: exact in every type and in every order of the sum. One operand at a time varies with its place.
    a = torch.randint(-8, 9, (16, k), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (k, 8), generator=generator).to(dtype)
    c = torch.randint(-99, 99, (16, 8), generator=generator).float()
    expected = a.double() @ b.double() + c

    def check(device: Device) -> None:
        registers = device.tensor(fragments(c, layouts["d"]).view(torch.float32), "d")
        device.run(
            "run_mma", list(DTYPES).index(kind),
            device.tensor(fragments(a, layouts[f"a{name}"]), "a"),
            device.tensor(fragments(b, layouts[f"b{name}"]), "b"), registers,
        )  # fmt: skip
        assert torch.equal(registers.cpu().double(), fragments_of(expected, layouts["d"]))

    each_order(check)


def fragments_of(matrix: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    return matrix[layout[..., 0], layout[..., 1]]


def test_mma_reads_19_bits_of_tf32(each_order, layouts):
    a, b = torch.zeros(16, 8), torch.eye(8)
    a[3, 5] = 1 + 2**-10 + 2**-11  # the last bit is below TF32

    def check(device: Device) -> None:
        d = device.tensor(torch.zeros(32, 4), "d")
        device.run(
            "run_mma", 2, device.tensor(fragments(a, layouts["atf32"]), "a"),
            device.tensor(fragments(b, layouts["btf32"]), "b"), d,
        )  # fmt: skip
        assert d.cpu().sum().item() == 1 + 2**-10

    each_order(check)


@pytest.mark.parametrize("kind", DTYPES)
def test_mma_of_random_numbers(each_order, layouts, kind):
    dtype, k, name = (
        DTYPES[kind],
        (8 if kind == "tf32" else 16),
        ("tf32" if kind == "tf32" else "16"),
    )
    generator = torch.Generator().manual_seed(11)
    a = torch.randn(16, k, generator=generator).bfloat16().to(dtype)
    b = torch.randn(k, 8, generator=generator).bfloat16().to(dtype)
    expected = fragments_of(a.double() @ b.double(), layouts["d"])
    # Each of k products and sums may lose an ulp of the largest partial sum.
    bound = k * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs()).max()

    def check(device: Device) -> None:
        d = device.tensor(torch.zeros(32, 4), "d")
        device.run(
            "run_mma", list(DTYPES).index(kind), device.tensor(fragments(a, layouts[f"a{name}"]), "a"),
            device.tensor(fragments(b, layouts[f"b{name}"]), "b"), d,
        )  # fmt: skip
        assert (d.cpu().double() - expected).abs().max() <= bound

    each_order(check)


@pytest.mark.parametrize(
    ("count", "transposed"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_ldmatrix_follows_the_manual(each_order, count, transposed):
    rows = torch.randperm(64 * 8).to(torch.int16).view(64, 8)
    row_of = torch.randperm(64)[:32].to(torch.int32)
    # PTX ISA: lanes 8 i .. 8 i + 7 give the rows of matrix i; lane l gets of row l / 4 the elements 2 (l % 4) and
    # the one after.
    lanes = torch.arange(32)
    matrices = rows[row_of.long()].view(4, 8, 8)[:count]
    if transposed:
        matrices = matrices.transpose(1, 2)
    first = matrices[:, lanes // 4, 2 * (lanes % 4)]
    second = matrices[:, lanes // 4, 2 * (lanes % 4) + 1]
    expected = torch.stack([first, second], -1).contiguous().view(torch.int32)[..., 0].T

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(32, count, dtype=torch.int32), "fragments")
        arguments = device.tensor(rows, "rows"), device.tensor(row_of, "row_of"), out
        device.run("run_ldmatrix", count, int(transposed), *arguments)
        assert torch.equal(out.cpu(), expected)

    each_order(check)


def test_ldmatrix_gives_the_operands_of_mma(each_order, layouts):
    a = torch.randn(16, 16).half()
    b = torch.randn(16, 8).half()
    blocks = [(0, 0), (8, 0), (0, 8), (8, 8)]  # of (row, k), as csrc/common/mma.cuh says
    a_rows = torch.cat([a[m : m + 8, k : k + 8] for m, k in blocks])
    b_rows = torch.cat([b.T[:, k : k + 8] for k in (0, 8)])
    b_trans_rows = torch.cat([b[k : k + 8] for k in (0, 8)])

    def loaded(device: Device, count: int, transposed: bool, rows: torch.Tensor) -> torch.Tensor:
        memory = torch.zeros(64, 8, dtype=torch.float16)
        memory[: len(rows)] = rows
        out = device.tensor(torch.zeros(32, count, dtype=torch.int32), "fragments")
        row_of = device.tensor(torch.arange(32, dtype=torch.int32), "row_of")
        image = device.tensor(memory.view(torch.int16), "rows")
        device.run("run_ldmatrix", count, int(transposed), image, row_of, out)
        return out.cpu()

    def check(device: Device) -> None:
        assert torch.equal(loaded(device, 4, False, a_rows), fragments(a, layouts["a16"]))
        assert torch.equal(loaded(device, 2, False, b_rows), fragments(b, layouts["b16"]))
        assert torch.equal(loaded(device, 2, True, b_trans_rows), fragments(b, layouts["b16"]))

    each_order(check)


def numbers(signs: str, n: int) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    return {"mixed": x, "positive": x.abs() + 1, "negative": -x.abs()}[signs]


@pytest.mark.parametrize("signs", ["mixed", "positive", "negative"])
def test_lanes_of_a_warp(each_order, signs):
    x = numbers(signs, 32)
    lanes = torch.arange(32)

    def check(device: Device) -> None:
        out = device.tensor(torch.full((7, 32), torch.nan), "out")
        device.run("run_warp", device.tensor(x, "x"), out)
        got = out.cpu()
        assert torch.equal(got[0], x[(5 * lanes + 3) % 32])
        assert torch.equal(got[1], x[lanes ^ 9])
        assert torch.equal(got[2], torch.cat([x[3:], x[29:]]))
        assert torch.equal(got[3], torch.cat([x[:2], x[:-2]]))
        votes = sum(1 << i for i in range(32) if x[i] > 0)
        assert (got[4].view(torch.int32).long() & 0xFFFFFFFF == votes).all()
        assert (got[5] == float((x > 0).any())).all()
        assert (got[6] == float((x > 0).all())).all()

    each_order(check)


@pytest.mark.parametrize("signs", ["mixed", "positive", "negative"])
def test_barrier_of_a_block(each_order, signs):
    x = numbers(signs, 128)

    def check(device: Device) -> None:
        out = device.tensor(torch.full((4, 128), torch.nan), "out")
        device.run("run_block", device.tensor(x, "x"), out)
        got = out.cpu()
        assert torch.equal(got[0], x.flip(0))
        assert (got[1] == float((x > 0).any())).all()
        assert (got[2] == float((x > 0).all())).all()
        assert (got[3] == (x > 0).sum()).all()

    each_order(check)


def test_named_barriers(each_order):
    def check(device: Device) -> None:
        out = device.tensor(torch.full((6,), torch.nan), "out")
        device.run("run_named_barrier", out, 6)
        assert torch.equal(out.cpu(), torch.arange(96.0).sum() + 96 * torch.arange(6.0))

    each_order(check)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_writes_zeros_after_what_it_reads(each_order, size):
    x = torch.randint(1, 256, (32, 16), dtype=torch.uint8)
    from_bytes = (torch.randperm(32) % (size + 1)).to(torch.int32)
    expected = x[:, :size] * (torch.arange(size) < from_bytes[:, None])

    def check(device: Device) -> None:
        out = device.tensor(torch.full((32, size), 99, dtype=torch.uint8), "out")
        device.run(
            "run_cp_async",
            size,
            device.tensor(x, "x"),
            device.tensor(from_bytes, "from_bytes"),
            out,
        )
        assert torch.equal(out.cpu(), expected.flip(0))

    each_order(check)


def test_loads_and_stores(each_order):
    x = torch.randint(-(2**31), 2**31 - 1, (128,), dtype=torch.int32)

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(5, 128, dtype=torch.int32), "out")
        device.run("run_memory", device.tensor(x, "x"), out)
        assert (out.cpu() == x).all()

    each_order(check)


def test_conversions_and_special_functions(each_order):
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int32, generator=generator)
    edges = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, 1.0, 65504, 65519.996, 65520, 2**-24, 2**-25, 3 * 2**-26]
    )
    halfway = (torch.randint(0, 2**15, (500,), generator=generator) << 16 | 0x8000).to(torch.int32)
    ties = (torch.randint(0x3800, 0x4770, (500,), generator=generator) << 16 | 0x1000).to(
        torch.int32
    )
    near = torch.randn(4000, generator=generator) * 3
    x = torch.cat(
        [
            bits.view(torch.float32),
            edges,
            halfway.view(torch.float32),
            ties.view(torch.float32),
            near,
        ]
    )
    x = x[~x.isnan()]

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(8, len(x), dtype=torch.int32), "out")
        device.run("run_math", device.tensor(x, "x"), out, len(x))
        got = out.cpu()
        half = x.half().view(torch.int16).int() & 0xFFFF
        bfloat = x.bfloat16().view(torch.int16).int() & 0xFFFF
        assert torch.equal(got[0], half)
        assert torch.equal(got[1], bfloat)
        magnitude = x.view(torch.int32).long() & 0x7FFFFFFF
        nearest = torch.where(magnitude >= 0x7F800000, magnitude, (magnitude + 0x1000) & ~0x1FFF)
        assert torch.equal(got[2].long() & 0x7FFFFFFF, nearest)  # ties away from zero
        assert torch.equal(got[3], half | (half ^ 0x8000) << 16)
        assert torch.equal(got[4], bfloat | (bfloat ^ 0x8000) << 16)
        ex2, rcp, tanh = got[5:].view(torch.float32)
        truth = x.double().exp2().float()
        normal = (truth > 2**-126) & truth.isfinite()
        # Bounds of the PTX manual: 2 ulp, 1 ulp, 2^-11.
        assert ((ex2 - truth).abs() <= 2**-22 * truth)[normal].all()
        assert (ex2[x == torch.inf] == torch.inf).all() and (ex2[x < -150] == 0).all()
        normal = (x.abs() > 2**-126) & (x.abs() < 2.0**125)
        assert ((rcp * x.double() - 1).abs() <= 2**-22)[normal].all()
        truth = x.double().tanh()
        normal = x.abs() > 2**-126
        assert ((tanh - truth).abs() <= 2**-10.987 * truth.abs())[normal].all()

    each_order(check)


def test_mbarrier_pipeline(each_order):
    x = torch.randint(0, 10**6, (9, 32), dtype=torch.int32)

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(32, dtype=torch.int32), "out")
        device.run("run_mbarrier", device.tensor(x, "x"), out, len(x))
        assert torch.equal(out.cpu(), x.sum(0).flip(0).int())

    each_order(check)


def test_cluster_memory(each_order):
    i, rank = torch.arange(64), torch.arange(4)
    ring = 100 * ((rank + 3) % 4)[:, None] + i[:32]
    following = 100 * ((rank + 1) % 4)[:, None] + i[32:]
    gathered = 100 * rank.sum() + 4 * (63 - i)

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(8, 3, 64, dtype=torch.int32), "out")
        device.run("run_cluster", out)
        for got in out.cpu().view(2, 4, 3, 64):
            assert torch.equal(got[:, 0], torch.cat([ring, following], 1).int())
            assert (got[:, 1:] == gathered).all()

    each_order(check)


def test_multicast(each_order):
    x = torch.randint(0, 10**6, (64,), dtype=torch.int32)

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(8, 64, dtype=torch.int32), "out")
        device.run("run_multicast", device.tensor(x, "x"), out)
        got = out.cpu()
        got[0::4, :4] -= 10 + torch.arange(4, dtype=torch.int32)  # what the ranks told rank 0
        assert (got == x.flip(0)).all()

    each_order(check)


def test_barrier_of_a_grid(each_order):
    ctas, rounds = 6, 4
    values = torch.randint(0, 1000, (ctas,), dtype=torch.int32)
    expected = values
    for _ in range(rounds):
        expected = expected + expected.roll(-1)

    def check(device: Device) -> None:
        both = device.tensor(torch.cat([values, torch.zeros_like(values)]), "values")
        counter = device.tensor(torch.zeros(1, dtype=torch.int32), "counter")
        device.run("run_grid", both, counter, ctas, rounds)
        assert torch.equal(both.cpu()[rounds % 2 * ctas :][:ctas], expected)

    each_order(check)


@pytest.mark.parametrize("variant", range(3))
def test_flags_carry_data_from_cta_to_cta(each_order, variant):
    ctas = 4
    x = torch.randint(0, 1000, (64,), dtype=torch.int32)

    def check(device: Device) -> None:
        out = device.tensor(torch.zeros(ctas, 64, dtype=torch.int32), "out")
        flags = device.tensor(torch.zeros(ctas + 1, dtype=torch.int32), "flags")
        device.run("run_flags", device.tensor(x, "x"), out, flags, ctas, variant)
        for k, row in enumerate(out.cpu()):
            assert torch.equal(row, (x if k % 2 == 0 else x.flip(0)) + 1 + k)

    each_order(check)
