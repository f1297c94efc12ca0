"""What a proof costs: `./dev bench proofs`. `idmark verify`, from start to end, of policies that grow.

With many identities, each on a link of its own or all on two; with many prefixes, flat or nested at random in many
lengths. Nothing of it needs a kernel.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

from agent.addresses import Family, Prefix
from tests.bench.figures import Report, Table
from tests.bench.parts import measured
from tests.bench.process import timed
from tests.bench.program import IDMARK, SEED
from tests.bench.sources import draw
from tests.bench.world import FailedError

#: Identities on links of their own, and on two; prefixes of four identities.
FULL = ((2, 40, 100, 1000), (1000,), 100_000)
QUICK = ((2, 40), (100,), 10_000)
Effort = tuple[tuple[int, ...], tuple[int, ...], int]
#: The lengths of nested prefixes.
LENGTHS = (8, 24)


def _crowd(count: int, links: int) -> Iterator[str]:
    """Identities, each with an address, a next hop and a member of its own, over so many links."""
    yield from ("[kernel]", "mark_mask = 0x7ff00000")
    for number in range(1, count + 1):
        own = IPv4Address("198.18.0.0") + 4 * number
        member = IPv4Address("10.0.0.0") + 256 * number
        yield from _identity(number, f"up{number % links}", str(own), str(own + 1), f"{member}/24")


def _lists(directory: Path, prefixes: Iterable[Prefix]) -> Iterator[str]:
    """Four identities, each with every fourth prefix."""
    every = [*prefixes]
    for number in range(1, 5):
        name = f"members-{number}.txt"
        (directory / name).write_text("".join(f"{prefix}\n" for prefix in every[number::4]), encoding="ascii")
        yield from _identity(number, f"up{number}", f"198.18.{number}.1", f"198.18.{number}.2", f"file:{name}")


def _identity(number: int, link: str, own: str, hop: str, member: str) -> Iterator[str]:
    yield from (f"[identity.id{number}]", f"id = {number}", f'link = "{link}"', f'addresses = ["{own}"]')
    yield from (f'next_hop = ["{hop}"]', f'members = ["{member}"]')


def _nested(count: int, chance: random.Random) -> list[Prefix]:
    """Prefixes anywhere, of any length, many in many others; none of them twice."""
    found: dict[Prefix, None] = {}
    while len(found) < count:
        length = chance.randint(*LENGTHS)
        network = chance.randrange(1 << length - 8, 127 << length - 8)  # of 1.0.0.0 to 126.255.255.255
        found[Prefix(Family.IPV4, network << 32 - length, length)] = None
    return [*found]


def proofs(effort: Effort, directory: Path, report: Report) -> None:
    """Each policy verified once: what is random in it comes from a seed."""
    own, shared, prefixes = effort
    chance = random.Random(SEED)
    policies = {f"{count:,} identities, a link each": _crowd(count, count) for count in own}
    policies |= {f"{count:,} identities, two links": _crowd(count, 2) for count in shared}
    flat = draw(Family.IPV4, "mixed", prefixes, chance).prefixes
    policies[f"{prefixes:,} prefixes, flat"] = _lists(directory, flat)
    policies[f"{prefixes:,} prefixes, nested"] = _lists(directory, _nested(prefixes, chance))
    rows = []
    for what, lines in policies.items():
        policy = directory / "policy.toml"
        head = ['gateway = "bench"', 'downstream = ["lan"]']
        policy.write_text("\n".join([*head, *lines, ""]), encoding="ascii")
        try:
            cost = timed([*IDMARK, "-c", os.fspath(policy), "verify"])
        except FailedError as error:
            rows.append((what, str(error), ""))
            continue
        rows.append((what, f"{cost.seconds:.1f}", f"{cost.mebibytes:.0f}"))
        figure = {"seconds": round(cost.seconds, 2), "mebibytes": round(cost.mebibytes)}
        report.figures.append({"what": "proof", "policy": what, **figure})
    report.add(Table("idmark verify", ("policy", "seconds", "MiB at the most"), tuple(rows)))


def main() -> int:
    """Always 0: it only tells."""
    parser = argparse.ArgumentParser(prog="./dev bench proofs", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    measured("proofs", __doc__, {"proofs": proofs}, ["proofs"], QUICK if arguments.quick else FULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
