"""The compilers of the extension: found, tried on a small file, and asked what they can do.

Used by ``setup.py``. Free of setuptools and of state: the tests call it on compilers of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

MIN_NVCC = (12, 8)
DEFAULT_ARCHS = ("80", "90", "100", "120")


class Missing(NamedTuple):
    """A piece that is not there, and what mends it. Reads as "needs {what}" and "no {what}"."""

    what: str
    cure: str


class Cxx(NamedTuple):
    command: list[str]
    version: str
    openmp: bool


class Nvcc(NamedTuple):
    path: str
    version: str
    archs: list[str]
    include_dirs: list[str]
    library_dirs: list[str]
    host_flags: list[str]

    @property
    def ptx(self) -> str | None:
        """The oldest architecture whose PTX later GPUs take: never an ``a`` or ``f`` variant."""
        return min((a for a in self.archs if a.isdigit()), key=int, default=None)

    @property
    def gencodes(self) -> list[str]:
        """Machine code for each architecture, and PTX. A source is compiled to PTX once, for the oldest: that
        is two thirds of the time, and the machine code is the same where no newer instruction is asked for.
        """
        own, shared = list(self.archs), []
        if self.ptx is not None:
            shared = [a for a in own if int(a.rstrip("af")) >= int(self.ptx)]
            own = [a for a in own if a not in shared]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in own]
        if shared:
            machine = ",".join(f"sm_{a}" for a in shared)
            codes.append(f"-gencode=arch=compute_{self.ptx},code=[{machine},compute_{self.ptx}]")
        return codes


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


def find_cxx() -> Cxx | Missing:
    """The C++17 compiler: $CXX, else the first of g++, c++, clang++ on PATH."""
    if sys.platform == "win32":
        return Missing("Linux or macOS (the extension is not built on Windows)", "use WSL")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return Missing(f"Python headers ({header})", f"apt-get install {package}")
    cure = "apt-get install g++, or set CXX"
    if named := os.environ.get("CXX", "").strip():
        command, sought = shlex.split(named), f"CXX={named}"
    else:
        names = ("g++", "c++", "clang++")
        command = next(([name] for name in names if shutil.which(name)), ["g++"])
        sought = ", ".join(names) + " on PATH"
    if shutil.which(command[0]) is None:
        return Missing(f"C++17 compiler (looked for {sought})", cure)
    source = (
        "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>{}.size(); }\n"
    )
    flags = ["-std=c++17", f"-I{header.parent}", "-fsyntax-only", "-x", "c++", "-"]
    if error := _error(run([*command, *flags], input=source)):
        return Missing(f"working C++17 compiler ({command[0]}: {error})", cure)
    macros = run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    version = re.search(r'#define __VERSION__ "(.*)"', macros)
    # torch carries libgomp. clang would bring libomp, and two OpenMP runtimes fight for the cores.
    openmp = sys.platform == "linux" and "__clang__" not in macros
    name = Path(command[0]).name
    return Cxx(command, f"{name} {version[1]}" if version else name, openmp)


def find_nvcc() -> Nvcc | Missing:
    """The CUDA compiler: $CUDACXX, or that of $CUDA_HOME, or from PATH, or of /usr/local/cuda."""
    cure = (
        f"install the CUDA toolkit, {_dotted(MIN_NVCC)} or later, and set CUDA_HOME to its folder"
    )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named := os.environ.get("CUDACXX") or (home and os.path.join(home, "bin", "nvcc")):
        candidates = [named]
    else:
        candidates = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((found for c in candidates if (found := shutil.which(c))), None)
    if path is None:
        return Missing(f"nvcc (looked for {named or 'it on PATH and in /usr/local/cuda'})", cure)
    release = re.search(r"V((\d+)\.(\d+)\.\d+)", run([path, "--version"]).stdout)
    if release is None:
        return Missing(f"working nvcc ({path} --version gives no version)", cure)
    if (int(release[2]), int(release[3])) < MIN_NVCC:
        return Missing(f"nvcc {_dotted(MIN_NVCC)} or later ({path} is {release[1]})", cure)
    # The file may be a wrapper script far from its toolkit. It prints the toolkit's folders as the
    # shell variables of its own commands.
    dry = run([path, "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull]).stderr
    variables = dict(re.findall(r"^#\$ (\w+)=(.*)$", dry, re.MULTILINE))
    includes = [
        word.removeprefix("-I")
        for name in ("INCLUDES", "SYSTEM_INCLUDES")
        for word in shlex.split(variables.get(name, ""))
        if word != "-isystem"
    ]
    libraries = [word.removeprefix("-L") for word in shlex.split(variables.get("LIBRARIES", ""))]
    libraries = [d for d in libraries if Path(d, "libcudart_static.a").is_file()]
    if not libraries:
        return Missing(f"libcudart_static.a beside {path}", cure)
    lists = [run([path, flag]).stdout for flag in ("--list-gpu-code", "--list-gpu-arch")]
    known = set(re.findall(r"(?:sm|compute)_(\d+)\b", "\n".join(lists)))
    archs = choose_archs(os.environ.get("SORA_CUDA_ARCHS", ""), known)
    host = os.environ.get("CUDAHOSTCXX")
    if host is None and "NVCC_CCBIN" not in os.environ:
        host = os.environ.get("CXX")
    host_flags = [f"-ccbin={host}"] if host else []
    nvcc = Nvcc(path, release[1], archs, includes, libraries, host_flags)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <vector>\n__global__ void probe() {}\n")
        flags = [*host_flags, nvcc.gencodes[0], "-std=c++17", "-c", str(source)]
        error = _error(run([path, *flags, "-o", str(source.with_suffix(".o"))]))
    if error:
        cure = "set CUDAHOSTCXX to a host compiler that this nvcc supports"
        return Missing(f"working nvcc ({path} {release[1]}: {error})", cure)
    return nvcc


def choose_archs(asked: str, known: set[str]) -> list[str]:
    """Architectures to compile for, as ``["80", "90a"]``.

    Args:
        asked: the value of SORA_CUDA_ARCHS: ``"80;90a"``, ``"sm_80,sm_90"``, ``"8.0 9.0"``, ``""``.
        known: what nvcc compiles for.
    """
    words = [word for word in re.split(r"[;,\s]+", asked.lower()) if word]
    words = [re.sub(r"^(sm|compute)_", "", word).replace(".", "") for word in words]
    if not words:
        return [arch for arch in DEFAULT_ARCHS if arch in known] or [max(known, key=int)]
    for word in words:
        if not re.fullmatch(r"\d+[af]?", word) or word.rstrip("af") not in known:
            have = ", ".join(sorted(known, key=int))
            raise SystemExit(
                f"sora_kernels: SORA_CUDA_ARCHS={asked!r}: nvcc has no {word!r} (it has {have})"
            )
    return list(dict.fromkeys(words))


def _error(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a failed compiler that says why; empty after a good one."""
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    said = [line for line in lines if "error" in line or "unsupported" in line] or lines[-1:]
    return said[0] if said else f"exit status {done.returncode}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
