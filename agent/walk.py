"""A packet's way through an artefact: hooks, rules and tables, as the kernel takes it.

What walks is a class of packets (`agent.given`). Where the texts, or whoever compares, tell its members apart, there it
is split, and nowhere else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Generic, NamedTuple, TypeVar

from agent.addresses import Family, Prefix
from agent.artefact import (
    ALL_BITS,
    Artefact,
    Chain,
    CountBy,
    Field,
    Line,
    Match,
    Named,
    SetMark,
    Translate,
    Verdict,
    VerdictBy,
)
from agent.given import Given, Question
from agent.model import GOTO, LOOKUP, NOP, TABLE_MAIN, Hop, Route, Rule

#: linux/netfilter_ipv4.h, enum nf_ip_hook_priorities: where connections are known, where neighbours restore whole marks
#: from them, where destinations are translated, and sources.
CONNTRACK, MANGLE, DSTNAT, SRCNAT = -200, -150, -100, 100
LO = "lo"

Value = TypeVar("Value")
#: What a property is that a packet doesn't have.
NOTHING = frozenset({None})
#: The directions of a connection; they are a property where its destination was translated, to what is `original`.
REPLY, ASKED = "reply", "original"
#: What may happen to the host, and when a walk asks for it: a link is down, an address of an identity's is gone.
DOWN, GONE = "down", "gone"


class Mark(NamedTuple):
    """The packet's mark as it is now: of what it carried at first these bits are left, and those have been written."""

    keep: int = ALL_BITS
    bits: int = 0

    def of(self, carried: int) -> int:
        return carried & self.keep | self.bits

    def written(self, keep: int, bits: int) -> Mark:
        """After `mark & keep | bits`."""
        return Mark(self.keep & keep, self.bits & keep | bits)


#: Nobody has written it yet, or somebody has restored it.
AS_CARRIED = Mark()


@dataclass(slots=True)
class Packet:
    """Packets on their way, and what the kernel or a neighbour has done to them.

    `source` and `destination` are the name of the property that stands there, or an address. `known` is what whoever
    follows has found out of them beforehand, and uses afterwards.
    """

    family: Family
    given: Given
    known: Hashable = None
    mark: Mark = AS_CARRIED
    source: str | int = "source"
    destination: str | int = "destination"
    status: frozenset[str] = frozenset()
    counted: list[str] = field(default_factory=list)
    trail: list[Step] = field(default_factory=list)

    def through(self, place: Hashable, station: Callable[[Packet], str | None]) -> str | None:
        """What a station says of the packet. Whoever is split off behind it finds it as it left from there."""

        def go() -> tuple[Packet, str | None]:
            verdict = station(self)
            return replace(self, counted=[*self.counted], trail=[*self.trail]), verdict

        after, verdict = self.given.once(place, go)
        self.mark, self.source, self.destination, self.status = (
            after.mark,
            after.source,
            after.destination,
            after.status,
        )
        self.counted, self.trail = [*after.counted], [*after.trail]
        return verdict

    @property
    def state(self) -> Hashable:
        """All that the rest of the way may depend on, beside what is given."""
        return (self.known, self.mark, self.source, self.destination, self.status, tuple(self.counted))


def is_reply(given: Given) -> bool:
    """Whether packets answer in a connection whose destination was translated."""
    return not given.within("original", NOTHING) and given.within("direction", frozenset({REPLY}))


class Step(NamedTuple):
    """A rule that did something to a packet."""

    hook: str
    chain: str
    line: Line

    def __str__(self) -> str:
        return f"chain {self.chain}: {self.line.text}"


#: What a neighbour does to packets in a hook, at a priority.
Neighbour = tuple[int, Callable[[Packet], None]]


class _Term(NamedTuple):
    """What a field of a packet is: a function of one of its properties, or (no property) a constant."""

    of: str
    value: Callable[[object], object]


class _Called(NamedTuple):
    """A chain that is being run: in which hook, on the way from where, and whether conntrack has seen the packet."""

    hook: str
    path: tuple[tuple[str, int], ...]
    known: bool


