"""From one nft table to another in stages, between which and in which no packet meets less than it should.

A packet is on its way through the rules while a transaction is committed: then it goes on by the old rules, and sees
of every set what it holds from then on (generations in net/netfilter/nf_tables_core.c and nf_tables_api.c). So what
new rules ask for is there before them, and what old rules ask for goes after them: later, when all packets are through
that were on their way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from agent import commands
from agent.addresses import Addresses
from agent.model import ADDRESSES, Chain, ElementChange, NftSet, Statement, Table

#: How the names of chains begin that elements lead to: they are filled before any element comes.
LED_TO = ("id-", "left-", "arrived-")
#: So many elements are not put in with the rules that ask for them, even where there were no rules before.
BULK = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """Elements of a table's sets, none of them intervals, that go and come; the rest is as of `Load`."""

    table: str
    changes: tuple[ElementChange, ...]
    late: bool = False
    marking: bool = True

    def lines(self) -> Iterator[str]:
        for change in self.changes:
            for command in commands.change_commands(self.table, change):
                yield f"{'-' if command.startswith('delete ') else '+'} nft {command}"

    def inverse(self) -> Change:
        changes = tuple(replace(each, gone=each.new, new=each.gone) for each in self.changes)
        return Change(self.table, changes, late=True)


@dataclass(frozen=True, slots=True)
class Load:
    """One nft transaction on a table. Its inverse is the table's listing from before: only who acts can take that.

    `behind` are commands of an earlier step, without which nothing can be said of these. `marking`: who is on his way
    meanwhile may be marked as before, or get another mark; `late`: it is for when nobody is on his way any more who was
    at a step like that.
    """

    table: str
    commands: tuple[str, ...]
    behind: tuple[str, ...] = ()
    late: bool = False
    marking: bool = True

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
    kept = _kept(wanted, present)
    as_wanted = {s.name: s for s, _ in kept}
    right = replace(present, sets=tuple(_with_elements(s, as_wanted.get(s.name)) for s in present.sets))
    if not commands.transaction(wanted, right, rules_anew=rules_anew):
        yield from _elements_alone(wanted.name, kept)
        return
    changes = [commands.difference(s, there) for s, there in kept if _is_layer(s)]
    changes = [change for change in changes if change and not _has_all_others(change)]
    if changes:
        yield from _by_differences(wanted, present, changes, rules_anew=rules_anew)
    else:
        yield from _rules(wanted, present, rules_anew=rules_anew)


def _kept(wanted: Table, present: Table) -> list[tuple[NftSet, NftSet]]:
    """The sets that stay, as they are wanted and as they are."""
    there = {nft_set.name: nft_set for nft_set in present.sets}
    return [(s, there[s.name]) for s in wanted.sets if s.name in there and there[s.name].type == s.type]


def _is_layer(nft_set: NftSet) -> bool:
    """Whether it is one of several that an address is looked for in, one after the other."""
    return nft_set.key in ADDRESSES and not nft_set.interval


def _rules(wanted: Table, present: Table, *, rules_anew: bool) -> Iterator[Change | Load]:
    """Where no set changes that rules go on asking for addresses: new ones are filled before any rule asks them, old
    ones go when none asks them any more. So do the elements of the others, of marks and links; but what a key stands
    for changes with the rules, for a mark may be about to mean somebody else.
    """
    name, there = wanted.name, {nft_set.name for nft_set in present.sets}
    new = [s for s in wanted.sets if s.name not in there]
    said = [commands.difference(s, each) for s, each in _kept(wanted, present) if s.key not in ADDRESSES]
    changes = [change for change in said if not _has_all_others(change)]
    coming, going = [change.coming for change in changes], [change.going for change in changes]
    made = tuple(_made(wanted, present, new))
    yield from _load(name, made, marking=False)
    yield from _change(name, [*(commands.difference(s, None) for s in new if not s.interval), *coming])
    intervals = (line for s in new if s.interval for line in commands.element_changes(name, s, None))
    yield from _load(name, intervals, behind=made)
    before = _with_made(
        replace(present, sets=_with_more(present.sets, {each.set: each.new for each in coming})), wanted
    )
    meanwhile = replace(wanted, sets=_with_more(wanted.sets, {each.set: each.gone for each in going}))
    rules = commands.transaction(_with_stale(meanwhile, before), before, rules_anew=rules_anew)
    yield from _load(name, rules, behind=made)
    gone = [*_change(name, going, late=True, marking=False)]
    yield from gone
    flushes = (line for step in gone for line in _looked_over(step, present))
    yield from _load(name, _cleared(wanted, present), behind=(*made, *rules, *flushes), late=True, marking=False)


