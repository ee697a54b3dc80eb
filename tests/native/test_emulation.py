"""The host emulation (csrc/emu) itself: every mistake of emulated/errors.cu is reported, with its lines."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import DELIVERIES, POLICIES, Emulated, LaunchError, NoCompiler, build

ERRORS = Path(__file__).parent / "emulated" / "errors.cu"
CONFORMANCE = ERRORS.with_name("conformance.cu")
SEEDS = range(9)  # all policies with all deliveries
MISUSE = {
    "shared_write_past_the_end": "out of bounds: .* shared memory of CTA 0 [+]",
    "ldmatrix_past_the_end": "out of bounds: 16 bytes at shared memory of CTA 0 [+]",
    "global_read_past_the_end": "out of bounds: .* data [+]",
    "global_write_far_past_the_end": "out of bounds: .* data [+]",
    "write_one_word_past_the_end": r"out of bounds: .* data \+ 1012 \(of 1012 bytes\)",
    "vector_load_past_the_end": r"out of bounds: 16-byte read at data \+ 1008 \(of 1012 bytes\)",
    "cp_async_past_the_end": "out of bounds: 16-byte read at data [+]",
    "null_pointer": "out of bounds: access at address 0x",
    "misaligned_vector": r"misaligned: 16-byte access at data \+ 8",
    "exit_before_a_barrier": "thread 63 of CTA 0 exits while|after 1 threads of the CTA have exited",
    "barrier_in_a_branch": "divergent warp: thread .* is at barrier 0 here, other lanes at",
    "half_a_warp_multiplies": "exits while other lanes wait|names lanes that have exited",
    "two_ways_through_a_warp": "divergent warp",
    "shuffle_from_outside_the_mask": "reads lane 20, which is not in the mask 0000ffff",
    "wrong_count_of_a_barrier": "barrier 1 for (32|64) threads, .* said (64|32)|deadlock: 32 threads",
    "barrier_that_nobody_joins": "deadlock: 32 threads in a named barrier",
    "uninitialised_mbarrier": "no mbarrier was initialised there",
    "too_many_arrivals": "more arrivals than the 1 of this phase",
    "bytes_that_never_come": "deadlock: 1 threads in a wait for an mbarrier",
    "parity_of_the_phase_before": "deadlock: 1 threads in a wait for an mbarrier",
    "overwritten_mbarrier": "the mbarrier .* was overwritten",
    "flag_that_nobody_sets": "deadlock: 1 threads in a polling loop",
    "data_and_mbarrier_apart": "the data and the mbarrier of the copy lie in different CTAs",
    "store_to_an_exited_cta": "shared memory of CTA rank 1, which has exited",
    "struct_larger_than_the_launch": "takes 4096 bytes of shared memory, the launch gave",
    "stack_overflow": "stack overflow: a thread has .* bytes of local variables",
}
RACES = {
    "no_proxy_fence": "no fence.proxy.async since the write",
    "mbarrier_used_before_it_is_known": "unordered with its initialisation",
    "no_fence_after_init": "no fence_mbarrier_init since its initialisation",
}
RACE_NAMES = [
    name for name in re.findall(r"SORA_CASE\((\w+), \d", ERRORS.read_text()) if name not in MISUSE
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "race"])
def library(request) -> tuple[Path, bool]:
    return built(ERRORS, request.param)


def built(source: Path, race: bool) -> tuple[Path, bool]:
    try:
        return build(source, race=race), race
    except NoCompiler as why:
        pytest.skip(str(why))


def report_of(library: tuple[Path, bool], name: str, seed: int) -> str:
    """What a case's launch was ended with; empty if it was not."""
    path, race = library
    device = Emulated(path, race=race, seed=seed, max_switches=200_000)
    data = device.tensor(torch.zeros(253, dtype=torch.int32), "data")
    try:
        device.run("run_case", ctypes.c_char_p(name.encode()), data, 16)
    except LaunchError as error:
        return str(error)
    return ""


def marked_lines(name: str) -> set[str]:
    lines = enumerate(ERRORS.read_text().splitlines(), 1)
    found = {f"errors.cu:{number}" for number, line in lines if line.endswith(f"// {name}")}
    assert found, name
    return found


