"""Tracked connections: which of them are an identity's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from agent.addresses import Family, Prefix
from agent.desired import Desired
from agent.prefixes import Span, classes


@dataclass(frozen=True, slots=True)
class Flow:
    """A connection as conntrack knows it, addresses as integers: who began it with whom, and what its replies carry.

    Untranslated, a reply's source is the destination and its destination the source; of a translated connection the
    reply's source is where its packets really go, and the reply's destination what the far end sees.
    """

    family: Family
    source: int
    destination: int
    reply_source: int
    reply_destination: int


def flows_of(name: str, desired: Desired, families: Set[Family] = frozenset(Family)) -> Callable[[Flow], bool]:
    """Whether a connection goes by the road of an identity: one from it, one translated to it, or one to it.

    Connections with the gateway itself and with the hosts behind it are not among them: they go by no road.
    """
    table = desired.policy.identity(name).table
    link = desired.policy.identity(name).link
    speaks = _inside(span for span in desired.classes if span.identity == name)
    near = [
        route.destination
        for route in desired.routes
        if route.table == table and route.destination.length and route.hops
        if all(hop.link != link for hop in route.hops)
    ]
    near += (Prefix.host(address) for standing in desired.standings for address in standing.addresses)
    behind = _inside(classes((prefix, name) for prefix in near))

    def wanted(flow: Flow) -> bool:
        family = flow.family
        if family not in families:
            return False
        if speaks(family, flow.source) or speaks(family, flow.reply_destination):
            return not behind(family, flow.reply_source)
        return speaks(family, flow.destination) and not behind(family, flow.source)

    return wanted


def _inside(spans: Iterable[Span]) -> Callable[[Family, int], bool]:
    """Whether an address is in one of the spans, which are disjoint and in order."""
    firsts: dict[Family, list[int]] = {family: [] for family in Family}
    lasts: dict[Family, list[int]] = {family: [] for family in Family}
    for span in spans:
        firsts[span.family].append(span.first)
        lasts[span.family].append(span.last)

    def inside(family: Family, address: int) -> bool:
        place = bisect_right(firsts[family], address) - 1
        return place >= 0 and address <= lasts[family][place]

    return inside
