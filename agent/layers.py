"""Sources to the sets that hold them: which structure of the kernel fits their shape, and what is asked first.

A hash holds networks of one length: the address is masked and looked up, the longest length first. Intervals hold any,
and take the longer the more there are.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from agent.addresses import Addresses, Family, Prefixes, address_text
from agent.prefixes import classes, pairs

#: What one question costs a packet, in ns, by the number of elements; between them a straight line. Only ratios decide:
#: `./dev bench packets` has interval maps beside hashes of one length and of four at each size, to measure them anew.
HASH = ((1_000, 65), (128_000, 250), (1_000_000, 350))
INTERVAL = ((16, 255), (1_000, 430), (128_000, 1_600), (1_000_000, 2_300))
#: A packet asks all hashes only when it is nobody's; of others it takes the first that knows it.
ASKED = 0.75
#: With more elements than this each identity has sets of its own: when one is added to a map of verdicts, the kernel
#: walks through all that it has, by every way that leads there (net/netfilter/nft_lookup.c, nft_lookup_validate).
MANY = 4096
#: But no more sets than this, for a packet asks one after the other.
SETS = 32


@dataclass(frozen=True, slots=True)
class Layer:
    """A question about an address: is it, with all behind `length` bits cut off, in this set?

    `length` is None for intervals, which hold addresses as they are. `identity` is whose sources are in a set; it is
    "" for a map, which says itself whose they are.
    """

    name: str
    family: Family
    length: int | None
    identity: str
    elements: Sequence[tuple[str, str]]

    @property
    def mask(self) -> str:
        """What the address is masked with, as nft writes it; "" where nothing is cut off."""
        if self.length is None or self.length == self.family.bits:
            return ""
        return address_text(self.family, ((1 << self.length) - 1) << self.family.bits - self.length)


def layers(family: Family, sources: Mapping[str, Prefixes], hosts: Iterable[str] = ()) -> tuple[Layer, ...]:
    """The questions to ask about an address of a family, in order: the first that knows it, by its longest prefix.

    `sources` are the identities', by name. `hosts` are those that may get whole addresses at any moment: there is a
    place for these before.
    """
    networks: dict[int, dict[str, Addresses]] = {}
    for name in hosts:
        networks.setdefault(family.bits, {})[name] = Addresses(family)
    for name, prefixes in sources.items():
        for length, column in prefixes.lengths(family):
            networks.setdefault(length, {})[name] = column
    by_length = [(length, sorted(networks[length].items())) for length in sorted(networks, reverse=True)]
    counts = [sum(len(column) for _, column in by_name) for _, by_name in by_length]
    if sum(counts) > MANY and sum(len(by_name) for _, by_name in by_length) <= SETS:
        return tuple(_sets(family, by_length))
    if ASKED * sum(_cost(HASH, count) for count in counts) <= _cost(INTERVAL, sum(counts)):
        return tuple(_maps(family, by_length))
    return (_intervals(family, sources),)


def why(asked: Sequence[Layer]) -> str:
    """Why these layers and no others, for a reviewer; "" where there are none."""
    if not asked:
        return ""
    count = sum(len(layer.elements) for layer in asked)
    cost = ASKED * sum(_cost(HASH, len(layer.elements)) for layer in asked)
    interval = _cost(INTERVAL, count)
    if asked[0].length is None:
        return f"{count} spans of many lengths in an interval map, which costs a packet some {interval:.0f} ns"
    lengths = len({layer.length for layer in asked})
    if asked[0].identity:
        shape = "a hash for each length and identity, so that a change costs what it changes"
    else:
        shape = "a hash for each length"
    against = f"some {cost:.0f} ns a packet, an interval map {interval:.0f}"
    return f"{count} network{'s' * (count != 1)} of {lengths} length{'s' * (lengths != 1)}: {shape}; {against}"


#: Networks by length, the longest first, and by identity.
_ByLength = Iterable[tuple[int, list[tuple[str, Addresses]]]]


def _sets(family: Family, by_length: _ByLength) -> Iterator[Layer]:
    for length, by_name in by_length:
        for name, column in by_name:
            yield Layer(f"id-{name}-{family}-{length}", family, length, name, column)


def _maps(family: Family, by_length: _ByLength) -> Iterator[Layer]:
    for length, by_name in by_length:
        owned = sorted((key, name) for name, column in by_name for key in column.each())
        elements = tuple((socket.inet_ntop(family.number, key), f"goto id-{name}") for key, name in owned)
        yield Layer(f"sources-{family}-{length}", family, length, "", elements)


def _intervals(family: Family, sources: Mapping[str, Prefixes]) -> Layer:
    of_family = ((prefix, name) for prefix, name in pairs(sources) if prefix.family is family)
    elements = tuple((str(span), f"goto id-{span.identity}") for span in classes(of_family))
    return Layer(f"sources-{family}", family, None, "", elements)


def _cost(measured: tuple[tuple[int, int], ...], count: int) -> float:
    """What a question costs with so many elements."""
    if count <= measured[0][0]:
        return measured[0][1]
    for (few, less), (many, more) in pairwise(measured):
        if count <= many:
            return less + (more - less) * (count - few) / (many - few)
    return measured[-1][1]
