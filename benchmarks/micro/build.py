"""``cuda/micro.cu`` as a shared library with C functions, built by nvcc when it is first needed.

Not part of the extension: the build needs neither torch nor pybind11, takes seconds for one architecture, and what it
makes is kept in ``build/micro/`` as long as its sources are as they were.
"""

from __future__ import annotations

import functools
import hashlib
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCE = Path(__file__).parent / "cuda" / "micro.cu"
CACHE = ROOT / "build" / "micro"


class CannotBuild(Exception):
    """The message says why."""


def shared_object(capability: tuple[int, int]) -> Path:
    """The library for a GPU of this compute capability.

    Raises:
        CannotBuild: there is no nvcc, it fails, or the folder cannot be written.
    """
    nvcc = find_nvcc()
    arch = arch_of(capability)
    sources = [*sorted(SOURCE.parent.iterdir()), *sorted((CSRC / "common").iterdir())]
    made_of = [nvcc.version, arch, *(path.read_text() for path in sources if path.is_file())]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    found = CACHE / f"micro-sm_{arch}-{key}.so"
    if not found.exists():
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder, found.name)
                compile_for(arch, made, "-shared", "-Xcompiler=-fPIC")
                made.rename(found)
        except OSError as why:
            raise CannotBuild(f"cannot write to {CACHE}: {why}") from why
    return found


def arch_of(capability: tuple[int, int]) -> str:
    """``"80"``, ``"90a"``: with everything that the architecture has."""
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def compile_for(arch: str, target: Path, *flags: str) -> str:
    """Compiles the source; what nvcc says beside errors."""
    nvcc = find_nvcc()
    options = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}"]
    command = [nvcc.path, *nvcc.host_flags, *options, *flags, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"nvcc: {(done.stderr + done.stdout).strip()}")
    return done.stdout + done.stderr


@functools.cache
def find_nvcc() -> Any:
    toolchain = runpy.run_path(str(CSRC / "toolchain.py"))
    found = toolchain["find_nvcc"]()
    if isinstance(found, toolchain["Missing"]):
        raise CannotBuild(f"no {found.what}")
    return found
