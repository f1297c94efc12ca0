"""What was there, written down, and the way back to it."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from agent.desired import Desired, desire
from agent.model import Count, Policy
from agent.plan import (
    AddRoute,
    AddRule,
    DeleteRoute,
    DeleteRule,
    Load,
    Observed,
    Plan,
    ReplaceRoute,
    is_late,
    restoration,
)
from agent.ruleset import CLOSED
from agent.snapshot import Snapshot, counted_on, uncounted
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, hosts, observations, policies, policy

LISTING = """\
table inet idmark {
\tcounter id-inside-ipv4-transmit {
\t\tpackets 7 bytes 700
\t}

\tcounter id-a.b {
\t\tcomment "packets 1 bytes 2"
\t\tpackets 3 bytes 300
\t}

\tmap transmit-ipv4 {
\t\ttype mark . ifname : counter
\t\telements = { 0x01000000 . "vpn0" : "id-inside-ipv4-transmit" }
\t}
}
"""


@st.composite
def moments(draw: st.DrawFn) -> Observed:
    """What a kernel may hold of ours, strangers and duplicates under our number included."""
    wanted, before = (desire(draw(policies()), draw(hosts())) for _ in range(2))
    return draw(observations(wanted, before))


@given(moments())
def test_written_down_and_read(seen: Observed) -> None:
    """A snapshot is the same when it has been a file."""
    taken = Snapshot(seen.routes, seen.rules, seen.src_valid_mark_ours, {"idmark": LISTING}, "text", in_force=True)
    assert Snapshot.of(json.loads(json.dumps(taken.plain()))) == taken


def after(plan: Plan, seen: Observed) -> tuple[set[object], list[object]]:
    """Routes and rules when the steps have been taken."""
    routes: set[object] = set(seen.routes)
    rules: list[object] = [*seen.rules]
    for step in plan.steps:
        match step:
            case AddRoute(route):
                routes.add(route)
            case ReplaceRoute(old, new):
                routes -= {old}
                routes.add(new)
            case DeleteRoute(route):
                routes.remove(route)
            case AddRule(rule):
                rules.append(rule)
            case DeleteRule(rule):
                rules.remove(rule)
    return routes, rules


@given(moments(), moments())
def test_restored(before: Observed, now: Observed) -> None:
    """Whatever is there now, the routes and rules of then are there again, each rule once, and no others."""
    routes, rules = after(restoration(before, {}, now), now)
    assert routes == before.routes
    assert sorted(map(str, rules)) == sorted(map(str, set(before.rules)))


@given(moments(), moments())
def test_closed_while_a_table_is_replaced(before: Observed, now: Observed) -> None:
    """Before anything else changes the marks of a table that is to be replaced are closed, and the rest comes after."""
    names = {table.name for table in (now.table,) if table}
    steps = restoration(before, dict.fromkeys(names, "table inet idmark {}"), now).steps
    loads = [(place, step) for place, step in enumerate(steps) if isinstance(step, Load)]
    closing = [place for place, step in loads if "closed while roads change" in step.text]
    opening = [place for place, step in loads if step.table == CLOSED and place not in closing]
    assert len(closing) == len(opening) <= len(names)
    assert all(place < other for place in closing for other, _ in loads if other not in closing)
    # And opened when whoever is on his way is through.
    assert all(is_late(steps[place]) for place in opening)
    assert all(place > other for place in opening for other, _ in loads if other not in opening)
    rules = [place for place, step in enumerate(steps) if isinstance(step, AddRule | AddRoute | ReplaceRoute)]
    gone = [place for place, step in enumerate(steps) if isinstance(step, DeleteRule | DeleteRoute)]
    replaced = [place for place, step in loads if place not in (*closing, *opening)]
    assert all(place < other for place in rules for other in replaced)
    assert all(place > other for place in gone for other in replaced)


def test_nothing_to_restore() -> None:
    """What is as it was is left as it is."""
    written: Policy = policy(INSIDE, OUTSIDE)
    wanted: Desired = desire(written, GATEWAY)
    seen = Observed(routes=wanted.routes, rules=tuple(wanted.rules))
    assert restoration(seen, {}, seen).steps == ()


def test_counters_in_a_listing() -> None:
    """What was counted is no difference, and counters go on from where they are, by their names."""
    other = LISTING.replace("packets 7 bytes 700", "packets 0 bytes 0")
    assert uncounted(LISTING) == uncounted(other) != LISTING
    assert counted_on(other, {"id-inside-ipv4-transmit": Count(7, 700)}) == LISTING
    assert counted_on(LISTING, {}) == LISTING
    assert "packets 4 bytes 5\n" in counted_on(LISTING, {"id-a.b": Count(4, 5)})
