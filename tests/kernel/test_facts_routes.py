"""What the kernel does with routes, rules and addresses: what vanishes, what comes back, and how it reads."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

import pyroute2
import pytest

from tests.kernel.conftest import Gateway
from tests.kernel.net import CORP, INSIDE, ISP, LAN_HOST, SOL_NETLINK, WILD, Host, family_of

both_families = pytest.mark.parametrize("family", ["ipv4", "ipv6"])

OPTION = {"ipv4": "-4", "ipv6": "-6"}
ELSEWHERE = {"ipv4": "198.18.50.0/24", "ipv6": "2001:db8:50::/64"}
VPN_NETWORK = {"ipv4": "192.0.2.128/25", "ipv6": "2001:db8:4::/64"}
LAST_RESORT = ("unreachable", "default", "metric", "4294967295")

# linux/netlink.h, linux/rtnetlink.h, linux/fib_rules.h
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 0x1, 0x300, 2, 3
NETLINK_GET_STRICT_CHK = 12
RTM_NEWLINK, RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE, RTM_GETRULE = 16, 24, 25, 26, 34
RTNLGRP_LINK, RTNLGRP_IPV4_ROUTE = 1, 7
RTA_DST, RTA_OIF, RTA_TABLE, RTA_MARK = 1, 4, 15, 16
RTM_F_LOOKUP_TABLE = 0x1000
FRA_FWMASK, FRA_TABLE = 16, 15


class Message(NamedTuple):
    """A netlink message behind its nlmsghdr: type, the family's fixed header (12 bytes), attributes."""

    kind: int
    header: bytes
    attributes: dict[int, bytes]

    def number(self, attribute: int) -> int:
        """An attribute that holds 32 bits in host order."""
        return int(struct.unpack("=I", self.attributes[attribute])[0])


def rtmsg(family: str, *, table: int = 0, protocol: int = 0, flags: int = 0, length: int = 0) -> bytes:
    """struct rtmsg; struct fib_rule_hdr has the same shape."""
    return struct.pack("=BBBBBBBBI", family_of(WILD[family]), length, 0, 0, table, protocol, 0, 0, flags)


def ask(
    host: Host, kind: int, header: bytes, attributes: dict[int, bytes], *, dump: bool = True, strict: bool = True
) -> list[Message]:
    """Send one rtnetlink request and return the whole answer. Raises OSError."""
    body = header
    for number, value in attributes.items():
        body += struct.pack("=HH", 4 + len(value), number) + value.ljust((len(value) + 3) & ~3, b"\0")
    flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else 0)
    answer: list[Message] = []
    with host.inside():
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    with sock:
        sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, int(strict))
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        while True:
            data = sock.recv(1 << 20)
            while data:
                length, of_kind = struct.unpack_from("=IH", data)
                message, data = data[16:length], data[(length + 3) & ~3 :]
                if of_kind in {NLMSG_ERROR, NLMSG_DONE}:
                    # A dump that fails says so in the number behind its NLMSG_DONE, where few look for it.
                    number = -struct.unpack_from("=i", message)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return answer
                answer.append(Message(of_kind, message[:12], attributes_of(message[12:])))
                if not dump:
                    return answer


def attributes_of(data: bytes) -> dict[int, bytes]:
    """The attributes behind a message's fixed header."""
    found = {}
    while len(data) >= 4:
        length, number = struct.unpack_from("=HH", data)
        found[number] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def steer_lan_members(gw: Host, family: str) -> None:
    """Everything from the LAN is I's: marked, and the mark looks up table 4001, whose default is on vpn0."""
    gw.nft("""
        table inet t {
            chain prerouting {
                type filter hook prerouting priority -145; policy accept;
                iifname lan meta mark set meta mark & 0xc0ffffff | 0x01000000
            }
        }
    """)
    option = OPTION[family]
    gw.ip(option, "rule", "add", "priority", "4001", "fwmark", "0x1000000/0x3f000000", "lookup", "4001")
    gw.ip("route", "add", "default", "via", CORP[family], "dev", "vpn0", "table", "4001")


@both_families
@pytest.mark.parametrize("closed", [False, True], ids=["default-alone", "unreachable"])
def test_r1_without_a_last_resort_a_dead_link_leaks(gateway: Gateway, family: str, closed: bool) -> None:
    """With vpn0 down I's packets fall through to main and leave by wan, unless T ends in `unreachable default`."""
    gw = gateway.gw
    steer_lan_members(gw, family)
    if closed:
        gw.ip(OPTION[family], "route", "add", *LAST_RESORT, "table", "4001")
    gw.ip("link", "set", "vpn0", "down")
    with gateway.isp.sniff("gw") as wan:
        gateway.lan.send(WILD[family])
        assert len(wan.packets(LAN_HOST[family], WILD[family])) == (0 if closed else 1)


