"""A policy and a host's facts become what is to be in the kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ruleset
from agent.addresses import Address, Family, Prefix
from agent.desired import (
    GUARDED,
    METRIC_OWN,
    Desired,
    Standing,
    Way,
    desire,
    detours,
    downstream_routes,
    roads_changed,
    roads_taken,
)
from agent.model import (
    GOTO,
    LOOKUP,
    METRIC_LAST,
    NOP,
    TABLE_MAIN,
    UNREACHABLE,
    Facts,
    Identity,
    Link,
    LinkAddress,
    Policy,
    Probe,
    Rule,
)
from agent.prefixes import lookup
from agent.wanted import Wanted
from tests.unit.values import (
    DEFAULTS,
    GATEWAY,
    INSIDE,
    LAN,
    LO,
    OUTSIDE,
    VPN,
    WAN,
    by_name,
    host,
    hosts,
    identity,
    last_route,
    link,
    policies,
    policy,
    prefixes,
    route,
)

IPV4, IPV6 = Family


def standing(desired: Desired, name: str) -> Standing:
    return next(item for item in desired.standings if item.identity.name == name)


def way(desired: Desired, name: str, family: Family = IPV4) -> Way:
    found = standing(desired, name).way(family)
    assert found is not None
    return found


def table_of(desired: Desired, identity: Identity, family: Family | None = None) -> list[str]:
    """A table's routes as ip(8) says them, without what all of them have."""
    tail = f" protocol {73}"
    return sorted(
        str(item).replace(f" table {identity.table}", "").removesuffix(tail)
        for item in desired.routes
        if item.table == identity.table and family in {None, item.family}
    )


# --- the whole, once -------------------------------------------------------------------------------------------------


def test_gateway_table() -> None:
    """An identity's table has its link's networks, those behind the gateway, its default, and a last route."""
    desired = desire(policy(INSIDE, OUTSIDE), GATEWAY)
    assert table_of(desired, OUTSIDE) == [
        "10.9.0.0/24 dev lan src 10.9.0.1",
        "2001:db8:203::/64 dev wan metric 256",
        "2001:db8:9::/64 dev lan metric 256",
        "203.0.113.0/24 dev wan src 203.0.113.2",
        "default via 2001:db8:203::1 dev wan metric 1024 src 2001:db8:203::2",
        "default via 203.0.113.1 dev wan metric 1024 src 203.0.113.2",
        "unreachable default metric 4294967295",
        "unreachable default metric 4294967295",
    ]


def test_gateway_rules() -> None:
    """An identity has a rule for its mark in each family and one for each own address, none for its members."""
    desired = desire(policy(INSIDE, OUTSIDE), GATEWAY)
    assert sorted(f"{rule.family.ip} {rule}" for rule in desired.rules if rule.table == INSIDE.table) == [
        "ip -6 priority 4001 from 2001:db8:4::130 lookup 4001 protocol 73",
        "ip -6 priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73",
        "ip priority 4001 from 192.0.2.130 lookup 4001 protocol 73",
        "ip priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73",
    ]


# --- own addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "found"),
    [
        pytest.param({}, "203.0.113.2 2001:db8:203::2", id="all-global-ones"),
        pytest.param({"addresses": ["203.0.113.2"]}, "2001:db8:203::2", id="not-anothers-own"),
        pytest.param({"members": ["2001:db8:203::2"]}, "203.0.113.2", id="not-anothers-member"),
        pytest.param({"members": ["203.0.113.0/24"]}, "203.0.113.2 2001:db8:203::2", id="though-in-anothers-network"),
    ],
)
def test_auto_addresses(other: dict[str, list[str]], found: str) -> None:
    """ "auto" is the link's global addresses, but for those that another identity names, and link-local ones."""
    others = identity("other", 1, "vpn0", **{"addresses": ["192.0.2.130"], **other})  # type: ignore[arg-type]
    desired = desire(policy(others, OUTSIDE), GATEWAY)
    assert " ".join(map(str, standing(desired, "outside").addresses)) == found


def test_auto_address_that_is_a_member_too() -> None:
    """An address that an identity names itself, as a member, is still its own when "auto" finds it on the link."""
    outside = identity("outside", 2, "wan", members=["203.0.113.2"])
    desired = desire(policy(outside), GATEWAY)
    assert ip_address("203.0.113.2") in standing(desired, "outside").addresses


@pytest.mark.parametrize(
    ("address", "scope_global"),
    [
        pytest.param("203.0.113.9", False, id="host-scope"),
        pytest.param("169.254.7.7", True, id="link-local-ipv4"),
        pytest.param("fe80::7", False, id="link-local-ipv6"),
    ],
)
def test_auto_is_global(address: str, scope_global: bool) -> None:
    """ "auto" takes no link-local address, whatever scope it is said to have, and none of a smaller scope."""
    more = LinkAddress(ip_address(address), 24, scope_global)
    facts = host(replace(WAN, addresses=(more, *WAN.addresses)), routes=DEFAULTS)
    found = standing(desire(policy(OUTSIDE), facts), "outside").addresses
    assert found == (ip_address("203.0.113.2"), ip_address("2001:db8:203::2"))


def test_two_autos_of_two_links() -> None:
    """Of an address that two links have, the identity with the lower id has it, and no other."""
    one, two = identity("one", 1, "a"), identity("two", 2, "b")
    desired = desire(policy(two, one), host(link("a", "192.0.2.1/24"), link("b", "192.0.2.1/24", "192.0.2.2/24")))
    assert standing(desired, "one").addresses == (ip_address("192.0.2.1"),)
    assert standing(desired, "two").addresses == (ip_address("192.0.2.2"),)


