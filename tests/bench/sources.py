"""The sources of a benchmark: disjoint prefixes drawn from a seed, and packets' addresses drawn from them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from agent.addresses import Family, Prefix

#: Lengths of the prefixes, by shape and family.
SHAPES: dict[str, dict[Family, tuple[int, ...]]] = {
    "hosts": {Family.IPV4: (32,), Family.IPV6: (128,)},
    "mixed": {Family.IPV4: (32, 28, 24, 20), Family.IPV6: (128, 64, 56, 48)},
}
#: Where prefixes of each length are drawn, so that none lies in another.
REGIONS = {
    (Family.IPV4, 32): "16.0.0.0/8",
    (Family.IPV4, 28): "17.0.0.0/8",
    (Family.IPV4, 24): "24.0.0.0/5",
    (Family.IPV4, 20): "32.0.0.0/4",
    (Family.IPV6, 128): "2a00:1:2:3::/64",
    (Family.IPV6, 64): "2a01::/32",
    (Family.IPV6, 56): "2a02::/24",
    (Family.IPV6, 48): "2a10::/20",
}
IDENTITIES = 2
FLOWS = 16384
#: What the flows' ports are drawn from.
PORTS = (1024, 65535)


@dataclass(frozen=True, slots=True)
class Sources:
    """Prefixes of one family; the n-th belongs to identity n modulo 2, or to the other one where it has `moved`."""

    family: Family
    shape: str
    prefixes: tuple[Prefix, ...]
    moved: frozenset[int] = frozenset()

    def of(self, identity: int) -> tuple[Prefix, ...]:
        """The prefixes of identity 0 or 1."""
        return tuple(prefix for prefix, whose in self.each() if whose == identity)

    def each(self) -> Iterator[tuple[Prefix, int]]:
        """Each prefix, and whose it is."""
        for number, prefix in enumerate(self.prefixes):
            yield prefix, (number + (number in self.moved)) % IDENTITIES

    def move(self, count: int, chance: random.Random) -> Sources:
        """The same prefixes, of which `count` have got the other identity."""
        return replace(self, moved=frozenset(chance.sample(range(len(self.prefixes)), count)))

    def flows(self, chance: random.Random) -> bytes:
        """Source addresses and ports as traffic.c reads them. The flows are as many whatever the sources are."""
        size = self.family.bits // 8
        records = []
        for _ in range(FLOWS):
            prefix = chance.choice(self.prefixes)
            address = prefix.address | chance.getrandbits(self.family.bits) & prefix.last - prefix.address
            records.append(address.to_bytes(size, "big") + struct.pack("!H", chance.randint(*PORTS)))
        return b"".join(records)


def draw(family: Family, shape: str, count: int, chance: random.Random) -> Sources:
    """That many prefixes, each length as often as the others; but of short ones only as many as there are of them."""
    prefixes: list[Prefix] = []
    lengths = SHAPES[shape][family]
    left = count
    for at, length in enumerate(reversed(lengths), start=1):
        region = Prefix.parse(REGIONS[family, length])
        there = range(1 << min(length - region.length, 62))
        share = min(left // (len(lengths) - at + 1), len(there))
        left -= share
        numbers = chance.sample(there, share)
        prefixes += [Prefix(family, region.address | number << family.bits - length, length) for number in numbers]
    chance.shuffle(prefixes)
    return Sources(family, shape, tuple(prefixes))