class _Prepared(NamedTuple):
    """A rule of a chain with what it asks of packets: its matches, and what it looks up to act upon. `place`: which."""

    place: int
    line: Line
    matches: tuple[_Query, ...]
    lookup: _Query | None

    @classmethod
    def of(cls, place: int, line: Line, sets: Mapping[str, Named], asked: dict[Hashable, _Query]) -> _Prepared:
        """`asked` is what other rules ask: what is asked by several is one query."""
        action = line.action
        matches = tuple(asked.setdefault(match, _Query.match(match, sets)) for match in line.matches)
        if not isinstance(action, VerdictBy | CountBy):
            return cls(place, line, matches, None)
        return cls(place, line, matches, asked.setdefault(action, _Query.find(action.fields, sets[action.map])))


class Hooks:
    """The chains of an artefact, called as nf_tables calls them."""

    def __init__(self, artefact: Artefact) -> None:
        asked: dict[Hashable, _Query] = {}
        self._lines = {
            name: tuple(
                _Prepared.of(place, line, artefact.sets, asked)
                for place, line in enumerate(chain.lines)
                if line.action is not None
            )
            for name, chain in artefact.chains.items()
        }
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
        for place, (_, station) in enumerate(sorted(stations, key=lambda each: each[0])):
            if packet.through((hook, place), station) == "drop":
                return False
            packet.given.join((hook, place, packet.state))
        return True

    def _base(self, chain: Chain, packet: Packet) -> str | None:
        hook = chain.hook
        assert hook is not None  # noqa: S101
        if hook.kind == "nat" and (packet.status or not packet.given.within("original", NOTHING)):
            return None  # a connection is translated once, by its first packet
        return self._run(chain.name, packet, _Called(hook.hook, (), hook.priority > CONNTRACK)) or hook.policy

    def _run(self, chain: str, packet: Packet, called: _Called) -> str | None:  # noqa: PLR0912 - a branch an action
        """The verdict of a chain and of those that it leads to; None: it came to its end."""
        for place, line, matches, lookup in self._lines[chain]:
            if not packet.given.all_of(query.of(packet, called.known) for query in matches):
                continue
            if line.counter:
                packet.counted.append(line.counter)
            match line.action:
                case Verdict("accept" | "drop" as word):
                    packet.trail.append(Step(called.hook, chain, line))
                    return word
                case Verdict("jump", target):
                    inside = called._replace(path=(*called.path, (chain, place)))
                    verdict = self._run(target, packet, inside)
                    if verdict:
                        return verdict
                    packet.given.join((inside, packet.state))
                case Verdict("goto", target):
                    return self._run(target, packet, called)
                case VerdictBy() if lookup:
                    found = packet.given.ask(lookup.of(packet, called.known))
                    if found is not None:
                        packet.trail.append(Step(called.hook, chain, line))
                        return self._run(found.removeprefix("goto "), packet, called)
                case SetMark(keep, bits):
                    packet.trail.append(Step(called.hook, chain, line))
                    packet.mark = packet.mark.written(keep, bits)
                case CountBy() if lookup:
                    found = packet.given.ask(lookup.of(packet, called.known))
                    if found is not None:
                        packet.counted.append(found)
                case Translate(family, address) if family is packet.family:
                    packet.trail.append(Step(called.hook, chain, line))
                    packet.source = address
                    packet.status |= {"snat"}
                    return "accept"
        return None


