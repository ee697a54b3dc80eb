"""Builds sora_kernels._C: C++ and CUDA objects in parallel by ninja, free of torch.

    SORA_BUILD=auto    (default) CUDA where nvcc works, else C++ only, else pure Python; one line says which
    SORA_BUILD=cuda    C++ and CUDA, or an error that names the missing piece
    SORA_BUILD=cpu     C++ only, or an error
    SORA_BUILD=none    pure Python
    SORA_CUDA_ARCHS    such as "80;90a;120"; default: 80, 90, 100, 120 as far as nvcc has them
    MAX_JOBS           compilers at a time; default: by cores and memory
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, CUDACXX, CUDAHOSTCXX   as everywhere
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build as _build
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.command.editable_wheel import editable_wheel as _editable_wheel

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "sora_kernels" / "_version.py"))["__version__"]
MODES = ("auto", "cuda", "cpu", "none")
MIN_NVCC = (12, 8)
DEFAULT_ARCHS = ("80", "90", "100", "120")
BYTES_PER_JOB = 2 << 30


def say(line: str) -> None:
    print(f"sora_kernels: {line}", file=sys.stderr, flush=True)


def fail(line: str) -> NoReturn:
    raise SystemExit(f"sora_kernels: {line}")


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=env, **kwargs)


class Missing(NamedTuple):
    """A piece of the toolchain that is not there: what, and the command that mends it."""

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

    @property
    def gencodes(self) -> list[str]:
        """Machine code for each architecture, and PTX of the newest that a later GPU can take."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        if ptx := self.ptx:
            codes.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
        return codes

    @property
    def ptx(self) -> str | None:
        portable = [a for a in self.archs if a.isdigit()]
        return max(portable, key=int, default=None)


@cache
def find_cxx() -> Cxx | Missing:
    """The C++17 compiler: $CXX, else g++, c++, clang++ from PATH, checked on a real file."""
    if sys.platform == "win32":
        return Missing("a supported platform (the extension builds on Linux and macOS)", "use WSL")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return Missing(
            f"the Python headers ({header})",
            f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev",
        )
    cure = "apt-get install g++  (or set CXX)"
    named = os.environ.get("CXX", "").strip()
    commands = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    commands = [c for c in commands if shutil.which(c[0])]
    if not commands:
        return Missing(f"a C++17 compiler ({f'CXX={named}' if named else 'g++, c++, clang++'})", cure)
    command = commands[0]
    source = "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>().size(); }"
    flags = ["-std=c++17", f"-I{header.parent}", "-x", "c++"]
    probe = run([*command, *flags, "-fsyntax-only", "-"], input=source)
    if probe.returncode:
        return Missing(f"a C++17 compiler that works ({command[0]}: {last_line(probe.stderr)})", cure)
    macros = run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    found = re.search(r'#define __VERSION__ "(.*)"', macros)
    clang = "__clang__" in macros
    # torch carries libgomp; clang would bring libomp, and two runtimes in one process fight.
    openmp = sys.platform == "linux" and not clang
    version = f"{Path(command[0]).name} {found[1] if found else ''}".strip()
    return Cxx(command, version, openmp)


