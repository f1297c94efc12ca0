"""From one table to another: whoever is on its way through the rules meanwhile is whose it was, or is going to be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from itertools import islice

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent import layers, ruleset
from agent.addresses import Family, Prefix
from agent.desired import Desired, desire
from agent.kernel.nfset import portions
from agent.model import Kernel, Table
from agent.plan import Change, Load, Observed, Step, is_late, plan, unsettles
from tests.unit.interpreter import after, taken
from tests.unit.values import GATEWAY, identity, policy

#: The addresses are the last eight of these four bytes.
BASE, BITS = 10 << 24, 3
NAMES = ("a", "b", "c")
#: Who has which networks, as (address, length); who isn't named is no identity.
Owned = Mapping[str, frozenset[tuple[int, int]]]
Elements = Mapping[str, Mapping[str, str]]
networks = st.tuples(st.integers(0, 7), st.integers(0, BITS)).map(
    lambda network: (network[0] >> BITS - network[1] << BITS - network[1], network[1])
)


@st.composite
def owned(draw: st.DrawFn) -> Owned:
    """Each network is one's."""
    holders = draw(st.dictionaries(networks, st.sampled_from(NAMES), max_size=10))
    there = draw(st.sets(st.sampled_from(NAMES), min_size=1)) | set(holders.values())
    return {name: frozenset(each for each, holder in holders.items() if holder == name) for name in there}


@dataclass(frozen=True)
class Shape:
    """Above so many sources each identity has sets of its own, and how many these may be; and what else rules say."""

    many: int
    sets: int
    hook: int


#: Maps, sets, and intervals: where a handful of hashes costs more than one tree.
shapes = st.builds(Shape, st.sampled_from([0, 4096]), st.sampled_from([0, 32]), st.sampled_from([-145, -140]))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Owned, Owned, Shape, Shape]:
    """Two policies and their shapes; half of them have most in common."""
    one, shape = draw(owned()), draw(shapes)
    if draw(st.booleans()):
        return one, draw(owned()), shape, draw(shapes)
    gone = draw(st.sets(st.sampled_from(NAMES), max_size=1))
    less = {name: several - draw(st.frozensets(networks, max_size=3)) for name, several in one.items()}
    more = draw(st.sets(st.sampled_from(NAMES), max_size=2))
    new = {name: draw(st.frozensets(networks, max_size=2)) for name in more}
    held = frozenset[tuple[int, int]]().union(*less.values())
    other = dict(less)
    for name, several in new.items():
        other[name] = other.get(name, frozenset()) | several - held
        held |= several
    left = {name: several for name, several in other.items() if name not in gone}
    return one, left or other, shape, shape


#: What intervals cost, where nobody says otherwise.
INTERVAL = layers.INTERVAL


def desired(written: Owned, shape: Shape, patch: pytest.MonkeyPatch) -> Desired:
    """A policy of these, with its table made in this shape."""
    patch.setattr(layers, "MANY", shape.many)
    patch.setattr(layers, "SETS", shape.sets)
    patch.setattr(layers, "INTERVAL", layers.HASH if not (shape.many or shape.sets) else INTERVAL)
    identities = [
        identity(name, 1 + NAMES.index(name), f"vpn{name}", addresses=[], members=[*map(text, written[name])])
        for name in sorted(written)
    ]
    made = desire(policy(*identities, kernel=Kernel(hook_priority=shape.hook)), GATEWAY)
    ruleset.table(made)
    return made


def text(network: tuple[int, int]) -> str:
    return str(Prefix(Family.IPV4, BASE + network[0], 32 - BITS + network[1]))


def owner(written: Owned, address: int) -> str:
    """Whose an address is by its longest prefix; "": nobody's."""
    found = [
        (length, name)
        for name, several in written.items()
        for first, length in several
        if first == address >> BITS - length << BITS - length
    ]
    return max(found, default=(0, ""))[1]


# --- a packet on its way ---------------------------------------------------------------------------------------------

ASKED = re.compile(
    r"(?:ip saddr(?: & (?P<except_mask>\S+))? != @(?P<but>\S+) )?"
    r"ip saddr(?: & (?P<mask>\S+))? (?:vmap )?@(?P<set>\S+)(?: goto id-(?P<whose>\S+))?"
)


def asked(rules: Iterable[str]) -> list[re.Match[str]]:
    """The rules that ask for an IPv4 source."""
    found = [ASKED.fullmatch(rule) for rule in rules if rule.startswith("ip saddr")]
    assert None not in found
    return [each for each in found if each]


@dataclass(frozen=True)
class Moment:
    """What there is between two transactions: sets, chains that mark, the questions of the rules that are in force."""

    sets: Elements
    marking: frozenset[str]
    rules: list[re.Match[str]]


def met(moments: Sequence[Moment], address: int) -> set[str]:
    """To whom packets may come that begin at the first of these moments, and that find at each question the sets as
    they are at a moment which is no earlier than the one before.
    """
    whose, on_their_way = set[str](), {0}
    for rule in moments[0].rules:
        if rule["but"]:
            then = dict(_answers(moments, on_their_way, rule["but"], address, rule["except_mask"]))
            still = {when for when, value in then.items() if value is None}
            passed = {when for when, value in then.items() if value is not None}
        else:
            still, passed = on_their_way, set()
        then = dict(_answers(moments, still, rule["set"], address, rule["mask"]))
        for when, value in then.items():
            if value is None:
                passed.add(when)
            else:
                name = rule["whose"] or value.removeprefix("goto id-")
                # Of chains a packet sees what there was when it began, or before what leads there now.
                assert f"id-{name}" in moments[max(0, when - 1)].marking
                whose.add(name)
        on_their_way = passed
    return whose | {""} if on_their_way else whose


