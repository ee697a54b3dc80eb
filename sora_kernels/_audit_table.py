"""Rows of ``sora_kernels.audit``: the committed table, what counts as a regression, the printed
form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "audit"

# What a row may grow by before the gate fails: (share, absolute). Compiler noise stays under it.
SLACK = {"registers": (0.05, 2), "total": (0.08, 16), "loop": (0.08, 4), "memory": (0.05, 1)}


def spilled(rows: dict[str, Row]) -> list[str]:
    """A line for each kernel that keeps values in local memory."""
    return [
        f"{name}: {row['stack']} bytes of stack, {row['local']} local loads and stores"
        for name, row in rows.items()
        if row["stack"] or row["local"]
    ]


def regressions(rows: dict[str, Row], table: dict[str, Row]) -> list[str]:
    """A line for each number that is worse than the committed one by more than its slack."""
    lines = []
    for name, row in rows.items():
        old = table.get(name)
        if old is None:
            lines.append(
                f"{name}: not in the table (add it: python -m sora_kernels.audit --gate --write)"
            )
            continue

        def check(what: str, new: float, was: float, slack: str, name: str = name) -> None:
            share, absolute = SLACK[slack]
            if new > was * (1 + share) + absolute:
                lines.append(f"{name}: {what} {was} -> {new}")

        check("registers", row["registers"], old["registers"], "registers")
        check("shared memory", row["shared"], old["shared"], "memory")
        check("instructions", row["total"], old["total"], "total")
        check("instructions of the inner loop", row["loop"]["total"], old["loop"]["total"], "loop")
        for access in ("load", "store", "copy"):
            new, was = (sum(r["loop"][access].values()) for r in (row, old))
            check(f"global {access} instructions of the inner loop", new, was, "memory")
        if row["tensor"] < old["tensor"]:
            lines.append(f"{name}: tensor-core instructions {old['tensor']} -> {row['tensor']}")
        if row["occupancy"] < old["occupancy"]:
            lines.append(f"{name}: occupancy {old['occupancy']:.0%} -> {row['occupancy']:.0%}")
    return lines


def table(arch: str, folder: Path = FOLDER) -> dict[str, dict[str, Row]]:
    """The committed rows of ``arch`` by toolchain; empty where there are none."""
    path = folder / f"{arch}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write(
    arch: str, found: dict[str, dict[str, Row]], ops: Iterable[str] | None, folder: Path = FOLDER
) -> Path:
    """Puts rows into the table: the audited operators' old rows of the same toolchains go, others
    stay."""
    rows = table(arch, folder)
    for toolchain, new in found.items():
        kept = {
            name: row
            for name, row in rows.get(toolchain, {}).items()
            if ops is not None and name.partition(":")[0] not in ops
        }
        rows[toolchain] = dict(sorted({**kept, **new}.items()))
    path = folder / f"{arch}.json"
    lines = [
        f"  {json.dumps(toolchain)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in kept.items())
        + "\n  }"
        for toolchain, kept in sorted(rows.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def render(rows: dict[str, Row]) -> str:
    counted = ("tensor", "load", "store", "copy")
    head = (
        "kernel",
        "regs",
        "stack",
        "shared",
        "warps",
        "occ.",
        "instr.",
        *counted,
        "| loop",
        *counted,
    )
    lines: list[tuple[str, ...]] = [head]
    for name, row in rows.items():
        first = (
            row["registers"],
            row["stack"],
            row["shared"],
            row["warps"],
            f"{row['occupancy']:.0%}",
        )
        lines.append((name, *map(str, first), *_cells(row), *_cells(row["loop"], "| ")))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def _cells(counts: Row, bar: str = "") -> tuple[str, ...]:
    accesses = (
        " ".join(f"{n}x{bits}" for bits, n in counts[kind].items())
        for kind in ("load", "store", "copy")
    )
    return (f"{bar}{counts['total']}", str(counts["tensor"]), *(cell or "-" for cell in accesses))
