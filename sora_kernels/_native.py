"""The compiled extension ``sora_kernels._C``: loaded on first use, or why it cannot be.

*Absent*: this installation has no extension. *Broken*: there is one, and it cannot be used.
Importing this file loads nothing; ``setup.py`` runs it for :func:`source_digest`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PACKAGE = Path(__file__).absolute().parent
REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir"


class Status(NamedTuple):
    """State of the extension or of its CUDA part; ``why`` is one sentence with the cure."""

    state: str
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "ok"


def status() -> Status:
    """``"ok"``, ``"absent"`` or ``"broken"``. The first call imports the extension."""
    return _load()[0]


def module() -> ModuleType:
    """``sora_kernels._C``.

    Raises:
        RuntimeError: it is absent or broken; the message is ``status().why``.
    """
    state, extension = _load()
    if extension is None:
        raise RuntimeError(state.why)
    return extension


def build_info() -> dict[str, Any]:
    """What the extension was built from and with.

    Returns:
        ``extension`` (the state) and, if it is ``"ok"``: ``version``, ``mode`` (SORA_BUILD),
        ``commit``, ``sources`` (:func:`source_digest`), ``python``, ``pybind11``, ``cxx``,
        ``openmp`` (its date, or None), ``nvcc``, ``cuda_archs``, ``cuda_ptx``, ``cuda_runtime``
        (None without a CUDA part), ``cuda_why_not``; otherwise ``why``.
    """
    state, extension = _load()
    if extension is None:
        return {"extension": state.state, "why": state.why}
    return {"extension": state.state, **extension.build_info()}


def cuda_status(capability: tuple[int, int] | None = None) -> Status:
    """State of the CUDA part: *absent* without a driver too, *broken* under one too old for it.

    Args:
        capability: of a GPU, such as ``(9, 0)``: *broken* too where there is no code for it.
    """
    state, extension = _load()
    if extension is None:
        return state
    info = extension.build_info()
    if info["cuda_runtime"] is None:
        why = f"sora_kernels._C has no CUDA part: {info['cuda_why_not']}"
        return Status("absent", f"{why}. With nvcc: SORA_BUILD=cuda {_reinstall()}")
    runtime, driver = info["cuda_runtime"], extension.cuda_driver_version()
    served = driver_status(runtime, driver)
    if not served.ok or capability is None:
        return served
    # A driver of the same major serves a newer runtime, but does not compile its PTX.
    ptx = info["cuda_ptx"] if driver // 10 >= runtime // 10 else None
    return arch_status(capability, info["cuda_archs"], ptx)


@cache
def cuda_device_status(device: Any) -> Status:
    """:func:`cuda_status` for the GPU that a tensor is on."""
    import torch

    known = torch.cuda.is_available()
    return cuda_status(torch.cuda.get_device_capability(device) if known else None)


def driver_status(runtime: int, driver: int) -> Status:
    """Whether a driver serves the runtime linked into ``_C`` (both 1000 * major + 10 * minor)."""
    if driver <= 0:
        return Status("absent", "there is no NVIDIA driver on this machine")
    if driver // 1000 < runtime // 1000:
        return Status(
            "broken",
            f"the NVIDIA driver supports CUDA {dotted(driver)}, older than the CUDA "
            f"{dotted(runtime)} that sora_kernels._C was built with: update the driver, or build "
            f"with a CUDA {driver // 1000} toolkit: "
            f"CUDA_HOME=/path/to/cuda SORA_BUILD=cuda {_reinstall()}",
        )
    return Status("ok")


def arch_status(capability: tuple[int, int], archs: Iterable[str], ptx: str | None) -> Status:
    """Whether the CUDA part holds code for a GPU of this compute capability.

    Machine code serves its own major version from its minor up (``90a`` exactly 9.0), PTX every
    later GPU.
    """
    have = list(archs)
    number = capability[0] * 10 + capability[1]
    for arch in have:
        plain = int(arch.rstrip("af"))
        exact = arch.endswith("a")
        if plain == number or (not exact and plain // 10 == number // 10 and plain <= number):
            return Status("ok")
    if ptx is not None and int(ptx) <= number:
        return Status("ok")
    built = ", ".join(f"sm_{arch}" for arch in have)
    return Status(
        "broken",
        f"sora_kernels._C was built for {built}, not for this GPU's sm_{number}: "
        f"SORA_CUDA_ARCHS={number} {_reinstall()}",
    )


def stale() -> str:
    """In a source tree whose ``csrc/`` is not what the extension was built from, a sentence."""
    _, extension = _load()
    root = PACKAGE.parent
    if extension is None or not (root / "csrc").is_dir():
        return ""
    if extension.build_info()["sources"] == source_digest(root):
        return ""
    return f"csrc/ has changed since sora_kernels._C was built: {_reinstall()}"


def source_digest(root: Path) -> str:
    """SHA-256 over the names and contents of the C++ and CUDA sources of the extension."""
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix in (".cpp", ".cu", ".h", ".cuh") and not name.startswith("csrc/emu/"):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def num_threads() -> int:
    """The thread count to pass to the extension: torch's, and 1 in a forked child.

    libgomp hangs when a forked child starts a team after its parent ran one.
    """
    import torch

    return 1 if _forked else torch.get_num_threads()


@cache
def _load() -> tuple[Status, ModuleType | None]:
    # An editable install elsewhere also answers for this name: only this package's own file counts.
    if importlib.machinery.PathFinder.find_spec("sora_kernels._C", [str(PACKAGE)]) is None:
        return _not_found(), None
    # torch's OpenMP runtime must be in the process first: two of them fight for the cores.
    import torch  # noqa: F401

    try:
        extension = importlib.import_module("sora_kernels._C")
    except Exception as error:  # a broken binary may raise anything
        what = f"sora_kernels._C is there but does not load ({type(error).__name__}: {error})"
        return Status("broken", f"{what}. Build it for this machine: {_reinstall()}"), None
    return Status("ok"), extension


def _not_found() -> Status:
    others = sorted(p.name for p in PACKAGE.glob("_C.*") if p.suffix in (".so", ".pyd"))
    if others:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        return Status(
            "broken",
            f"sora_kernels._C was built for another Python: found {', '.join(others)}, "
            f"Python {sys.version.split()[0]} loads _C{suffix}. Build it again: {_reinstall()}",
        )
    if installed := _shadowed():
        return Status(
            "absent",
            f"the source tree in {PACKAGE.parent}, which has no compiled extension, hides the "
            f"installed {installed}: start Python elsewhere, or build in the tree: "
            "pip install -e .",
        )
    return Status(
        "absent",
        "sora_kernels was installed without its compiled extension (SORA_BUILD=none, or no C++ "
        f"compiler). With a compiler: SORA_BUILD=cpu {_reinstall()}",
    )


def _shadowed() -> Path | None:
    """Folder of another, installed ``sora_kernels`` that has an extension."""
    for distribution in metadata.distributions(name="sora_kernels"):
        folder = Path(str(distribution.locate_file("sora_kernels")))
        if importlib.machinery.PathFinder.find_spec("sora_kernels._C", [str(folder)]) is not None:
            return folder
    found = importlib.util.find_spec("sora_kernels._C")  # through an editable install's finder
    return Path(found.origin).parent if found is not None and found.origin is not None else None


def _reinstall() -> str:
    tree = (PACKAGE.parent / "setup.py").is_file()
    return "pip install -e ." if tree else f"{REBUILD} sora_kernels"


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
