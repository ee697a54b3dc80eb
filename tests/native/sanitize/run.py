"""Builds csrc/lstm and csrc/dropout with driver.cpp under sanitizers and runs random cases.

    python tests/native/sanitize/run.py                  AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/native/sanitize/run.py --kind thread    ThreadSanitizer, OpenMP replaced by gomp_shim.cpp
    python tests/native/sanitize/run.py --first 17 --last 17 --isa avx2

Each case runs on every instruction set of this machine. Objects are kept in build/sanitize under a hash of what they
were made from. Exit status: 0 all agree, 1 a finding, 77 the compiler has no sanitizers (the last line says why).
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
}
ISAS = ("generic", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("generic",)
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


def probe(cxx: list[str], kind: str) -> dict[str, str]:
    """Environment of the driver, once a program with the sanitizer has built and run."""
    env = os.environ | {"OMP_NUM_THREADS": "3"}
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("int main() { return 0; }\n")
        built = subprocess.run(
            [*cxx, *KINDS[kind], source, "-o", program], capture_output=True, text=True
        )
        if built.returncode:
            raise Skip(f"{cxx[0]} has no {KINDS[kind][0]}: {last_line(built.stderr)}")
        for options in ({}, {"ASAN_OPTIONS": "detect_leaks=0"}):  # no ptrace, no leak check
            done = subprocess.run([program], capture_output=True, text=True, env=env | options)
            if done.returncode == 0:
                return env | options
    raise Skip(f"a program with {KINDS[kind][0]} does not run here: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def sources(kind: str) -> list[Path]:
    found = [p for op in ("lstm", "dropout") for p in (ROOT / "csrc" / op).glob("*.cpp")]
    found = sorted(p for p in found if p.name != "bind.cpp")
    shim = [HERE / "gomp_shim.cpp"] if kind == "thread" else []
    return [*found, HERE / "driver.cpp", *shim]


def build(cxx: list[str], kind: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *KINDS[kind]]
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    common = hashlib.sha256(repr((cxx, flags, version)).encode())
    headers = [p for op in ("common", "lstm", "dropout") for p in (ROOT / "csrc" / op).glob("*.h")]
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
    jobs = sorted(sources(kind), key=lambda p: (p.stem.endswith("avx512"), p.stat().st_size))[::-1]
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
    parser.add_argument("--isa", choices=ISAS, action="append", help="default: each of them")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitize")
    arguments = parser.parse_args()
    try:
        cxx = compiler()
        env = probe(cxx, arguments.kind)
    except Skip as why:
        print(why)
        return SKIP
    program = build(cxx, arguments.kind, arguments.folder)
    failed = 0
    for isa in arguments.isa or ISAS:
        command = [program, str(arguments.first), str(arguments.last)]
        done = subprocess.run(
            command, env=env | {"SORA_CPU_ISA": isa}, capture_output=True, text=True
        )
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode:
            print(f"{isa}: exit status {done.returncode}")
            failed = 1
        elif not done.stdout.startswith(f"{isa}:"):
            print(f"{isa}: not on this machine")
    return failed


if __name__ == "__main__":
    sys.exit(main())
