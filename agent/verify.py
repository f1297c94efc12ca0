"""The proof of an artefact: for every class of packets, that they go where the policy wants them, or nowhere.

What the policy wants is said here once more, from the policy and the host alone: nothing of what renders is used. Each
defence is proved by itself, for they hide each other's faults: the marks, the routes behind them, the lookup before a
mark, what happens to members while there is no ruleset, and what is let out at the end whatever the routes are. The
host's other rules and tables are nobody's word: what is left to them may go anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from agent import walk
from agent.artefact import ALL_BITS, Artefact
from agent.cut import Kind, cut
from agent.desired import GUARDED, PRIORITY_MAIN, Desired, detours, downstream_routes, priority_behind, sources_of
from agent.model import Facts, Family, Identity, Prefix, Route, address_text
from agent.prefixes import outermost
from agent.ruleset import counter_name
from agent.walk import DSTNAT, LOCAL, MAIN, MANGLE, OUT, REFUSED, SRCNAT, Fate, Given, Packet, State, follow

#: So many packets that go wrong are printed for a person.
SHOWN = 10
#: A link that no policy can name (it is too long for one): one of those that nobody has thought of.
ELSEWHERE = "some-other-link-"
#: A mark's bits that are somebody else's, or an identity's, in words of what a packet may carry.
NOTHING, EVERYTHING, OWN = "nothing", "everything", "the mark of the link's identity"


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A packet that goes wrong: itself, in which state of the host, what the policy wants of it, what happens, why."""

    packet: str
    wanted: str
    found: str
    trail: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        steps = (f"  by         {step}" for step in self.trail)
        return (self.packet, f"  wanted     {self.wanted}", f"  found      {self.found}", *steps)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown: classes of addresses by family, ways of packets that were followed, and where it failed.

    `limits` are what the policy itself leaves open, in words.
    """

    classes: Mapping[Family, int]
    ways: int
    counterexamples: tuple[Counterexample, ...]
    limits: tuple[str, ...] = ()


def prove(desired: Desired, facts: Facts | None, artefact: Artefact) -> Proof:
    """Follow every class of packets through an artefact, and compare with what the policy wants."""
    wrong: dict[tuple[str, ...], Counterexample] = {}
    ways = 0
    classes = {}
    limits: list[str] = []
    for family in Family:
        world = World(family, desired, facts or Facts(), artefact)
        classes[family] = sum(len(kind.firsts) for kind in world.kinds)
        limits += world.limits()
        for claim in (_arriving, _sent, _routed, _bare, _leaving):
            for verdict in claim(world):
                ways += 1
                if verdict:
                    # One packet for each way to go wrong.
                    wrong.setdefault((family, claim.__name__, verdict.wanted, verdict.found), verdict)
    return Proof(classes, ways, tuple(wrong.values()), tuple(limits))


def report(proof: Proof) -> dict[str, object]:
    """A proof for a program."""
    return {
        "proved": not proof.counterexamples,
        "classes": {family.value: count for family, count in proof.classes.items()},
        "ways": proof.ways,
        "counterexamples": [
            {"packet": each.packet, "wanted": each.wanted, "found": each.found, "by": list(each.trail)}
            for each in proof.counterexamples
        ],
        "limits": list(proof.limits),
    }


def text(proof: Proof) -> Iterator[str]:
    """A proof for a person: the packets that go wrong, and what was shown."""
    for each in proof.counterexamples[:SHOWN]:
        yield from each.lines
    if len(proof.counterexamples) > SHOWN:
        yield f"... and {len(proof.counterexamples) - SHOWN} more (--json has them all)"
    for limit in proof.limits:
        yield f"note: {limit}"
    classes = " and ".join(f"{count} {family}" for family, count in proof.classes.items())
    word = "REFUTED" if proof.counterexamples else "proved"
    yield f"{word}: {classes} classes of addresses, every address in exactly one; {proof.ways} ways of packets followed"


class _Road(NamedTuple):
    """A network that the host knows, and by which hops; those of an identity's own link or behind this gateway."""

    prefix: Prefix
    hops: frozenset[tuple[str, object]]


