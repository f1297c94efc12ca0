"""From one nft table to another in stages, between which and in which no packet meets less than it should.

A packet is on its way through the rules while a transaction is committed: then it goes on by the old rules, and sees
of every set what it holds from then on (generations in net/netfilter/nf_tables_core.c and nf_tables_api.c). So what
new rules ask is there before them, and what old rules ask goes after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from agent import commands
from agent.model import Addresses, Chain, ElementChange, NftSet, Table

#: Chains that elements point to.
OF_IDENTITIES = ("id-", "left-", "arrived-")
#: So many elements are not put in with the rules that ask for them, even where there were no rules before.
BULK = 1000


@dataclass(frozen=True, slots=True)
class Stage:
    """One nft transaction (`commands`), or changes of elements. `behind` are the commands that have to come first."""

    commands: tuple[str, ...] = ()
    changes: tuple[ElementChange, ...] = ()
    behind: tuple[str, ...] = ()


def stages(wanted: Table, present: Table | None, *, rules_anew: bool) -> Iterator[Stage]:
    """What to do, in order; nothing if the tables are the same."""
    if present is None or not present.chains:
        yield from _from_nothing(wanted, present)
        return
    name = wanted.name
    there = {nft_set.name: nft_set for nft_set in present.sets}
    fitting = {s.name for s in wanted.sets if s.name in there and there[s.name].type == s.type}
    changes = {s.name: commands.difference(s, there[s.name]) for s in wanted.sets if s.name in fitting}
    # Intervals change in nft's way, and somebody's element for all others, *, which has no key.
    odd = {s.name for s in wanted.sets if s.interval or any(key == "*" for key, _ in _gone(changes.get(s.name)))}
    plain = [change for change in changes.values() if change.set not in odd and (change.gone or change.new)]
    right = {s.name: s for s in wanted.sets if s.name in fitting}
    equal = replace(present, sets=tuple(_with_elements(s, right.get(s.name)) for s in present.sets))
    if not commands.transaction(wanted, equal, rules_anew=rules_anew):
        yield from [Stage(changes=tuple(plain))] if plain else []
        lines = [line for s in wanted.sets if s.name in odd for line in _element_lines(name, s, there.get(s.name))]
        yield from [Stage(tuple(lines))] if lines else []
        return
    # What stays changes with the rules: before them it may hide what they don't ask yet, or be said of marks that are
    # about to mean somebody else; after them what was there may be missing.
    new = [s for s in wanted.sets if s.name not in there]
    made = tuple(_made(wanted, present, new))
    yield from [Stage(made)] if made else []
    incoming = tuple(commands.difference(s, None) for s in new if s.elements and not s.interval)
    yield from [Stage(changes=incoming)] if incoming else []
    lines = [line for s in new if s.interval for line in _element_lines(name, s, None)]
    yield from [Stage(tuple(lines), behind=made)] if lines else []
    before = _with_made(present, wanted)
    rules = commands.transaction(_with_stale(wanted, before), before, rules_anew=rules_anew)
    yield from [Stage(rules, behind=made)] if rules else []
    cleared = tuple(_cleared(wanted, present))
    if cleared:
        yield Stage(cleared, behind=(*made, *rules))


def _from_nothing(wanted: Table, present: Table | None) -> Iterator[Stage]:
    """Where no rules are nobody asks anything; large sets are filled first all the same, in portions."""
    there = {nft_set.name: nft_set for nft_set in present.sets} if present else {}
    bulk = [s for s in wanted.sets if isinstance(s.elements, Addresses)]
    bulk = [s for s in bulk if s.name not in there or there[s.name].type == s.type]
    if sum(len(nft_set.elements) for nft_set in bulk) <= BULK:
        yield Stage(commands.transaction(wanted, present))
        return
    new = [s for s in bulk if s.name not in there]
    made = (f"add table inet {wanted.name}", *(commands.declaration(wanted.name, nft_set) for nft_set in new))
    yield Stage(made)
    changes = tuple(c for s in bulk if (c := commands.difference(s, there.get(s.name))).gone or c.new)
    yield from [Stage(changes=changes)] if changes else []
    filled = {nft_set.name: nft_set for nft_set in bulk}
    rest = tuple(s for s in (present.sets if present else ()) if s.name not in filled)
    before = replace(present or Table(wanted.name), sets=(*rest, *bulk))
    yield Stage(commands.transaction(wanted, before), behind=made)


def _made(wanted: Table, present: Table, new: list[NftSet]) -> Iterator[str]:
    """What is declared before anything asks for it; chains with their rules, for elements point to them soon."""
    name, chains = wanted.name, {chain.name for chain in present.chains}
    yield from (f"add counter inet {name} {c}" for c in wanted.counters if c not in set(present.counters))
    missing = [chain for chain in wanted.chains if not chain.hook and chain.name not in chains]
    yield from (f"add chain inet {name} {chain.name}" for chain in missing)
    yield from (commands.declaration(name, nft_set) for nft_set in new)
    for chain in missing:
        if chain.name.startswith(OF_IDENTITIES):
            yield from (f"add rule inet {name} {chain.name} {commands.rule_line(rule)}" for rule in chain.rules)


def _cleared(wanted: Table, present: Table) -> Iterator[str]:
    """What nobody asks for any more; sets first, for elements may point to chains and counters."""
    name = wanted.name
    yield from (f"delete {s.keyword} inet {name} {s.name}" for s in _stale_sets(wanted, present))
    yield from (f"delete chain inet {name} {c.name}" for c in _stale_chains(wanted, present))
    yield from (f"delete counter inet {name} {c}" for c in present.counters if c not in set(wanted.counters))


def _stale_sets(wanted: Table, present: Table) -> list[NftSet]:
    names = {nft_set.name for nft_set in wanted.sets}
    return [nft_set for nft_set in present.sets if nft_set.name not in names]


def _stale_chains(wanted: Table, present: Table) -> list[Chain]:
    names = {chain.name for chain in wanted.chains}
    return [chain for chain in present.chains if chain.name not in names]


def _with_made(present: Table, wanted: Table) -> Table:
    """The table with what is made; what stays is as it was."""
    there = {nft_set.name for nft_set in present.sets}
    chains = {chain.name for chain in present.chains}
    return replace(
        present,
        counters=tuple(dict.fromkeys((*present.counters, *wanted.counters))),
        sets=(*present.sets, *(nft_set for nft_set in wanted.sets if nft_set.name not in there)),
        chains=(*present.chains, *(Chain(c.name) for c in wanted.chains if not c.hook and c.name not in chains)),
    )


def _with_stale(wanted: Table, before: Table) -> Table:
    """What is wanted, with what goes only later: sets as they are, chains without rules."""
    return replace(
        wanted,
        counters=tuple(dict.fromkeys((*wanted.counters, *before.counters))),
        sets=(*wanted.sets, *_stale_sets(wanted, before)),
        chains=(*wanted.chains, *(replace(chain, rules=()) for chain in _stale_chains(wanted, before))),
    )


def _with_elements(nft_set: NftSet, of: NftSet | None) -> NftSet:
    return replace(nft_set, elements=of.elements) if of else nft_set


def _element_lines(name: str, wanted: NftSet, present: NftSet | None) -> Iterator[str]:
    fits = present is not None and present.type == wanted.type
    return commands.element_changes(name, wanted, present if fits else None)


def _gone(change: ElementChange | None) -> Iterator[tuple[str, str]]:
    """What goes, where it may be anything: a set of addresses holds addresses."""
    return iter(() if change is None or isinstance(change.gone, Addresses) else change.gone)
