"""Offline tuning of Triton configs on this machine's GPU: ``python -m sora_kernels.tune OP``.

Every candidate config of a kernel runs the operator's own launchers (``ops/<op>/launches.py``) on
the layers of ``benchmarks/shapes.yaml``, is first compared with the config that ships, and is timed
with a cold L2. Layers that share a key (channels, layout, item size: never the batch) are judged
together. A row is written to ``ops/<op>/tuned/<arch>.json`` only where the best candidate beats the
shipped config by more than :data:`MARGIN`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sora_kernels import _launches, _tuning
from sora_kernels.audit import AuditError, require_compiler, shapes

Config = dict[str, int]
Rows = dict[str, list[dict[str, Any]]]

MARGIN = 0.03  # do_bench medians of one kernel repeat to about 1 %
MATCHED = ("layout", "itemsize", "mode")  # the rest of a key is compared by distance


class TuneError(RuntimeError):
    """Tuning cannot run here; the message says why."""


def candidates(grid: dict[str, Sequence[int]], key: dict[str, Any]) -> list[Config]:
    """Every config of a grid that differs for this key: channel blocks end at its channels."""
    widest = 1 << max(key["channels"] - 1, 0).bit_length()
    found = []
    for values in itertools.product(*grid.values()):
        config = dict(zip(grid, values, strict=True))
        block = config.get("BLOCK_C", 1)
        if block <= widest or block == min(grid["BLOCK_C"]):
            found.append(config)
    return found


def choose(times: dict[int, list[float]], shipped: list[float]) -> tuple[int, float] | None:
    """The best candidate by geometric mean of its times over the shipped config's.

    Args:
        times: candidate -> a time for each launch; a candidate that failed somewhere is left out.
        shipped: the shipped config's times.

    Returns:
        Candidate and its ratio (< 1 is faster), or None if none is faster by :data:`MARGIN`.
    """
    ratios = {
        number: math.exp(
            sum(math.log(t / s) for t, s in zip(own, shipped, strict=True)) / len(shipped)
        )
        for number, own in times.items()
    }
    best = min(ratios, key=ratios.__getitem__, default=None)
    if best is None or ratios[best] > 1 - MARGIN:
        return None
    return best, ratios[best]


def merge(rows: Rows, kernel: str, key: dict[str, Any], config: Config, **notes: Any) -> Rows:
    """``rows`` with one for ``key``: it takes the place of the row with the same key."""
    match = {name: key[name] for name in MATCHED if name in key}
    at = {name: value for name, value in key.items() if name not in MATCHED}
    row = {"match": match, "at": at, "config": config, **notes}
    kept = [r for r in rows.get(kernel, []) if (r.get("match"), r.get("at")) != (match, at)]
    ordered = sorted([*kept, row], key=lambda r: json.dumps([r.get("match"), r.get("at")]))
    return {**rows, kernel: ordered}


def write(path: Path, rows: Rows) -> None:
    """A row a line, as in the shipped files."""
    kernels = [
        f"  {json.dumps(kernel)}: [\n"
        + ",\n".join(f"    {json.dumps(row)}" for row in found)
        + "\n  ]"
        for kernel, found in sorted(rows.items())
    ]
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


@contextmanager
def forced(module: Any, kernel: str, config: Config) -> Iterator[None]:
    """Launches of ``kernel`` inside take ``config``."""
    lookup = _tuning.config

    def chosen(op: str, name: str, arch: str, key: _tuning.Key) -> Config:
        return config if (op, name) == (module.OP, kernel) else lookup(op, name, arch, key)

    with mock.patch.object(_tuning, "config", chosen):
        module.forget_plans()
        try:
            yield
        finally:
            module.forget_plans()


def tune(op: str, layers: Sequence[str] | None, report: Callable[[str], None] = print) -> Path:
    """Tunes every kernel of ``op`` on the current GPU; returns the file written.

    Raises:
        TuneError: no GPU, no Triton, or an unknown name.
    """
    module, known = _start(op, layers)
    import torch
    import triton

    arch = _tuning.arch_of(torch.cuda.get_device_capability())
    path = Path(_tuning.__file__).parent / "ops" / op / "tuned" / f"{arch}.json"
    rows: Rows = json.loads(path.read_text()) if path.is_file() else {}
    device, version = torch.cuda.get_device_name(), triton.__version__
    for (kernel, _), group in _groups(module, known, layers).items():
        # Tensors of a group are made when it is its turn: all together would not fit.
        runs = [launch for make in group for launch in make() if kernel in launch.kernels]
        shipped = [(launch.run(), _time(launch)) for launch in runs]
        grid = candidates(module.CANDIDATES[runs[0].key["layout"]], runs[0].key)
        times = {}
        for number, config in enumerate(grid):
            with forced(module, kernel, config):
                try:
                    for launch, (expected, _) in zip(runs, shipped, strict=True):
                        _check(launch.run(), expected, f"{kernel} {config}")
                    times[number] = [_time(launch) for launch in runs]
                except (triton.runtime.errors.OutOfResources, AssertionError) as error:
                    report(f"{kernel} {config}: left out: {error}")
        best = choose(times, [time for _, time in shipped])
        what = f"{kernel} {runs[0].key}"
        if best is None:
            report(f"{what}: the shipped config stays ({len(times)} tried)")
            continue
        number, ratio = best
        notes = {"ratio": round(ratio, 3), "device": device, "triton": version}
        rows = merge(rows, kernel, runs[0].key, grid[number], **notes)
        write(path, rows)
        report(f"{what}: {grid[number]}, {ratio:.3f} x the shipped time")
    return path


def check(
    op: str,
    layers: Sequence[str] | None,
    where: dict[str, Sequence[int]] | None = None,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Runs candidate configs against the shipped one without timing them; returns what failed.

    Args:
        where: only candidates with one of these values, such as ``{"num_warps": (8,)}``.
    """
    module, known = _start(op, layers)
    failures, tried = [], 0
    for (kernel, _), group in _groups(module, known, layers).items():
        for launch in (launch for make in group for launch in make() if kernel in launch.kernels):
            expected = launch.run()
            for config in candidates(module.CANDIDATES[launch.key["layout"]], launch.key):
                if any(config.get(name) not in values for name, values in (where or {}).items()):
                    continue
                tried += 1
                try:
                    with forced(module, kernel, config):
                        _check(launch.run(), expected, f"{kernel} ({launch.label}) {config}")
                except Exception as error:  # a config that does not run is a finding too
                    failures.append(f"{type(error).__name__}: {error}")
                    report(failures[-1])
    report(f"{tried} configs tried, {len(failures)} failed")
    return failures