def test_address_on_no_link() -> None:
    """An own address that no link has is noted, and changes nothing else."""
    desired = desire(policy(INSIDE), host(WAN, link("vpn0", "192.0.2.130/25")))
    assert desired.notes == ("identity inside: 2001:db8:4::130 is on no link of this host",)
    assert way(desired, "inside", IPV6).hops


@pytest.mark.parametrize(
    ("last", "others"),
    [pytest.param(200, "196 more addresses", id="many"), pytest.param(5, "1 more address", id="one-more")],
)
def test_many_addresses_on_no_link(last: int, others: str) -> None:
    """Of hundreds that no link has some are named, and the rest counted."""
    own = [f"192.0.2.{number}" for number in range(1, last + 1)]
    notes = desire(policy(identity("inside", 1, "vpn0", addresses=own)), host(link("vpn0", "192.0.2.1/32"))).notes
    assert [note.removeprefix("identity inside: ") for note in notes] == [
        "192.0.2.2 is on no link of this host",
        "192.0.2.3 is on no link of this host",
        f"192.0.2.4 and {others} are on no link of this host",
    ]


def test_address_elsewhere_is_fine() -> None:
    """An own address may stand on any link of the host."""
    assert desire(policy(INSIDE), host(VPN, link("dummy0", "192.0.2.7/32"))).notes == ()
    moved = identity("inside", 1, "vpn0", addresses=["192.0.2.7"])
    assert desire(policy(moved), host(VPN, link("dummy0", "192.0.2.7/32"))).notes == ()


@pytest.mark.parametrize(
    ("addresses", "source"),
    [
        pytest.param(["192.0.2.130"], "192.0.2.130", id="on-the-link"),
        pytest.param(["192.0.2.7"], None, id="on-another-link"),
        pytest.param(["192.0.2.7", "192.0.2.130"], "192.0.2.130", id="the-one-on-the-link"),
    ],
)
def test_source_of_default(addresses: list[str], source: str | None) -> None:
    """The default prefers an own address that is on the link: the kernel refuses a `src` that it doesn't have."""
    inside = identity("inside", 1, "vpn0", addresses=addresses)
    desired = desire(policy(inside), host(VPN, link("dummy0", "192.0.2.7/32")))
    (own,) = (item for item in desired.routes if item.metric == METRIC_OWN)
    assert (own.source and str(own.source)) == source


def test_tentative_address() -> None:
    """An address whose duplicates are still looked for is covered already, and no route prefers it yet."""
    tentative = LinkAddress(ip_address("2001:db8:203::2"), 64, tentative=True)
    desired = desire(policy(OUTSIDE), host(replace(WAN, addresses=(tentative,)), routes=DEFAULTS))
    assert standing(desired, "outside").addresses == (tentative.address,)
    assert Rule(IPV6, 4002, 4002, source=Prefix.host(tentative.address)) in desired.rules
    assert {item.source for item in desired.routes} == {None}


STABLE, TEMPORARY, DEPRECATED = map(ip_address, ("2001:db8:203::8", "2001:db8:203::7", "2001:db8:203::6"))
SLAAC = replace(
    WAN,
    addresses=(
        LinkAddress(ip_address("2001:db8:203::5"), 64, tentative=True),
        LinkAddress(DEPRECATED, 64, deprecated=True),
        LinkAddress(TEMPORARY, 64, temporary=True),
        LinkAddress(STABLE, 64),
    ),
)


def test_every_address_speaks() -> None:
    """Deprecated, temporary and tentative addresses are an "auto" identity's too: connections live on from them."""
    desired = desire(policy(OUTSIDE), host(SLAAC, routes=DEFAULTS))
    own = {item.address for item in SLAAC.addresses}
    assert set(standing(desired, "outside").addresses) == own
    assert {rule.source for rule in desired.rules if rule.source} == set(map(Prefix.host, own))


@pytest.mark.parametrize(
    ("gone", "chosen"),
    [
        pytest.param(set(), STABLE, id="one-that-will-stay"),
        pytest.param({STABLE}, TEMPORARY, id="a-temporary-one"),
        pytest.param({STABLE, TEMPORARY}, DEPRECATED, id="a-deprecated-one"),
    ],
)
def test_choice_of_address(gone: set[Address], chosen: Address) -> None:
    """The default's `src`, and what members are translated to, is the address that will last, whatever their order."""
    outside = replace(OUTSIDE, members=prefixes("2001:db8:9::/64"), masquerade=True)
    left = replace(SLAAC, addresses=tuple(item for item in SLAAC.addresses if item.address not in gone))
    desired = desire(policy(outside), host(left, routes=DEFAULTS))
    assert {item.source for item in desired.routes if item.metric == METRIC_OWN and item.hops} == {chosen}
    translations = [line for line in str(ruleset.table(desired)).split("'") if "snat ip6 to" in line]
    assert [line.rpartition(" ")[2] for line in translations] == [str(chosen)]


# --- next hops -------------------------------------------------------------------------------------------------------

