"""Removes every synchronisation of a kernel in turn, and says which tests notice.

A *site* is a call of one of the wrappers of csrc/common that order something: it is removed, or weakened (release to
relaxed, a wait that leaves one more group of copies). All mutants are compiled at once: each call becomes a choice at
run time, ``(emu::mutation == 7 ? without : with)``, on its own line, so that reports name the lines of the kernel::

    found = mutate(FOLDER / "demo.cu", [FOLDER / "pipeline.cuh"], check, seeds=range(9))
    assert not found.survivors, found.table()
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emulation import Emulated, build

# What to put in the place of a call: {} are its arguments, <> its template arguments. None: nothing at all.
REMOVED: Mapping[str, Sequence[str | None]] = {
    "sync_block": (None,),
    "sync_warp": (None,),
    "barrier_sync": (None, "barrier_arrive({})"),
    "barrier_arrive": (None,),
    "cp_async_commit": (None,),
    "cp_async_wait": (None, "cp_async_wait<<> + 1>({})"),
    "cp_async_mbarrier_arrive": (None, "mbarrier_arrive({})"),
    "mbarrier_init": (None,),
    "fence_mbarrier_init": (None,),
    "sync_block_or": ("int(({}) != 0)",),
    "sync_block_and": ("int(({}) != 0)",),
    "sync_block_count": ("int(({}) != 0)",),
    "mbarrier_arrive": (None,),
    "mbarrier_arrive_expect_tx": (None,),
    "mbarrier_expect_tx": (None,),
    "mbarrier_arrive_cluster": (None, "mbarrier_arrive_cluster_relaxed({})"),
    "mbarrier_arrive_cluster_shared": (None, "mbarrier_arrive_cluster_relaxed({})"),
    "mbarrier_wait": (None,),
    "mbarrier_wait_shared": (None,),
    "cluster_sync": (None, "(cluster_arrive_relaxed(), cluster_wait())"),
    "cluster_arrive": (None, "cluster_arrive_relaxed({})"),
    "cluster_arrive_relaxed": (None,),
    "cluster_wait": (None,),
    "fence_proxy_async": (None,),
    "fence_acq_rel": (None,),
    "store_release": (None, "store_relaxed<<>>({})"),
    "add_release": (None, "add_relaxed<<>>({})"),
    "load_acquire": ("load_relaxed<<>>({})",),
    "fetch_add_acq_rel": ("fetch_add_relaxed<<>>({})",),
    "wait_until": (None,),
    "grid_sync": (None,),
}
CALL = re.compile(rf"(?<![\w:.])({'|'.join(REMOVED)})\s*(<[^;<>()]*>)?\s*\(")


@dataclass(frozen=True)
class Site:
    """One call and one way to break it."""

    number: int
    file: str
    line: int
    call: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.call}  ->  {self.instead}"


@dataclass
class Mutants:
    """What became of each site: the seeds that failed, by build."""

    sites: list[Site]
    seeds: list[int]
    builds: list[str]
    caught: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    evidence: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    stops: bool = False  # at the first seed that fails

    @property
    def survivors(self) -> list[Site]:
        """Sites that no build and no seed notices."""
        return [s for s in self.sites if not any(self.caught[s.number, b] for b in self.builds)]

    def table(self) -> str:
        """One line a site: of the seeds tried, how many failed in each build; the first report."""
        lines = [f"{' '.join(f'{b:>6}' for b in self.builds)}  site"]
        for site in self.sites:
            counts = (
                f"{len(self.caught[site.number, b])}/{self.tried(site, b)}" for b in self.builds
            )
            lines.append(f"{' '.join(f'{c:>6}' for c in counts)}  {site}")
            lines.append(f"{'':15}{self.evidence.get(site.number, 'NOT NOTICED')}")
        return "\n".join(lines)

    def tried(self, site: Site, build_name: str) -> int:
        failed = self.caught[site.number, build_name]
        return self.seeds.index(failed[-1]) + 1 if failed and self.stops else len(self.seeds)


def without_comments(text: str) -> str:
    """The text with comments and strings blanked, every character in its place."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def sites_of(text: str, name: str, first: int = 0) -> tuple[str, list[Site]]:
    """The text with each call made a choice, and the sites."""
    code = without_comments(text)
    sites: list[Site] = []
    pieces: list[str] = []
    done = 0
    for match in CALL.finditer(code):
        if _is_definition(code, match.start()):
            continue
        end = _closing(code, match.end() - 1) + 1
        call, arguments = text[match.start() : end], text[match.end() : end - 1]
        parameters = (match[2] or "")[1:-1]
        choice = call
        for instead in REMOVED[match[1]]:
            number = first + len(sites)
            other = "void()" if instead is None else _filled(instead, parameters, arguments)
            line = text.count("\n", 0, match.start()) + 1
            said = "removed" if instead is None else " ".join(other.split())
            sites.append(Site(number, name, line, " ".join(call.split()), said))
            choice = f"(::emu::mutation == {number} ? {other} : {choice})"
        pieces += [text[done : match.start()], choice]
        done = end
    return "".join(pieces) + text[done:], sites


def _filled(instead: str, parameters: str, arguments: str) -> str:
    return instead.replace("<>", parameters).replace("{}", arguments)


def _is_definition(code: str, start: int) -> bool:
    before = code[:start].rstrip()
    return before.endswith(("void", "bool", "uint32_t", "&"))


def _closing(code: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(code)):
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        if depth == 0:
            return at
    raise ValueError("a call without its closing parenthesis")


def mutate(
    entry: Path,
    files: Iterable[Path],
    check: Callable[[Emulated], None],
    *,
    seeds: Sequence[int] = range(9),
    builds: Sequence[str] = ("plain", "race"),
    every_seed: bool = False,
    texts: Mapping[Path, str] | None = None,
) -> Mutants:
    """Runs ``check`` on every mutant until it fails.

    Args:
        entry: the ``.cu`` file that the test launches.
        files: what to mutate: the entry itself, headers that it includes, or both.
        check: raises on a wrong result; a report of the emulation raises by itself.
        seeds: orders to try for each mutant; the unchanged kernel must pass all of them.
        builds: ``"plain"``, ``"race"`` or both.
        every_seed: go on after the first failure, to see how many seeds notice.
        texts: other contents for some of the files.
    """
    started = time.perf_counter()
    sites: list[Site] = []
    changed: dict[Path, str] = {}
    for file in files:
        text = (texts or {}).get(file, file.read_text())
        changed[file], found = sites_of(text, file.name, len(sites))
        sites += found
    result = Mutants(sites, list(seeds), list(builds), stops=not every_seed)
    for name in builds:
        race = name == "race"
        library = build(entry, race=race, replaced=changed)
        device = Emulated(library, race=race, max_switches=2_000_000)
        device.mutate(None)
        for device.seed in seeds:
            check(device)
        for site in result.sites:
            failed = result.caught[site.number, name] = []
            device.mutate(site.number)
            for device.seed in seeds:
                try:
                    check(device)
                except AssertionError as error:
                    failed.append(device.seed)
                    if site.number not in result.evidence or race:
                        said = str(error).strip().splitlines() or ["a wrong result"]
                        result.evidence[site.number] = said[0][:200]
                    if not every_seed:
                        break
        device.mutate(None)
    result.seconds = time.perf_counter() - started
    return result
