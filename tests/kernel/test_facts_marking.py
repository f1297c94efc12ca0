"""What the kernel does with marks: where they must be set, what they steer, and what spoils them."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from tests.kernel.conftest import Gateway
from tests.kernel.net import (
    CHOST,
    CORP,
    INSIDE,
    ISP,
    LAN_GATEWAY,
    LAN_HOST,
    OUTSIDE,
    WILD,
    Host,
    Packet,
    family_of,
)

both_families = pytest.mark.parametrize("family", ["ipv4", "ipv6"])

#: What O's and I's tables are given, by family: the routes of the lan, and those that every default needs.
LAN_NETWORK = {"ipv4": "10.9.0.0/24", "ipv6": "2001:db8:9::/64"}
NFT = {"ipv4": "ip", "ipv6": "ip6"}

#: ICMPv6 types of RFC 4861.
NEIGHBOUR_DISCOVERY = range(133, 138)


def add_tables(gw: Host, *, downstream: bool = False) -> None:
    """Table 4001 for I and 4002 for O, each with its default, and on request with the routes to the lan."""
    for family in ("ipv4", "ipv6"):
        gw.ip("route", "add", "default", "via", CORP[family], "dev", "vpn0", "table", "4001")
        gw.ip("route", "add", "default", "via", ISP[family], "dev", "wan", "table", "4002")
        if downstream:
            for table in ("4001", "4002"):
                gw.ip("route", "add", LAN_NETWORK[family], "dev", "lan", "table", table)


def add_mark_rules(gw: Host) -> None:
    """One rule a family for each of the two marks."""
    for option in ("-4", "-6"):
        gw.ip(option, "rule", "add", "priority", "4001", "fwmark", "0x1000000/0x3f000000", "lookup", "4001")
        gw.ip(option, "rule", "add", "priority", "4002", "fwmark", "0x2000000/0x3f000000", "lookup", "4002")


def add_source_rules(gw: Host) -> None:
    """One rule for each of the gateway's own two addresses of each family."""
    for option, family in (("-4", "ipv4"), ("-6", "ipv6")):
        gw.ip(option, "rule", "add", "priority", "4001", "from", INSIDE[family], "lookup", "4001")
        gw.ip(option, "rule", "add", "priority", "4002", "from", OUTSIDE[family], "lookup", "4002")


def mark_local_sources(gw: Host, hook_type: str = "route") -> None:
    """An output chain that marks what is sent from I."""
    gw.nft(f"""
        table inet t {{
            counter marked {{ }}
            chain output {{
                type {hook_type} hook output priority -145; policy accept;
                ip saddr {INSIDE["ipv4"]} meta mark set meta mark & 0xc0ffffff | 0x01000000 counter name marked
                ip6 saddr {INSIDE["ipv6"]} meta mark set meta mark & 0xc0ffffff | 0x01000000 counter name marked
            }}
        }}
    """)


def received(sock: socket.socket, timeout: float = 0.1) -> bool:
    """Whether a datagram comes within `timeout` seconds."""
    sock.settimeout(timeout)
    try:
        sock.recv(2048)
    except TimeoutError:
        return False
    return True


def mss_of(packet: Packet) -> int | None:
    """The maximum segment size that a SYN advertises (RFC 9293, option kind 2)."""
    options = packet.payload[20 : (packet.payload[12] >> 4) * 4]
    while options and options[0]:
        if options[0] == 2:
            return int.from_bytes(options[2:4], "big")
        options = options[1 if options[0] == 1 else options[1] :]
    return None


@both_families
@pytest.mark.parametrize(("hook_type", "link"), [("route", "vpn0"), ("filter", "wan")])
def test_m1_only_a_route_chain_reroutes(gateway: Gateway, family: str, hook_type: str, link: str) -> None:
    """A mark set in an output chain steers local packets if the chain is `type route`; in a filter chain they leak."""
    add_tables(gateway.gw)
    add_mark_rules(gateway.gw)
    mark_local_sources(gateway.gw, hook_type)
    with gateway.isp.sniff("gw") as wan, gateway.corp.sniff("gw") as vpn0:
        gateway.gw.send(WILD[family], INSIDE[family])
        seen = {
            name: len(end.packets(source=INSIDE[family], protocol=17)) for name, end in [("wan", wan), ("vpn0", vpn0)]
        }
    assert gateway.gw.counter("marked") >= 1
    assert seen == {"wan": 0, "vpn0": 0} | {link: 1}


