"""A plan's steps: what differs and nothing else, in an order in which nothing is ever open."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent import reconcile, ruleset
from agent.addresses import Addresses, Family, Prefix, Prefixes
from agent.desired import Desired, desire, detours
from agent.kernel import passage
from agent.layers import MANY
from agent.model import (
    GOTO,
    LOOKUP,
    METRIC_LAST,
    NOP,
    UNREACHABLE,
    ElementChange,
    Facts,
    Fwmark,
    Identity,
    Kernel,
    Link,
    NftSet,
    Policy,
    Probe,
    Route,
    Rule,
    Table,
)
from agent.plan import (
    FORMER,
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
    plan,
    removal,
)
from agent.reconcile import Seams
from tests.unit.interpreter import after, states, taken
from tests.unit.values import (
    GATEWAY,
    INSIDE,
    LAN,
    LO,
    OUTSIDE,
    VPN,
    WAN,
    host,
    hosts,
    identity,
    last_route,
    link,
    observations,
    policies,
    policy,
    read_back,
    route,
)

NOTHING = Observed()
BOTH = desire(policy(INSIDE, OUTSIDE), GATEWAY)
IN_FORCE = after(plan(BOTH, NOTHING), NOTHING, BOTH)
#: The first rule of a mark.
MARKED = next(rule for rule in IN_FORCE.rules if rule.fwmark)

# --- laws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is wanted, what was wanted before, and what the kernel has."""

    wanted: Desired
    before: Desired
    observed: Observed


@st.composite
def cases(draw: st.DrawFn) -> Case:
    wanted, before = (desire(draw(policies()), draw(hosts())) for _ in range(2))
    return Case(wanted, before, draw(observations(wanted, before)))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Desired, Desired]:
    """Twice the same policy, on a host that has changed; or two policies."""
    written = draw(policies())
    other = draw(st.just(written) | policies())
    return desire(written, draw(hosts())), desire(other, draw(hosts()))


@given(cases())
def test_second_pass_is_empty(case: Case) -> None:
    """Whatever the kernel had, after a plan's steps there is nothing left to do."""
    left = after(plan(case.wanted, case.observed), case.observed, case.wanted)
    assert plan(case.wanted, left).steps == ()
    rules = [rule for rule in left.rules if not refuses_former(rule)]
    assert (left.routes, frozenset(rules)) == (case.wanted.routes, case.wanted.rules)
    assert len(rules) == len(case.wanted.rules)


@given(changes())
def test_looked_over_beforehand(change: tuple[Desired, Desired]) -> None:
    """What nft is going to be told stands as one transaction, behind what it is told before, while nothing is done."""
    before, wanted = change
    assume(before.policy.kernel.nft_table == wanted.policy.kernel.nft_table)
    now = after(plan(before, NOTHING), NOTHING, before)
    for step in plan(wanted, now).steps:
        if isinstance(step, Load):
            taken(Load(step.table, (*step.behind, *step.commands)), now, wanted)


@given(cases())
def test_only_what_differs(case: Case) -> None:
    """What is there and wanted is touched by no step: it is neither deleted nor put in again."""
    kept_routes = case.wanted.routes & case.observed.routes
    kept_rules = case.wanted.rules & set(case.observed.rules)
    for now in states(plan(case.wanted, case.observed), case.observed, case.wanted):
        assert now.routes >= kept_routes
        assert set(now.rules) >= kept_rules


@given(cases())
def test_foreign_things_survive(case: Case) -> None:
    """A plan adds only what is wanted, and deletes only what was seen as ours and is not wanted."""
    ours = {case.wanted.policy.kernel.nft_table, *case.observed.other_tables, ruleset.CLOSED}
    for step in plan(case.wanted, case.observed).steps:
        match step:
            case AddRoute(added):
                assert added in case.wanted.routes
            case ReplaceRoute(old, new):
                assert old in case.observed.routes - case.wanted.routes
                assert new in case.wanted.routes
            case DeleteRoute(deleted):
                assert deleted in case.observed.routes - case.wanted.routes
            case AddRule(rule):
                assert rule in case.wanted.rules or refuses_former(rule)
            case DeleteRule(rule):
                assert rule not in case.wanted.rules or case.observed.rules.count(rule) > 1
            case SetSrcValidMark(link, on):
                assert link in (case.wanted.src_valid_mark if on else case.observed.src_valid_mark_ours)
            case Load(table, _) | Change(table, _):
                assert table in ours


@given(cases())
def test_removal_takes_everything(case: Case) -> None:
    """After a removal nothing of ours is there; what src_valid_mark somebody else set still is."""
    left = after(removal(case.observed), case.observed, None)
    theirs = case.observed.src_valid_mark - case.observed.src_valid_mark_ours
    assert left == Observed(src_valid_mark=theirs)
    assert removal(left).steps == ()


def refuses_former(rule: Rule) -> bool:
    """Whether a rule refuses what this host sends from an address that was an identity's."""
    return (rule.family, rule.action, rule.iif) == (Family.IPV6, UNREACHABLE, "lo")


def is_guard(rule: Rule) -> bool:
    """Whether a rule is about members that nobody has marked."""
    return rule.action != LOOKUP and not refuses_former(rule)


def turns(step: Step, case: Case) -> bool:
    """Whether a step may open a road in the place of another: by a link that its table has had none by."""
    if not isinstance(step, ReplaceRoute):
        return False
    ways = {(item.table, item.family, hop.link) for item in case.observed.routes for hop in item.hops}
    return any((step.new.table, step.new.family, hop.link) not in ways for hop in step.new.hops)


def place(step: Step) -> float:
    """The place of a kind of step in a plan: make before break."""
    match step:
        case SetSrcValidMark(_, on):
            return 0 if on else 6
        case AddRoute(_, opening):
            return 3.5 if opening else 1
        case ReplaceRoute():
            return 1
        case AddRule(rule):
            return 5.7 if is_guard(rule) else 2
        case Load(name, commands):
            # What wakes a table, or closes an identity for a while, comes before roads are touched.
            closing = name == ruleset.CLOSED and commands[-1] != ""
            return 0 if closing or commands == (f"add table inet {name}",) else 3
        case Change():
            return 3
        case DeleteRule(rule):
            return 0.5 if is_guard(rule) else 4
        case DeleteRoute(_, closing):
            return 2.5 if closing else 5


