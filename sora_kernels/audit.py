"""What the compiler made of the kernels, without a GPU: ``python -m sora_kernels.audit --arch
sm_90``.

Triton kernels are compiled by running the operators' own launchers (``ops/<op>/launches.py``) on
``meta`` tensors under a driver that only names the target, so that plan, config and specialisation
are those of a launch. CUDA C++ kernels are read from the built extension or compiled by nvcc.
Either way a row gives registers, spills, shared memory, occupancy and the instructions of the whole
kernel and of its inner loop, from the SASS, read with the tools inside Triton's wheel.

``--gate`` takes one config of each specialisation, which the test command holds against
``tests/audit/<arch>.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sora_kernels import _launches, _native, _sass
from sora_kernels._audit_table import Row, regressions, render, spilled, table, write

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "benchmarks" / "shapes.yaml"
ARCHS = ("sm_80", "sm_90", "sm_100")
OLDEST = 80  # whose PTX all machine code of the extension is made from (csrc/toolchain.py)
# CUDA sources that the gate does not compile: the same kernels as those of bf16 beside them, and elementwise ones.
NOT_GATED = ("_fp16", "_tf32", "lstm_step", "dropout")


class AuditError(RuntimeError):
    """The audit cannot run here; the message says why and what to do."""


def audit(
    arch: str, ops: Iterable[str] | None = None, gated: bool = False
) -> dict[str, dict[str, Row]]:
    """Rows by toolchain (``"triton 3.7.1"``, ``"nvcc 13.0"``), then by ``"op: kernel (what it was
    compiled for)"``.

    Args:
        arch: ``"sm_90"``, ...
        ops: names of operators; None takes all.
        gated: only what the test command gates.

    Raises:
        AuditError: the interpreter is on, Triton is missing, or a name is not known.
    """
    if arch not in _sass.LIMITS:
        raise AuditError(f"arch: expected one of {', '.join(_sass.LIMITS)}, got {arch!r}")
    require_compiler()
    import triton

    modules = _launches.operators()
    native = {path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")}
    names = sorted({*modules, *native}) if ops is None else list(ops)
    if unknown := [name for name in names if name not in {*modules, *native}]:
        raise AuditError(
            f"op: expected one of {', '.join(sorted({*modules, *native}))}, got {unknown[0]!r}"
        )
    found: dict[str, dict[str, Row]] = {}
    triton_rows = {
        k: v
        for name in names
        if name in modules
        for k, v in _triton_rows(name, modules[name], arch, gated)
    }
    if triton_rows:
        found[f"triton {triton.__version__}"] = triton_rows
    if wanted := native.intersection(names):
        compiler, rows = _cuda_rows(arch, gated)
        kept = {k: v for k, v in rows.items() if k.partition(":")[0] in wanted}
        if kept:
            found[compiler] = kept
    return found


def require_compiler() -> None:
    """Raises :class:`AuditError` where Triton kernels cannot be compiled."""
    try:
        from triton import knobs
    except ImportError as error:
        raise AuditError(f"Triton is not installed ({error}): pip install triton") from None
    if knobs.runtime.interpret:
        raise AuditError(
            "TRITON_INTERPRET=1 is set: interpreted kernels are never compiled. Unset it: "
            "env -u TRITON_INTERPRET python -m sora_kernels.audit"
        )


def shapes(op: str) -> dict[str, dict[str, Any]]:
    """An operator's layers in ``benchmarks/shapes.yaml``."""
    try:
        import yaml
    except ImportError:
        raise AuditError("PyYAML is not installed: pip install pyyaml") from None
    if not SHAPES.is_file():
        raise AuditError(f"{SHAPES} is missing: the audit needs the source tree")
    return yaml.safe_load(SHAPES.read_text())[op]


def _triton_rows(op: str, module: Any, arch: str, gated: bool) -> Iterator[tuple[str, Row]]:
    seen: set[bytes] = set()
    with _offline(arch), module.as_on(arch.replace("_", "")):
        for layer, shape in shapes(getattr(module, "SHAPES", op)).items():
            for launch in module.launches(layer, shape, device="meta", gated=gated):
                with _launches.record(launch=False) as records:
                    launch.run()
                for record in records:
                    kernel = record.kernel.run(
                        *record.args, grid=record.grid, warmup=True, **record.kwargs
                    )
                    cubin = kernel.asm["cubin"]
                    digest = hashlib.sha256(cubin).digest()
                    if digest not in seen:  # another layer of the same specialisation
                        seen.add(digest)
                        [(name, row)] = read_cubin(cubin, arch, kernel.metadata.num_warps).items()
                        row["shared"] = kernel.metadata.shared
                        row["occupancy"] = _sass.occupancy(
                            arch, row["registers"], row["shared"], row["warps"]
                        )
                        yield f"{op}: {name} ({launch.label})", row


