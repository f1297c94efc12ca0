"""What the program costs: `./dev bench program`. Its start, its memory, a scrape, and a long list checked and rendered.

Each beside the least that it could be: a Python that only imports pydantic, `nft -j list counters`, and
prometheus-client rendering families that are there already.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import http.client
import os
import random
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import agent
from agent.addresses import Family
from agent.kernel.nfnl import Nfnl
from tests.bench import room
from tests.bench.contestants import write_policy
from tests.bench.figures import Report, Spread, Table, spread_figure
from tests.bench.parts import Part, measured
from tests.bench.process import Cost, resident, settle, timed, took
from tests.bench.sources import draw
from tests.bench.world import UPLINKS, World, world
from tests.kernel.running import Running, running

SEED = 73


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: starts, members of a daemon's policy, identities of a scrape, scrapes, lines of a list."""

    starts: int
    members: tuple[int, ...]
    identities: int
    scrapes: int
    lines: int


FULL = Effort(21, (0, 100_000), 1000, 21, 1_000_000)
QUICK = Effort(7, (0, 10_000), 200, 7, 100_000)

IDMARK = [os.fspath(Path(sys.executable).with_name("idmark"))]
PYDANTIC = [sys.executable, "-c", "import pydantic; pydantic.BaseModel"]


def _policy(count: int, directory: Path) -> Path:
    return write_policy(draw(Family.IPV4, "mixed", count, random.Random(SEED)), directory)


# --- start -----------------------------------------------------------------------------------------------------------


def start(effort: Effort, directory: Path, report: Report) -> None:
    """Commands that do little, in turn with a Python that only imports what reads the policy."""
    compileall.compile_dir(Path(agent.__file__).parent, quiet=1)  # as pip leaves what it installs
    with world("start", directory) as here:
        policy = _policy(16, here.directory)
        here.idmark("apply", policy=policy)
        commands = {
            "an empty Python": [sys.executable, "-c", ""],
            "a Python that imports pydantic": PYDANTIC,
            "idmark --version": [*IDMARK, "--version"],
            "idmark check": [*IDMARK, "-c", os.fspath(policy), "check"],
            "idmark status": [*IDMARK, "-c", os.fspath(policy), "status"],
            "idmark plan": [*IDMARK, "-c", os.fspath(policy), "plan"],
        }
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        state = {"STATE_DIRECTORY": os.fspath(here.directory / "state")}
        with here.gateway.inside():
            for _ in range(effort.starts):
                for name, words in commands.items():
                    costs[name].append(timed(words, environment=state))
    yardstick = Spread.of(cost.seconds for cost in costs["a Python that imports pydantic"]).median
    rows = []
    for name, several in costs.items():
        seconds = Spread.of(cost.seconds for cost in several)
        memory = Spread.of(cost.mebibytes for cost in several)
        rows.append((name, seconds.text(0, 1000), f"{seconds.median / yardstick:.2f}", memory.text()))
        report.figures.append(
            {
                "what": "start",
                "command": name,
                "seconds": spread_figure(seconds),
                "ratio": round(seconds.median / yardstick, 3),
                "mebibytes": spread_figure(memory),
            }
        )
    report.add(Table("start to end", ("command", "ms", ": with pydantic", "MiB"), tuple(rows)))


# --- the daemon ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _daemon(here: World, policy: Path) -> Iterator[Running]:
    """`idmark run` on the gateway, ready."""
    metrics = here.directory / "metrics.sock"
    words = [*IDMARK, "-c", os.fspath(policy), "run", "--netns", here.gateway.name, "--listen", f"unix:{metrics}"]
    with running(words, here.directory) as daemon:
        yield daemon


def _scrape(daemon: Running) -> str:
    connection = http.client.HTTPConnection("localhost")
    with contextlib.closing(connection):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(os.fspath(daemon.metrics))
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def memory(effort: Effort, directory: Path, report: Report) -> None:
    """What the daemon holds in memory with few members and with many, after a scrape."""
    rows = []
    for members in effort.members:
        with world(f"memory-{members}", directory) as here, _daemon(here, _policy(members, here.directory)) as daemon:
            _scrape(daemon)
            now, most = resident(daemon.process.pid)
        rows.append((f"{members:,}", f"{now:.0f}", f"{most:.0f}"))
        report.figures.append({"what": "daemon", "members": members, "mebibytes": round(now), "most": round(most)})
    columns = ("members of two identities", "MiB", "MiB at the most")
    report.add(Table("the daemon's resident memory", columns, tuple(rows)))


# --- a scrape --------------------------------------------------------------------------------------------------------


