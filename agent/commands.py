"""A table as nft commands: the text that makes it from nothing, the transaction that makes it from what is there."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from agent.addresses import Addresses
from agent.model import Chain, ElementChange, NftSet, Statement, Table

#: A set with no more elements than these is flushed and filled again when one of them goes; a larger one when more
#: than `FEW` go, for nft looks for each from the start. Both in one transaction: no packet finds it empty.
SMALL, FEW = 4096, 64


def render(wanted: Table, header: Iterable[str] = ()) -> str:
    """The table as a file for `nft -f`, which may be loaded again and again.

    First everything is declared, which keeps what is there already (counters go on counting); then rules and
    elements are taken out and put in anew, all in one transaction: no packet meets anything in between.
    """
    name = wanted.name
    lines = [*_comment(header), "", "# Declared first, for elements may only point to chains that are there."]
    lines += [f"table inet {name} {{", *_declarations(wanted), "}", ""]
    lines += [
        "# Rules and elements are put in anew, counters go on: one transaction, no packet meets anything in between.",
        f"flush table inet {name}",
        *(f"flush {nft_set.keyword} inet {name} {nft_set.name}" for nft_set in wanted.sets),
        "",
        f"table inet {name} {{",
    ]
    blocks = [_set_lines(nft_set) for nft_set in wanted.sets] + [_documented(chain) for chain in wanted.chains]
    for number, block in enumerate(blocks):
        lines += [""] * bool(number) + [f"    {line}" if line else "" for line in block]
    return "\n".join([*lines, "}", ""])


def _declarations(wanted: Table) -> Iterator[str]:
    for name in wanted.counters:
        yield f"    counter {name} {{ }}"
    for chain in wanted.chains:
        if not chain.hook:
            yield f"    chain {chain.name} {{ }}"
    for nft_set in wanted.sets:
        yield f"    {nft_set.keyword} {nft_set.name} {{ {_type(nft_set)} }}"


def _type(nft_set: NftSet) -> str:
    value = f" : {nft_set.value}" if nft_set.value else ""
    size = f" size {nft_set.size};" if nft_set.size else ""
    return f"type {nft_set.key}{value};{' flags interval;' if nft_set.interval else ''}{size}"


def _set_lines(nft_set: NftSet) -> list[str]:
    lines = [*_comment(nft_set.about), f"{nft_set.keyword} {nft_set.name} {{", f"    {_type(nft_set)}"]
    lines += [f"    # {words}" for words in nft_set.pending]
    if nft_set.elements:
        # A million go in one piece, with the indentation that the table's block gives all lines but the first.
        words = _words(nft_set.elements, ",\n            ")
        lines += ["    elements = {", f"        {words},", "    }"]
    return [*lines, "}"]


def _words(elements: Sequence[tuple[str, str]], between: str = ", ") -> str:
    """Elements as nft reads them."""
    if isinstance(elements, Addresses):
        return elements.text(between)
    return between.join(f"{key} : {value}" if value else key for key, value in elements)


def _documented(chain: Chain) -> list[str]:
    return [*_comment(chain.about), *chain_lines(chain)]


def chain_lines(chain: Chain) -> list[str]:
    """A chain with its hook and rules, a line each."""
    lines = [f"chain {chain.name} {{"] + [f"    {chain.hook}"] * bool(chain.hook)
    lines += [f"    {rule_line(statement)}" for statement in chain.rules]
    return [*lines, "}"]


def rule_line(statement: Statement) -> str:
    """A rule as it stands in a chain, and behind `add rule`."""
    return f'{statement.text} comment "{statement.comment}"'


def _comment(paragraphs: Iterable[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        yield from textwrap.wrap(paragraph, 112, initial_indent="# ", subsequent_indent="# ") or ["#"]


def transaction(wanted: Table, present: Table | None, *, rules_anew: bool = False) -> tuple[str, ...]:
    """nft's commands that turn what the kernel has into what is wanted; none when nothing differs.

    A table that isn't there is made by the rendered text itself. What can't be changed in place (a hook, the type of
    a set) and what is nobody's any more is deleted, and every rule that might hold on to it goes first.
    """
    if present is None:
        return (render(wanted),)
    name = wanted.name
    chains = {chain.name: chain for chain in present.chains}
    sets = {nft_set.name: nft_set for nft_set in present.sets}
    # A thousand identities have as many chains, and five times as many counters: none is looked for among all others.
    types, hooks = {s.name: s.type for s in wanted.sets}, {c.name: c.hook for c in wanted.chains}
    unfit_sets = [s for s in present.sets if types.get(s.name) != s.type]
    unfit_chains = [c for c in present.chains if c.name not in hooks or hooks[c.name] != c.hook]
    fitting_sets = {s.name: s for s in present.sets if types.get(s.name) == s.type}
    fitting_chains = chains.keys() - {c.name for c in unfit_chains}
    stale_chains = [c.name for c in unfit_chains if c.name not in hooks]
    there, needed = set(present.counters), set(wanted.counters)
    rules_anew = rules_anew or bool(unfit_sets or unfit_chains) or _rules_differ(wanted, chains)
    commands = [f"flush table inet {name}"] * rules_anew
    # The kernel's own word for it: what is a map there may be wanted as a set.
    commands += [f"delete {sets[s.name].keyword} inet {name} {s.name}" for s in unfit_sets]
    commands += [f"delete chain inet {name} {c.name}" for c in unfit_chains if c.name not in stale_chains]
    commands += [f"add counter inet {name} {c}" for c in wanted.counters if c not in there]
    for chain in wanted.chains:
        if chain.name not in fitting_chains:
            commands.append(f"add chain inet {name} {chain.name}{f' {{ {chain.hook} }}' if chain.hook else ''}")
    for nft_set in wanted.sets:
        if nft_set.name in fitting_sets:
            commands += element_changes(name, nft_set, fitting_sets[nft_set.name])
        else:
            commands.append(declaration(name, nft_set, nft_set.elements))
    if rules_anew:
        commands += [line for chain in wanted.chains for line in rules(name, chain)]
    # Last, for elements may have pointed there.
    commands += [f"delete chain inet {name} {chain}" for chain in stale_chains]
    commands += [f"delete counter inet {name} {c}" for c in present.counters if c not in needed]
    return tuple(commands)


def rules(name: str, chain: Chain) -> Iterator[str]:
    """The commands that put a chain's rules behind those that are there."""
    return (f"add rule inet {name} {chain.name} {rule_line(rule)}" for rule in chain.rules)


