"""When repairs become a fight, and how often one that goes on is fought."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.fights import BURST, HOLD, REPAIRS, WINDOW, Fights

RULE = "+ ip rule add priority 4001"


def repaired(fights: Fights, times: int, every: float, start: float = 100.0) -> list[bool]:
    """Repair a thing again and again; what was said of each."""
    return [fights.repaired(RULE, start + number * every) for number in range(times)]


def test_few_repairs() -> None:
    """Who repairs something now and then has no opponent."""
    fights = Fights()
    assert not any(repaired(fights, REPAIRS - 1, 1.0))
    assert not fights.fighting(RULE)


def test_repairs_far_apart() -> None:
    """The window counts: something that happens every few minutes is a nuisance, and no fight."""
    assert not any(repaired(Fights(), 5 * REPAIRS, WINDOW / (REPAIRS - 2)))


def test_fight() -> None:
    """The repair that makes it a fight says so, and none after it."""
    fights = Fights()
    assert repaired(fights, 3 * REPAIRS, 1.0) == [number == REPAIRS - 1 for number in range(3 * REPAIRS)]
    assert fights.fighting(RULE)


def test_fight_over() -> None:
    """A fight is over when nothing has happened for a while; said once. A new one is said anew."""
    fights = Fights()
    repaired(fights, REPAIRS, 1.0)
    end = 100.0 + REPAIRS
    assert list(fights.over(end)) == []
    assert list(fights.over(end + WINDOW)) == [RULE]
    assert list(fights.over(end + WINDOW)) == []
    assert any(repaired(fights, REPAIRS, 1.0, end + 2 * WINDOW))


def test_first_repairs_at_once() -> None:
    """Nothing waits until an opponent has shown that it does not give up."""
    fights = Fights()
    for _ in range(BURST):
        assert fights.due(RULE, 100.0) <= 100.0
        fights.repaired(RULE, 100.0)
    assert fights.due(RULE, 100.0) == 100.0 + HOLD


def test_others_do_not_wait() -> None:
    """What is fought for holds nothing else up."""
    fights = Fights()
    repaired(fights, 2 * BURST, 0.0)
    assert fights.due("+ ip route add default", 100.0) == 100.0


def test_patience_comes_back() -> None:
    """After a rest repairs are made at once again."""
    fights = Fights()
    repaired(fights, 2 * BURST, 0.0)
    assert fights.due(RULE, 100.0 + 2.0) <= 102.0


@given(st.lists(st.floats(0.0, 3.0), max_size=200))
def test_never_faster_than_allowed(waits: list[float]) -> None:
    """However it is undone: within any span no more repairs than a burst, one each second, and those HOLD apart."""
    fights, now, made = Fights(), 0.0, []
    for wait in waits:
        now = max(now + wait, fights.due(RULE, now + wait))
        fights.repaired(RULE, now)
        made.append(now)
    for i, first in enumerate(made):
        for j in range(i, len(made)):
            span = made[j] - first
            assert j - i <= BURST + span + span / HOLD + 1
