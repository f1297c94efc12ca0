"""Explain a packet's way: through the text that would be loaded, and what is loaded, beside the kernel's own answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from agent.addresses import Address, Family, address_text
from agent.artefact import Artefact, SetMark
from agent.desired import Desired, Standing, downstream_routes, sources_of
from agent.given import Given
from agent.lookups import agrees
from agent.model import METRIC_LAST, Facts, Lookup, Route, Rule
from agent.prefixes import lookup
from agent.walk import LO, LOCAL, OUT, Attempt, Fate, Hooks, Step, Tables
from agent.walk import Packet as Walker
from agent.wanted import Wanted


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

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield str(self.packet)
        for what, words in self.steps:
            yield f"  {what:<10} {words}"

    def plain(self) -> dict[str, object]:
        """For a program."""
        steps = [{"what": what, "words": words} for what, words in self.steps]
        return {"packet": str(self.packet), "identity": self.identity, "steps": steps, "agrees": self.agrees}


#: linux/rtnetlink.h, RT_TABLE_LOCAL: the host's own addresses, looked up before any rule of ours.
TABLE_LOCAL = 255
#: Asks the kernel for the route of a packet with a mark.
Ask = Callable[[Packet, int], Lookup]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the kernel has, in what its chains are not the rendered ones, and whom to ask for its own answer."""

    artefact: Artefact
    strange: tuple[str, ...]
    ask: Ask


def explain(
    desired: Desired, facts: Facts | None, rendered: Artefact, packet: Packet, loaded: Loaded | None = None
) -> Explanation:
    """The packet's way through the rendered texts, and what is otherwise in the kernel."""
    decision = decide(desired, packet)
    steps = [("identity", decision.why)]
    family = Family.of(packet.source)
    wanted = Wanted(family, desired, facts or Facts())
    if desired.policy.kernel.drop_own_sources and _claims_to_be_this_host(wanted, packet):
        steps.append(("dropped", "it claims to come from this host: chain prerouting drops it (drop_own_sources)"))
        return Explanation(packet, None, tuple(steps), None)
    way = _Way(wanted, rendered, packet)
    identity = decision.standing.identity if decision.standing else None
    mask = desired.policy.kernel.mark_mask
    if identity is None:
        steps.append(("mark", "none: the host's other rules and tables decide"))
        answer = loaded.ask(packet, 0) if loaded else None
        steps += [("kernel", str(answer))] if answer else []
        return Explanation(packet, None, tuple(steps), None)
    assert decision.standing  # noqa: S101
    mark = identity.fwmark.value
    found = _Way(wanted, loaded.artefact, packet) if loaded else way
    steps.append(("mark", _written(found, mark, mask, loaded.strange if loaded else ())))
    # Then the kernel may well agree: it is asked about the mark that is wanted.
    astray = loaded is not None and bool(loaded.strange or found.mark & mask != mark)
    answer = loaded.ask(packet, way.asked & mask) if loaded else None
    if way.fate.what == LOCAL:
        steps.append(("rule", "priority 0 from all lookup local: it is for this host"))
        agreed = answer.table == TABLE_LOCAL if answer else None
        return Explanation(packet, identity.name, (*steps, *_verdict(agreed, answer)), agreed and not astray)
    foreign = tuple(_foreign_first(way.attempts, found.attempts))
    rules = [attempt.rule for attempt in way.attempts if attempt.rule.table == identity.table]
    steps += [("rule", words) for words in _rules(rules, loaded, f"{family} is not {identity.name}'s own")]
    steps += [("before it", f"a rule of somebody else's: {words}") for words in foreign]
    route = way.fate.route
    none = f"none in table {identity.table}: falls through to the next rules"
    steps.append(("route", str(route) if route else none))
    steps.append(("link", _leaves(desired, decision.standing, route)))
    steps += [("out", words) for words in way.out(route)]
    agreed = agrees(way.fate, identity.table, answer) if answer else None
    steps += _verdict(agreed, answer)
    if astray:
        steps.append(("remedy", "what is loaded is not what is wanted: idmark plan shows it, idmark apply mends it"))
    elif agreed is False and answer:
        steps.append(("remedy", _remedy(packet, bool(foreign), answer.table == identity.table, identity.table)))
    return Explanation(packet, identity.name, tuple(steps), agreed and not astray)


def _claims_to_be_this_host(wanted: Wanted, packet: Packet) -> bool:
    """Whether the rule of `drop_own_sources` takes it, which is for IPv4 (ruleset.FROM_OUR_OWN)."""
    return wanted.family is Family.IPV4 and packet.arriving not in {None, "lo"} and int(packet.source) in wanted.local