OTHER_UPLINK = "0.0.0.0/0 via 198.51.100.1 dev wan2"


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        pytest.param(["0.0.0.0/0 via 203.0.113.1 dev wan"], "via 203.0.113.1 dev wan", id="one"),
        pytest.param(["0.0.0.0/0 dev wan"], "dev wan", id="point-to-point"),
        pytest.param(
            ["0.0.0.0/0 via 203.0.113.9 dev wan metric 300", "0.0.0.0/0 via 203.0.113.1 dev wan metric 20"],
            "via 203.0.113.1 dev wan",
            id="lowest-metric",
        ),
        pytest.param(
            [OTHER_UPLINK, "0.0.0.0/0 via 203.0.113.1 dev wan metric 9"], "via 203.0.113.1 dev wan", id="link"
        ),
        pytest.param(
            ["0.0.0.0/0 metric 5 nexthop via 198.51.100.1 dev wan2 weight 2 nexthop via 203.0.113.1 dev wan weight 3"],
            "via 203.0.113.1 dev wan",
            id="leg-on-this-link",
        ),
        pytest.param(
            ["0.0.0.0/0 nexthop via 203.0.113.1 dev wan weight 1 nexthop via 203.0.113.3 dev wan weight 1"],
            "via 203.0.113.1 dev wan via 203.0.113.3 dev wan",
            id="both-legs",
        ),
        pytest.param(
            ["0.0.0.0/0 via 203.0.113.1 dev wan", "10.77.0.0/16 via 203.0.113.9 dev wan"],
            "via 203.0.113.1 dev wan",
            id="defaults-only",
        ),
    ],
)
def test_auto_next_hop(routes: list[str], words: str) -> None:
    """ "auto" is main's default on this very link, of several the one with the lowest metric."""
    desired = desire(policy(OUTSIDE), host(WAN, link("wan2", "198.51.100.2/24"), routes=routes))
    assert " ".join(hop.words(IPV4) for hop in way(desired, "outside").hops) == words


def test_both_legs_keep_their_weights() -> None:
    """A multipath default is taken over with its weights."""
    legs = "0.0.0.0/0 nexthop via 203.0.113.1 dev wan weight 2 nexthop via 203.0.113.3 dev wan weight 3"
    assert [hop.weight for hop in way(desire(policy(OUTSIDE), host(WAN, routes=[legs])), "outside").hops] == [2, 3]


def test_onlink_is_kept() -> None:
    """A next hop that main reaches only `onlink` is reached so in the identity's table."""
    facts = host(link("wan", "203.0.113.2/32"))
    default = route("0.0.0.0/0 via 198.51.100.1 dev wan")
    onlink = replace(default, hops=(replace(default.hops[0], onlink=True),))
    desired = desire(policy(OUTSIDE), replace(facts, routes=(onlink,)))
    assert "default via 198.51.100.1 dev wan onlink metric 1024 src 203.0.113.2" in table_of(desired, OUTSIDE)


HERE = identity("here", 1, "wan", addresses=["203.0.113.2"], next_hop=["203.0.113.1"])


@pytest.mark.parametrize(
    ("next_hop", "networks", "fault"),
    [
        pytest.param("203.0.113.1", ["203.0.113.2/24"], None, id="on-link"),
        pytest.param("203.0.113.1", ["192.0.2.1/24", "203.0.113.2/24"], None, id="on-the-second-network"),
        pytest.param(
            "198.51.100.1",
            ["203.0.113.2/24"],
            "identity.here.next_hop: 198.51.100.1 is not on wan, which has 203.0.113.0/24",
            id="elsewhere",
        ),
        pytest.param(
            "203.0.114.0",
            ["192.0.2.1/24", "203.0.113.2/24"],
            "identity.here.next_hop: 203.0.114.0 is not on wan, which has 192.0.2.0/24, 203.0.113.0/24",
            id="one-past-the-end",
        ),
        pytest.param("fe80::1", ["203.0.113.2/24", "2001:db8::2/64"], None, id="link-local"),
    ],
)
def test_next_hop_on_link(next_hop: str, networks: list[str], fault: str | None) -> None:
    """A next hop outside every network of its link is a fault: the kernel would refuse the route."""
    own = "203.0.113.2" if ":" not in next_hop else "2001:db8::2"
    here = identity("here", 1, "wan", addresses=[own], next_hop=[next_hop])
    desired = desire(policy(here), host(link("wan", *networks)))
    assert desired.faults == ((fault,) if fault else ())
    assert bool(way(desired, "here", Family.of(ip_address(own))).hops) != bool(fault)


def test_a_fault_closes_its_own_way_alone() -> None:
    """A next hop that is not on the link closes that way, and says so; whoever keeps the rest in force can."""
    here = identity(
        "here", 1, "wan", addresses=["203.0.113.2", "2001:db8:203::2"], next_hop=["198.51.100.1", "fe80::1"]
    )
    desired = desire(policy(here, replace(INSIDE, id=3)), GATEWAY)
    wrong = "198.51.100.1 is not on wan, which has 203.0.113.0/24"
    assert way(desired, "here") == Way(IPV4, closed=f"the next hop {wrong}")
    assert way(desired, "here", IPV6).hops
    assert way(desired, "inside").hops
    assert desired.faults == (f"identity.here.next_hop: {wrong}",)
    assert last_route(IPV4, here.table) in desired.routes


def test_next_hop_before_the_network() -> None:
    """While the link has no network yet the identity is closed; that is no fault, for one may come."""
    desired = desire(policy(HERE), host(link("wan")))
    assert desired.faults == ()
    assert way(desired, "here").closed == "wan has no ipv4 network yet for the next hop 203.0.113.1"


