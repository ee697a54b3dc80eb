"""How the compilers are found: on scripts that stand for compilers, and on the real ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SORA_CUDA_ARCHS", raising=False)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_nvcc(tmp_path: Path):
    """``fake_nvcc(version=..., compiles=...)``: an nvcc whose toolkit stands in another folder."""
    library = tmp_path / "tool kit" / "lib"
    library.mkdir(parents=True)
    (library / "libcudart_static.a").touch()

    def make(version: str = "13.0.88", compiles: str = "exit 0") -> Path:
        body = f"""
case "$*" in
--version) echo "Cuda compilation tools, release 13.0, V{version}" ;;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_90a\\nsm_100\\n' ;;
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n' ;;
-dryrun*)
  echo '#$ INCLUDES="-I{tmp_path}/tool kit/include"' >&2
  echo '#$ SYSTEM_INCLUDES="-isystem" "{tmp_path}/tool kit/cccl"' >&2
  echo '#$ LIBRARIES=  "-L{tmp_path}/tool kit/stubs" "-L{tmp_path}/tool kit/lib"' >&2 ;;
*) {compiles} ;;
esac"""
        return executable(tmp_path / "bin" / "nvcc", body)

    return make


def test_toolkit_folders_come_from_nvcc_itself(toolchain, fake_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc()))
    nvcc = toolchain.find_nvcc()
    assert nvcc.version == "13.0.88" and nvcc.archs == ["80", "90", "100"]
    assert nvcc.library_dirs == [f"{tmp_path}/tool kit/lib"]
    assert nvcc.include_dirs == [f"{tmp_path}/tool kit/include", f"{tmp_path}/tool kit/cccl"]


def test_cuda_home_binds(toolchain, fake_nvcc, monkeypatch, tmp_path):
    fake_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_nvcc().path == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    missing = toolchain.find_nvcc()
    assert isinstance(missing, toolchain.Missing) and "elsewhere" in missing.what


def test_old_nvcc(toolchain, fake_nvcc, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(version="12.4.131")))
    missing = toolchain.find_nvcc()
    assert "nvcc 12.8 or later" in missing.what and "12.4.131" in missing.what


def test_nvcc_with_a_host_compiler_it_does_not_take(toolchain, fake_nvcc, monkeypatch):
    refuses = "echo '#error -- unsupported GNU version! gcc versions later than 15' >&2; exit 1"
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(compiles=refuses)))
    missing = toolchain.find_nvcc()
    assert "unsupported GNU version" in missing.what and "CUDAHOSTCXX" in missing.cure


def test_nvcc_without_the_static_runtime(toolchain, fake_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc()))
    (tmp_path / "tool kit" / "lib" / "libcudart_static.a").unlink()
    assert "libcudart_static.a" in toolchain.find_nvcc().what


def test_script_that_is_no_nvcc(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(executable(tmp_path / "nvcc", "exit 1")))
    assert "gives no version" in toolchain.find_nvcc().what


@pytest.mark.parametrize(
    "variable, flag",
    [("CUDAHOSTCXX", "-ccbin=g++-13"), ("CXX", "-ccbin=g++-13"), (None, None)],
)
def test_host_compiler(toolchain, fake_nvcc, monkeypatch, variable, flag):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc()))
    if variable:
        monkeypatch.setenv(variable, "g++-13")
    assert toolchain.find_nvcc().host_flags == ([flag] if flag else [])


@pytest.mark.parametrize(
    "asked, archs",
    [
        ("", ["80", "90", "100"]),
        ("80;90a", ["80", "90a"]),
        ("sm_80, sm_90", ["80", "90"]),
        ("9.0 8.0 9.0", ["90", "80"]),
        ("100f", ["100f"]),
    ],
)
def test_archs(toolchain, asked, archs):
    assert toolchain.choose_archs(asked, {"75", "80", "86", "90", "100"}) == archs


@pytest.mark.parametrize("asked", ["70", "ninety", "90b", "native"])
def test_arch_that_nvcc_lacks(toolchain, asked):
    with pytest.raises(SystemExit, match=rf"nvcc has no '{asked}' \(it has 75, 80, 90\)"):
        toolchain.choose_archs(f"80;{asked}", {"75", "80", "90"})


@pytest.mark.parametrize(
    "archs, ptx, codes",
    [
        (["80", "90"], "80", ["arch=compute_80,code=[sm_80,sm_90,compute_80]"]),
        (["80", "90a"], "80", ["arch=compute_80,code=[sm_80,sm_90a,compute_80]"]),
        (["90a"], None, ["arch=compute_90a,code=sm_90a"]),
        (["100", "90"], "90", ["arch=compute_90,code=[sm_100,sm_90,compute_90]"]),
        (["100", "90a"], "100", [
            "arch=compute_90a,code=sm_90a", "arch=compute_100,code=[sm_100,compute_100]"
        ]),
    ],
)  # fmt: skip
def test_one_ptx_of_the_oldest_portable_arch(toolchain, archs, ptx, codes):
    nvcc = toolchain.Nvcc("nvcc", "13.0.88", archs, [], [], [])
    assert nvcc.ptx == ptx
    assert nvcc.gencodes == [f"-gencode={code}" for code in codes]


def test_compiler_is_named_with_its_version(toolchain, cxx):
    assert cxx.version.split()[0] == Path(cxx.command[0]).name
    assert any(character.isdigit() for character in cxx.version)


def test_compiler_may_come_with_arguments(toolchain, cxx, monkeypatch):
    monkeypatch.setenv("CXX", f"{shutil.which(cxx.command[0])} -pipe")
    assert toolchain.find_cxx().command[1:] == ["-pipe"]


def test_missing_python_headers(toolchain, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    missing = toolchain.find_cxx()
    assert str(tmp_path / "Python.h") in missing.what and "-dev" in missing.cure


def test_clang_gets_no_openmp(toolchain, monkeypatch, tmp_path):
    """Its runtime would be a second one beside torch's."""
    body = 'case "$*" in *-dM*) echo "#define __clang__ 1";; esac'
    monkeypatch.setenv("CXX", str(executable(tmp_path / "clang++", body)))
    assert toolchain.find_cxx().openmp is False


def test_compilers_are_asked_in_english(toolchain, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    said = toolchain.run(["sh", "-c", "echo $LC_ALL"]).stdout.strip()
    assert said == "C" and os.environ["LC_ALL"] == "de_DE.UTF-8"
