"""Sources that change hands: where two cuts of the addresses into classes differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agent.addresses import Family, Prefix
from agent.prefixes import Span

#: Addresses of a family from the first to the last, both included.
Range = tuple[Family, int, int]


@dataclass(frozen=True, slots=True)
class Move:
    """Sources that were `before`'s and are `after`'s, by the identities' names; None: nobody's.

    `prefixes` are in order, and as few as these addresses can be written with.
    """

    before: str | None
    after: str | None
    prefixes: tuple[Prefix, ...]


def moves(before: Iterable[Span], after: Iterable[Span]) -> tuple[Move, ...]:
    """Every address that the longest prefix gives to another identity than before; who loses one comes first.

    Takes time linear in the spans, but for their sorting: 100,000 of them are normal.
    """
    ranges: dict[tuple[str | None, str | None], list[Range]] = defaultdict(list)
    for found, was, becomes in _cuts(before, after):
        ranges[was, becomes].append(found)
    every = [Move(was, becomes, aggregated(found)) for (was, becomes), found in ranges.items()]
    return tuple(sorted(every, key=lambda move: (move.after is not None, move.before is None, move.prefixes[0])))


def _cuts(before: Iterable[Span], after: Iterable[Span]) -> Iterator[tuple[Range, str | None, str | None]]:
    """The ranges in which the two differ, in order, with their owners here and there."""
    edges: list[tuple[Family, int, int, int, str]] = []
    for side, spans in enumerate((before, after)):
        for span in spans:
            # What ends is over before anything begins at the same address.
            edges.append((span.family, span.first, 1, side, span.identity))
            edges.append((span.family, span.last + 1, 0, side, ""))
    owners: list[str | None] = [None, None]
    place = 0
    for family, address, _, side, owner in sorted(edges):
        # Between two families there is nobody: every span of the first has ended.
        if place < address and owners[0] != owners[1]:
            yield (family, place, address - 1), owners[0], owners[1]
        owners[side] = owner or None
        place = address


def aggregated(ranges: Iterable[Range]) -> tuple[Prefix, ...]:
    """The fewest prefixes that hold the addresses of ranges, which are apart and in order, and no others."""
    joined: list[Range] = []
    for family, first, last in ranges:
        touches = joined and joined[-1][0] is family and joined[-1][2] + 1 == first
        joined.append((family, joined.pop()[1] if touches else first, last))
    return tuple(prefix for each in joined for prefix in _prefixes(*each))


def _prefixes(family: Family, first: int, last: int) -> Iterator[Prefix]:
    while first <= last:
        # As large as the address is aligned, and as there is room for.
        bits = min((first & -first).bit_length() - 1 if first else family.bits, (last - first + 1).bit_length() - 1)
        yield Prefix(family, first, family.bits - bits)
        first += 1 << bits


def counted(count: int, one: str, many: str) -> str:
    """`1 thing`, `1,200 things`; "" for none."""
    return f"{count:,} {one if count == 1 else many}" if count else ""


def few(prefixes: Sequence[Prefix], most: int = 6) -> str:
    """The first of them, and how many more there are."""
    words = ", ".join(map(str, prefixes[:most]))
    return f"{words} and {len(prefixes) - most:,} more" if len(prefixes) > most else words


def size(prefixes: Iterable[Prefix]) -> str:
    """How many addresses these are; of IPv6 how many /64, where they are whole ones."""
    totals = dict.fromkeys(Family, 0)
    for prefix in prefixes:
        totals[prefix.family] += 1 << prefix.family.bits - prefix.length
    four, six = totals[Family.IPV4], totals[Family.IPV6]
    words = [counted(four, "IPv4 address", "IPv4 addresses")]
    networks, single = divmod(six, 1 << 64)
    words += [counted(networks, "IPv6 /64", "IPv6 /64s"), counted(single, "IPv6 address", "IPv6 addresses")]
    return ", ".join(filter(None, words))