def declaration(name: str, nft_set: NftSet, elements: Sequence[tuple[str, str]] = ()) -> str:
    """The command that makes a set; in one that is there it puts these elements, too.

    For `add element` and `delete element` libnftables reads every interval set of the host first, whosever it is (its
    src/cache.c, evaluate_cache_add() and evaluate_cache_del()), which may take seconds; for this it reads none.
    """
    words = f" elements = {{ {_words(elements)} }};" if elements else ""
    return f"add {nft_set.keyword} inet {name} {nft_set.name} {{ {_type(nft_set)}{words} }}"


def _rules_differ(wanted: Table, present: dict[str, Chain]) -> bool:
    """Whether a chain is missing or has other rules: by their comments in order, the digest being one of them."""
    return any(
        chain.name not in present
        or [rule.comment for rule in chain.rules] != [rule.comment for rule in present[chain.name].rules]
        for chain in wanted.chains
    )


def difference(wanted: NftSet, present: NftSet | None) -> ElementChange:
    """The elements of one set that differ."""
    want, have = wanted.elements, present.elements if present else ()
    if isinstance(want, Addresses) and (isinstance(have, Addresses) or not have):
        there = have if isinstance(have, Addresses) else Addresses(want.family)
        if want == there:
            return ElementChange(wanted.name, wanted.key, (), ())
        if not there:  # a million are not compared with none
            return ElementChange(wanted.name, wanted.key, there, want)
        return ElementChange(wanted.name, wanted.key, there.without(want), want.without(there))
    old, new = dict(have), dict(want)
    return ElementChange(
        wanted.name,
        wanted.key,
        # Sorted, for the kernel tells elements in no order, and a plan's text is the same for the same change.
        tuple(sorted((key, value) for key, value in old.items() if new.get(key) != value)),
        tuple((key, value) for key, value in new.items() if old.get(key) != value),
    )


def element_changes(name: str, wanted: NftSet, present: NftSet | None) -> Iterator[str]:
    """Commands for the elements of one set that differ. An element with a new value goes first."""
    change = difference(wanted, present)
    new = change.new
    if len(change.gone) > FEW or (change.gone and len(wanted.elements) <= SMALL):
        yield f"flush {wanted.keyword} inet {name} {wanted.name}"
        new = wanted.elements
    elif change.gone:
        yield _deletion(name, change)
    if new:
        yield declaration(name, wanted, new)


def change_commands(name: str, change: ElementChange) -> Iterator[str]:
    """A change of elements in nft's words, for people: it is made by netlink."""
    if change.gone:
        yield _deletion(name, change)
    if change.new:
        yield f"add element inet {name} {change.set} {{ {_words(change.new)} }}"


def _deletion(name: str, change: ElementChange) -> str:
    return f"delete element inet {name} {change.set} {{ {', '.join(key for key, _ in change.gone)} }}"
