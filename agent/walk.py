"""A packet's way through an artefact: hooks, rules and tables, as the kernel takes it.

A packet's properties are asked for as they are needed, and one that is not settled yet stops the walk (`Unsettled`): so
whoever follows all packets needs to tell apart only those that the texts tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from agent.artefact import Artefact, Chain, CountBy, Field, Line, Match, SetMark, Translate, Verdict, VerdictBy
from agent.model import GOTO, LOOKUP, NOP, TABLE_MAIN, Family, Hop, Route, Rule

#: linux/netfilter_ipv4.h, enum nf_ip_hook_priorities: where connections are known, where neighbours restore whole marks
#: from them, where destinations are translated, and sources.
CONNTRACK, MANGLE, DSTNAT, SRCNAT = -200, -150, -100, 100
LO = "lo"

Found = TypeVar("Found")


class Unsettled(Exception):  # noqa: N818 - no error: the walk goes on when the property has a value
    """The walk depends on a property of the packet that has no value yet."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Given(dict[str, object]):
    """The properties of a packet that are settled: `source`, `destination`, `original` (addresses as integers; None:
    no translated connection's reply), `iif`, `oif`, `mark`.
    """

    def __missing__(self, name: str) -> object:
        raise Unsettled(name)


@dataclass(slots=True)
class Packet:
    """A packet on its way. What the kernel or a neighbour changes is put over what was given."""

    family: Family
    given: Given
    mark: int = 0
    source: int | None = None
    destination: int | None = None
    status: set[str] = field(default_factory=set)
    counted: list[str] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)

    def address(self, name: str) -> object:
        """The source as it is now, the destination, the destination that the connection was made to."""
        if name == "saddr":
            return self.given["source"] if self.source is None else self.source
        if name == "daddr":
            return self.given["destination"] if self.destination is None else self.destination
        return self.given[name]


#: What a neighbour does to packets in a hook, at a priority.
Neighbour = tuple[int, Callable[[Packet], None]]