@both_families
def test_r1_the_last_resort_survives_flaps(gateway: Gateway, family: str) -> None:
    """`unreachable default` is still there after its table's link went down and up again."""
    gw = gateway.gw
    gw.ip("route", "add", "default", "via", CORP[family], "dev", "vpn0", "table", "4001")
    gw.ip(OPTION[family], "route", "add", *LAST_RESORT, "table", "4001")
    for state in ("down", "up", "down", "up"):
        gw.ip("link", "set", "vpn0", state)
    (left,) = gw.ip_json(OPTION[family], "route", "show", "table", "4001")
    assert (left["type"], left["dst"], left["metric"]) == ("unreachable", "default", 4294967295)


def test_r2_ipv4_routes_vanish_with_their_link_in_silence(gateway: Gateway) -> None:
    """On link down an IPv4 default of T goes without RTM_DELROUTE, and is not restored; only the link is announced."""
    gw = gateway.gw
    gw.ip("route", "add", "default", "dev", "vpn0", "table", "4001")
    with (
        gw.events(socket.NETLINK_ROUTE, RTNLGRP_IPV4_ROUTE) as routes,
        gw.events(socket.NETLINK_ROUTE, RTNLGRP_LINK) as links,
    ):
        gw.ip("link", "set", "vpn0", "down")
        assert RTM_DELROUTE not in routes.kinds()
        assert RTM_NEWLINK in links.kinds()
        gw.ip("link", "set", "vpn0", "up")
        assert RTM_NEWROUTE in routes.kinds()  # the connected network, which the kernel makes anew
    assert gw.ip_json("route", "show", "table", "4001") == []


def test_r2_global_ipv6_addresses_go_with_the_link(gateway: Gateway) -> None:
    """A global IPv6 address goes on link down and doesn't come back; an IPv4 address stays."""
    for state in ("down", "up"):
        gateway.gw.ip("link", "set", "vpn0", state)
    listed = gateway.gw.ip_json("address", "show", "dev", "vpn0", "scope", "global")
    assert [item["local"] for link in listed for item in link.get("addr_info", ()) if item] == [INSIDE["ipv4"]]


def test_r3_an_ipv6_unreachable_reads_back_on_lo(netns: Host) -> None:
    """The kernel gives an IPv6 route that leads nowhere the device lo; an IPv4 one has none."""
    for option in ("-4", "-6"):
        netns.ip(option, "route", "add", *LAST_RESORT, "table", "4001")
    devices = [netns.ip_json(option, "route", "show", "table", "4001")[0].get("dev") for option in ("-4", "-6")]
    assert devices == [None, "lo"]


@both_families
def test_r4_a_mark_without_a_mask_reads_back_with_all_bits(netns: Host, family: str) -> None:
    """A rule's missing mask is 0xffffffff when read, and its one-byte table says 252: FRA_TABLE has the number."""
    netns.ip(OPTION[family], "rule", "add", "priority", "4001", "fwmark", "0x1000000", "lookup", "4001")
    rules = ask(netns, RTM_GETRULE, rtmsg(family), {})
    (rule,) = [rule for rule in rules if rule.number(FRA_TABLE) == 4001]
    assert rule.number(FRA_FWMASK) == 0xFFFFFFFF
    assert rule.header[4] == 252


@both_families
def test_r5_rules_are_told_apart_by_protocol(netns: Host, family: str) -> None:
    """A twin rule under another protocol stands beside ours, and a delete with ours takes only ours."""
    rule = ["priority", "4001", "from", INSIDE[family], "lookup", "4001", "protocol"]
    option = OPTION[family]
    for protocol in ("74", "73", "75"):
        netns.ip(option, "rule", "add", *rule, protocol)
    netns.ip(option, "rule", "delete", *rule, "73")
    left = netns.ip_json("-N", option, "rule", "show", "priority", "4001")
    assert [item["protocol"] for item in left] == ["74", "75"]


@both_families
def test_r5_a_delete_with_our_protocol_spares_a_foreign_route(gateway: Gateway, family: str) -> None:
    """A route delete that names protocol 73 answers ESRCH for a route of another protocol, and leaves it."""
    gw, network = gateway.gw, ELSEWHERE[family]
    gw.ip("route", "add", network, "dev", "vpn0", "table", "4001", "protocol", "74")
    with pytest.raises(RuntimeError, match="No such process"):
        gw.ip("route", "delete", network, "table", "4001", "protocol", "73")
    assert len(gw.ip_json(OPTION[family], "route", "show", "table", "4001")) == 1


