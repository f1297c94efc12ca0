"""The daemon follows its host: addresses, next hops, links, the routes behind it, and roads that are down."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Gateway, Peers
from tests.kernel.net import CHOST, INSIDE, ISP, LAN_HOST, OUTSIDE, WILD, Host
from tests.kernel.running import Site, eventually, kept

POLICY = policy_text({"members": MEMBERS, "masquerade": True})
#: An identity whose members speak by its link, whatever addresses that has.
AUTO = policy_text({"addresses": "auto"})


@pytest.fixture
def far(peers: Peers) -> Host:
    """The far end of all of the gateway's links."""
    return peers("far")


@pytest.fixture
def admin(netns: Host, far: Host, tmp_path: Path) -> Admin:
    lay_links(netns, far)
    far.settle()
    return Admin(netns, tmp_path)


def sources(site: Site) -> dict[str, str]:
    """Whose each source is, of those that are one address."""
    table = site.kernel.nfnl.table("idmark")
    sets = table.sets if table else ()
    return {
        address: verdict.removeprefix("goto id-")
        for nft_set in sets
        if nft_set.name.startswith("sources-")
        for address, verdict in nft_set.elements
        if "/" not in address
    }


def rule_sources(site: Site) -> set[str]:
    """The sources of our rules."""
    return {str(rule.source) for rule in site.kernel.rtnl.our_rules() if rule.source}


def settled(site: Site) -> bool:
    """Whether all is in force, and stays so."""
    # The kernel has it first, then the daemon's metrics.
    return eventually(site.in_force) and eventually(lambda: bool(site.daemon.metric("idmark_in_sync")))


# --- addresses -------------------------------------------------------------------------------------------------------


def test_address_replaced(admin: Admin) -> None:
    """As by DHCP: the new address comes into rules and maps in the pass in which the old one goes: one commit."""
    with kept(admin, POLICY) as site, site.watched() as watch:
        with site.daemon.stopped():
            admin.host.ip_batch(f"""
                address delete {OUTSIDE["ipv4"]}/24 dev wan
                address add 203.0.113.77/24 dev wan
                route add default via {ISP["ipv4"]} dev wan
            """)
        assert eventually(site.in_force), site.said()
        assert sources(site)["203.0.113.77"] == "outside"
        assert OUTSIDE["ipv4"] not in sources(site)
        assert rule_sources(site) & {OUTSIDE["ipv4"], "203.0.113.77"} == {"203.0.113.77"}
        seen = watch.settled()
        assert (seen["new rule"], seen["del rule"], seen["commits"]) == (1, 1, 1)
        assert site.daemon.logged("followed the host") == 1
        assert site.daemon.metric("idmark_repairs_total") == 0


def test_address_gone(admin: Admin) -> None:
    """With the link's last address its family is closed, its rule for the source gone; and back with the address."""
    with kept(admin, AUTO) as site:
        admin.host.ip("address", "delete", f"{INSIDE['ipv4']}/25", "dev", "vpn0")
        assert eventually(lambda: INSIDE["ipv4"] not in rule_sources(site) | sources(site).keys())
        closed = "identity inside: ipv4 is closed"
        assert eventually(lambda: site.daemon.logged(f"warning: {closed}") > 0)
        assert INSIDE["ipv6"] in rule_sources(site)
        admin.host.ip("address", "add", f"{INSIDE['ipv4']}/25", "dev", "vpn0")
        assert eventually(lambda: INSIDE["ipv4"] in rule_sources(site) & sources(site).keys())
        assert settled(site), site.said()
        # Its network may be seen to come before it, which is a reason of its own.
        told = (f"warning: {closed}", f"no longer: {closed}")
        assert eventually(lambda: site.daemon.logged(told[0]) == site.daemon.logged(told[1])), site.said()