@given(cases())
def test_make_before_break(case: Case) -> None:
    """Routes, then rules, then marks; and backwards when taking away. Roads close before marks change, and may open
    behind them.

    When roads change hands the new marks come last, but for the sysctls: nothing is left then of the old roads.
    """
    places = [place(step) for step in plan(case.wanted, case.observed).steps if not turns(step, case)]
    if case.observed.table is None:  # where nobody marks anything, members are refused from the beginning to the end
        places = [{0.5: 5.7, 5.7: 0.5}.get(number, number) for number in places]
    handover = [5.5 if number == 3 else number for number in places]
    assert places == sorted(places) or handover == sorted(handover)
    places = [place(step) for step in removal(case.observed).steps]
    assert places == sorted(places)


@given(policies(), hosts(), hosts())
def test_no_handover_on_one_s_own_road(written: Policy, one: Facts, other: Facts) -> None:
    """A host that only changes its routes and addresses breaks nothing before it makes: no mark is ever closed."""
    before, wanted = desire(written, one), desire(written, other)
    now = after(plan(before, NOTHING), NOTHING, before)
    steps = plan(wanted, now).steps
    places = [place(step) for step in steps if not turns(step, Case(wanted, before, now))]
    assert places == sorted(places)
    assert not [step for step in steps if isinstance(step, Load) and "closed while" in step.text]


@given(changes())
def test_never_open(change: tuple[Desired, Desired]) -> None:
    """On the way from nothing to a policy, to another one, and to nothing again, no table is open at any step.

    Where a rule or a mark points to a table in a family, that table's last route is there, and a mark has its rule;
    but for a table that the policy before or after wants open (`when_down` ends in main).
    """
    now, marked = NOTHING, None
    for desired in (*change, None):
        open_tables = {pair for each in (marked, desired) if each for pair in _open(each)}
        now = _seen_by(desired, now)
        for state in states(plan(desired, now) if desired else removal(now), now, desired):
            now = state
            for rule in (rule for rule in now.rules if rule.action == LOOKUP):
                closed = last_route(rule.family, rule.table) in now.routes
                assert closed or (rule.family, rule.table) in open_tables, f"falls through to main: {rule}"
            looked_for = {(rule.family, rule.fwmark) for rule in now.rules}
            for standing in (standing for each in _in_force(now, marked, desired) for standing in each.standings):
                for family in standing.families:
                    closed = _closed_for_a_while(now, standing.identity.fwmark)
                    assert closed or (family, standing.identity.fwmark) in looked_for, "a mark without its rule"
        marked = desired


@given(changes())
def test_guards_shut_out_nobody_else(change: tuple[Desired, Desired]) -> None:
    """On the way from nothing to a policy, to another one, and to nothing again: whenever members without a mark are
    refused, their packets are marked, or there was no table to begin with; and what the host itself sends goes around.
    """
    now, marked = NOTHING, None
    for desired in (*change, None):
        now = start = _seen_by(desired, now)
        for state in states(plan(desired, now) if desired else removal(now), now, desired):
            now = state
            for rule in (rule for rule in now.rules if rule.unmarked):
                around = [each for each in now.rules if (each.action, each.family) == (GOTO, rule.family)]
                targets = {each.priority for each in now.rules if (each.action, each.family) == (NOP, rule.family)}
                assert any(each.priority < rule.priority < each.target in targets for each in around)
                assert start.table is None or any(
                    rule.source in each.policy.identity(standing.identity.name).members
                    for each in _in_force(now, marked, desired)
                    for standing in each.standings
                ), f"nobody marks {rule.source}"
        marked = desired


@given(changes())
def test_never_by_another_link(change: tuple[Desired, Desired]) -> None:
    """On the way from one policy to another no mark leads out by a link that its ruleset doesn't allow.

    Unless it is closed in that ruleset meanwhile: enforcement, which would drop these packets, may be off.
    """
    before, wanted = change
    # Under another name the former table stays as it is until the new one is there.
    assume(before.policy.kernel.nft_table == wanted.policy.kernel.nft_table)
    now = after(plan(before, NOTHING), NOTHING, before)
    for state in states(plan(wanted, now), now, wanted):
        for desired in _in_force(state, before, wanted):
            _assert_own_roads(state, desired)


TRANSLATED = identity("inside", 1, "vpn0", members=["10.9.0.0/24", "2001:db8:9::/64"], masquerade=True)
#: A tunnel as it comes and goes: its link, then its addresses, in either order, and another one.
TUNNELS = (
    VPN,
    replace(VPN, addresses=VPN.addresses[:1]),
    replace(VPN, addresses=VPN.addresses[1:]),
    replace(VPN, addresses=()),
    replace(VPN, addresses=tuple(replace(item, address=item.address + 1) for item in VPN.addresses)),
    None,
)
ROADS = (
    policy(TRANSLATED, OUTSIDE),
    policy(replace(TRANSLATED, when_down="outside"), OUTSIDE),
    policy(replace(TRANSLATED, id=2), replace(OUTSIDE, id=1, when_down="inside")),
    policy(replace(OUTSIDE, link="vpn0", name="other"), replace(TRANSLATED, link="wan")),
)


@pytest.mark.parametrize("after_tunnel", TUNNELS, ids=str)
@pytest.mark.parametrize("before_tunnel", TUNNELS, ids=str)
def test_never_by_a_road_without_translation(before_tunnel: Link | None, after_tunnel: Link | None) -> None:
    """On the way from one policy or host to another no member leaves by a link that no rule translates for yet, or any
    more: the connection would stay as it began. Unless it is so before or after, too.
    """
    hosts_of = [
        replace(GATEWAY, links=(*(link for link in GATEWAY.links if link != VPN), *filter(None, [tunnel])))
        for tunnel in (before_tunnel, after_tunnel)
    ]
    for policies_of in itertools.product(ROADS, repeat=2):
        before, wanted = (desire(each, there) for each, there in zip(policies_of, hosts_of, strict=True))
        now = after(plan(before, NOTHING), NOTHING, before)
        untranslated = {each: _untranslated(each) for each in (before, wanted)}
        *way, last = states(plan(wanted, now), now, wanted)
        bare = {*_taken(now, untranslated[before]), *_taken(last, untranslated[wanted])}
        for state in way:
            for desired in _in_force(state, before, wanted):
                assert bare.issuperset(_taken(state, untranslated[desired]))


