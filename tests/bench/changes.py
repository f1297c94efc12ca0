"""What a change costs: `./dev bench changes`. First applies, changes of a few sources, passes that find nothing to do.

All of it with sources of one family in four lengths, beside the same done by hand with nft and one interval map. Times
are from start to end; other work on the machine is in them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import reconcile
from agent.addresses import Family
from agent.policy import load
from tests.bench import room
from tests.bench.contestants import interval_map, write_policy
from tests.bench.figures import Report, Spread, Table, spread_figure
from tests.bench.parts import Part, measured
from tests.bench.process import Cost, KernelMemory, timed, took
from tests.bench.sources import Sources, draw
from tests.bench.world import NEXT_HOP, UPLINKS, FailedError, World, world

SEED = 73
FAMILY = Family.IPV4
#: What stands beside us on a busy gateway: prefixes of somebody else's interval map, and routes in main.
FOREIGN_PREFIXES, FOREIGN_ROUTES = 100_000, 50_000
#: A program that listens to every transaction makes the kernel keep a message for each element (NFNLGRP_NFTABLES).
#: With more prefixes in one transaction than these the machine may run out of memory.
MOST_MONITORED = 100_000
#: With more nft takes many minutes to change a hundred elements of an interval map.
MOST_BY_HAND = 100_000


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: how many sources, how many are changed, and how often."""

    firsts: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    rounds: int
    beside: int


FULL = Effort((10_000, 100_000, 1_000_000), (100, 10_000, 100_000, 1_000_000), (1, 10, 100), 3, 100_000)
QUICK = Effort((10_000,), (100, 10_000), (1, 100), 2, 1000)


def sources(count: int) -> Sources:
    """The list of that many."""
    return draw(FAMILY, "mixed", count, random.Random(SEED))


def apply(here: World, policy: Path) -> Cost:
    """`idmark apply`, from start to end. Raises FailedError."""
    with here.gateway.inside():
        words = [sys.executable, "-m", "agent", "-c", os.fspath(policy), "apply"]
        return timed(words, environment={"STATE_DIRECTORY": os.fspath(here.directory / "state")})


def nft(here: World, text: str) -> Cost:
    """`nft -f`. Raises FailedError."""
    with here.gateway.inside():
        return timed(["nft", "-f", "-"], text=text)


# --- first applies ---------------------------------------------------------------------------------------------------

Way = Callable[[World, Sources], Cost]

#: The same sources into an empty kernel.
FIRSTS: dict[str, Way] = {
    "nft -f of one interval map": lambda here, listed: nft(here, interval_map(listed)),
    "idmark apply": lambda here, listed: apply(here, write_policy(listed, here.directory)),
}


def first(effort: Effort, directory: Path, report: Report) -> None:
    """The first apply of a policy, and `nft -f` of the interval map alone."""
    rows = []
    for count in effort.firsts:
        listed = sources(count)
        costs: dict[str, list[Cost]] = {name: [] for name in FIRSTS}
        failures: dict[str, str] = {}
        for number in range(1 if count > 100_000 else effort.rounds):
            for at, (name, way) in enumerate(FIRSTS.items()):
                with world(f"{count}-{number}-{at}", directory) as here:
                    try:
                        costs[name].append(way(here, listed))
                    except FailedError as error:
                        failures[name] = str(error)
        by_hand = costs[next(iter(FIRSTS))]
        for name, several in costs.items():
            if several:
                rows.append((name, f"{count:,}", *_first_cells(several, by_hand)))
                report.figures.append(_first_figure(name, count, several))
            else:
                rows.append((name, f"{count:,}", failures[name], *[""] * 5))
    columns = (
        "first apply",
        "sources",
        "seconds",
        "CPU seconds",
        "MiB",
        "time : nft -f",
        "CPU : nft -f",
        "memory : nft -f",
    )
    report.add(Table("first apply, and nft -f of one interval map", columns, tuple(rows)))


