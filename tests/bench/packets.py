"""What a packet costs: `./dev bench packets`. Forwarded UDP of 60 bytes, and a gateway's own UDP and TCP.

Everything runs on one CPU, so packets a second are the reciprocal of the sum of all costs: sending and throwing away
included, which every contestant has alike. All gateways stand side by side, and are measured in turn, in an order
drawn anew each round. A figure is the median of the rounds, with its quartiles; of a round, the median of its bursts,
so that a burst in which something else had the CPU counts for nothing. A ratio is taken within each round.

One ruleset against the yardsticks:

    python -m tests.bench.packets --write /tmp/x --sources 1024    # policy, lists, ruleset.nft, routing.txt
    python -m tests.bench.packets --try /tmp/x/ruleset.nft --sources 1024
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.addresses import Family
from tests.bench import room
from tests.bench.contestants import (
    BARE,
    EVERYBODY,
    FLOOR,
    FORWARDED_PARTS,
    IDMARK,
    LOCAL_PARTS,
    PARTS,
    SOME,
    YARDSTICKS,
    Contestant,
    variant,
    write_policy,
)
from tests.bench.figures import Report, Spread, Table, spread_figure
from tests.bench.sources import FLOWS, SHAPES, Sources, draw
from tests.bench.world import UPLINKS, Bursts, FailedError, Generator, World, world

SIZES = (2, 16, 1024, 131072)
QUICK_SIZES = (16, 1024)
#: Packets of a burst of forwarded packets. A few hundred microseconds are short beside the scheduler's slices, so that
#: most bursts have the CPU for themselves also on a machine that does other work.
SIZE = 128
#: What local traffic is, and how many packets, exchanges or blocks of 64 KiB make a burst.
LOCAL = {"udp": 128, "tcp-rr": 32, "tcp": 8}
#: What a gateway's own packets cost hardly depends on its members: once is enough.
LOCAL_SOURCES = ("mixed", 1024)
#: Where it is measured what the parts of a ruleset cost, in forwarding and for local packets.
DISSECTED = {("hosts", 1024): FORWARDED_PARTS, LOCAL_SOURCES: LOCAL_PARTS}
SEED = 73
#: Bursts until caches are warm: every flow has been seen.
WARM = FLOWS // SIZE


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured."""

    rounds: int
    bursts: int


FULL, QUICK = Effort(9, 250), Effort(3, 150)


@dataclass
class Entry:
    """A contestant at its gateway, and what a packet cost it in each round, ns."""

    contestant: Contestant
    world: World
    rounds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contestant.name


@dataclass(frozen=True, slots=True)
class Block:
    """Contestants that are measured in turn over the same sources; `absent` says who is not among them, and why."""

    sources: Sources
    entries: list[Entry]
    absent: list[str]
    flows: Path

    def entry(self, name: str) -> Entry | None:
        """The contestant of that name."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def measure(self, rounds: int, once: Callable[[Entry], list[float]], chance: random.Random) -> None:
        """Fill everybody's rounds anew. Who fails is absent from then on."""
        for entry in self.entries:
            entry.rounds.clear()
        for _ in range(rounds):
            for entry in chance.sample(self.entries, len(self.entries)):
                try:
                    entry.rounds.append(statistics.median(once(entry)))
                except FailedError as error:
                    self.entries.remove(entry)
                    self.absent.append(f"{entry.name}: {error}")


@contextlib.contextmanager
def block(sources: Sources, contestants: Sequence[Contestant], directory: Path, seed: int) -> Iterator[Block]:
    """A gateway for each contestant, configured."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        flows = place / "flows"
        flows.write_bytes(sources.flows(random.Random(seed)))
        entries, absent = [], []
        for number, contestant in enumerate(contestants):
            if len(sources.prefixes) > contestant.limit:
                absent.append(f"{contestant.name}: hopeless with so many sources")
                continue
            here = stack.enter_context(world(str(number), place))
            try:
                contestant.load(here, sources)
            except FailedError as error:
                absent.append(f"{contestant.name}: could not be loaded ({error})")
                continue
            entries.append(Entry(contestant, here))
        yield Block(sources, entries, absent, flows)


def forwarded(block: Block, generator: Generator, effort: Effort, chance: random.Random, report: Report) -> None:
    """Measure a block's forwarded packets."""
    family = block.sources.family

    def once(entry: Entry) -> list[float]:
        return generator.forwarded(entry.world, family, block.flows, Bursts(effort.bursts, SIZE, WARM))

    block.measure(effort.rounds, once, chance)
    title = f"forwarded {family}, {len(block.sources.prefixes):,} sources, {_lengths(block.sources)}"
    _tell(block, title, "packet", {"traffic": "forwarded"}, report)