TWO_WANS = replace(GATEWAY, links=(*GATEWAY.links, replace(WAN, name="wan2", addresses=())))
KEPT = replace(TRANSLATED, when_down="outside")
THIRD = identity("third", 3, "wan2", members=["10.7.0.0/16"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(policy(TRANSLATED, OUTSIDE), policy(TRANSLATED, replace(OUTSIDE, link="wan2")), id="another-link"),
        pytest.param(policy(KEPT, OUTSIDE), policy(TRANSLATED, OUTSIDE), id="detour-goes"),
        pytest.param(policy(TRANSLATED, OUTSIDE), policy(KEPT, OUTSIDE), id="detour-comes"),
        pytest.param(
            policy(KEPT, OUTSIDE, replace(THIRD, when_down="outside")),
            policy(TRANSLATED, OUTSIDE, THIRD),
            id="detours-go",
        ),
        pytest.param(
            policy(TRANSLATED, OUTSIDE, THIRD),
            policy(TRANSLATED, replace(OUTSIDE, id=3), replace(THIRD, id=2)),
            id="ids-of-others-exchanged",
        ),
    ],
)
def test_who_keeps_his_road_goes_on(one: Policy, other: Policy) -> None:
    """Whatever roads of others begin and end, change hands or are looked to: who keeps his own is closed at no step."""
    for before, wanted in itertools.permutations([desire(one, TWO_WANS), desire(other, TWO_WANS)]):
        now = after(plan(before, NOTHING), NOTHING, before)
        for state in states(plan(wanted, now), now, wanted):
            assert not _closed_for_a_while(state, TRANSLATED.fwmark)
            assert [_way_out(state, family, TRANSLATED.fwmark) for family in Family] == [{"vpn0"}, {"vpn0"}]


IPV4_ALONE = replace(
    TRANSLATED, members=Prefixes.of([Prefix.parse("10.9.0.0/24")]), addresses=(ip_address("192.0.2.130"),)
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(policy(OUTSIDE), policy(OUTSIDE, TRANSLATED), id="identity"),
        pytest.param(policy(OUTSIDE, IPV4_ALONE), policy(OUTSIDE, TRANSLATED), id="family"),
    ],
)
def test_marks_come_and_go_on_open_roads(one: Policy, other: Policy) -> None:
    """Whose marks come has his road before, and whose marks go has it for as long: main carries them on either side."""
    for before, wanted in itertools.permutations([desire(one, GATEWAY), desire(other, GATEWAY)]):
        steps = plan(wanted, after(plan(before, NOTHING), NOTHING, before)).steps
        assert not [step for step in steps if isinstance(step, AddRoute) and step.opening]
        assert not [step for step in steps if isinstance(step, DeleteRoute) and step.closing]


def test_one_road_for_another() -> None:
    """Where no rule changes one road ends when the other is there: two probes change their minds in one pass."""
    probe = Probe(ip_address("192.0.2.53"), every=2.0, fail_after=3)
    written = policy(replace(KEPT, probe=probe), OUTSIDE)
    tunnel = replace(VPN, addresses=tuple(replace(item, length=item.address.max_prefixlen) for item in VPN.addresses))
    there = replace(GATEWAY, links=(LO, WAN, tunnel, LAN), routes=GATEWAY.routes)
    before, wanted = (desire(written, there, {name: "its probe"}) for name in ("inside", "outside"))
    now = after(plan(before, NOTHING), NOTHING, before)
    assert [_way_out(now, family, KEPT.fwmark) for family in Family] == [{"wan"}, {"wan"}]
    for state in states(plan(wanted, now), now, wanted):
        assert all(_way_out(state, family, KEPT.fwmark) for family in Family)


def test_default_behind_the_rules() -> None:
    """A default by a link whose networks are there opens a road, too: it comes behind the rules that the address of
    then is in, as the networks do where the link is new.
    """
    inside = replace(TRANSLATED, next_hop="auto", addresses=None)
    default = "0.0.0.0/0 via 192.0.2.129 dev vpn0 metric 50"
    network = "192.0.2.128/25 dev vpn0"
    moved = replace(VPN, addresses=(replace(VPN.addresses[0], address=ip_address("192.0.2.131")), *VPN.addresses[1:]))
    before = desire(policy(inside), host(LO, VPN, LAN, routes=(network,)))
    wanted = desire(policy(inside), host(LO, moved, LAN, routes=(network, default)))
    steps = plan(wanted, after(plan(before, NOTHING), NOTHING, before)).steps
    rules = [number for number, step in enumerate(steps) if isinstance(step, Load) and "192.0.2.131" in step.text]
    (opening,) = (number for number, step in enumerate(steps) if isinstance(step, AddRoute) and step.opening)
    assert rules
    assert max(rules) < opening


def test_rules_wait_for_who_has_taken_a_road_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of a road and the rules that it needed all packets are through; so it is on the way back."""
    before = desire(policy(TRANSLATED), host(LO, VPN, LAN))
    wanted = desire(policy(TRANSLATED), host(LO, replace(VPN, addresses=()), LAN))
    now = after(plan(before, NOTHING), NOTHING, before)
    taken_steps = list[Step | None]()
    monkeypatch.setattr(passage, "wait", lambda: taken_steps.append(None))
    monkeypatch.setattr(reconcile, "_take", lambda step, _: taken_steps.append(step))
    # What has been waited for before a road ends doesn't count.
    reconcile.mend(Plan((DeleteRule(MARKED), *plan(wanted, now).steps)), cast(Seams, None))
    ends = [number for number, step in enumerate(taken_steps) if isinstance(step, DeleteRoute) and step.closing]
    rules = [number for number, step in enumerate(taken_steps) if isinstance(step, Load | Change)]
    assert ends
    assert None in taken_steps[max(ends) : min(rules)]


Road = tuple[Identity, Family, str]


def _untranslated(desired: Desired) -> set[Road]:
    """Identities whose members are to be translated, but by a family and a link are not."""
    rules = [rule for chain in ruleset.table(desired).chains if chain.name == "srcnat" for rule in chain.rules]
    return {
        (standing.identity, family, road.link)
        for standing in desired.standings
        if standing.identity.masquerade
        for family in standing.families
        for road in (standing.identity, *detours(desired.policy, standing.identity)[0])
        if not any(
            rule.comment.startswith(f"members of {standing.identity.name} leave by {road.link} as ")
            and f" snat {family.nft} " in rule.text
            for rule in rules
        )
    }


def _taken(now: Observed, roads: set[Road]) -> Iterator[tuple[str, Family, str]]:
    """Those that a mark leads to, if it isn't closed."""
    for who, family, road in roads:
        tables = {rule.table for rule in now.rules if (rule.family, rule.fwmark) == (family, who.fwmark)}
        routes = (item for item in now.routes if item.family is family and item.table in tables)
        if not _closed_for_a_while(now, who.fwmark) and road in {hop.link for item in routes for hop in item.hops}:
            yield who.name, family, road


