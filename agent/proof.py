"""Explain a packet's way: by the desired state step by step, beside what the kernel itself answers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

from agent.desired import Desired, Standing, downstream_routes, sources_of
from agent.model import METRIC_LAST, Address, Facts, Family, Lookup, Route, Rule
from agent.prefixes import lookup


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet: source, destination, the link it arrives on; None for one that this host sends itself."""

    source: Address
    destination: Address
    arriving: str | None = None

    def __str__(self) -> str:
        where = f"arriving on {self.arriving}" if self.arriving else "sent by this host"
        return f"{self.source} -> {self.destination}, {where}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whose packet it is, and by which prefix of which field; no identity: unmarked."""

    standing: Standing | None
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Steps as (what, words), for a person. `agrees` is None where the kernel has nothing to agree to."""

    packet: Packet
    identity: str | None
    steps: tuple[tuple[str, str], ...]
    agrees: bool | None


#: linux/rtnetlink.h, RT_TABLE_LOCAL: the host's own addresses, looked up before any rule of ours.
TABLE_LOCAL = 255
#: Asks the kernel for the route of a packet with a mark.
Ask = Callable[[Packet, int], Lookup]


def explain(
    desired: Desired,
    packet: Packet,
    local: Container[Address] = (),
    rules: Iterable[tuple[Rule, bool]] = (),
    ask: Ask | None = None,
) -> Explanation:
    """The packet's way. `local` are all of the host's addresses, `rules` all its rules, in order, with whether they
    are ours; `ask` asks the kernel.
    """
    decision = decide(desired, packet)
    steps = [("identity", decision.why)]
    if decision.standing is None:
        steps.append(("mark", "none: the host's other rules and tables decide"))
        answer = ask(packet, 0) if ask else None
        steps += [("kernel", str(answer))] if answer else []
        return Explanation(packet, None, tuple(steps), None)
    identity = decision.standing.identity
    family = Family.of(packet.source)
    hook = "prerouting" if packet.arriving else "output"
    steps.append(("mark", f"{identity.fwmark}, written in hook {hook} by chain id-{identity.name}"))
    if packet.destination in local:
        steps.append(("rule", "priority 0 from all lookup local: it is for this host"))
        answer = ask(packet, identity.fwmark.value) if ask else None
        agrees = answer.table == TABLE_LOCAL if answer else None
        steps += _verdict(agrees, answer)
        return Explanation(packet, identity.name, tuple(steps), agrees)
    mine = [rule for rule in desired.rules if rule.table == identity.table and rule.family is family]
    matching = sorted(
        (r for r in mine if _matches(r, packet, identity.fwmark.value)), key=lambda r: r.fwmark is not None
    )
    rules = tuple(rules)
    there = {rule for rule, ours in rules if ours}
    steps += [("rule", str(rule) if not rules or rule in there else f"NOT THERE: {rule}") for rule in matching]
    if not matching:
        steps.append(("rule", f"none: {family} is not {identity.name}'s own"))
    foreign = tuple(_foreign_first(rules, matching, packet, identity.fwmark.value))
    steps += [("before it", f"a rule of somebody else's: {words}") for words in foreign]
    route = route_of(desired, identity.table, packet.destination)
    steps.append(("route", str(route) if route else f"none in table {identity.table}: falls through to the next rules"))
    steps.append(("link", _leaves(desired, decision.standing, route)))
    answer = ask(packet, identity.fwmark.value) if ask else None
    agrees = _agrees(route, answer, identity.table) if answer else None
    steps += _verdict(agrees, answer)
    if agrees is False and foreign:
        steps.append(("remedy", "move the rule that comes first behind ours, or ours before it (rule_priority)"))
    elif agrees is False and answer and answer.table == identity.table:
        steps.append(
            ("remedy", f"another route in table {identity.table} leads there: ip route show table {identity.table}")
        )
    elif agrees is False:
        forwarding = "is forwarding on, is its link right, " if packet.arriving else ""
        steps.append(("remedy", f"{forwarding}is everything in force (idmark plan)?"))
    return Explanation(packet, identity.name, tuple(steps), agrees)


def decide(desired: Desired, packet: Packet) -> Decision:
    """As the chains do: on an identity's own link by the destination, everything else by the source."""
    sources = sources_of(desired.standings)
    by_name = {standing.identity.name: standing for standing in desired.standings}
    if packet.arriving:
        found = lookup(sources, packet.destination)
        if found and by_name[found[1]].identity.link == packet.arriving:
            standing = by_name[found[1]]
            return Decision(standing, f"{standing.identity.name}: arrives on its link {packet.arriving} for {found[0]}")
    found = lookup(sources, packet.source)
    if found is None:
        return Decision(None, f"none: no identity's sources hold {packet.source}")
    prefix, name = found
    own = packet.source in by_name[name].addresses
    return Decision(
        by_name[name], f"{name}: the source {'is its own address' if own else f'is in its members, {prefix}'}"
    )


