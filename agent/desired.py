"""What a policy wants of a kernel: `Policy` and `Facts` → `Desired`, a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from types import MappingProxyType

from agent.addresses import Address, Family, Prefix, Prefixes, sorted_addresses
from agent.layers import Layer, layers
from agent.model import (
    GOTO,
    MAIN,
    METRIC_LAST,
    NOP,
    UNREACHABLE,
    Facts,
    Hop,
    Identity,
    Kernel,
    Link,
    LinkAddress,
    Policy,
    Route,
    Rule,
)
from agent.prefixes import Span, classes, outermost, pairs

#: Metric of an identity's own default route; the roads of `when_down` follow behind it in their order.
METRIC_OWN = 1024
#: So many prefixes of members, at most, are closed by a rule each while nobody marks their packets.
GUARDED = 64
#: So many addresses that are on no link are noted.
NAMED = 3
#: The priority of the kernel's rule for table main.
PRIORITY_MAIN = 32766
#: No identity is down but by what the host shows.
NOBODY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Way:
    """An identity's way out in one family: the hops of its default route, or why it has none now (`closed`).

    `unknown` says in words what only the host knows, in a review without facts. `probing` are the hops of a way that
    is closed because nobody answers the identity's probe: by them the probe asks on, and nothing else goes.
    """

    family: Family
    hops: tuple[Hop, ...] = ()
    closed: str = ""
    unknown: str = ""
    probing: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """An identity as its host has it now: own addresses, the families it has, its ways out, its link's MTU (bytes).

    Of the own addresses of a family the first is the one to speak as by choice: packets that are translated do.
    """

    identity: Identity
    addresses: tuple[Address, ...]
    ways: tuple[Way, ...]
    mtu: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(way.family for way in self.ways)

    def own(self, family: Family) -> tuple[Address, ...]:
        """The own addresses of a family, the one to choose first."""
        return tuple(address for address in self.addresses if Family.of(address) is family)

    def way(self, family: Family) -> Way | None:
        """The way out in a family; None for a family that is not this identity's own."""
        return next((way for way in self.ways if way.family is family), None)


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything that is to be in the kernel, and nothing of how to get there.

    `src_valid_mark` are links. `nat`: there may be translated connections. `faults` are what the policy gets wrong
    about this host, each a sentence; the way that one is about is closed, and the rest is as it should be. Without
    `host_known` this is a review's view: what only the host knows is not in it.
    """

    policy: Policy
    standings: tuple[Standing, ...]
    routes: frozenset[Route]
    rules: frozenset[Rule]
    src_valid_mark: frozenset[str]
    host_known: bool
    nat: bool = True
    faults: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[Span, ...]:
        """Who owns which addresses: disjoint, by the longest prefix."""
        return _classes(_Speakers(self.standings))

    def layers(self, family: Family) -> tuple[Layer, ...]:
        """The questions that find the identity of an address."""
        return _layers(_Speakers(self.standings))[family]

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should hear of: which identity is closed and why, what was not found."""
        return tuple(note for standing in self.standings for note in standing_notes(standing))


def desire(policy: Policy, facts: Facts | None, down: Mapping[str, str] = NOBODY) -> Desired:
    """What the policy wants, given what its host has now; without facts, as much as a review can know.

    `down` names identities that count as down whatever the host shows, and says why in words that end a sentence.
    """
    faults: list[str] = []
    addresses = _addresses(policy, facts)
    there = _by_link(facts)
    everywhere = frozenset(item.address for each in (facts.links if facts else ()) for item in each.addresses)
    standings = tuple(
        _shut(_standing(identity, addresses[identity.name], facts, everywhere, faults), down.get(identity.name))
        for identity in policy.identities
    )
    speakers = _Speakers(standings)
    by_name = {standing.identity.name: standing for standing in standings}
    routes = [route for standing in standings for route in _routes(policy, standing, by_name, there, facts)]
    return Desired(
        policy=policy,
        standings=standings,
        routes=frozenset({route.key: route for route in reversed(routes)}.values()),
        rules=frozenset(
            (*(rule for standing in standings for rule in _rules(standing)), *_guards(speakers, policy.kernel))
        ),
        src_valid_mark=_src_valid_mark(policy, facts),
        host_known=facts is not None,
        nat=_nat(policy, facts),
        faults=tuple(faults),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Speakers:
    """Who speaks as whom, as a key to what was made of it.

    To compare or to hash a hundred thousand members takes as long as to use them: identities are the same only if they
    are the very same values, as they are from one pass to the next.
    """

    standings: tuple[Standing, ...]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Speakers)
            and len(self.standings) == len(other.standings)
            and all(
                one.identity is another.identity and one.addresses == another.addresses
                for one, another in zip(self.standings, other.standings, strict=True)
            )
        )

    def __hash__(self) -> int:
        return hash(tuple(standing.addresses for standing in self.standings))


