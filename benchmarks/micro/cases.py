"""The primitives that are measured: their launches, what they must compute, what they are expected to cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Estimates, made before anything was measured: an H200 at its sustained clock, from published figures for Hopper and
# from compiled sketches of the kernels. (least, most), in nanoseconds or cycles.
PREDICTED_FOR = "H200, 1.75 GHz"
CLOCK_GHZ = 1.75
BLOCK_BARRIER = (0, 60)  # cycles, with a store before it
CLUSTER_BARRIER = (200, 300)
GRID_BARRIER = (1200, 1600)
L2_FLAGS = (700, 1000)
PING_PONG = (150, 300)
ALL_GATHER = (320, 420)  # cycles: store and barrier, then the exchange with its wait
DSMEM_BYTES_PER_CYCLE = 15  # of an SM
L2_BYTES_PER_CYCLE = 26
# Cycles between products of a scheduler: at the peak of wgmma, and at the 62 % of it that mma.sync is known to reach;
# TF32 has half the rate for half the work. A product that waits for the one before: 8 in a row take about 260.
PRODUCT = (4.0, 6.4)
PRODUCT_LATENCY = 32.5
CLUSTERS_OF_16 = (7, 8)
LAUNCH_US = {"events": (2.0, 2.5), "graph": (1.2, 1.5)}

CLUSTER_BARRIERS = ("relaxed", "ordered", "exchange")
EVERY_CLUSTER = (2, 4, 8, 16)
# H, CTAs: a CTA has H / CTAs units of 8 rows, 16 bits each.
GATHERED = ((256, 4), (256, 8), (384, 8), (512, 8), (256, 16), (512, 16))
# Of a CTA that has weights in registers alone, half of them in shared memory, or takes all there is.
PLAN_SHARED_BYTES = {"registers": 34 << 10, "registers and shared": 162 << 10, "all": 227 << 10}
FIRST_ROUNDS = 64

Cycles = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        function: of ``cuda/micro.cu``; ``arguments`` come before the rounds and the buffers.
        ctas, warps: of the launch.
        out_words, scratch_words: 32-bit words of the buffers.
        expected: the words of ``out`` after some rounds; None where nothing is computed.
        operations: what one round holds, one after another; the report is about one.
        predicted_ns: least and most.
        needs: compute capability.
    """

    name: str
    parameters: dict[str, Any]
    function: str
    arguments: tuple[int, ...]
    ctas: int
    warps: int
    out_words: int
    expected: Callable[[int], torch.Tensor] | None = None
    scratch_words: int = 1
    operations: int = 1
    predicted_ns: tuple[float, float] | None = None
    needs: tuple[int, int] = field(default=(8, 0))


def all_cases(sms: int) -> list[Case]:
    """Every case of a GPU with ``sms`` multiprocessors; the cheap and most telling first."""
    grids = sorted({ctas for ctas in (2, 4, 8, 16, 32, 64, 128, sms) if ctas <= sms})
    flags = [ctas for ctas in grids if ctas <= 128]
    pairs = [(bulk, size) for bulk in (False, True) for size in EVERY_CLUSTER]
    return [
        *(block_barrier(e, warps) for e in (False, True) for warps in (2, 4, 8, 16)),
        *(cluster_barrier(kind, size) for kind in CLUSTER_BARRIERS for size in EVERY_CLUSTER),
        *(ping_pong(bulk, size) for bulk, size in pairs),
        *(all_gather(bulk, h, ctas) for bulk in (False, True) for h, ctas in GATHERED),
        *(l2_flags(e, True, ctas) for e in (False, True) for ctas in flags),
        *(l2_flags(True, False, ctas) for ctas in flags),
        *(grid_barrier(e, ctas) for e in (False, True) for ctas in grids),
        *(products(tf32, 4, 32, warps) for tf32 in (False, True) for warps in (4, 8)),
        *(
            products(tf32, chains, 16, 4 * each)
            for tf32 in (False, True)
            for chains in (1, 2, 4, 8)
            for each in (1, 2, 3, 4)
        ),
    ]


def block_barrier(exchange: bool, warps: int) -> Case:
    i = torch.arange(32 * warps)
    return Case(
        "block barrier",
        {"exchange": exchange, "warps": warps},
        "micro_block_barrier",
        (int(exchange), warps),
        ctas=1,
        warps=warps,
        out_words=32 * warps,
        expected=lambda rounds: (i + 32 * rounds) % len(i) + rounds if exchange else i,
        predicted_ns=_nanoseconds(BLOCK_BARRIER),
    )


def cluster_barrier(kind: str, size: int) -> Case:
    rank, i = torch.arange(size)[:, None], torch.arange(256)

    def expected(rounds: int) -> torch.Tensor:
        if kind != "exchange":
            return 256 * rank + i
        return 256 * ((rank - rounds) % size) + i + rounds

    return Case(
        "cluster barrier",
        {"kind": kind, "cluster": size},
        "micro_cluster_barrier",
        (CLUSTER_BARRIERS.index(kind), size),
        ctas=size,
        warps=8,
        out_words=size * 256,
        expected=expected,
        predicted_ns=CLUSTER_BARRIER,
        needs=(9, 0),
    )