class Hooks:
    """The chains of an artefact, called as nf_tables calls them."""

    def __init__(self, artefact: Artefact) -> None:
        self._chains, self._sets = artefact.chains, artefact.sets
        self._based: dict[str, list[Chain]] = {}
        for chain in artefact.chains.values():
            if chain.hook:
                self._based.setdefault(chain.hook.hook, []).append(chain)

    def kinds(self, hook: str) -> set[str]:
        """The types of the chains in a hook."""
        return {chain.hook.kind for chain in self._based.get(hook, ()) if chain.hook}

    def call(self, hook: str, packet: Packet, neighbours: Iterable[Neighbour] = ()) -> bool:
        """Whether the packet passes. At one priority a neighbour comes when it is worst: before a translation's
        deciding, after a mark was written.
        """
        stations: list[tuple[float, Callable[[Packet], str | None]]] = [
            (priority + (0.5 if priority == MANGLE else -0.5), lambda packet, act=act: act(packet))  # type: ignore[misc]
            for priority, act in neighbours
        ]
        stations += [
            (chain.hook.priority, lambda packet, chain=chain: self._base(chain, packet))  # type: ignore[misc]
            for chain in self._based.get(hook, ())
            if chain.hook
        ]
        return all(station(packet) != "drop" for _, station in sorted(stations, key=lambda each: each[0]))

    def _base(self, chain: Chain, packet: Packet) -> str | None:
        hook = chain.hook
        assert hook is not None  # noqa: S101
        if hook.kind == "nat" and packet.status:
            return None  # a connection is translated once, by its first packet
        verdict = self._run(chain, packet, known=hook.priority > CONNTRACK)
        return verdict or hook.policy

    def _run(self, chain: Chain, packet: Packet, known: bool) -> str | None:
        """The verdict of a chain and of those that it leads to; None: it came to its end. `known`: conntrack has seen
        the packet.
        """
        for line in chain.lines:
            if line.action is None or not all(self._holds(match, packet, known) for match in line.matches):
                continue
            match line.action:
                case Verdict("accept" | "drop" as word):
                    self._note(chain, line, packet)
                    return word
                case Verdict("jump", target):
                    verdict = self._run(self._chains[target], packet, known)
                    if verdict:
                        return verdict
                case Verdict("goto", target):
                    return self._run(self._chains[target], packet, known)
                case VerdictBy(by, name):
                    found = self._sets[name].find(self._key((by,), packet, known))
                    if found is not None:
                        self._note(chain, line, packet)
                        return self._run(self._chains[found.removeprefix("goto ")], packet, known)
                case SetMark(keep, bits):
                    self._note(chain, line, packet)
                    packet.mark = packet.mark & keep | bits
                case CountBy(fields, name):
                    found = self._sets[name].find(self._key(fields, packet, known))
                    if found is not None:
                        packet.counted.append(found)
                case Translate(family, address) if family is packet.family:
                    self._note(chain, line, packet)
                    packet.source = address
                    packet.status.add("snat")
                    return "accept"
        return None

    def _note(self, chain: Chain, line: Line, packet: Packet) -> None:
        packet.trail.append(f"chain {chain.name}: {line.text}")

    def _holds(self, match: Match, packet: Packet, known: bool) -> bool:
        key = self._key(match.fields, packet, known)
        if None in key:
            return False
        if match.among:
            return (self._sets[match.among].find(key) is not None) is not match.negated
        (value,) = key
        if isinstance(value, frozenset):
            return bool(value & match.values) is not match.negated
        return (value in match.values) is not match.negated

    def _key(self, fields: Iterable[Field], packet: Packet, known: bool) -> tuple[object, ...]:
        return tuple(self._value(each, packet, known) for each in fields)

    @staticmethod
    def _value(wanted: Field, packet: Packet, known: bool) -> object:
        """A field's value; None where the packet has none: it is of the other family, or conntrack doesn't know it."""
        match wanted.name:
            case "mark":
                return packet.mark & wanted.mask
            case "nfproto":
                return packet.family
            case "iifname" | "oifname":
                return packet.given["iif" if wanted.name == "iifname" else "oif"]
            case "syn":
                return False  # only a segment's size depends on it
            case "status":
                if not known:
                    return None
                return frozenset((*packet.status, *(("dnat",) if packet.given["original"] is not None else ())))
            case "direction":
                if not known:
                    return None
                return "reply" if packet.given["original"] is not None else "original"
        if wanted.family is not packet.family or (wanted.name == "original" and not known):
            return None
        return packet.address(wanted.name)


# --- rules and tables ------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What has happened to the host: links that are down, own addresses that are gone."""

    down: frozenset[str] = frozenset()
    missing: frozenset[int] = frozenset()
    words: str = ""


#: What becomes of a packet at a route lookup.
LOCAL, OUT, REFUSED, MAIN = "for this host", "out", "refused", "left to the host's other rules"


class Fate(NamedTuple):
    """What becomes of a packet at a route lookup, by which hops it leaves, and by whose word."""

    what: str
    hops: frozenset[tuple[str, object]] = frozenset()
    by: str = ""

    def __str__(self) -> str:
        ways = ", ".join(f"{f'via {via} ' if via else ''}dev {link}" for link, via in sorted(self.hops, key=str))
        return ways or self.what


