"""The proof of an artefact: for every class of packets, that they go where the policy wants them, or nowhere.

What the policy wants is said here once more, from the policy and the host alone: nothing of what renders is used. Each
defence is proved by itself, for they hide each other's faults: the marks, the routes behind them, the lookup before a
mark, what happens to members while there is no ruleset, and what is let out at the end whatever the routes are. The
host's other rules and tables are nobody's word: what is left to them may go anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product

from agent import walk
from agent.addresses import Family, Prefix, address_text
from agent.artefact import ALL_BITS, Artefact, CountBy, VerdictBy
from agent.cut import Kind, cut
from agent.desired import GUARDED, PRIORITY_MAIN, Desired, priority_behind, sources_of
from agent.given import Choices, Given, Question, Values, follow
from agent.model import Facts, Identity
from agent.prefixes import outermost, pairs
from agent.ruleset import counter_name
from agent.walk import AS_CARRIED, DSTNAT, LOCAL, MANGLE, NOTHING, REFUSED, SRCNAT, Fate, Networks, Packet, is_reply
from agent.wanted import Wanted, same

#: So many packets that go wrong are printed for a person.
SHOWN = 10
#: A link that no policy can name (it is too long for one): one of those that nobody has thought of.
ELSEWHERE = "some-other-link-"


#: What properties of packets may be.
Rows = Values | Iterable[tuple[object, ...]]


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
    """What was shown: classes of addresses by family, ways that packets take, all of which were followed, and where it
    failed.

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


