"""Which way the policy wants an identity's packets to go: from the policy and the host alone, and nothing that renders.

Whoever compares, with a text or with the kernel's own lookups, compares with this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.addresses import Family, Prefix
from agent.desired import Desired, detours, downstream_routes, may_leave
from agent.given import Given
from agent.model import Facts, Identity, Route
from agent.walk import DOWN, GONE, LOCAL, MAIN, OUT, REFUSED, Fate, Networks, hops_of, is_here

Hops = frozenset[tuple[str, object]]


class Wanted:
    """What is wanted of the packets of one family."""

    def __init__(self, family: Family, desired: Desired, facts: Facts) -> None:
        self.family = family
        self.standings = {standing.identity.name: standing for standing in desired.standings}
        self.own = {
            int(address): standing.identity.name for standing in desired.standings for address in standing.own(family)
        }
        there = {
            int(item.address) for link in facts.links for item in link.addresses if Family.of(item.address) is family
        }
        self.local = frozenset({*there, *self.own} if not facts.links else there)
        self.fleeting = frozenset(self.own)
        links = {standing.identity.link for standing in desired.standings}
        behind = downstream_routes(desired.policy, facts, family)
        self.behind = tuple((route.destination, hops_of(route)) for route in behind)
        self.connected: dict[str, list[tuple[Prefix, Hops]]] = {link: [] for link in links}
        for route in facts.routes:
            for link in links & {hop.link for hop in route.hops} if _is_network(route, family) else ():
                hops = frozenset(hop for hop in hops_of(route) if hop[0] == link)
                if not any(via for _, via in hops):
                    self.connected[link].append((route.destination, hops))
        self._detours = {
            standing.identity.name: detours(desired.policy, standing.identity) for standing in desired.standings
        }
        self._networks: dict[str, Networks[Hops]] = {}

    def detours(self, identity: Identity) -> tuple[tuple[Identity, ...], bool]:
        """By whose links else an identity's packets may leave, in order, and whether at last by main's word."""
        return self._detours[identity.name]

    def is_local(self, given: Given) -> bool:
        """Whether the destination is an address that this host has now."""
        return is_here(given, self.local, self.fleeting)

    def host(self, given: Given) -> Fate:
        """What is wanted of a packet that is nobody's."""
        return Fate(LOCAL if self.is_local(given) else MAIN)

    def way(self, identity: Identity, given: Given) -> tuple[Fate, ...]:
        """What the policy wants of an identity's packet: one thing, or, once addresses are gone, one of some."""
        if self.is_local(given):
            return (Fate(LOCAL),)
        if self.standings[identity.name].way(self.family) is None:
            return (Fate(MAIN),)  # the family is not its own: nothing of ours says anything of it
        fitting = self.networks(identity).holding("destination", given)
        gone = any(what == GONE for what, _ in given.happened)
        longest = None
        found: list[Hops] = []
        for prefix, hops in fitting:
            if not gone and longest is not None and prefix.length < longest:
                break
            up = _up(hops, given)
            if up:
                longest = prefix.length
                found.append(up)
        if found and not gone:
            return tuple(Fate(OUT, hops) for hops in found)
        others, main_last = self.detours(identity)
        roads = (hops for each in (identity, *others) if (hops := self._default(each, given)))
        closed = Fate(MAIN if main_last else REFUSED)
        if gone:
            return (*(Fate(OUT, hops) for hops in (*found, *roads)), closed)
        road = next(roads, None)
        return (closed if road is None else Fate(OUT, road),)

    def networks(self, identity: Identity) -> Networks[Hops]:
        """The networks that an identity's packets reach by another way than by default, and by which hops."""
        if identity.name not in self._networks:
            probing = self._probing(identity)
            connected = self.connected[identity.link] if may_leave(self.standings[identity.name], self.family) else ()
            self._networks[identity.name] = Networks((*probing, *connected, *self.behind))
        return self._networks[identity.name]

    def _probing(self, identity: Identity) -> Iterator[tuple[Prefix, Hops]]:
        way, probe = self.standings[identity.name].way(self.family), identity.probe
        if way and way.probing and probe and Family.of(probe.target) is self.family:
            yield Prefix.host(probe.target), frozenset((hop.link, hop.via) for hop in way.probing)

    def _default(self, identity: Identity, given: Given) -> Hops:
        way = self.standings[identity.name].way(self.family)
        return _up(frozenset((hop.link, hop.via) for hop in way.hops), given) if way else frozenset()


def same(found: Fate, wanted: Iterable[Fate]) -> bool:
    """Whether it is one of what is wanted; the hops of one network may stand in several routes."""
    wanted = tuple(wanted)
    hops = frozenset(hop for fate in wanted for hop in fate.hops)
    return any(found.what == fate.what for fate in wanted) and found.hops <= hops


def _is_network(route: Route, family: Family) -> bool:
    """Link-local ones never leave their link anyway."""
    link_local = family is Family.IPV6 and route.destination.address >> 118 == 0xFE80 >> 6
    return route.family is family and bool(route.destination.length) and not link_local


def _up(hops: Hops, given: Given) -> Hops:
    return frozenset(hop for hop in hops if not given.suppose(DOWN, hop[0]))
