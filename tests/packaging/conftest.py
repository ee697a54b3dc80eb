from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_TOOLS = ("setuptools", "pybind11", "ninja")
# Variables that steer a build or an import; every subprocess starts without them.
STEERING = (
    "SORA_",
    "CUDA",
    "NVCC",
    "CXX",
    "CPPFLAGS",
    "LDFLAGS",
    "ARCHFLAGS",
    "MAX_JOBS",
    "TRITON",
)
STEERING += ("PYTHONPATH", "OMP_", "KMP_", "SETUPTOOLS_", "COV_")

# A build hook as pip calls it, off sys.path. torch is barred, and what else is named.
HOOK = """
import sys
hook, out, *barred = sys.argv[1:]
sys.path = [p for p in sys.path if p]
for name in ("torch", *barred):
    sys.modules[name] = None
from setuptools import build_meta
sys.stdout.write("built:" + getattr(build_meta, hook)(out))
"""


def clean_env(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(STEERING)}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **extra}


class Result:
    """A finished subprocess; ``artifact`` is the file that a build hook made."""

    def __init__(self, done: subprocess.CompletedProcess[str], out: Path | None = None) -> None:
        self.ok = done.returncode == 0
        self.code = done.returncode
        self.stdout, self.stderr = done.stdout, done.stderr
        self.text = done.stdout + done.stderr
        self.artifact = None
        if self.ok and out is not None:
            self.artifact = out / done.stdout.rpartition("built:")[2].strip()

    def names(self) -> list[str]:
        assert self.artifact is not None, self.text
        with zipfile.ZipFile(self.artifact) as wheel:
            return wheel.namelist()


def run_python(
    code: str, *args: str, cwd: Path, site: bool = True, timeout: float = 120, **env: str
) -> Result:
    """Runs ``code`` in a fresh interpreter, ``site=False``: one that sees no installed package."""
    command = [sys.executable, *([] if site else ["-S"]), "-c", textwrap.dedent(code), *args]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=clean_env(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the children that it forked
        stdout, stderr = process.communicate()
        stderr += f"\ntimed out after {timeout} s"
    return Result(subprocess.CompletedProcess(command, process.returncode, stdout, stderr))


class Tree:
    """A source tree that builds can be made from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def build(
        self,
        mode: str = "",
        hook: str = "build_wheel",
        *,
        barred: tuple[str, ...] = (),
        python: str = sys.executable,
        **env: str,
    ) -> Result:
        out = self.path.parent / f"out-{self.path.name}"
        out.mkdir(exist_ok=True)
        if mode:
            env["SORA_BUILD"] = mode
        done = subprocess.run(
            [python, "-c", HOOK, hook, str(out), *barred],
            cwd=self.path,
            env=clean_env(**env),
            capture_output=True,
            text=True,
            timeout=600,
        )
        return Result(done, out)

    def unpack(self, result: Result, name: str = "site") -> Path:
        """The wheel's content in a folder to put on PYTHONPATH."""
        assert result.artifact is not None, result.text
        site = self.path.parent / f"{name}-{self.path.name}"
        shutil.rmtree(site, ignore_errors=True)
        with zipfile.ZipFile(result.artifact) as wheel:
            wheel.extractall(site)
        return site


@pytest.fixture(scope="session")
def root() -> Path:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run outside a source tree")
    return ROOT


@pytest.fixture(scope="session")
def build_tools() -> None:
    """Builds here run without isolation and without a network: on the tools that are installed."""
    missing = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"building without isolation needs {', '.join(missing)}")


