"""Reads what the CUDA binary tools print: resource usage and SASS. Text in, numbers out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# First part of an opcode. HFMA2.MMA is an FMA of the fp16 pipe in spite of its name, so whole words
# only.
TENSOR = {
    "HMMA", "IMMA", "DMMA", "BMMA", "QMMA", "OMMA",  # mma.sync
    "HGMMA", "IGMMA", "QGMMA", "BGMMA",  # wgmma (sm_90a)
    "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA",  # tcgen05 (sm_100a)
}  # fmt: skip
BULK_COPIES = {"UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKRED"}


class Resources(NamedTuple):
    """Of one function: registers a thread, bytes of stack frame and of static shared memory."""

    registers: int
    stack: int
    shared: int


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: "LDG.E.128"
    target: str  # label of a branch, else ""


@dataclass(frozen=True)
class Code:
    """One function's instructions and the position of each label in them."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_FUNCTION = re.compile(r"^ Function (\S+):\s*\n\s*(.*)$", re.MULTILINE)
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$"
)
_BRANCH = re.compile(r"`\((\.L_x_\d+)\)")
_WIDTH = re.compile(r"\.(?:[US]?(8|16)|(64|128|256))(?=\.|$)")


def resources(text: str) -> dict[str, Resources]:
    """``cuobjdump -res-usage`` -> by function."""
    found = {}
    for name, line in _FUNCTION.findall(text):
        usage = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        found[name] = Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"])
    return found


def functions(text: str) -> dict[str, Code]:
    """``nvdisasm -c`` -> by function."""
    starts = list(_SECTION.finditer(text))
    ends: list[re.Match[str] | None] = [*starts[1:], None]
    found = {}
    for start, end in zip(starts, ends, strict=False):  # a file may hold no kernel
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text[start.end() : end.start() if end else None].splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif match := _INSTRUCTION.match(line):
                branch = _BRANCH.search(match[2])
                instructions.append(Instruction(match[1], branch[1] if branch else ""))
        found[start[1]] = Code(_without_padding(instructions), labels)
    return found


def _without_padding(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """Without the NOPs that fill up a function's last line and the trap branch before them."""
    end = len(instructions)
    while end and instructions[end - 1].opcode == "NOP":
        end -= 1
    return tuple(instructions[:end])


def inner_loop(code: Code) -> tuple[Instruction, ...]:
    """The instructions of the longest loop that holds no other loop; empty where there is none."""
    loops = []
    for at, instruction in enumerate(code.instructions):
        start = code.labels.get(instruction.target, at)
        if start < at:  # a branch to itself is the trap behind the last EXIT
            loops.append((start, at))
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]
    if not inner:
        return ()
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return code.instructions[start : end + 1]


def bits(opcode: str) -> int:
    """Width of a memory access of one thread."""
    match = _WIDTH.search(opcode)
    return int(match[1] or match[2]) if match else 32


def census(instructions: Sequence[Instruction]) -> dict[str, int | dict[str, int]]:
    """Counts that say what a kernel is made of.

    Returns:
        ``total``, ``tensor`` (tensor-core instructions), ``local`` (loads and stores of local
        memory: spills or an array that is not in registers), ``load`` and ``store`` (global memory,
        by width in bits), ``copy`` (global to shared past the registers: by width, ``"bulk"`` for
        the copy engine's).
    """
    load: Counter[str] = Counter()
    store: Counter[str] = Counter()
    copy: Counter[str] = Counter()
    tensor = local = 0
    for opcode, _ in instructions:
        base = opcode.partition(".")[0]
        tensor += base in TENSOR
        local += base in ("LDL", "STL")
        if base in ("LDG", "LD"):
            load[str(bits(opcode))] += 1
        elif base in ("STG", "ST"):
            store[str(bits(opcode))] += 1
        elif base == "LDGSTS":
            copy[str(bits(opcode))] += 1
        elif base in BULK_COPIES:
            copy["bulk"] += 1
    return {
        "total": len(instructions),
        "tensor": tensor,
        "local": local,
        "load": dict(sorted(load.items())),
        "store": dict(sorted(store.items())),
        "copy": dict(sorted(copy.items())),
    }


class Limits(NamedTuple):
    """Of one multiprocessor: warps, blocks, 32-bit registers, bytes of shared memory and those kept
    a block."""

    warps: int
    blocks: int
    registers: int
    shared: int
    reserved: int


_KIB = 1024
# CUDA C++ programming guide, "Technical specifications per compute capability".
LIMITS = {
    "sm_80": Limits(64, 32, 65536, 164 * _KIB, _KIB),
    "sm_86": Limits(48, 16, 65536, 100 * _KIB, _KIB),
    "sm_89": Limits(48, 24, 65536, 100 * _KIB, _KIB),
    "sm_90": Limits(64, 32, 65536, 228 * _KIB, _KIB),
    "sm_100": Limits(64, 32, 65536, 228 * _KIB, _KIB),
    "sm_120": Limits(48, 32, 65536, 100 * _KIB, _KIB),
}


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Share of the multiprocessor's warps that a kernel can keep resident.

    Args:
        registers: a thread; allocated by warp, in units of 256.
        shared: bytes a block.
        warps: a block.
    """
    limits = LIMITS[arch]
    by_registers = limits.registers // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = limits.shared // (shared + limits.reserved)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


def launch_bounds(text: str) -> dict[str, int]:
    """``cuobjdump -elf`` -> threads of a block by function, where the kernel states a bound."""
    found = {}
    for section in re.split(r"^\.nv\.info\.", text, flags=re.MULTILINE)[1:]:
        bound = re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:((?:\s+0x[0-9a-f]+){3})", section
        )
        if bound:
            x, y, z = (int(value, 16) for value in bound[1].split())
            found[section.split(None, 1)[0]] = x * y * z
    return found


def readable(mangled: str) -> str:
    """``_ZN4sora14dropout_kernelIfEEv..`` -> ``dropout_kernel<float>``; other names
    unchanged."""
    at, kernel = re.match(r"(?:_ZN?)?", mangled).end(), ""  # type: ignore[union-attr]
    while size := re.match(r"\d+", mangled[at:]):
        start = at + size.end()
        at = start + int(size[0])
        kernel = mangled[start:at]
    if not kernel:
        return mangled
    arguments = []
    if mangled[at : at + 1] == "I":
        at += 1
        names = {"f": "float", "d": "double", "i": "int", "b": "bool"}
        # A type of a namespace is NS_..E (NS0_, ... of one inside), a number of such a type LNS_..E1E.
        while match := re.match(
            r"(?P<literal>L)?(?P<nested>NS\d*_)?(?P<size>\d+)|L[a-z](?P<value>n?\d+)E|(?P<name>[fdib])",
            mangled[at:],
        ):
            at += match.end()
            if match["size"]:
                start, at = at, at + int(match["size"])
                text = mangled[start:at]
                at += 1 if match["nested"] else 0
                if match["literal"]:
                    text, _, _ = mangled[at:].partition("E")
                    at += len(text) + 1
                arguments.append(text)
            else:
                arguments.append(match["value"] or names[match["name"]])
    return f"{kernel}<{', '.join(arguments)}>" if arguments else kernel