@lru_cache(maxsize=2)
def _layers(speakers: _Speakers) -> dict[Family, tuple[Layer, ...]]:
    sources = sources_of(speakers.standings)
    auto = [standing for standing in speakers.standings if standing.identity.addresses is None]
    return {
        family: layers(family, sources, [s.identity.name for s in auto if family in s.families]) for family in Family
    }


@lru_cache(maxsize=2)
def _classes(speakers: _Speakers) -> tuple[Span, ...]:
    return classes(pairs(sources_of(speakers.standings)))


def sources_of(standings: Iterable[Standing]) -> dict[str, Prefixes]:
    """What speaks as whom: each identity's own addresses and members, by its name."""
    return {
        standing.identity.name: Prefixes.joined(
            (Prefixes.of(map(Prefix.host, standing.addresses)), standing.identity.members)
        )
        for standing in standings
    }


def detours(policy: Policy, identity: Identity) -> tuple[tuple[Identity, ...], bool]:
    """The identities whose ways are taken while the identity's link is down, in order, and whether main comes last."""
    others: list[Identity] = []
    while identity.when_down not in (UNREACHABLE, MAIN):
        identity = policy.identity(identity.when_down)
        others.append(identity)
    return tuple(others), identity.when_down == MAIN


def may_leave(standing: Standing, family: Family) -> bool:
    """Whether an identity's packets may leave by its link: members who are to be translated need an address there."""
    identity = standing.identity
    return not identity.masquerade or family not in identity.members.families or bool(standing.own(family))


def is_open(standing: Standing, family: Family) -> bool:
    """Whether an identity's own link carries it now, as far as can be known."""
    way = standing.way(family)
    return way is not None and not way.closed


#: By identity and family the road that packets take: its hops and the address to translate to; empty where closed.
RoadsTaken = Mapping[tuple[str, Family], tuple[object, ...]]


def roads_changed(before: RoadsTaken, after: RoadsTaken) -> frozenset[tuple[str, Family]]:
    """The identities, with the families, whose packets take another road than before: other hops, also those of a
    detour, or another address that members are translated to.

    One that is closed now has no road that its connections could take: it is told when it opens again, whatever the
    road was before.
    """
    known = {name for name, _ in before}
    return frozenset(
        (name, family)
        for (name, family), road in after.items()
        if road and name in known and road != before.get((name, family))
    )


def roads_taken(desired: Desired) -> RoadsTaken:
    """The roads that are wanted."""
    by_name = {standing.identity.name: standing for standing in desired.standings}
    found: dict[tuple[str, Family], tuple[object, ...]] = {}
    for standing in desired.standings:
        identity = standing.identity
        others, main_last = detours(desired.policy, identity)
        for family in standing.families:
            for name in (identity.name, *(other.name for other in others)):
                way = by_name[name].way(family)
                if way and way.hops:
                    translated = by_name[name].own(family)[:1] if identity.masquerade else ()
                    found[identity.name, family] = (way.hops, translated)
                    break
            else:
                found[identity.name, family] = (MAIN,) if main_last else ()
    return found


def standing_notes(standing: Standing) -> Iterator[str]:
    """One line for each family that is closed, and for what else is amiss."""
    for way in standing.ways:
        if way.closed:
            yield f"identity {standing.identity.name}: {way.family} is closed: {way.closed}"
    for note in standing.notes:
        yield f"identity {standing.identity.name}: {note}"


# --- standings -------------------------------------------------------------------------------------------------------