@cache
def find_nvcc() -> Nvcc | Missing:
    """The CUDA compiler, asked for its toolkit: the file itself may be a wrapper script."""
    cure = f"install the CUDA toolkit, {dotted(MIN_NVCC)} or later, and set CUDA_HOME to it"
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    candidates = [os.environ.get("CUDACXX"), *(os.path.join(h, "bin", "nvcc") for h in homes)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((p for c in candidates if c and (p := shutil.which(c))), None)
    if path is None:
        return Missing("nvcc (looked at CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)", cure)
    release = re.search(r"release \d+\.\d+, V(\d+)\.(\d+)\.(\d+)", run([path, "--version"]).stdout)
    if release is None:
        return Missing(f"an nvcc that answers --version ({path} does not)", cure)
    version = release[0].rpartition("V")[2]
    if (int(release[1]), int(release[2])) < MIN_NVCC:
        return Missing(f"nvcc {dotted(MIN_NVCC)} or later ({path} is {version})", cure)
    lists = [run([path, flag]).stdout for flag in ("--list-gpu-code", "--list-gpu-arch")]
    known = set(re.findall(r"(?:sm|compute)_(\d+)\b", "\n".join(lists)))
    archs = chosen_archs(known, f"nvcc {version}")
    # -dryrun prints the toolkit's folders on stderr as the shell variables of its own commands.
    dry = run([path, "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull]).stderr
    folders = {
        name: re.findall(rf'"?-{flag}"? ?"?([^" ]+)"?', "".join(re.findall(rf"#\$ {name}=(.*)", dry)))
        for name, flag in (("INCLUDES", "I"), ("SYSTEM_INCLUDES", "isystem"), ("LIBRARIES", "L"))
    }
    libraries = [d for d in folders["LIBRARIES"] if Path(d, "libcudart_static.a").is_file()]
    if not libraries:
        return Missing(f"libcudart_static.a in the toolkit of {path}", cure)
    nvcc = Nvcc(path, version, archs, folders["INCLUDES"] + folders["SYSTEM_INCLUDES"], libraries)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <vector>\n__global__ void probe() {}\n")
        flags = [*host_compiler(), nvcc.gencodes[0], "-std=c++17", "-c", str(source)]
        probe = run([path, *flags, "-o", str(source.with_suffix(".o"))])
    if probe.returncode:
        return Missing(
            f"an nvcc that compiles ({path} {version}: {last_line(probe.stderr)})",
            "set CUDAHOSTCXX to a host compiler that this nvcc supports",
        )
    return nvcc


def chosen_archs(known: set[str], who: str) -> list[str]:
    asked = os.environ.get("SORA_CUDA_ARCHS", "")
    tokens = [t.lower().removeprefix("sm_").replace(".", "") for t in re.split(r"[;,\s]+", asked) if t]
    if not tokens:
        return [a for a in DEFAULT_ARCHS if a in known]
    for token in tokens:
        if not re.fullmatch(r"\d{2,3}[af]?", token) or token.rstrip("af") not in known:
            have = ", ".join(sorted(known, key=int))
            fail(f"SORA_CUDA_ARCHS={asked!r}: {token!r} is none of what {who} compiles for ({have})")
    return list(dict.fromkeys(tokens))


def host_compiler() -> list[str]:
    host = os.environ.get("CUDAHOSTCXX") or (
        os.environ.get("CXX") if not os.environ.get("NVCC_CCBIN") else None
    )
    return [f"-ccbin={host}"] if host else []


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def last_line(text: str) -> str:
    return next((line for line in text.splitlines() if "error" in line), text.strip()[-200:])


@cache
def mode() -> str:
    asked = os.environ.get("SORA_BUILD", "") or "auto"
    if asked not in MODES:
        fail(f"SORA_BUILD={asked!r}: expected one of {', '.join(MODES)}")
    return asked


def has_extension() -> bool:
    """Whether this build makes _C. An explicit choice says yes here and fails, if it must, when it compiles:
    metadata and sdists need no compiler."""
    return mode() in ("cuda", "cpu") or (mode() == "auto" and isinstance(find_cxx(), Cxx))


def toolchain() -> tuple[Cxx, Nvcc | None, str | None]:
    """The compilers to use, and why there is no CUDA part if there is none."""
    cxx = find_cxx()
    if isinstance(cxx, Missing):
        fail(f"SORA_BUILD={mode()} needs {cxx.what}. Mend: {cxx.cure}. Without: SORA_BUILD=none")
    if mode() == "cpu":
        return cxx, None, "built with SORA_BUILD=cpu"
    nvcc = find_nvcc()
    if isinstance(nvcc, Nvcc):
        return cxx, nvcc, None
    if mode() == "cuda":
        fail(f"SORA_BUILD=cuda needs {nvcc.what}. Mend: {nvcc.cure}. Without: SORA_BUILD=cpu")
    say(f"building without the CUDA part: no {nvcc.what.removeprefix('an ')}. To have it: {nvcc.cure}")
    return cxx, None, f"there was no {nvcc.what.removeprefix('an ')} when it was built"


def commit() -> str | None:
    """The commit of a checkout, with +dirty where the built files differ from it; None in an sdist."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    head = run(["git", "rev-parse", "HEAD"], cwd=ROOT)
    if head.returncode:
        return None
    changed = run(["git", "status", "--porcelain", "--", "csrc", "setup.py"], cwd=ROOT).stdout
    return head.stdout.strip() + ("+dirty" if changed.strip() else "")


def sources(*suffixes: str) -> list[str]:
    """Files of csrc/ relative to the root, without the host emulation that only tests compile."""
    files = sorted((ROOT / "csrc").rglob("*"))
    files = [f.relative_to(ROOT) for f in files if f.suffix in suffixes]
    return [f.as_posix() for f in files if f.parts[1] != "emu"]


def jobs() -> int:
    if asked := os.environ.get("MAX_JOBS"):
        return max(1, int(asked))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores or 1, memory // BYTES_PER_JOB))


class build_ext(_build_ext):
    def run(self) -> None:
        self.toolchain = toolchain()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            fail("the build needs pybind11. Mend: pip install 'pybind11>=2.13' ninja 'setuptools>=77'")
        cxx, nvcc, why_no_cuda = self.toolchain
        info = {
            "version": VERSION,
            "mode": mode(),
            "python": platform.python_version(),
            "pybind11": pybind11.__version__,
            "cxx": cxx.version,
            "nvcc": nvcc.version if nvcc else None,
            "cuda_archs": nvcc.archs if nvcc else [],
            "cuda_ptx": nvcc.ptx if nvcc else None,
            "cuda_why_not": why_no_cuda,
            "commit": commit(),
            "sources": runpy.run_path(str(ROOT / "sora_kernels" / "_native.py"))["source_digest"](ROOT),
        }
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        made_by = json.dumps([info[k] for k in ("python", "pybind11", "cxx", "nvcc")])
        stamp = folder / "made_by"
        if folder.exists() and not (stamp.exists() and stamp.read_text() == made_by):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(made_by)
        write_if_changed(
            folder / "sora_build_info.inc", f'R"sora_info({json.dumps(info, sort_keys=True)})sora_info"\n'
        )
        built = folder.relative_to(ROOT) / Path(self.get_ext_filename(ext.name)).name
        write_if_changed(
            folder / "build.ninja", ninja_file(folder.relative_to(ROOT), built, cxx, nvcc, pybind11.get_include())
        )
        command = [ninja(), "-C", str(ROOT), "-f", str(folder / "build.ninja"), f"-j{jobs()}"]
        if subprocess.run(command).returncode:
            without = "SORA_BUILD=cpu builds without CUDA; " if nvcc else ""
            fail(f"the extension did not compile (above). {without}SORA_BUILD=none installs pure Python")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(ROOT / built, target)


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return os.path.join(BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or fail("the build needs ninja. Mend: pip install ninja")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_file(folder: Path, built: Path, cxx: Cxx, nvcc: Nvcc | None, pybind11_include: str) -> str:
    """All objects and the link as one ninja graph. Ninja compares command lines and depfiles, so an object
    made with other flags (without CUDA, say) is never reused. It runs in ROOT: no machine path in a binary."""

    def shell(*words: str | Path) -> str:
        return shlex.join(map(str, words)).replace("$", "$$")

    def path(p: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    def env(name: str) -> list[str]:
        return shlex.split(os.environ.get(name, ""))

    python = sysconfig.get_paths()
    system = [python["include"], python["platinclude"], pybind11_include, *(nvcc.include_dirs if nvcc else [])]
    defines = ["-DSORA_WITH_CUDA=1"] if nvcc else []
    openmp = ["-fopenmp"] if cxx.openmp else ["-Wno-unknown-pragmas"]
    includes = ["-Icsrc", f"-I{folder}"]
    cxxflags = ["-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
    cxxflags += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", *openmp, *defines, *includes]
    for directory in dict.fromkeys(system):
        cxxflags += ["-isystem", directory]
    cxxflags += [*env("ARCHFLAGS"), *env("CPPFLAGS"), *env("CXXFLAGS")]
    if sys.platform == "darwin":
        ldflags = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-x"]
    else:
        ldflags = ["-shared", "-Wl,-s", *(["-fopenmp"] if cxx.openmp else [])]
    libraries: list[str] = []
    if nvcc:
        libraries = [*(f"-L{d}" for d in nvcc.library_dirs), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {path(folder)}",
        "rule cxx",
        f"  command = {shell(*cxx.command, *cxxflags)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
        "rule link",
        f"  command = {shell(*cxx.command, *ldflags)} $in -o $out "
        f"{shell(*libraries, *env('ARCHFLAGS'), *env('LDFLAGS'))}",
        "  description = link $out",
    ]
    if nvcc:
        host = ",".join(["-fPIC", "-fvisibility=hidden"])
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "--cudart=static", *host_compiler(), *nvcc.gencodes]
        flags += [f"-Xcompiler={host}", "--threads=2", *defines, *includes]
        lines += [
            "rule nvcc",
            f"  command = {shell(nvcc.path, *flags)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
        ]
    objects = []
    for source in sources(".cpp", ".cu") if nvcc else sources(".cpp"):
        objects.append(path(folder / f"{source}.o"))
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {path(source)}")
    lines += [f"build {path(built)}: link {' '.join(objects)}", f"default {path(built)}", ""]
    return "\n".join(lines)


class build(_build):
    def run(self) -> None:
        # A module or extension that an earlier build left in build/lib would go into the wheel.
        lib = Path(self.build_lib).resolve()
        if ROOT / "build" in lib.parents:
            shutil.rmtree(lib, ignore_errors=True)
        super().run()


class editable_wheel(_editable_wheel):
    def run(self) -> None:
        if not has_extension():
            stale = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
            (ROOT / "sora_kernels" / stale).unlink(missing_ok=True)
        super().run()


def extensions() -> list[Extension]:
    if has_extension():
        headers = sources(".h", ".cuh")
        return [Extension("sora_kernels._C", sources(".cpp", ".cu"), depends=headers)]
    if {"bdist_wheel", "editable_wheel"} & set(sys.argv):
        cxx = find_cxx()
        why = "SORA_BUILD=none" if mode() == "none" else f"no {cxx.what}. To have it: {cxx.cure}"
        say(f"installing pure Python, without the native extension: {why}")
    return []


setup(
    ext_modules=extensions(),
    cmdclass={"build": build, "build_ext": build_ext, "editable_wheel": editable_wheel},
)