class _Way:
    """One packet's way through an artefact: which rules of chains did something to it, its mark then, the routing rules
    that took it, and what became of it.
    """

    def __init__(self, wanted: Wanted, artefact: Artefact, packet: Packet) -> None:
        self._packet, self._hooks = packet, Hooks(artefact)
        self._given: dict[str, object] = {
            "source": int(packet.source),
            "destination": int(packet.destination),
            "original": None,
            "iif": packet.arriving or LO,
            "mark": 0,
        }
        tables = Tables(wanted.family, artefact, wanted.local, wanted.fleeting)
        if not packet.arriving:
            self._given["oif"] = _link(tables.lookup(Given.of(**self._given), 0))
        arrived = Walker(wanted.family, Given.of(**self._given))
        self._hooks.call("prerouting" if packet.arriving else "output", arrived)
        #: The mark that it has when its route is looked for at last.
        self.asked = mark = arrived.mark.of(0)
        self.fate: Fate = tables.lookup(arrived.given, mark)
        left = {**self._given, "mark": mark, "oif": _link(self.fate)}
        self._left = Walker(wanted.family, Given.of(**left))
        self._passed = self.fate.what != OUT or self._hooks.call("postrouting", self._left)
        # One that is on its own road already gets its mark as it leaves; as all do once more that are translated.
        self.trail: tuple[Step, ...] = tuple(arrived.trail if mark else self._left.trail)
        self.mark = self._left.mark.of(mark)
        # What this host sends is looked up before it has a mark, and again after it got one.
        lookups = (_up_to_fate(tables.attempts(arrived.given, each)) for each in self._marks(mark))
        self.attempts: tuple[Attempt, ...] = tuple(dict.fromkeys(attempt for each in lookups for attempt in each))

    def _marks(self, mark: int) -> tuple[int, ...]:
        return (mark,) if self._packet.arriving else (0, mark)

    def out(self, route: Route | None) -> Iterator[str]:
        """What happens to it as it leaves by the first of a route's hops."""
        if self.fate.what != OUT or route is None:
            return
        source = self._left.source
        translated = [f"as {address_text(self._left.family, source)}"] if isinstance(source, int) else []
        counted = [f"counted by {name}" for name in self._left.counted]
        yield ", ".join(("passes" if self._passed else "DROPPED", *translated, *counted))


def _link(fate: Fate) -> str | None:
    """The link that a packet leaves by; None where no route of ours says it."""
    return fate.route.hops[0].link if fate.what == OUT and fate.route else None


def _up_to_fate(attempts: Iterable[Attempt]) -> Iterator[Attempt]:
    for attempt in attempts:
        yield attempt
        if attempt.fate:
            return


def _written(found: _Way, mark: int, mask: int, strange: tuple[str, ...]) -> str:
    """Which mark it gets, and where."""
    words = f"{mark:#x}/{mask:#x}"
    if strange:
        return f"NOT SO: {words} is wanted, and {strange[0]}"
    if found.mark & mask != mark:
        return f"NOT SO: {words} is wanted, and what is loaded makes it {found.mark:#x}"
    step = next((step for step in reversed(found.trail) if isinstance(step.line.action, SetMark)), None)
    return f"{words}, written in hook {step.hook} by chain {step.chain}" if step else words


def _rules(rules: Iterable[Rule], loaded: Loaded | None, none: str) -> Iterator[str]:
    """The rules that take it; those that are not in the kernel are told."""
    for rule in rules:
        yield str(rule) if not loaded or rule in loaded.artefact.rules else f"NOT THERE: {rule}"
    if not rules:
        yield f"none: {none}"


def _foreign_first(ours: Iterable[Attempt], found: Iterable[Attempt]) -> Iterator[str]:
    """Rules that are not ours, take the packet and come before ours; the local table's (priority 0) always does."""
    first = min((attempt.rule.priority for attempt in ours), default=METRIC_LAST)
    for attempt in found:
        if attempt.foreign and 0 < attempt.rule.priority < first:
            yield str(attempt.rule).rpartition(" protocol ")[0]


def _remedy(packet: Packet, foreign: bool, in_table: bool, table: int) -> str:
    if foreign:
        return "move the rule that comes first behind ours, or ours before it (rule_priority)"
    if in_table:
        return f"another route in table {table} leads there: ip route show table {table}"
    forwarding = "is forwarding on, is its link right, " if packet.arriving else ""
    return f"{forwarding}is everything in force (idmark plan)?"


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


def arrival(desired: Desired, facts: Facts | None, source: Address) -> str | None:
    """The link on which a source must arrive that is not this host's: where its network is, behind this gateway; while
    the host is not known, the first of the policy's downstream links.
    """
    if facts is None:
        own = any(source in standing.addresses for standing in desired.standings)
        return None if own else next(iter(desired.policy.downstream or ()), None)
    if any(source == item.address for link in facts.links for item in link.addresses):
        return None
    family = Family.of(source)
    routes = [route for route in downstream_routes(desired.policy, facts, family) if source in route.destination]
    best = max(routes, key=lambda route: route.destination.length, default=None)
    return best.hops[0].link if best else None


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


def _verdict(agreed: bool | None, answer: Lookup | None) -> list[tuple[str, str]]:
    return [] if answer is None else [("kernel", f"{'agrees' if agreed else 'DISAGREES'}: {answer}")]