class World:
    """One family of a policy, the host, and the artefact: what is wanted, and the packets there are."""

    def __init__(self, family: Family, desired: Desired, facts: Facts, artefact: Artefact) -> None:
        self.family, self.desired, self.policy = family, desired, desired.policy
        self.hooks = walk.Hooks(artefact)
        self.standings = {standing.identity.name: standing for standing in desired.standings}
        self.identities = tuple(standing.identity for standing in desired.standings)
        self.mask = self.policy.kernel.mark_mask
        self.foreign = ALL_BITS & ~self.mask
        self.marks = {identity.fwmark.value: identity for identity in self.identities}
        self.links = frozenset(identity.link for identity in self.identities)
        self.own = {
            int(address): standing.identity.name for standing in desired.standings for address in standing.own(family)
        }
        there = {
            int(item.address) for link in facts.links for item in link.addresses if Family.of(item.address) is family
        }
        self.local = frozenset({*there, *self.own} if not facts.links else there)
        self.tables = walk.Tables(artefact, ((family, address) for address in self.local))
        self.behind = tuple(map(_road, downstream_routes(self.policy, facts, family)))
        self.connected = {link: tuple(_connected(facts, link, family)) for link in self.links}
        members = {p for identity in self.identities for p in identity.members if p.family is family}
        guarded = tuple(islice(outermost(members), GUARDED + 1))
        self.members = len(guarded)
        last = priority_behind(self.identities) + 3
        self.guarded = self.policy.kernel.enforce and 0 < self.members <= GUARDED and last < PRIORITY_MAIN
        self.kinds = self._cut(artefact)
        self.kind_of = {kind.example: kind for kind in self.kinds}
        self.behind_links = (
            frozenset(self.policy.downstream)
            if self.policy.downstream is not None
            else frozenset(link.name for link in facts.links) - self.links - {walk.LO}
        )

    def _cut(self, artefact: Artefact) -> tuple[Kind, ...]:
        labels: dict[Prefix, list[object]] = {}
        for rule in artefact.rules:
            if rule.source and rule.family is self.family:
                labels.setdefault(rule.source, []).append(("rule", str(rule)))
        for route in artefact.routes:
            if route.family is self.family and route.destination.length:
                said = ("route", route.table, route.metric, route.kind, route.hops, route.source)
                labels.setdefault(route.destination, []).append(said)
        for road in (*self.behind, *(road for roads in self.connected.values() for road in roads)):
            labels.setdefault(road.prefix, []).append(("road", road.hops))
        for standing in self.desired.standings:
            probe = standing.identity.probe
            if probe and Family.of(probe.target) is self.family:
                labels.setdefault(Prefix.host(probe.target), []).append(("probe", standing.identity.name))
        for address in (*self.local, *self.own):
            host = Prefix(self.family, address, self.family.bits)
            labels.setdefault(host, []).append(("here", address in self.local, self.own.get(address)))
        for value in _compared(artefact, self.family):
            labels.setdefault(Prefix(self.family, value, self.family.bits), []).append(("word", value))
        spans = [
            span for found in artefact.sets.values() if found.keys == (f"{self.family}_addr",) for span in found.spans
        ]
        return cut(
            self.family,
            sources_of(self.desired.standings),
            spans,
            {prefix: tuple(sorted(map(repr, dict.fromkeys(said)))) for prefix, said in labels.items()},
        )

    # --- the packets there are ---

    def examples(self, *said: str, owned: bool = True) -> tuple[int, ...]:
        """An address of each kind, as far as the kinds differ in owner and verdict and in what is said of them."""
        starts = tuple(f"('{word}'" for word in said)
        chosen: dict[object, int] = {}
        for kind in self.kinds:
            seen = tuple(
                relevant
                for label in kind.labels
                if isinstance(label, tuple) and (relevant := tuple(each for each in label if each.startswith(starts)))
            )
            chosen.setdefault((seen, (kind.owner, kind.verdict) if owned else None), kind.example)
        return tuple(chosen.values())

    def owner(self, address: object) -> Identity | None:
        """Whose an address is, by the longest prefix of the policy."""
        assert isinstance(address, int)  # noqa: S101
        name = self.kind_of[address].owner
        return self.standings[name].identity if name else None

    @property
    def nobodys(self) -> int | None:
        """An address of nobody's."""
        return next((kind.example for kind in self.kinds if kind.owner is None and kind.verdict is None), None)

    def states(self) -> tuple[State, ...]:
        """What may happen to the host: each link of the tables down, all of the identities', an identity's addresses
        gone.
        """
        links = {hop for roads in self.connected.values() for road in roads for hop, _ in road.hops} | self.links
        links |= {link for road in self.behind for link, _ in road.hops}
        down = [State(frozenset({link}), words=f"while {link} is down") for link in sorted(links)]
        missing = [
            State(
                missing=frozenset(map(int, s.own(self.family))), words=f"while {s.identity.name}'s addresses are gone"
            )
            for s in self.desired.standings
            if s.own(self.family)
        ]
        return (State(), *down, State(self.links, words="while every identity's link is down"), *missing)

    # --- what is wanted ---

    def host(self, given: Given) -> Fate:
        """What is wanted of a packet that is nobody's."""
        destination, state = given["destination"], _state(given)
        return Fate(LOCAL if destination in self.local and destination not in state.missing else MAIN)

    def way(self, identity: Identity, given: Given) -> tuple[Fate, ...]:
        """What the policy wants of an identity's packet: one thing, or, while addresses are gone, one of some."""
        if self.host(given).what == LOCAL:
            return (Fate(LOCAL),)
        destination, state = _number(given["destination"]), _state(given)
        way = self.standings[identity.name].way(self.family)
        if way is None:
            return (Fate(MAIN),)  # the family is not its own: nothing of ours says anything of it
        networks = [*self.connected[identity.link], *self.behind]
        probing = frozenset((hop.link, hop.via) for hop in way.probing)
        if identity.probe and probing and int(identity.probe.target) == destination:
            networks.insert(0, _Road(Prefix.host(identity.probe.target), probing))
        fitting = [
            (road.prefix.length, road.hops)
            for road in networks
            if road.prefix.address <= destination <= road.prefix.last
        ]
        found = [hops for length, road in fitting if (hops := _up(road, state))]
        if found and not state.missing:
            longest = max(length for length, road in fitting if _up(road, state))
            return tuple(
                Fate(OUT, hops) for length, road in fitting if length == longest and (hops := _up(road, state))
            )
        others, main_last = detours(self.policy, identity)
        roads = [hops for each in (identity, *others) if (hops := self._default(each, state))]
        closed = Fate(MAIN if main_last else REFUSED)
        if state.missing:
            return (*(Fate(OUT, hops) for hops in (*found, *roads)), closed)
        return (Fate(OUT, roads[0]),) if roads else (closed,)

    def _default(self, identity: Identity, state: State) -> frozenset[tuple[str, object]]:
        way = self.standings[identity.name].way(self.family)
        return _up(frozenset((hop.link, hop.via) for hop in way.hops), state) if way else frozenset()

    def limits(self) -> Iterator[str]:
        """What the policy leaves open by itself."""
        if self.members and not self.guarded:
            why = "enforce = false" if not self.policy.kernel.enforce else f"more than {GUARDED} prefixes"
            yield f"{self.family} members follow main while the ruleset is not loaded: {why}"

    # --- words ---

    def words(self, given: Given, mark: int = 0) -> str:
        """A packet as an operator would describe it."""
        source, destination = (
            address_text(self.family, value) if isinstance(value := given.get(name), int) else "any"
            for name in ("source", "destination")
        )
        iif = given.get("iif")
        words = [f"{source} -> {destination}"]
        if iif:
            words.append("sent by this host" if iif == walk.LO else f"arriving on {iif}")
        if isinstance(original := given.get("original"), int):
            words.append(f"a reply of a connection made to {address_text(self.family, original)}")
        if given.get("oif"):
            words.append(f"leaving by {given['oif']}")
        if isinstance(translated := given.get("snat"), int):
            words.append(f"translated to {address_text(self.family, translated)} by somebody's rule")
        if mark:
            words.append(f"fwmark {mark:#x}")
        state = given.get("state")
        if isinstance(state, State) and state.words:
            words.append(state.words)
        return ", ".join(words)

    def initial(self, given: Given) -> int:
        """The mark that a packet carries before our hooks."""
        match given["mark"]:
            case "nothing":
                return 0
            case "everything":
                return ALL_BITS
            case int(value):
                return value
        mine = next((each.fwmark.value for each in self.identities if each.link == given["iif"]), 0)
        return mine | self.foreign