def _with_more(sets: Iterable[NftSet], more: Mapping[str, Sequence[tuple[str, str]]]) -> tuple[NftSet, ...]:
    return tuple(replace(s, elements=(*s.elements, *more[s.name])) if more.get(s.name) else s for s in sets)


def _looked_over(step: Change | Load, table: Table) -> Iterator[str]:
    """What a step is where a later one is only looked over: elements that have gone lead nowhere any more."""
    if isinstance(step, Load):
        yield from step.commands
        return
    gone = {change.set for change in step.changes if change.gone}
    yield from (f"flush {s.keyword} inet {table.name} {s.name}" for s in table.sets if s.name in gone and s.value)


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
    for late, phase in _phases([*filter(None, changes)]):
        yield from _change(name, phase, late=late)
    yield from _load(name, lines)


def _phases(changes: Sequence[ElementChange]) -> Iterator[tuple[bool, Sequence[ElementChange]]]:
    """Changes in the order to make them in, and whether they are late: what a packet may meet partly done is not.

    Sets with one kind of addresses are asked one after the other. Who has missed a longer prefix which comes must not
    find a shorter one that comes with it: so they come one by one, the longest prefixes first, with the values that
    they take the place of. Then all goes that only goes, against that order: it is found, or what it hid.
    """
    ranks = Counter[str]()
    coming: list[list[ElementChange]] = []
    for change in changes:
        rank = ranks[change.key]
        ranks[change.key] += change.key in ADDRESSES
        coming += [[]] if rank == len(coming) else []
        coming[rank].append(change)
    if len(coming) < 2:
        yield False, changes
        return
    yield from ((number > 0, [change.but_going for change in phase]) for number, phase in enumerate(coming))
    going = ([change.going for change in phase] for phase in reversed(coming))
    yield from ((not number, phase) for number, phase in enumerate(filter(any, going)))


def _by_differences(
    wanted: Table, present: Table, changes: Sequence[ElementChange], *, rules_anew: bool
) -> Iterator[Change | Load]:
    """Where rules change, and with them sets that they go on asking for addresses.

    First to rules that ask for the differences, too, which are sets of their own and filled before: what comes is in
    there already, what goes is there no longer. While that is in force the sets themselves are changed, in portions,
    later, and no packet sees anything of it. Then to the rules that are wanted.
    """
    name, there = wanted.name, {nft_set.name: nft_set for nft_set in present.sets}
    taken = {nft_set.name for nft_set in (*present.sets, *wanted.sets)}
    differences = {change.set: _difference(there[change.set], change, taken) for change in changes}
    extra = [nft_set for pair in differences.values() for nft_set in pair if nft_set.elements]
    sets = [_with_elements(s, there[s.name] if s.name in differences else None) for s in wanted.sets]
    chains = tuple(replace(chain, rules=tuple(_asking(chain.rules, differences))) for chain in wanted.chains)
    # Elements that are about to go still lead there.
    left = [Chain(chain.name) for chain in _stale_chains(wanted, present) if chain.name.startswith(LED_TO)]
    asking = replace(wanted, sets=(*sets, *extra), chains=(*chains, *left))
    steps = [*_rules(asking, present, rules_anew=rules_anew), *_change(name, changes, late=True, marking=False)]
    yield from steps
    behind = tuple(line for step in steps for line in _looked_over(step, present))
    others = [new for old, new in zip(chains, wanted.chains, strict=True) if old != new]
    rules = [line for c in others for line in (f"flush chain inet {name} {c.name}", *commands.rules(name, c))]
    yield from _load(name, rules, behind)
    yield from _load(name, _cleared(wanted, asking), behind=(*behind, *rules), late=True, marking=False)


def _difference(nft_set: NftSet, change: ElementChange, taken: Container[str]) -> tuple[NftSet, NftSet]:
    """Sets of what comes into one, and of what goes."""
    coming, going = (_free(f"{change.set}-{word}", taken) for word in ("coming", "going"))
    gone = change.gone if isinstance(change.gone, Addresses) else tuple((key, "") for key, _ in change.gone)
    return NftSet(coming, change.key, nft_set.value, elements=change.new), NftSet(going, change.key, elements=gone)


