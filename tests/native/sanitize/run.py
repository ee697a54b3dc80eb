"""Builds csrc/lstm, csrc/dropout and csrc/pyramid_pool with driver.cpp under sanitizers and runs random cases.

    python tests/native/sanitize/run.py                  AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/native/sanitize/run.py --kind thread    ThreadSanitizer, OpenMP replaced by gomp_shim.cpp
    python tests/native/sanitize/run.py --kind quick     AddressSanitizer, not optimised: a tenth of the compile time
    python tests/native/sanitize/run.py --first 17 --last 17 --isa avx2

Each case runs on every instruction set of this machine, or on those named ("best" is one). Objects are kept in
build/sanitize under a hash of what they were made from. Exit status: 0 all agree, 1 a finding, 77 the compiler has no
sanitizers (the last line says why).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fno-math-errno",
    "-fno-trapping-math",
]
FLAGS += ["-Wall", "-Wextra", "-fopenmp", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
KINDS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "quick": ["-fsanitize=address", "-O0"],
}
ISAS = ("generic", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("generic",)
OPERATORS = ("lstm", "dropout", "pyramid_pool")
STUBS = {
    "lstm/recurrence": ("lstm/lstm_kernels.h", "const LstmKernels* lstm_kernels_{}(DType, Cell)"),
    "pyramid_pool/pyramid_pool": (
        "pyramid_pool/pyramid_pool_kernels.h",
        "const PoolKernels* pool_kernels_{}(DType)",
    ),
}
SKIP = 77


class Skip(Exception):
    """The machine cannot do this; the message says why."""


def compiler() -> list[str]:
    toolchain = runpy.run_path(str(ROOT / "csrc" / "toolchain.py"))
    found = toolchain["find_cxx"]()
    if isinstance(found, toolchain["Missing"]):
        raise Skip(f"no {found.what}")
    if not found.openmp:
        raise Skip(f"{found.version} has no OpenMP")
    return found.command


def probe(cxx: list[str], kind: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Environment of the driver, once a program with the sanitizer has built and run; and the
    instruction sets of this machine, the best last.
    """
    env = os.environ | {"OMP_NUM_THREADS": "3"}
    env.pop("SORA_CPU_ISA", None)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text(
            "#include <cstdio>\n#include <common/cpu_isa.h>\n"
            'int main() { std::printf("%d", static_cast<int>(sora::cpu_isa())); }\n'
        )
        built = subprocess.run(
            [*cxx, *FLAGS, *KINDS[kind], source, "-o", program], capture_output=True, text=True
        )
        if built.returncode:
            raise Skip(f"{cxx[0]} has no {KINDS[kind][0]}: {last_line(built.stderr)}")
        for options in ({}, {"ASAN_OPTIONS": "detect_leaks=0"}):  # no ptrace, no leak check
            done = subprocess.run([program], capture_output=True, text=True, env=env | options)
            if done.returncode == 0:
                return env | options, ISAS[: int(done.stdout) + 1]
    raise Skip(f"a program with {KINDS[kind][0]} does not run here: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def sources(kind: str, isas: Sequence[str], folder: Path) -> list[Path]:
    """What the driver is made of. The kernels take nearly all of the time to compile, so those of
    instruction sets that will not run have a stub.
    """
    found = [p for op in OPERATORS for p in (ROOT / "csrc" / op).glob("*.cpp")]
    found = sorted(p for p in found if p.name != "bind.cpp")
    for isa in set(ISAS) - set(isas):
        for name, (header, kernels) in STUBS.items():
            source = ROOT / "csrc" / f"{name}_{isa}.cpp"
            found.remove(source)
            stub = folder / f"no_{source.name}"
            body = f"namespace sora {{ {kernels.format(isa)} {{ return nullptr; }} }}"
            stub.write_text(f'#include "{header}"\n{body}\n')
            found.append(stub)
    shim = [HERE / "gomp_shim.cpp"] if kind == "thread" else []
    return [*found, *(HERE / f"{name}.cpp" for name in ("driver", "steps", "pyramid_pool")), *shim]


def build(cxx: list[str], kind: str, isas: Sequence[str], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *KINDS[kind]]
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    common = hashlib.sha256(repr((cxx, flags, version)).encode())
    headers = [p for op in ("common", *OPERATORS) for p in (ROOT / "csrc" / op).glob("*.h")]
    for header in sorted([*headers, *HERE.glob("*.h")]):
        common.update(header.name.encode() + header.read_bytes())

    def compiled(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        name = f"{kind}-{source.stem}"
        target = folder / f"{name}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            for old in folder.glob(f"{name}-*.o"):
                old.unlink(missing_ok=True)
            part = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*cxx, *flags, "-c", source, "-o", part], check=True)
            part.rename(target)
        return target

    # The slowest to compile first.
    jobs = sorted(
        sources(kind, isas, folder),
        key=lambda p: (p.stem.startswith("recurrence"), p.name == "driver.cpp"),
    )[::-1]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, jobs))
    program = folder / f"{kind}-driver"
    link = [*KINDS[kind], *(["-pthread"] if kind == "thread" else ["-fopenmp"])]
    subprocess.run([*cxx, *objects, *link, "-o", program], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="address")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=199)
    parser.add_argument(
        "--isa", choices=(*ISAS, "best"), action="append", help="default: all of this machine"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitize")
    arguments = parser.parse_args()
    try:
        cxx = compiler()
        env, available = probe(cxx, arguments.kind)
    except Skip as why:
        print(why)
        return SKIP
    named = [available[-1] if isa == "best" else isa for isa in arguments.isa or available]
    isas = [isa for isa in available if isa in named]
    for isa in named:
        if isa not in available:
            print(f"{isa}: not on this machine")
    program = build(cxx, arguments.kind, isas, arguments.folder)
    failed = 0
    for isa in isas:
        command = [program, str(arguments.first), str(arguments.last)]
        done = subprocess.run(
            command, env=env | {"SORA_CPU_ISA": isa}, capture_output=True, text=True
        )
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode:
            print(f"{isa}: exit status {done.returncode}")
            failed = 1
        elif not done.stdout.startswith(f"{isa}:"):
            print(f"{isa}: the driver ran something else")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
