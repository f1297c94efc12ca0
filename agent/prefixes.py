"""Sources to disjoint classes: between identities the longest prefix decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import pairwise
from operator import itemgetter

from agent.addresses import Address, Family, Prefix, Prefixes, address_text


@dataclass(frozen=True, slots=True)
class Span:
    """The addresses from `first` to `last`, both included, which are one identity's."""

    family: Family
    first: int
    last: int
    identity: str

    def __str__(self) -> str:
        """As nft writes an element of an interval map: an address, a prefix, or `FIRST-LAST`."""
        size = self.last - self.first + 1
        if size & size - 1 == 0 and self.first % size == 0:
            return str(Prefix(self.family, self.first, self.family.bits - size.bit_length() + 1))
        return f"{address_text(self.family, self.first)}-{address_text(self.family, self.last)}"


def classes(sources: Iterable[tuple[Prefix, str]]) -> tuple[Span, ...]:
    """Disjoint spans, in order, of (prefix, identity) pairs in any order: every address is its longest prefix's.

    A prefix that nothing cuts is one span of its own, neighbours are not merged; a prefix inside another one of the
    same identity says nothing new, and is left out. Raises ValueError for one prefix under two identities.
    """
    spans: list[Span] = []
    # Networks are nested or apart, never half over each other: those open around the sweep's place are a stack.
    around: list[tuple[Prefix, int, str]] = []
    place = 0

    def close_before(prefix: Prefix | None) -> None:
        """Write down what is left of the networks that end before this one begins; None: of all."""
        nonlocal place
        while around and (
            prefix is None or around[-1][0].family is not prefix.family or around[-1][1] < prefix.address
        ):
            network, last, identity = around.pop()
            if place <= last:
                spans.append(Span(network.family, place, last, identity))
            place = last + 1

    ordered = sorted(sources, key=itemgetter(0))  # a network sorts just before those inside it
    for (prefix, identity), (twin, other) in pairwise(ordered):
        if prefix == twin and identity != other:
            raise ValueError(f"{prefix} is a source of {identity} and of {other}")
    for prefix, identity in ordered:
        close_before(prefix)
        if around:
            owner = around[-1][2]
            if owner == identity:
                continue
            if place < prefix.address:
                spans.append(Span(prefix.family, place, prefix.address - 1, owner))
        around.append((prefix, prefix.last, identity))
        place = prefix.address
    close_before(None)
    return tuple(spans)


def pairs(sources: Mapping[str, Iterable[Prefix]]) -> Iterator[tuple[Prefix, str]]:
    """Each network with the name of whose it is."""
    return ((prefix, name) for name, prefixes in sources.items() for prefix in prefixes)


def outermost(family: Family, several: Iterable[Prefixes]) -> Iterator[Prefix]:
    """The networks of a family that lie in none of the others, in order. Those inside of one are not looked at."""
    columns = [(length, column) for prefixes in several for length, column in prefixes.lengths(family)]
    first = [(column.number(0), length, which) for which, (length, column) in enumerate(columns)]
    heapify(first)
    free = 0
    while first:
        address, length, which = first[0]
        if address >= free:
            network = Prefix(family, address, length)
            yield network
            free = network.last + 1
            if free >> family.bits:
                return
        following = columns[which][1].next(free)
        if following is None:
            heappop(first)
        else:
            heapreplace(first, (following, length, which))


def lookup(sources: Mapping[str, Prefixes], address: Address) -> tuple[Prefix, str] | None:
    """The prefix that decides an address, as it was written, and its identity; None when no prefix holds it."""
    around = ((prefix, name) for name, prefixes in sources.items() if (prefix := prefixes.around(address)))
    return max(around, key=lambda source: source[0].length, default=None)