def _addresses(policy: Policy, facts: Facts | None) -> dict[str, tuple[Address, ...]]:
    """Each identity's own addresses, the one to choose first.

    "auto" is the link's global ones, but for those that another identity has. Deprecated and temporary ones (RFC 4862,
    RFC 8981) are among them: connections live on that were made from them.
    """
    addresses = {identity.name: identity.addresses or () for identity in policy.identities}
    owners = {Prefix.host(address): name for name, own in addresses.items() for address in own}
    for identity in policy.identities:
        link = facts.link(identity.link) if facts and identity.addresses is None else None
        found = {
            item.address
            for item in (link.addresses if link else ())
            if item.scope_global
            and not item.address.is_link_local
            and (owners.get(host := Prefix.host(item.address)) or _member_of(policy, host)) in {None, identity.name}
        }
        if found:
            addresses[identity.name] = sorted_addresses(found)
            owners |= dict.fromkeys(map(Prefix.host, found), identity.name)
    there = {item.address: item for link in (facts.links if facts else ()) for item in link.addresses}
    return {name: tuple(sorted(own, key=lambda each: _rank(there.get(each)))) for name, own in addresses.items()}


def _member_of(policy: Policy, prefix: Prefix) -> str | None:
    """The identity that has this very prefix among its members."""
    return next((identity.name for identity in policy.identities if prefix in identity.members), None)


def _rank(there: LinkAddress | None) -> int:
    """How an address is to be chosen: one that will stay, a temporary one, one that is on its way out, one that is not
    the link's yet.
    """
    if there is None:
        return 0
    return 3 if there.tentative else 2 if there.deprecated else int(there.temporary)


def _standing(
    identity: Identity, addresses: tuple[Address, ...], facts: Facts | None, there: Set[Address], faults: list[str]
) -> Standing:
    """`there`: the addresses of all links."""
    link = facts.link(identity.link) if facts else None
    member_families = identity.members.families
    families = [
        family
        for family in Family
        # "auto" may get an address of either family at any moment: both are closed until then.
        if identity.addresses is None or family in member_families or any(Family.of(a) is family for a in addresses)
    ]
    notes = []
    if facts and identity.addresses:
        absent = [str(address) for address in addresses if address not in there]
        notes = [f"{address} is on no link of this host" for address in absent[:NAMED]]
        if more := len(absent) - len(notes):
            others = "1 more address" if more == 1 else f"{more} more addresses"
            notes[-1] = f"{absent[NAMED - 1]} and {others} are on no link of this host"
    if identity.probe and identity.probe.target in there:
        notes.append(f"the probe's target {identity.probe.target} is an address of this host: it proves nothing")
    ways = []
    for family in families:
        own = any(Family.of(address) is family for address in addresses)
        way = _way(identity, family, link, facts, faults)
        if not way.closed and facts and not own:
            if family not in member_families:
                way = Way(family, closed=f"{identity.link} has no global {family} address")
            elif identity.masquerade:
                way = Way(family, closed=f"there is no {family} address to translate members to")
        ways.append(way)
    return Standing(identity, addresses, tuple(ways), link.mtu if link else None, tuple(notes))


def _shut(standing: Standing, reason: str | None) -> Standing:
    """A standing whose ways are closed for a reason from outside, if there is one."""
    if reason is None:
        return standing
    ways = (Way(way.family, closed=reason, probing=way.hops) if way.hops else way for way in standing.ways)
    return replace(standing, ways=tuple(ways))


