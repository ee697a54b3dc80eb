"""Builds sora_kernels._C: C++ and CUDA objects in parallel by ninja, free of torch.

SORA_BUILD=auto  (default) CUDA where nvcc works, else C++, else pure Python; one line says which
SORA_BUILD=cuda  C++ and CUDA, or an error that names the missing piece
SORA_BUILD=cpu   C++, or an error
SORA_BUILD=none  pure Python
SORA_CUDA_ARCHS  such as "80;90a;120"; default: 80, 90, 100, 120 as far as nvcc has them
MAX_JOBS         compilers at a time; default: by cores and memory
CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, ARCHFLAGS, CUDA_HOME, CUDACXX, CUDAHOSTCXX  as everywhere
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
from functools import cache
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build as _build
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.command.editable_wheel import editable_wheel as _editable_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402
from toolchain import Cxx, Missing, Nvcc  # noqa: E402

MODES = ("auto", "cuda", "cpu", "none")
BYTES_PER_JOB = 2 << 30
find_cxx = cache(toolchain.find_cxx)


def say(line: str) -> None:
    print(f"sora_kernels: {line}", file=sys.stderr, flush=True)


def fail(line: str) -> NoReturn:
    raise SystemExit(f"sora_kernels: {line}")


@cache
def mode() -> str:
    asked = os.environ.get("SORA_BUILD") or "auto"
    if asked not in MODES:
        fail(f"SORA_BUILD={asked!r}: expected one of {', '.join(MODES)}")
    return asked


def has_extension() -> bool:
    """Whether this build makes _C. An explicit choice is yes here and fails, if it must, when it
    compiles: sdists and metadata need no compiler."""
    return mode() in ("cuda", "cpu") or (mode() == "auto" and isinstance(find_cxx(), Cxx))


def compilers() -> tuple[Cxx, Nvcc | None, str | None]:
    """The compilers to use, and if there is no CUDA part, why."""
    cxx = find_cxx()
    if isinstance(cxx, Missing):
        fail(f"SORA_BUILD={mode()} needs {cxx.what}. Mend: {cxx.cure}. Or: SORA_BUILD=none")
    if mode() == "cpu":
        return cxx, None, "it was built with SORA_BUILD=cpu"
    nvcc = toolchain.find_nvcc()
    if isinstance(nvcc, Nvcc):
        return cxx, nvcc, None
    if mode() == "cuda":
        fail(f"SORA_BUILD=cuda needs {nvcc.what}. Mend: {nvcc.cure}. Or: SORA_BUILD=cpu")
    say(f"building without the CUDA part: no {nvcc.what}. To have it: {nvcc.cure}")
    return cxx, None, f"the build found no {nvcc.what}"


def commit() -> str | None:
    """The commit of a checkout, +dirty if what is built differs from it; None in an sdist."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    head = toolchain.run(["git", "rev-parse", "HEAD"], cwd=ROOT)
    if head.returncode:
        return None
    changes = toolchain.run(["git", "status", "--porcelain", "--", "csrc", "setup.py"], cwd=ROOT)
    return head.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")


def sources(*suffixes: str) -> list[str]:
    """Files of csrc/, relative to the root, without the host emulation that only tests compile."""
    files = [f.relative_to(ROOT) for f in sorted((ROOT / "csrc").rglob("*"))]
    return [f.as_posix() for f in files if f.suffix in suffixes and f.parts[1] != "emu"]


def jobs() -> int:
    if asked := os.environ.get("MAX_JOBS"):
        if not re.fullmatch(r"[1-9]\d*", asked):
            fail(f"MAX_JOBS={asked!r}: expected a positive integer")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores or 1, memory // BYTES_PER_JOB))


class build_ext(_build_ext):
    def run(self) -> None:
        self.compilers = compilers()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            fail("the build needs pybind11. Mend: pip install 'pybind11>=2.13' ninja")
        cxx, nvcc, why_no_cuda = self.compilers
        native = runpy.run_path(str(ROOT / "sora_kernels" / "_native.py"))
        info = {
            "version": self.distribution.get_version(),
            "mode": mode(),
            "python": platform.python_version(),
            "pybind11": pybind11.__version__,
            "cxx": cxx.version,
            "nvcc": nvcc.version if nvcc else None,
            "cuda_archs": nvcc.archs if nvcc else [],
            "cuda_ptx": nvcc.ptx if nvcc else None,
            "cuda_why_not": why_no_cuda,
            "commit": commit(),
            "sources": native["source_digest"](ROOT),
        }
        # Ninja itself redoes what other flags or other files call for; other tools it does not see.
        folder = Path("build", f"ninja-{sys.implementation.cache_tag}")
        made_by = json.dumps([info[key] for key in ("python", "pybind11", "cxx", "nvcc")])
        stamp = ROOT / folder / "made_by"
        if not stamp.exists() or stamp.read_text() != made_by:
            shutil.rmtree(ROOT / folder, ignore_errors=True)
        literal = f'R"json({json.dumps(info, sort_keys=True)})json"\n'
        built = folder / Path(self.get_ext_filename(ext.name)).name
        graph = ninja_graph(folder, built, cxx, nvcc, pybind11.get_include())
        write_if_changed(ROOT / folder / "sora_build_info.inc", literal)
        write_if_changed(ROOT / folder / "build.ninja", graph)
        write_if_changed(stamp, made_by)
        if subprocess.run(
            [ninja(), "-f", folder / "build.ninja", f"-j{jobs()}"], cwd=ROOT
        ).returncode:
            choices = (
                "SORA_BUILD=cpu leaves CUDA out, SORA_BUILD=none" if nvcc else "SORA_BUILD=none"
            )
            fail(f"the extension did not compile, see above. {choices} installs pure Python")
        check_loads(ext.name, ROOT / built)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / built, target)


