"""The running kernel as a witness: the proof over what it has, and its own route lookups beside what is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from agent import artefact, render, walk
from agent.artefact import Artefact, Named, in_order
from agent.model import LOOKUP, TABLE_MAIN, Address, Family, Lookup, NftSet, Policy
from agent.plan import Observed
from agent.proof import TABLE_LOCAL
from agent.reconcile import Look, Seams, look
from agent.verify import Counterexample, Proof, World, prove
from agent.walk import LOCAL, MAIN, REFUSED, Fate, Given, State


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
    strangers = tuple(_strangers(rendered, seen.observed))
    proof = prove(seen.desired, seen.facts, _present(seen, rendered, kernel))
    asked = list(_asked(seen, rendered, kernel))
    disagreements = tuple(found for found in asked if found)
    return replace(
        proof,
        ways=proof.ways + len(asked),
        counterexamples=(*strangers, *proof.counterexamples, *disagreements),
    )


def _present(seen: Look, rendered: Artefact, kernel: Seams) -> Artefact:
    table = seen.observed.table
    chains, sets = {}, {}
    if table and not table.dormant:
        hooks = {chain.name: chain.hook for chain in table.chains}
        chains = {name: chain._replace(hook=hooks[name]) for name, chain in rendered.chains.items() if name in hooks}
        sets = {nft_set.name: _named(nft_set) for nft_set in table.sets}
        if chains.keys() != rendered.chains.keys() or not rendered.sets.keys() <= sets.keys():
            chains = {}  # nothing of them can be followed; `_strangers` has said so
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


def _strangers(rendered: Artefact, observed: Observed) -> Iterator[Counterexample]:
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
    """The kernel's own lookups: for each identity by its mark to each kind of destination, and for each class of its
    sources to somewhere.
    """
    for family in Family:
        world = World(family, seen.desired, seen.facts, rendered)
        for identity in world.identities:
            if world.standings[identity.name].way(family) is None:
                continue
            for destination in world.examples("route", "road", "here", "probe", owned=False):
                given = Given(destination=destination, state=State(), iif=walk.LO)
                if world.way(identity, given)[0].what == LOCAL:
                    continue
                yield _compared(world, kernel, given, identity.name, mark=identity.fwmark.value)
        somewhere = world.nobodys
        if somewhere is None:
            continue
        for kind in world.kinds:
            if kind.owner is None or world.standings[kind.owner].way(family) is None:
                continue
            mark = world.standings[kind.owner].identity.fwmark.value
            for source in kind.firsts:
                given = Given(source=source, destination=somewhere, state=State())
                if source in world.local and source in world.own:
                    yield _compared(world, kernel, Given({**given, "iif": walk.LO}), kind.owner, mark=0)
                elif source not in world.local:
                    arriving = _arrival(world, source)
                    if arriving:
                        yield _compared(world, kernel, Given({**given, "iif": arriving}), kind.owner, mark=mark)


def _arrival(world: World, source: int) -> str | None:
    """The link behind which a source is."""
    best = max(
        (road for road in world.behind if road.prefix.address <= source <= road.prefix.last),
        key=lambda road: road.prefix.length,
        default=None,
    )
    return next(iter(sorted(link for link, _ in best.hops)), None) if best else None


def _compared(world: World, kernel: Seams, given: Given, name: str, mark: int) -> Counterexample | None:
    identity = world.standings[name].identity
    iif = given["iif"]
    answer = kernel.rtnl.lookup(
        _address(world.family, given["destination"]),
        source=_address(world.family, given["source"]) if "source" in given else None,
        fwmark=mark,
        arriving=iif if isinstance(iif, str) and iif != walk.LO else None,
    )
    wanted = world.way(identity, given)
    if _agrees(answer, wanted[0], identity.table):
        return None
    return Counterexample(world.words(given, mark), str(wanted[0]), f"{answer}", ("the kernel's own route lookup",))


def _agrees(answer: Lookup, wanted: Fate, table: int) -> bool:
    if wanted.what == MAIN:
        return answer.table != table
    if wanted.what == REFUSED:
        return bool(answer.error)
    return answer.table == table and (answer.link, answer.via) in wanted.hops


def _address(family: Family, value: object) -> Address:
    assert isinstance(value, int)  # noqa: S101
    return IPv4Address(value) if family is Family.IPV4 else IPv6Address(value)