def _kernel(**changes: int | str) -> Kernel:
    return Kernel(enforce=False, **changes)  # type: ignore[arg-type]


def _on(kernel: Kernel, **roads: tuple[int, str]) -> Desired:
    """Two identities, each with its id and its link."""
    own = {"inside": ["192.0.2.130"], "outside": ["203.0.113.2"]}
    identities = [
        identity(name, number, link, addresses=own[name], kernel=kernel) for name, (number, link) in roads.items()
    ]
    return desire(policy(*identities, kernel=kernel), GATEWAY)


FIRST = _on(_kernel(), inside=(1, "vpn0"), outside=(2, "wan"))


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(_on(_kernel(), inside=(2, "vpn0"), outside=(1, "wan")), id="ids-exchanged"),
        pytest.param(_on(_kernel(), inside=(1, "wan"), outside=(2, "vpn0")), id="links-exchanged"),
        pytest.param(_on(_kernel(), inside=(1, "vpn1"), outside=(2, "wan")), id="to-an-absent-link"),
        pytest.param(_on(_kernel(), inside=(2, "vpn0")), id="id-of-another-that-is-gone"),
        pytest.param(_on(_kernel(table_base=4001), inside=(1, "vpn0"), outside=(2, "wan")), id="tables-by-one"),
        pytest.param(_on(_kernel(table_base=5000), inside=(1, "wan"), outside=(2, "vpn0")), id="tables-and-links"),
        pytest.param(_on(_kernel(rule_priority=4001), inside=(1, "wan"), outside=(2, "vpn0")), id="rules-by-one"),
        pytest.param(_on(_kernel(mark_mask=0x3E000000), inside=(1, "vpn0"), outside=(2, "wan")), id="mask-by-one-bit"),
        pytest.param(_on(_kernel(mark_mask=0x3F0000), inside=(1, "wan"), outside=(2, "vpn0")), id="mask-and-links"),
        pytest.param(
            _on(_kernel(nft_table="idmark_2"), inside=(2, "vpn0"), outside=(1, "wan")), id="ids-under-another-name"
        ),
    ],
)
def test_roads_change_hands(wanted: Desired) -> None:
    """When roads change hands no mark takes another's, nor loses its rule unclosed, and a cut-short plan is resumed so.

    Enforcement, which would drop such packets, is off.
    """
    now = _seen_by(wanted, after(plan(FIRST, NOTHING), NOTHING, FIRST))
    for state in states(plan(wanted, now), now, wanted):
        for resumed in states(plan(wanted, state), state, wanted):
            looked_for = {(rule.family, rule.fwmark) for rule in resumed.rules}
            for desired in _in_force(resumed, FIRST, wanted):
                _assert_own_roads(resumed, desired)
                for standing in desired.standings:
                    mark = standing.identity.fwmark
                    assert (Family.IPV4, mark) in looked_for or _closed_for_a_while(resumed, mark)
        assert plan(wanted, resumed).steps == ()


def _assert_own_roads(now: Observed, desired: Desired) -> None:
    for standing in desired.standings:
        others, main = detours(desired.policy, standing.identity)
        allowed = {standing.identity.link, *(other.link for other in others)}
        if not main and not _closed_for_a_while(now, standing.identity.fwmark):
            for family in standing.families:
                assert _way_out(now, family, standing.identity.fwmark) <= allowed


def _way_out(now: Observed, family: Family, mark: Fwmark) -> set[str]:
    """The links by which a forwarded packet with a mark leaves for anywhere: rules by priority, routes by metric."""
    for rule in sorted(now.rules, key=lambda rule: rule.priority):
        if rule.family is family and rule.fwmark and mark.value & rule.fwmark.mask == rule.fwmark.value:
            defaults = [item for item in now.routes if (item.family, item.table) == (family, rule.table)]
            defaults = [item for item in defaults if not item.destination.length]
            if defaults:
                return {hop.link for hop in min(defaults, key=lambda item: item.metric).hops}
    return set()


def _closed_for_a_while(now: Observed, mark: Fwmark) -> bool:
    return mark in (now.closed or ())


def _in_force(now: Observed, before: Desired | None, wanted: Desired | None) -> Iterator[Desired]:
    """Whose rulesets are loaded: the one before's until the other is there, or its table deleted."""
    if now.table and wanted and _holds(now.table, ruleset.table(wanted)):
        yield wanted
    elif now.table and before:
        yield before
    if now.other_tables and before:
        yield before


def _holds(table: Table, wanted: Table) -> bool:
    """Whether the rules are those wanted, and what is said of marks; addresses may come and go before and after, and
    rules ask for the differences until they have.
    """
    held = {item.name: set(item.elements) for item in table.sets}
    said = [item for item in wanted.sets if item.key not in {f"{family}_addr" for family in Family}]
    rules = {
        chain.name: [rule.comment.partition(", not ")[0] for rule in chain.rules if "-coming" not in rule.comment]
        for chain in table.chains
    }
    return all(set(item.elements) <= held.get(item.name, set()) for item in said) and all(
        rules.get(chain.name) == [rule.comment for rule in chain.rules] for chain in wanted.chains
    )


def _seen_by(desired: Desired | None, now: Observed) -> Observed:
    """A table of ours that the policy gives another name is one of the other tables."""
    if desired is None or now.table is None or now.table.name == desired.policy.kernel.nft_table:
        return now
    return replace(now, table=None, other_tables=(now.table.name,))


def _open(desired: Desired) -> set[tuple[Family, int]]:
    return {
        (family, standing.identity.table)
        for standing in desired.standings
        for family in standing.families
        if detours(desired.policy, standing.identity)[1]
    }


@given(cases())
def test_last_route_first_and_last(case: Case) -> None:
    """Of the routes that are added a table's last route comes first, of those that are deleted last."""
    steps = plan(case.wanted, case.observed).steps
    added = [step for step in steps if isinstance(step, AddRoute | ReplaceRoute)]
    metrics = [(step.new if isinstance(step, ReplaceRoute) else step.route).metric == METRIC_LAST for step in added]
    assert metrics == sorted(metrics, reverse=True)
    deleted = [step.route.metric == METRIC_LAST for step in steps if isinstance(step, DeleteRoute)]
    assert deleted == sorted(deleted)


