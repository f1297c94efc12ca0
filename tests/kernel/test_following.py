"""A host that changes: what "auto" stands for and the routes to the hosts behind are followed, look by look."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from agent import facts, reconcile
from agent.addresses import Family
from agent.kernel.rtnl import Rtnl
from agent.model import Link
from agent.policy import load
from tests.kernel.admin import Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import LAN_GATEWAY, OUTSIDE, PATIENCE, Host

POLICY = policy_text({"addresses": "auto", "next_hop": "auto"})
#: Preferences of a router (RFC 4191): medium, high, low.
MEDIUM, HIGH, LOW = 0, 1, 3


@pytest.fixture
def far(peers: Peers) -> Host:
    return peers("far")


@pytest.fixture
def admin(netns: Host, far: Host, tmp_path: Path) -> Admin:
    lay_links(netns, far)
    return Admin(netns, tmp_path)


def follow(admin: Admin, text: str = POLICY) -> None:
    """A pass; a second one finds nothing to do."""
    admin.apply(text)
    assert admin.plan(text).text == ""


def table(admin: Admin, number: int, option: str = "-4") -> list[str]:
    """A table's routes as `ip` words them, without what is always the same, and the last route."""
    listed = admin.host.ip("-N", option, "route", "list", "table", str(number), "proto", "73").splitlines()
    short = (line.replace("proto 73 ", "").replace("scope 253 ", "").replace(" pref medium", "") for line in listed)
    short = (line.replace(" linkdown", "") for line in short)
    return [line.strip() for line in short if "metric 4294967295" not in line]


def defaults(admin: Admin, number: int, option: str = "-4") -> list[str]:
    """A table's defaults, their metrics left out, with the lines of their next hops."""
    lines = [line.replace(" metric 1024", "") for line in table(admin, number, option)]
    return [line for line in lines if line.startswith(("default", "nexthop"))]


def sources(admin: Admin, number: int, option: str) -> set[str]:
    """The own addresses that a table has a rule for."""
    return {
        rule["src"] for rule in admin.host.ip_json("-N", option, "rule", "list") if rule.get("table") == str(number)
    } - {"all"}


# --- next hops -------------------------------------------------------------------------------------------------------


def test_the_best_default_of_a_link(admin: Admin) -> None:
    """Of several defaults on a link the one with the lowest metric is followed, as they come and go."""
    for change, via in (
        ("add default via 203.0.113.8 dev wan metric 50", "203.0.113.1"),
        ("delete default via 203.0.113.1 dev wan", "203.0.113.8"),
        ("add default via 203.0.113.9 dev wan metric 20", "203.0.113.9"),
        ("add default via 192.0.2.129 dev vpn0 metric 5", "203.0.113.9"),
        ("delete default via 203.0.113.9 dev wan", "203.0.113.8"),
    ):
        admin.host.ip("route", *change.split())
        follow(admin)
        assert defaults(admin, 4002) == [f"default via {via} dev wan src {OUTSIDE['ipv4']}"]
    admin.host.ip("route", "delete", "default", "dev", "wan")
    follow(admin)
    assert defaults(admin, 4002) == []


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        pytest.param("-4", OUTSIDE["ipv4"], "203.0.113.9", id="ipv4"),
        pytest.param("-6", OUTSIDE["ipv6"], "2001:db8:2::9", id="ipv6"),
    ],
)
def test_another_gateway(admin: Admin, option: str, before: str, after: str) -> None:
    """A default that gets another gateway is replaced, in one step."""
    follow(admin)
    admin.host.ip(option, "route", "replace", "default", "via", after, "dev", "wan")
    words = [line.split()[1:5] for line in admin.plan(POLICY).text.splitlines() if "default" in line]
    assert words in (
        [["ip", "route", "delete", "default"], ["ip", "route", "replace", "default"]],
        [["ip", "-6", "route", "delete"], ["ip", "-6", "route", "replace"]],
    )
    follow(admin)
    assert defaults(admin, 4002, option) == [f"default via {after} dev wan src {before}"]