def _first_cells(costs: list[Cost], by_hand: list[Cost]) -> tuple[str, ...]:
    seconds, cpu, memory = _spreads(costs)
    cells = (seconds.text(2), cpu.text(2), memory.text())
    if not by_hand:
        return (*cells, "", "", "")
    least = _spreads(by_hand)
    return (
        *cells,
        *(f"{own.median / other.median:.2f}" for own, other in zip((seconds, cpu, memory), least, strict=True)),
    )


def _first_figure(name: str, count: int, costs: list[Cost]) -> dict[str, object]:
    seconds, cpu, memory = map(spread_figure, _spreads(costs))
    figure = {"what": "first apply", "way": name, "sources": count}
    return {**figure, "seconds": seconds, "cpu": cpu, "mebibytes": memory}


def _spreads(costs: list[Cost]) -> tuple[Spread, Spread, Spread]:
    """Seconds, seconds of CPU time, MiB."""
    return (
        Spread.of(cost.seconds for cost in costs),
        Spread.of(cost.cpu for cost in costs),
        Spread.of(cost.mebibytes for cost in costs),
    )


# --- changes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_force(count: int, directory: Path, name: str = "gateway") -> Iterator[tuple[World, Sources]]:
    """A gateway where idmark keeps a list of sources. Raises FailedError."""
    listed = sources(count)
    with world(f"{name}-{count}", directory) as here:
        apply(here, write_policy(listed, here.directory))
        yield here, listed


def acknowledged(here: World, policy: Path) -> tuple[float, float]:
    """Seconds from a policy in memory until the difference is known; and from then until the kernel has it.

    As in the daemon: in a program that is there already. Raises KernelError, ApplyError.
    """
    wanted = load(policy)
    with here.gateway.inside(), reconcile.opened() as kernel:
        looks: list[reconcile.Look] = []
        looked = took(lambda: looks.append(reconcile.look(wanted, kernel)))
        return looked, took(lambda: reconcile.apply(looks[0].plan, kernel))


def changes(effort: Effort, directory: Path, report: Report) -> None:
    """A few sources get the other identity: by `idmark apply`, within a running program, and by hand."""
    rows: list[tuple[str, ...]] = []
    passes: list[tuple[str, ...]] = []
    for count in effort.sizes:
        try:
            with in_force(count, directory) as (here, listed):
                for step in effort.steps:
                    for change in _changed(here, listed, step, effort.rounds):
                        rows.append(change.row)
                        report.figures.append(change.figure)
                passes.append(_nothing_to_do(here, listed, effort.rounds, report))
        except FailedError as error:
            rows.append(("idmark", f"{count:,}", "", str(error)))
        if count <= MOST_BY_HAND:
            with world(f"hand-{count}", directory) as here:
                rows += _changed_by_hand(here, count, effort, report)
    columns = ("way", "sources", "changed", "ms")
    report.add(Table("a change: sources get the other identity", columns, tuple(rows)))
    columns = ("nothing to do", "sources", "look, ms", "idmark apply, ms")
    report.add(Table("a pass that finds nothing to do", columns, tuple(passes)))


def _changed(here: World, listed: Sources, step: int, rounds: int) -> Iterator[Change]:
    chance = random.Random(step)
    whole, looks, acks = [], [], []
    count = len(listed.prefixes)
    for _ in range(1 if count > 100_000 else rounds):
        # What is measured from outside is taken back from inside, so that each begins where the other one did.
        whole.append(apply(here, write_policy(listed.move(step, chance), here.directory)).seconds)
        looked, acknowledgement = acknowledged(here, write_policy(listed, here.directory))
        looks.append(looked)
        acks.append(acknowledgement)
    for name, values in (
        ("idmark apply, the whole command", whole),
        ("a running program, until the difference is known", looks),
        ("a running program, from then until the kernel has it", acks),
    ):
        yield Change(name, count, step, Spread.of(values))


@dataclass(frozen=True, slots=True)
class Change:
    """What several changes of the same kind took, seconds."""

    way: str
    sources: int
    changed: int
    spread: Spread

    @property
    def row(self) -> tuple[str, ...]:
        """As a row of a table."""
        return (self.way, f"{self.sources:,}", str(self.changed), self.spread.text(1, 1000))

    @property
    def figure(self) -> dict[str, object]:
        """For JSON."""
        labels = {"what": "change", "way": self.way, "sources": self.sources, "changed": self.changed}
        return {**labels, "seconds": spread_figure(self.spread)}