@contextmanager
def _offline(arch: str) -> Iterator[None]:
    """A Triton driver that names the target and has no device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    number = int(arch.partition("_")[2])

    class Target:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", number, 32)

        def get_current_device(self) -> int:
            return -number  # Triton keeps one cache of compiled kernels a device

        def get_current_stream(self, device: int) -> int:
            return 0

    before = driver._active
    driver.set_active(Target())
    try:
        yield
    finally:
        driver._active = before


def _cuda_rows(arch: str, gated: bool) -> tuple[str, dict[str, Row]]:
    """Of the extension's kernels: from the binary if it was built for ``arch`` from these sources,
    else by nvcc."""
    info = _native.build_info()
    with tempfile.TemporaryDirectory() as folder:
        number = arch.partition("_")[2]
        if number in (info.get("cuda_archs") or ()) and not _native.stale():
            compiler = f"nvcc {_short(info['nvcc'])}"
            _tool("cuobjdump", "-xelf", "all", str(_native.module().__file__), cwd=folder)
            cubins = sorted(Path(folder).glob(f"*.{arch}.cubin"))
        elif nvcc := shutil.which("nvcc"):
            version = _run([nvcc, "--version"])
            compiler = f"nvcc {_short(version[version.find('release ') :])}"
            cubins = []
            for source in sorted((ROOT / "csrc").glob("*/*.cu")):
                if gated and source.stem.endswith(NOT_GATED):
                    continue
                cubins.append(Path(folder, f"{source.stem}.cubin"))
                flags = [
                    "-cubin",
                    f"-gencode=arch=compute_{OLDEST},code={arch}",
                    "-std=c++17",
                    "-O3",
                    "-DNDEBUG",
                    "-DSORA_WITH_CUDA=1",
                ]
                flags += [f"-I{ROOT / 'csrc'}"]  # as setup.py does
                _run([nvcc, *flags, str(source), "-o", str(cubins[-1])])
        else:
            print(
                f"CUDA kernels: not audited: {info.get('why') or 'no code for ' + arch}, no nvcc",
                file=sys.stderr,
            )
            return "", {}
        owners = _owners()
        rows = {}
        for cubin in cubins:
            for mangled, row in read_cubin(cubin.read_bytes(), arch, None).items():
                name = _sass.readable(mangled)
                op = owners.get(name.partition("<")[0], "csrc")
                rows[f"{op}: {name}"] = row
        return compiler, rows


def _owners() -> dict[str, str]:
    """Kernel -> folder of csrc/ that defines it."""
    found = {}
    for source in sorted((ROOT / "csrc").glob("*/*.cu*")):
        for name in re.findall(r"\b(\w+_kernel)\s*\(", source.read_text()):
            found[name] = source.parent.name
    return found


def _short(version: str) -> str:
    match = re.search(r"\d+\.\d+", version)
    return match[0] if match else version


def read_cubin(cubin: bytes, arch: str, warps: int | None) -> dict[str, Row]:
    """One row for each kernel of a cubin.

    Args:
        warps: a block has; None reads the kernel's launch bound, 1024 threads without one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "kernel.cubin"))
        Path(path).write_bytes(cubin)
        used = _sass.resources(_tool("cuobjdump", "-res-usage", path))
        code = _sass.functions(_tool("nvdisasm", "-c", "-ndf", path))
        bounds = {} if warps else _sass.launch_bounds(_tool("cuobjdump", "-elf", path))
    rows = {}
    for name, resources in used.items():
        block = warps or -(-bounds.get(name, 1024) // 32)
        body = code[name]
        counts = _sass.census(body.instructions)
        rows[name] = {
            "registers": resources.registers,
            "stack": resources.stack,
            "shared": resources.shared,
            "warps": block,
            "occupancy": _sass.occupancy(arch, resources.registers, resources.shared, block),
            **counts,
            "loop": _sass.census(_sass.inner_loop(body)),
        }
    return rows


def _tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return _run([path, *arguments], cwd=cwd)


def _run(command: list[str], cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise AuditError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def digest(arch: str, ops: Iterable[str] | None, gated: bool) -> str:
    """Names everything that rows depend on: sources, configs, shapes, tools, arguments."""
    require_compiler()
    import torch
    import triton

    info = _native.build_info()
    key = [arch, sorted(ops) if ops else None, gated, triton.__version__, torch.__version__]
    key += [info.get("sources"), info.get("nvcc"), shutil.which("nvcc")]
    state = hashlib.sha256(json.dumps(key).encode())
    files = [
        SHAPES,
        *(ROOT / "sora_kernels").rglob("*.py"),
        *(ROOT / "sora_kernels").rglob("tuned/*.json"),
    ]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    for path in sorted(set(files)):
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:24]


def cached(
    arch: str, ops: Iterable[str] | None, gated: bool, cache: Path | None
) -> dict[str, dict[str, Row]]:
    """:func:`audit`, its rows kept in ``cache`` until anything they depend on changes."""
    if cache is None:
        return audit(arch, ops, gated)
    path = cache / f"{arch}-{digest(arch, ops, gated)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    found = audit(arch, ops, gated)
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{arch}-*.json"):
        old.unlink(missing_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sora_kernels.audit", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--arch", default=",".join(ARCHS), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--op", action="append", help="only this operator; may be given again")
    parser.add_argument("--gate", action="store_true", help="one config of each specialisation")
    parser.add_argument(
        "--write", action="store_true", help="write the rows into the committed table"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--cache", type=Path, help="folder that keeps rows until their sources change"
    )
    options = parser.parse_args(argv)
    failures = []
    try:
        for arch in options.arch.split(","):
            found = cached(arch, options.op, options.gate, options.cache)
            if options.json:
                print(json.dumps({arch: found}))
            if options.write:
                print(f"wrote {write(arch, found, options.op)}", file=sys.stderr)
            committed = table(arch)
            for toolchain, rows in found.items():
                if not options.json:
                    print(f"{arch}, {toolchain}\n{render(rows)}\n")
                known = {k: v for k, v in rows.items() if k in committed.get(toolchain, {})}
                failures += [f"{arch}: {line}" for line in spilled(rows)]
                failures += [
                    f"{arch}: {line}" for line in regressions(known, committed.get(toolchain, {}))
                ]
    except AuditError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
