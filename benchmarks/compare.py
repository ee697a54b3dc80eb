"""Two result files -> a Markdown table, and an exit status: ``python benchmarks/compare.py
base.json head.json``.

A row has regressed only if the whole 95 % bootstrap interval of its median ratio lies beyond the
threshold *and* beyond what the baseline differed from itself in either run (A/A). Void rows and
rows of one file alone are listed and never judged. Results of different machines are refused.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARDWARE = ("cpu", "isa", "gpu", "threads")
DRAWS = 2000


class Refused(RuntimeError):
    """The two files cannot be compared; the message says why."""


@dataclass
class Verdict:
    """One row of the table. ``ratio``: head over base; of times, above 1 is slower."""

    name: str
    base: float | None
    head: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    noise: float = 0.0
    verdict: str = ""


def load(path: Path) -> dict[str, Any]:
    """A pytest-benchmark JSON with this suite's ``machine_info`` and samples."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: not readable as JSON: {error}") from None
    if "benchmarks" not in found or "slug" not in found.get("machine_info", {}):
        raise Refused(f"{path}: not a result of this suite (machine_info.slug is missing)")
    return found


def compare(
    base: dict[str, Any], head: dict[str, Any], threshold: float, metric: str = "time"
) -> list[Verdict]:
    """A verdict for each row of either file, by name.

    Args:
        threshold: least change that counts, as a share (0.1).
        metric: ``"time"``, or ``"speedup"``: ours over the baseline of the same run, round by
            round, which survives a slower or faster day of the machine.

    Raises:
        Refused: the files come from different machines.
    """
    if found := differences(base["machine_info"], head["machine_info"]):
        raise Refused("results of different machines: " + "; ".join(found))
    olds, news = ({b["fullname"]: b for b in run["benchmarks"]} for run in (base, head))
    groups = [_groups(run) for run in (base, head)]
    verdicts = []
    for name in sorted({*olds, *news}):
        old, new = olds.get(name), news.get(name)
        if old is None or new is None:
            row = Verdict(name, _median(old), _median(new))
            row.verdict = "new" if old is None else "gone"
            verdicts.append(row)
            continue
        row = Verdict(name, _median(old), _median(new))
        verdicts.append(row)
        void = old["extra_info"].get("void") or new["extra_info"].get("void")
        if void:
            row.verdict = f"void: {void}"
            continue
        if metric == "speedup":
            if old["extra_info"].get("provider") == old["extra_info"].get("baseline"):
                verdicts.pop()
                continue
            samples = [_ratios(b, g) for b, g in zip((old, new), groups, strict=True)]
        else:
            samples = [b["stats"]["data"] for b in (old, new)]
        row.noise = max(abs(b["extra_info"].get("aa_noise", 0.0)) for b in (old, new))
        row.ratio, row.low, row.high = ratio(*samples, seed=name)
        row.verdict = judge(row.low, row.high, threshold, row.noise)
    return verdicts


def ratio(base: list[float], head: list[float], seed: str) -> tuple[float, float, float]:
    """Median of head over median of base, and the 95 % bootstrap interval (seeded by the row's
    name)."""
    chance = random.Random(seed)
    drawn = sorted(
        statistics.median(chance.choices(head, k=len(head)))
        / statistics.median(chance.choices(base, k=len(base)))
        for _ in range(DRAWS)
    )
    point = statistics.median(head) / statistics.median(base)
    return point, drawn[round(DRAWS * 0.025)], drawn[round(DRAWS * 0.975) - 1]


def judge(low: float, high: float, threshold: float, noise: float) -> str:
    """``"slower"`` or ``"faster"`` only where the interval clears the threshold and the noise
    floor."""
    least = max(threshold, noise)
    if low > 1 + least:
        return "slower"
    if high < 1 / (1 + least):
        return "faster"
    return "same"


def _groups(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group -> its baseline's row."""
    return {
        b["group"]: b
        for b in run["benchmarks"]
        if b["extra_info"].get("provider") == b["extra_info"].get("baseline")
    }


def _ratios(row: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> list[float]:
    """Of each round: the row's time over its baseline's (above: slower, as with times)."""
    baseline = baselines.get(row["group"])
    if baseline is None:
        return row["stats"]["data"]
    pairs = zip(row["stats"]["data"], baseline["stats"]["data"], strict=True)
    return [own / other for own, other in pairs]


def _median(row: dict[str, Any] | None) -> float | None:
    return None if row is None else row["stats"]["median"]


def differences(base: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """A line for each piece of hardware that two ``machine_info`` do not share."""
    return [
        f"{key}: {base.get(key)!r} and {head.get(key)!r}"
        for key in HARDWARE
        if base.get(key) != head.get(key)
    ]


def versions(base: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """Lines about versions that differ: worth saying, no reason to refuse."""
    old, new = (run["machine_info"].get("versions", {}) for run in (base, head))
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def render(rows: list[Verdict]) -> str:
    """The table, what changed first."""
    lines = ["| row | base | head | head / base | 95 % | A/A | |", "|---|---|---|---|---|---|---|"]
    order = {"slower": 0, "faster": 1, "same": 3}
    for row in sorted(rows, key=lambda row: (order.get(row.verdict, 2), row.name)):
        cells = [row.name.rpartition("::")[2], _seconds(row.base), _seconds(row.head)]
        if row.ratio is None:
            cells += ["", "", ""]
        else:
            cells += [f"{row.ratio:.3f}", f"{row.low:.3f} to {row.high:.3f}", f"{row.noise:.1%}"]
        lines.append(f"| {' | '.join([*cells, row.verdict])} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value * 1e3:.3f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def main(argv: list[str] | None = None) -> int:
    """0: no regression. 1: at least one. 2: the files cannot be compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="share (default %(default)s)")
    parser.add_argument("--metric", choices=("time", "speedup"), default="time")
    options = parser.parse_args(argv)
    try:
        base, head = load(options.base), load(options.head)
        rows = compare(base, head, options.threshold, options.metric)
    except Refused as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for line in versions(base, head):
        print(line)
    print(render(rows))
    slower = [row for row in rows if row.verdict == "slower"]
    if slower:
        print(f"\n{len(slower)} of {len(rows)} rows are slower", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