class World:
    """One family of a policy, the host, and the artefact: what is wanted, and the packets there are."""

    def __init__(self, family: Family, desired: Desired, facts: Facts, artefact: Artefact) -> None:
        self.family, self.desired, self.policy = family, desired, desired.policy
        self.wanted = Wanted(family, desired, facts)
        self.hooks = walk.Hooks(artefact)
        self.tables = walk.Tables(family, artefact, self.wanted.local, self.wanted.fleeting)
        self.standings = {standing.identity.name: standing for standing in desired.standings}
        self.identities = tuple(standing.identity for standing in desired.standings)
        self.mask = self.policy.kernel.mark_mask
        self.foreign = ALL_BITS & ~self.mask
        self.marks = {identity.fwmark.value: identity for identity in self.identities}
        self.links = frozenset(identity.link for identity in self.identities)
        guarded = tuple(islice(outermost(family, (each.members for each in self.identities)), GUARDED + 1))
        self.members = len(guarded)
        last = priority_behind(self.identities) + 3
        self.guarded = self.policy.kernel.enforce and 0 < self.members <= GUARDED and last < PRIORITY_MAIN
        self.behind = Networks(self.wanted.behind)
        self.kinds = self._cut(artefact)
        self._known: dict[tuple[object, ...], Values] = {}
        self._whose = {
            name: Question((name,), self.owner_name, known={}) for name in ("source", "destination", "original", "snat")
        }
        self._whose["mark"] = Question(("mark",), self._named, known={})
        self._owners: dict[int, str | None] = {kind.example: kind.owner for kind in self.kinds}
        self._owners.update(self.wanted.own)
        behind = (
            frozenset(self.policy.downstream)
            if self.policy.downstream is not None
            else frozenset(link.name for link in facts.links) - self.links - {walk.LO}
        )
        #: The marks that a packet may carry.
        self.carried = tuple(dict.fromkeys((0, ALL_BITS, self.foreign, *self.marks, *_marks(artefact))))
        #: The links that a packet may arrive on or leave by.
        self.roads = (ELSEWHERE, *sorted(self.links | behind))

    def _cut(self, artefact: Artefact) -> tuple[Kind, ...]:
        labels: dict[Prefix, list[object]] = {}
        for rule in artefact.rules:
            if rule.source and rule.family is self.family:
                labels.setdefault(rule.source, []).append(("rule", str(rule)))
        for route in artefact.routes:
            if route.family is self.family and route.destination.length:
                said = ("route", route.table, route.metric, route.kind, route.hops, route.source)
                labels.setdefault(route.destination, []).append(said)
        roads = (road for roads in self.wanted.connected.values() for road in roads)
        for prefix, hops in (*self.wanted.behind, *roads):
            labels.setdefault(prefix, []).append(("road", hops))
        for standing in self.desired.standings:
            probe = standing.identity.probe
            if probe and Family.of(probe.target) is self.family:
                labels.setdefault(Prefix.host(probe.target), []).append(("probe", standing.identity.name))
        for address in (*self.wanted.local, *self.wanted.own):
            host = Prefix(self.family, address, self.family.bits)
            labels.setdefault(host, []).append(("here", address in self.wanted.local, self.wanted.own.get(address)))
        for value in _compared(artefact, self.family):
            labels.setdefault(Prefix(self.family, value, self.family.bits), []).append(("word", value))
        for name, place, mask in sorted(_looked_up(artefact, self.family)):
            length = (mask & (1 << self.family.bits) - 1).bit_count()
            for key, target in artefact.sets[name].exact.items():
                network = _number(key[place])
                if network & mask == network:  # else nothing is ever equal to it
                    held = ("set", name, length, key[:place], key[place + 1 :], target)
                    labels.setdefault(Prefix(self.family, network, length), []).append(held)
        spans = [
            span for found in artefact.sets.values() if found.keys == (f"{self.family}_addr",) for span in found.spans
        ]
        return cut(
            self.family,
            pairs(sources_of(self.desired.standings)),
            spans,
            {prefix: tuple(sorted(map(repr, dict.fromkeys(said)))) for prefix, said in labels.items()},
        )

    # --- the packets there are ---

    def examples(self, *said: str, owned: bool = True) -> Values:
        """An address of each kind, as far as the kinds differ in owner, sets, verdict and in what is said of them."""
        starts = tuple(f"('{word}'" for word in (*said, *("set",) * owned))
        # Few labels are on many kinds.
        labels = {label for kind in self.kinds for label in kind.labels if isinstance(label, tuple)}
        relevant: dict[object, tuple[str, ...]] = {
            label: tuple(each for each in label if each.startswith(starts)) for label in labels
        }
        chosen: dict[object, int] = {}
        for kind in self.kinds:
            seen = tuple([words for label in kind.labels if (words := relevant[label])])
            chosen.setdefault((seen, (kind.owner, kind.verdict) if owned else None), kind.example)
        return self._values(chosen.values())

    def _values(self, values: Iterable[object]) -> Values:
        """One object for the same values: what is once known of them is known wherever they stand."""
        found = tuple(values)
        if found not in self._known:
            self._known[found] = Values(found)
        return self._known[found]

    def sources(self) -> Values:
        """An address of each kind that a source may be, for rules and tables."""
        return self.examples("rule", "here")

    def destinations(self) -> Values:
        """An address of each kind that a destination may be, for rules and tables."""
        return self.examples("route", "road", "here", "probe", owned=False)

    def translated(self) -> Values:
        """What an address may have been, or become, by somebody's translation; None: there is none."""
        return self._values((None, *(self.examples().values if self.desired.nat else ())))

    def connections(self) -> dict[tuple[str, ...], Rows]:
        """Of connections whose destination was translated: what it was, and whether a packet answers."""
        return {("original",): self.translated(), ("direction",): [(walk.REPLY,), (walk.ASKED,)]}

    def owner(self, address: object) -> Identity | None:
        """Whose an address is, one of the kinds' examples or an identity's own, by the longest prefix of the policy."""
        assert isinstance(address, int)  # noqa: S101
        name = self._owners[address]
        return self.standings[name].identity if name else None

    def owner_name(self, address: object) -> str | None:
        """The same by name; of an address that isn't there, nobody's."""
        owner = None if address is None else self.owner(address)
        return owner.name if owner else None

    def whose(self, given: Given, name: str) -> Identity | None:
        """Whose the address of a property is."""
        found = given.ask(self._whose[name])
        return self.standings[found].identity if found else None

    def marked(self, given: Given) -> Identity | None:
        """Whose mark a packet carries."""
        name = given.ask(self._whose["mark"])
        return self.standings[name].identity if name else None

    def _named(self, mark: object) -> str | None:
        assert isinstance(mark, int)  # noqa: S101
        found = self.marks.get(mark & self.mask)
        return found.name if found else None

    @property
    def nobodys(self) -> int | None:
        """An address of nobody's."""
        return next((kind.example for kind in self.kinds if kind.owner is None and kind.verdict is None), None)

    def limits(self) -> Iterator[str]:
        """What the policy leaves open by itself."""
        if self.family is Family.IPV4 and not self.desired.nat:
            yield "nothing on this host translates addresses: the policy says so, or what was seen of the host"
        if self.members and not self.guarded:
            why = "enforce = false" if not self.policy.kernel.enforce else f"more than {GUARDED} prefixes"
            yield f"{self.family} members follow main while the ruleset is not loaded: {why}"

    # --- words ---

    def words(self, given: Given, mark: object = None) -> str:
        """A packet as an operator would describe it."""
        known = {name: given.example(name) for name in ("source", "destination", "original", "snat", "iif", "oif")}
        texts = {name: address_text(self.family, value) for name, value in known.items() if isinstance(value, int)}
        words = [f"{texts.get('source', 'any')} -> {texts.get('destination', 'any')}"]
        if known["iif"]:
            words.append("sent by this host" if known["iif"] == walk.LO else f"arriving on {known['iif']}")
        if "original" in texts:
            word = "asked in" if given.example("direction") == walk.ASKED else "a reply of"
            words.append(f"{word} a connection made to {texts['original']}")
        if known["oif"]:
            words.append(f"leaving by {known['oif']}")
        if "snat" in texts:
            words.append(f"translated to {texts['snat']} by somebody's rule")
        carried = given.example("mark") if mark is None else mark
        if carried:
            words.append(f"fwmark {carried:#x}")
        for what, whom in given.happened:
            words.append(f"while {whom} is {what}")
        return ", ".join(words)