# --- closed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "facts", "reason"),
    [
        pytest.param({}, host(), "there is no link wan", id="absent"),
        pytest.param({}, host(replace(WAN, up=False, carrier=False)), "link wan is down", id="down"),
        pytest.param(
            {"when_down": "main"}, host(replace(WAN, carrier=False)), "link wan has no carrier", id="no-carrier-detour"
        ),
        pytest.param({}, host(WAN), "main has no ipv4 default on wan", id="no-default"),
        pytest.param(
            {},
            host(WAN, link("wan2"), routes=[OTHER_UPLINK]),
            "main has no ipv4 default on wan",
            id="default-elsewhere",
        ),
        pytest.param(
            {"addresses": ["203.0.113.2"], "next_hop": ["2001:db8:203::1"], "members": ["2001:db8:9::/64"]},
            host(WAN),
            "the policy names no ipv4 next hop",
            id="next-hop-of-the-other-family",
        ),
        pytest.param(
            {"next_hop": "none"},
            host(link("wan", "2001:db8:203::2/64")),
            "wan has no global ipv4 address",
            id="no-address",
        ),
        pytest.param(
            {"next_hop": "none", "members": ["10.9.0.0/24"], "masquerade": True},
            host(link("wan", "2001:db8:203::2/64")),
            "there is no ipv4 address to translate members to",
            id="masquerade",
        ),
    ],
)
def test_closed(changes: dict[str, object], facts: Facts, reason: str) -> None:
    """A way that can't be gone is closed, says why, and leaves nothing but the last route to a destination outside."""
    outside = identity("outside", 2, "wan", **{"next_hop": "auto", **changes})  # type: ignore[arg-type]
    desired = desire(policy(outside), facts)
    assert way(desired, "outside") == Way(IPV4, closed=reason)
    assert f"identity outside: ipv4 is closed: {reason}" in desired.notes
    defaults = [item for item in desired.routes if item.family is IPV4 and not item.destination.length]
    assert defaults == ([] if outside.when_down == "main" else [last_route(IPV4, outside.table)])
    assert Rule(IPV4, 4002, 4002, fwmark=outside.fwmark) in desired.rules


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        pytest.param({}, host(replace(VPN, carrier=False)), id="no-carrier-and-no-detour"),
        pytest.param({"members": ["10.9.0.0/24"], "addresses": []}, host(link("vpn0")), id="members-only"),
        pytest.param(
            {"members": ["10.9.0.0/24"], "addresses": ["192.0.2.130"], "masquerade": True},
            host(link("vpn0")),
            id="masquerade",
        ),
    ],
)
def test_open(changes: dict[str, object], facts: Facts) -> None:
    """A way is open without a carrier when there is no other road, and without an address when members have theirs."""
    inside = identity("inside", 1, "vpn0", **{"addresses": ["192.0.2.130"], **changes})  # type: ignore[arg-type]
    assert way(desire(policy(inside), facts), "inside").hops


# --- one family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "families"),
    [
        pytest.param({"addresses": ["192.0.2.130"]}, [IPV4], id="ipv4-address"),
        pytest.param({"addresses": ["2001:db8:4::130"]}, [IPV6], id="ipv6-address"),
        pytest.param({"addresses": [], "members": ["2001:db8:9::/64"]}, [IPV6], id="ipv6-members"),
        pytest.param({"addresses": ["192.0.2.130"], "members": ["2001:db8:9::/64"]}, [IPV4, IPV6], id="one-of-each"),
        pytest.param({"addresses": "auto"}, [IPV4, IPV6], id="auto"),
    ],
)
def test_families(changes: dict[str, list[str]], families: list[Family]) -> None:
    """An identity has nothing, neither route nor rule, in a family that is not its own; "auto" may get either."""
    inside = identity("inside", 1, "vpn0", **changes)  # type: ignore[arg-type]
    desired = desire(policy(inside), GATEWAY)
    assert list(standing(desired, "inside").families) == families
    assert {item.family for item in desired.routes} == {item.family for item in desired.rules} == set(families)


# --- downstream ------------------------------------------------------------------------------------------------------

#: Behind the LAN's router there is another network; main also has a default of last resort there.
BEHIND = (
    *DEFAULTS,
    "10.8.0.0/16 via 10.9.0.254 dev lan",
    "0.0.0.0/0 via 10.9.0.254 dev lan metric 5000",
    "10.88.0.0/16 nexthop via 10.9.0.254 dev lan nexthop via 203.0.113.9 dev wan",
)


@pytest.mark.parametrize(
    ("downstream", "lines"),
    [
        pytest.param(None, ["10.9.0.0/24 dev lan src 10.9.0.1", "172.17.0.0/16 dev docker0 src 172.17.0.1"], id="auto"),
        pytest.param(
            ["lan"],
            [
                "10.8.0.0/16 via 10.9.0.254 dev lan",
                "10.88.0.0/16 via 10.9.0.254 dev lan",
                "10.9.0.0/24 dev lan src 10.9.0.1",
            ],
            id="explicit",
        ),
        pytest.param(["absent"], [], id="absent"),
        pytest.param([], [], id="none"),
    ],
)
def test_downstream(downstream: list[str] | None, lines: list[str]) -> None:
    """Explicit: all routes of the links but the default; "auto": the networks of every link that is no identity's."""
    facts = host(LO, WAN, VPN, LAN, link("docker0", "172.17.0.1/16"), routes=BEHIND)
    desired = desire(policy(INSIDE, OUTSIDE, downstream=downstream), facts)
    own = {"unreachable default metric 4294967295", "192.0.2.128/25 dev vpn0 src 192.0.2.130"}
    own.add("default dev vpn0 metric 1024 src 192.0.2.130")
    assert [line for line in table_of(desired, INSIDE, IPV4) if line not in own] == lines


