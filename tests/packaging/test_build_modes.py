"""What each SORA_BUILD makes, with and without the compilers it wants."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

REPORT = """
import json, sora_kernels._C as C
print(json.dumps({"answer": C.answer(), **json.loads(C.build_info())}))
"""


def report(small_tree, python, result):
    site = small_tree.unpack(result)
    said = python(REPORT, PYTHONPATH=str(site))
    assert said.ok, said.text
    return json.loads(said.stdout)


def has_extension(names: list[str]) -> bool:
    return any(name.startswith("sora_kernels/_C.") and name.endswith(".so") for name in names)


def test_none_is_pure_python(small_tree):
    result = small_tree.build("none")
    assert result.ok, result.text
    assert result.artifact.name.endswith("-py3-none-any.whl")
    assert not has_extension(result.names())
    assert "sora_kernels/py.typed" in result.names()
    assert "SORA_BUILD=none" in result.stderr


def test_cpu(small_tree, python):
    info = report(small_tree, python, small_tree.build("cpu"))
    assert info["answer"] == 1
    assert info["mode"] == "cpu" and info["nvcc"] is None and info["cuda_archs"] == []
    assert info["cuda_why_not"] == "it was built with SORA_BUILD=cpu"
    assert info["cxx"] and info["pybind11"] and info["version"] and info["commit"] is None
    assert info["python"] == ".".join(map(str, sys.version_info[:3]))


def test_auto_without_nvcc_says_one_line_and_builds_the_cpu_part(small_tree, python, no_nvcc):
    result = small_tree.build("auto", **no_nvcc)
    said = [line for line in result.stderr.splitlines() if line.startswith("sora_kernels:")]
    assert len(said) == 1, result.text
    assert "building without the CUDA part: no nvcc" in said[0] and "CUDA_HOME" in said[0]
    info = report(small_tree, python, result)
    assert info["answer"] == 1 and "found no nvcc" in info["cuda_why_not"]


def test_auto_without_a_compiler_is_pure_python_and_says_so(small_tree, no_cxx):
    result = small_tree.build("auto", **no_cxx)
    assert result.ok, result.text
    assert result.artifact.name.endswith("-py3-none-any.whl")
    assert not has_extension(result.names())
    assert "without the native extension: no C++17 compiler" in result.stderr


def test_auto_takes_a_compiler_that_does_not_work_for_none(small_tree, tmp_path):
    broken = script(tmp_path / "g++", "echo 'fatal error: no vector here' >&2; exit 1")
    result = small_tree.build("auto", CXX=str(broken))
    assert result.ok, result.text
    assert not has_extension(result.names())
    assert "fatal error: no vector here" in result.stderr


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_explicit_choice_without_a_compiler_fails(small_tree, no_cxx, mode):
    result = small_tree.build(mode, **no_cxx)
    assert not result.ok
    assert (
        f"SORA_BUILD={mode} needs C++17 compiler (looked for CXX=no-such-compiler)" in result.stderr
    )
    assert "apt-get install g++" in result.stderr and "SORA_BUILD=none" in result.stderr


def test_cuda_without_nvcc_fails(small_tree, no_nvcc):
    result = small_tree.build("cuda", **no_nvcc)
    assert not result.ok
    assert f"SORA_BUILD=cuda needs nvcc (looked for {no_nvcc['CUDA_HOME']}" in result.stderr
    assert "set CUDA_HOME" in result.stderr and "SORA_BUILD=cpu" in result.stderr


def test_unknown_mode_fails(small_tree):
    result = small_tree.build("gpu")
    assert not result.ok
    assert "SORA_BUILD='gpu': expected one of auto, cuda, cpu, none" in result.stderr


def test_sdist_needs_no_compiler(small_tree, no_cxx, no_nvcc):
    result = small_tree.build("cuda", "build_sdist", **no_cxx, **no_nvcc)
    assert result.ok, result.text


@pytest.mark.parametrize("name, cure", [("pybind11", "pip install 'pybind11>=2.13' ninja")])
def test_missing_build_tool_is_named(small_tree, name, cure):
    result = small_tree.build("cpu", barred=(name,))
    assert not result.ok
    assert f"the build needs {name}" in result.stderr and cure in result.stderr


def test_system_ninja_serves_too(small_tree, tmp_path):
    marker = tmp_path / "called"
    script(tmp_path / "bin" / "ninja", f"touch {marker}; exit 3")
    result = small_tree.build(
        "cpu", barred=("ninja",), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    )
    assert not result.ok and marker.exists()


def test_source_that_does_not_compile(small_tree):
    (small_tree.path / "csrc" / "kernel.cpp").write_text("this is no C++\n")
    result = small_tree.build("cpu")
    assert not result.ok
    assert "the extension did not compile" in result.stderr and "SORA_BUILD=none" in result.stderr


def test_undefined_symbol_is_found_by_the_build(small_tree):
    (small_tree.path / "csrc" / "kernel.cpp").write_text('#include "kernel.h"\n')
    result = small_tree.build("cpu")
    assert not result.ok
    assert "was built and does not load" in result.stderr and "undefined symbol" in result.stderr


def test_nvcc_may_be_a_wrapper_script(small_tree, python, nvcc, tmp_path):
    """Its own folder says nothing about the toolkit: nvcc itself must be asked."""
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec "{nvcc.path}" "$@"')
    result = small_tree.build("cuda", CUDACXX=str(wrapper), SORA_CUDA_ARCHS=nvcc.archs[-1])
    info = report(small_tree, python, result)
    assert info["answer"] >= 12080
    assert info["nvcc"] == nvcc.version and info["cuda_archs"] == [nvcc.archs[-1]]


def test_auto_takes_nvcc_and_links_its_runtime_statically(small_tree, python, nvcc):
    result = small_tree.build("auto", CUDACXX=nvcc.path)
    info = report(small_tree, python, result)
    assert info["answer"] >= 12080 and info["cuda_why_not"] is None
    assert info["cuda_archs"] == nvcc.archs and info["cuda_ptx"] == nvcc.ptx
    (extension,) = small_tree.unpack(result).glob("sora_kernels/_C.*.so")
    assert b"libcudart.so" not in extension.read_bytes()
    # torch may bring a CUDA runtime of its own: ours must neither lend nor borrow a symbol.
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).cudaRuntimeGetVersion"
    said = python(code, str(extension))
    assert not said.ok and "undefined symbol: cudaRuntimeGetVersion" in said.stderr
    assert result.artifact.stat().st_size < 5e6


def test_number_of_jobs_is_checked(small_tree):
    result = small_tree.build("cpu", MAX_JOBS="many")
    assert not result.ok and "MAX_JOBS='many'" in result.stderr


def test_unknown_arch_fails(small_tree, nvcc):
    result = small_tree.build("cuda", CUDACXX=nvcc.path, SORA_CUDA_ARCHS="80;12")
    assert not result.ok
    assert "SORA_CUDA_ARCHS='80;12': nvcc has no '12'" in result.stderr


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