@both_families
def test_m2_marks_are_too_late_without_a_default_in_main(gateway: Gateway, family: str) -> None:
    """With no default in main, connect() fails with ENETUNREACH under a mark rule, and works with a source rule."""
    gw = gateway.gw
    add_tables(gw)
    add_mark_rules(gw)
    mark_local_sources(gw)
    gw.ip("route", "delete", "default", "via", ISP[family])
    with gateway.wild.listen(WILD[family], 80):
        with pytest.raises(OSError, match="unreachable") as error:
            gw.connect(WILD[family], 80, INSIDE[family])
        assert error.value.errno == errno.ENETUNREACH
        add_source_rules(gw)
        gw.connect(WILD[family], 80, INSIDE[family]).close()


@both_families
def test_m2_echo_replies_need_a_source_rule(gateway: Gateway, family: str) -> None:
    """With no default in main, the kernel's own echo reply is not sent under a mark rule, and is with a source rule."""
    gw = gateway.gw
    add_tables(gw)
    add_mark_rules(gw)
    mark_local_sources(gw)
    gw.ip("route", "delete", "default", "via", ISP[family])
    assert not gateway.wild.ping(INSIDE[family], timeout=0.1)
    add_source_rules(gw)
    assert gateway.wild.ping(INSIDE[family])


@pytest.mark.parametrize(
    ("family", "sources", "mss"),
    [
        pytest.param("ipv4", False, 1460, id="ipv4-mark"),
        pytest.param("ipv4", True, 1360, id="ipv4-source"),
        pytest.param("ipv6", False, 1440, id="ipv6-mark"),
        pytest.param("ipv6", True, 1340, id="ipv6-source"),
    ],
)
def test_m2_the_mss_is_of_the_first_lookup(gateway: Gateway, family: str, sources: bool, mss: int) -> None:
    """A rerouted SYN advertises the segment size of the link that main chose; a source rule chooses the right link."""
    gw = gateway.gw
    gw.ip("link", "set", "vpn0", "mtu", "1400")
    add_tables(gw)
    add_mark_rules(gw)
    mark_local_sources(gw)
    if sources:
        add_source_rules(gw)
    with gateway.corp.sniff("gw") as vpn0, gateway.wild.listen(WILD[family], 80):
        gw.connect(WILD[family], 80, INSIDE[family]).close()
        syn = vpn0.packets(source=INSIDE[family], protocol=socket.IPPROTO_TCP)[0]
    assert mss_of(syn) == mss


def test_m3_a_verdict_map_to_one_chain_per_identity_works(netns: Host) -> None:
    """A verdict map from sources to one chain per identity writes each identity's mark, and nothing for others."""
    netns.nft("""
        table inet t {
            counter inside { }
            counter outside { }
            counter other { }
            chain id-inside {
                meta mark set meta mark & 0xc0ffffff | 0x01000000
            }
            chain id-outside {
                meta mark set meta mark & 0xc0ffffff | 0x02000000
            }
            map source4 {
                type ipv4_addr : verdict; flags interval
                elements = { 127.1.0.0/16 : goto id-inside, 127.2.0.0/16 : goto id-outside }
            }
            chain output {
                type route hook output priority -145; policy accept;
                ip saddr vmap @source4
            }
            chain seen {
                type filter hook output priority 0; policy accept;
                meta l4proto udp meta mark vmap { 0x01000000 : goto id-1, 0x02000000 : goto id-2, 0 : goto id-0 }
            }
            chain id-0 {
                counter name other
            }
            chain id-1 {
                counter name inside
            }
            chain id-2 {
                counter name outside
            }
        }
    """)
    for source, times in (("127.1.0.1", 1), ("127.2.0.1", 2), ("127.3.0.1", 3)):
        for _ in range(times):
            netns.send("127.9.9.9", source)
    assert [netns.counter(name) for name in ("inside", "outside", "other")] == [1, 2, 3]


def test_m4_a_prefix_makes_every_chain_name_fine(netns: Host) -> None:
    """Names that are words of nft's language load as chains once they have a prefix."""
    words = ["accept", "chain", "counter", "inet", "list", "mark", "missing", "return", "snat", "vmap", "a_b-1"]
    chains = "".join(f"chain id-{word} {{\n}}\n" for word in words)
    netns.nft(f"table inet t {{\n{chains}}}\n")
    listed = {item["chain"]["name"] for item in netns.nft_json("list", "table", "inet", "t") if "chain" in item}
    assert listed == {f"id-{word}" for word in words}