@given(cases())
def test_networks_before_gateways(case: Case) -> None:
    """A link's network is in the table before a route through a gateway in it: the kernel looks the gateway up.

    The default comes last, behind the networks of links that are nobody's road, too: what is for the hosts behind must
    not leave by it.
    """
    added = [step.route for step in plan(case.wanted, case.observed).steps if isinstance(step, AddRoute)]
    uplinks = {standing.identity.link for each in (case.wanted, case.before) for standing in each.standings}
    for uplink in uplinks:
        orders: dict[tuple[int, Family], list[tuple[bool, bool]]] = {}
        for item in added:
            links = {hop.link for hop in item.hops}
            if item.metric != METRIC_LAST and (uplink in links or not links & uplinks):
                order = (not item.destination.length, any(hop.via for hop in item.hops))
                orders.setdefault((item.table, item.family), []).append(order)
        assert all(order == sorted(order) for order in orders.values())


@given(cases())
def test_taken_back(case: Case) -> None:
    """The inverses of a plan's routing steps, in reverse, lead back to what was there."""
    now = case.observed
    undo: list[Step] = []
    for step in plan(case.wanted, case.observed).steps:
        if not isinstance(step, Load | Change | SetSrcValidMark):
            now = taken(step, now, case.wanted)
            undo.append(step.inverse())
    for step in reversed(undo):
        # A rule that was there twice the kernel takes only once.
        if not (isinstance(step, AddRule) and step.rule in now.rules):
            now = taken(step, now, case.wanted)
    assert now.routes == case.observed.routes
    assert set(now.rules) == set(case.observed.rules)


@given(cases())
def test_one_plan_one_text(case: Case) -> None:
    """A plan depends on what is wanted and what is there, and not on the order in which either is told."""
    backwards = replace(
        case.observed, rules=case.observed.rules[::-1], routes=frozenset(sorted(case.observed.routes, key=str))
    )
    wanted = replace(case.wanted, routes=frozenset(sorted(case.wanted.routes, key=str, reverse=True)))
    assert plan(wanted, backwards).text == plan(case.wanted, case.observed).text


# --- examples --------------------------------------------------------------------------------------------------------


def test_in_force() -> None:
    """What is in force already needs no step, and has an empty text."""
    assert plan(BOTH, IN_FORCE) == Plan(())
    assert plan(BOTH, IN_FORCE).text == ""


def test_first_apply_as_a_script() -> None:
    """A plan reads like a script: routes from the last one on, rules, one nft transaction."""
    inside = replace(INSIDE, addresses=INSIDE.addresses and INSIDE.addresses[:1], members=Prefixes())
    lines = plan(desire(policy(inside, downstream=["lan"]), GATEWAY), NOTHING).text.splitlines()
    assert lines[:7] == [
        "+ ip route add unreachable default table 4001 metric 4294967295 protocol 73",
        "+ ip route add 10.9.0.0/24 dev lan table 4001 src 10.9.0.1 protocol 73",
        "+ ip route add 192.0.2.128/25 dev vpn0 table 4001 src 192.0.2.130 protocol 73",
        "+ ip route add default dev vpn0 table 4001 metric 1024 src 192.0.2.130 protocol 73",
        "+ ip rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73",
        "+ ip rule add priority 4001 from 192.0.2.130 lookup 4001 protocol 73",
        "+ nft table inet idmark {",
    ]
    assert all(line[:6] in {"+ nft ", "- nft "} for line in lines[6:])


def _without(routes: frozenset[Route], words: str) -> frozenset[Route]:
    return frozenset(item for item in routes if words not in str(item))


@pytest.mark.parametrize(
    ("observed", "text"),
    [
        pytest.param(
            replace(IN_FORCE, rules=tuple(rule for rule in IN_FORCE.rules if rule != MARKED)),
            "+ ip rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73\n",
            id="one-rule-missing",
        ),
        pytest.param(
            replace(IN_FORCE, rules=(*IN_FORCE.rules, MARKED)),
            "- ip rule delete priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73\n",
            id="one-rule-twice",
        ),
        pytest.param(
            replace(IN_FORCE, rules=(*IN_FORCE.rules, replace(MARKED, extra=(("FRA_IIFNAME", "lan"),)))),
            "- ip rule delete priority 4001 fwmark 0x1000000/0x3f000000 FRA_IIFNAME lan lookup 4001 protocol 73\n",
            id="one-rule-that-asks-for-more",
        ),
        pytest.param(
            replace(IN_FORCE, routes=_without(IN_FORCE.routes, "default dev vpn0")),
            "+ ip route add default dev vpn0 table 4001 metric 1024 src 192.0.2.130 protocol 73\n"
            "+ ip -6 route add default dev vpn0 table 4001 metric 1024 src 2001:db8:4::130 protocol 73\n",
            id="defaults-gone-with-the-link",
        ),
        pytest.param(
            replace(
                IN_FORCE,
                routes=_without(IN_FORCE.routes, "default via 203.0.113.1")
                | {route("0.0.0.0/0 via 203.0.113.9 dev wan metric 1024", 4002)},
            ),
            "- ip route delete default via 203.0.113.9 dev wan table 4002 metric 1024 protocol 73\n"
            "+ ip route replace default via 203.0.113.1 dev wan table 4002 metric 1024 src 203.0.113.2 protocol 73\n",
            id="another-next-hop",
        ),
        pytest.param(
            replace(IN_FORCE, routes=IN_FORCE.routes | {route("10.66.0.0/16 dev lan", 4009)}),
            "- ip route delete 10.66.0.0/16 dev lan table 4009 protocol 73\n",
            id="route-of-nobody",
        ),
        pytest.param(
            replace(IN_FORCE, routes=IN_FORCE.routes | {route("0.0.0.0/0 via 203.0.113.9 dev wan metric 1024", 4002)}),
            "- ip route delete default via 203.0.113.9 dev wan table 4002 metric 1024 protocol 73\n",
            id="a-second-route-with-the-key-of-ours",
        ),
        pytest.param(
            replace(IN_FORCE, table=replace(read_back(ruleset.table(BOTH)), dormant=True)),
            "+ nft add table inet idmark\n",
            id="table-asleep",
        ),
        pytest.param(
            replace(IN_FORCE, other_tables=("idmark_old",)), "- nft delete table inet idmark_old\n", id="table-renamed"
        ),
        pytest.param(
            replace(IN_FORCE, src_valid_mark=frozenset({"vpn0"}), src_valid_mark_ours=frozenset({"vpn0"})),
            "- sysctl -w net/ipv4/conf/vpn0/src_valid_mark=0\n",
            id="src_valid_mark-wanted-no-more",
        ),
        pytest.param(replace(IN_FORCE, src_valid_mark=frozenset({"vpn0"})), "", id="src_valid_mark-of-somebody-else"),
    ],
)
def test_repairs(observed: Observed, text: str) -> None:
    """What differs in one thing is repaired by one step, said in one line or two."""
    assert plan(BOTH, observed).text == text