def test_address_moves_between_identities(admin: Admin) -> None:
    """An address that goes from one identity's link to another's is the other one's, and never nobody's rule."""
    with kept(admin, AUTO) as site:
        with site.daemon.stopped():
            admin.host.ip_batch("""
                address add 192.0.2.200/32 dev vpn0
                address add 192.0.2.201/32 dev vpn0
            """)
        assert eventually(lambda: sources(site).get("192.0.2.201") == "inside")
        admin.host.ip_batch("address delete 192.0.2.201/32 dev vpn0\naddress add 192.0.2.201/32 dev wan")
        assert eventually(lambda: sources(site).get("192.0.2.201") == "outside")
        assert settled(site), site.said()
        tables = {str(rule.source): rule.table for rule in site.kernel.rtnl.our_rules() if rule.source}
        assert (tables["192.0.2.200"], tables["192.0.2.201"]) == (4001, 4002)


def advertise(far: Host, lifetime: int, valid: int, preferred: int) -> None:
    """A router at the far end of `wan` says 2001:db8:77::/64 is there, and itself a default router.

    `lifetime` is the router's, `valid` and `preferred` the prefix's, in seconds (RFC 4861, 4.2 and 4.6.2).
    """
    with far.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        index = far.index("wan")
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        head = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, lifetime, 0, 0)
        # On the link, and for addresses of the hosts' own.
        prefix = struct.pack("!BBBBIII16s", 3, 4, 64, 0xC0, valid, preferred, 0, IPv6Address("2001:db8:77::").packed)
        sock.sendto(head + prefix, ("ff02::1", 0, 0, index))


def test_slaac(admin: Admin, far: Host) -> None:
    """Addresses of a router's advertisement, a temporary one too, are O's from the moment that they are there.

    Tentative or deprecated, they stay so; the default by that router is followed while it lasts, and so is its end.
    """
    host = admin.host
    for key, value in {"accept_ra": 2, "use_tempaddr": 2, "accept_dad": 1, "dad_transmits": 1}.items():
        host.sysctl(f"net/ipv6/conf/wan/{key}", value)
    host.ip("-6", "route", "delete", "default")
    with kept(admin, POLICY) as site:
        assert eventually(lambda: bool(site.road(WILD["ipv6"], OUTSIDE["ipv6"]).error))

        def made() -> dict[str, bool]:
            """The addresses of that prefix, and whether they are temporary."""
            shown = host.ip_json("-6", "address", "show", "dev", "wan", "scope", "global")
            found = shown[0]["addr_info"] if shown else []
            return {each["local"]: "temporary" in each for each in found if "2001:db8:77:" in each.get("local", "")}

        advertise(far, 1800, 3600, 3600)
        assert eventually(lambda: sorted(made().values()) == [False, True])
        assert eventually(lambda: made().keys() <= sources(site).keys() & rule_sources(site)), site.said()
        assert {sources(site)[address] for address in made()} == {"outside"}
        router = next(
            each["local"]
            for each in far.ip_json("-6", "address", "show", "dev", "wan")[0]["addr_info"]
            if each["scope"] == "link"
        )
        assert eventually(lambda: str(site.road(WILD["ipv6"], OUTSIDE["ipv6"]).via) == router), site.said()
        assert settled(site), site.said()

        before = made()
        advertise(far, 0, 3600, 0)
        assert eventually(lambda: bool(site.road(WILD["ipv6"], OUTSIDE["ipv6"]).error)), site.said()
        assert eventually(lambda: " deprecated " in host.ip("address", "show", "dev", "wan"))
        assert settled(site), site.said()
        assert before.keys() <= sources(site).keys() & rule_sources(site)


# --- next hops, and the routes behind the gateway ---------------------------------------------------------------------


