"""``python benchmarks/plot.py RESULTS.json [...] FIGURE.svg``: our speed-up over the baseline, a bar a row.

Everything in the figure comes from the JSON: bars, conditions, machine. Void rows are listed, not drawn;
grey is equal within the noise that a row may have.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BETTER, EQUAL, WORSE, INK = "#2a7f62", "#9aa5ab", "#b5523b", "#333333"
NOISE = 0.03  # what a row may differ from itself


def rows(results: dict[str, Any], provider: str) -> tuple[list[tuple[str, float]], list[str]]:
    """(group, speed-up) of each row that counts, in the file's order, and the groups that are void."""
    drawn, void = [], []
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        if info.get("provider") != provider or "speedup" not in info:
            continue
        if info.get("void") or info["speedup"] is None:
            void.append(benchmark["group"])
        else:
            drawn.append((benchmark["group"], float(info["speedup"])))
    return drawn, void


def conditions(runs: list[dict[str, Any]]) -> str:
    machine = runs[0]["machine_info"]
    if any(run["machine_info"]["slug"] != machine["slug"] for run in runs):
        raise SystemExit("plot: the results are of different machines")
    versions = machine.get("versions", {})
    commits = dict.fromkeys(run.get("commit_info", {}).get("id", "")[:10] for run in runs)
    parts = [
        str(machine.get("gpu") or machine.get("cpu") or machine.get("slug")),
        machine.get("isa", ""),
        f"{machine.get('threads', '?')} thread",
        *(f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)),
        f"commit {', '.join(filter(None, commits))}",
        runs[0].get("datetime", "")[:10],
    ]
    return ", ".join(filter(None, parts))


def _color(speedup: float) -> str:
    return EQUAL if abs(speedup - 1) <= NOISE else BETTER if speedup > 1 else WORSE


def draw(runs: list[dict[str, Any]], provider: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sora_kernels"  # the same file from the same results
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    found = [rows(run, provider) for run in runs]
    drawn = [row for part, _ in found for row in part]
    void = [group for _, part in found for group in part]
    if not drawn:
        raise SystemExit(f"plot: no row of provider {provider!r} with a speed-up")
    drawn = drawn[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.24 * len(drawn)), layout="constrained")
    values = [value for _, value in drawn]
    bars = axes.barh(range(len(drawn)), values, color=[_color(v) for v in values], height=0.7)
    axes.bar_label(bars, [f"{v:.2f}x" for v in values], padding=3, fontsize=7, color=INK)
    axes.set_yticks(range(len(drawn)), [name for name, _ in drawn], fontsize=7)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_xlim(0, max(values) * 1.12)
    axes.set_ylim(-0.7, len(drawn) - 0.3)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time of stock torch / time of sora_kernels (1 = equal)", fontsize=8)
    note = f"; void (too noisy to count): {', '.join(void)}" if void else ""
    axes.set_title(conditions(runs) + note, fontsize=7, loc="left", color=INK, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("figure", type=Path)
    parser.add_argument("--provider", default="sora")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in arguments.results]
    draw(runs, arguments.provider, arguments.figure)


if __name__ == "__main__":
    main()
