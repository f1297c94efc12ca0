"""Who counts as down, by what was answered and what was not."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.desired import desire
from agent.model import LinkAddress, Probe
from agent.probes import Check, Prober, Record, checks, is_late
from tests.unit.values import DEFAULTS, GATEWAY, INSIDE, OUTSIDE, WAN, host, policy


def record(answers: str, fail_after: int) -> Record:
    """The record after questions that were answered (+) or not (-)."""
    found = Record()
    for answer in answers:
        found = found.after(answered=answer == "+", fail_after=fail_after)
    return found


@pytest.mark.parametrize(
    ("answers", "down"),
    [
        pytest.param("", False, id="unknown-is-up"),
        pytest.param("--", False, id="not-yet"),
        pytest.param("---", True, id="down"),
        pytest.param("--+--", False, id="not-in-a-row"),
        pytest.param("---++", True, id="not-yet-up"),
        pytest.param("---+++", False, id="up-again"),
        pytest.param("---++-++", True, id="not-in-a-row-again"),
        pytest.param("---+++--", False, id="begins-anew"),
        pytest.param("+++++---", True, id="after-long-life"),
    ],
)
def test_three_in_a_row(answers: str, down: bool) -> None:
    """So many unanswered in a row, and it is down; as many answered in a row, and it is up."""
    assert record(answers, 3).down == down


@given(st.text("+-", max_size=30), st.integers(1, 5))
def test_the_last_row_decides(answers: str, fail_after: int) -> None:
    """Whatever came before, the last row that was long enough says what holds; before one there is nothing known."""
    rows = [(answers.rfind(sign * fail_after), sign) for sign in "+-"]
    place, sign = max(rows)
    assert record(answers, fail_after).down == (place >= 0 and sign == "-")


@pytest.mark.parametrize(
    ("lateness", "late"),
    [
        pytest.param(0.001, False, id="as-usual"),
        pytest.param(0.9, False, id="busy"),
        pytest.param(3600, True, id="slept"),
    ],
)
def test_late(lateness: float, late: bool) -> None:
    """A question whose end this machine has slept through says nothing."""
    assert is_late(lateness, every=2.0) == late


PROBE = Probe(ip_address("198.51.100.53"), every=2.0, fail_after=3)


def test_checks() -> None:
    """Who has a probe is asked for, from its first own address of the target's family, by its link."""
    six = replace(PROBE, target=ip_address("2001:db8:53::53"))
    desired = desire(policy(replace(INSIDE, probe=six), replace(OUTSIDE, probe=PROBE)), GATEWAY)
    assert checks(desired) == (
        Check("inside", six, ip_address("2001:db8:4::130"), "vpn0"),
        Check("outside", PROBE, ip_address("203.0.113.2"), "wan"),
    )
    assert checks(desire(policy(INSIDE, OUTSIDE), GATEWAY)) == ()


def test_checks_without_an_address() -> None:
    """Who has no address to ask from is to be asked for nevertheless: it will not be answered."""
    desired = desire(policy(replace(OUTSIDE, probe=PROBE)), host())
    assert checks(desired) == (Check("outside", PROBE, None, "wan"),)


def test_checks_ask_from_an_address_that_stays() -> None:
    """The one to choose of several own addresses is the one that will last."""
    old = LinkAddress(ip_address("203.0.113.1"), 24, deprecated=True)
    facts = host(replace(WAN, addresses=(old, *WAN.addresses)), routes=DEFAULTS)
    (check,) = checks(desire(policy(replace(OUTSIDE, probe=PROBE)), facts))
    assert check.source == ip_address("203.0.113.2")


def test_without_a_probe_there_is_no_thread() -> None:
    """A prober that has nothing to ask says that nobody is down, and closes."""
    prober = Prober(lambda: None)
    prober.watch([])
    assert prober.down == {}
    prober.close()