@both_families
def test_r5_routes_of_one_key_collide_whatever_their_protocol(gateway: Gateway, family: str) -> None:
    """The protocol is no part of a route's key: `add` beside a foreign twin is EEXIST, and `replace` takes it away."""
    gw, network = gateway.gw, ELSEWHERE[family]
    route = [network, "dev", "vpn0", "metric", "100", "table", "4001", "protocol"]
    gw.ip("route", "add", *route, "74")
    with pytest.raises(RuntimeError, match="File exists"):
        gw.ip("route", "add", *route, "73")
    gw.ip("route", "replace", *route, "73")
    left = gw.ip_json("-N", OPTION[family], "route", "show", "table", "4001")
    assert [item["protocol"] for item in left] == ["73"]


def test_r11_numeric_output_has_numeric_types(netns: Host) -> None:
    """`ip -N` prints the type of an unreachable route as 7."""
    netns.ip("route", "add", *LAST_RESORT, "table", "4001")
    assert netns.ip("-N", "route", "show", "table", "4001").split()[:2] == ["7", "default"]


@pytest.mark.parametrize(("promote", "left"), [(0, []), (1, ["192.0.2.131"])])
def test_r11_secondaries_go_with_their_primary(gateway: Gateway, promote: int, left: list[str]) -> None:
    """Deleting a primary IPv4 address takes its secondaries along, unless promote_secondaries is set."""
    gw = gateway.gw
    gw.sysctl("net/ipv4/conf/vpn0/promote_secondaries", promote)
    gw.ip("address", "add", "192.0.2.131/25", "dev", "vpn0")
    gw.ip("address", "delete", "192.0.2.130/25", "dev", "vpn0")
    listed = gw.ip_json("-4", "address", "show", "dev", "vpn0")
    assert [item["local"] for link in listed for item in link.get("addr_info", ()) if item] == left


def test_r11_routes_go_with_the_last_address_of_their_link(gateway: Gateway) -> None:
    """Deleting a link's last IPv4 address takes every IPv4 route on the link along, in any table."""
    gw = gateway.gw
    gw.ip("route", "add", "default", "dev", "vpn0", "table", "4001")
    gw.ip("address", "delete", "192.0.2.130/25", "dev", "vpn0")
    assert gw.ip_json("-4", "route", "show", "table", "4001") == []


@both_families
def test_p3_the_kernel_filters_strict_dumps(gateway: Gateway, family: str) -> None:
    """Beside 2,000 foreign routes a strict dump by table, protocol or link holds only what was asked for."""
    gw = gateway.gw
    foreign = "198.18.{}.{}/32" if family == "ipv4" else "2001:db8:ffff::{:x}:{:x}/128"
    gw.ip_batch("\n".join(f"route add {foreign.format(n >> 8, n & 255)} dev wan protocol 74" for n in range(2000)))
    gw.ip("route", "add", "default", "via", CORP[family], "dev", "vpn0", "table", "4001", "protocol", "73")
    gw.ip(OPTION[family], "route", "add", *LAST_RESORT, "table", "4001", "protocol", "73")
    table = {RTA_TABLE: struct.pack("=I", 4001)}
    vpn0 = {RTA_OIF: struct.pack("=I", gw.index("vpn0"))}

    by_table = ask(gw, RTM_GETROUTE, rtmsg(family), table)
    assert [route.number(RTA_TABLE) for route in by_table] == [4001, 4001]
    by_protocol = ask(gw, RTM_GETROUTE, rtmsg(family, protocol=73), {})
    assert [route.header[5] for route in by_protocol] == [73, 73]
    by_link = ask(gw, RTM_GETROUTE, rtmsg(family), vpn0)
    assert {route.number(RTA_OIF) for route in by_link} == {gw.index("vpn0")}
    assert [route.header[5] for route in ask(gw, RTM_GETROUTE, rtmsg(family, protocol=73), table | vpn0)] == [73]

    # Without the strict check everything comes, whatever was asked.
    assert len(ask(gw, RTM_GETROUTE, rtmsg(family, protocol=73), table, strict=False)) > 2000


@both_families
def test_p3_a_strict_dump_of_a_table_that_is_not_there_fails(netns: Host, family: str) -> None:
    """A table that nobody ever used is ENOENT in a strict dump (behind NLMSG_DONE), not an empty answer."""
    with pytest.raises(OSError, match="No such file") as error:
        ask(netns, RTM_GETROUTE, rtmsg(family), {RTA_TABLE: struct.pack("=I", 4001)})
    assert error.value.errno == errno.ENOENT


@pytest.mark.parametrize(("flags", "table"), [(0, 254), (RTM_F_LOOKUP_TABLE, 4001)])
def test_p4_a_lookup_names_its_table_only_when_asked(gateway: Gateway, flags: int, table: int) -> None:
    """An IPv4 route lookup answers table 254, whatever table decided, unless RTM_F_LOOKUP_TABLE is set."""
    gw = gateway.gw
    steer_lan_members(gw, "ipv4")
    wanted = {RTA_DST: socket.inet_aton(WILD["ipv4"]), RTA_MARK: struct.pack("=I", 0x01000000)}
    (route,) = ask(gw, RTM_GETROUTE, rtmsg("ipv4", flags=flags, length=32), wanted, dump=False)
    assert route.number(RTA_OIF) == gw.index("vpn0")
    assert route.number(RTA_TABLE) == table