def test_better_default(admin: Admin) -> None:
    """Of several defaults on the link the one of the smallest metric is followed; when it goes, the next."""
    host = admin.host
    with kept(admin, POLICY) as site:
        host.ip_batch("route replace default via 203.0.113.1 dev wan metric 100")
        host.ip_batch("route delete default via 203.0.113.1 dev wan metric 0")
        host.ip_batch("route add default via 203.0.113.9 dev wan metric 50")
        assert eventually(lambda: str(site.road(WILD["ipv4"], OUTSIDE["ipv4"]).via) == "203.0.113.9"), site.said()
        host.ip_batch("route delete default via 203.0.113.9 dev wan metric 50")
        assert eventually(lambda: str(site.road(WILD["ipv4"], OUTSIDE["ipv4"]).via) == "203.0.113.1"), site.said()
        host.ip_batch("route replace default via 203.0.113.5 dev wan metric 100")
        assert eventually(lambda: str(site.road(WILD["ipv4"], OUTSIDE["ipv4"]).via) == "203.0.113.5"), site.said()
        assert site.road(WILD["ipv4"], OUTSIDE["ipv4"]).table == 4002
        host.ip_batch("route delete default")
        assert eventually(lambda: bool(site.road(WILD["ipv4"], OUTSIDE["ipv4"]).error)), site.said()
        assert settled(site), site.said()
        assert site.daemon.metric("idmark_repairs_total") == 0


@pytest.mark.parametrize("downstream", [pytest.param(["lan"], id="by-name"), pytest.param(None, id="auto")])
def test_downstream(admin: Admin, downstream: list[str] | None) -> None:
    """Routes to the hosts behind the gateway come to every identity, and go: by name all, else connected ones."""
    host = admin.host
    with kept(admin, policy_text(downstream=downstream)) as site:
        if downstream:
            host.ip_batch("route add 10.50.0.0/16 via 10.9.0.5 dev lan")
        else:
            host.ip_batch("""
                link add br0 type bridge
                link set br0 up
                address add 10.50.0.1/16 dev br0
            """)
        link = "lan" if downstream else "br0"
        assert eventually(lambda: site.road("10.50.0.9", INSIDE["ipv4"]).link == link), site.said()
        assert eventually(lambda: site.road("10.50.0.9", OUTSIDE["ipv4"]).table == 4002), site.said()
        host.ip("route", "delete", "10.50.0.0/16", "dev", link)
        assert eventually(lambda: site.road("10.50.0.9", INSIDE["ipv4"]).link == "vpn0"), site.said()
        assert settled(site), site.said()


# --- links -----------------------------------------------------------------------------------------------------------


def test_link_renamed(admin: Admin) -> None:
    """A link that is called otherwise is another: closed; and open when it has its name back."""
    host = admin.host
    host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    with kept(admin, POLICY) as site:
        assert site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "vpn0"
        host.ip("link", "set", "vpn0", "name", "vpn9")
        assert eventually(lambda: bool(site.road(WILD["ipv4"], INSIDE["ipv4"]).error)), site.said()
        assert settled(site), site.said()
        assert eventually(lambda: site.daemon.logged("there is no link vpn0") > 0)
        assert host.sysctl("net/ipv4/conf/vpn9/src_valid_mark") == 0
        host.ip("link", "set", "vpn9", "name", "vpn0")
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "vpn0"), site.said()
        assert settled(site), site.said()
        assert host.sysctl("net/ipv4/conf/vpn0/src_valid_mark") == 1


def test_strict_rp_filter(admin: Admin) -> None:
    """rp_filter that becomes strict, as by `sysctl --system`, is noticed: src_valid_mark is set; and cleared."""
    host = admin.host
    with kept(admin, POLICY) as site:
        for strict in (1, 0):
            host.sysctl("net/ipv4/conf/all/rp_filter", strict)
            assert eventually(lambda: host.sysctl("net/ipv4/conf/vpn0/src_valid_mark") == strict), site.said()  # noqa: B023
            assert settled(site), site.said()


def test_link_made_anew(admin: Admin, far: Host) -> None:
    """A link that is deleted is closed; another one of its name, that comes later, is open with its first address."""
    host = admin.host
    with kept(admin, POLICY) as site:
        host.ip("link", "delete", "vpn0")
        assert eventually(lambda: site.daemon.logged("there is no link vpn0") > 0)
        assert eventually(site.in_force), site.said()
        host.ip("link", "add", "vpn0", "type", "veth", "peer", "name", "vpn0", "netns", far.name)
        far.ip("link", "set", "vpn0", "up")
        host.ip_batch(f"link set vpn0 up\naddress add {INSIDE['ipv4']}/25 dev vpn0")
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "vpn0"), site.said()
        assert settled(site), site.said()