def test_no_loopback_no_link_local() -> None:
    """Neither the loopback's networks nor link-local ones are in an identity's table."""
    facts = host(LO, WAN, VPN, LAN, routes=["127.0.0.0/8 dev lo", "fe80::/64 dev lan metric 1"])
    for downstream in (None, ["lan"]):
        destinations = {str(item.destination) for item in desire(policy(INSIDE, downstream=downstream), facts).routes}
        assert "2001:db8:9::/64" in destinations
        assert not destinations & {"127.0.0.0/8", "fe80::/64"}


@pytest.mark.parametrize(
    ("twins", "kept"),
    [
        pytest.param(
            ["192.0.2.128/25 dev lan", "192.0.2.128/25 dev vpn0"], "192.0.2.128/25 dev vpn0", id="appended-behind"
        ),
        pytest.param(
            ["10.66.0.0/16 nexthop dev lan weight 1 nexthop dev vpn0 weight 2"], "10.66.0.0/16 dev vpn0", id="multipath"
        ),
    ],
)
@pytest.mark.parametrize("downstream", [pytest.param(None, id="auto"), pytest.param(["lan"], id="explicit")])
def test_one_key_one_route(twins: list[str], kept: str, downstream: list[str] | None) -> None:
    """Of two routes with one key in a table the own link's stays: the kernel has room for one."""
    facts = Facts((VPN, LAN), tuple(map(route, twins)))
    found = [
        line for line in table_of(desire(policy(INSIDE, downstream=downstream), facts), INSIDE) if "default" not in line
    ]
    assert found == [kept]


# --- detours ---------------------------------------------------------------------------------------------------------

FIRST = identity("first", 1, "vpn0", addresses=["192.0.2.130"], when_down="second")
SECOND = identity("second", 2, "wan", addresses=["203.0.113.2"], next_hop="auto", when_down="third")
THIRD = identity("third", 3, "wan2", addresses=["198.51.100.2"], next_hop="auto", when_down="main")
THREE = host(VPN, WAN, link("wan2", "198.51.100.2/24"), routes=(*DEFAULTS, f"{OTHER_UPLINK} metric 5"))


def test_detours() -> None:
    """`when_down` is followed from identity to identity, and to main where that ends it."""
    chained = policy(FIRST, SECOND, THIRD)
    assert detours(chained, FIRST) == ((SECOND, THIRD), True)
    assert detours(chained, THIRD) == ((), True)
    closed = policy(replace(FIRST, when_down="unreachable"), SECOND, THIRD)
    assert detours(closed, closed.identities[0]) == ((), False)


@pytest.mark.parametrize(
    ("facts", "defaults"),
    [
        pytest.param(
            THREE,
            [
                "dev vpn0 metric 1024 src 192.0.2.130",
                "via 203.0.113.1 dev wan metric 1025",
                "via 198.51.100.1 dev wan2 metric 1026",
            ],
            id="all-up",
        ),
        pytest.param(
            replace(THREE, links=(replace(VPN, carrier=False), *THREE.links[1:])),
            ["via 203.0.113.1 dev wan metric 1025", "via 198.51.100.1 dev wan2 metric 1026"],
            id="own-link-dead",
        ),
        pytest.param(
            replace(THREE, links=(VPN, THREE.links[2])),
            ["dev vpn0 metric 1024 src 192.0.2.130", "via 198.51.100.1 dev wan2 metric 1026"],
            id="the-next-road-absent",
        ),
    ],
)
def test_roads_in_order(facts: Facts, defaults: list[str]) -> None:
    """The roads stand behind each other by their metrics, and none that is closed is among them."""
    desired = desire(policy(FIRST, SECOND, THIRD), facts)
    found = sorted(
        (item for item in desired.routes if item.table == FIRST.table and not item.destination.length),
        key=lambda item: item.metric,
    )
    assert [str(item).replace(" table 4001", "").removesuffix(" protocol 73") for item in found] == [
        f"default {words}" for words in defaults
    ]


# --- down by a probe -------------------------------------------------------------------------------------------------

SILENT = "nobody answers"
PROBE = Probe(ip_address("198.51.100.53"), every=2.0, fail_after=3)
FAR_PROBE = "198.51.100.53 via 203.0.113.1 dev wan metric 1024 src 203.0.113.2"


def probed(target: str = "198.51.100.53") -> Identity:
    return replace(OUTSIDE, probe=replace(PROBE, target=ip_address(target)))


def test_down_by_a_probe() -> None:
    """An identity that counts as down is closed in every family, for that reason, and by no fault of its host's."""
    desired = desire(policy(INSIDE, probed()), GATEWAY, {"outside": SILENT})
    assert [item.closed for item in standing(desired, "outside").ways] == [SILENT, SILENT]
    assert not any("default via" in line for line in table_of(desired, OUTSIDE))
    assert table_of(desired, INSIDE) == table_of(desire(policy(INSIDE, probed()), GATEWAY), INSIDE)
    assert desired.faults == ()


def test_a_down_identity_takes_its_detour() -> None:
    """`when_down` holds for one whose link is up; nobody else takes the road of one that is down."""
    desired = desire(policy(FIRST, SECOND, THIRD), THREE, {"first": SILENT, "second": SILENT})
    assert [line for line in table_of(desired, FIRST) if line.startswith("default")] == [
        "default via 198.51.100.1 dev wan2 metric 1026"
    ]