@pytest.mark.parametrize(("word", "link"), [("mark", "vpn0"), ("fwmark", "wan")])
def test_p4_pyroute2_says_mark(gateway: Gateway, word: str, link: str) -> None:
    """pyroute2's route lookup heeds `mark=` and silently ignores `fwmark=`."""
    gw = gateway.gw
    steer_lan_members(gw, "ipv4")
    with pyroute2.IPRoute() as ipr:
        (route,) = ipr.route("get", dst=WILD["ipv4"], **{word: 0x01000000})
    assert route.get_attr("RTA_OIF") == gw.index(link)


@both_families
def test_p5_a_duplicate_rule_is_refused_and_a_second_table_is_not(netns: Host, family: str) -> None:
    """The same rule twice is EEXIST; a rule of the same priority to another table is a rule of its own."""
    rule = [OPTION[family], "rule", "add", "priority", "4001", "fwmark", "0x1000000/0x3f000000", "lookup"]
    netns.ip(*rule, "4001")
    with pytest.raises(RuntimeError, match="File exists"):
        netns.ip(*rule, "4001")
    netns.ip(*rule, "4002")
    assert len(netns.ip_json(OPTION[family], "rule", "show", "priority", "4001")) == 2


# --- more that the agent builds on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "source"), [("ipv4", "192.0.2.140"), ("ipv6", None)])
def test_a_route_outlives_its_preferred_source(gateway: Gateway, family: str, source: str | None) -> None:
    """When a `src` address goes, a route of T stays: in IPv4 with the dead source, in IPv6 without one."""
    gw, address = gateway.gw, {"ipv4": "192.0.2.140/25", "ipv6": "2001:db8:4::140/64"}[family]
    gw.ip("address", "add", address, "dev", "vpn0")
    gw.settle()
    gw.ip("route", "add", ELSEWHERE[family], "dev", "wan", "src", address.partition("/")[0], "table", "4001")
    gw.ip("address", "delete", address, "dev", "vpn0")
    (left,) = gw.ip_json(OPTION[family], "route", "show", "table", "4001")
    assert left.get("prefsrc") == source


@both_families
def test_a_second_device_is_no_second_key(gateway: Gateway, family: str) -> None:
    """`add` of the same prefix and metric on another link is EEXIST; `replace` moves the route to that link."""
    gw, network = gateway.gw, ELSEWHERE[family]
    gw.ip("route", "add", network, "dev", "vpn0", "metric", "100", "table", "4001")
    with pytest.raises(RuntimeError, match="File exists"):
        gw.ip("route", "add", network, "dev", "wan", "metric", "100", "table", "4001")
    gw.ip("route", "replace", network, "dev", "wan", "metric", "100", "table", "4001")
    assert [route["dev"] for route in gw.ip_json(OPTION[family], "route", "show", "table", "4001")] == ["wan"]


@pytest.mark.parametrize(("family", "routes", "hops"), [("ipv4", 2, 0), ("ipv6", 1, 2)])
def test_an_appended_gateway_is_a_route_in_ipv4_and_a_hop_in_ipv6(
    gateway: Gateway, family: str, routes: int, hops: int
) -> None:
    """Appending the same prefix and metric by another gateway makes a second IPv4 route, or an IPv6 multipath route."""
    gw = gateway.gw
    for verb, via, link in (("add", CORP, "vpn0"), ("append", ISP, "wan")):
        gw.ip("route", verb, ELSEWHERE[family], "via", via[family], "dev", link, "metric", "100", "table", "4001")
    listed = gw.ip_json(OPTION[family], "route", "show", "table", "4001")
    assert (len(listed), len(listed[0].get("nexthops", ()))) == (routes, hops)


@both_families
def test_a_gateway_must_be_on_link_in_its_table_or_main(gateway: Gateway, family: str) -> None:
    """`via` is accepted if T or main has the gateway's network, also behind T's last resort; else it is refused."""
    gw, option, network = gateway.gw, OPTION[family], VPN_NETWORK[family]
    default = ["default", "via", CORP[family], "dev", "vpn0", "table", "4001"]
    gw.ip(option, "route", "add", *LAST_RESORT, "table", "4001")
    gw.ip("route", "add", *default)
    gw.ip("route", "delete", *default)

    gw.ip("route", "delete", network, "dev", "vpn0")
    with pytest.raises(RuntimeError, match=r"invalid gateway|No route to host"):
        gw.ip("route", "add", *default)

    gw.ip("route", "add", network, "dev", "vpn0", "table", "4001")
    gw.ip("route", "add", *default)
