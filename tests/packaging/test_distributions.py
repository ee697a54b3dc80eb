"""What the sdist and the wheel carry. The wheel is made from the sdist, with torch out of reach."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip(
        "tomli", reason="reading pyproject.toml needs Python 3.11 or tomli"
    )

PACKAGES = {"sora_kernels": "sora_kernels", "sora_models": "python/sora_models"}
DATA = ("py.typed", "*.pyi", "*.md", "*.json")


def files(folder: Path, *patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return {p.relative_to(folder).as_posix() for p in found if "__pycache__" not in p.parts}


def test_sdist_has_every_source(copied, sdist):
    kinds = ("*.h", "*.cuh", "*.cpp", "*.cu", "*.py", "*.md")
    wanted = files(copied / "csrc", *kinds)
    assert {"module.cpp", "toolchain.py", "lstm/lstm.h", "lstm/bind.cpp"} <= wanted
    assert wanted <= files(sdist / "csrc", "*")


@pytest.mark.parametrize("package", PACKAGES)
def test_sdist_has_every_module_and_its_data(copied, sdist, package):
    folder = PACKAGES[package]
    wanted = files(copied / folder, "*.py", *DATA)
    assert wanted and wanted <= files(sdist / folder, "*")


def test_sdist_can_be_tested(copied, sdist):
    assert files(copied / "tests", "*.py") <= files(sdist / "tests", "*.py")
    for name in ("Makefile", "requirements-dev.txt", "LICENSE", "README.md", "setup.py"):
        assert (sdist / name).is_file() == (copied / name).is_file(), name


def test_sdist_has_nothing_built(sdist):
    assert not files(sdist, "*.so", "*.pyc", "*.o", "build.ninja")


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_has_every_module_and_its_data(copied, wheel, package):
    wanted = {f"{package}/{name}" for name in files(copied / PACKAGES[package], "*.py", *DATA)}
    assert wanted <= set(wheel.names())


def test_wheel_has_every_tuned_config(copied, wheel):
    tuned = {f"sora_kernels/{f}" for f in files(copied / "sora_kernels", "ops/*/tuned/*.json")}
    assert tuned and tuned <= set(wheel.names())


def test_wheel_has_packages_and_one_extension_only(wheel):
    names = wheel.names()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == set(PACKAGES)
    assert sum(name.endswith((".so", ".pyd")) for name in names) == 1
    assert wheel.artifact.stat().st_size < 5e6


def test_extension_names_no_folder_of_the_build(wheel_tree, site):
    (extension,) = site.glob("sora_kernels/_C.*.so")
    assert str(wheel_tree.path.parent).encode() not in extension.read_bytes()


def test_installed_wheel_works_away_from_its_source(site, python):
    code = """
    import json, sora_kernels, sora_models
    from sora_kernels import _native
    print(json.dumps([sora_kernels.__file__, *_native.status(), _native.build_info()["mode"]]))
    """
    said = python(code, PYTHONPATH=str(site))
    assert said.ok, said.text
    file, state, why, mode = eval(said.stdout)
    assert Path(file).is_relative_to(site)
    assert (state, why, mode) == ("ok", "", "cpu")


def test_metadata(root, site):
    (info,) = site.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    version = re.search(r'__version__ = "(.+)"', (root / "sora_kernels/_version.py").read_text())
    assert metadata["Version"] == version[1]
    assert metadata["License-Expression"] == "Apache-2.0"
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.split(r"[^\w-]", r)[0] for r in core} == {"torch", "numpy", "triton"}
    (triton,) = (r for r in core if r.startswith("triton"))
    assert "sys_platform" in triton and "aarch64" in triton
    assert (info / "entry_points.txt").read_text().split() == (
        ["[console_scripts]", "sora", "=", "sora_models.cli:main"]
    )


def test_build_wants_no_torch_and_nobody_pins_it(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert not any("torch" in r for r in project["build-system"]["requires"])
    (torch,) = (r for r in project["project"]["dependencies"] if r.startswith("torch"))
    assert torch == "torch>=2.11"


def test_version_is_written_once(root):
    (version,) = re.findall(r'= "(.+)"', (root / "sora_kernels" / "_version.py").read_text())
    for name in ("pyproject.toml", "setup.py", "sora_kernels/__init__.py"):
        assert f'"{version}"' not in (root / name).read_text(), name


def test_sources_are_python_3_10(root):
    """The oldest Python promised; test_other_pythons asks its own parser where it is here."""
    for folder in ("sora_kernels", "python", "csrc", "."):
        pattern = "*.py" if folder == "." else "**/*.py"
        for path in (root / folder).glob(pattern):
            ast.parse(path.read_text(), str(path), feature_version=(3, 10))


def test_extension_in_use_is_built_from_these_sources(root):
    """An edit of csrc/ without a rebuild would test the old kernels."""
    from sora_kernels import _native

    if not _native.PACKAGE.is_relative_to(root) or not _native.status().ok:
        pytest.skip("the extension in use is not the tree's")
    assert _native.stale() == ""
    assert Path(_native.module().__file__).stat().st_size < 5e6


@pytest.mark.slow
def test_isolated_build_needs_nothing_but_pip(small_tree, tmp_path, environment):
    """As ``pip install .`` does it: in an environment of its own, with tools from the index."""
    tree = str(small_tree.path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), tree]
    env = environment(SORA_BUILD="cpu")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    unreachable = r"No matching distribution|Could not fetch|NewConnectionError|No module named pip"
    if done.returncode and re.search(unreachable, done.stdout + done.stderr):
        pytest.skip("there is no pip, or no package index that it can reach")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert "none-any" not in built.name