def _way(identity: Identity, family: Family, link: Link | None, facts: Facts | None, faults: list[str]) -> Way:
    name = identity.link
    explicit = () if isinstance(identity.next_hop, str) else identity.next_hop
    gateway = next((address for address in explicit if Family.of(address) is family), None)
    if facts is None:
        if identity.next_hop == "auto":
            return Way(family, unknown=f"main's {family} default on {name}")
        return _explicit(family, name, gateway, point_to_point=identity.next_hop == "none")
    if link is None:
        return Way(family, closed=f"there is no link {name}")
    if not link.up:
        # The kernel takes no route along a link that is down (ENETDOWN).
        return Way(family, closed=f"link {name} is down")
    if identity.when_down != UNREACHABLE and not link.carrier:
        # A default along a dead link would keep the packets from the road that `when_down` names.
        return Way(family, closed=f"link {name} has no carrier")
    if identity.next_hop == "auto":
        defaults = [
            route for route in facts.routes if route.destination == Prefix.default(family) and _hops_on(route, {name})
        ]
        if not defaults:
            return Way(family, closed=f"main has no {family} default on {name}")
        return Way(family, _hops_on(min(defaults, key=lambda route: (route.metric, str(route))), {name}))
    if gateway is not None and not gateway.is_link_local:
        networks = [route.destination for route in _connected(facts, {name}, family)]
        if not networks:
            return Way(family, closed=f"{name} has no {family} network yet for the next hop {gateway}")
        if not any(gateway in network for network in networks):
            on_link = ", ".join(map(str, networks))
            # The kernel would refuse the route (ENETUNREACH).
            wrong = f"{gateway} is not on {name}, which has {on_link}"
            faults.append(f"identity.{identity.name}.next_hop: {wrong}")
            return Way(family, closed=f"the next hop {wrong}")
    return _explicit(family, name, gateway, point_to_point=identity.next_hop == "none")


def _explicit(family: Family, link: str, gateway: Address | None, point_to_point: bool) -> Way:
    if gateway is None and not point_to_point:
        return Way(family, closed=f"the policy names no {family} next hop")
    return Way(family, (Hop(link, gateway),))


# --- routes and rules ------------------------------------------------------------------------------------------------


def _routes(
    policy: Policy,
    standing: Standing,
    others: Mapping[str, Standing],
    there: Mapping[str, Set[Address]],
    facts: Facts | None,
) -> Iterator[Route]:
    """The routes of an identity's tables, the more important first: of two with one key the first stays.

    `there`: by link, the addresses that a route may have for its source.
    """
    identity = standing.identity
    detour, main_last = detours(policy, identity)
    for way in standing.ways:
        source = _source(standing, way.family, there if facts else None)
        yield from _probe_routes(standing, way, source, facts)
        if facts:
            for route in _connected(facts, {identity.link}, way.family) if may_leave(standing, way.family) else ():
                yield replace(route, table=identity.table)
            for route in downstream_routes(policy, facts, way.family):
                yield replace(route, table=identity.table)
        default = Route(Prefix.default(way.family), identity.table, metric=METRIC_OWN)
        if way.hops:
            yield replace(default, hops=way.hops, source=source)
        for behind, other in enumerate(detour, start=1):
            road = others[other.name].way(way.family)
            if road and road.hops:
                yield replace(default, hops=road.hops, metric=METRIC_OWN + behind)
        if not main_last:
            yield replace(default, kind="unreachable", metric=METRIC_LAST)


def _probe_routes(standing: Standing, way: Way, source: Address | None, facts: Facts | None) -> Iterator[Route]:
    """The road of a probe that nobody answers, to see whether somebody answers again.

    Without it a socket that is bound to a link asks for the target on that very link (net/ipv4/route.c,
    ip_route_output_key_hash_rcu), or for IPv6 finds no route at all.
    """
    identity, probe = standing.identity, standing.identity.probe
    if facts is None or probe is None or not way.probing or Family.of(probe.target) is not way.family:
        return
    if not any(probe.target in route.destination for route in _connected(facts, {identity.link}, way.family)):
        yield Route(Prefix.host(probe.target), identity.table, way.probing, metric=METRIC_OWN, source=source)


def _by_link(facts: Facts | None) -> Mapping[str, Set[Address]]:
    """The addresses of each link, but tentative ones: the kernel refuses a route whose `src` it doesn't have yet."""
    return {
        link.name: frozenset(item.address for item in link.addresses if not item.tentative)
        for link in (facts.links if facts else ())
    }


def _source(standing: Standing, family: Family, there: Mapping[str, Set[Address]] | None) -> Address | None:
    """The address that a local program gets which asked for the identity by its mark and is bound to none.

    Only one that is `there`, on the link.
    """
    own = standing.own(family)
    if there is not None:
        on_link = there.get(standing.identity.link, frozenset())
        own = tuple(address for address in own if address in on_link)
    return own[0] if own else None


