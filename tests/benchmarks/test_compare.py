from __future__ import annotations

import json
import random

import pytest

from benchmarks import compare

MACHINE: dict = {
    "slug": "box",
    "cpu": "box",
    "isa": "AVX2",
    "gpu": "",
    "threads": 1,
    "versions": {},
}
MACHINE["versions"] = {"torch": "2.13"}


def samples(center: float, spread: float, seed: int, n: int = 30) -> list[float]:
    chance = random.Random(seed)
    return [center * (1 + chance.gauss(0, spread)) for _ in range(n)]


def row(name: str, data: list[float], provider: str = "sora", **extra) -> dict:
    ordered = sorted(data)
    info = {"provider": provider, "baseline": "torch", "aa_noise": 0.005, "void": "", **extra}
    stats = {"data": data, "median": ordered[len(ordered) // 2]}
    group = name.rpartition("-")[0]
    return {"fullname": name, "group": group, "extra_info": info, "stats": stats}


def run(*rows: dict, **machine) -> dict:
    return {"machine_info": {**MACHINE, **machine}, "benchmarks": list(rows)}


def verdicts(base: dict, head: dict, threshold: float = 0.1, metric: str = "time") -> dict:
    return {v.name: v.verdict for v in compare.compare(base, head, threshold, metric)}


def test_a_regression_is_found_and_an_improvement_is_not_one():
    base = run(row("a-sora", samples(1e-3, 0.02, 1)), row("b-sora", samples(1e-3, 0.02, 2)))
    head = run(row("a-sora", samples(1.2e-3, 0.02, 3)), row("b-sora", samples(0.8e-3, 0.02, 4)))
    assert verdicts(base, head) == {"a-sora": "slower", "b-sora": "faster"}


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_flagged(seed):
    """The same 1 ms twice, a tenth of it noise: the medians differ, the interval says by chance."""
    base = run(row("a-sora", samples(1e-3, 0.1, 100 + seed)))
    head = run(row("a-sora", samples(1e-3, 0.1, 200 + seed)))
    assert verdicts(base, head) == {"a-sora": "same"}


def test_the_noise_floor_of_either_run_counts():
    data = samples(1e-3, 0.01, 1), samples(1.15e-3, 0.01, 2)
    quiet = [run(row("a-sora", d)) for d in data]
    assert verdicts(*quiet) == {"a-sora": "slower"}
    noisy = [run(row("a-sora", d, aa_noise=n)) for d, n in zip(data, (0.2, 0.001), strict=True)]
    assert verdicts(*noisy) == {"a-sora": "same"}


def test_the_interval_holds_the_ratio():
    point, low, high = compare.ratio(samples(1, 0.05, 1), samples(1.3, 0.05, 2), seed="x")
    assert low < point < high and low < 1.3 < high and high - low < 0.15
    assert (point, low, high) == compare.ratio(samples(1, 0.05, 1), samples(1.3, 0.05, 2), seed="x")


def test_void_new_and_gone_rows_are_listed_and_not_judged():
    slow = samples(2e-3, 0.01, 1)
    base = run(row("v-sora", samples(1e-3, 0.01, 2)), row("gone-sora", slow))
    head = run(row("v-sora", slow, void="A/A 5.0%"), row("new-sora", slow))
    assert verdicts(base, head) == {
        "v-sora": "void: A/A 5.0%",
        "gone-sora": "gone",
        "new-sora": "new",
    }


def test_speedups_survive_a_slower_day():
    """Everything takes 1.5 times as long; one operator lost its lead all the same."""

    def day(factor: float, ours: float, seed: int) -> dict:
        base = samples(1e-3 * factor, 0.02, seed)
        chance = random.Random(seed)
        own = [t / 2 * ours * (1 + chance.gauss(0, 0.01)) for t in base]
        keep = [t / 2 * (1 + chance.gauss(0, 0.01)) for t in base]
        return run(
            row("a-torch", base, "torch"), row("a-sora", own), row("a-sora:native", keep)
        )  # fmt: skip

    found = verdicts(day(1, 1, 1), day(1.5, 1.4, 2), metric="speedup")
    assert found == {"a-sora": "slower", "a-sora:native": "same"}
    assert set(verdicts(day(1, 1, 1), day(1.5, 1.4, 2)).values()) == {"slower"}


@pytest.mark.parametrize(
    "machine", [{"cpu": "other"}, {"isa": "AVX512"}, {"gpu": "H100"}, {"threads": 2}], ids=str
)
def test_another_machine_is_refused(machine, tmp_path, capsys):
    base, head = run(row("a-sora", [1.0])), run(row("a-sora", [1.0]), **machine)
    with pytest.raises(compare.Refused, match=next(iter(machine))):
        compare.compare(base, head, 0.1)
    for name, found in (("base", base), ("head", head)):
        (tmp_path / name).write_text(json.dumps(found))
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "head")]) == 2
    assert "different machines" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    base = run(row("t.py::a-sora", samples(1e-3, 0.01, 1)), row("t.py::b-sora", [2e-6] * 30))
    head = run(row("t.py::a-sora", samples(2e-3, 0.01, 2)), row("t.py::b-sora", [2e-6] * 30))
    head["machine_info"]["versions"] = {"torch": "2.14"}
    paths = []
    for name, found in (("base", base), ("head", head)):
        paths.append(str(tmp_path / name))
        (tmp_path / name).write_text(json.dumps(found))
    assert compare.main(paths) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "torch: 2.13 -> 2.14"
    assert out[3].startswith("| a-sora | 1.0") and out[3].endswith("| slower |")
    assert out[4] == "| b-sora | 2.0 us | 2.0 us | 1.000 | 1.000 to 1.000 | 0.5% | same |"
    assert compare.main([paths[0], paths[0]]) == 0
    (tmp_path / "other").write_text("{}")
    assert compare.main([paths[0], str(tmp_path / "other")]) == 2
    assert "machine_info.slug is missing" in capsys.readouterr().err