class _Query:
    """What a match or a map asks of a packet's fields, and the questions that this has come to."""

    def __init__(self, fields: tuple[Field, ...], named: Named | None, say: Callable[[Any], Any], without: Any) -> None:
        self._fields, self._named, self._say, self._without = fields, named, say, without
        self._questions: dict[tuple[_Term, ...], Question] = {}

    @classmethod
    def match(cls, match: Match, sets: Mapping[str, Named]) -> _Query:
        """Whether a match holds."""
        if match.among:
            return cls(match.fields, sets[match.among], lambda found: (found is None) is match.negated, False)

        def compare(value: object) -> bool:
            if isinstance(value, frozenset):
                return bool(value & match.values) is not match.negated
            return (value in match.values) is not match.negated

        return cls(match.fields, None, compare, False)

    @classmethod
    def find(cls, fields: tuple[Field, ...], named: Named) -> _Query:
        """The value that a map has for fields; None: none."""
        return cls(fields, named, lambda found: found, None)

    def of(self, packet: Packet, known: bool) -> Question:
        """The question for a packet."""
        terms = tuple([_term(each, packet, known) for each in self._fields])
        if terms not in self._questions:
            self._questions[terms] = self._question(terms)
        return self._questions[terms]

    def _question(self, terms: tuple[_Term, ...]) -> Question:
        names = tuple(dict.fromkeys([term.of for term in terms if term.of]))
        if self._named and len(names) == len(terms) == 2:
            return Question(names, partial(self._beside, terms[1]), partial(self._others, terms[0]), {})
        find = self._named.find if self._named else None
        if len(terms) == 1:
            value, say, without = terms[0].value, self._say, self._without

            def alone(given: object = None) -> Any:
                part = value(given)
                return without if part is None else say(find((part,)) if find else part)

            return Question(names, alone, known={})
        places = [names.index(term.of) if term.of else -1 for term in terms]

        def beside(*values: object) -> Any:
            parts = tuple([term.value(values[at] if at >= 0 else None) for term, at in zip(terms, places, strict=True)])
            return self._without if None in parts or find is None else self._say(find(parts))

        return Question(names, beside, known={})

    def _others(self, first: _Term, value: object) -> frozenset[tuple[object, str]] | None:
        part = first.value(value)
        return None if part is None or self._named is None else self._named.beside(part)

    def _beside(self, second: _Term, others: frozenset[tuple[object, str]] | None, value: object) -> Any:
        part = second.value(value)
        return self._without if others is None or part is None else self._say(dict(others).get(part))


@lru_cache(maxsize=1 << 12)
def _constant(value: object) -> _Term:
    return _Term("", lambda _: value)


def _itself(value: object) -> object:
    return value


def _term(wanted: Field, packet: Packet, known: bool) -> _Term:
    """A field; None where the packet has none: it is of the other family, or conntrack doesn't know it."""
    match wanted.name:
        case "mark":
            return _mark(packet.mark, wanted.mask)
        case "nfproto":
            return _constant(packet.family)
        case "iifname" | "oifname":
            # In a hook that has no such link its name is empty (net/netfilter/nft_meta.c, nft_meta_store_ifname).
            link = wanted.name.removesuffix("name")
            return _Term(link, _itself) if packet.given.has(link) else _constant("")
        case "syn":
            return _constant(False)  # only a segment's size depends on it
        case "status" | "direction" | "original" if not known:
            return _constant(None)
        case "status":
            translated = not packet.given.within("original", NOTHING)
            return _constant(packet.status | {"dnat"} if translated else packet.status)
        case "direction":
            return _constant(REPLY if is_reply(packet.given) else ASKED)
    if wanted.family is not packet.family:
        return _constant(None)
    place = {"saddr": packet.source, "daddr": packet.destination}.get(wanted.name, wanted.name)
    if isinstance(place, int):
        return _constant(place & wanted.mask)
    return _Term(place, _itself if wanted.mask == -1 else _masked(wanted.mask))


@lru_cache(maxsize=1 << 12)
def _masked(mask: int) -> Callable[[object], object]:
    return lambda address: address & mask if isinstance(address, int) else address


@lru_cache(maxsize=1 << 12)
def _mark(mark: Mark, mask: int) -> _Term:
    mask &= ALL_BITS
    if not mark.keep & mask:
        return _constant(mark.bits & mask)

    def value(carried: object) -> int:
        assert isinstance(carried, int)  # noqa: S101
        return mark.of(carried) & mask

    return _Term("mark", value)


# --- rules and tables ------------------------------------------------------------------------------------------------

#: What becomes of a packet at a route lookup.
LOCAL, OUT, REFUSED, MAIN = "for this host", "out", "refused", "left to the host's other rules"


class Fate(NamedTuple):
    """What becomes of a packet at a route lookup, by which hops it leaves, and by whose word: the rule that decides,
    and the route of its table.
    """

    what: str
    hops: frozenset[tuple[str, object]] = frozenset()
    rule: Rule | None = None
    route: Route | None = None
    foreign: bool = False

    def __str__(self) -> str:
        ways = ", ".join(f"{f'via {via} ' if via else ''}dev {link}" for link, via in sorted(self.hops, key=str))
        return ways or self.what

    @property
    def by(self) -> str:
        if self.what == LOCAL:
            return "rule priority 0 from all lookup local"
        if self.rule is None:
            return "no rule of ours and none of its tables has a route"
        rule = str(self.rule).rpartition(" protocol ")[0] if self.foreign or self.what == MAIN else str(self.rule)
        whose = "somebody's " if self.foreign else ""
        route = "" if self.route is None else f", route {self.route.words if self.foreign else self.route}"
        return f"{whose}rule {rule}{route}"


