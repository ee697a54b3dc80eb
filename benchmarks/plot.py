"""``python benchmarks/plot.py RESULTS.json [...] FIGURE.svg``: our speed-up over the baseline, a bar a row.

Inference and training of one layer share a line, training paler. Everything in the figure comes from the JSON: bars,
conditions, machine. Void rows are listed, not drawn; grey is equal within the noise that a row may have. With
``--best`` a stroke in a bar is the speed-up over the strongest of its rivals.
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


def best(results: dict[str, Any], provider: str) -> dict[str, float]:
    """Group -> speed-up over the strongest rival, of rows that have rivals."""
    found = {
        b["group"]: b["extra_info"].get("speedup_over_best")
        for b in results["benchmarks"]
        if b["extra_info"].get("provider") == provider
    }
    return {group: value for group, value in found.items() if value is not None}


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


def _lines(drawn: list[tuple[str, float]]) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """Rows ``(mode, group, value)`` of the same group but for its mode, in order; "/cpu/fp32" goes without saying."""
    lines: dict[str, list[tuple[str, str, float]]] = {}
    for group, value in drawn:
        parts = group.replace("/cpu/fp32", "").split("/")
        mode = next((m for m in ("inference", "train") if m in parts), "")
        lines.setdefault("/".join(p for p in parts if p != mode), []).append((mode, group, value))
    return list(lines.items())


def draw(runs: list[dict[str, Any]], provider: str, path: Path, strokes: bool = False) -> None:
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
    strongest = {k: v for run in runs for k, v in best(run, provider).items()} if strokes else {}
    lines = _lines(drawn)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.22 * len(lines)), layout="constrained")
    for y, (_, modes) in enumerate(reversed(lines)):
        height = 0.84 / len(modes)
        for k, (mode, group, value) in enumerate(modes):
            centre = y + (len(modes) - 1 - 2 * k) * height / 2
            alpha = 0.6 if mode == "train" else 1.0
            bar = axes.barh(centre, value, height=height, color=_color(value), alpha=alpha)
            if group in strongest:
                ends = centre - height / 2, centre + height / 2
                axes.vlines(strongest[group], *ends, color=INK, linewidth=1.5)
            axes.bar_label(bar, [f"{value:.2f}x"], padding=2, fontsize=5, color=INK)
    axes.set_yticks(range(len(lines)), [name for name, _ in reversed(lines)], fontsize=7)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_xlim(0, max(value for _, value in drawn) * 1.08)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    meaning = "; stroke: strongest rival" if strongest else ""
    axes.set_xlabel(f"time of stock torch / time of sora_kernels (1 = equal{meaning})", fontsize=8)
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
    parser.add_argument("--best", action="store_true", help="also the speed-up over the best rival")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in arguments.results]
    draw(runs, arguments.provider, arguments.figure, arguments.best)


if __name__ == "__main__":
    main()