def _free(name: str, taken: Container[str]) -> str:
    """A name that no set has, not even one that an apply has left which was cut short."""
    names = (f"{name}-{number}" for number in count(1))
    return name if name not in taken else next(each for each in names if each not in taken)


def _asking(rules: Iterable[Statement], differences: Mapping[str, tuple[NftSet, NftSet]]) -> Iterator[Statement]:
    """Rules that ask for an address in a set, with what comes and what goes of it in sets of their own, which their
    comments name: by these it is seen what rules are there.
    """
    for rule in rules:
        asking, _, rest = rule.text.partition("@")
        name, space, verdict = rest.partition(" ")
        text, comment = rule.text, rule.comment
        if name in differences:
            coming, going = differences[name]
            if coming.elements:
                yield Statement(f"{asking}@{coming.name}{space}{verdict}", f"{comment}, {coming.name}")
            if going.elements:
                text, comment = f"{asking.removesuffix('vmap ')}!= @{going.name} {text}", f"{comment}, not {going.name}"
        yield replace(rule, text=text, comment=comment)


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


def _load(
    name: str, lines: Iterable[str], behind: tuple[str, ...] = (), *, late: bool = False, marking: bool = True
) -> Iterator[Load]:
    """One transaction, if there is anything to do."""
    given = tuple(lines)
    if given:
        yield Load(name, given, behind, late, marking)


def _change(
    name: str, changes: Iterable[ElementChange], *, late: bool = False, marking: bool = True
) -> Iterator[Change]:
    """The changes that change something, if there are any."""
    real = tuple(filter(None, changes))
    if real:
        yield Change(name, real, late, marking)


def _made(wanted: Table, present: Table, new: list[NftSet]) -> Iterator[str]:
    """What is declared before anything asks for it; chains with their rules, for elements point to them soon. A plan
    that was cut short has left some empty, where no element leads yet.
    """
    name, chains, counters = wanted.name, {chain.name for chain in present.chains}, set(present.counters)
    yield from (f"add counter inet {name} {c}" for c in wanted.counters if c not in counters)
    missing = [chain for chain in wanted.chains if not chain.hook and chain.name not in chains]
    yield from (f"add chain inet {name} {chain.name}" for chain in missing)
    yield from (commands.declaration(name, nft_set) for nft_set in new)
    targets = {value for nft_set in present.sets if nft_set.value for _, value in nft_set.elements}
    full = {chain.name for chain in present.chains if chain.rules or f"goto {chain.name}" in targets}
    for chain in wanted.chains:
        if chain.name.startswith(LED_TO) and chain.name not in full:
            yield from commands.rules(name, chain)


def _cleared(wanted: Table, present: Table) -> Iterator[str]:
    """What nobody asks for any more; sets first, for elements may point to chains and counters."""
    name, counters = wanted.name, set(wanted.counters)
    yield from (f"delete {s.keyword} inet {name} {s.name}" for s in _stale_sets(wanted, present))
    yield from (f"delete chain inet {name} {c.name}" for c in _stale_chains(wanted, present))
    yield from (f"delete counter inet {name} {c}" for c in present.counters if c not in counters)


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


# --- back ------------------------------------------------------------------------------------------------------------


def replacement(name: str, listing: str) -> Load:
    """A table as it was listed in the place of what is there by that name; no listing, no table."""
    # `add` before `delete`: it goes whether it is there or not.
    return Load(name, (f"add table inet {name}", f"delete table inet {name}", listing))


def relisting(then: Table, listing: str, now: Table | None) -> Iterator[Load]:
    """A table as it was listed, with all that it was `then`, in the place of what is there `now`.

    No packet meets less meanwhile, and counters go on; but where a hook or a set's type is another now, which can't be
    changed in place, it is replaced.
    """
    name, types = then.name, {nft_set.name: nft_set.type for nft_set in then.sets}
    hooks = {chain.name: chain.hook for chain in then.chains}
    if (
        now is None
        or now.dormant != then.dormant
        or any(types.get(nft_set.name, nft_set.type) != nft_set.type for nft_set in now.sets)
        or any(hooks.get(chain.name, chain.hook) != chain.hook for chain in now.chains)
    ):
        yield replacement(name, listing)
        return
    flushes = (f"flush {s.keyword} inet {name} {s.name}" for s in now.sets if s.name in types)
    yield Load(name, (f"flush table inet {name}", *flushes, listing))
    yield from _load(name, _cleared(then, now), late=True)
