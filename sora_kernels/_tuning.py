"""Kernel configs are data: ``ops/<op>/tuned/<arch>.json``, shipped and looked up, never tuned on a call.

A file maps a kernel's name to rows ``{"match": {...}, "at": {...}, "config": {...}}``. ``match`` must equal the
call's key where it names one (dtype, layout); among those rows the most specific match wins, then the ``at``
sizes nearest in log space; a row without sizes is the last resort. An architecture's rows come before
``default.json``, which fits any GPU.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any

Key = tuple[tuple[str, str | int], ...]


@functools.lru_cache(maxsize=256)
def rows(op: str, arch: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``ops/<op>/tuned/<arch>.json``, by kernel; empty where no such file ships."""
    path = resources.files("sora_kernels") / "ops" / op / "tuned" / f"{arch}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.lru_cache(maxsize=4096)
def config(op: str, kernel: str, arch: str, key: Key) -> dict[str, int]:
    """The shipped config nearest to ``key``.

    Args:
        op, kernel: the operator's folder and the kernel's name in its file.
        arch: ``"sm90"``, ...; anything without a file of its own takes ``default.json``.
        key: sorted ``(name, value)`` pairs; strings are matched, integers compared in log space.
    """
    call = dict(key)
    for name in (arch, "default"):
        candidates = [
            row
            for row in rows(op, name).get(kernel, [])
            if all(call.get(k) == v for k, v in row.get("match", {}).items())
        ]
        if candidates:
            return min(candidates, key=lambda row: _rank(row, call))["config"]
    raise LookupError(f"{op}: tuned/default.json has no row for {kernel} with {call}")


def _rank(row: dict[str, Any], call: dict[str, Any]) -> tuple[int, float]:
    at = row.get("at")
    if at is None:
        return -len(row.get("match", {})), math.inf
    distance = sum(abs(math.log2(max(v, 1)) - math.log2(max(call[k], 1))) for k, v in at.items())
    return -len(row.get("match", {})), distance


def arch_of(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}"
