from __future__ import annotations

import random

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")

from benchmarks import timers  # noqa: E402


class Clock:
    """A clock that only its calls move forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def costs(self, name: str, seconds) -> timers.Call:
        def call() -> None:
            self.log.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return call


def test_rounds_are_interleaved_and_turned_around():
    clock = Clock()
    providers = {name: clock.costs(name, 1e-3) for name in ("torch", "sora")}
    calls = {"torch": 1, "sora": 1}
    timers.measure(providers, "torch", timer=timers.wall(clock), rounds=4, calls=calls)
    assert clock.log == ["torch", "sora", "torch"] * 4
    clock.log.clear()
    providers["compile"] = clock.costs("compile", 1e-3)
    calls["compile"] = 1
    timers.measure(providers, "torch", timer=timers.wall(clock), rounds=2, calls=calls)
    assert clock.log == ["torch", "sora", "compile", "torch", "torch", "compile", "sora", "torch"]


def test_ratios_come_from_the_same_round():
    """The machine slows down threefold over the run: the ratio stays what it is."""
    clock = Clock()
    pace = iter([1 + 2 * k / 90 for k in range(90)])
    providers = {
        "torch": clock.costs("torch", lambda: 2e-3 * next(pace)),
        "sora": clock.costs("sora", lambda: 1e-3 * next(pace)),
    }
    found = timers.measure(
        providers, "torch", timer=timers.wall(clock), rounds=30, calls={"torch": 1, "sora": 1}
    )
    assert not found.void and found.attempts == 1
    assert found.speedup("sora") == pytest.approx(2, rel=0.01)
    assert found.samples["torch"][-1] > 2.5 * found.samples["torch"][0]


def test_a_noisy_machine_makes_the_row_void():
    """The baseline's second sample of a round is a tenth above its first."""
    count = {"samples": 0}

    def second_is_slower(call: timers.Call, times: int) -> float:
        at = count["samples"] % 6  # forward: first, ours, second; backward: second, ours, first
        count["samples"] += 1
        return 1.1e-3 if at in (2, 3) else 1e-3

    found = timers.measure(
        {"torch": lambda: None, "sora": lambda: None}, "torch", timer=second_is_slower,
        rounds=30, attempts=2, calls={"torch": 1, "sora": 1},
    )  # fmt: skip
    assert found.attempts == 2
    assert found.noise == pytest.approx(0.1) and "A/A 10.0%, more than 3%" in found.void
    found.again = [1.02 * t for t in found.samples["torch"]]
    assert found.void == ""


def test_void_measurements_are_repeated_and_the_count_is_kept():
    clock = Clock()
    chance = random.Random(0)
    settled = {"after": 3 * 30}

    def seconds() -> float:
        if len(clock.log) < settled["after"]:
            return 1e-3 if len(clock.log) % 3 == 1 else 2e-3
        return 1e-3 * (1 + chance.gauss(0, 0.002))

    providers = {"torch": clock.costs("torch", seconds), "sora": clock.costs("sora", 1e-3)}
    found = timers.measure(
        providers, "torch", timer=timers.wall(clock), rounds=30, calls={"torch": 1, "sora": 1}
    )
    assert found.attempts == 2 and found.void == ""


def test_short_calls_fill_a_sample():
    clock = Clock()
    timer = timers.wall(clock)
    assert timers.calls_for(clock.costs("long", 0.5), timer) == 1
    number = timers.calls_for(clock.costs("short", 1e-6), timer)
    assert number * 1e-6 == pytest.approx(timers.SAMPLE_SECONDS, rel=0.01)
    assert timers.calls_for(clock.costs("free", 0.0), timer) == timers.LONGEST


def test_the_baseline_is_the_fastest_fresh_instance():
    """Stock modules are bimodal: every third one here is fast."""
    clock = Clock()
    made = []

    def make() -> timers.Call:
        seconds = 1e-3 if len(made) % 3 == 1 else 2e-3
        made.append(clock.costs(str(len(made)), seconds))
        return made[-1]

    best = timers.fastest(make, timers.wall(clock))
    assert len(made) == timers.INSTANCES and best is made[1]


def test_unknown_baseline():
    with pytest.raises(ValueError, match="baseline: expected one of a"):
        timers.measure({"a": lambda: None}, "b", timer=timers.wall())


def test_garbage_is_not_collected_inside(monkeypatch):
    import gc

    assert gc.isenabled()
    with timers.collected_garbage():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_samples_reach_pytest_benchmark(benchmark):
    """Two private names of pytest-benchmark carry the injection; here they are."""
    timers.inject(benchmark, [1e-3, 3e-3, 2e-3], calls=4)
    stats = benchmark.stats.stats
    assert (stats.median, stats.min, stats.rounds) == (pytest.approx(2e-3), 1e-3, 3)
    assert benchmark.stats.iterations == 4
    assert list(benchmark.stats.as_dict()["stats"]["data"]) == pytest.approx([1e-3, 3e-3, 2e-3])