def _looked_up(artefact: Artefact, family: Family) -> set[tuple[str, int, int]]:
    """The sets and maps in which an address of a family is looked up: name, place in the key, mask."""
    found = set()
    for line in (line for chain in artefact.chains.values() for line in chain.lines):
        asked = [(match.among, match.fields) for match in line.matches if match.among]
        if isinstance(line.action, VerdictBy | CountBy):
            asked.append((line.action.map, line.action.fields))
        found |= {
            (name, place, field.mask)
            for name, fields in asked
            for place, field in enumerate(fields)
            if field.family is family and not artefact.sets[name].interval
        }
    return found


def _compared(artefact: Artefact, family: Family) -> Iterator[int]:
    """The addresses that a rule of a chain compares with."""
    for chain in artefact.chains.values():
        for match in (match for line in chain.lines for match in line.matches):
            if match.fields[0].family is family and not match.among:
                yield from map(_number, match.values)


def _marks(artefact: Artefact) -> Iterator[int]:
    """For each value that a rule compares marks with, or looks up, two that are like it in the bits that are looked at:
    without any other bit, and with all others.
    """
    for line in (line for chain in artefact.chains.values() for line in chain.lines):
        for match in line.matches:
            if match.fields[0].name == "mark":
                mask = match.fields[0].mask & ALL_BITS
                values = match.values if not match.among else (key[0] for key in artefact.sets[match.among].exact)
                for value in map(_number, values):
                    yield from (value, value | ALL_BITS & ~mask)
        if isinstance(line.action, VerdictBy | CountBy) and line.action.fields[0].name == "mark":
            mask = line.action.fields[0].mask & ALL_BITS
            for value in (_number(key[0]) for key in artefact.sets[line.action.map].exact):
                yield from (value, value | ALL_BITS & ~mask)


