"""The status of a host, for a program and for a person."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from agent.desired import desire
from agent.model import Count, Facts, Link, Policy
from agent.plan import Observed, Plan, plan
from agent.reconcile import Look
from agent.ruleset import COUNTS
from agent.status import link_state, report, text
from tests.unit.values import DEFAULTS, GATEWAY, INSIDE, LAN, LO, OUTSIDE, VPN, WAN, host, hosts, policies, policy

BOTH = policy(INSIDE, OUTSIDE)
COUNTED = {
    "id-inside-ipv4-transmit": Count(1234, 98765),
    "id-inside-ipv4-receive": Count(0, 0),
    "id-inside-ipv6-misrouted-dropped": Count(3, 180),
}


def looked(facts: Facts = GATEWAY, *, in_force: bool = True, written: Policy = BOTH) -> Look:
    desired = desire(written, facts)
    if not in_force:
        return Look(facts, desired, Observed(), plan(desired, Observed()))
    return Look(facts, desired, Observed(routes=desired.routes, rules=tuple(desired.rules)), Plan(()))


def reported(look: Look, counts: dict[str, Count] | None = None) -> dict[str, Any]:
    return report(BOTH, look, counts or {})


def test_identity() -> None:
    """For a program each identity has its numbers, its link, its addresses, and each family with its way."""
    (inside, _) = reported(looked(), COUNTED)["identities"]
    families = inside.pop("families")
    assert inside == {
        "name": "inside",
        "id": 1,
        "fwmark": "0x1000000/0x3f000000",
        "table": 4001,
        "link": "vpn0",
        "link_state": "up",
        "addresses": ["192.0.2.130", "2001:db8:4::130"],
        "members": 1,
        "when_down": "unreachable",
        "notes": [],
    }
    assert {family: (state["open"], state["way"]) for family, state in families.items()} == {
        "ipv4": (True, "dev vpn0"),
        "ipv6": (True, "dev vpn0"),
    }


def test_missing_counter_is_no_zero() -> None:
    """A counter that is there and 0 is 0; one that isn't there is null, and said to be missing."""
    counters = reported(looked(), COUNTED)["identities"][0]["families"]["ipv4"]["counters"]
    assert counters == {
        "transmit": {"packets": 1234, "bytes": 98765},
        "receive": {"packets": 0, "bytes": 0},
        "diverted": None,
        "misrouted-dropped": None,
        "misrouted-passed": None,
    }
    lines = list(text(reported(looked(), COUNTED)))
    assert f"    {'transmit':<16}{'1,234 (98,765)':>28}{'no counter':>28}" in lines


def test_rare_counters_only_when_they_count() -> None:
    """Diverted and misrouted packets are shown to a person only when there are any."""
    shown = [line.split()[0] for line in text(reported(looked(), COUNTED)) if line.startswith("    ")]
    assert shown == ["transmit", "receive", "misrouted-dropped", "transmit", "receive"]


@pytest.mark.parametrize("in_force", [pytest.param(True, id="in-force"), pytest.param(False, id="not-in-force")])
def test_in_force(in_force: bool) -> None:
    """A policy is in force when there is nothing to do; else what differs is told, and where to look."""
    found = reported(looked(in_force=in_force))
    assert found["in_force"] is in_force
    assert found["differences"] == looked(in_force=in_force).plan.text.splitlines()
    first = next(text(found))
    assert first == (
        f"gw1: {'in force' if in_force else 'NOT IN FORCE: idmark plan shows what differs'}    policy 000000000000"
    )


@pytest.mark.parametrize(
    ("link", "state"),
    [
        pytest.param(None, "absent", id="absent"),
        pytest.param(replace(WAN, up=False, carrier=False), "down", id="down"),
        pytest.param(replace(WAN, carrier=False), "no carrier", id="no-carrier"),
        pytest.param(WAN, "up", id="up"),
    ],
)
def test_link_state(link: Link | None, state: str) -> None:
    """A link is absent, down, without carrier, or up."""
    assert link_state(link) == state


def test_closed_for_a_person() -> None:
    """A closed family is said with its reason, beside its open sister and the link's state."""
    facts = host(LO, replace(WAN, addresses=WAN.addresses[:1]), VPN, LAN, routes=DEFAULTS[:1])
    lines = list(text(reported(looked(facts))))
    assert lines[lines.index("outside    id 2, fwmark 0x2000000/0x3f000000, table 4002") :][:5] == [
        "outside    id 2, fwmark 0x2000000/0x3f000000, table 4002",
        "  link       wan, up",
        "  addresses  203.0.113.2",
        "  ipv4       open, via 203.0.113.1 dev wan",
        "  ipv6       CLOSED, main has no ipv6 default on wan",
    ]


def test_what_is_not_in_force_is_only_wanted() -> None:
    """A family whose routes, rules or marks the kernel doesn't have is not told as open, though its way is known."""
    look = looked()
    lost = replace(look, observed=replace(look.observed, routes=frozenset()))
    for unlike in (lost, looked(in_force=False)):
        families = reported(unlike)["identities"][0]["families"]
        assert {(state["open"], state["in_force"]) for state in families.values()} == {(False, False)}
        assert "  ipv4       NOT IN FORCE, wanted: dev vpn0" in list(text(reported(unlike)))


def test_notes_and_members_for_a_person() -> None:
    """An own address that is nowhere is noted; members are counted; no address is said to be none."""
    lines = list(text(reported(looked(host(LO, WAN)))))
    assert "  note       192.0.2.130 is on no link of this host" in lines
    assert "  members    1 prefix" in lines
    assert "  link       vpn0, absent" in lines
    assert "  addresses  none" in list(text(reported(looked(host(LO)))))


@given(policies(), hosts())
def test_always_told(written: Policy, facts: Facts) -> None:
    """Whatever the policy and the host, there is a status that JSON can hold and a text on lines of its own."""
    look = looked(facts, written=written)
    found = report(written, look, {})
    assert json.loads(json.dumps(found)) == found
    assert [item["name"] for item in found["identities"]] == [item.name for item in written.identities]
    for item, standing in zip(found["identities"], look.desired.standings, strict=True):
        assert {family: state["open"] for family, state in item["families"].items()} == {
            way.family: not way.closed for way in standing.ways
        }
        assert all(tuple(state["counters"]) == COUNTS for state in item["families"].values())
    assert all(line == line.rstrip() and "\n" not in line for line in text(found))


def test_daemon_line() -> None:
    """A person is told whether a daemon is at work, since when, and of its last repair; what it followed is none."""
    repairs = [{"at": 86400.0, "kind": "rule", "words": ""}, {"at": 172800.0, "kind": "follow", "words": ""}]
    ledger = {"pid": 7, "since": 0.0, "in_sync": True, "down": {}, "repairs": repairs}
    found = reported(looked())
    assert list(text(found))[1].startswith("daemon: none is at work")
    line = list(text({**found, "daemon": ledger}))[1]
    assert line.startswith("daemon: pid 7 since 19")
    assert ", last repair 01-0" in line
    assert list(text({**found, "daemon": {**ledger, "in_sync": False}}))[1].endswith(", NOT IN SYNC: see its log")