@both_families
@pytest.mark.parametrize("by_original", [True, False], ids=["original-destination", "source"])
def test_m5_replies_of_forwarded_ports_need_the_original_destination(
    gateway: Gateway, family: str, by_original: bool
) -> None:
    """A reply of a DNATed connection has the LAN host as source; `ct original` tells which identity was addressed."""
    gw, word = gateway.gw, NFT[family]
    add_tables(gw, downstream=True)
    add_mark_rules(gw)
    original = f"ct direction reply ct original {word} daddr {INSIDE[family]} meta mark set 0x01000000 accept"
    host = LAN_HOST[family] if family == "ipv4" else f"[{LAN_HOST[family]}]"
    gw.nft(f"""
        table inet t {{
            chain prerouting {{
                type filter hook prerouting priority -145; policy accept;
                {original if by_original else ""}
                iifname lan {word} saddr {LAN_NETWORK[family]} meta mark set 0x02000000
            }}
            chain forward-ports {{
                type nat hook prerouting priority dstnat; policy accept;
                {word} daddr {INSIDE[family]} tcp dport 80 dnat {word} to {host}:80
            }}
        }}
    """)
    with gateway.lan.listen(LAN_HOST[family], 80):
        if by_original:
            gateway.wild.connect(INSIDE[family], 80).close()
        else:
            with pytest.raises(TimeoutError):
                gateway.wild.connect(INSIDE[family], 80, timeout=0.2)
            assert gateway.isp.counter(f"foreign{family[-1]}", "bcp38") >= 1


def forward_port(gw: Host) -> None:
    """Port 80 of I goes to the LAN host."""
    gw.nft(f"""
        table inet forwarding {{
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr {INSIDE["ipv4"]} tcp dport 80 dnat ip to {LAN_HOST["ipv4"]}:80
            }}
        }}
    """)


def mark_inside(gw: Host) -> None:
    """Mark what arrives for I by its destination, and the replies of its forwarded ports."""
    gw.nft(f"""
        table inet t {{
            chain prerouting {{
                type filter hook prerouting priority -145; policy accept;
                iifname vpn0 ip daddr {INSIDE["ipv4"]} meta mark set meta mark & 0xc0ffffff | 0x01000000
                iifname lan ct direction reply ct original ip daddr {INSIDE["ipv4"]} meta mark set 0x01000000
            }}
        }}
    """)


def strict(gw: Host) -> None:
    """Strict reverse path filtering on every link."""
    for link in ("all", "wan", "vpn0", "lan"):
        gw.sysctl(f"net/ipv4/conf/{link}/rp_filter", 1)


@pytest.mark.parametrize("valid_mark", [0, 1])
def test_m6_marks_by_destination_satisfy_the_strict_filter(gateway: Gateway, valid_mark: int) -> None:
    """Under rp_filter=1 and with no default in main, a forwarded port of I works if vpn0 heeds marks by destination."""
    gw = gateway.gw
    add_tables(gw, downstream=True)
    add_mark_rules(gw)
    add_source_rules(gw)
    forward_port(gw)
    mark_inside(gw)
    strict(gw)
    gw.ip("route", "delete", "default", "via", ISP["ipv4"])
    gw.sysctl("net/ipv4/conf/vpn0/src_valid_mark", valid_mark)
    with gateway.lan.listen(LAN_HOST["ipv4"], 80):
        if valid_mark:
            gateway.wild.connect(INSIDE["ipv4"], 80).close()
        else:
            with pytest.raises(TimeoutError):
                gateway.wild.connect(INSIDE["ipv4"], 80, timeout=0.2)


def test_m7_a_source_rule_satisfies_the_strict_filter_for_own_addresses_only(gateway: Gateway) -> None:
    """Under rp_filter=1 `from I lookup T` lets in what is for the gateway itself, and not what is DNATed to the LAN."""
    gw = gateway.gw
    add_tables(gw, downstream=True)
    strict(gw)
    assert not gateway.wild.ping(INSIDE["ipv4"], timeout=0.1)
    add_source_rules(gw)
    assert gateway.wild.ping(INSIDE["ipv4"])
    forward_port(gw)
    with gateway.lan.listen(LAN_HOST["ipv4"], 80), pytest.raises(TimeoutError):
        gateway.wild.connect(INSIDE["ipv4"], 80, timeout=0.2)


