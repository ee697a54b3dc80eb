"""What earlier builds left behind never reaches a later one."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

REPORT = "import sora_kernels._C as C; print(C.answer(), C.build_info(), sep='\\n')"


def answer(small_tree, python, result) -> int:
    said = python(REPORT, PYTHONPATH=str(small_tree.unpack(result)))
    assert said.ok, said.text
    return int(said.stdout.splitlines()[0])


def compiled(result) -> set[str]:
    """Sources that ninja compiled in this build."""
    words = (word for line in result.text.splitlines() for word in line.split())
    return {
        Path(word).name.removesuffix(".o") for word in words if word.endswith((".cpp.o", ".cu.o"))
    }


def test_switch_between_cpu_and_cuda_rebuilds(small_tree, python, nvcc):
    cuda = {"CUDACXX": nvcc.path, "SORA_CUDA_ARCHS": nvcc.archs[-1]}
    assert answer(small_tree, python, small_tree.build("cpu")) == 1
    assert (small_tree.path / "build").is_dir(), "the trap needs a build/ to be stale"
    assert answer(small_tree, python, small_tree.build("cuda", **cuda)) >= 12080
    assert answer(small_tree, python, small_tree.build("cpu")) == 1


def test_second_build_compiles_nothing(small_tree):
    assert compiled(small_tree.build("cpu")) == {"kernel.cpp", "module.cpp"}
    assert compiled(small_tree.build("cpu")) == set()


def test_changed_header_recompiles_what_includes_it(small_tree, python):
    assert answer(small_tree, python, small_tree.build("cpu")) == 1
    header = small_tree.path / "csrc" / "kernel.h"
    header.write_text(header.read_text().replace("kAnswer = 1", "kAnswer = 42"))
    assert answer(small_tree, python, small_tree.build("cpu")) == 42


def test_changed_flags_recompile(small_tree):
    small_tree.build("cpu")
    result = small_tree.build("cpu", CXXFLAGS="-DNAME='a b' -O0")
    assert compiled(result) == {"kernel.cpp", "module.cpp"}
    (graph,) = small_tree.path.glob("build/ninja-*/build.ninja")
    assert "'-DNAME=a b' -O0" in graph.read_text()


def test_other_compiler_version_recompiles(small_tree):
    small_tree.build("cpu")
    (stamp,) = small_tree.path.glob("build/ninja-*/made_by")
    assert json.loads(stamp.read_text())[-1] is None
    stamp.write_text(stamp.read_text().replace(".", ".9"))
    assert compiled(small_tree.build("cpu")) == {"kernel.cpp", "module.cpp"}


def test_removed_files_do_not_reach_the_wheel(small_tree):
    old = small_tree.path / "sora_kernels" / "old.py"
    old.write_text("")
    assert "sora_kernels/old.py" in small_tree.build("cpu").names()
    old.unlink()
    assert "sora_kernels/old.py" not in small_tree.build("cpu").names()


def test_pure_build_after_a_compiled_one_has_no_extension(small_tree):
    small_tree.build("cpu")
    assert not any(name.endswith(".so") for name in small_tree.build("none").names())


def test_extension_compiled_in_place_stays_out_of_other_wheels(small_tree):
    (small_tree.path / "sora_kernels" / "_C.cpython-39-x86_64-linux-gnu.so").write_bytes(b"old")
    names = [name for name in small_tree.build("cpu").names() if name.endswith(".so")]
    assert names == [f"sora_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]


def test_editable_build_is_in_place_and_pure_one_takes_it_away(small_tree, python):
    extension = small_tree.path / "sora_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    other = extension.with_name("_C.cpython-39-x86_64-linux-gnu.so")
    other.write_bytes(b"of another Python that shares the tree")
    result = small_tree.build("cpu", "build_editable")
    assert result.ok, result.text
    said = python(REPORT, PYTHONPATH=str(small_tree.path))
    assert said.stdout.splitlines()[0] == "1", said.text
    result = small_tree.build("none", "build_editable")
    assert result.ok, result.text
    assert not extension.exists() and other.exists()


def test_rebuild_does_not_write_into_a_mapped_extension(small_tree):
    """A process that runs the old extension keeps its file."""
    small_tree.build("cpu", "build_editable")
    (extension,) = (small_tree.path / "sora_kernels").glob("_C.*.so")
    with extension.open("rb") as mapped:
        before = mapped.read()
        header = small_tree.path / "csrc" / "kernel.h"
        header.write_text(header.read_text().replace("kAnswer = 1", "kAnswer = 42"))
        assert small_tree.build("cpu", "build_editable").ok
        mapped.seek(0)
        assert mapped.read() == before
    assert extension.read_bytes() != before


def test_same_sources_give_the_same_binary(small_tree, tmp_path):
    """Neither the time nor the place of a build is in it."""

    def built() -> bytes:
        site = small_tree.unpack(small_tree.build("cpu"))
        (extension,) = site.glob("sora_kernels/_C.*.so")
        return extension.read_bytes()

    first = built()
    assert str(tmp_path).encode() not in first
    small_tree.path = small_tree.path.rename(tmp_path / "moved tree")
    (build,) = small_tree.path.glob("build")
    build.rename(tmp_path / "old-build")
    assert built() == first
