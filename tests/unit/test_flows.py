"""Which connections go by an identity's road."""

from __future__ import annotations

import pytest

from agent.addresses import Family, parse_address
from agent.desired import desire
from agent.flows import Flow, flows_of
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, policy

O, I, MEMBER, LAN_GATEWAY = "203.0.113.2", "192.0.2.130", "10.9.0.5", "10.9.0.1"  # noqa: E741
WILD, CHOST = "198.51.100.10", "192.0.2.50"


def flow(source: str, destination: str, reply_source: str = "", reply_destination: str = "") -> Flow:
    """A connection, untranslated unless its replies say so."""
    ends = (source, destination, reply_source or destination, reply_destination or source)
    first, *others = map(parse_address, ends)
    return Flow(Family.of(first), int(first), *map(int, others))


@pytest.mark.parametrize(
    ("connection", "owners"),
    [
        pytest.param(flow(I, CHOST), {"inside"}, id="from-an-own-address"),
        pytest.param(flow(CHOST, I), {"inside"}, id="to-an-own-address"),
        pytest.param(flow("2001:db8:4::130", "2001:db8:3::50"), {"inside"}, id="ipv6"),
        pytest.param(flow(MEMBER, WILD), {"inside"}, id="from-a-member"),
        pytest.param(flow(WILD, MEMBER), {"inside"}, id="to-a-member"),
        pytest.param(flow(MEMBER, WILD, WILD, I), {"inside"}, id="from-a-member-translated"),
        pytest.param(flow("172.17.0.2", WILD, WILD, O), {"outside"}, id="from-nobody-translated-by-others"),
        pytest.param(flow(WILD, O, MEMBER), {"outside"}, id="to-an-own-address-and-on-to-anothers-member"),
        pytest.param(flow(WILD, I, MEMBER), {"inside"}, id="to-an-own-address-and-on-to-a-member"),
        pytest.param(flow(I, O), set(), id="between-two-own-addresses"),
        pytest.param(flow(MEMBER, LAN_GATEWAY), set(), id="a-member-with-its-gateway"),
        pytest.param(flow(LAN_GATEWAY, MEMBER), set(), id="the-gateway-with-a-member"),
        pytest.param(flow(MEMBER, O), set(), id="a-member-with-an-own-address"),
        pytest.param(flow("172.17.0.2", WILD), set(), id="of-nobody"),
    ],
)
def test_flows_of(connection: Flow, owners: set[str]) -> None:
    """A connection is whose source it has, to the wire too, or whose address it was made to; never by the LAN alone."""
    desired = desire(policy(INSIDE, OUTSIDE), GATEWAY)
    assert {name for name in ("inside", "outside") if flows_of(name, desired)(connection)} == owners