class Attempt(NamedTuple):
    """A rule that takes a packet, whether it is somebody else's, and what becomes of the packet by it (None: nothing,
    it is the next rule's turn).
    """

    rule: Rule
    foreign: bool
    fate: Fate | None


class Networks(Generic[Value]):
    """Networks and what is known of each; those of the longest prefixes first."""

    def __init__(self, items: Iterable[tuple[Prefix, Value]]) -> None:
        self._of: dict[Prefix, list[Value]] = {}
        for prefix, value in items:
            self._of.setdefault(prefix, []).append(value)
        self.prefixes = tuple(sorted(self._of, key=lambda prefix: (-prefix.length, prefix.address)))
        self._lengths = tuple(dict.fromkeys(prefix.length for prefix in self.prefixes))
        self._around: dict[Prefix, tuple[tuple[Prefix, Value], ...]] = {}

    def holding(self, name: str, given: Given) -> tuple[tuple[Prefix, Value], ...]:
        """The networks that hold an address, the smallest first, each with all that is known of it."""
        place = given.first(name, self.prefixes)
        if place is None:
            return ()
        inner = self.prefixes[place]
        if inner not in self._around:
            bits = inner.family.bits
            outer = (
                Prefix(inner.family, inner.address >> bits - length << bits - length, length)
                for length in self._lengths
                if length <= inner.length
            )
            self._around[inner] = tuple((prefix, value) for prefix in outer for value in self._of.get(prefix, ()))
        return self._around[inner]


def is_here(given: Given, local: frozenset[int], fleeting: frozenset[int]) -> bool:
    """Whether the destination is an address that this host has now, of those that it has, and those that may go."""
    if not given.within("destination", local):
        return False
    return not (given.within("destination", fleeting) and given.suppose(GONE, "the destination"))