def test_links_come_later(netns: Host, far: Host, tmp_path: Path) -> None:
    """On a host with no link at all the daemon is ready, and closed; it opens when the network comes up."""
    admin = Admin(netns, tmp_path)
    with kept(admin, POLICY) as site:
        assert settled(site), site.said()
        assert {*INSIDE.values()} <= rule_sources(site)
        assert not {*OUTSIDE.values()} & rule_sources(site)
        lay_links(netns, far)
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "vpn0"), site.said()
        assert eventually(lambda: site.road(WILD["ipv6"], OUTSIDE["ipv6"]).link == "wan"), site.said()
        assert settled(site), site.said()


@pytest.mark.parametrize(
    ("when_down", "link"),
    [
        pytest.param("unreachable", None, id="unreachable"),
        pytest.param("main", "wan", id="main"),
        pytest.param("outside", "wan", id="other-identity"),
    ],
)
@pytest.mark.parametrize("cut", ["link set vpn0 down", "carrier"])
def test_when_down(admin: Admin, far: Host, when_down: str, link: str | None, cut: str) -> None:
    """While the link is down, or has no carrier, the identity is closed or goes where `when_down` says; then back."""
    host = admin.host
    with kept(admin, policy_text({"when_down": when_down, "members": MEMBERS})) as site:
        if cut == "carrier":
            far.ip("link", "set", "vpn0", "down")
            if when_down == "unreachable":
                link = "vpn0"  # a dead end is as closed as any
        else:
            host.ip(*cut.split())
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == link), site.said()
        assert settled(site), site.said()
        for end in (host, far):
            end.ip("link", "set", "vpn0", "up")
        host.ip("address", "replace", f"{INSIDE['ipv6']}/64", "dev", "vpn0")
        for family in ("ipv4", "ipv6"):
            assert eventually(lambda: site.road(WILD[family], INSIDE[family]).link == "vpn0"), site.said()  # noqa: B023
        assert settled(site), site.said()
        assert site.daemon.metric("idmark_repairs_total") == 0


def test_flaps(admin: Admin) -> None:
    """Flaps of a link are followed, and are no fight; nothing is open in between."""
    with kept(admin, POLICY) as site:
        for _ in range(20):
            admin.host.ip("link", "set", "vpn0", "down")
            admin.host.ip("link", "set", "vpn0", "up")
            assert site.road(WILD["ipv4"], INSIDE["ipv4"]).link in {None, "vpn0"}
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "vpn0"), site.said()
        assert settled(site), site.said()
        assert not site.daemon.logged("keeps undoing")
        assert site.daemon.metric("idmark_fights_total") == 0


# --- probes ----------------------------------------------------------------------------------------------------------

PROBE = {"target": CHOST["ipv4"], "every": "200ms", "fail_after": 2}


def toml(probe: dict[str, object]) -> str:
    """An inline table; policy_text writes JSON, which is none."""
    return "{ " + ", ".join(f"{key} = {value!r}".replace("'", '"') for key, value in probe.items()) + " }"


def with_probe(text: str, probe: dict[str, object]) -> str:
    """The policy with a probe of I's."""
    return text.replace("[identity.inside]\n", f"[identity.inside]\nprobe = {toml(probe)}\n")


DROPS = (
    'table inet t { chain c { type filter hook prerouting priority -300; iifname "gw" ip daddr 192.0.2.50 drop; }; }'
)