def _changed_by_hand(here: World, count: int, effort: Effort, report: Report) -> Iterator[tuple[str, ...]]:
    """With nft: the elements are deleted and added in one transaction."""
    listed = sources(count)
    name = "nft, delete and add elements of one interval map"
    try:
        nft(here, interval_map(listed))
        for step in effort.steps:
            some, seconds = listed.prefixes[:step], []
            for number in range(1 if count > 10_000 else effort.rounds):
                keys = ", ".join(map(str, some))
                values = ", ".join(f"{key} : {(at + number + 1) % 2 + 1}" for at, key in enumerate(some))
                text = (
                    f"delete element inet marks sources {{ {keys} }}\nadd element inet marks sources {{ {values} }}\n"
                )
                seconds.append(nft(here, text).seconds)
            change = Change(name, count, step, Spread.of(seconds))
            report.figures.append(change.figure)
            yield change.row
    except FailedError as error:
        yield (name, f"{count:,}", "", str(error))


def _nothing_to_do(here: World, listed: Sources, rounds: int, report: Report) -> tuple[str, ...]:
    policy = write_policy(listed, here.directory)
    wanted = load(policy)
    with here.gateway.inside(), reconcile.opened() as kernel:
        reconcile.look(wanted, kernel)  # the daemon has looked before
        look = Spread.of(took(lambda: reconcile.look(wanted, kernel)) for _ in range(rounds))
    whole = Spread.of(apply(here, policy).seconds for _ in range(rounds))
    count = len(listed.prefixes)
    for name, spread in (("look", look), ("idmark apply", whole)):
        report.figures.append(
            {"what": "nothing to do", "way": name, "sources": count, "seconds": spread_figure(spread)}
        )
    return ("idmark", f"{count:,}", look.text(1, 1000), whole.text(0, 1000))


# --- neighbours ------------------------------------------------------------------------------------------------------


def foreign(here: World) -> None:
    """What a busy gateway has besides: somebody's large interval map, and many routes. Raises FailedError."""
    listed = draw(FAMILY, "mixed", FOREIGN_PREFIXES, random.Random(SEED + 1))
    here.nft(interval_map(listed).replace("table inet marks", "table inet foreign"))
    # As a routing daemon adds them. Without a next hop they would be networks of the link, which are our business.
    hop = f"via {NEXT_HOP[Family.IPV4][0]} dev {UPLINKS[0]} protocol bgp"
    here.ip([f"route add {0x60 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24 {hop}" for n in range(FOREIGN_ROUTES)])


#: Rounds of what takes milliseconds.
OFTEN = 21
#: A map that an operator has for himself.
OPERATORS = (
    "table inet operators {{\n    map own {{ type ipv4_addr : mark; {flags} elements = {{ 10.0.0.1 : 1 }}\n    }}\n}}\n"
)


def neighbours(effort: Effort, directory: Path, report: Report) -> None:
    """What an operator's own commands cost beside us; and what ours cost beside others."""
    with world("without", directory) as without, in_force(effort.beside, directory) as (beside, _):
        gateways = {"without idmark": without, f"beside idmark with {effort.beside:,} sources": beside}
        cells = {name: [name] for name in gateways}
        for command, flags, measure in OPERATORS_COMMANDS:
            for here in gateways.values():
                here.nft(OPERATORS.format(flags=flags))
            times: dict[str, list[float]] = {name: [] for name in gateways}
            for number in range(OFTEN):
                for name, here in gateways.items():
                    times[name].append(measure(here, number))
            for name, here in gateways.items():
                here.run(["nft", "delete", "table", "inet", "operators"])
                spread = Spread.of(times[name])
                cells[name].append(spread.text(1, 1000))
                report.figures.append(
                    {"what": "operator", "command": command, "beside": name, "seconds": spread_figure(spread)}
                )
    columns = ("an operator's commands", *(f"{command}, ms" for command, *_ in OPERATORS_COMMANDS))
    report.add(Table("what others' commands take beside us", columns, tuple(map(tuple, cells.values()))))
    _beside(effort, directory, report)