def test_m8_the_larger_rp_filter_takes_effect(gateway: Gateway) -> None:
    """The reverse path filter of a link is the larger of `all` and its own: 2 (loose) wins over 1 (strict)."""
    gw = gateway.gw
    accepted = {}
    with gw.udp(INSIDE["ipv4"], 9) as sock:
        for of_all, of_link in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]:
            gw.sysctl("net/ipv4/conf/all/rp_filter", of_all)
            gw.sysctl("net/ipv4/conf/vpn0/rp_filter", of_link)
            gateway.wild.send(INSIDE["ipv4"])
            accepted[of_all, of_link] = received(sock)
    assert accepted == {(0, 0): True, (0, 1): False, (1, 0): False, (1, 1): False, (1, 2): True, (2, 1): True}


def test_m8_src_valid_mark_is_or_of_all_and_the_link(gateway: Gateway) -> None:
    """The reverse lookup heeds the mark if `src_valid_mark` is set on the link or on `all`."""
    gw = gateway.gw
    add_tables(gw)
    add_mark_rules(gw)
    mark_inside(gw)
    gw.sysctl("net/ipv4/conf/vpn0/rp_filter", 1)
    accepted = {}
    with gw.udp(INSIDE["ipv4"], 9) as sock:
        for of_all, of_link in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            gw.sysctl("net/ipv4/conf/all/src_valid_mark", of_all)
            gw.sysctl("net/ipv4/conf/vpn0/src_valid_mark", of_link)
            gateway.wild.send(INSIDE["ipv4"])
            accepted[of_all, of_link] = received(sock)
    assert accepted == {(0, 0): False, (0, 1): True, (1, 0): True, (1, 1): True}


def mark_lan_network(gw: Host) -> None:
    """Everything with a source of the lan's network is I's, the gateway's own LAN address included."""
    gw.nft(f"""
        table inet t {{
            counter marked {{ }}
            chain output {{
                type route hook output priority -145; policy accept;
                ip saddr {LAN_NETWORK["ipv4"]} meta mark set meta mark & 0xc0ffffff | 0x01000000 counter name marked
                ip6 saddr {LAN_NETWORK["ipv6"]} meta mark set meta mark & 0xc0ffffff | 0x01000000 counter name marked
            }}
        }}
    """)


@both_families
def test_m9_the_table_needs_the_downstream_routes(gateway: Gateway, family: str) -> None:
    """A marked prefix around the gateway's LAN address sends its replies into the VPN, unless T has the LAN's route."""
    gw, network = gateway.gw, LAN_NETWORK[family]
    add_tables(gw)
    add_mark_rules(gw)
    mark_lan_network(gw)
    with gateway.corp.sniff("gw") as vpn0:
        assert not gateway.lan.ping(LAN_GATEWAY[family], timeout=0.1)
        assert vpn0.packets(source=LAN_GATEWAY[family], destination=LAN_HOST[family])
        gw.ip("route", "add", network, "dev", "lan", "table", "4001")
        gateway.lan.ip("neighbour", "flush", "dev", "gw")
        assert gateway.lan.ping(LAN_GATEWAY[family], timeout=2)
        assert not vpn0.packets(source=LAN_GATEWAY[family])


#: How a program may send to everybody on the LAN: (destination, does it bind to the source, socket option and value).
MULTICAST = {
    "limited-broadcast-source": ("255.255.255.255", True, 0),
    "limited-broadcast-device": ("255.255.255.255", False, socket.SO_BINDTODEVICE),
    "subnet-broadcast-source": ("10.9.0.255", True, 0),
    "subnet-broadcast-device": ("10.9.0.255", False, socket.SO_BINDTODEVICE),
    "ipv4-multicast-source": ("224.0.0.251", True, 0),
    "ipv4-multicast-interface": ("224.0.0.251", True, socket.IP_MULTICAST_IF),
    "ipv6-link-multicast": ("ff02::fb", True, socket.IPV6_MULTICAST_IF),
    "ipv6-site-multicast": ("ff05::1:3", True, socket.IPV6_MULTICAST_IF),
}