def test_src_valid_mark() -> None:
    """src_valid_mark is set where it is wanted and has no effect yet, before anything else, on a link's own path."""
    strict = tuple(replace(each, rp_filter=1) for each in GATEWAY.links)
    wanted = desire(policy(INSIDE, OUTSIDE), replace(GATEWAY, links=strict))
    first, *others = plan(wanted, replace(IN_FORCE, src_valid_mark=frozenset({"wan"}))).text.splitlines()
    assert first == "+ sysctl -w net/ipv4/conf/vpn0/src_valid_mark=1"
    assert others == []


def test_link_moves() -> None:
    """When an identity moves to another link, its default is replaced in one step: no moment without either."""
    moved = replace(INSIDE, link="wan")
    steps = plan(desire(policy(moved, OUTSIDE), GATEWAY), IN_FORCE).steps
    assert [step.new.hops[0].link for step in steps if isinstance(step, ReplaceRoute)] == ["wan", "wan"]


def test_new_mask() -> None:
    """With another mask the new rules are there before the new marks, and the old ones until after; what is said of
    new marks is there before they are, and what was said of old ones after.
    """
    kernel = Kernel(mark_mask=0xFC0000)
    marks = [
        replace(each, fwmark=replace(each.fwmark, value=each.id << 18, mask=0xFC0000)) for each in (INSIDE, OUTSIDE)
    ]
    kinds = [type(step) for step in plan(desire(policy(*marks, kernel=kernel), GATEWAY), IN_FORCE).steps]
    # The first and the last: the rule that refuses members without a mark.
    marked = [Change, Load, Change]
    assert kinds == [DeleteRule] + [AddRule] * 4 + marked + [DeleteRule] * 4 + [AddRule]


def test_former_address_is_refused() -> None:
    """What the host still sends from an IPv6 address that has gone is refused; no longer when the address is back."""
    auto = policy(identity("inside", 1, "vpn0", next_hop="none"), OUTSIDE)
    with_it, without = (desire(auto, host(link("vpn0", *addresses), WAN)) for addresses in (["2001:db8:4::130/64"], []))
    now = after(plan(with_it, NOTHING), NOTHING, with_it)
    now = after(plan(without, now), now, without)
    (former,) = set(now.rules) - without.rules
    assert str(former) == "priority 4003 from 2001:db8:4::130 iif lo unreachable protocol 73"
    assert plan(without, now).steps == ()
    there = replace(now, addresses=frozenset({Prefix.parse("2001:db8:4::130")}))
    assert former not in after(plan(without, there), there, without).rules
    assert former not in after(plan(with_it, now), now, with_it).rules


def test_so_many_former_addresses() -> None:
    """Of addresses that were an identity's the oldest are let go when there are too many."""
    old = tuple(
        Rule(Family.IPV6, 4003, source=Prefix.parse(f"2001:db8::{n:x}"), iif="lo", action=UNREACHABLE)
        for n in range(1, FORMER + 3)
    )
    now = replace(IN_FORCE, rules=(*IN_FORCE.rules, *old))
    assert plan(BOTH, now).steps == tuple(map(DeleteRule, old[:2]))


def test_handover_to_whom_when_down_names() -> None:
    """Ids are exchanged, and one stands in for the other when its link is down: its mark is closed meanwhile."""
    kernel = _kernel()
    before = _on(kernel, inside=(3, "vpn0"), outside=(1, "wan"))
    before = desire(_diverting(before.policy), GATEWAY)
    wanted = _on(kernel, inside=(1, "vpn0"), outside=(2, "wan"))
    now = after(plan(before, NOTHING), NOTHING, before)
    first = next(step for step in plan(wanted, now).steps if isinstance(step, Load))
    assert "closed while roads change: 0x1000000" in first.text


def _diverting(written: Policy) -> Policy:
    outside = replace(written.identity("outside"), when_down="inside")
    return replace(written, identities=(outside, written.identity("inside")))


# --- elements --------------------------------------------------------------------------------------------------------


def members(numbers: Iterable[int], *others: str) -> Prefixes:
    """The addresses with these numbers, from 10.0.0.0 on, and others."""
    return Prefixes.of(
        [*(Prefix(Family.IPV4, (10 << 24) + number, 32) for number in numbers), *map(Prefix.parse, others)]
    )


def in_force(desired: Desired) -> Observed:
    return after(plan(desired, NOTHING), NOTHING, desired)


def table_steps(desired: Desired, now: Observed) -> list[Load | Change]:
    """What a plan does to our table; that it is carried out shows that each step can be."""
    steps = plan(desired, now)
    assert plan(desired, after(steps, now, desired)).steps == ()
    return [step for step in steps.steps if isinstance(step, Load | Change)]


def test_elements_alone() -> None:
    """Where members come and go that no rule knows of, the plan is the change of these elements, without nft."""
    more = desire(policy(replace(INSIDE, members=members((), "10.9.0.0/24", "10.8.0.0/24")), OUTSIDE), GATEWAY)
    assert table_steps(more, IN_FORCE) == [
        Change("idmark", (ElementChange("sources-ipv4-24", "ipv4_addr", (), (("10.8.0.0", "goto id-inside"),)),))
    ]
    (back,) = table_steps(BOTH, in_force(more))
    assert list(back.lines()) == ["- nft delete element inet idmark sources-ipv4-24 { 10.8.0.0 }"]