def _compared(artefact: Artefact, family: Family) -> Iterator[int]:
    """The addresses that a rule of a chain compares with."""
    for chain in artefact.chains.values():
        for match in (match for line in chain.lines for match in line.matches):
            if match.fields[0].family is family:
                yield from map(_number, match.values)


def _state(given: Given) -> State:
    state = given["state"]
    assert isinstance(state, State)  # noqa: S101
    return state


def _road(route: Route) -> _Road:
    return _Road(route.destination, frozenset((hop.link, hop.via) for hop in route.hops))


def _connected(facts: Facts, link: str, family: Family) -> Iterator[_Road]:
    """The networks that main has straight on a link."""
    for route in facts.routes:
        hops = [hop for hop in route.hops if hop.link == link]
        link_local = family is Family.IPV6 and route.destination.address >> 118 == 0xFE80 >> 6
        straight = hops and not any(hop.via for hop in hops)
        if route.family is family and route.destination.length and straight and not link_local:
            yield _Road(route.destination, frozenset((hop.link, hop.via) for hop in hops))


def _up(hops: frozenset[tuple[str, object]], state: State) -> frozenset[tuple[str, object]]:
    return frozenset(hop for hop in hops if hop[0] not in state.down)


def _same(found: Fate, wanted: Iterable[Fate]) -> bool:
    """Whether it is one of what is wanted; the hops of one network may stand in several routes."""
    wanted = tuple(wanted)
    hops = frozenset(hop for fate in wanted for hop in fate.hops)
    return any(found.what == fate.what for fate in wanted) and found.hops <= hops


