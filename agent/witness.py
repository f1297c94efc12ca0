"""The running kernel as a witness: the proof over what it has, and its own route lookups beside what is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from agent import artefact, render
from agent.addresses import Address, Family
from agent.artefact import Artefact, Named, in_order
from agent.given import Given
from agent.lookups import Question
from agent.model import LOOKUP, TABLE_MAIN, Lookup, NftSet, Policy
from agent.plan import Observed
from agent.proof import TABLE_LOCAL, Loaded, Packet
from agent.reconcile import Look, Seams, look
from agent.verify import Counterexample, Proof, World, prove, ways_routed
from agent.walk import LOCAL


def verify(policy: Policy, kernel: Seams, down: Mapping[str, str]) -> Proof:
    """The proof of what would be loaded now, and, where that stands, of what is. Raises KernelError."""
    seen = look(policy, kernel, down)
    rendered = artefact.read(render.files(seen.desired))
    proof = prove(seen.desired, seen.facts, rendered)
    return proof if proof.counterexamples else hear(seen, rendered, kernel)


def hear(seen: Look, rendered: Artefact, kernel: Seams) -> Proof:
    """The proof once more, over what the kernel has. Raises KernelError.

    Its sets and hooks as they were read back, its rules and those of others in their order, the routes in our tables
    whoever put them there. Of rules of chains nothing but the digest can be read: when it is that of the rendered text
    they are taken as written there.
    """
    strange = tuple(strangers(rendered, seen.observed))
    proof = prove(seen.desired, seen.facts, present(seen, rendered, kernel))
    asked = list(_asked(seen, rendered, kernel))
    disagreements = tuple(found for found in asked if found)
    return replace(
        proof,
        ways=proof.ways + len(asked),
        counterexamples=(*strange, *proof.counterexamples, *disagreements),
    )


def loaded(seen: Look, rendered: Artefact, kernel: Seams) -> Loaded:
    """What the kernel has, for whoever follows one packet through it. Raises KernelError."""

    def ask(packet: Packet, fwmark: int) -> Lookup:
        return kernel.rtnl.lookup(packet.destination, source=packet.source, fwmark=fwmark, arriving=packet.arriving)

    strange = tuple(f"{each.packet}: {each.found}" for each in strangers(rendered, seen.observed))
    return Loaded(present(seen, rendered, kernel), strange, ask)


def present(seen: Look, rendered: Artefact, kernel: Seams) -> Artefact:
    """What the kernel has, as `hear` says. Raises KernelError."""
    table = seen.observed.table
    chains, sets = {}, {}
    if table and not table.dormant:
        hooks = {chain.name: chain.hook for chain in table.chains}
        chains = {name: chain._replace(hook=hooks[name]) for name, chain in rendered.chains.items() if name in hooks}
        sets = {nft_set.name: _named(nft_set) for nft_set in table.sets}
        if chains.keys() != rendered.chains.keys() or not rendered.sets.keys() <= sets.keys():
            chains = {}  # nothing of them can be followed; `strangers` has said so
    rules = kernel.rtnl.rules()
    foreign = frozenset(rule for rule, ours in rules if not ours)
    ours = {identity.table for identity in seen.desired.policy.identities}
    tables = {rule.table for rule in foreign if rule.action == LOOKUP} - ours - {TABLE_MAIN, TABLE_LOCAL, 0}
    routes = {*seen.observed.routes, *seen.observed.foreign_routes}
    for number in tables:
        routes.update(kernel.rtnl.foreign_routes(number))
    return Artefact(chains, sets, in_order(rule for rule, _ in rules), tuple(routes), foreign)


def _named(found: NftSet) -> Named:
    elements = ((key, value.strip('"')) for key, value in found.elements)
    return Named(found.name, tuple(found.key.split(" . ")), found.value, found.interval, elements)


def strangers(rendered: Artefact, observed: Observed) -> Iterator[Counterexample]:
    """Where the chains that are loaded are not the rendered ones."""
    table = observed.table
    if table is None or table.dormant:
        what = "is not there" if table is None else "is dormant: its chains are not called"
        yield Counterexample("the nft table", "loaded", what)
        return
    loaded = {chain.name: [rule.comment for rule in chain.rules] for chain in table.chains}
    written = {name: [line.comment for line in chain.lines] for name, chain in rendered.chains.items()}
    for name in sorted(loaded.keys() | written.keys()):
        if loaded.get(name) != written.get(name):
            words = _words_of(loaded.get(name)), _words_of(written.get(name))
            yield Counterexample(f"chain {name} of the nft table", words[1], words[0])


def _words_of(comments: list[str] | None) -> str:
    return "no such chain" if comments is None else f"{len(comments)} rules: {'; '.join(comments)}"


def _asked(seen: Look, rendered: Artefact, kernel: Seams) -> Iterator[Counterexample | None]:
    """The kernel's own lookups: for each identity by its mark to each class of destinations that it tells apart, and
    for each class of its sources to somewhere.
    """
    for family in Family:
        world = World(family, seen.desired, seen.facts, rendered)
        for question in dict.fromkeys((*_by_mark(world), *_by_source(world))):
            answer = question.ask(kernel.rtnl)
            if question.agrees(answer):
                yield None
            else:
                words, wanted = _words(question), " or ".join(map(str, question.wanted))
                yield Counterexample(words, wanted, str(answer), ("the kernel's own route lookup",))


def _by_mark(world: World) -> Iterator[Question]:
    """Each way that the proof tells apart, while nothing has happened to the host."""
    for given, _ in ways_routed(world):
        owner, destination = world.marked(given), given.example("destination")
        if owner and destination is not None and not given.happened and world.standings[owner.name].way(world.family):
            wanted = world.wanted.way(owner, Given.of(destination=destination))
            if wanted[0].what != LOCAL:
                yield Question(owner, _address(world.family, destination), wanted, fwmark=owner.fwmark.value)


def _by_source(world: World) -> Iterator[Question]:
    if world.nobodys is None:
        return
    somewhere = _address(world.family, world.nobodys)
    for kind in world.kinds:
        if kind.owner is None or world.standings[kind.owner].way(world.family) is None:
            continue
        owner = world.standings[kind.owner].identity
        wanted = world.wanted.way(owner, Given.of(destination=world.nobodys))
        for first in kind.firsts:
            source = _address(world.family, first)
            if first in world.wanted.local and first in world.wanted.own:
                yield Question(owner, somewhere, wanted, source=source)
            elif first not in world.wanted.local and (arriving := _arrival(world, first)):
                yield Question(owner, somewhere, wanted, owner.fwmark.value, source, arriving)


def _arrival(world: World, source: int) -> str | None:
    """The link behind which a source is."""
    around = world.behind.holding("source", Given.of(source=source))
    return next((min(str(link) for link, _ in hops) for _, hops in around), None)


def _words(question: Question) -> str:
    """The packet as an operator would describe it."""
    source = question.source or "any"
    where = f"arriving on {question.arriving}" if question.arriving else "sent by this host"
    mark = f", fwmark {question.fwmark:#x}" if question.fwmark else ""
    return f"{source} -> {question.destination}, {where}{mark}"


def _address(family: Family, value: object) -> Address:
    assert isinstance(value, int)  # noqa: S101
    return IPv4Address(value) if family is Family.IPV4 else IPv6Address(value)