def downstream_routes(policy: Policy, facts: Facts, family: Family) -> Iterator[Route]:
    """Main's routes to the hosts behind this gateway; they are good for every identity.

    Without them a source prefix that contains one of the gateway's LAN addresses sends the gateway's own packets to
    its LAN out by the identity's link: no ping, no neighbour advertisement, no "fragmentation needed".
    """
    if policy.downstream is None:
        ours = {identity.link for identity in policy.identities}
        yield from _connected(facts, {link.name for link in facts.links} - ours - {"lo"}, family)
        return
    for route in facts.routes:
        hops = _hops_on(route, set(policy.downstream))
        if route.family is family and route.destination.length and hops and not _link_local(route) and not route.tos:
            yield replace(route, hops=hops)


def _connected(facts: Facts, links: set[str], family: Family) -> Iterator[Route]:
    """Main's routes that lead straight onto one of the links. Link-local ones never leave their link anyway."""
    for route in facts.routes:
        if route.family is family and route.destination.length and not _link_local(route):
            hops = _hops_on(route, links)
            if hops and not any(hop.via for hop in hops):
                yield replace(route, hops=hops)


def _hops_on(route: Route, links: set[str]) -> tuple[Hop, ...]:
    hops = tuple(hop for hop in route.hops if hop.link in links)
    # A weight is to other hops; the kernel forgets that of a single one.
    return (replace(hops[0], weight=1),) if len(hops) == 1 else hops


def _link_local(route: Route) -> bool:
    return route.family is Family.IPV6 and route.destination.address >> 118 == 0xFE80 >> 6


def _rules(standing: Standing) -> Iterator[Rule]:
    """Two rules, always: the mark's for forwarded and translated packets, the source's for the host's own addresses.

    The mark comes too late for local packets: their first route lookup, which may fail and which chooses the MSS, is
    before the output hook.
    """
    identity = standing.identity
    for family in standing.families:
        yield Rule(family, identity.priority, identity.table, fwmark=identity.way or identity.fwmark)
        for address in standing.own(family):
            yield Rule(family, identity.priority, identity.table, source=Prefix.host(address))


def priority_behind(identities: Iterable[Identity]) -> int:
    """The first priority behind all rules that look up an identity's table."""
    return max(identity.priority for identity in identities) + 1


@lru_cache(maxsize=2)
def _guards(speakers: _Speakers, kernel: Kernel) -> tuple[Rule, ...]:
    """What keeps members closed while nobody marks their packets: our table is not there, or not there yet.

    A packet of theirs that has no mark by then is refused; but for what this host itself sends from an address in their
    prefixes, which is looked up before the output hook and goes around. One rule a prefix, behind all the others: what
    is marked never comes here, but whatever is nobody's does, and the kernel tries them one by one (23 ns each).
    """
    if not (kernel.enforce and speakers.standings):  # then nothing is to be stopped, or nobody
        return ()
    guards = []
    identities = [standing.identity for standing in speakers.standings]
    first = priority_behind(identities) + 1
    for family in Family:
        guarded = tuple(islice(outermost(family, (each.members for each in identities)), GUARDED + 1))
        if 0 < len(guarded) <= GUARDED and first + 2 < PRIORITY_MAIN:
            mask = kernel.mark_mask
            guards.append(Rule(family, first, iif="lo", action=GOTO, target=first + 2))
            # A source of no bits is none: the kernel doesn't tell of it.
            sources = (each if each.length else None for each in guarded)
            guards += [Rule(family, first + 1, source=each, unmarked=mask, action=UNREACHABLE) for each in sources]
            guards.append(Rule(family, first + 2, action=NOP))
    return tuple(guards)


def _nat(policy: Policy, facts: Facts | None) -> bool:
    """Whether there may be translated connections. To ask for them costs every packet of a host that has none a
    tracked connection: netfilter tracks them as soon as one rule speaks of them.
    """
    if policy.kernel.nat is not None:
        return policy.kernel.nat
    return facts is None or facts.nat or any(identity.masquerade for identity in policy.identities)


def _src_valid_mark(policy: Policy, facts: Facts | None) -> frozenset[str]:
    """The identities' links on which strict rp_filter would judge a packet by main, and not by its mark's table."""
    if facts is None:
        return frozenset()
    links = filter(None, (facts.link(identity.link) for identity in policy.identities))
    return frozenset(link.name for link in links if link.rp_filter == 1)