def _number(value: object) -> int:
    assert isinstance(value, int)  # noqa: S101
    return value


def _either(wanted: Iterable[Fate]) -> str:
    return " or ".join(dict.fromkeys(map(str, wanted)))


Verdicts = Iterator[Counterexample | None]
Claim = Callable[[Given], Counterexample | None]


def _checked(run: Claim, choices: Mapping[tuple[str, ...], Rows]) -> Verdicts:
    return (found for _, found in follow(run, Choices(choices)))


# --- the marks of what arrives ---------------------------------------------------------------------------------------


def _arriving(world: World) -> Verdicts:
    """Prerouting gives a packet the mark of its identity and no other, whatever it carried and a neighbour restored."""

    def at_home(given: Given) -> str | None:
        """The identity on whose own link packets arrive for it."""
        if not given.within("iif", world.links):
            return None
        owner = world.whose(given, "destination")
        return owner.name if owner and given.within("iif", frozenset({owner.link})) else None

    def run(given: Given) -> Counterexample | None:
        home = at_home(given)
        packet = Packet(world.family, given, known=home)
        world.hooks.call("prerouting", packet, _neighbours(world))
        owner = world.standings[home].identity if home else _owner_by_source(world, given)
        counted = [counter_name(home, world.family, "receive")] if home else []
        if home and world.standings[home].way(world.family) is None:
            counted = []
        return _marked(world, given, packet, owner.fwmark.value if owner else 0) or _counted(
            world, given, packet, counted
        )

    return _checked(
        run,
        {
            ("iif",): [(link,) for link in _last(world.roads)],
            ("destination",): world.examples(),
            ("mark",): [(mark,) for mark in world.carried],
            ("source",): world.examples(),
            **world.connections(),
        },
    )


def _last(roads: tuple[str, ...]) -> tuple[str, ...]:
    """The links, and last the one that nobody knows."""
    return (*roads[1:], roads[0])


def _owner_by_source(world: World, given: Given) -> Identity | None:
    answered = world.whose(given, "original") if is_reply(given) else None
    return answered or world.whose(given, "source")


def _neighbours(world: World) -> tuple[walk.Neighbour, ...]:
    """A neighbour that restores a whole mark at mangle, and one that forwards ports at dstnat."""

    def restore(packet: Packet) -> None:
        packet.mark = AS_CARRIED

    def forward(packet: Packet) -> None:
        if world.desired.nat and world.nobodys is not None and not is_reply(packet.given):
            packet.destination = world.nobodys

    return ((MANGLE, restore), (DSTNAT, forward))


def _marked(world: World, given: Given, packet: Packet, wanted: int, *, kept: bool = False) -> Counterexample | None:
    """A packet that has not the mark that it is to have (or, if that is to be `kept`, not the one that it carried), or
    has lost a neighbour's bits.
    """

    def is_right(carried: object) -> bool:
        mark = packet.mark.of(_number(carried))
        own = _number(carried) & world.mask if kept else wanted
        return mark == _number(carried) & world.foreign | own

    # What is written whole is right or wrong for all of them.
    written = packet.mark == AS_CARRIED.written(world.foreign, 0 if kept else wanted)
    if (written and not kept) or given.tell(("mark",), is_right):
        return None
    carried = _number(given.example("mark"))
    return Counterexample(
        world.words(given),
        f"fwmark {carried & world.mask if kept else wanted:#x}/{world.mask:#x}, other bits as they were",
        f"fwmark {packet.mark.of(carried):#x}",
        _trail(packet),
    )


def _trail(packet: Packet) -> tuple[str, ...]:
    return tuple(map(str, packet.trail))


def _counted(world: World, given: Given, packet: Packet, wanted: list[str]) -> Counterexample | None:
    if packet.counted == wanted:
        return None
    return Counterexample(
        world.words(given),
        f"counted by {' and '.join(wanted) or 'none'}",
        f"counted by {' and '.join(packet.counted) or 'none'}",
        _trail(packet),
    )