@pytest.mark.parametrize(
    ("target", "down", "found"),
    [
        pytest.param("198.51.100.53", True, [FAR_PROBE], id="far-away"),
        pytest.param("198.51.100.53", False, [], id="while-up"),
        pytest.param("203.0.113.53", True, [], id="in-the-links-network"),
        pytest.param(
            "2001:db8:53::1",
            True,
            ["2001:db8:53::1 via 2001:db8:203::1 dev wan metric 1024 src 2001:db8:203::2"],
            id="ipv6",
        ),
    ],
)
def test_road_of_a_probe(target: str, down: bool, found: list[str]) -> None:
    """While its identity counts as down a probe keeps a road of its own by its link, unless the link leads there."""
    outside = probed(target)
    desired = desire(policy(outside), GATEWAY, {"outside": SILENT} if down else {})
    assert [line for line in table_of(desired, outside) if line.startswith(target)] == found


def test_no_road_for_a_probe_without_a_link() -> None:
    """A way that is closed for a reason of its host's says that one, and has no road for a probe."""
    desired = desire(policy(probed()), host(replace(WAN, up=False)), {"outside": SILENT})
    assert way(desired, "outside") == Way(IPV4, closed="link wan is down")
    assert {item.destination.length for item in desired.routes} == {0}


def test_probe_of_this_host() -> None:
    """A probe whose target this very host has is noted: it would always be answered."""
    outside = probed("10.9.0.1")
    note = "identity outside: the probe's target 10.9.0.1 is an address of this host: it proves nothing"
    assert note in desire(policy(outside), GATEWAY).notes


# --- roads that change -----------------------------------------------------------------------------------------------

TWO_UP = policy(replace(INSIDE, when_down="outside"), OUTSIDE)
OTHER_ROUTER = host(LO, WAN, VPN, LAN, routes=("0.0.0.0/0 via 203.0.113.9 dev wan", DEFAULTS[1]))
MOVED = replace(VPN, addresses=(LinkAddress(ip_address("192.0.2.131"), 25), *VPN.addresses[1:]))


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        pytest.param(GATEWAY, GATEWAY, set(), id="nothing"),
        pytest.param(GATEWAY, replace(GATEWAY, links=(LO, WAN, VPN)), set(), id="another-link"),
        pytest.param(GATEWAY, OTHER_ROUTER, {"outside"}, id="next-hop"),
        pytest.param(GATEWAY, host(LO, WAN, LAN, routes=DEFAULTS), {"inside"}, id="detour"),
        pytest.param(host(LO, WAN, LAN, routes=DEFAULTS), GATEWAY, {"inside"}, id="back-from-the-detour"),
        pytest.param(host(LO, WAN, LAN, routes=DEFAULTS), host(LO, WAN, LAN), set(), id="closed"),
        pytest.param(host(LO, VPN), GATEWAY, {"outside"}, id="opened"),
    ],
)
def test_roads_changed(before: Facts, after: Facts, changed: set[str]) -> None:
    """A road is its hops, also those of the identity that stands in; one that is closed is told when it opens."""
    assert names(roads_changed(roads_taken(desire(TWO_UP, before)), roads_taken(desire(TWO_UP, after)))) == changed


def names(changed: frozenset[tuple[str, Family]]) -> set[str]:
    return {name for name, _ in changed}


@pytest.mark.parametrize(("masquerade", "changed"), [(False, set()), (True, {"inside"})], ids=["kept", "translated"])
def test_another_address_to_translate_to(masquerade: bool, changed: set[str]) -> None:
    """Where members are translated, another own address makes another road: the old one's connections are lost."""
    inside = identity("inside", 1, "vpn0", members=["10.9.0.0/24"], masquerade=masquerade)
    before, after = (roads_taken(desire(policy(inside), host(vpn, LAN))) for vpn in (VPN, MOVED))
    assert names(roads_changed(before, after)) == changed


def test_roads_of_a_new_identity() -> None:
    """An identity that a new policy brings has had no road that could have changed."""
    before, after = (roads_taken(desire(policy(*each), GATEWAY)) for each in ([INSIDE], [INSIDE, OUTSIDE]))
    assert roads_changed(before, after) == set()


BOTH_LANS = ["10.9.0.0/24", "2001:db8:9::/64"]


@pytest.mark.parametrize(
    ("members", "masquerade", "reached"),
    [
        pytest.param(BOTH_LANS, True, {IPV4}, id="translated"),
        pytest.param(BOTH_LANS, False, {IPV4, IPV6}, id="as-they-are"),
        pytest.param(BOTH_LANS[:1], True, {IPV4, IPV6}, id="nobody-of-the-family"),
    ],
)
def test_no_network_without_an_address_to_translate_to(
    members: list[str], masquerade: bool, reached: set[Family]
) -> None:
    """Members who are to be translated don't reach the link's networks either as long as it has no address."""
    inside = identity("inside", 1, "vpn0", members=members, masquerade=masquerade)
    networks = ("192.0.2.0/25 dev vpn0", "2001:db8:3::/64 dev vpn0")  # those of IPv6 are there before its address is
    facts = host(replace(VPN, addresses=VPN.addresses[:1]), LAN, routes=networks)
    desired = desire(policy(inside), facts)
    own = [item for item in desired.routes if item.destination.length and any(hop.link == "vpn0" for hop in item.hops)]
    assert {item.family for item in own} == reached
    for family in Family:
        wanted = Wanted(family, desired, facts).networks(inside).prefixes
        assert {item.destination for item in own if item.family is family} == {*wanted} - {
            item.destination for item in downstream_routes(desired.policy, facts, family)
        }