@pytest.mark.parametrize(("destination", "bound", "option"), MULTICAST.values(), ids=MULTICAST)
def test_m11_broadcast_and_multicast_stay_on_the_lan(
    gateway: Gateway, destination: str, bound: bool, option: int
) -> None:
    """A marked packet to everybody leaves by the LAN although T, which knows only the VPN, is asked."""
    gw, family = gateway.gw, "ipv6" if ":" in destination else "ipv4"
    add_tables(gw)
    add_mark_rules(gw)
    mark_lan_network(gw)
    with (
        gateway.lan.sniff("gw") as lan,
        gateway.corp.sniff("gw") as vpn0,
        gw.udp(LAN_GATEWAY[family] if bound else "0.0.0.0") as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if option == socket.SO_BINDTODEVICE:
            sock.setsockopt(socket.SOL_SOCKET, option, b"lan")
        elif option == socket.IP_MULTICAST_IF:
            sock.setsockopt(socket.IPPROTO_IP, option, socket.inet_aton(LAN_GATEWAY["ipv4"]))
        elif option == socket.IPV6_MULTICAST_IF:
            sock.setsockopt(socket.IPPROTO_IPV6, option, gw.index("lan"))
        sock.sendto(b"everybody", (destination, 9))
        assert len(lan.packets(LAN_GATEWAY[family], destination)) == 1
        assert not vpn0.packets(LAN_GATEWAY[family])
    assert gw.counter("marked") >= 1


@pytest.mark.parametrize(("priority", "kept"), [(-155, 0), (-145, 3)])
def test_m12_a_later_restore_of_the_ct_mark_wipes_ours(netns: Host, priority: int, kept: int) -> None:
    """Beside a neighbour's `meta mark set ct mark` at mangle (-150) our bits last only behind it."""
    netns.nft(f"""
        table inet neighbour {{
            chain output {{
                type route hook output priority mangle; policy accept;
                meta mark set ct mark
            }}
        }}
        table inet t {{
            counter kept {{ }}
            chain output {{
                type route hook output priority {priority}; policy accept;
                meta mark set meta mark & 0xc0ffffff | 0x01000000
            }}
            chain seen {{
                type filter hook postrouting priority 300; policy accept;
                meta l4proto udp meta mark & 0x3f000000 == 0x01000000 counter name kept
            }}
        }}
    """)
    for _ in range(3):
        netns.send("127.0.0.1")
    assert netns.counter("kept") == kept


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param("meta mark set meta mark & 0xc0ffffff | 0x01000000", id="one"),
        pytest.param("meta mark set meta mark & 0xc0ffffff meta mark set meta mark | 0x01000000", id="two"),
    ],
)
@pytest.mark.parametrize(
    ("before", "after"),
    [(0, 0x01000000), (0xFFFFFFFF, 0xC1FFFFFF), (0xCA6C, 0x0100CA6C), (0x80FF0000, 0x81FF0000)],
    ids=hex,
)
def test_m13_the_other_bits_are_preserved(netns: Host, statements: str, before: int, after: int) -> None:
    """Writing our six bits leaves the other 26 as they were, in one statement and in two."""
    netns.nft(f"""
        table inet t {{
            counter right {{ }}
            counter sent {{ }}
            chain output {{
                type route hook output priority -145; policy accept;
                {statements}
                meta l4proto udp counter name sent
                meta l4proto udp meta mark {after:#x} counter name right
            }}
        }}
    """)
    netns.send("127.0.0.1", mark=before)
    assert netns.counter("right") == netns.counter("sent") == 1


def test_m15_a_decapsulated_packet_keeps_the_outer_mark(gateway: Gateway) -> None:
    """What comes out of a tunnel carries the mark of the tunnel's own packet, until it is decided afresh."""
    gw, isp = gateway.gw, gateway.isp
    for host, local, remote, link, address in (
        (gw, OUTSIDE["ipv4"], ISP["ipv4"], "wan", "10.99.0.1/24"),
        (isp, ISP["ipv4"], OUTSIDE["ipv4"], "gw", "10.99.0.2/24"),
    ):
        tunnel = ["id", "7", "local", local, "remote", remote, "dstport", "4789", "dev", link]
        host.ip("link", "add", "vxlan0", "type", "vxlan", *tunnel)
        host.ip("address", "add", address, "dev", "vxlan0")
        host.ip("link", "set", "vxlan0", "up")
    gw.nft("""
        table inet t {
            counter before { }
            counter after { }
            chain arriving {
                type filter hook prerouting priority raw; policy accept;
                iifname vxlan0 icmp type echo-request meta mark & 0x3f000000 == 0x02000000 counter name before
            }
            chain prerouting {
                type filter hook prerouting priority -145; policy accept;
                meta mark set meta mark & 0xc0ffffff
                iifname vxlan0 icmp type echo-request meta mark & 0x3f000000 == 0 counter name after
                iifname wan meta mark set meta mark | 0x02000000
            }
        }
    """)
    assert isp.ping("10.99.0.1")
    assert (gw.counter("before"), gw.counter("after")) == (1, 1)