def _answers(
    moments: Sequence[Moment], since: set[int], name: str, address: int, mask: str | None
) -> Iterator[tuple[int, str | None]]:
    """What a set says to packets that ask it at each of the moments."""
    if since:
        for when in range(min(since), len(moments)):
            yield when, value_of(moments[when].sets.get(name, {}), address, mask)


def value_of(elements: Mapping[str, str], address: int, mask: str | None) -> str | None:
    """What a set has for an address."""
    key = ip_address(BASE + address & (int(ip_address(mask)) if mask else 0xFFFFFFFF))
    for words, value in elements.items():
        first, _, last = words.partition("-")
        inside = ip_address(first) <= key <= ip_address(last) if last else key in ip_network(words)  # type: ignore[operator]
        if inside:
            return value
    return None


def elements(table: Table) -> dict[str, dict[str, str]]:
    return {item.name: dict(item.elements) for item in table.sets}


def transactions(step: Step) -> Iterator[Step]:
    """A step, or the transactions that make it, which are to be small here."""
    if isinstance(step, Change):
        for number, part in enumerate(portions(step.changes, 4)):
            yield replace(step, changes=part, late=step.late and not number)
    else:
        yield step


def rules_of(step: Load, before: list[re.Match[str]]) -> list[re.Match[str]]:
    """The questions behind a step."""
    if not {"flush table inet idmark", "flush chain inet idmark source"} & {*step.commands}:
        return before
    start = "add rule inet idmark source "
    written = [line.removeprefix(start).rpartition(" comment ")[0] for line in step.commands if line.startswith(start)]
    return asked(written)


@dataclass
class Way:
    """What the kernel holds, and the questions of the rules that are in force."""

    now: Observed
    rules: list[re.Match[str]]

    @classmethod
    def of(cls, made: Desired) -> Way:
        """Where a policy is in force."""
        return cls(after(plan(made, Observed()), Observed(), made), questions(made))

    def go(self, wanted: Desired, most: int, owners: Sequence[Owned]) -> None:
        """To a policy, or so many transactions towards it. Meanwhile every address is one of its owners'."""
        run, unsettled = [self.moment()], True
        for step in islice((each for whole in plan(wanted, self.now).steps for each in transactions(whole)), most):
            if unsettled and is_late(step):
                check(run, owners)
                run, unsettled = run[-1:], False
            unsettled |= unsettles(step)
            behind = taken(step, self.now, wanted)
            assert self.now.table
            assert behind.table
            # A map that is deleted holds nothing any more (nft_map_deactivate() in net/netfilter/nf_tables_api.c).
            gone = {item.name: {} if item.value else dict(item.elements) for item in self.now.table.sets}
            if isinstance(step, Load):
                self.rules = rules_of(step, self.rules)
            self.now = behind
            now = self.moment()
            run.append(replace(now, sets={**gone, **now.sets}))
        check(run, owners)

    def moment(self) -> Moment:
        """What there is."""
        assert self.now.table
        marking = frozenset(chain.name for chain in self.now.table.chains if chain.rules)
        return Moment(elements(self.now.table), marking, self.rules)


def check(run: Sequence[Moment], owners: Sequence[Owned]) -> None:
    """Whoever is on its way at some of these moments is one of its owners'."""
    for address in range(1 << BITS):
        expected = {owner(each, address) for each in owners}
        for first in range(len(run)):
            assert met(run[first:], address) <= expected


def questions(made: Desired) -> list[re.Match[str]]:
    (source,) = (chain for chain in ruleset.table(made).chains if chain.name == "source")
    return asked(rule.text for rule in source.rules)


@given(pairs(), st.integers(0, 9), st.booleans())
@example(  # what a packet in a hundred thousand met
    (
        {"a": frozenset({(0, 0)}), "b": frozenset({(4, 2)})},
        {"a": frozenset({(0, 2)}), "b": frozenset({(0, 0), (0, 1)})},
        Shape(4096, 32, -145),
        Shape(4096, 32, -145),
    ),
    9,
    False,
)
@example(  # sets that no rule is changed for, several at a time
    (
        {"a": frozenset({(0, 0)}), "b": frozenset({(4, 1), (4, 2)})},
        {"a": frozenset({(0, 2)}), "b": frozenset({(0, 0), (0, 1)})},
        Shape(4096, 32, -145),
        Shape(4096, 32, -145),
    ),
    9,
    True,
)
@example(  # one that comes where another goes, with a third behind both
    (
        {"c": frozenset({(0, 2), (2, 2)}), "b": frozenset({(0, 0)}), "a": frozenset({(0, 3)})},
        {"c": frozenset({(2, 2)}), "b": frozenset({(0, 0)}), "a": frozenset({(0, 3), (1, 3)})},
        Shape(0, 32, -145),
        Shape(0, 32, -145),
    ),
    0,
    False,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_nobody_else_on_the_way(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Owned, Owned, Shape, Shape], cut: int, back: bool
) -> None:
    """While transactions are committed a packet goes on by the rules that it began with, and asks each set, one after
    the other, before one of them or behind it; but none is on its way at a late one that was at the one before. However
    that falls, it is whose it was by the policy before, or whose it is by the new one; and the chain that it
    comes to marks already. Also where a plan is cut short, and goes on, or back.
    """
    one, other, shape, another = pair
    before, wanted = desired(one, shape, monkeypatch), desired(other, another, monkeypatch)
    way = Way.of(before)
    way.go(wanted, cut, [one, other])
    way.go(before if back else wanted, 1000, [one, other])
    assert [each.string for each in way.rules] == [each.string for each in questions(before if back else wanted)]
    assert plan(before if back else wanted, way.now).steps == ()