@pytest.mark.parametrize(
    ("option", "wan", "vpn"),
    [
        pytest.param("-4", ("203.0.113.1", "203.0.113.2"), ("192.0.2.129", "192.0.2.130"), id="ipv4"),
        pytest.param("-6", ("2001:db8:2::1", "2001:db8:2::2"), ("2001:db8:4::1", "2001:db8:4::130"), id="ipv6"),
    ],
)
def test_one_default_over_two_links(admin: Admin, option: str, wan: tuple[str, str], vpn: tuple[str, str]) -> None:
    """Of a default with a leg on each of two links, each identity has the leg on its own, as long as it is there."""
    route = [option, "route", "replace", "default"]
    legs = ["nexthop", "via", wan[0], "dev", "wan", "weight", "3"], ["nexthop", "via", vpn[0], "dev", "vpn0"]
    admin.host.ip(option, "route", "delete", "default")
    admin.host.ip(*route, *legs[0], *legs[1])
    follow(admin)
    assert defaults(admin, 4001, option) == [f"default via {vpn[0]} dev vpn0 src {vpn[1]}"]
    assert defaults(admin, 4002, option) == [f"default via {wan[0]} dev wan src {wan[1]}"]
    admin.host.ip(*route, *legs[1][1:])
    follow(admin)
    assert defaults(admin, 4001, option) == [f"default via {vpn[0]} dev vpn0 src {vpn[1]}"]
    assert defaults(admin, 4002, option) == []


def test_a_leg_whose_link_is_down(admin: Admin) -> None:
    """The leg of a link that went down stays in main, marked dead; its identity is closed, the other one's isn't."""
    admin.host.ip_batch("""
        route replace default nexthop via 203.0.113.1 dev wan nexthop via 192.0.2.129 dev vpn0
    """)
    follow(admin)
    admin.host.ip("link", "set", "vpn0", "down")
    assert "dead" in admin.host.ip("route", "list", "default")
    follow(admin)
    assert defaults(admin, 4001) == []
    assert defaults(admin, 4002) == ["default via 203.0.113.1 dev wan src 203.0.113.2"]


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_link_that_changes_its_name(admin: Admin) -> None:
    """An identity goes with the name: closed while no link has it, open by whichever link gets it."""
    follow(admin)
    before = table(admin, 4001)
    admin.host.ip("link", "set", "vpn0", "name", "old0")
    follow(admin)
    assert "192.0.2.128/25 dev old0 src 192.0.2.130" in table(admin, 4001)  # as of any link that is nobody's
    assert sources(admin, 4001, "-4") == set()
    admin.host.ip("link", "set", "old0", "name", "vpn0")
    follow(admin)
    assert table(admin, 4001) == before


def test_two_links_that_exchange_their_names(admin: Admin) -> None:
    """Names that move from link to link between two looks are seen for what they are."""
    follow(admin)
    admin.host.ip_batch("link set wan name x\nlink set vpn0 name wan\nlink set x name vpn0")
    follow(admin)
    assert sources(admin, 4001, "-4") == {"203.0.113.2"}
    assert defaults(admin, 4001) == ["default via 203.0.113.1 dev vpn0 src 203.0.113.2"]
    assert sources(admin, 4002, "-4") == {"192.0.2.130"}
    assert defaults(admin, 4002) == []