def _either(wanted: Iterable[Fate]) -> str:
    return " or ".join(dict.fromkeys(map(str, wanted)))


Verdicts = Iterator[Counterexample | None]


def _checked(run: Callable[[Given], Counterexample | None], choices: Mapping[str, Iterable[object]]) -> Verdicts:
    return (found for _, found in follow(run, choices))


# --- the marks of what arrives ---------------------------------------------------------------------------------------


def _arriving(world: World) -> Verdicts:
    """Prerouting gives a packet the mark of its identity and no other, whatever it carried and a neighbour restored."""

    def run(given: Given) -> Counterexample | None:
        packet = Packet(world.family, given, mark=world.initial(given))
        world.hooks.call("prerouting", packet, _neighbours(world, packet.mark))
        owner, on_own_link = _owner_arriving(world, given)
        counted = [counter_name(owner.name, world.family, "receive")] if owner and on_own_link else []
        if owner and world.standings[owner.name].way(world.family) is None:
            counted = []
        return _marked(world, given, packet, owner.fwmark.value if owner else 0) or _counted(
            world, given, packet, counted
        )

    links = (*sorted(world.links | world.behind_links), ELSEWHERE)
    return _checked(
        run,
        {
            "iif": links,
            "mark": (NOTHING, EVERYTHING, OWN),
            "source": world.examples(),
            "destination": world.examples(),
            "original": (None, *world.examples()),
        },
    )


def _owner_arriving(world: World, given: Given) -> tuple[Identity | None, bool]:
    """Whose a packet is that arrives, and whether that is so because of its destination."""
    if given["iif"] in world.links:
        owner = world.owner(given["destination"])
        if owner and owner.link == given["iif"]:
            return owner, True
    return _owner_by_source(world, given), False


def _owner_by_source(world: World, given: Given) -> Identity | None:
    original = given["original"]
    return (world.owner(original) if original is not None else None) or world.owner(given["source"])


def _neighbours(world: World, mark: int) -> tuple[walk.Neighbour, ...]:
    """A neighbour that restores a whole mark at mangle, and one that forwards ports at dstnat."""

    def restore(packet: Packet) -> None:
        packet.mark = mark

    def forward(packet: Packet) -> None:
        if packet.given["original"] is None:
            packet.destination = world.nobodys

    return ((MANGLE, restore), (DSTNAT, forward))


def _marked(world: World, given: Given, packet: Packet, wanted: int) -> Counterexample | None:
    """A packet that has not the mark that it is to have, or has lost a neighbour's bits."""
    carried = world.initial(given)
    if packet.mark & world.mask == wanted and packet.mark & world.foreign == carried & world.foreign:
        return None
    return Counterexample(
        world.words(given, carried),
        f"fwmark {wanted:#x}/{world.mask:#x}, other bits as they were",
        f"fwmark {packet.mark:#x}",
        tuple(packet.trail),
    )