def grid_barrier(exchange: bool, ctas: int) -> Case:
    cta = torch.arange(ctas)
    return Case(
        "grid barrier",
        {"exchange": exchange, "ctas": ctas},
        "micro_grid_barrier",
        (int(exchange), ctas),
        ctas=ctas,
        warps=8,
        out_words=ctas,
        scratch_words=32 + 2 * ctas,
        expected=lambda rounds: (cta + rounds) % ctas + rounds if exchange else cta,
        predicted_ns=GRID_BARRIER,
    )


def ping_pong(bulk: bool, size: int) -> Case:
    def expected(rounds: int) -> torch.Tensor:
        return torch.tensor([2 * rounds, *[0] * (size - 2), 2 * rounds - 1])

    return Case(
        "DSMEM one way",
        {"by": _sent_by(bulk), "cluster": size},
        "micro_ping_pong",
        (int(bulk), size),
        ctas=size,
        warps=1,
        out_words=size,
        expected=expected,
        operations=2,
        predicted_ns=PING_PONG,
        needs=(9, 0),
    )


def all_gather(bulk: bool, hidden: int, size: int, warps: int = 8) -> Case:
    slice_bytes = hidden // size * 8 * 2
    words = slice_bytes // 4
    rank, word = torch.arange(size)[:, None], torch.arange(words)

    def expected(rounds: int) -> torch.Tensor:
        slices = 1000 * ((rank + rounds) % size) + word + rounds
        return slices.expand(size, size, words)

    arriving = size * slice_bytes / DSMEM_BYTES_PER_CYCLE
    return Case(
        "DSMEM all-gather",
        {"by": _sent_by(bulk), "hidden": hidden, "cluster": size, "slice_bytes": slice_bytes},
        "micro_all_gather",
        (int(bulk), size, slice_bytes, warps),
        ctas=size,
        warps=warps,
        out_words=size * size * words,
        expected=expected,
        predicted_ns=_nanoseconds((ALL_GATHER[0], max(ALL_GATHER[1], arriving))),
        needs=(9, 0),
    )


def l2_flags(exchange: bool, pause: bool, ctas: int) -> Case:
    cta, lane = torch.arange(ctas)[:, None], torch.arange(32)

    def expected(rounds: int) -> torch.Tensor:
        if not exchange:
            return torch.cat([32 * cta + lane, torch.zeros(ctas, 256, dtype=torch.int64)], 1)
        vectors = torch.arange(ctas * 8)
        sums = torch.zeros(256, dtype=torch.int64)
        for round in range(rounds):
            words = 32 * ((cta + round) % ctas) + lane + round
            sums.index_add_(0, vectors % 256, words.view(-1, 4).sum(1))
        handed = 32 * ((cta + rounds) % ctas) + lane + rounds
        return torch.cat([handed, sums.expand(ctas, 256)], 1)

    read = 128 * ctas / L2_BYTES_PER_CYCLE / CLOCK_GHZ if exchange else 0
    return Case(
        "L2 flags, all to all",
        {"exchange": exchange, "pause": pause, "ctas": ctas},
        "micro_l2_flags",
        (int(exchange), int(pause), ctas),
        ctas=ctas,
        warps=8,
        out_words=ctas * (32 + 256),
        scratch_words=256 + 2 * ctas * 32,
        expected=expected,
        predicted_ns=(L2_FLAGS[0] + read, L2_FLAGS[1] + read),
    )


def products(tf32: bool, chains: int, tiles: int, warps: int) -> Case:
    """Of one SM; ``cycles`` are those between two products of a scheduler."""
    each = -(-warps // 4)

    def expected(rounds: int) -> torch.Tensor:
        depth = 8 if tf32 else 16
        sums = torch.zeros(chains, 4)
        for k in range(tiles):
            sums[k % chains] += rounds * depth * (1 + k % 3) * (1 + k // 4 % 2)
        return sums.expand(32 * warps, chains, 4).contiguous().view(torch.int32).long()

    waiting = PRODUCT_LATENCY / (chains * each)
    return Case(
        "mma, A in registers",
        {
            "shape": "m16n8k8 tf32" if tf32 else "m16n8k16 bf16",
            "chains": chains,
            "tiles": tiles,
            "warps_per_scheduler": each,
        },
        "micro_products",
        (int(tf32), chains, tiles, warps),
        ctas=1,
        warps=warps,
        out_words=32 * warps * chains * 4,
        expected=expected,
        operations=tiles * each,
        predicted_ns=_nanoseconds((max(PRODUCT[0], waiting), max(PRODUCT[1], waiting))),
    )


def _sent_by(bulk: bool) -> str:
    return "cp.async.bulk" if bulk else "st.async"


def _nanoseconds(cycles: Cycles) -> tuple[float, float]:
    return cycles[0] / CLOCK_GHZ, cycles[1] / CLOCK_GHZ