# --- what this host sends --------------------------------------------------------------------------------------------


def _sent(world: World) -> Verdicts:
    """Output gives the host's own packets the mark of their identity, and the kernel looks for their route again. A
    packet of nobody's keeps the mark that its program asked for.
    """

    own = {name: frozenset(a for a, owner in world.wanted.own.items() if owner == name) for name in world.standings}

    def at_home(given: Given, owner: Identity) -> bool:
        """Whether a packet without a mark of ours is about to leave from an own address by that identity's link."""
        return (
            not is_reply(given)
            and given.within("source", own[owner.name])
            and given.within("oif", frozenset({owner.link}))
            and not given.tell(("mark",), lambda carried: _number(carried) & world.mask)
        )

    def run(given: Given) -> Counterexample | None:
        given.within("iif", frozenset({walk.LO}))
        packet = Packet(world.family, given)
        world.hooks.call("output", packet, _neighbours(world))
        owner = _owner_by_source(world, given)
        if owner and packet.mark == AS_CARRIED and at_home(given, owner):
            return None  # its source's rule has led it there, and nothing else has a say (`_leaving`)
        wrong = _marked(world, given, packet, owner.fwmark.value if owner else 0, kept=owner is None)
        if wrong or "route" in world.hooks.kinds("output") or not given.tell(("mark",), _is_written(packet)):
            return wrong
        found = "the route of before: only a chain of type route has it looked for again"
        return Counterexample(world.words(given), "a route for its new mark", found, _trail(packet))

    return _checked(
        run,
        {
            ("iif",): [(walk.LO,)],
            ("oif",): [(walk.LO,), *((link,) for link in world.roads)],
            ("mark",): [(mark,) for mark in world.carried],
            ("source",): world.examples("here"),
            ("destination",): world.examples(),
            **world.connections(),
        },
    )


def _is_written(packet: Packet) -> Callable[[object], bool]:
    return lambda carried: packet.mark.of(_number(carried)) != carried


# --- which way it goes then ------------------------------------------------------------------------------------------


def _claim_of_routes(world: World) -> Claim:
    """A marked packet goes its identity's way; one without a mark, which is nobody's, is left to the host."""
    own = {name: frozenset(a for a, owner in world.wanted.own.items() if owner == name) for name in world.standings}
    every = frozenset(world.wanted.own)

    def run(given: Given) -> Counterexample | None:
        owner = world.marked(given)
        if given.within("source", every):
            if owner is None or not given.within("source", own[owner.name]) or not given.within("iif", JUST_LO):
                # Arriving it is a martian: it claims to come from this host. Sent, its own address' rule comes before
                # that of a mark that is another's: a documented limit; or it has no mark yet, of which see below.
                return None
        elif owner is None and world.whose(given, "source"):
            return None  # an identity's has its mark by now
        for mark in _with_foreign(world, owner.fwmark.value if owner else 0):
            found = world.tables.lookup(given, mark)
            wanted = world.wanted.way(owner, given) if owner else (world.wanted.host(given),)
            if not same(found, wanted):
                return _lost(world, given, mark, wanted, found)
        return None

    return run


#: What this host sends itself.
JUST_LO = frozenset({walk.LO})


def ways_routed(world: World) -> Iterator[tuple[Given, Counterexample | None]]:
    """Each way that marked packets take through rules and tables, with whom takes it."""
    marks = [(0,), *((mark,) for mark in world.marks)]
    return follow(_claim_of_routes(world), Choices({("mark",): marks, **_routing_choices(world)}))


def _routed(world: World) -> Verdicts:
    return (found for _, found in ways_routed(world))


def _routing_choices(world: World) -> dict[tuple[str, ...], Rows]:
    return {
        ("iif",): [(walk.LO,), *((link,) for link in world.roads)],
        ("source",): world.sources(),
        ("destination",): world.destinations(),
    }


