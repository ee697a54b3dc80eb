"""Parsing, on what nvdisasm and cuobjdump (CUDA 12.8) printed for a small pipelined matrix product
on sm_90:
64x16 fp16 tile, K in steps of 32, cp.async, wgmma, 128-bit stores, 10240 bytes of shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from sora_kernels import _sass, audit

HERE = Path(__file__).parent
CODE = _sass.functions((HERE / "sample.sass").read_text())["sample_kernel"]


def test_resources():
    usage = _sass.resources((HERE / "sample.usage").read_text())
    assert usage == {"sample_kernel": _sass.Resources(registers=34, stack=0, shared=1024)}


def test_whole_kernel():
    assert _sass.census(CODE.instructions) == {
        "total": 164,
        "tensor": 2,
        "local": 0,
        "load": {},
        "store": {"128": 2},
        "copy": {"128": 4, "64": 2},
    }


def test_inner_loop_is_the_pipelined_one():
    loop = _sass.inner_loop(CODE)
    assert loop[-1] == _sass.Instruction("BRA", ".L_x_1")
    assert _sass.census(loop) == {
        "total": 63,
        "tensor": 2,
        "local": 0,
        "load": {},
        "store": {},
        "copy": {"128": 2, "64": 1},
    }


def code(*lines: str) -> _sass.Code:
    text = "\n".join(
        line if line.startswith(".L") else f"        /*{i:04x}*/  {line} ;"
        for i, line in enumerate(lines)
    )
    return _sass.functions(f'\t.section\t.text.k,"ax",@progbits\n{text}\n')["k"]


def test_the_innermost_of_nested_loops():
    nested = code(
        ".L_x_0:", "IADD3 R1, R1, 0x1, RZ", ".L_x_1:", "LDG.E R2, [R4.64]", "@P0 BRA `(.L_x_1)",
        "STG.E [R4.64], R2", "@!P1 BRA `(.L_x_0)", "EXIT", ".L_x_2:", "BRA `(.L_x_2)", "NOP", "NOP",
    )  # fmt: skip
    assert [i.opcode for i in _sass.inner_loop(nested)] == ["LDG.E", "BRA"]
    assert len(nested.instructions) == 7  # padding is not counted


def test_no_kernel():
    """The cubin of a file that only calls the runtime."""
    assert _sass.functions('\t.elftype\t@"ET_EXEC"\n') == {}


def test_no_loop():
    assert _sass.inner_loop(code("MOV R1, R2", "EXIT", ".L_x_0:", "BRA `(.L_x_0)")) == ()


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.U8.CONSTANT", 8),
        ("LDG.E.S16", 16),
        ("LDG.E.64.CONSTANT", 64),
        ("LDG.E.EF.128", 128),
        ("STG.E.ENL2.256", 256),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
    ],
)
def test_width(opcode, bits):
    assert _sass.bits(opcode) == bits


def test_what_counts_as_tensor_local_and_bulk():
    counts = _sass.census(
        code(
            "HFMA2.MMA R1, -RZ, RZ, 0, 0", "HMMA.16816.F32 R4, R8, R12, R4",
            "HGMMA.64x64x16.F32 R24, R4, R24", "UTCHMMA gdesc[UR4], tmem[UR6]", "STL.64 [R1], R2",
            "@P0 LDL R3, [R1]", "UTMALDG.4D [UR8], [UR4]", "@UP1 UBLKCP [UR4], [UR6], UR8",
        ).instructions
    )  # fmt: skip
    assert (counts["tensor"], counts["local"], counts["copy"]) == (3, 2, {"bulk": 2})


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 64, 1024, 4, 0.5),  # 65536 / (64 * 32) = 32 warps
        (
            "sm_90",
            168,
            0,
            12,
            12 / 64,
        ),  # one block of three warpgroups: 12 * 32 * 168 = 64512 registers
        ("sm_90", 32, 100 * 1024, 4, 8 / 64),  # two blocks fit 228 KiB
        ("sm_80", 32, 100 * 1024, 4, 4 / 64),  # one fits 164 KiB
        ("sm_120", 32, 0, 8, 1.0),
        ("sm_90", 16, 0, 1, 0.5),  # 32 blocks of one warp
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert _sass.occupancy(arch, registers, shared, warps) == expected


def test_launch_bounds():
    text = (
        ".nv.info._Z3foov\n\t<0x1>\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n"
        "\tValue:\t0x100 0x1 0x1 \n\n.nv.info._Z3barv\n\tAttribute:\tEIATTR_REGCOUNT\n"
    )
    assert _sass.launch_bounds(text) == {"_Z3foov": 256}


@pytest.mark.parametrize(
    ("mangled", "readable"),
    [
        (
            "_ZN4sora43_GLOBAL__N__6fa1ffb8_10_dropout_cu_ee78a47a14dropout_kernelI13__nv_bfloat16EEvNS_1AE",
            "dropout_kernel<__nv_bfloat16>",
        ),
        (
            "_ZN4sora20lstm_step_bwd_kernelINS_8BFloat16ELNS_4CellE2EEEvNS_16LstmStepBackwardE",
            "lstm_step_bwd_kernel<BFloat16, 2>",
        ),
        (
            "_ZN4sora8resident24lstm_resident_fwd_kernelINS_8BFloat16ELi128ELNS_4CellE0ELNS0_6AccessE1ELb1EEEvNS_19LstmResidentForwardE",
            "lstm_resident_fwd_kernel<BFloat16, 128, 0, 1, 1>",
        ),
        ("_ZN4sora12_GLOBAL__N_111walk_kernelIfLi4ELb1EEEvPf", "walk_kernel<float, 4, 1>"),
        ("_Z12plain_kernelPf", "plain_kernel"),
        ("_bn_stats_kernel", "_bn_stats_kernel"),
    ],
)  # fmt: skip
def test_readable(mangled, readable):
    assert _sass.readable(mangled) == readable


ROW = {
    "registers": 64, "stack": 0, "shared": 1024, "warps": 4, "occupancy": 0.5,
    "total": 500, "tensor": 8, "local": 0,
    "load": {"128": 2}, "store": {"32": 2}, "copy": {},
    "loop": {"total": 160, "tensor": 8, "local": 0, "load": {"128": 2}, "store": {}, "copy": {}},
}  # fmt: skip


def test_regressions_are_found_and_noise_is_not():
    assert audit.regressions({"k": ROW}, {"k": ROW}) == []
    noise = {**ROW, "registers": 66, "total": 510}
    assert audit.regressions({"k": noise}, {"k": ROW}) == []
    better = {**ROW, "registers": 40, "total": 300, "occupancy": 0.75}
    assert audit.regressions({"k": better}, {"k": ROW}) == []
    # Four 32-bit loads where there was a 128-bit one.
    narrow = {**ROW, "loop": {**ROW["loop"], "load": {"32": 8}}}
    assert "global load instructions" in audit.regressions({"k": narrow}, {"k": ROW})[0]
    for change, word in (
        ({"registers": 80}, "registers"),
        ({"shared": 4096}, "shared memory"),
        ({"total": 700}, "instructions"),
        ({"tensor": 0}, "tensor-core"),
        ({"occupancy": 0.375}, "occupancy"),
    ):
        [line] = audit.regressions({"k": {**ROW, **change}}, {"k": ROW})
        assert word in line
    assert "not in the table" in audit.regressions({"new": ROW}, {"k": ROW})[0]


def test_spills_are_found():
    assert audit.spilled({"k": ROW}) == []
    assert audit.spilled({"k": {**ROW, "stack": 328}}) == [
        "k: 328 bytes of stack, 0 local loads and stores"
    ]
    assert len(audit.spilled({"k": {**ROW, "local": 3}})) == 1


def test_write_replaces_only_what_was_audited(tmp_path):
    first = {"triton 3.7.1": {"a: x (1)": ROW, "b: y (1)": ROW}, "nvcc 13.0": {"c: z": ROW}}
    audit.write("sm_90", first, None, tmp_path)
    assert audit.table("sm_90", tmp_path) == first
    audit.write("sm_90", {"triton 3.7.1": {"a: x (2)": ROW}}, ["a"], tmp_path)
    audit.write("sm_90", {"triton 3.6.0": {"a: x (2)": ROW}}, None, tmp_path)
    assert audit.table("sm_90", tmp_path) == {
        "nvcc 13.0": {"c: z": ROW},
        "triton 3.6.0": {"a: x (2)": ROW},
        "triton 3.7.1": {"a: x (2)": ROW, "b: y (1)": ROW},
    }
    assert audit.table("sm_80", tmp_path) == {}