# --- more that the ruleset builds on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unreachable", [False, True], ids=["default", "default-unreachable"])
@pytest.mark.parametrize(
    ("destination", "kind"),
    [("link-local", 135), ("link-local", 136), ("ff02::1:ff00:5", 135), ("ff02::1", 136)],
    ids=["solicit-unicast", "advertise-unicast", "solicit-node", "advertise-all"],
)
def test_neighbour_discovery_from_a_global_source_stays_on_its_link(
    gateway: Gateway, destination: str, kind: int, unreachable: bool
) -> None:
    """A marked NS or NA to a link-local or multicast address leaves by the LAN, whatever T holds."""
    gw = gateway.gw
    add_tables(gw)
    add_mark_rules(gw)
    mark_lan_network(gw)
    if unreachable:
        gw.ip("-6", "route", "add", "unreachable", "default", "metric", "4294967295", "table", "4001")
    if destination == "link-local":
        listed = gateway.lan.ip_json("-6", "address", "show", "dev", "gw", "scope", "link")
        destination = next(item["local"] for link in listed for item in link.get("addr_info", ()) if item)
    index = gw.index("lan")
    message = struct.pack("!BBHI16s", kind, 0, 0, 0, socket.inet_pton(socket.AF_INET6, LAN_HOST["ipv6"]))
    with (
        gateway.lan.sniff("gw") as lan,
        gateway.corp.sniff("gw") as vpn0,
        gw.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, source=LAN_GATEWAY["ipv6"]) as sock,
    ):
        sock.sendto(message, (destination, 0, 0, index))
        assert [packet.payload[0] for packet in lan.packets(LAN_GATEWAY["ipv6"], destination)] == [kind]
        assert not vpn0.packets(LAN_GATEWAY["ipv6"])
    assert gw.counter("marked") >= 1


@pytest.mark.parametrize("who", ["local", "forwarded"])
@pytest.mark.parametrize(
    ("family", "asked", "mss"),
    [("ipv4", 0, 1240), ("ipv6", 0, 1220), ("ipv4", 600, 600), ("ipv6", 600, 600)],
)
def test_the_mss_is_clamped_to_the_route(gateway: Gateway, who: str, family: str, asked: int, mss: int) -> None:
    """`maxseg size set rt mtu` at postrouting lowers the MSS of local and forwarded SYNs, and never raises it."""
    gw = gateway.gw
    gw.ip("link", "set", "vpn0", "mtu", "1280")
    gw.nft("""
        table inet t {
            chain postrouting {
                type filter hook postrouting priority 300; policy accept;
                oifname "vpn0" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
            }
        }
    """)
    sender, source = {"local": (gw, INSIDE), "forwarded": (gateway.lan, LAN_HOST)}[who]
    with (
        gateway.corp.sniff("gw") as vpn0,
        sender.open_socket(family_of(source[family]), socket.SOCK_STREAM, source=source[family]) as sock,
    ):
        if asked:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, asked)
        sock.setblocking(False)
        assert sock.connect_ex((CHOST[family], 80)) == errno.EINPROGRESS
        syn = vpn0.packets(source[family], CHOST[family], socket.IPPROTO_TCP)[0]
    assert mss_of(syn) == mss