def _many(count: int, here: World) -> Path:
    """A policy of that many identities over two links, each with an address, a next hop and a member of its own."""
    # Ten bits of identities; what tells two on one link apart is the next hop.
    lines = ['gateway = "bench"', 'downstream = ["lan"]', "[kernel]", "mark_mask = 0x3ff00000"]
    for at, link in enumerate(UPLINKS):
        here.gateway.ip("address", "add", f"100.{64 + at}.0.1/16", "dev", link)
    for number in range(1, count + 1):
        at = number % len(UPLINKS)
        own = IPv4Address(f"100.{64 + at}.0.0") + 2 * number
        here.gateway.ip("address", "add", f"{own}/32", "dev", UPLINKS[at])
        lines += [
            f"[identity.id{number}]",
            f"id = {number}",
            f'link = "{UPLINKS[at]}"',
            f'addresses = ["{own}"]',
            f'next_hop = ["{own + 1}"]',
            f'members = ["{IPv4Address("10.0.0.0") + 256 * number}/24"]',
        ]
    policy = here.directory / "policy.toml"
    policy.write_text("\n".join([*lines, ""]), encoding="ascii")
    return policy


class Ready(Collector):
    """Families that are there already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        """As they are."""
        return self.families


def scrape(effort: Effort, directory: Path, report: Report) -> None:
    """A whole scrape, what it takes to read the kernel for it, and what others need for either."""
    with world("scrape", directory) as here, _daemon(here, _many(effort.identities, here)) as daemon:
        settle(daemon.process.pid)  # what it writes down after its first pass is no scrape's
        families = [*text_string_to_metric_families(_scrape(daemon))]
        registry = CollectorRegistry()
        registry.register(Ready(families))
        with here.gateway.inside(), Nfnl() as nfnl:
            ways: dict[str, Callable[[], float]] = {
                "nft -j list counters": lambda: timed(["nft", "-j", "list", "counters"]).seconds,
                "idmark reads the counters": lambda: took(lambda: nfnl.counts("idmark")),
                "prometheus-client renders the families": lambda: took(lambda: generate_latest(registry)),
                "a scrape of idmark run": lambda: took(lambda: _scrape(daemon)),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(effort.scrapes):
                for name, way in ways.items():
                    times[name].append(way())
    nft, ours, rendering, whole = (Spread.of(several) for several in times.values())
    ratios = ("", f"{ours.median / nft.median:.2f} of nft", "", f"{whole.median / rendering.median:.2f} of rendering")
    rows = []
    for name, spread, ratio in zip(ways, (nft, ours, rendering, whole), ratios, strict=True):
        rows.append((name, spread.text(1, 1000), ratio))
        report.figures.append(
            {"what": "scrape", "way": name, "identities": effort.identities, "seconds": spread_figure(spread)}
        )
    samples = sum(len(family.samples) for family in families)
    title = f"a scrape with {effort.identities:,} identities, {samples:,} samples"
    report.add(Table(title, ("way", "ms", "ratio"), tuple(rows)))


# --- long lists ------------------------------------------------------------------------------------------------------


def lists(effort: Effort, directory: Path, report: Report) -> None:
    """What works without a kernel, with a long list."""
    policy = _policy(effort.lines, directory)
    rows = []
    for name, words in (("check", ["check"]), ("render", ["render", "-o", os.fspath(directory / "rendered")])):
        cost = timed([*IDMARK, "-c", os.fspath(policy), *words])
        rows.append((f"idmark {name}", f"{cost.seconds:.1f}", f"{cost.cpu:.1f}", f"{cost.mebibytes:.0f}"))
        figure = {"seconds": round(cost.seconds, 2), "cpu": round(cost.cpu, 2), "mebibytes": round(cost.mebibytes)}
        report.figures.append({"what": "list", "command": name, "lines": effort.lines, **figure})
    columns = ("command", "seconds", "CPU seconds", "MiB at the most")
    report.add(Table(f"a list of {effort.lines:,} lines", columns, tuple(rows)))


PARTS: dict[str, Part[Effort]] = {
    "start": start,
    "memory": memory,
    "scrape": scrape,
    "lists": lists,
}


def run(effort: Effort, chosen: Sequence[str] = (*PARTS,)) -> Report:
    """Measure these parts, inside the room."""
    return measured("program", __doc__, PARTS, chosen, effort)


def main() -> int:
    """Always 0: it only tells."""
    parser = argparse.ArgumentParser(prog="./dev bench program", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write program.md and program.json there")
    arguments = parser.parse_args()
    room.enter()
    report = run(QUICK if arguments.quick else FULL, arguments.part)
    if arguments.results:
        report.write(arguments.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