# --- src_valid_mark --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rp_filter", "links"),
    [pytest.param(0, set(), id="off"), pytest.param(1, {"vpn0"}, id="strict"), pytest.param(2, set(), id="loose")],
)
def test_src_valid_mark(rp_filter: int, links: set[str]) -> None:
    """src_valid_mark is wanted where rp_filter takes effect as strict, on identities' links and no others."""
    facts = host(replace(VPN, rp_filter=rp_filter), WAN, replace(LAN, rp_filter=1))
    assert desire(policy(INSIDE, OUTSIDE), facts).src_valid_mark == links


# --- without a host --------------------------------------------------------------------------------------------------


def test_review_without_facts() -> None:
    """Without facts there is what the policy alone says; the rest is said in words and nothing is guessed."""
    desired = desire(policy(INSIDE, OUTSIDE), None)
    assert not desired.host_known
    assert desired.notes == ()
    assert table_of(desired, INSIDE) == [
        "default dev vpn0 metric 1024 src 192.0.2.130",
        "default dev vpn0 metric 1024 src 2001:db8:4::130",
        "unreachable default metric 4294967295",
        "unreachable default metric 4294967295",
    ]
    assert table_of(desired, OUTSIDE) == ["unreachable default metric 4294967295"] * 2
    assert [item.unknown for item in standing(desired, "outside").ways] == [
        "main's ipv4 default on wan",
        "main's ipv6 default on wan",
    ]


# --- laws ------------------------------------------------------------------------------------------------------------

given_both = given(policies(), hosts())


@given_both
def test_every_address_in_one_class(written: Policy, facts: Facts) -> None:
    """Every address is in one class, that of the longest prefix that holds it, or in none."""
    desired = desire(written, facts)
    sources = [
        (prefix, item.identity.name)
        for item in desired.standings
        for prefix in (*map(Prefix.host, item.addresses), *item.identity.members)
    ]
    edges = {ip_address(_bytes(p, value)) for p, _ in sources for value in (p.address, p.last) if p.length}
    for address in edges | {ip_address("203.0.113.77"), ip_address("2001:db8:ffff::1")}:
        holders = [
            span.identity
            for span in desired.classes
            if span.family is Family.of(address) and span.first <= int(address) <= span.last
        ]
        found = lookup(by_name(sources), address)
        assert holders == ([found[1]] if found else [])