def test_a_member_moves_at_once() -> None:
    """A member that another identity gets goes and comes in one change of one map."""
    one = desire(policy(INSIDE, replace(OUTSIDE, members=members((), "10.8.0.0/24"))), GATEWAY)
    two = replace(INSIDE, members=members((), "10.8.0.0/24", "10.9.0.0/24"))
    (step,) = table_steps(desire(policy(two, OUTSIDE), GATEWAY), in_force(one))
    assert list(step.lines()) == [
        "- nft delete element inet idmark sources-ipv4-24 { 10.8.0.0 }",
        "+ nft add element inet idmark sources-ipv4-24 { 10.8.0.0 : goto id-inside }",
    ]


def test_an_element_for_all_others_goes_by_nft() -> None:
    """An element without a key has no key to be deleted by: nft flushes it away, and puts the others in again."""
    assert IN_FORCE.table
    sets = [
        replace(item, elements=(*item.elements, ("*", ""))) if item.name == "own-link" else item
        for item in IN_FORCE.table.sets
    ]
    steps = table_steps(BOTH, replace(IN_FORCE, table=replace(IN_FORCE.table, sets=tuple(sets))))
    declared = "add set inet idmark own-link { type mark . ifname;"
    elements = 'elements = { 0x01000000 . "vpn0", 0x02000000 . "wan" };'
    assert steps == [Load("idmark", ("flush set inet idmark own-link", f"{declared} {elements} }}"))]


MANY_MEMBERS = desire(policy(replace(INSIDE, members=members(range(MANY))), OUTSIDE), GATEWAY)


def test_many_are_there_before_any_rule_asks() -> None:
    """Large new sets are declared, filled, and only then asked for by rules: no packet meets half of them."""
    made, fill, rules = table_steps(MANY_MEMBERS, NOTHING)
    assert isinstance(made, Load)
    assert isinstance(fill, Change)
    assert isinstance(rules, Load)
    assert made.commands == (
        "add table inet idmark",
        "add set inet idmark id-inside-ipv4-32 { type ipv4_addr; }",
        "add set inet idmark id-outside-ipv4-32 { type ipv4_addr; }",
    )
    assert [(change.set, len(change.gone), len(change.new)) for change in fill.changes] == [
        ("id-inside-ipv4-32", 0, MANY + 1),
        ("id-outside-ipv4-32", 0, 1),
    ]
    assert all(isinstance(change.new, Addresses) for change in fill.changes)
    assert not [line for line in rules.commands if line.startswith("add set") and "ipv4-32" in line]
    assert rules.behind == made.commands
    # The same where a small policy was in force, whose sets go last.
    assert [type(step) for step in table_steps(MANY_MEMBERS, IN_FORCE)] == [Load, Change, Load, Load]


def test_who_is_new_marks_before_anything_goes_there() -> None:
    """A member that a new identity takes over goes to a chain that marks already: it is never without a mark."""
    new = identity("new", 3, "vpn1", addresses=[], members=["10.9.0.0/24"])
    both = desire(policy(replace(INSIDE, members=Prefixes()), OUTSIDE, new), GATEWAY)
    for state in states(plan(both, IN_FORCE), IN_FORCE, both):
        assert state.table
        chains = {chain.name: chain for chain in state.table.chains}
        for item in state.table.sets:
            for _, value in item.elements:
                assert not value.startswith("goto ") or chains[value.removeprefix("goto ")].rules


def test_few_of_many() -> None:
    """What changes in large sets that are there is all that is sent."""
    now = in_force(MANY_MEMBERS)
    fewer = replace(INSIDE, members=members(range(1, MANY), "10.9.9.9"))
    (step,) = table_steps(desire(policy(fewer, OUTSIDE), GATEWAY), now)
    assert list(step.lines()) == [
        "- nft delete element inet idmark id-inside-ipv4-32 { 10.0.0.0 }",
        "+ nft add element inet idmark id-inside-ipv4-32 { 10.9.9.9 }",
    ]


def test_rules_and_many_elements_of_what_stays() -> None:
    """Where rules change with many elements of sets that stay, no transaction of nft's holds many: rules that ask for
    the differences, too, are in force while the sets change, and at the end nothing is left of them.
    """
    others = replace(INSIDE, members=members(range(2000, MANY + 2000)))
    wanted = desire(policy(others, OUTSIDE, kernel=Kernel(hook_priority=-140)), GATEWAY)
    now = in_force(MANY_MEMBERS)
    made, fill, asking, change, rules, cleared = table_steps(wanted, now)
    name = "id-inside-ipv4-32"
    assert isinstance(fill, Change)
    assert isinstance(change, Change)
    assert [each.set for each in fill.changes] == [f"{name}-coming", f"{name}-going"]
    (changed,) = change.changes
    assert [each.new for each in fill.changes] == [changed.new, changed.gone]
    assert (changed.set, len(changed.new), len(changed.gone)) == (name, 2000, 2000)
    asked = f"add rule inet idmark source ip saddr != @{name}-going ip saddr @{name} goto id-inside"
    for step in (made, asking, rules, cleared):
        assert isinstance(step, Load)
        assert not [line for line in step.commands if "elements" in line and "ipv4-32" in line]
        assert any(line.startswith(asked) for line in step.commands) is (step is asking)
    # Then only the chains that ask.
    assert isinstance(rules, Load)
    assert {line.split()[4] for line in rules.commands} == {"source", "destination", "answering", "prerouting"}
    assert isinstance(cleared, Load)
    assert cleared.commands == (
        f"delete set inet idmark {name}-coming",
        f"delete set inet idmark {name}-going",
    )


def test_what_only_goes_is_asked_for_alone() -> None:
    """A difference that there is none of has no set, and no rule asks for it."""
    fewer = replace(INSIDE, members=members(range(2, MANY)))
    shorter = replace(OUTSIDE, members=members((), "10.0.0.0/31"))
    steps = table_steps(desire(policy(fewer, shorter), GATEWAY), in_force(MANY_MEMBERS))
    assert [type(step) for step in steps] == [Load, Change, Load, Change, Load, Load]
    assert isinstance(steps[1], Change)
    assert {change.set: tuple(change.new) for change in steps[1].changes} == {
        "id-inside-ipv4-32-going": (("10.0.0.0", ""), ("10.0.0.1", "")),
        "id-outside-ipv4-31": (("10.0.0.0", ""),),
    }
    assert not [line for step in steps if isinstance(step, Load) for line in step.commands if "-coming" in line]


