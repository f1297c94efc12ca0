"""From one nft table to another in stages, between which and in which no packet meets less than it should.

A packet is on its way through the rules while a transaction is committed: then it goes on by the old rules, and sees
of every set what it holds from then on (generations in net/netfilter/nf_tables_core.c and nf_tables_api.c). So what
new rules ask is there before them, and what old rules ask goes after them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from agent import commands
from agent.addresses import Addresses
from agent.model import Chain, ElementChange, NftSet, Statement, Table

#: How the names of chains begin that elements lead to: they are filled before any element comes.
LED_TO = ("id-", "left-", "arrived-")
#: So many elements are not put in with the rules that ask for them, even where there were no rules before.
BULK = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """Elements of a table's sets, none of them intervals, that go and come."""

    table: str
    changes: tuple[ElementChange, ...]

    def lines(self) -> Iterator[str]:
        for change in self.changes:
            for command in commands.change_commands(self.table, change):
                yield f"{'-' if command.startswith('delete ') else '+'} nft {command}"

    def inverse(self) -> Change:
        return Change(self.table, tuple(replace(each, gone=each.new, new=each.gone) for each in self.changes))


@dataclass(frozen=True, slots=True)
class Load:
    """One nft transaction on a table. Its inverse is the table's listing from before: only who acts can take that.

    `behind` are commands of an earlier step, without which nothing can be said of these.
    """

    table: str
    commands: tuple[str, ...]
    behind: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(self.commands) + "\n"

    def lines(self) -> Iterator[str]:
        for line in self.text.splitlines():
            words = line.strip()
            if words and not words.startswith("#"):
                yield f"{'-' if words.startswith(('delete ', 'flush ')) else '+'} nft {line}"


def stages(wanted: Table, present: Table | None, *, rules_anew: bool) -> Iterator[Change | Load]:
    """What to do, in order; nothing if the tables are the same."""
    if present is None or not present.chains:
        yield from _from_nothing(wanted, present)
        return
    name = wanted.name
    there = {nft_set.name: nft_set for nft_set in present.sets}
    kept = {s.name: s for s in wanted.sets if s.name in there and there[s.name].type == s.type}
    right = replace(present, sets=tuple(_with_elements(s, kept.get(s.name)) for s in present.sets))
    if not commands.transaction(wanted, right, rules_anew=rules_anew):
        yield from _elements_alone(name, [(nft_set, there[nft_set.name]) for nft_set in kept.values()])
        return
    heavy = [
        (nft_set, change)
        for nft_set in kept.values()
        if isinstance(nft_set.elements, Addresses)
        and ((change := commands.difference(nft_set, there[nft_set.name])).gone or change.new)
    ]
    # A set is flushed and filled again when something of it goes.
    if sum(len(s.elements) + len(there[s.name].elements) if c.gone else len(c.new) for s, c in heavy) > BULK:
        yield from _by_differences(wanted, present, heavy, rules_anew=rules_anew)
        return
    # What stays changes with the rules: before them it may hide what they don't ask yet, or be said of marks that are
    # about to mean somebody else; after them what was there may be missing.
    new = [s for s in wanted.sets if s.name not in there]
    made = tuple(_made(wanted, present, new))
    yield from _load(name, made)
    yield from _change(name, [commands.difference(s, None) for s in new if not s.interval])
    intervals = (line for s in new if s.interval for line in commands.element_changes(name, s, None))
    yield from _load(name, intervals, behind=made)
    before = _with_made(present, wanted)
    rules = commands.transaction(_with_stale(wanted, before), before, rules_anew=rules_anew)
    yield from _load(name, rules, behind=made)
    yield from _load(name, _cleared(wanted, present), behind=(*made, *rules))


def _elements_alone(name: str, kept: Iterable[tuple[NftSet, NftSet]]) -> Iterator[Change | Load]:
    """Where all else is right: the elements of sets, as they are wanted and as they are."""
    changes, lines = list[ElementChange](), list[str]()
    for wanted, present in kept:
        change = commands.difference(wanted, present)
        # Intervals change in nft's way, and somebody's element for all others, *, which has no key.
        if wanted.interval or _has_all_others(change):
            lines += commands.element_changes(name, wanted, present)
        else:
            changes.append(change)
    yield from _change(name, changes)
    yield from _load(name, lines)