def _bytes(prefix: Prefix, value: int) -> bytes:
    return value.to_bytes(prefix.family.bits // 8, "big")


@given_both
def test_own_addresses_are_ones_alone(written: Policy, facts: Facts) -> None:
    """No address is an own address of two identities, and none of one is another one's member by itself."""
    standings = desire(written, facts).standings
    every = [address for item in standings for address in item.addresses]
    assert len(every) == len(set(every))
    for item in standings:
        members = {prefix for other in standings if other is not item for prefix in other.identity.members}
        assert not members & set(map(Prefix.host, item.addresses))


@given_both
def test_no_way_out_by_a_foreign_link(written: Policy, facts: Facts) -> None:
    """A table leads by its identity's own link, to the hosts behind the gateway, or by the roads of `when_down`."""
    desired = desire(written, facts)
    theirs = {item.link for item in written.identities}
    behind = {each.name for each in facts.links} - theirs - {"lo"}
    if written.downstream is not None:
        behind = set(written.downstream)
    for each in written.identities:
        roads = {each.link} | {other.link for other in detours(written, each)[0]}
        for item in (item for item in desired.routes if item.table == each.table):
            links = {hop.link for hop in item.hops}
            assert links <= (behind | {each.link} if item.destination.length else roads)
            assert links or item == last_route(item.family, each.table)


@given_both
def test_closed_unless_main_is_allowed(written: Policy, facts: Facts) -> None:
    """Each family of an identity has a last route that is unreachable, unless its `when_down` ends in main."""
    desired = desire(written, facts)
    for item in desired.standings:
        _, main = detours(written, item.identity)
        last = {last_route(family, item.identity.table) for family in item.families}
        assert last & desired.routes == (set() if main else last)


@given_both
def test_rules_of_an_identity(written: Policy, facts: Facts) -> None:
    """Each family has one rule for the mark, each own address one of its own, and no others look up a table."""
    desired = desire(written, facts)
    wanted = set()
    for item in desired.standings:
        each = item.identity
        wanted |= {Rule(family, each.priority, each.table, fwmark=each.fwmark) for family in item.families}
        wanted |= {
            Rule(Family.of(address), each.priority, each.table, source=Prefix.host(address))
            for address in item.addresses
        }
    assert {rule for rule in desired.rules if rule.action == LOOKUP} == wanted


@given_both
def test_members_without_a_mark_are_refused(written: Policy, facts: Facts) -> None:
    """Every member's prefix is refused while it is unmarked, behind all other rules; what the host sends goes around.

    Unless nothing is to be stopped.
    """
    desired = desire(written, facts)
    if not written.kernel.enforce:
        assert {rule.action for rule in desired.rules} == {LOOKUP}
        return
    last = max(rule.priority for rule in desired.rules if rule.action == LOOKUP)
    for family in Family:
        guards = [rule for rule in desired.rules if rule.family is family and rule.action != LOOKUP]
        refused = [rule for rule in guards if rule.action == UNREACHABLE]
        members = {m for each in written.identities for m in each.members if m.family is family}
        assert all(any(covers(rule, member) for rule in refused) for member in members)
        assert {rule.source for rule in refused} <= members
        assert {rule.unmarked for rule in refused} <= {written.kernel.mark_mask}
        around = [(rule.iif, rule.target) for rule in guards if rule.action == GOTO]
        landing = [rule.priority for rule in guards if rule.action == NOP]
        assert around == [("lo", priority) for priority in landing]
        assert len(landing) == bool(members)
        assert all(last < rule.priority for rule in guards)


def covers(rule: Rule, member: Prefix) -> bool:
    return rule.source is not None and rule.source.address <= member.address and member.last <= rule.source.last


def test_too_many_members_to_refuse() -> None:
    """The kernel tries rule after rule: so many members that it would cost more than it is worth are not refused."""
    members = [f"10.{number}.0.0/24" for number in range(GUARDED + 1)]
    few, many = (desire(policy(identity("inside", 1, "vpn0", members=some)), None) for some in (members[1:], members))
    assert len([rule for rule in few.rules if rule.action == UNREACHABLE]) == GUARDED
    assert not [rule for rule in many.rules if rule.action != LOOKUP]


@given_both
def test_only_our_tables(written: Policy, facts: Facts) -> None:
    """Routes are in identities' tables, never in main, one to a key, and prefer only sources that the host has."""
    desired = desire(written, facts)
    assert {item.table for item in desired.routes} <= {each.table for each in written.identities} - {TABLE_MAIN}
    assert len({item.key for item in desired.routes}) == len(desired.routes)
    there = {address.address for each in facts.links for address in each.addresses}
    assert {item.source for item in desired.routes} <= there | {None}


@given_both
def test_open_or_closed_with_a_reason(written: Policy, facts: Facts) -> None:
    """With the host known, a way has hops or a reason, never both; and the table has a default exactly when open."""
    desired = desire(written, facts)
    for item in desired.standings:
        for each in item.ways:
            assert bool(each.hops) != bool(each.closed)
            assert not each.unknown
            own = [
                found
                for found in desired.routes
                if (found.table, found.metric) == (item.identity.table, METRIC_OWN) and found.family is each.family
                if not found.destination.length
            ]
            assert [found.hops for found in own] == ([each.hops] if each.hops else [])


@given(policies(), hosts(), st.data())
def test_a_lost_link_is_its_own_identities_loss(written: Policy, facts: Facts, data: st.DataObject) -> None:
    """When a link goes, the tables of identities that neither leave nor detour by it stay as they are."""
    gone = data.draw(st.sampled_from(sorted({each.link for each in written.identities})))
    left = Facts(
        tuple(each for each in facts.links if each.name != gone),
        tuple(item for item in facts.routes if all(hop.link != gone for hop in item.hops)),
    )
    before, after = desire(written, facts), desire(written, left)
    for each in written.identities:
        if gone not in {each.link, *(other.link for other in detours(written, each)[0])}:
            # What the lost link had, another identity's "auto" may now have on a link of its own: no loss.
            assert before.routes >= {item for item in after.routes if item.table == each.table and item.hops == ()}
            assert _defaults(before, each) == _defaults(after, each)


@given(policies(), hosts(), st.data())
def test_who_is_down_is_closed(written: Policy, facts: Facts, data: st.DataObject) -> None:
    """Whoever counts as down has no way, nothing leads by its link but its networks and the road of its probe, and
    that leads nowhere else; all that is left of the others is what they had.
    """
    down = data.draw(st.sets(st.sampled_from([each.name for each in written.identities])))
    before, after = desire(written, facts), desire(written, facts, dict.fromkeys(down, SILENT))
    assert after.classes == before.classes
    assert after.rules == before.rules
    for item in after.standings:
        each = item.identity
        assert not (each.name in down and any(road.hops for road in item.ways))
        more = {found for found in after.routes - before.routes if found.table == each.table}
        assert {found.destination for found in more} <= ({Prefix.host(each.probe.target)} if each.probe else set())
        assert {hop.link for found in more for hop in found.hops} <= {each.link}
        assert not more or each.name in down


def _defaults(desired: Desired, each: Identity) -> set[str]:
    return {
        f"{item.family} {item.hops} {item.metric}"
        for item in desired.routes
        if item.table == each.table and not item.destination.length
    }


@given(policies(), hosts(), st.data())
def test_facts_in_any_order(written: Policy, facts: Facts, data: st.DataObject) -> None:
    """The order in which a host tells its links, addresses and routes means nothing."""
    links = [
        replace(each, addresses=tuple(data.draw(st.permutations(each.addresses))))
        for each in data.draw(st.permutations(facts.links))
    ]
    routes = data.draw(st.permutations(facts.routes))
    assert desire(written, Facts(tuple(links), tuple(routes))) == desire(written, facts)


def test_metrics_leave_room() -> None:
    """A road of `when_down`, however many there are, stands before the last route."""
    assert METRIC_OWN + 63 < METRIC_LAST


def test_link_is_found_by_its_name() -> None:
    """A link that only begins like the policy's is another link."""
    other: Link = replace(WAN, name="wan0")
    assert way(desire(policy(OUTSIDE), host(other)), "outside").closed == "there is no link wan"