@pytest.fixture(scope="session")
def toolchain(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchain", root / "csrc" / "toolchain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cxx(toolchain: ModuleType):
    found = toolchain.find_cxx()
    if isinstance(found, toolchain.Missing):
        pytest.skip(f"no {found.what}")
    return found


@pytest.fixture(scope="session")
def nvcc(toolchain: ModuleType):
    found = toolchain.find_nvcc()
    if isinstance(found, toolchain.Missing):
        pytest.skip(f"no {found.what}")
    return found


MODULE = """
#include <Python.h>
#include "kernel.h"

static PyObject* build_info(PyObject*, PyObject*) {
  return PyUnicode_FromString(
#include "sora_build_info.inc"
  );
}
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(sora::answer()); }
static PyMethodDef methods[] = {
  {"build_info", build_info, METH_NOARGS, ""}, {"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
KERNEL_H = "#pragma once\nnamespace sora { constexpr int kAnswer = 1; int answer(); }\n"
# Without CUDA the answer is kAnswer, with it the version of the CUDA runtime that was linked.
KERNEL_CPP = """
#include "kernel.h"
#ifndef SORA_WITH_CUDA
int sora::answer() { return kAnswer; }
#endif
"""
KERNEL_CU = """
#include <cuda_runtime_api.h>
#include "kernel.h"
__global__ void touch(int* p) { *p = sora::kAnswer; }
int sora::answer() { int v = 0; cudaRuntimeGetVersion(&v); return v; }
"""


@pytest.fixture
def small_tree(root: Path, tmp_path: Path, build_tools: None, cxx) -> Tree:
    """The real build files around a package of three small sources: builds in a second or two."""
    tree = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "csrc/toolchain.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tree / name)
    package = tree / "sora_kernels"
    package.mkdir()
    for name in ("_version.py", "_native.py", "py.typed"):
        shutil.copy(root / "sora_kernels" / name, package / name)
    (package / "__init__.py").write_text("")
    (tree / "README.md").write_text("small\n")
    (tree / "csrc" / "module.cpp").write_text(MODULE)
    (tree / "csrc" / "kernel.h").write_text(KERNEL_H)
    (tree / "csrc" / "kernel.cpp").write_text(KERNEL_CPP)
    (tree / "csrc" / "kernel.cu").write_text(KERNEL_CU)
    return Tree(tree)


@pytest.fixture
def environment() -> Callable[..., dict[str, str]]:
    """``environment(**more)``: the process's own, without what steers builds and imports."""
    return clean_env


@pytest.fixture
def no_nvcc(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine without the CUDA toolkit."""
    return {"CUDA_HOME": str(tmp_path / "no-cuda")}


@pytest.fixture
def no_cxx() -> dict[str, str]:
    """Environment of a machine without a C++ compiler."""
    return {"CXX": "no-such-compiler"}


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Result]:
    """``python(code, *args, **options_of_run_python)``, by default in an empty folder."""
    return functools.partial(run_python, cwd=tmp_path)


@pytest.fixture(scope="session")
def python_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """``python`` for fixtures of a wider scope."""
    return functools.partial(run_python, cwd=tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def copied(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, with nothing that was built in it."""
    copy = tmp_path_factory.mktemp("copied") / "tree"
    skipped = shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so", "__pycache__", ".*")
    shutil.copytree(root, copy, ignore=skipped)
    return copy


@pytest.fixture(scope="session")
def sdist(copied: Path, build_tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's source distribution, unpacked."""
    result = Tree(copied).build("none", "build_sdist")
    assert result.ok, result.text
    assert result.artifact is not None
    folder = tmp_path_factory.mktemp("sdist")
    shutil.unpack_archive(result.artifact, folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="session")
def wheel_tree(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(Path(shutil.copytree(sdist, tmp_path_factory.mktemp("wheel") / "tree")))


@pytest.fixture(scope="session")
def wheel(root: Path, wheel_tree: Tree, cxx) -> Result:
    """The project's wheel, made from its sdist, CPU part only. Objects that the source tree has are taken over, to
    be quick: ninja makes again what differs from the sdist.
    """
    found = [folder for folder in (root / "build").glob("ninja-*") if (folder / "made_by").exists()]
    for folder in found:
        shutil.copytree(folder, wheel_tree.path / "build" / folder.name)
    result = wheel_tree.build("cpu", **({} if found else {"CXXFLAGS": "-O0"}))
    assert result.ok, result.text
    return result


@pytest.fixture(scope="session")
def site(wheel_tree: Tree, wheel: Result) -> Path:
    """The wheel, installed in a folder of its own."""
    return wheel_tree.unpack(wheel)