def _listed(here: World, number: int) -> float:
    with here.gateway.inside():
        return timed(["nft", "-t", "list", "ruleset"]).seconds


def _added(here: World, number: int) -> float:
    with here.gateway.inside():
        return timed(["nft", f"add element inet operators own {{ 10.0.1.{number} : 2 }}"]).seconds


#: Each with the flags of the operator's own map.
OPERATORS_COMMANDS: tuple[tuple[str, str, Callable[[World, int], float]], ...] = (
    ("nft -t list ruleset", "", _listed),
    ("add element, hash", "", _added),
    ("add element, interval", "flags interval;", _added),
)


def _beside(effort: Effort, directory: Path, report: Report) -> None:
    rows: list[tuple[str, ...]] = []
    count = effort.beside
    for name, others in (("alone", False), (f"{FOREIGN_PREFIXES:,} prefixes, {FOREIGN_ROUTES:,} routes", True)):
        with world(f"beside-{others:d}", directory) as here:
            if others:
                foreign(here)
            listed = sources(count)
            began = apply(here, write_policy(listed, here.directory)).seconds
            nothing = _nothing_to_do(here, listed, effort.rounds, report)
            changed = [change.row[3] for change in _changed(here, listed, 1, effort.rounds)]
            rows.append((name, f"{began:.2f}", *nothing[2:], *changed))
            report.figures.append({"what": "beside", "others": name, "sources": count, "cells": rows[-1][1:]})
    columns = (
        f"idmark with {count:,} sources, beside",
        "first apply, s",
        "look, nothing to do, ms",
        "apply, nothing to do, ms",
        "change of 1: apply, ms",
        "look, ms",
        "from the difference to the kernel, ms",
    )
    report.add(Table("what our commands take beside others", columns, tuple(rows)))


# --- memory of the kernel --------------------------------------------------------------------------------------------


def memory(effort: Effort, directory: Path, report: Report) -> None:
    """What the kernel takes during an apply while somebody runs `nft monitor`."""
    rows = []
    for count in (count for count in effort.firsts if count <= MOST_MONITORED):
        for name, way in FIRSTS.items():
            with world(f"monitored-{count}-{name[:1]}", directory) as here, _monitor(here):
                listed = sources(count)
                try:
                    with KernelMemory() as kernel:
                        cost = way(here, listed)
                except FailedError as error:
                    rows.append((name, f"{count:,}", str(error), ""))
                    continue
                rows.append((name, f"{count:,}", f"{kernel.mebibytes:,.0f}", f"{cost.seconds:.2f}"))
                report.figures.append(
                    {"what": "kernel memory", "way": name, "sources": count, "mebibytes": round(kernel.mebibytes)}
                )
    columns = ("with nft monitor running", "sources", "kernel's memory at the most, MiB", "seconds")
    note = "What the machine had less of, beyond what the processes took; other programs on it are in this figure."
    report.add(Table("the kernel's memory during a first apply", columns, tuple(rows), (note,)))


@contextlib.contextmanager
def _monitor(here: World) -> Iterator[None]:
    with here.gateway.inside():
        process = subprocess.Popen(["nft", "monitor"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


PARTS: dict[str, Part[Effort]] = {
    "first": first,
    "changes": changes,
    "neighbours": neighbours,
    "memory": memory,
}


def run(effort: Effort, chosen: Sequence[str] = (*PARTS,)) -> Report:
    """Measure these parts, inside the room."""
    return measured("changes", __doc__, PARTS, chosen, effort)


def main() -> int:
    """Always 0: it only tells."""
    parser = argparse.ArgumentParser(prog="./dev bench changes", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--sources", nargs="+", type=int, help="so many, instead of the usual sizes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write changes.md and changes.json there")
    arguments = parser.parse_args()
    room.enter()
    effort = QUICK if arguments.quick else FULL
    if arguments.sources:
        several = tuple(arguments.sources)
        effort = Effort(several, several, effort.steps, effort.rounds, several[-1])
    report = run(effort, arguments.part)
    if arguments.results:
        report.write(arguments.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