def test_an_identity_of_another_name() -> None:
    """The differences of a map lead to chains, too; those that what goes leads to are there until it has gone."""
    other = replace(INSIDE, name="other")
    steps = table_steps(desire(policy(other, OUTSIDE), GATEWAY), IN_FORCE)
    asking = next(step for step in steps if isinstance(step, Load) and "flush table inet idmark" in step.commands)
    name = "sources-ipv4-24"
    rules = [line for line in asking.commands if line.startswith("add rule inet idmark source ") and name in line]
    masked = "ip saddr & 255.255.255.0"
    assert rules == [
        f'add rule inet idmark source {masked} vmap @{name}-coming comment "IPv4 /24, {name}-coming"',
        f"add rule inet idmark source {masked} != @{name}-going {masked} vmap @{name} "
        f'comment "IPv4 /24, not {name}-going"',
    ]
    (last,) = steps[-1:]
    assert isinstance(last, Load)
    assert "delete chain inet idmark id-inside" in last.commands
    assert f"flush map inet idmark {name}" in last.behind


def test_what_was_interrupted_is_filled_up() -> None:
    """A table whose sets are half filled, and which has no chain yet, gets the rest of the elements only."""
    half = Addresses.of(Family.IPV4, range(10 << 24, (10 << 24) + 1000))
    table = Table("idmark", sets=(NftSet("id-inside-ipv4-32", "ipv4_addr", elements=half),))
    steps = table_steps(MANY_MEMBERS, Observed(table=table))
    assert [type(step) for step in steps] == [Load, Change, Load]
    assert isinstance(steps[1], Change)
    assert [len(change.new) for change in steps[1].changes] == [MANY + 1 - 1000, 1]


def test_inverse_of_a_change() -> None:
    """A change that is taken back leaves what was there; what comes back does so in the order in which rules ask."""
    more = replace(OUTSIDE, members=members((), "10.8.0.0/24", "10.8.0.1", "10.9.0.5"))
    one, two = BOTH, desire(policy(INSIDE, more), GATEWAY)
    two_layers = in_force(
        desire(policy(INSIDE, replace(more, members=members((), "10.8.0.0/24", "10.7.0.1"))), GATEWAY)
    )
    for desired, now in ((one, in_force(two)), (two, IN_FORCE), (two, two_layers)):
        steps = [step for step in table_steps(desired, now) if isinstance(step, Change)]
        assert steps == table_steps(desired, now)
        sets = [change.set for step in steps for change in step.changes]
        assert sets in (sorted(sets), sorted(sets, reverse=True))
        there = after(Plan(tuple(steps)), now, desired)
        back = after(Plan(tuple(step.inverse() for step in reversed(steps))), there, None)
        assert back.table
        assert now.table
        assert {s.name: dict(s.elements) for s in back.table.sets} == {s.name: dict(s.elements) for s in now.table.sets}


def test_load_says_what_it_does() -> None:
    """Of an nft transaction each line is told, with a sign, but no comments and no blanks."""
    load = Load("idmark", ("# words\n\nflush table inet idmark\ntable inet idmark {\n}", "delete chain inet idmark x"))
    assert list(load.lines()) == [
        "- nft flush table inet idmark",
        "+ nft table inet idmark {",
        "+ nft }",
        "- nft delete chain inet idmark x",
    ]
    assert load.text.endswith("delete chain inet idmark x\n")


def test_digest() -> None:
    """A plan's digest is that of its text, so what was read is what is approved."""
    some = plan(BOTH, NOTHING)
    assert some.digest == hashlib.sha256(some.text.encode()).hexdigest()
    assert some.digest != plan(BOTH, replace(IN_FORCE, table=None)).digest


def test_foreign_route_in_our_table() -> None:
    """Somebody else's route in a table of ours is noted, with its words, and no step touches it."""
    observed = replace(IN_FORCE, foreign_routes=(route("10.66.0.0/16 dev lan metric 5", 4001),))
    assert observed.notes == (
        "table 4001 holds a route that is not idmark's, and packets may follow it: "
        "10.66.0.0/16 dev lan table 4001 metric 5",
    )
    assert plan(BOTH, observed).steps == ()


def test_removal_in_order() -> None:
    """Removal goes backwards: whoever has no mark is let go; marks, rules, routes with the last ones last, sysctls."""
    observed = replace(IN_FORCE, other_tables=("idmark_old",), src_valid_mark_ours=frozenset({"vpn0"}))
    refusing, around, landing, first, second, *others = removal(observed).steps
    assert [step.rule.action for step in (refusing, around, landing) if isinstance(step, DeleteRule)] == [
        UNREACHABLE,
        GOTO,
        NOP,
    ]
    assert first == Load("idmark", ("delete table inet idmark",))
    assert second == Load("idmark_old", ("delete table inet idmark_old",))
    left = len(observed.rules) - 3
    assert [type(step) for step in others[:left]] == [DeleteRule] * left
    assert others[-1] == SetSrcValidMark("vpn0", False)
    assert [step.route.kind for step in others[-5:-1] if isinstance(step, DeleteRoute)] == ["unreachable"] * 4


def test_removal_of_nothing() -> None:
    """Where nothing of ours is, nothing is to be removed."""
    assert removal(NOTHING) == Plan(())


def test_twin_under_another_key() -> None:
    """A route with another metric is another route: it is added beside, and the old one deleted after."""
    other = route("198.18.0.0/16 dev wan metric 7", 4002)
    steps = plan(
        replace(BOTH, routes=BOTH.routes | {replace(other, metric=8)}),
        replace(IN_FORCE, routes=IN_FORCE.routes | {other}),
    ).steps
    assert steps == (AddRoute(replace(other, metric=8)), DeleteRoute(other))


@given(policies(), hosts())
def test_apply_then_remove(written: Policy, facts: Facts) -> None:
    """What one policy puts in, on any host, a removal takes away to the last bit."""
    desired = desire(written, facts)
    now = replace(NOTHING, src_valid_mark=frozenset(each.name for each in facts.links if each.src_valid_mark))
    applied = after(plan(desired, now), now, desired)
    assert after(removal(applied), applied, None) == now


def test_our_protocol_in_main() -> None:
    """A route in main that bears our protocol number is ours and wanted by nobody: it goes, with its table named."""
    stray = route("10.66.0.0/16 dev lan")
    assert plan(BOTH, replace(IN_FORCE, routes=IN_FORCE.routes | {stray})).text == (
        "- ip route delete 10.66.0.0/16 dev lan table 254 protocol 73\n"
    )