def _by_differences(
    wanted: Table, present: Table, heavy: Sequence[tuple[NftSet, ElementChange]], *, rules_anew: bool
) -> Iterator[Change | Load]:
    """Where rules change, and with them too many elements of sets that stay for one transaction.

    First to rules that ask for the differences, too, which are sets of their own and filled before: what comes is in
    there already, what goes is there no longer. While that is in force the sets themselves are changed, in portions,
    and no packet sees anything of it. Then to the rules that are wanted.
    """
    taken = {nft_set.name for nft_set in (*present.sets, *wanted.sets)}
    differences: dict[str, tuple[NftSet, NftSet]] = {}
    for nft_set, change in heavy:
        coming, going = (_free(f"{nft_set.name}-{word}", taken) for word in ("coming", "going"))
        differences[nft_set.name] = (
            NftSet(coming, nft_set.key, elements=change.new),
            NftSet(going, nft_set.key, elements=change.gone),
        )
    after = (*wanted.sets, *(each for pair in differences.values() for each in pair))
    there = {nft_set.name: nft_set for nft_set in present.sets}
    before = tuple(_with_elements(each, there[each.name]) if each.name in differences else each for each in after)
    chains = tuple(replace(chain, rules=tuple(_asking(chain.rules, differences))) for chain in wanted.chains)
    first = [*stages(replace(wanted, sets=before, chains=chains), present, rules_anew=rules_anew)]
    yield from first
    yield from _change(wanted.name, [change for _, change in heavy])
    behind = tuple(line for step in first if isinstance(step, Load) for line in step.commands)
    for step in stages(wanted, replace(wanted, sets=after, chains=chains), rules_anew=True):
        yield replace(step, behind=(*behind, *step.behind)) if isinstance(step, Load) else step


def _free(name: str, taken: Container[str]) -> str:
    """A name that no set has, not even one that an apply has left which was cut short."""
    names = (f"{name}-{number}" for number in count(1))
    return name if name not in taken else next(each for each in names if each not in taken)


def _asking(rules: Iterable[Statement], differences: Mapping[str, tuple[NftSet, NftSet]]) -> Iterator[Statement]:
    """Rules that ask for an address in a set, with what comes and what goes of it in sets of their own."""
    for rule in rules:
        address, _, rest = rule.text.partition("@")
        name, _, verdict = rest.partition(" ")
        if name in differences:
            coming, going = differences[name]
            yield Statement(f"{address}@{coming.name} {verdict}", f"{rule.comment}, coming")
            yield replace(rule, text=f"{address}!= @{going.name} {rule.text}")
        else:
            yield rule


def _has_all_others(change: ElementChange) -> bool:
    """Whether an element goes that has no key; a set of addresses has none of those."""
    return not isinstance(change.gone, Addresses) and any(key == "*" for key, _ in change.gone)


def _from_nothing(wanted: Table, present: Table | None) -> Iterator[Change | Load]:
    """Where no rules are nobody asks anything; large sets are filled first all the same, in portions."""
    name, there = wanted.name, {nft_set.name: nft_set for nft_set in present.sets} if present else {}
    bulk = [s for s in wanted.sets if isinstance(s.elements, Addresses)]
    bulk = [s for s in bulk if s.name not in there or there[s.name].type == s.type]
    if sum(len(nft_set.elements) for nft_set in bulk) <= BULK:
        yield from _load(name, commands.transaction(wanted, present))
        return
    new = [s for s in bulk if s.name not in there]
    made = (f"add table inet {name}", *(commands.declaration(name, nft_set) for nft_set in new))
    yield from _load(name, made)
    yield from _change(name, [commands.difference(s, there.get(s.name)) for s in bulk])
    filled = {nft_set.name for nft_set in bulk}
    rest = tuple(s for s in there.values() if s.name not in filled)
    before = replace(present or Table(name), sets=(*rest, *bulk))
    yield from _load(name, commands.transaction(wanted, before), behind=made)


def _load(name: str, lines: Iterable[str], behind: tuple[str, ...] = ()) -> Iterator[Load]:
    """One transaction, if there is anything to do."""
    given = tuple(lines)
    if given:
        yield Load(name, given, behind)


def _change(name: str, changes: Iterable[ElementChange]) -> Iterator[Change]:
    """The changes that change something, if there are any."""
    real = tuple(change for change in changes if change.gone or change.new)
    if real:
        yield Change(name, real)


def _made(wanted: Table, present: Table, new: list[NftSet]) -> Iterator[str]:
    """What is declared before anything asks for it; chains with their rules, for elements point to them soon."""
    name, chains = wanted.name, {chain.name for chain in present.chains}
    yield from (f"add counter inet {name} {c}" for c in wanted.counters if c not in set(present.counters))
    missing = [chain for chain in wanted.chains if not chain.hook and chain.name not in chains]
    yield from (f"add chain inet {name} {chain.name}" for chain in missing)
    yield from (commands.declaration(name, nft_set) for nft_set in new)
    for chain in missing:
        if chain.name.startswith(LED_TO):
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
