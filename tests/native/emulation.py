"""Runs the CUDA sources of csrc/ without a GPU: builds them with the host emulation (csrc/emu) and calls them.

A ``.cu`` file gives C functions that launch kernels and return 0 or an error. The same file, compiled by nvcc, serves
:class:`Gpu`; a test's body is the same for both::

    def check(device):
        x = device.tensor(torch.randn(32), "x")
        out = device.tensor(torch.full((32,), torch.nan), "out")
        device.run("run_something", x, out, 32)
        torch.testing.assert_close(out.cpu(), expected)

    check(emulated(SOURCE, race=True, seed=3))
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import runpy
import shlex
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"
FLAGS = ["-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra", "-DSORA_HOST_EMULATION"]
# The machine is never instrumented; a kernel's file is for the race detector, whose hooks the machine has. Of a
# kernel's time here most is compilation, which -Og halves.
MACHINE_FLAGS = [*FLAGS, "-O2"]
KERNEL_FLAGS = {False: [*FLAGS, "-Og"], True: [*FLAGS, "-Og", "-fsanitize=thread"]}
POLICIES = ("fifo", "uniform", "starve")
DELIVERIES = ("immediate", "random", "last_moment")


class LaunchError(AssertionError):
    """A launch that the emulation, or CUDA, ended; the message is its report."""


class NoCompiler(Exception):
    """The machine cannot build the emulation; the message says why."""


@cache
def compiler() -> tuple[str, ...]:
    toolchain = runpy.run_path(str(CSRC / "toolchain.py"))
    found = toolchain["find_cxx"]()
    if isinstance(found, toolchain["Missing"]):
        raise NoCompiler(f"no {found.what}")
    if not found.version.startswith("g++") and "g++" not in found.command[0]:
        raise NoCompiler(f"the hooks of the race detector are tried with g++, not {found.version}")
    return tuple(found.command)


def build(
    source: Path,
    *,
    race: bool,
    replaced: Mapping[Path, str] | None = None,
    defines: Sequence[str] = (),
) -> Path:
    """The shared library of a ``.cu`` file with the emulation, from the cache if nothing has changed.

    Args:
        source: its folder and ``csrc`` are where ``#include`` looks.
        race: instrumented for the race detector.
        replaced: other contents for the source or for headers of those folders.
        defines: macros, as ``"NAME=value"``.
    """
    other = {path.resolve(): text for path, text in (replaced or {}).items()}
    contents = other.get(source.resolve(), source.read_text())
    flags = [*KERNEL_FLAGS[race], *(f"-D{d}" for d in defines)]
    machine = _machine()
    # The file's own name, for the lines in reports.
    text = f'# 1 "{source}"\n{contents}'

    def make(library: Path) -> list[Path]:
        folder, folders = library.parent, [source.parent, CSRC]
        if other:  # a quoted include looks beside the file that has it: whole copies of the folders
            folders = [_copied(root, folder / str(k), other) for k, root in enumerate(folders)]
        kernels = folder / "kernels.o"
        read = _compile([*flags, *(f"-I{path}" for path in folders)], text, kernels)
        # Without -fsanitize=thread: libtsan stays out. -Bsymbolic: each library keeps its own machine.
        objects = [str(kernels), *map(str, machine)]
        _run([*compiler(), "-shared", *objects, "-o", str(library), "-Wl,-Bsymbolic", "-ldl"])
        originals = dict(zip(folders, (source.parent, CSRC), strict=True))
        return [_original(path, originals) for path in read]

    made_of = (*flags, text, *(f"{path}{text}" for path, text in other.items()), *map(str, machine))
    return _cached(f"{source.stem}-{'race' if race else 'plain'}", ".so", made_of, make)


def _copied(root: Path, target: Path, replaced: Mapping[Path, str]) -> Path:
    for header in sorted(p for p in root.rglob("*") if p.suffix in (".h", ".cuh", ".cu")):
        copy = target / header.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = replaced.get(header.resolve(), header.read_text())
        copy.write_text(f'# 1 "{header}"\n{text}')
    return target


def _original(path: Path, originals: Mapping[Path, Path]) -> Path:
    for copy, root in originals.items():
        if copy in path.parents:
            return root / path.relative_to(copy)
    return path


def build_cuda(source: Path) -> Path:
    """The shared library of a ``.cu`` file for the GPU of this machine."""
    toolchain = runpy.run_path(str(CSRC / "toolchain.py"))
    nvcc = toolchain["find_nvcc"]()
    if isinstance(nvcc, toolchain["Missing"]):
        raise NoCompiler(f"no {nvcc.what}")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}"]
    command = [nvcc.path, *nvcc.host_flags, *flags, "-Xcompiler=-fPIC", "-shared", str(source)]

    def make(library: Path) -> list[Path]:
        listing = library.with_suffix(".d")
        _run([*command, "-MMD", "-MF", str(listing), "-o", str(library)])
        return [*_inputs(listing), source]

    return _cached(f"{source.stem}-sm_{arch}", ".so", (nvcc.version, *command), make)


@cache
def _machine() -> tuple[Path, ...]:
    """csrc/emu, compiled in two halves: the headers cost more than the code."""
    sources = sorted((CSRC / "emu").glob("*.cpp"))

    def compiled(half: int) -> Path:
        text = "".join(f'#include "{source}"\n' for source in sources[half::2])
        made_of = (*MACHINE_FLAGS, text)
        return _cached(
            f"machine{half}", ".o", made_of, lambda target: _compile(MACHINE_FLAGS, text, target)
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return tuple(pool.map(compiled, (0, 1)))


def _compile(flags: Sequence[str], text: str, target: Path) -> list[Path]:
    """Compiles ``text``; the files that it includes."""
    listing = target.with_suffix(".d")
    outputs = ["-MMD", "-MF", str(listing), "-MT", "target", "-o", str(target)]
    _run([*compiler(), *flags, "-x", "c++", "-c", "-", *outputs], text)
    return _inputs(listing)


def _inputs(listing: Path) -> list[Path]:
    words = shlex.split(listing.read_text().split(":", 1)[1].replace("\\\n", " "))
    return [Path(word) for word in words if word != "-"]


def _cached(
    name: str, suffix: str, made_of: Sequence[str], make: Callable[[Path], list[Path]]
) -> Path:
    """The file that ``make`` makes and whose inputs it returns, kept while the inputs are as they were."""
    CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((compiler(), *made_of)).encode()).hexdigest()[:16]
    listing = CACHE / f"{name}-{key}.inputs"
    if listing.exists():
        inputs = [Path(line) for line in listing.read_text().splitlines()]
        target = CACHE / f"{name}-{_digest(key, inputs)}{suffix}"
        if target.exists():
            target.touch()
            listing.touch()
            return target
    _forget_old_files()
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder, f"made{suffix}")
        started = time.time()
        inputs = make(made)
        while any(path.stat().st_mtime >= started for path in inputs):  # edited meanwhile
            started = time.time()
            inputs = make(made)
        target = CACHE / f"{name}-{_digest(key, inputs)}{suffix}"
        made.rename(target)
        listed = Path(folder, "inputs")
        listed.write_text("\n".join(map(str, inputs)))
        listed.rename(listing)
    return target


def _digest(key: str, inputs: Sequence[Path]) -> str:
    digest = hashlib.sha256(key.encode())
    for path in inputs:
        digest.update(path.read_bytes() if path.is_file() else b"gone")
    return digest.hexdigest()[:16]


def _forget_old_files(days: float = 3) -> None:
    for path in CACHE.iterdir():
        if path.is_file() and path.stat().st_mtime < time.time() - days * 86400:
            path.unlink(missing_ok=True)


def _run(command: Sequence[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:  # a warning is an error too
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


@dataclass(frozen=True)
class Counts:
    """What a launch did."""

    switches: int
    collectives: int
    copies: int
    accesses: int


class Emulated:
    """A built library as a device. Every launch runs in the order that ``seed`` draws.

    Args:
        library: from :func:`build`.
        race: with the race detector; plain accesses are followed in a library built for it.
        seed: 0 runs threads in turn; others shuffle, starve one thread, warp or CTA, and land
            asynchronous copies early, at random or late.
        policy: of :data:`POLICIES`, in the place of what the seed draws.
        delivery: of :data:`DELIVERIES`, in the place of what the seed draws.
        max_switches: a launch that needs more switches between threads is reported as a livelock.
    """

    def __init__(
        self,
        library: Path,
        *,
        race: bool,
        seed: int = 0,
        policy: str | None = None,
        delivery: str | None = None,
        max_switches: int = 0,
    ) -> None:
        self._library = _load(library)
        self.race = race
        self.seed = seed
        self.policy = -1 if policy is None else POLICIES.index(policy)
        self.delivery = -1 if delivery is None else DELIVERIES.index(delivery)
        self.max_switches = max_switches

    def tensor(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """A copy of ``value`` in emulated global memory: what a kernel does outside it is an error."""
        value = value.contiguous()
        bytes_ = value.numel() * value.element_size()
        address = self._library.sora_emu_allocate(ctypes.c_size_t(bytes_), name.encode())
        memory = (ctypes.c_char * max(bytes_, 1)).from_address(address)
        weakref.finalize(memory, self._library.sora_emu_release, ctypes.c_void_p(address))
        if bytes_ == 0:
            return torch.empty_like(value)
        tensor = torch.frombuffer(memory, dtype=value.dtype, count=value.numel())
        return tensor.view(value.shape).copy_(value)

    def run(self, function: str, *arguments: torch.Tensor | float | None) -> Counts:
        """Calls ``function(*arguments, stream)``.

        Raises:
            LaunchError: the emulation found an error.
        """
        library = self._library
        library.sora_emu_configure(ctypes.c_uint64(self.seed), int(self.race))
        library.sora_emu_override(
            self.policy, self.delivery, ctypes.c_double(-1), ctypes.c_uint64(self.max_switches)
        )
        error = getattr(library, function)(*map(_c_argument, arguments), None)
        if error:
            report = library.sora_emu_report().decode()
            raise LaunchError(f"{function}, seed {self.seed}: {report or f'error {error}'}")
        counts = (ctypes.c_uint64 * 4)()
        library.sora_emu_counts(counts)
        return Counts(*counts)

    def mutate(self, site: int | None) -> None:
        """Switches the synchronisation of this number off: see mutation.py."""
        self._library.sora_emu_mutate(-1 if site is None else site)


class Gpu:
    """A library that nvcc made of the same file, on a GPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def tensor(self, value: torch.Tensor, name: str) -> torch.Tensor:
        del name
        return value.cuda()

    def run(self, function: str, *arguments: torch.Tensor | float | None) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self._library, function)(*map(_c_argument, arguments), stream)
        if error:
            raise LaunchError(f"{function}: CUDA error {error}")
        torch.cuda.synchronize()


def emulated(source: Path, *, race: bool, seed: int = 0, **options) -> Emulated:
    """:func:`build` and :class:`Emulated`."""
    return Emulated(build(source, race=race), race=race, seed=seed, **options)


@cache
def _load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.sora_emu_allocate.restype = ctypes.c_void_p
    loaded.sora_emu_report.restype = ctypes.c_char_p
    return loaded


def _c_argument(value: torch.Tensor | float | None):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value  # an int is a C int; another C type is given as one of ctypes