def route_of(desired: Desired, table: int, destination: Address) -> Route | None:
    """The route that a table has for a destination: the longest prefix, and of those the smallest metric."""
    candidates = [route for route in desired.routes if route.table == table and destination in route.destination]
    return min(candidates, key=lambda route: (-route.destination.length, route.metric), default=None)


def arrival(desired: Desired, facts: Facts, source: Address) -> str | None:
    """The link on which a source must arrive that is not this host's: where its network is, behind this gateway."""
    if any(source == item.address for link in facts.links for item in link.addresses):
        return None
    family = Family.of(source)
    routes = [route for route in downstream_routes(desired.policy, facts, family) if source in route.destination]
    best = max(routes, key=lambda route: route.destination.length, default=None)
    return best.hops[0].link if best else None


def _matches(rule: Rule, packet: Packet, mark: int) -> bool:
    """Whether a rule takes the packet; what a foreign rule asks besides (`extra`) is taken for granted."""
    if rule.source is not None and packet.source not in rule.source:
        return False
    if rule.fwmark is not None and mark & rule.fwmark.mask != rule.fwmark.value:
        return False
    if mark & rule.unmarked or rule.iif not in ("", packet.arriving or "lo"):
        return False
    return rule.family is Family.of(packet.source)


def _foreign_first(
    rules: Iterable[tuple[Rule, bool]], matching: list[Rule], packet: Packet, mark: int
) -> Iterator[str]:
    """Rules that are not ours, take the packet and come before ours; the local table's (priority 0) always does."""
    first = min((rule.priority for rule in matching), default=METRIC_LAST)
    for rule, ours in rules:
        if not ours and 0 < rule.priority < first and _matches(rule, packet, mark):
            yield str(rule).rpartition(" protocol ")[0]


def _leaves(desired: Desired, standing: Standing, route: Route | None) -> str:
    if route is None:
        return "whatever they say; misrouted packets are counted" + (
            " and dropped" if desired.policy.kernel.enforce else ""
        )
    if route.kind != "unicast":
        way = standing.way(route.family)
        return f"none: refused, {way.closed}" if way and way.closed else "none: refused"
    links = ", ".join(hop.link for hop in route.hops)
    if any(hop.link == standing.identity.link for hop in route.hops):
        return f"{links}, its own"
    return f"{links}, a road that when_down names" if not route.destination.length else f"{links}, behind this gateway"


def _agrees(route: Route | None, answer: Lookup, table: int) -> bool:
    if route is None:
        return answer.table != table
    if route.kind != "unicast":
        return bool(answer.error)
    return answer.table == table and (answer.link, answer.via) in {(hop.link, hop.via) for hop in route.hops}


def _verdict(agrees: bool | None, answer: Lookup | None) -> list[tuple[str, str]]:
    return [] if answer is None else [("kernel", f"{'agrees' if agrees else 'DISAGREES'}: {answer}")]