def test_a_link_renamed_in_the_midst_of_a_look(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look shows the host before or after it, and never a link by its old name without its sysctls."""
    admin.host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    admin.apply(POLICY)
    listed = Rtnl.links

    def links_and_a_rename(rtnl: Rtnl) -> tuple[Link, ...]:
        found = listed(rtnl)
        if any(link.name == "vpn0" for link in found):
            admin.host.ip("link", "set", "vpn0", "name", "vpn9")
        return found

    monkeypatch.setattr(Rtnl, "links", links_and_a_rename)
    with reconcile.opened() as kernel:
        seen = facts.take(load(admin.file), kernel.rtnl, kernel.nfnl, kernel.sysctls)
    assert {"vpn9", "wan"} <= {link.name for link in seen.links}
    assert "vpn0" not in {link.name for link in seen.links}


def test_a_link_that_is_made_anew(admin: Admin) -> None:
    """A link of the same name, made anew with another address, is the identity's; of the old address nothing stays."""
    follow(admin)
    index = admin.host.index("vpn0")
    admin.host.ip("link", "delete", "vpn0")
    follow(admin)
    assert sources(admin, 4001, "-4") == set()
    admin.host.ip_batch("""
        link add vpn0 type veth peer name far0
        link set vpn0 up
        link set far0 up
        address add 192.0.2.140/25 dev vpn0
        route add default dev vpn0 metric 7
    """)
    assert admin.host.index("vpn0") != index
    follow(admin)
    assert sources(admin, 4001, "-4") == {"192.0.2.140"}
    assert defaults(admin, 4001) == ["default dev vpn0 src 192.0.2.140"]


def test_a_link_that_went_meanwhile(admin: Admin) -> None:
    """A link that goes in the middle of a look has no routes, and is no trouble: its event brings the next look."""
    with reconcile.opened() as kernel:
        assert "vpn0" in {link.name for link in kernel.rtnl.links()}
        admin.host.ip("link", "delete", "vpn0")
        assert kernel.rtnl.main_routes(Family.IPV4, "vpn0") == ()
        assert "vpn0" not in {hop.link for route in kernel.rtnl.survey().near for hop in route.hops}


# --- addresses -------------------------------------------------------------------------------------------------------


def test_an_address_that_is_a_neighbours(admin: Admin, far: Host) -> None:
    """An address that a neighbour turned out to have (RFC 4862, 5.4) is nobody's here: the kernel doesn't use it."""
    taken = "2001:db8:2::77"
    far.ip("address", "add", f"{taken}/64", "dev", "wan")
    admin.host.sysctl("net/ipv6/conf/wan/accept_dad", 1)
    admin.host.sysctl("net/ipv6/conf/wan/dad_transmits", 1)
    admin.host.ip("address", "add", f"{taken}/64", "dev", "wan")
    deadline = time.monotonic() + PATIENCE
    while taken not in admin.host.ip("-6", "address", "show", "dadfailed"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    follow(admin)
    assert sources(admin, 4002, "-6") == {OUTSIDE["ipv6"]}
    with pytest.raises(OSError, match="Cannot assign requested address"):
        admin.host.udp(taken)


# --- hosts behind ----------------------------------------------------------------------------------------------------


def test_routes_to_the_hosts_behind(admin: Admin) -> None:
    """The routes of a downstream link come to every identity's table, and go again, and so does the link."""
    text = policy_text(downstream=["lan"])
    follow(admin, text)
    for change, found in (("add 10.8.0.0/16 via 10.9.0.254", True), ("delete 10.8.0.0/16", False)):
        admin.host.ip("route", *change.split())
        follow(admin, text)
        for number in (4001, 4002):
            assert ("10.8.0.0/16 via 10.9.0.254 dev lan" in table(admin, number)) == found
    admin.host.ip("link", "delete", "lan")
    follow(admin, text)
    assert not [line for line in table(admin, 4001) if "lan" in line]


def test_links_of_nobody(admin: Admin) -> None:
    """By default the networks of every other link are good for every identity, also of one that comes later."""
    follow(admin)
    admin.host.ip_batch("link add docker0 type veth\nlink set docker0 up\naddress add 172.17.0.1/16 dev docker0")
    follow(admin)
    assert "172.17.0.0/16 dev docker0 src 172.17.0.1" in table(admin, 4001)
    admin.host.ip("link", "set", "docker0", "down")
    follow(admin)
    assert not [line for line in table(admin, 4001) if "docker0" in line]
    assert [line for line in table(admin, 4001) if LAN_GATEWAY["ipv4"] in line]


# --- router advertisements -------------------------------------------------------------------------------------------

PREFIX = IPv6Network("2001:db8:7::/64")


ROUTER = "fe80::1"


def advertise(
    far: Host,
    router: str = ROUTER,
    *,
    lifetime: int = 1800,
    valid: int = 86400,
    preferred: int = 14400,
    preference: int = MEDIUM,
) -> None:
    """Send a router advertisement (RFC 4861) with an autonomous prefix (RFC 4862) to the gateway's wan."""
    message = struct.pack("!BBHBBHII", 134, 0, 0, 64, preference << 3, lifetime, 0, 0)
    message += struct.pack(
        "!BBBBIII16s", 3, 4, PREFIX.prefixlen, 0xC0, valid, preferred, 0, PREFIX.network_address.packed
    )
    far.ip("address", "replace", f"{router}/64", "dev", "wan", "nodad")
    with far.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.bind((router, 0, 0, far.index("wan")))
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.sendto(message, ("ff02::1", 0, 0, far.index("wan")))


def until(admin: Admin, seen: Callable[[Link], bool]) -> Link:
    """Wait until the gateway's wan looks like that."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with reconcile.opened() as kernel:
            (link,) = (link for link in kernel.rtnl.links() if link.name == "wan")
        if seen(link):
            return link
        time.sleep(0.01)
    raise TimeoutError(f"wan is still {link}")


def until_gone(admin: Admin, router: str) -> None:
    """Wait until main has no default by a router."""
    deadline = time.monotonic() + PATIENCE
    while router in admin.host.ip("-6", "route", "list", "default"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def slaac(admin: Admin, far: Host) -> Admin:
    """A gateway whose wan takes addresses and a default from advertisements alone, temporary addresses too."""
    for key, value in (("accept_ra", 2), ("use_tempaddr", 2), ("router_solicitations", 0)):
        admin.host.sysctl(f"net/ipv6/conf/wan/{key}", value)
    admin.host.ip("-6", "route", "delete", "default")
    admin.host.ip("address", "delete", f"{OUTSIDE['ipv6']}/64", "dev", "wan")
    return admin


def advertised(link: Link) -> dict[IPv6Address, str]:
    """The addresses that wan made of the prefix, and what each is."""
    return {
        item.address: "deprecated" * item.deprecated or "temporary" * item.temporary or "stable"
        for item in link.addresses
        if isinstance(item.address, IPv6Address) and item.address in PREFIX and not item.tentative
    }


def test_advertised_addresses(slaac: Admin, far: Host) -> None:
    """Every address made of an advertised prefix is the identity's; the default prefers the one that will stay, and
    deprecated ones speak on until they are gone.
    """
    advertise(far)
    link = until(slaac, lambda link: sorted(advertised(link).values()) == ["stable", "temporary"])
    follow(slaac)
    stable, temporary = sorted(advertised(link), key=lambda address: advertised(link)[address])
    assert sources(slaac, 4002, "-6") == {str(stable), str(temporary)}
    assert defaults(slaac, 4002, "-6") == [f"default via {ROUTER} dev wan src {stable}"]
    advertise(far, preferred=0)
    until(slaac, lambda link: {*advertised(link).values()} == {"deprecated"})
    follow(slaac)
    assert sources(slaac, 4002, "-6") == {str(stable), str(temporary)}
    slaac.host.ip("address", "delete", f"{temporary}/64", "dev", "wan")
    follow(slaac)
    assert sources(slaac, 4002, "-6") == {str(stable)}


def test_an_advertised_default_that_is_withdrawn(slaac: Admin, far: Host) -> None:
    """A router that says it is one no longer (lifetime 0) is left in the next look."""
    advertise(far)
    until(slaac, lambda link: bool(advertised(link)))
    follow(slaac)
    assert len(defaults(slaac, 4002, "-6")) == 1
    advertise(far, lifetime=0)
    until_gone(slaac, ROUTER)
    follow(slaac)
    assert defaults(slaac, 4002, "-6") == []


def test_an_expired_default(slaac: Admin) -> None:
    """A default whose time is over lies in main until it is collected, and is none any longer."""
    slaac.host.ip("-6", "address", "add", "2001:db8:2::2/64", "dev", "wan")
    slaac.host.ip_batch(
        """
        route add default via 2001:db8:2::1 dev wan proto ra metric 5 expires 1
        route add default via 2001:db8:2::9 dev wan proto ra metric 9 expires 600
    """,
        "-6",
    )
    follow(slaac)
    assert defaults(slaac, 4002, "-6") == ["default via 2001:db8:2::1 dev wan src 2001:db8:2::2"]
    deadline = time.monotonic() + PATIENCE
    while "expires -" not in slaac.host.ip("-6", "route", "list", "default") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "via 2001:db8:2::1" in slaac.host.ip("-6", "route", "list", "default")
    follow(slaac)
    assert defaults(slaac, 4002, "-6") == ["default via 2001:db8:2::9 dev wan src 2001:db8:2::2"]


def test_a_preferred_router(slaac: Admin, far: Host) -> None:
    """Of two routers that advertise themselves, the one that the network prefers (RFC 4191) is followed."""
    for router, preference in (("fe80::1", LOW), ("fe80::5", HIGH), ("fe80::3", MEDIUM)):
        advertise(far, router, preference=preference)
    until(slaac, lambda link: bool(advertised(link)))
    assert slaac.host.ip("-6", "route", "list", "default").count("default") == 3
    follow(slaac)
    (found,) = defaults(slaac, 4002, "-6")
    assert found.startswith("default via fe80::5 dev wan src")
    advertise(far, "fe80::5", lifetime=0)
    until_gone(slaac, "fe80::5")
    follow(slaac)
    (found,) = defaults(slaac, 4002, "-6")
    assert found.startswith("default via fe80::3 dev wan src")
