"""Build and syntax under every supported Python on this machine; none of them needs torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# The build tools of this environment, for an interpreter that has none.
TOOLS = ("setuptools", "_distutils_hack", "pybind11", "ninja", "packaging")


@pytest.fixture(params=VERSIONS)
def interpreter(request) -> str:
    """An interpreter of this version, from PATH or beside the one that runs the tests."""
    name = f"python{request.param}"
    beside = sorted(Path(sys.base_prefix).resolve().parent.glob(f"*/bin/{name}"))
    check = "import sys, sysconfig, os; print('%d.%d' % sys.version_info[:2], "
    check += "os.path.exists(sysconfig.get_paths()['include'] + '/Python.h'))"
    for path in filter(None, [shutil.which(name), *map(str, beside)]):
        done = subprocess.run([path, "-c", check], capture_output=True, text=True)
        if done.stdout.split() == [request.param, "True"]:
            return path
    pytest.skip(f"there is no Python {request.param} with headers here")


@pytest.fixture
def tools(tmp_path, build_tools) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).parent
            (folder / name).symlink_to(source)
            for info in source.parent.glob(f"{name}-*.dist-info"):
                (folder / info.name).symlink_to(info)
    return folder


def test_build(small_tree, interpreter, tools, tmp_path, environment):
    result = small_tree.build("cpu", python=interpreter, PYTHONPATH=str(tools))
    assert result.ok, result.text
    site = small_tree.unpack(result)
    code = "import sora_kernels._C as C; print(C.build_info()); assert C.answer() == 1"
    env = environment(PYTHONPATH=str(site))
    done = subprocess.run([interpreter, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    tag = "cp" + "".join(map(str, json.loads(done.stdout)["python"].split(".")[:2]))
    assert f"-{tag}-{tag}-" in result.artifact.name


def test_syntax(root, interpreter):
    sources = [
        p for d in ("sora_kernels", "python", "csrc", "tests") for p in (root / d).rglob("*.py")
    ]
    code = "import sys; [compile(open(p, 'rb').read(), p, 'exec') for p in sys.argv[1:]]"
    command = [interpreter, "-c", code, str(root / "setup.py"), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
