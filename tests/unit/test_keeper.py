"""What the steps of a pass say of what has happened before it."""

from __future__ import annotations

import pytest

from agent.addresses import Addresses, Family
from agent.chronicle import words
from agent.keeper import _due, told_apart
from agent.model import ElementChange, Rule
from agent.plan import AddRoute, AddRule, Change, DeleteRoute, Load, SetSrcValidMark, Step
from tests.unit import values

ROUTE = AddRoute(values.last_route(Family.IPV4, 4001))
RULE = AddRule(Rule(Family.IPV4, 4001, 4001))
SYSCTL = SetSrcValidMark("wan", on=True)
TABLE = Load("idmark", ("add counter inet idmark a",))
ALL: list[Step] = [ROUTE, RULE, SYSCTL, TABLE]


@pytest.mark.parametrize(
    ("as_before", "moved", "undone"),
    [
        pytest.param(True, False, ALL, id="nothing-has-moved"),
        pytest.param(True, True, [RULE, TABLE], id="links-have-moved"),
        pytest.param(False, False, [], id="something-else-is-wanted"),
        pytest.param(False, True, [], id="both"),
    ],
)
def test_told_apart(as_before: bool, moved: bool, undone: list[Step]) -> None:
    """Somebody has undone what is wanted as it was before, but links take routes and sysctls along; all other steps
    follow the host, and each step is one or the other.
    """
    followed = [step for step in ALL if step not in undone]
    assert told_apart(ALL, as_before=as_before, moved=moved) == (undone, followed)


@pytest.mark.parametrize(
    ("deleted", "due"),
    [
        pytest.param(DeleteRoute(ROUTE.route), [TABLE], id="behind-the-rules"),
        pytest.param(DeleteRoute(ROUTE.route, closing=True), [], id="before-the-rules"),
    ],
)
def test_due(deleted: Step, due: list[Step]) -> None:
    """While a route waits none goes that it may take the place of; and the rules wait for a road that is to end."""
    other = AddRoute(values.route("198.18.0.0/15 dev vpn0", 4001))
    assert [*_due([other, deleted, TABLE], {0: 1.0, 1: 0.0, 2: 0.0})] == due


def test_many_elements_in_few_words() -> None:
    """A repair of a long list is one short line of the log."""
    held = Addresses.of(Family.IPV4, range(100_000))
    change = Change("idmark", (ElementChange("id-inside-ipv4-32", "ipv4_addr", (), held),))
    assert words(change) == "nft table inet idmark, 100000 elements"