def _counted(world: World, given: Given, packet: Packet, wanted: list[str]) -> Counterexample | None:
    if packet.counted == wanted:
        return None
    return Counterexample(
        world.words(given, packet.mark),
        f"counted by {' and '.join(wanted) or 'none'}",
        f"counted by {' and '.join(packet.counted) or 'none'}",
        tuple(packet.trail),
    )


# --- what this host sends --------------------------------------------------------------------------------------------


def _sent(world: World) -> Verdicts:
    """Output gives the host's own packets the mark of their identity, and the kernel looks for their route again. A
    packet of nobody's keeps the mark that its program asked for.
    """

    def run(given: Given) -> Counterexample | None:
        carried = world.initial(given)
        packet = Packet(world.family, given, mark=carried)
        world.hooks.call("output", packet, _neighbours(world, carried))
        owner = _owner_by_source(world, given)
        given = Given({**given, "iif": walk.LO})
        wrong = _marked(world, given, packet, owner.fwmark.value if owner else carried & world.mask)
        if wrong is None and packet.mark != carried and "route" not in world.hooks.kinds("output"):
            found = "the route of before: only a chain of type route has it looked for again"
            return Counterexample(world.words(given, carried), "a route for its new mark", found, tuple(packet.trail))
        return wrong

    return _checked(
        run,
        {
            "mark": (NOTHING, EVERYTHING, *(identity.fwmark.value for identity in world.identities)),
            "source": world.examples(),
            "destination": world.examples(),
            "original": (None, *world.examples()),
        },
    )


# --- which way it goes then ------------------------------------------------------------------------------------------


def _routed(world: World) -> Verdicts:
    """A marked packet goes its identity's way; one without a mark, which is nobody's, is left to the host."""

    def run(given: Given) -> Counterexample | None:
        mark = given["mark"]
        assert isinstance(mark, int)  # noqa: S101
        owner = world.marks.get(mark)
        for other in (0, world.foreign):
            found = world.tables.lookup(world.family, given, mark | other)
            source = given.get("source")
            if source in world.own and (given["iif"] != walk.LO or owner is None or world.own[source] != owner.name):
                # Arriving it is a martian: it claims to come from this host. Sent, its own address' rule comes before
                # that of a mark that is another's: a documented limit; or it has no mark yet, of which see below.
                return None
            if owner is None and source is not None and world.owner(source):
                return None  # an identity's has its mark by now
            wanted = world.way(owner, given) if owner else (world.host(given),)
            if not _same(found, wanted):
                return _lost(world, given, Packet(world.family, given, mark | other), wanted, found)
        return None

    return _checked(
        run,
        {
            "mark": (0, *world.marks),
            "iif": (walk.LO, ELSEWHERE, *sorted(world.links | world.behind_links)),
            "source": world.examples("rule", "here"),
            "destination": world.examples("route", "road", "here", "probe", owned=False),
            "state": world.states(),
        },
    )


def _lost(
    world: World, given: Given, packet: Packet, wanted: Iterable[Fate], found: Fate, *, when: str = ""
) -> Counterexample:
    return Counterexample(
        world.words(given, packet.mark), f"{when}{_either(wanted)}", str(found), (*packet.trail, found.by)
    )


# --- while there is no ruleset ---------------------------------------------------------------------------------------


def _bare(world: World) -> Verdicts:
    """Without a mark, that is before the output hook and while our table is not there: own addresses go their way,
    members are refused if they are forwarded.
    """

    def run(given: Given) -> Counterexample | None:
        for mark in (0, world.foreign):
            found = world.tables.lookup(world.family, given, mark)
            source, forwarded = given["source"], given["iif"] != walk.LO
            assert isinstance(source, int)  # noqa: S101
            owner = world.owner(source)
            wanted: tuple[Fate, ...] = (world.host(given),)
            if source in world.own:
                if forwarded:
                    return None  # a martian
                assert owner  # noqa: S101
                wanted = world.way(owner, given)
            elif owner and world.guarded and forwarded and wanted[0].what != LOCAL:
                wanted = (Fate(REFUSED),)
            if not _same(found, wanted):
                when = "while nothing marks it: " if forwarded else "before it has a mark: "
                return _lost(world, given, Packet(world.family, given, mark), wanted, found, when=when)
        return None

    return _checked(
        run,
        {
            "iif": (walk.LO, ELSEWHERE, *sorted(world.links | world.behind_links)),
            "source": world.examples("rule", "here"),
            "destination": world.examples("route", "road", "here", "probe", owned=False),
            "state": world.states(),
        },
    )