@pytest.mark.parametrize(("priority", "translated"), [(99, False), (101, True)])
def test_the_translated_source_is_seen_behind_srcnat(gateway: Gateway, priority: int, translated: bool) -> None:
    """At postrouting a forwarded packet has its iifname, and after priority 100 the source that leaves the host."""
    gw = gateway.gw
    gw.nft(f"""
        table inet t {{
            set seen {{
                type ifname . ipv4_addr; flags dynamic; size 16
            }}
            chain forward-ports {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr {OUTSIDE["ipv4"]} tcp dport 80 dnat ip to {LAN_HOST["ipv4"]}:80
            }}
            chain masquerade-members {{
                type nat hook postrouting priority srcnat; policy accept;
                oifname vpn0 masquerade
            }}
            chain postrouting {{
                type filter hook postrouting priority {priority}; policy accept;
                iifname lan oifname {{ wan, vpn0 }} add @seen {{ iifname . ip saddr }}
            }}
        }}
    """)
    with gateway.lan.listen(LAN_HOST["ipv4"], 80):
        gateway.wild.connect(OUTSIDE["ipv4"], 80).close()
    assert gateway.lan.ping(CHOST["ipv4"])
    elements = gw.nft_json("list", "set", "inet", "t", "seen")[0]["set"]["elem"]
    expected = [OUTSIDE["ipv4"], INSIDE["ipv4"]] if translated else [LAN_HOST["ipv4"]]
    assert sorted(item["concat"] for item in elements) == sorted(["lan", source] for source in expected)


@pytest.mark.parametrize("flags", ["flags interval", ""], ids=["interval", "hash"])
def test_the_original_destination_is_known_at_output(gateway: Gateway, flags: str) -> None:
    """A local reply of a redirected connection matches `ct original` at output; an untracked packet never does."""
    gw = gateway.gw
    gw.nft(f"""
        table inet t {{
            counter original {{ }}
            counter other {{ }}
            chain id-outside {{
                counter name original
            }}
            map original4 {{
                type ipv4_addr : verdict; {flags}
                elements = {{ {OUTSIDE["ipv4"]} : goto id-outside }}
            }}
            chain untracked {{
                type filter hook output priority raw; policy accept;
                udp dport 9 notrack
            }}
            chain redirect-ports {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr {OUTSIDE["ipv4"]} tcp dport 80 redirect to :8080
            }}
            chain output {{
                type route hook output priority -145; policy accept;
                ct direction reply ct original ip daddr vmap @original4
                meta l4proto {{ tcp, udp }} counter name other
            }}
        }}
    """)
    with gw.listen("0.0.0.0", 8080):
        connection = gateway.wild.connect(OUTSIDE["ipv4"], 80)
        assert (gw.counter("original"), gw.counter("other")) == (1, 0)
        gw.send(WILD["ipv4"], OUTSIDE["ipv4"])
        assert (gw.counter("original"), gw.counter("other")) == (1, 1)
        connection.close()


@both_families
def test_an_unreachable_default_refuses_forwarded_packets(gateway: Gateway, family: str) -> None:
    """A forwarded packet that T has no other way for is answered with an ICMP error from the gateway, and not sent."""
    gw = gateway.gw
    add_mark_rules(gw)
    gw.ip(f"-{family[-1]}", "route", "add", "unreachable", "default", "metric", "4294967295", "table", "4001")
    gw.nft("""
        table inet t {
            chain prerouting {
                type filter hook prerouting priority -145; policy accept;
                iifname lan meta mark set 0x01000000
            }
        }
    """)
    protocol, error = {"ipv4": (socket.IPPROTO_ICMP, 3), "ipv6": (socket.IPPROTO_ICMPV6, 1)}[family]
    with gateway.lan.sniff("gw") as lan, gateway.isp.sniff("gw") as wan:
        gateway.lan.send(WILD[family])
        answers = [packet.payload[0] for packet in lan.packets(LAN_GATEWAY[family], LAN_HOST[family], protocol)]
        assert [kind for kind in answers if kind not in NEIGHBOUR_DISCOVERY] == [error]
        assert not wan.packets(destination=WILD[family])


@both_families
def test_an_unreachable_default_refuses_local_sockets_at_once(gateway: Gateway, family: str) -> None:
    """connect() from I fails at once with EHOSTUNREACH under a source rule; a mark rule alone lets it wait for ever."""
    gw = gateway.gw
    add_mark_rules(gw)
    mark_local_sources(gw)
    gw.ip(f"-{family[-1]}", "route", "add", "unreachable", "default", "metric", "4294967295", "table", "4001")
    with pytest.raises(TimeoutError):
        gw.connect(WILD[family], 80, INSIDE[family], timeout=0.1)
    add_source_rules(gw)
    with pytest.raises(OSError, match="No route to host") as error:
        gw.connect(WILD[family], 80, INSIDE[family])
    assert error.value.errno == errno.EHOSTUNREACH