class Tables:
    """The rules and tables of an artefact on a host that has these addresses of its own."""

    def __init__(self, artefact: Artefact, local: Iterable[tuple[Family, int]] = ()) -> None:
        self._local = frozenset(local)
        self._rules = {family: tuple(rule for rule in artefact.rules if rule.family is family) for family in Family}
        self._foreign = artefact.foreign
        self._routes: dict[tuple[int, Family], dict[int, dict[int, list[Route]]]] = {}
        for route in sorted(artefact.routes, key=lambda each: each.metric):
            by_length = self._routes.setdefault((route.table, route.family), {})
            by_length.setdefault(route.destination.length, {}).setdefault(route.destination.address, []).append(route)
        self._known: dict[tuple[int, Family, int, State], tuple[Route, tuple[Hop, ...]] | None] = {}

    def lookup(self, family: Family, given: Mapping[str, object], mark: int) -> Fate:
        """The first rule that takes the packet and whose table has a route for it, decides. `iif` is "lo" for what
        this host sends itself, `state` a State.
        """
        destination, state = given["destination"], given["state"]
        assert isinstance(destination, int)  # noqa: S101
        assert isinstance(state, State)  # noqa: S101
        if (family, destination) in self._local and destination not in state.missing:
            return Fate(LOCAL, by="rule priority 0 from all lookup local")
        rules, at = self._rules[family], 0
        while at < len(rules):
            rule = rules[at]
            at += 1
            if not _takes(rule, given, mark):
                continue
            if rule.action == GOTO:
                # A target that isn't there: the rule is as if it weren't either (net/core/fib_rules.c, unresolved).
                at = next((i for i in range(at, len(rules)) if rules[i].priority == rule.target), at)
            elif rule.action == LOOKUP and rule.table == TABLE_MAIN:
                return Fate(MAIN, by=f"rule {_words(rule)}")
            elif rule.action == LOOKUP:
                found = self._best(rule.table, family, destination, state)
                if found and rule in self._foreign:
                    return Fate(MAIN, by=f"somebody's rule {_words(rule)}, route {found[0].words}")
                if found:
                    route, hops = found
                    what = OUT if route.kind == "unicast" else REFUSED
                    return Fate(what, frozenset((hop.link, hop.via) for hop in hops), f"rule {rule}, route {route}")
            elif rule.action != NOP and rule in self._foreign:
                return Fate(MAIN, by=f"somebody's rule {_words(rule)}")
            elif rule.action != NOP:
                return Fate(REFUSED, by=f"rule {rule}")
        return Fate(MAIN, by="no rule of ours and none of its tables has a route")

    def _best(self, table: int, family: Family, destination: int, state: State) -> tuple[Route, tuple[Hop, ...]] | None:
        """The longest prefix's route with the smallest metric that is still there, with the hops that are."""
        key = (table, family, destination, state)
        if key not in self._known:
            by_length = self._routes.get((table, family), {})
            candidates = (
                (route, hops)
                for length in sorted(by_length, reverse=True)
                for route in by_length[length].get(destination >> family.bits - length << family.bits - length, ())
                for hops in [_alive(route, state)]
                if hops is not None
            )
            self._known[key] = next(candidates, None)
        return self._known[key]


def _words(rule: Rule) -> str:
    """A rule without whose it is."""
    return str(rule).rpartition(" protocol ")[0]


def _alive(route: Route, state: State) -> tuple[Hop, ...] | None:
    """The hops that a route still has; None: it went, with its links or (IPv4: net/ipv4/fib_semantics.c,
    fib_sync_down_addr) with the address that it names.
    """
    if route.kind != "unicast":
        return ()
    if route.family is Family.IPV4 and route.source and int(route.source) in state.missing:
        return None
    return tuple(hop for hop in route.hops if hop.link not in state.down) or None


def _takes(rule: Rule, given: Mapping[str, object], mark: int) -> bool:
    if rule.fwmark and mark & rule.fwmark.mask != rule.fwmark.value:
        return False
    if mark & rule.unmarked:
        return False
    if rule.iif and given["iif"] != rule.iif:
        return False
    if rule.source:
        source = given["source"]
        assert isinstance(source, int)  # noqa: S101
        return rule.source.address <= source <= rule.source.last
    return True


def follow(run: Callable[[Given], Found], choices: Mapping[str, Iterable[object]]) -> Iterator[tuple[Given, Found]]:
    """Every way that `run` can take, with the properties that it depended on; each may have any of its choices."""
    waiting = [Given()]
    while waiting:
        given = waiting.pop()
        try:
            found = run(given)
        except Unsettled as needed:
            # The first choice first: of what goes wrong the plainest packet is told.
            waiting += [Given({**given, needed.name: choice}) for choice in choices[needed.name]][::-1]
        else:
            yield given, found
