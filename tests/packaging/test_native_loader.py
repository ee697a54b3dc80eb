"""sora_kernels._native tells absent from broken, and says the cure."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from sora_kernels import _native

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ASK = """
import json
from sora_kernels import _native
try:
    _native.module()
    raised = None
except RuntimeError as error:
    raised = str(error)
print(json.dumps({"status": _native.status(), "cuda": _native.cuda_status(), "raised": raised,
                  "info": _native.build_info()}))
"""
FAKE = """
import sys
assert "torch" in sys.modules, "the extension was imported before torch"
def build_info():
    return {{"cuda_runtime": {runtime}, "cuda_archs": ["80"], "cuda_ptx": "80",
             "cuda_why_not": "the build found no nvcc (looked everywhere)", "sources": ""}}
def cuda_driver_version():
    return {driver}
"""


@pytest.fixture
def ask(tmp_path, python):
    """``ask(files)``: what the loader says of a package with these files, beside an empty torch."""

    def call(files: dict[str, str | bytes], before: str = "") -> dict:
        package = tmp_path / "fake" / "sora_kernels"
        shutil.rmtree(package.parent, ignore_errors=True)
        package.mkdir(parents=True)
        (package.parent / "torch.py").write_text("")
        (package / "__init__.py").write_text("")
        shutil.copy(_native.__file__, package / "_native.py")
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (package / name).write_bytes(data)
        said = python(before + ASK, PYTHONPATH=str(package.parent), site=False)
        assert said.ok, said.text
        return json.loads(said.stdout)

    return call


def test_absent(ask):
    said = ask({})
    state, why = said["status"]
    assert state == "absent" and "without its compiled extension" in why
    assert "SORA_BUILD=cpu pip install" in why
    assert said["raised"] == why
    assert said["cuda"] == ["absent", why]
    assert said["info"] == {"extension": "absent", "why": why}


def test_extension_of_another_python_is_broken(ask):
    state, why = ask({"_C.cpython-39-x86_64-linux-gnu.so": b""})["status"]
    assert state == "broken"
    assert "_C.cpython-39-x86_64-linux-gnu.so" in why and f"loads _C{SUFFIX}" in why
    assert "pip install" in why


def test_file_that_is_no_library_is_broken(ask):
    said = ask({f"_C{SUFFIX}": b"no ELF"})
    state, why = said["status"]
    assert state == "broken" and "does not load (ImportError" in why and "pip install" in why
    assert said["raised"] == why


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "SystemError"])
def test_extension_that_raises_is_broken(ask, error):
    message = "/lib/libstdc++.so.6: version `GLIBCXX_3.4.99' not found"
    state, why = ask({"_C.py": f'raise {error}("{message}")'})["status"]
    assert state == "broken" and message in why and error in why


def test_torch_comes_first(ask):
    """FAKE asserts it. The other order would load a second OpenMP runtime."""
    assert ask({"_C.py": FAKE.format(runtime=None, driver=0)})["status"] == ["ok", ""]


def test_cpu_build_has_no_cuda_part(ask):
    state, why = ask({"_C.py": FAKE.format(runtime=None, driver=0)})["cuda"]
    assert state == "absent" and "the build found no nvcc (looked everywhere)" in why
    assert "SORA_BUILD=cuda" in why


@pytest.mark.parametrize(
    "runtime, driver, state, words",
    [
        (
            13000,
            12080,
            "broken",
            ["CUDA 12.8", "CUDA 13.0", "update the driver", "CUDA 12 toolkit"],
        ),
        (13000, 0, "absent", ["no NVIDIA driver"]),
        (13000, 13000, "ok", []),
        (13010, 13000, "ok", []),
        (12080, 13000, "ok", []),
    ],
)
def test_driver_against_runtime(ask, runtime, driver, state, words):
    expected = _native.driver_status(runtime, driver)
    assert expected.state == state and all(word in expected.why for word in words)
    said = ask({"_C.py": FAKE.format(runtime=runtime, driver=driver)})
    assert said["status"] == ["ok", ""]
    assert said["cuda"][0] == state and all(word in said["cuda"][1] for word in words)


@pytest.mark.parametrize(
    "capability, archs, ptx, state",
    [
        ((8, 0), ["80", "90"], "90", "ok"),
        ((8, 6), ["80", "90"], None, "ok"),
        ((9, 0), ["80", "90a"], None, "ok"),
        ((7, 5), ["80", "90"], "90", "broken"),
        ((8, 0), ["86"], "86", "broken"),
        ((10, 0), ["80", "90"], "90", "ok"),
        ((10, 0), ["80", "90"], None, "broken"),
        ((10, 0), ["90a"], None, "broken"),
        ((10, 3), ["100a"], None, "broken"),
        ((10, 3), ["100f"], None, "ok"),
        ((12, 1), ["120"], None, "ok"),
        ((11, 0), ["100", "120"], "120", "broken"),
    ],
)
def test_code_for_a_gpu(capability, archs, ptx, state):
    found = _native.arch_status(capability, archs, ptx)
    assert found.state == state
    if state == "broken":
        number = f"{capability[0]}{capability[1]}"
        assert f"SORA_CUDA_ARCHS={number}" in found.why and f"sm_{archs[0]}" in found.why


def test_older_minor_driver_runs_machine_code_but_no_newer_ptx(monkeypatch):
    class Extension:
        @staticmethod
        def build_info():
            return {"cuda_runtime": 13010, "cuda_archs": ["80"], "cuda_ptx": "80"}

        @staticmethod
        def cuda_driver_version():
            return driver

    monkeypatch.setattr(_native, "_load", lambda: (_native.Status("ok"), Extension))
    driver = 13000
    assert _native.cuda_status((8, 0)).ok
    assert _native.cuda_status((9, 0)).state == "broken"
    driver = 13010
    assert _native.cuda_status((9, 0)).ok


def test_source_tree_that_hides_the_installed_package(root, site, python, tmp_path):
    """Python started in a clone imports the clone's package, which has no compiled extension."""
    clone = tmp_path / "clone"
    shutil.copytree(
        root / "sora_kernels",
        clone / "sora_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    said = python(ASK, cwd=clone, PYTHONPATH=str(site))
    assert said.ok, said.text
    state, why = json.loads(said.stdout)["status"]
    assert state == "absent"
    assert f"the source tree in {clone}" in why and str(site / "sora_kernels") in why
    assert "pip install -e ." in why
    elsewhere = json.loads(python(ASK, PYTHONPATH=str(site)).stdout)
    assert elsewhere["status"] == ["ok", ""]


def test_editable_install_of_another_tree_does_not_lend_its_extension(ask, tmp_path):
    """Its finder answers for ``sora_kernels._C`` whatever package asks."""
    other = tmp_path / "other" / "sora_kernels" / "_C.py"
    other.parent.mkdir(parents=True)
    other.write_text(FAKE.format(runtime=None, driver=0))
    finder = f"""
import sys
from importlib.util import spec_from_file_location
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return spec_from_file_location(name, {str(other)!r}) if name == "sora_kernels._C" else None
sys.meta_path.append(Finder)
"""
    state, why = ask({}, before=finder)["status"]
    assert state == "absent" and str(other.parent) in why and "pip install -e ." in why
    assert ask({"_C.py": FAKE.format(runtime=None, driver=0)}, before=finder)["status"][0] == "ok"


def test_digest_sees_names_and_contents(tmp_path):
    source = tmp_path / "csrc" / "a" / "kernel.cu"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    digests = {_native.source_digest(tmp_path)}
    source.write_text("2")
    digests.add(_native.source_digest(tmp_path))
    source = source.rename(source.with_suffix(".cpp"))
    digests.add(_native.source_digest(tmp_path))
    source.with_suffix(".h").write_text("")
    digests.add(_native.source_digest(tmp_path))
    assert len(digests) == 4
    for ignored in ("a/README.md", "emu/fiber.cpp"):
        path = tmp_path / "csrc" / ignored
        path.parent.mkdir(exist_ok=True)
        path.write_text("3")
    assert _native.source_digest(tmp_path) in digests


def test_stub_says_what_the_extension_has():
    extension = _native.module() if _native.status().ok else pytest.skip(_native.status().why)
    nodes = [
        node
        for node in ast.parse(Path(_native.PACKAGE, "_C.pyi").read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    stub = {node.name: [a.arg for a in node.args.args] for node in nodes}
    of_cuda = {node.name for node in nodes if "Only in a build with CUDA" in ast.unparse(node)}
    own = {name: getattr(extension, name) for name in dir(extension) if not name.startswith("_")}
    classes = {name for name, value in own.items() if isinstance(value, type)}
    assert classes == {
        node.name
        for node in ast.parse(Path(_native.PACKAGE, "_C.pyi").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    functions = set(own) - classes
    assert functions <= set(stub) and set(stub) - functions <= of_cuda
    for name in functions:
        signature = getattr(extension, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == stub[name], signature