def lines_in(report: str) -> set[str]:
    return set(re.findall(r"errors\.cu:\d+", report))


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_reported_with_its_line(library, name):
    reports = [report_of(library, name, seed) for seed in SEEDS]
    # Threads in turn may be done before the other CTA exits.
    in_time = [r for r in reports if r or name != "store_to_an_exited_cta"]
    assert len(in_time) >= len(reports) - 2
    for report in in_time:
        assert re.search(MISUSE[name], report), report
        seen_after_the_launch = name == "write_one_word_past_the_end" and not library[1]
        other_branch = name in ("two_ways_through_a_warp", "barrier_in_a_branch")
        if other_branch:
            assert marked_lines(name) <= lines_in(report), report
        elif not seen_after_the_launch:
            assert marked_lines(name) == lines_in(report), report


@pytest.mark.parametrize("name", RACE_NAMES)
def test_races_are_reported_at_every_seed_with_both_lines(name):
    library = built(ERRORS, True)
    for seed in SEEDS:
        report = report_of(library, name, seed)
        assert re.search(RACES.get(name, "race: .*, unordered with"), report), (seed, report)
        assert lines_in(report) == marked_lines(name), report


def run_grid(device: Emulated, rounds: int = 3) -> torch.Tensor:
    values = device.tensor(torch.arange(12, dtype=torch.int32), "values")
    counter = device.tensor(torch.zeros(1, dtype=torch.int32), "counter")
    device.run("run_grid", values, counter, 6, rounds)
    return values.clone()


def test_a_seed_repeats_its_order_and_seeds_differ():
    path, race = built(CONFORMANCE, False)
    counts = []
    for seed in (5, 5, 8, 11):
        device = Emulated(path, race=race, seed=seed)
        out = device.tensor(torch.zeros(8, 3, 64, dtype=torch.int32), "out")
        counts.append(device.run("run_cluster", out))
    assert counts[0] == counts[1]
    assert len(set(counts)) == 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_every_policy_with_every_delivery(policy, delivery):
    path, race = built(CONFORMANCE, True)
    device = Emulated(path, race=race, seed=3, policy=policy, delivery=delivery)
    out = device.tensor(torch.zeros(8, 64, dtype=torch.int32), "out")
    x = device.tensor(torch.arange(64, dtype=torch.int32), "x")
    device.run("run_multicast", x, out)
    assert (out[1:4] == x.flip(0)).all()


def test_launches_go_on_after_an_error():
    library = built(ERRORS, True)
    for _ in range(3):
        assert "race" in report_of(library, "no_barrier", 1)
        assert "deadlock" in report_of(library, "bytes_that_never_come", 1)
        assert "out of bounds" in report_of(library, "null_pointer", 1)
    path, race = built(CONFORMANCE, True)
    assert run_grid(Emulated(path, race=race, seed=1)).any()


def test_a_livelock_ends():
    path, race = built(CONFORMANCE, False)
    with pytest.raises(LaunchError, match="no end after 500 switches"):
        run_grid(Emulated(path, race=race, seed=1, max_switches=500), rounds=50)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda d: d.run("run_math", None, None, 0), "the grid is empty"),
        (lambda d: d.run("run_flags", None, None, None, 70_000, 0), "more CTAs than"),
    ],
)
def test_launches_that_cannot_be_are_refused(run: Callable[[Emulated], None], why: str):
    path, race = built(CONFORMANCE, False)
    with pytest.raises(LaunchError, match=f"launch refused: .*{why}"):
        run(Emulated(path, race=race))


def test_memory_starts_as_nan():
    path, _ = built(CONFORMANCE, False)
    library = ctypes.CDLL(str(path))
    library.sora_emu_allocate.restype = ctypes.c_void_p
    address = library.sora_emu_allocate(ctypes.c_size_t(64), b"fresh")
    fresh = torch.tensor(list(ctypes.string_at(address, 64)), dtype=torch.uint8)
    assert fresh.view(torch.float32).isnan().all()
    library.sora_emu_release(ctypes.c_void_p(address))