def _start(op: str, layers: Sequence[str] | None) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The operator's launches and layers; raises :class:`TuneError` where nothing can run."""
    import torch

    try:
        require_compiler()
    except AuditError as error:
        raise TuneError(str(error)) from None
    if not torch.cuda.is_available():
        raise TuneError("no CUDA GPU: configs are measured on the GPU they are for, never guessed")
    modules = _launches.operators()
    if op not in modules:
        raise TuneError(f"op: expected one of {', '.join(modules)}, got {op!r}")
    known = shapes(getattr(modules[op], "SHAPES", op))
    if unknown := [name for name in layers or () if name not in known]:
        raise TuneError(f"shapes: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return modules[op], known


def _groups(
    module: Any, known: dict[str, dict[str, Any]], layers: Sequence[str] | None
) -> dict[tuple[str, str], list[Callable[[], list[_launches.Launch]]]]:
    """(kernel, key) -> makers of its launches on the GPU."""
    groups: dict[tuple[str, str], list[Callable[[], list[_launches.Launch]]]] = defaultdict(list)
    for layer in layers or known:
        found: set[tuple[str, str]] = set()
        for launch in module.launches(layer, known[layer], device="meta"):
            found.update((kernel, json.dumps(launch.key)) for kernel in launch.kernels)
        for kernel, key in sorted(found):

            def make(layer: str = layer, key: str = key) -> list[_launches.Launch]:
                made = module.launches(layer, known[layer], device="cuda")
                return [launch for launch in made if json.dumps(launch.key) == key]

            groups[kernel, key].append(make)
    return groups


def _time(launch: _launches.Launch) -> float:
    """Milliseconds, median, L2 flushed before each."""
    from triton.testing import do_bench

    return do_bench(launch.run, warmup=10, rep=40, return_mode="median")


def _check(found: tuple[Any, ...], expected: tuple[Any, ...], name: str) -> None:
    from sora_kernels import testing

    for ours, other in zip(found, expected, strict=True):
        if ours is None:
            continue
        if not ours.is_floating_point():
            if not ours.equal(other):
                raise AssertionError(f"{name}: places of the maxima differ")
            continue
        if ours.dtype.itemsize > 2:
            testing.assert_close(ours, other, "composition_fp32", name=name)
            continue
        allowed = 2 * testing.floor(ours.dtype, other.abs().max().item())
        difference = (ours.double() - other.double()).abs().max().item()
        if not difference <= allowed:
            raise AssertionError(f"{name}: difference {difference:.3e}, allowed {allowed:.3e}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sora_kernels.tune",
        description="Measure Triton configs on this GPU and add the faster ones to tuned/.",
    )
    parser.add_argument("op", help="operator, such as conv3d_bn_act")
    parser.add_argument("--shapes", nargs="+", help="layers of benchmarks/shapes.yaml (all)")
    parser.add_argument("--check", action="store_true", help="compare results, time nothing")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="NAME=N[,N]", help="with --check: num_warps=8"
    )
    options = parser.parse_args(argv)
    try:
        if options.check:
            where: dict[str, Sequence[int]] = {}
            for item in options.where:
                name, _, values = item.partition("=")
                where[name] = tuple(map(int, values.split(",")))
            return 1 if check(options.op, options.shapes, where) else 0
        print(f"wrote {tune(options.op, options.shapes)}")
    except (TuneError, AuditError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
