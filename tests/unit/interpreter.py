"""What the kernel holds after the steps of a plan, worked out step by step; it refuses what the kernel would refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from agent import ruleset
from agent.addresses import Addresses, Family, parse_address
from agent.commands import declaration, render
from agent.desired import Desired
from agent.model import Chain, ElementChange, NftSet, Statement, Table
from agent.plan import (
    AddRoute,
    AddRule,
    Change,
    DeleteRoute,
    DeleteRule,
    Load,
    Observed,
    Plan,
    ReplaceRoute,
    SetSrcValidMark,
    Step,
)
from agent.ruleset import CLOSED, marks_closed
from tests.unit.values import read_back


def taken(step: Step, now: Observed, wanted: Desired | None) -> Observed:
    """What the kernel holds after a step, or AssertionError where it would refuse it.

    What the rendered text makes is not worked out here: the table wanted is read back.
    """
    match step:
        case AddRoute(added):
            assert added.key not in {item.key for item in now.routes}, f"EEXIST: {added}"
            return replace(now, routes=now.routes | {added})
        case ReplaceRoute(old, new):
            assert old.key == new.key, f"does not replace {old}, but adds: {new}"
            assert old in now.routes, f"nothing to replace: {old}"
            return replace(now, routes=now.routes - {old} | {new})
        case DeleteRoute(deleted):
            assert deleted in now.routes, f"ESRCH: {deleted}"
            return replace(now, routes=now.routes - {deleted})
        case AddRule(rule):
            assert rule not in now.rules, f"EEXIST: {rule}"
            return replace(now, rules=(*now.rules, rule))
        case DeleteRule(rule):
            assert rule in now.rules, f"ENOENT: {rule}"
            first = now.rules.index(rule)
            return replace(now, rules=now.rules[:first] + now.rules[first + 1 :])
        case SetSrcValidMark(link, on):
            assert on or link in now.src_valid_mark_ours, f"not ours: {link}"
            change = frozenset.union if on else frozenset.difference
            return replace(
                now,
                src_valid_mark=change(now.src_valid_mark, {link}),
                src_valid_mark_ours=change(now.src_valid_mark_ours, {link}),
            )
        case Change(name, changes):
            assert now.table, f"ENOENT: table {name}"
            assert now.table.name == name
            return replace(now, table=_changed(now.table, changes))
        case Load(name, commands):
            return _loaded(name, commands, now, wanted)


def _changed(table: Table, changes: Sequence[ElementChange]) -> Table:
    """The table with other elements, as one transaction makes it: what goes before what comes."""
    held = {item.name: dict(item.elements) for item in table.sets}
    targets = {f"goto {chain.name}" for chain in table.chains} | {f'"{name}"' for name in table.counters} | {""}
    for change in changes:
        for key, _ in change.gone:
            del held[change.set][key]
    for change in changes:
        for key, value in change.new:
            assert held[change.set].setdefault(key, value) is value, f"EEXIST: {key} in {change.set}"
            assert value in targets, f"ENOENT: {value}"
    changed = {change.set: change.key for change in changes}
    sets = []
    for item in table.sets:
        elements = item.elements
        if item.name in changed:
            assert (item.key, item.interval) == (changed[item.name], False)
            elements = tuple(held[item.name].items())
            if not item.value and item.key in {f"{family}_addr" for family in Family}:
                addresses = (int(parse_address(key)) for key, _ in elements)
                elements = Addresses.of(Family(item.key.removesuffix("_addr")), addresses)
        sets.append(replace(item, elements=elements))
    return replace(table, sets=tuple(sets))


def _loaded(name: str, commands: tuple[str, ...], now: Observed, wanted: Desired | None) -> Observed:
    if name == CLOSED:
        if not commands[-1] or commands == (f"delete table inet {name}",):
            assert now.closed is not None or commands[0].startswith("add "), f"ENOENT: table {name}"
            return replace(now, closed=None)
        rules = tuple(Statement("", comment) for comment in re.findall('comment "(.*)"', commands[-1]))
        return replace(now, closed=marks_closed(Table(name, chains=(Chain("leaving", rules),))))
    if commands == (f"delete table inet {name}",):
        if now.table and now.table.name == name:
            return replace(now, table=None)
        assert name in now.other_tables, f"ENOENT: table {name}"
        return replace(now, other_tables=tuple(item for item in now.other_tables if item != name))
    if commands == (f"add table inet {name}",):
        assert now.table, f"nothing to wake: table {name}"
        return replace(now, table=replace(now.table, dormant=False))
    if wanted and commands == (render(ruleset.table(wanted)),):
        assert now.table is None
        return replace(now, table=read_back(ruleset.table(wanted)))
    table = now.table
    for command in commands:
        if table is None:
            assert command == f"add table inet {name}", f"ENOENT: table {name}"
            table = Table(name)
        assert table.name == name
        table = _commanded(table, command, ruleset.table(wanted) if wanted else table)
    return replace(now, table=table)


def _commanded(  # noqa: PLR0912 - a case for each command
    table: Table, command: str, wanted: Table
) -> Table:
    """The table after one command; sets and hooks are made as they are wanted."""
    verb, kind, _, _, *rest = command.split(" ")
    chains = {chain.name: chain for chain in table.chains}
    sets = {item.name: item for item in table.sets}
    counters = dict.fromkeys(table.counters)
    (what, *_) = [*rest, ""]
    match (verb, kind):
        case ("add", "table"):
            pass
        case ("flush", "table"):
            chains = {key: replace(chain, rules=()) for key, chain in chains.items()}
        case ("flush", "chain"):
            chains[what] = replace(chains[what], rules=())
        case ("flush", "set" | "map"):
            sets[what] = replace(sets[what], elements=())
        case ("add", "counter"):
            counters[what] = None
        case ("delete", "counter"):
            del counters[what]
            assert not any(value == f'"{what}"' for item in sets.values() for _, value in item.elements), "EBUSY"
        case ("add", "chain"):
            assert what not in chains, f"EEXIST: {what}"
            (chain,) = (chain for chain in wanted.chains if chain.name == what)
            chains[what] = replace(chain, rules=(), about=())
        case ("delete", "chain"):
            del chains[what]
            assert not any(value == f"goto {what}" for item in sets.values() for _, value in item.elements), "EBUSY"
        case ("add", "set" | "map"):
            declared, _, words = command.partition(" elements = { ")
            declared += " }" if words else ""
            if what not in sets:
                # Or for the differences of one, while the rules change with elements of it.
                alike = [item for item in wanted.sets if what.startswith(item.name)]
                known = [*wanted.sets]
                known += (replace(item, name=what, value=value, size=0) for item in alike for value in ("", item.value))
                made = next(item for item in known if declaration(table.name, item) == declared)
                sets[what] = replace(made, elements=(), about=(), pending=())
            assert declaration(table.name, sets[what]) == declared, f"EEXIST: {what}"
            if words:
                sets = _with_elements(sets, what, (), _pairs(words.removesuffix(" }; }")), table)
        case ("delete", "set" | "map"):
            del sets[what]
        case ("delete", "element"):
            gone = _pairs(command.partition(" { ")[2].removesuffix(" }"))
            sets = _with_elements(sets, what, gone, (), table)
        case ("add", "rule"):
            chains[what] = replace(chains[what], rules=(*chains[what].rules, _rule(command)))
        case ("insert", "rule"):
            chains[what] = replace(chains[what], rules=(_rule(command), *chains[what].rules))
        case _:
            raise AssertionError(f"no command of ours: {command}")
    return replace(table, chains=tuple(chains.values()), sets=tuple(sets.values()), counters=tuple(counters))


Pairs = tuple[tuple[str, str], ...]


def _pairs(words: str) -> Pairs:
    return tuple((key, value) for key, _, value in (word.partition(" : ") for word in words.split(", ")))


def _with_elements(sets: dict[str, NftSet], name: str, gone: Pairs, new: Pairs, table: Table) -> dict[str, NftSet]:
    """The sets when elements of one, which may be of intervals here, have gone and come."""
    interval, key = sets[name].interval, sets[name].key
    hashes = {**sets, name: replace(sets[name], interval=False)}
    changed = _changed(replace(table, sets=tuple(hashes.values())), [ElementChange(name, key, gone, new)])
    return {item.name: replace(item, interval=interval) if item.name == name else item for item in changed.sets}


def _rule(command: str) -> Statement:
    """A rule of a command as it is read back."""
    return Statement("", command.rpartition(" comment ")[2].strip('"'))


def states(steps: Plan, now: Observed, wanted: Desired | None) -> Iterator[Observed]:
    """The kernel before the first step, and after each."""
    yield now
    for step in steps.steps:
        now = taken(step, now, wanted)
        yield now


def after(steps: Plan, now: Observed, wanted: Desired | None) -> Observed:
    *_, last = states(steps, now, wanted)
    return last