def _with_foreign(world: World, mark: int) -> tuple[int, ...]:
    """A mark, and, where any rule looks at bits that are not ours, the same with all of those."""
    return (mark, mark | world.foreign) if world.tables.bits & world.foreign else (mark,)


def _lost(
    world: World, given: Given, mark: int, wanted: Iterable[Fate], found: Fate, *, when: str = ""
) -> Counterexample:
    return Counterexample(world.words(given, mark), f"{when}{_either(wanted)}", str(found), (found.by,))


# --- while there is no ruleset ---------------------------------------------------------------------------------------


def _bare(world: World) -> Verdicts:
    """Without a mark, that is before the output hook and while our table is not there: own addresses go their way,
    members are refused if they are forwarded.
    """
    every = frozenset(world.wanted.own)

    def run(given: Given) -> Counterexample | None:
        own = given.within("source", every)
        forwarded = not given.within("iif", JUST_LO)
        if own and forwarded:
            return None  # a martian
        for mark in _with_foreign(world, 0):
            found = world.tables.lookup(given, mark)
            owner = world.whose(given, "source") if own or (world.guarded and forwarded) else None
            wanted: tuple[Fate, ...] = (world.wanted.host(given),)
            if own:
                assert owner  # noqa: S101
                wanted = world.wanted.way(owner, given)
            elif owner and wanted[0].what != LOCAL:
                wanted = (Fate(REFUSED),)
            if not same(found, wanted):
                when = "while nothing marks it: " if forwarded else "before it has a mark: "
                return _lost(world, given, mark, wanted, found, when=when)
        return None

    return _checked(run, _routing_choices(world))


# --- what is let out -------------------------------------------------------------------------------------------------


def _leaving(world: World) -> Verdicts:
    """Whatever the routes are: no packet leaves by a link that is neither its identity's nor allowed to it."""
    return _checked(
        _Doors(world).run,
        {
            ("oif", "mark"): product((walk.LO, *world.roads), world.carried),
            ("source",): world.examples("word", "here"),
            ("destination",): world.examples(),
            **world.connections(),
            ("snat",): world.translated(),
            ("iif",): [(link,) for link in world.roads],
        },
    )