def test_probe(gateway: Gateway, tmp_path: Path) -> None:
    """When nobody answers I's probe I goes O's road, and comes back when somebody does; its flows alone are forgotten.

    plan and status take the daemon's word for it meanwhile, and a daemon that is started anew goes on with it.
    """
    admin = Admin(gateway.gw, tmp_path)
    policy = policy_text(
        {"when_down": "outside", "members": MEMBERS, "masquerade": True, "flush_flows": True}, {"flush_flows": True}
    )
    text = with_probe(policy, PROBE)

    def tracked(address: str) -> int:
        return gateway.gw.run(["conntrack", "-L", "-s", address, "-p", "udp"]).count("udp ")

    with kept(admin, text) as site:
        assert eventually(lambda: site.daemon.metric("idmark_identity_probe_success", identity="inside") == 1)
        gateway.gw.send(WILD["ipv4"], INSIDE["ipv4"], port=7001)
        gateway.gw.send(WILD["ipv4"], OUTSIDE["ipv4"], port=7001)
        gateway.lan.send(WILD["ipv4"], LAN_HOST["ipv4"], port=7001)
        assert [*map(tracked, (INSIDE["ipv4"], OUTSIDE["ipv4"], LAN_HOST["ipv4"]))] == [1, 1, 1]

        gateway.corp.nft(DROPS)
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "wan"), site.said()
        assert settled(site), site.said()
        assert eventually(lambda: tracked(INSIDE["ipv4"]) + tracked(LAN_HOST["ipv4"]) == 0), site.said()
        assert tracked(OUTSIDE["ipv4"]) == 1
        assert site.daemon.metric("idmark_identity_probe_success", identity="inside") == 0
        assert admin.idmark("plan").returncode == 0
        assert f"its probe {CHOST['ipv4']} is not answered" in admin.idmark("status").stdout
        assert site.daemon.stop() == 0

    with kept(admin) as site, site.watched() as watch:
        assert site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "wan"
        assert watch.settled() == {}
        gateway.corp.nft("delete table inet t")
        assert eventually(lambda: site.road(WILD["ipv4"], INSIDE["ipv4"]).link == "vpn0"), site.said()
        assert settled(site), site.said()
        assert gateway.gw.ping(WILD["ipv4"], INSIDE["ipv4"])
        assert gateway.isp.counter("foreign4", "bcp38") == 0


ANOTHER = "192.0.2.131"
#: Who of I's arrives at the company, under its addresses of before and after.
ARRIVALS = f"""
table inet arrivals {{
    counter before {{ }}
    counter after {{ }}
    chain arriving {{
        type filter hook prerouting priority -400; policy accept;
        iifname "gw" udp dport 7001 ip saddr {INSIDE["ipv4"]} counter name before
        iifname "gw" udp dport 7001 ip saddr {ANOTHER} counter name after
    }}
}}
"""


def test_connections_follow_the_address(gateway: Gateway, tmp_path: Path) -> None:
    """With flush_flows a member's connection that goes on sending has no packet under an address that I had before."""
    admin, corp = Admin(gateway.gw, tmp_path), gateway.corp
    inside = {"addresses": "auto", "members": MEMBERS, "masquerade": True, "flush_flows": True}
    corp.nft(ARRIVALS)
    done = threading.Event()
    with (
        kept(admin, policy_text(inside, kernel={"enforce": False})) as site,
        gateway.lan.udp(LAN_HOST["ipv4"]) as member,
        ThreadPoolExecutor(1) as pool,
    ):

        def go_on() -> None:
            while not done.wait(0.0005):
                with contextlib.suppress(OSError):  # closed meanwhile: a router says so
                    member.sendto(b"x", (CHOST["ipv4"], 7001))

        sending = pool.submit(go_on)
        try:
            assert eventually(lambda: corp.counter("before", "arrivals") > 0), site.said()
            gateway.gw.ip("address", "delete", f"{INSIDE['ipv4']}/25", "dev", "vpn0")
            assert eventually(lambda: any("ipv4 is closed" in line for line in site.daemon.log)), site.said()
            assert settled(site), site.said()
            before = corp.counter("before", "arrivals")
            gateway.gw.ip("address", "add", f"{ANOTHER}/25", "dev", "vpn0")
            assert eventually(lambda: corp.counter("after", "arrivals") > 0), site.said()
            assert settled(site), site.said()
        finally:
            done.set()
            sending.result()
        assert corp.counter("before", "arrivals") == before