def local(block: Block, generator: Generator, effort: Effort, chance: random.Random, report: Report) -> None:
    """Measure a block's own traffic: of each identity, of each kind."""
    family = block.sources.family
    for kind, size in LOCAL.items():
        for uplink, link in enumerate(UPLINKS):

            def once(entry: Entry, kind: str = kind, size: int = size, uplink: int = uplink) -> list[float]:
                bursts = Bursts(effort.bursts, size, effort.bursts // 4)
                return generator.local(entry.world, kind, uplink, family, bursts)

            block.measure(effort.rounds, once, chance)
            what, unit = WORDS[kind]
            title = f"local {family} {what} from the address on {link}, {len(block.sources.prefixes):,} sources"
            _tell(block, title, unit, {"traffic": kind, "uplink": link}, report)


WORDS = {
    "udp": ("UDP, connected", "packet"),
    "tcp-rr": ("TCP, a byte there and back", "exchange"),
    "tcp": ("TCP, one stream", "64 KiB"),
}


def _tell(block: Block, title: str, unit: str, labels: dict[str, str], report: Report) -> None:
    bare, floor = block.entry(BARE.name), block.entry(FLOOR.name)
    rows = []
    tracks = {entry.name: entry.world.has_conntrack() for entry in block.entries}
    for entry in block.entries:
        cost = Spread.of(entry.rounds)
        alike = block.entry(f"{FLOOR.name}, ct") if tracks[entry.name] else floor
        ratios = {
            "bare": _ratio(bare, entry),
            "floor": _ratio(floor, entry),
            "floor_conntrack_alike": _ratio(alike, entry),
        }
        over = Spread.of([own - least for own, least in zip(entry.rounds, bare.rounds, strict=True)]) if bare else None
        rows.append(
            (
                entry.name,
                "on" if tracks[entry.name] else "off",
                f"{1e9 / cost.median:,.0f}",
                cost.text(),
                f"{over.median:+,.0f}" if over else "",
                *(ratio.text(2) if ratio else "" for ratio in ratios.values()),
            )
        )
        report.figures.append(
            {
                **labels,
                "family": str(block.sources.family),
                "shape": block.sources.shape,
                "sources": len(block.sources.prefixes),
                "contestant": entry.name,
                "conntrack": tracks[entry.name],
                "nanoseconds": spread_figure(cost),
                "over_bare": spread_figure(over) if over else None,
                "ratio": {name: spread_figure(ratio) if ratio else None for name, ratio in ratios.items()},
            }
        )
    columns = (
        "contestant",
        "conntrack",
        f"{unit}s/s" if unit != "64 KiB" else "64 KiB/s",
        f"ns a {unit}" if unit != "64 KiB" else "ns for 64 KiB",
        "over bare",
        "of bare",
        "of one ip rule",
        "of one ip rule, conntrack alike",
    )
    report.add(Table(title, columns, tuple(rows), tuple(f"- not here: {words}" for words in block.absent)))


def _ratio(yardstick: Entry | None, entry: Entry) -> Spread | None:
    """How many packets a second an entry passes, of those that the yardstick passes in the same round."""
    if yardstick is None:
        return None
    return Spread.of([least / own for least, own in zip(yardstick.rounds, entry.rounds, strict=True)])


def _lengths(sources: Sources) -> str:
    lengths = SHAPES[sources.shape][sources.family]
    return f"length {lengths[0]}" if len(lengths) == 1 else "lengths " + ", ".join(map(str, lengths))


def profile(block: Block, generator: Generator, directory: Path) -> str:
    """Where the time goes at each gateway, as perf(1) sees it: all that happens to a packet happens in its sender."""
    if not shutil.which("perf"):
        return "there is no perf(1) here\n"
    data = directory / "perf.data"
    watched = replace(
        generator, under=("perf", "record", "-q", "-e", "cpu-clock", "-F", "9999", "-o", os.fspath(data), "--")
    )
    lines = []
    for entry in block.entries:
        watched.forwarded(entry.world, block.sources.family, block.flows, Bursts(6000, SIZE, 0))
        words = [
            "perf",
            "report",
            "-i",
            os.fspath(data),
            "--stdio",
            "--fields",
            "overhead,sym",
            "--percent-limit",
            "0.8",
        ]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        found = [line.rstrip() for line in said.splitlines() if line.strip() and not line.startswith("#")]
        lines += [f"--- {entry.name}", *found, ""]
    return "\n".join(lines)


def usual(*, quick: bool) -> Iterator[Sources]:
    """The sources that `./dev bench` measures."""
    return blocks([Family.IPV4], ["mixed"], QUICK_SIZES) if quick else blocks([*Family], [*SHAPES], SIZES)


def blocks(
    families: Sequence[Family], shapes: Sequence[str], sizes: Sequence[int], seed: int = SEED
) -> Iterator[Sources]:
    """All kinds of sources. A mixture of lengths takes a few sources to be one."""
    for family in families:
        for shape in shapes:
            for size in sizes:
                if size >= len(SHAPES[shape][family]):
                    yield draw(family, shape, size, random.Random(seed))


def run(
    effort: Effort,
    several: Iterable[Sources],
    contestants: Sequence[Contestant] = EVERYBODY,
    traffic: Sequence[str] = (),
    *,
    seed: int = SEED,
    profiled: bool = False,
) -> Report:
    """Measure; what was found has been printed as well. To be called inside the room.

    Without a word about the `traffic`, local packets are measured as well where the sources are LOCAL_SOURCES. Where
    they are DISSECTED the parts join everybody.
    """
    report = Report("packets", __doc__.split("\n\n")[1] + ABOUT, room.machine())
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/run") as name:
        directory = Path(name)
        generator = Generator(room.build(directory))
        for sources in several:
            print(f"measuring: {sources.family}, {sources.shape}, {len(sources.prefixes)} sources", file=sys.stderr)
            kind = (sources.shape, len(sources.prefixes))
            parts = DISSECTED.get(kind, ()) if contestants is EVERYBODY else ()
            with block(sources, (*contestants, *parts), directory, seed) as here:
                if not traffic or "forwarded" in traffic:
                    forwarded(here, generator, effort, chance, report)
                if "local" in traffic or (not traffic and kind == LOCAL_SOURCES):
                    local(here, generator, effort, chance, report)
                if profiled:
                    print(profile(here, generator, directory))
    return report


ABOUT = f"""

Forwarded packets belong to {FLOWS:,} flows, whose sources are drawn from the list at random. "of …" are packets a
second, as a part of the named gateway's: "one ip rule" is a rule that takes nothing, "ct" a gateway that tracks
connections."""


def main() -> int:
    """0; 2: nothing could be measured."""
    parser = argparse.ArgumentParser(
        prog="./dev bench packets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [contestant.name for contestant in (*EVERYBODY, *PARTS)]
    parser.add_argument("--family", nargs="+", choices=[*Family], type=Family)
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES])
    parser.add_argument("--sources", nargs="+", type=int, help="how many")
    parser.add_argument("--traffic", nargs="+", choices=["forwarded", "local"], help="this, whatever the sources are")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"the yardsticks, and of {names}")
    parser.add_argument(
        "--try", nargs="+", type=Path, metavar="FILE.nft", dest="tried", help="this in the table's place"
    )
    parser.add_argument(
        "--routing", type=Path, metavar="FILE", help="with --try: lines of ip(8) instead of idmark's rules"
    )
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the policy and what it renders to, and end")
    parser.add_argument("--profile", action="store_true", help="and where the time goes, by perf(1)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--bursts", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--results", type=Path, metavar="DIR", help="write packets.md and packets.json there")
    arguments = parser.parse_args()
    small = bool(arguments.tried or arguments.write)
    several = blocks(
        arguments.family or ([Family.IPV4] if small or arguments.quick else [*Family]),
        arguments.shape or (["mixed"] if small or arguments.quick else [*SHAPES]),
        arguments.sources or ([1024] if small else QUICK_SIZES if arguments.quick else SIZES),
        arguments.seed,
    )
    if arguments.write:
        return _write(next(several), arguments.write)
    room.enter()
    contestants: Sequence[Contestant] = SOME if arguments.quick else EVERYBODY
    if arguments.tried:
        contestants = (*YARDSTICKS, IDMARK, *(variant(path, arguments.routing) for path in arguments.tried))
    elif arguments.only:
        asked = {*arguments.only, *(yardstick.name for yardstick in YARDSTICKS)}
        contestants = [contestant for contestant in (*EVERYBODY, *PARTS) if contestant.name in asked]
    usual = QUICK if arguments.quick else FULL
    effort = Effort(arguments.rounds or usual.rounds, arguments.bursts or usual.bursts)
    traffic = arguments.traffic or (["forwarded"] if small else [])
    report = run(effort, several, contestants, traffic, seed=arguments.seed, profiled=arguments.profile)
    if arguments.results:
        report.write(arguments.results)
    return 0 if report.figures else 2


def _write(sources: Sources, directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    policy = write_policy(sources, directory)
    words = [sys.executable, "-m", "agent", "-c", os.fspath(policy), "render", "-o", os.fspath(directory)]
    return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