class _Rules:
    """The rules of a family in their order, found by mark and source without trying one after the other."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.all = tuple(rules)
        self._marked: dict[int, dict[int, list[int]]] = {}
        self._others: list[int] = []
        self._sourced: list[int] = []
        for place, rule in enumerate(self.all):
            if rule.source:
                self._sourced.append(place)
            elif rule.fwmark:
                self._marked.setdefault(rule.fwmark.mask, {}).setdefault(rule.fwmark.value, []).append(place)
            else:
                self._others.append(place)
        #: The bits of a mark that any rule looks at.
        self.bits = 0
        for rule in self.all:
            self.bits |= rule.unmarked | (rule.fwmark.mask if rule.fwmark else 0)
        self._known: dict[tuple[int, int], tuple[int, tuple[int, ...], tuple[Prefix, ...]]] = {}

    def first(self, at: int, mark: int, given: Given) -> int | None:
        """The first rule from a place on that takes a packet."""
        while at < len(self.all):
            place, sourced, sources = self._before(at, mark)
            if sourced:
                found = given.first("source", sources)
                if found is not None:
                    place = sourced[found]
            if place == len(self.all):
                return None
            iif = self.all[place].iif
            if not iif or given.within("iif", frozenset({iif})):
                return place
            at = place + 1
        return None

    def _before(self, at: int, mark: int) -> tuple[int, tuple[int, ...], tuple[Prefix, ...]]:
        """The first rule from a place on that takes the mark from any source, and those before it that look at the
        source, with their sources.
        """
        key = (at, mark)
        if key not in self._known:
            lists = (values.get(mark & mask, ()) for mask, values in self._marked.items())
            plain = (place for places in lists for place in places[bisect_left(places, at) :])
            others = (place for place in self._others if place >= at and not mark & self.all[place].unmarked)
            end = min((*plain, *others), default=len(self.all))
            sourced = tuple(
                place
                for place in self._sourced[bisect_left(self._sourced, at) : bisect_left(self._sourced, end)]
                if _takes_mark(self.all[place], mark)
            )
            sources = (source for place in sourced if (source := self.all[place].source))
            self._known[key] = (end, sourced, tuple(sources))
        return self._known[key]

    def target(self, rule: Rule, at: int) -> int:
        """Where a goto leads. A target that isn't there: the rule is as if it weren't either (net/core/fib_rules.c,
        unresolved).
        """
        return next((place for place in range(at, len(self.all)) if self.all[place].priority == rule.target), at)


class Tables:
    """The rules and tables of an artefact on a host that has these addresses of its own; some of them may go."""

    def __init__(
        self, family: Family, artefact: Artefact, local: Iterable[int] = (), fleeting: Iterable[int] = ()
    ) -> None:
        self._local, self._fleeting = frozenset(local), frozenset(fleeting)
        self._rules = _Rules(rule for rule in artefact.rules if rule.family is family)
        self._foreign = artefact.foreign
        tables: dict[int, list[tuple[Prefix, Route]]] = {}
        for route in sorted(artefact.routes, key=lambda each: each.metric):
            if route.family is family:
                tables.setdefault(route.table, []).append((route.destination, route))
        self._tables = {number: Networks(routes) for number, routes in tables.items()}

    @property
    def bits(self) -> int:
        """The bits of a mark that any rule looks at."""
        return self._rules.bits

    def lookup(self, given: Given, mark: int) -> Fate:
        """The first rule that takes the packet and whose table has a route for it, decides. `iif` is "lo" for what
        this host sends itself.
        """
        if is_here(given, self._local, self._fleeting):
            return Fate(LOCAL)
        return next((attempt.fate for attempt in self.attempts(given, mark) if attempt.fate), Fate(MAIN))

    def attempts(self, given: Given, mark: int) -> Iterator[Attempt]:
        """The rules that take the packet, up to the one that decides."""
        at = 0
        while (place := self._rules.first(at, mark, given)) is not None:
            rule, at = self._rules.all[place], place + 1
            foreign = rule in self._foreign
            if rule.action == GOTO:
                at = self._rules.target(rule, at)
            yield Attempt(rule, foreign, self._fate(rule, foreign, given))

    def _fate(self, rule: Rule, foreign: bool, given: Given) -> Fate | None:
        """What becomes of a packet that a rule takes; None: the next rules decide."""
        if rule.action in (GOTO, NOP):
            return None
        if rule.action != LOOKUP:
            return Fate(MAIN if foreign else REFUSED, rule=rule, foreign=foreign)
        if rule.table == TABLE_MAIN:
            return Fate(MAIN, rule=rule)
        found = self._best(rule.table, given)
        if found is None:
            return None
        route, hops = found
        if foreign:
            return Fate(MAIN, rule=rule, route=route, foreign=True)
        what = OUT if route.kind == "unicast" else REFUSED
        return Fate(what, frozenset((hop.link, hop.via) for hop in hops), rule, route)

    def _best(self, table: int, given: Given) -> tuple[Route, tuple[Hop, ...]] | None:
        """The longest prefix's route with the smallest metric that is still there, with the hops that are."""
        for _, route in self._tables[table].holding("destination", given) if table in self._tables else ():
            hops = self._alive(route, given)
            if hops is not None:
                return route, hops
        return None

    def _alive(self, route: Route, given: Given) -> tuple[Hop, ...] | None:
        """The hops that a route still has; None: it went, with its links or (IPv4: net/ipv4/fib_semantics.c,
        fib_sync_down_addr) with the address that it names.
        """
        if route.kind != "unicast":
            return ()
        named = route.family is Family.IPV4 and route.source and int(route.source) in self._fleeting
        if named and given.suppose(GONE, str(route.source)):
            return None
        return tuple(hop for hop in route.hops if not given.suppose(DOWN, hop.link)) or None


def _takes_mark(rule: Rule, mark: int) -> bool:
    if rule.fwmark and mark & rule.fwmark.mask != rule.fwmark.value:
        return False
    return not mark & rule.unmarked


def hops_of(route: Route) -> frozenset[tuple[str, object]]:
    """A route's hops as `Fate` has them."""
    return frozenset((hop.link, hop.via) for hop in route.hops)
