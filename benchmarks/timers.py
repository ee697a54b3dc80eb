"""How a row is timed, and how its samples get into pytest-benchmark.

CPU: wall clock, interleaved rounds, and each round times the baseline twice: where the two differ
(A/A) by more than :data:`NOISE`, the row is void. GPU: CUDA events around a call with a cold L2, or
the replay of a CUDA graph for calls that are too short for events.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]
Timer = Callable[[Call, int], float]  # (call, times) -> seconds for all of them

ROUNDS = 30
NOISE = 0.03
INSTANCES = 8  # fresh modules, the fastest of which is the baseline: stock modules are bimodal
SAMPLE_SECONDS = 2e-3  # short calls are repeated to fill a sample
LONGEST = 1 << 18  # calls a sample
GRAPH_BELOW = 100e-6


@dataclass
class Measurement:
    """Seconds a call, by provider, and what they are worth.

    Attributes:
        samples: provider -> one value a round; rounds correspond.
        again: the baseline's second sample of each round.
        noise: |median of again/baseline - 1|.
        void: why the row must not be read, or "".
        method: what the clock was.
    """

    baseline: str
    samples: dict[str, list[float]]
    again: list[float]
    method: str
    calls: dict[str, int] = field(default_factory=dict)
    attempts: int = 1

    @property
    def noise(self) -> float:
        first = self.samples[self.baseline]
        return abs(statistics.median(b / a for a, b in zip(first, self.again, strict=True)) - 1)

    @property
    def void(self) -> str:
        if self.noise <= NOISE:
            return ""
        return f"A/A {self.noise:.1%}, more than {NOISE:.0%}: the machine was not quiet"

    def ratios(self, provider: str) -> list[float]:
        """Of each round: the baseline's time over the provider's (above 1: it is faster)."""
        own, base = self.samples[provider], self.samples[self.baseline]
        return [b / t for b, t in zip(base, own, strict=True)]

    def speedup(self, provider: str) -> float:
        return statistics.median(self.ratios(provider))


def wall(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Timer of the host's clock."""

    def timed(call: Call, times: int) -> float:
        loop = range(times)
        start = clock()
        for _ in loop:
            call()
        return clock() - start

    return timed


def fastest(make: Callable[[], Call], timer: Timer, instances: int = INSTANCES) -> Call:
    """The fastest of some fresh instances, by the best of three interleaved turns."""
    made = [make() for _ in range(instances)]
    for call in made:
        call()
    times = calls_for(made[0], timer)
    best = [math.inf] * instances
    for _ in range(3):
        for number, call in enumerate(made):
            best[number] = min(best[number], timer(call, times))
    return made[best.index(min(best))]


def calls_for(call: Call, timer: Timer, seconds: float = SAMPLE_SECONDS) -> int:
    """How often a call is made for one sample."""
    call()
    times = 1
    while (taken := timer(call, times)) < seconds / 4 and times < LONGEST:
        times *= 4
    return max(1, round(times * seconds / taken)) if 0 < taken < seconds else times


def measure(
    providers: dict[str, Call],
    baseline: str,
    *,
    timer: Timer,
    rounds: int = ROUNDS,
    attempts: int = 3,
    method: str = "wall clock",
    calls: dict[str, int] | None = None,
) -> Measurement:
    """Interleaved rounds; each times every provider once and the baseline once more.

    Odd rounds run in reverse, so that drift and what the neighbour left in the caches even out. A
    void measurement is repeated: what decides is the baseline against itself, never our time.

    Args:
        providers: name -> call; dictionary order is the order of a round.
        calls: how often each is called for one sample (found out by default).
    """
    if baseline not in providers:
        raise ValueError(f"baseline: expected one of {', '.join(providers)}, got {baseline!r}")
    calls = calls or {name: calls_for(call, timer) for name, call in providers.items()}
    found: list[Measurement] = []
    for attempt in range(1, attempts + 1):
        samples: dict[str, list[float]] = {name: [] for name in providers}
        again: list[float] = []
        order = [(name, call, samples[name]) for name, call in providers.items()]
        order.append((baseline, providers[baseline], again))
        with collected_garbage():
            for number in range(rounds):
                for name, call, kept in reversed(order) if number % 2 else order:
                    kept.append(timer(call, calls[name]) / calls[name])
        found.append(Measurement(baseline, samples, again, method, calls, attempt))
        if not found[-1].void:
            break
    return found[-1]


@contextmanager
def collected_garbage() -> Iterator[None]:
    """No collection inside: it would fall on one provider's sample."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Events:
    """Timer of the current CUDA stream: each call with a cold L2, between two events."""

    method = "CUDA events, L2 flushed"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(4 * size, 64 << 20), dtype=torch.int8, device="cuda")

    def __call__(self, call: Call, times: int) -> float:
        events = [
            tuple(self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(times)
        ]
        for start, end in events:
            self._flush.zero_()
            # About half a millisecond, in which the host gets ahead: its time is not the device's.
            self._torch.cuda._sleep(1_000_000)
            start.record()
            call()
            end.record()
        self._torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


class Graph:
    """A call captured many times over, on inputs that together do not fit the L2.

    Args:
        makers: fresh instances of the call on their own inputs, walked round robin.
        launches: how many calls the graph holds.
    """

    method = "CUDA graph replay, rotated inputs"

    def __init__(self, makers: Sequence[Call], launches: int = 32) -> None:
        import torch

        self.launches = launches
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in makers:
                call()
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for number in range(launches):
                makers[number % len(makers)]()

    def __call__(self) -> None:
        self.graph.replay()


def replay(call: Call, times: int) -> float:
    """Timer for a :class:`Graph`: one replay between two events, by the call inside it."""
    import torch

    assert isinstance(call, Graph)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = 0.0
    for _ in range(times):
        start.record()
        call()
        end.record()
        end.synchronize()
        taken += start.elapsed_time(end) / 1e3 / call.launches
    return taken


def inject(benchmark: Any, samples: Sequence[float], calls: int = 1) -> None:
    """Puts samples (seconds a call) into a pytest-benchmark fixture as if it had taken them.

    Its table, JSON and comparison then work as ever. Two private names carry this; a test fails
    if they vanish.
    """
    benchmark._mode = "injected"
    stats = benchmark._make_stats(calls)
    for sample in samples:
        stats.update(sample * calls)