# --- what is let out -------------------------------------------------------------------------------------------------


def _leaving(world: World) -> Verdicts:
    """Whatever the routes are: no packet leaves by a link that is neither its identity's nor allowed to it."""

    def run(given: Given) -> Counterexample | None:
        packet = Packet(world.family, given, world.initial(given))
        mark = packet.mark

        def translate(packet: Packet) -> None:
            if given["original"] is not None:  # the translation is taken back
                packet.source = _number(given["original"])
            elif not packet.status and given["snat"] is not None:
                packet.source = _number(given["snat"])
                packet.status.add("snat")

        passed = world.hooks.call("postrouting", packet, ((SRCNAT, translate),))
        if given["oif"] == walk.LO:
            return _let_out(world, given, packet, passed, (True, []))
        identity = world.marks.get(mark & world.mask)
        wire = _translated(world, identity, given)
        if packet.source != wire:
            leaves = "with its own source" if wire is None else f"as {address_text(world.family, wire)}"
            found = "with its own" if packet.source is None else f"as {address_text(world.family, packet.source)}"
            return Counterexample(world.words(given, mark), f"leaves {leaves}", f"leaves {found}", tuple(packet.trail))
        return _let_out(world, given, packet, passed, _judged(world, identity, wire, given))

    return _checked(
        run,
        {
            "oif": (walk.LO, ELSEWHERE, *sorted(world.links | world.behind_links)),
            "mark": (NOTHING, EVERYTHING, world.foreign, *world.marks),
            "source": world.examples("word", "here"),
            "original": (None, *world.examples()),
            "snat": (None, *world.examples()),
            "iif": (ELSEWHERE, *sorted(world.links)),
        },
    )


def _number(value: object) -> int:
    assert isinstance(value, int)  # noqa: S101
    return value


def _let_out(
    world: World, given: Given, packet: Packet, passed: bool, wanted: tuple[bool, list[str]]
) -> Counterexample | None:
    if passed is not wanted[0]:
        words = ("is dropped", "is let out")
        return Counterexample(world.words(given, packet.mark), words[wanted[0]], words[passed], tuple(packet.trail))
    return _counted(world, given, packet, wanted[1])


def _translated(world: World, identity: Identity | None, given: Given) -> int | None:
    """The source that a packet is to leave with, if not with its own."""
    if given["original"] is not None:
        return _number(given["original"])
    if identity and identity.masquerade:
        standing = world.standings[identity.name]
        for road in (identity, *detours(world.policy, identity)[0]):
            own = world.standings[road.name].own(world.family)
            hosts = {int(address) for address in (*standing.own(world.family), *own)}
            if road.link == given["oif"] and own and standing.way(world.family) and given["source"] not in hosts:
                return int(own[0])
    return None if given["snat"] is None else _number(given["snat"])


def _judged(world: World, identity: Identity | None, wire: int | None, given: Given) -> tuple[bool, list[str]]:
    """Whether a packet may leave by a link, and how it is counted. `wire` is the source that it was translated to."""
    oif = given["oif"]
    owner = identity or world.owner(given["source"] if wire is None else wire)
    if owner is None:
        return True, []
    others, main_last = detours(world.policy, owner)
    downstream = oif in world.policy.downstream if world.policy.downstream is not None else oif not in world.links
    if any(other.link == oif and other.link != owner.link for other in others):
        return True, _count(world, owner, "diverted")
    if main_last and oif != owner.link and not downstream:
        return True, _count(world, owner, "diverted")
    if wire is not None and oif in world.links:
        owner = world.owner(wire) or owner
    if oif == owner.link:
        return True, _count(world, owner, "transmit")
    if downstream:
        return True, []
    enforce = world.policy.kernel.enforce
    return not enforce, _count(world, owner, "misrouted-dropped" if enforce else "misrouted-passed")


def _count(world: World, owner: Identity, count: str) -> list[str]:
    families = world.standings[owner.name].families
    return [counter_name(owner.name, world.family, count)] if world.family in families else []