class build(_build):
    def run(self) -> None:
        # What an earlier build left in build/lib would go into the wheel.
        library = Path(self.build_lib).resolve()
        if ROOT / "build" in library.parents:
            shutil.rmtree(library, ignore_errors=True)
        super().run()


class editable_wheel(_editable_wheel):
    def run(self) -> None:
        if not has_extension():
            stale = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
            (ROOT / "sora_kernels" / stale).unlink(missing_ok=True)
        super().run()


def check_loads(name: str, built: Path) -> None:
    """Finds a symbol that no source defines here, and not at the user's first call."""
    if os.environ.get("_PYTHON_HOST_PLATFORM") or os.environ.get("ARCHFLAGS"):
        return  # cross-compiled: this machine may not be able to load it
    code = "import sys; from importlib.util import *; "
    code += "module_from_spec(spec_from_file_location(*sys.argv[1:]))"
    probe = toolchain.run([sys.executable, "-c", code, name, str(built)])
    if probe.returncode:
        fail(f"the extension was built and does not load: {probe.stderr.strip().splitlines()[-1]}")


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") or fail("the build needs ninja. Mend: pip install ninja")
    return os.path.join(BIN_DIR, "ninja")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def ninja_graph(
    folder: Path, built: Path, cxx: Cxx, nvcc: Nvcc | None, pybind11_include: str
) -> str:
    """Objects and link. Paths are relative to ROOT: the binary names no machine path."""

    def env(name: str) -> list[str]:
        return shlex.split(os.environ.get(name, ""))

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(p: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    common = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", f"-I{folder}"]
    common += ["-DSORA_WITH_CUDA=1"] if nvcc else []
    hidden = ["-fPIC", "-fvisibility=hidden"]
    openmp = ["-fopenmp"] if cxx.openmp else []
    python = sysconfig.get_paths()
    system = [python["include"], python["platinclude"], pybind11_include]
    system += nvcc.include_dirs if nvcc else []
    compile_cxx = [*cxx.command, *common, *hidden, "-g0", "-fno-math-errno", "-fno-trapping-math"]
    compile_cxx += ["-Wall", "-Wextra", *(openmp or ["-Wno-unknown-pragmas"])]
    compile_cxx += [word for d in dict.fromkeys(system) for word in ("-isystem", d)]
    compile_cxx += [*env("ARCHFLAGS"), *env("CPPFLAGS"), *env("CXXFLAGS")]
    if sys.platform == "darwin":
        link = [*cxx.command, "-bundle", "-undefined", "dynamic_lookup", "-Wl,-x"]
    else:
        link = [*cxx.command, "-shared", "-Wl,-s", *openmp]
    libraries = [*env("ARCHFLAGS"), *env("LDFLAGS")]
    rules = {"cxx": f"{command(*compile_cxx)} -MMD -MF $out.d -c $in -o $out"}
    if nvcc:
        compile_cu = [nvcc.path, *common, *nvcc.host_flags, *nvcc.gencodes, "--threads=2"]
        compile_cu += [f"-Xcompiler={','.join(hidden)}"]
        rules["nvcc"] = f"{command(*compile_cu)} -MD -MF $out.d -c $in -o $out"
        libraries += [f"-L{d}" for d in nvcc.library_dirs]
        libraries += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    rules["link"] = f"{command(*link)} $in -o $out {command(*libraries)}"
    lines = ["ninja_required_version = 1.8", f"builddir = {path(folder)}"]
    for name, text in rules.items():
        lines += [f"rule {name}", f"  command = {text}", f"  description = {name} $out"]
        lines += ["  deps = gcc", "  depfile = $out.d"] if name != "link" else []
    objects = {path(folder / f"{s}.o"): s for s in sources(".cpp", *([".cu"] if nvcc else []))}
    for target, source in objects.items():
        lines.append(
            f"build {target}: {'nvcc' if source.endswith('.cu') else 'cxx'} {path(source)}"
        )
    lines += [f"build {path(built)}: link {' '.join(objects)}", f"default {path(built)}"]
    return "\n".join(lines) + "\n"


def extensions() -> list[Extension]:
    if has_extension():
        return [Extension("sora_kernels._C", sources(".cpp", ".cu"), depends=sources(".h", ".cuh"))]
    if {"bdist_wheel", "editable_wheel"} & set(sys.argv):
        if mode() == "none":
            why = "SORA_BUILD=none"
        else:
            cxx = find_cxx()
            assert isinstance(cxx, Missing)
            why = f"no {cxx.what}. To have it: {cxx.cure}"
        say(f"installing pure Python, without the native extension: {why}")
    return []


setup(
    ext_modules=extensions(),
    cmdclass={"build": build, "build_ext": build_ext, "editable_wheel": editable_wheel},
)