class _Doors:
    """By which links packets may leave, and as whom."""

    def __init__(self, world: World) -> None:
        self._world, self._wanted = world, world.wanted
        self._downstream = None if world.policy.downstream is None else frozenset(world.policy.downstream)
        self._behind = Question(("oif",), self._is_downstream, known={})
        self._diversion = Question(("mark", "oif"), self._diverted, self._diverting, {})
        self._translation = Question(("mark", "oif"), self._roads, self._translating, {})
        self._marked = frozenset(mark for mark in world.carried if mark & world.mask in world.marks)

    def run(self, given: Given) -> Counterexample | None:
        world = self._world
        home = given.within("oif", JUST_LO)
        by_mark = given.ask(self._diversion)
        source = "source" if home else self._source(given)
        packet = Packet(world.family, given, known=(home, by_mark, source))
        passed = world.hooks.call("postrouting", packet, ((SRCNAT, _translate),))
        if home:
            return _let_out(world, given, packet, passed, (True, []))
        if packet.source != source:
            wanted, found = (f"leaves {_as(world, given, each)}" for each in (source, packet.source))
            return Counterexample(world.words(given), wanted, found, _trail(packet))
        return _let_out(world, given, packet, passed, self._judged(given, source, by_mark))

    def _diverting(self, mark: object) -> str | None:
        """Whose packet it is if its when_down may let it leave by another link than its own."""
        identity = self._world.marks.get(_number(mark) & self._world.mask)
        return identity.name if identity and self._has_detours(identity) else None

    def _has_detours(self, identity: Identity) -> bool:
        return self._wanted.detours(identity) != ((), False)

    def _diverted(self, name: str | None, oif: object) -> str | None:
        """The same, if it lets it leave by this link."""
        return name if name and self._diverts(self._world.standings[name].identity, oif) else None

    def _translating(self, mark: object) -> str | None:
        """Whose packet it is if members' addresses are translated."""
        identity = self._world.marks.get(_number(mark) & self._world.mask)
        if not identity or not identity.masquerade or not self._world.standings[identity.name].way(self._world.family):
            return None
        return identity.name

    def _roads(self, name: str | None, oif: object) -> tuple[str, ...]:
        """The identities to one of whose addresses members are translated as they leave by a link."""
        if name is None:
            return ()
        identity = self._world.standings[name].identity
        roads = (identity, *self._wanted.detours(identity)[0])
        return tuple(road.name for road in roads if road.link == oif and self._own(road.name))

    def _diverts(self, identity: Identity | None, oif: object) -> bool:
        if identity is None or oif == walk.LO:
            return False
        others, main_last = self._wanted.detours(identity)
        if any(other.link == oif and other.link != identity.link for other in others):
            return True
        return main_last and oif != identity.link and not self._is_downstream(oif)

    def _is_downstream(self, oif: object) -> bool:
        return oif not in self._world.links if self._downstream is None else oif in self._downstream

    def _own(self, name: str) -> tuple[int, ...]:
        return tuple(map(int, self._world.standings[name].own(self._world.family)))

    def _source(self, given: Given) -> str | int:
        """The property that a packet's source is to be when it leaves, or an address that it is to be translated to."""
        if is_reply(given):
            return "original"
        for road in given.ask(self._translation) if given.within("original", NOTHING) else ():
            members = self._world.marked(given)
            assert members  # noqa: S101
            if not given.within("source", frozenset((*self._own(members.name), *self._own(road)))):
                return self._own(road)[0]
        return "source" if given.within("snat", NOTHING) else "snat"

    def _judged(self, given: Given, source: str | int, by_mark: str | None) -> tuple[bool, list[str]]:
        """Whether a packet may leave, and how it is counted. `source` is what it was translated to."""
        world = self._world
        if by_mark:
            return True, _count(world, by_mark, "diverted")
        translated = source != "source" or not given.within("original", NOTHING)
        translated = translated and given.within("oif", world.links)
        carried = given.within("mark", self._marked)
        owner = None
        if translated or not carried:
            owner = world.owner(source) if isinstance(source, int) else world.whose(given, source)
        detours = owner is not None and not carried and self._has_detours(owner)
        if owner and detours and given.tell(("oif",), lambda oif: self._diverts(owner, oif)):
            return True, _count(world, owner.name, "diverted")
        owner = owner or world.marked(given)
        if owner is None:
            return True, []
        if given.within("oif", frozenset({owner.link})):
            return True, _count(world, owner.name, "transmit")
        if given.ask(self._behind):
            return True, []
        enforce = world.policy.kernel.enforce
        return not enforce, _count(world, owner.name, "misrouted-dropped" if enforce else "misrouted-passed")


def _translate(packet: Packet) -> None:
    """What a neighbour does to sources: takes back its translation, or makes one."""
    if is_reply(packet.given):
        packet.source = "original"
    elif not packet.status and not packet.given.within("snat", NOTHING):
        packet.source = "snat"
        packet.status |= {"snat"}


def _as(world: World, given: Given, source: str | int) -> str:
    """The source that a packet leaves with, in words."""
    if source == "source":
        return "with its own" if given.example("source") is None else "with its own source"
    return f"as {address_text(world.family, _number(given.example(source) if isinstance(source, str) else source))}"


def _let_out(
    world: World, given: Given, packet: Packet, passed: bool, wanted: tuple[bool, list[str]]
) -> Counterexample | None:
    if passed is not wanted[0]:
        words = ("is dropped", "is let out")
        return Counterexample(world.words(given), words[wanted[0]], words[passed], _trail(packet))
    return _counted(world, given, packet, wanted[1])


def _count(world: World, name: str, count: str) -> list[str]:
    families = world.standings[name].families
    return [counter_name(name, world.family, count)] if world.family in families else []
