"""Real packets through a gateway with a policy in force: by which link they leave, and what is counted."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.model import Count
from tests.kernel.admin import MEMBERS, Admin, policy_text
from tests.kernel.conftest import Gateway
from tests.kernel.net import CHOST, INSIDE, ISP, LAN_GATEWAY, LAN_HOST, OUTSIDE, WILD, Host
from tests.kernel.test_facts_marking import NEIGHBOUR_DISCOVERY, NFT, both_families, mss_of, strict

POLICY = policy_text({"members": MEMBERS, "masquerade": True})
#: Networks that O's provider routes to it, members of O; and one host of theirs.
ROUTED = {"ipv4": "203.0.113.16/28", "ipv6": "2001:db8:2:1::/64"}
ROUTED_HOST = {"ipv4": "203.0.113.17", "ipv6": "2001:db8:2:1::17"}
#: IP header, ICMP header and the 8 bytes that an echo request of the test net carries.
ECHO_BYTES = {"ipv4": 20 + 16, "ipv6": 40 + 16}


@pytest.fixture
def admin(gateway: Gateway, tmp_path: Path) -> Admin:
    return Admin(gateway.gw, tmp_path)


def unanswered(gateway: Gateway, family: str) -> list[str]:
    """The flows of the problem's matrix, the members' and the LAN's, that get no answer."""
    o, i, wild, chost = (ends[family] for ends in (OUTSIDE, INSIDE, WILD, CHOST))
    flows = {
        "chost to O": (gateway.chost, o, ""),
        "wild to I": (gateway.wild, i, ""),
        "I to wild": (gateway.gw, wild, i),
        "O to chost": (gateway.gw, chost, o),
        "wild to O": (gateway.wild, o, ""),
        "chost to I": (gateway.chost, i, ""),
        "I to chost": (gateway.gw, chost, i),
        "O to wild": (gateway.gw, wild, o),
        "member to wild": (gateway.lan, wild, ""),
        "member to chost": (gateway.lan, chost, ""),
        "member to its gateway": (gateway.lan, LAN_GATEWAY[family], ""),
        "gateway to its member": (gateway.gw, LAN_HOST[family], LAN_GATEWAY[family]),
    }
    return [name for name, (host, destination, source) in flows.items() if not host.ping(destination, source)]


def foreign(gateway: Gateway, family: str) -> int:
    """The packets with a source that is not the customer's, at both far ends."""
    return sum(host.counter(f"foreign{family[-1]}", "bcp38") for host in (gateway.isp, gateway.corp))


def as_it_is(gw: Host) -> None:
    """Nothing besides."""


def no_default_in_main(gw: Host) -> None:
    for family in ("ipv4", "ipv6"):
        gw.ip("route", "delete", "default", "via", ISP[family])


def beside_a_table_that_restores_marks(gw: Host) -> None:
    gw.nft("""
        table inet neighbour {
            chain prerouting {
                type filter hook prerouting priority mangle; policy accept;
                meta mark set ct mark
            }
            chain output {
                type route hook output priority mangle; policy accept;
                meta mark set ct mark
            }
            chain postrouting {
                type filter hook postrouting priority mangle; policy accept;
                ct mark set meta mark
            }
        }
    """)


def all_of_it(gw: Host) -> None:
    no_default_in_main(gw)
    strict(gw)
    beside_a_table_that_restores_marks(gw)


@both_families
@pytest.mark.parametrize(
    ("situation", "next_hop"),
    [
        pytest.param(as_it_is, "auto", id="as-it-is"),
        pytest.param(strict, "auto", id="strict-rp_filter"),
        pytest.param(beside_a_table_that_restores_marks, "auto", id="marks-restored"),
        pytest.param(no_default_in_main, [*ISP.values()], id="no-default-in-main"),
        pytest.param(all_of_it, [*ISP.values()], id="all-of-it"),
    ],
)
def test_every_flow_passes(
    gateway: Gateway, admin: Admin, family: str, situation: Callable[[Host], None], next_hop: str | list[str]
) -> None:
    """With the policy in force every flow is answered, and no far end sees a foreign source."""
    situation(gateway.gw)
    admin.apply(policy_text({"members": MEMBERS, "masquerade": True}, {"next_hop": next_hop}))
    assert unanswered(gateway, family) == []
    assert foreign(gateway, family) == 0


# --- what is counted -------------------------------------------------------------------------------------------------

NOTHING = Count()


def counted(admin: Admin, before: dict[str, Count]) -> dict[str, Count]:
    """What the named counters counted since."""
    now = admin.counts()
    return {
        name: Count(count.packets - had.packets, count.bytes - had.bytes)
        for name, count in now.items()
        if count != (had := before.get(name, NOTHING))
    }


@both_families
@pytest.mark.parametrize(
    ("sender", "destination", "source", "identity"),
    [
        pytest.param("wild", INSIDE, None, "inside", id="wild-to-I"),
        pytest.param("chost", OUTSIDE, None, "outside", id="chost-to-O"),
        pytest.param("gw", WILD, INSIDE, "inside", id="I-to-wild"),
        pytest.param("gw", CHOST, OUTSIDE, "outside", id="O-to-chost"),
        pytest.param("lan", WILD, None, "inside", id="member-to-wild"),
        pytest.param("lan", LAN_GATEWAY, None, "", id="member-to-its-gateway"),
        pytest.param("wild", {"ipv4": "10.9.0.1", "ipv6": "2001:db8:9::1"}, None, "", id="nobody"),
    ],
)
def test_counters_are_exact(
    gateway: Gateway,
    admin: Admin,
    *,
    family: str,
    sender: str,
    destination: dict[str, str],
    source: dict[str, str] | None,
    identity: str,
) -> None:
    """Five echoes are five packets out and five in, with their bytes, on the identity that they are of, once each."""
    admin.apply(POLICY)
    host, bound = getattr(gateway, sender), source[family] if source else ""
    host.ping(destination[family], bound, timeout=0.1)  # neighbours get to know each other, which counts too
    before = admin.counts()
    answered = host.ping(destination[family], bound, 5, timeout=0.1)
    assert answered or sender == "wild"
    five = Count(5, 5 * ECHO_BYTES[family])
    both = (f"id-{identity}-{family}-transmit", f"id-{identity}-{family}-receive")
    assert counted(admin, before) == (dict.fromkeys(both, five) if identity else {})


def sent_astray_by_a_rule(gateway: Gateway) -> None:
    """I's packets are looked up in a foreign table before ours."""
    for option, family in (("-4", "ipv4"), ("-6", "ipv6")):
        gateway.gw.ip("route", "add", "default", "via", ISP[family], "dev", "wan", "table", "77")
        gateway.gw.ip(option, "rule", "add", "priority", "100", "from", INSIDE[family], "lookup", "77")
        gateway.gw.ip(option, "rule", "add", "priority", "100", "fwmark", "0x1000000", "iif", "lan", "lookup", "77")


def robbed_of_its_mark(gateway: Gateway) -> None:
    """A neighbour wipes whole marks at prerouting, behind us."""
    gateway.gw.nft("""
        table inet neighbour {
            chain prerouting {
                type filter hook prerouting priority 0; policy accept;
                meta mark set 0
            }
        }
    """)


def translated_to_the_other(gateway: Gateway) -> None:
    """An operator's rule translates a host of no identity, which main sends into the VPN, to O."""
    gateway.gw.nft(f"""
        table inet neighbour {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {LAN_HOST["ipv4"]} snat ip to {OUTSIDE["ipv4"]}
                ip6 saddr {LAN_HOST["ipv6"]} snat ip6 to {OUTSIDE["ipv6"]}
            }}
        }}
    """)


def translated_to_a_member_of_the_other(gateway: Gateway) -> None:
    """An operator's rule translates a member of I to an address that O's provider routes here."""
    gateway.gw.nft(f"""
        table inet neighbour {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {LAN_HOST["ipv4"]} snat ip to {ROUTED_HOST["ipv4"]}
                ip6 saddr {LAN_HOST["ipv6"]} snat ip6 to {ROUTED_HOST["ipv6"]}
            }}
        }}
    """)


@both_families
@pytest.mark.parametrize("enforce", [True, False], ids=["enforced", "counted-only"])
@pytest.mark.parametrize(
    ("trouble", "members", "sender", "destination", "identity"),
    [
        pytest.param(sent_astray_by_a_rule, [], "gw", WILD, "inside", id="foreign-rule"),
        pytest.param(sent_astray_by_a_rule, MEMBERS, "lan", WILD, "inside", id="foreign-rule-member"),
        pytest.param(translated_to_the_other, [], "lan", CHOST, "outside", id="translated"),
        pytest.param(
            translated_to_a_member_of_the_other, MEMBERS, "lan", CHOST, "outside", id="translated-to-a-member"
        ),
    ],
)
def test_the_misrouted_are_counted_and_dropped(
    gateway: Gateway,
    admin: Admin,
    *,
    family: str,
    enforce: bool,
    trouble: Callable[[Gateway], None],
    members: list[str],
    sender: str,
    destination: dict[str, str],
    identity: str,
) -> None:
    """A packet about to leave by a foreign link is counted and dropped; with enforce = false it is counted and goes."""
    trouble(gateway)
    others = {"members": [*ROUTED.values()]}
    admin.apply(policy_text({"members": members}, others, kernel={"enforce": enforce}))
    host: Host = getattr(gateway, sender)
    far = gateway.isp if destination is WILD else gateway.corp
    with far.sniff("gw") as arriving:
        with contextlib.suppress(PermissionError):  # what a sender hears whose packet is dropped on this host
            host.send(destination[family], INSIDE[family] if host is gateway.gw else "")
        arrived = arriving.packets(destination=destination[family], protocol=socket.IPPROTO_UDP)
    assert len(arrived) == (0 if enforce else 1)
    action = "dropped" if enforce else "passed"
    datagram = Count(1, (20 if family == "ipv4" else 40) + 8 + 1)
    assert admin.counts()[f"id-{identity}-{family}-misrouted-{action}"] == datagram
    assert not any("transmit" in name and count == datagram for name, count in admin.counts().items())


@both_families
@pytest.mark.parametrize("enforce", [True, False], ids=["enforced", "counted-only"])
def test_robbed_of_its_mark(gateway: Gateway, admin: Admin, family: str, enforce: bool) -> None:
    """A member whose mark a neighbour wipes is refused a route; with enforce = false it is counted, and goes."""
    robbed_of_its_mark(gateway)
    admin.apply(policy_text({"members": MEMBERS}, kernel={"enforce": enforce}))
    with gateway.isp.sniff("gw") as arriving:
        gateway.lan.send(WILD[family])
        arrived = arriving.packets(destination=WILD[family], protocol=socket.IPPROTO_UDP)
    assert len(arrived) == (0 if enforce else 1)
    assert admin.counts().get(f"id-inside-{family}-misrouted-passed", Count()).packets == len(arrived)


@both_families
def test_without_a_ruleset(gateway: Gateway, admin: Admin, family: str) -> None:
    """After a `flush ruleset` a member's packets go nowhere, the host's own by their identities, all others by main."""
    stranger = "10.8.0.1" if family == "ipv4" else "2001:db8:8::1"
    gateway.lan.ip("address", "add", f"{stranger}/{32 if family == 'ipv4' else 128}", "dev", "gw")
    admin.apply(policy_text({"members": MEMBERS}))
    gateway.gw.run(["nft", "flush", "ruleset"])
    with gateway.isp.sniff("gw") as at_isp, gateway.corp.sniff("gw") as at_corp:
        for far in (WILD, CHOST):
            assert not gateway.lan.ping(far[family], LAN_HOST[family])
        gateway.lan.send(WILD[family], stranger)
        assert [packet.source for packet in at_isp.packets(protocol=socket.IPPROTO_UDP)] == [ip_address(stranger)]
        assert at_corp.packets(source=LAN_HOST[family]) == []
    assert gateway.lan.ping(LAN_GATEWAY[family], LAN_HOST[family])
    assert gateway.gw.ping(LAN_HOST[family], LAN_GATEWAY[family])
    assert gateway.gw.ping(WILD[family], OUTSIDE[family])
    assert gateway.gw.ping(CHOST[family], INSIDE[family])


# --- whose a packet is -----------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("identity", ["inside", "outside"])
def test_a_program_may_ask_for_an_identity(gateway: Gateway, admin: Admin, family: str, identity: str) -> None:
    """SO_MARK is honoured for a local source that belongs to no identity, and for an unbound socket."""
    admin.apply(policy_text())
    mark, far, other = {
        "inside": (0x01000000, gateway.corp, gateway.isp),
        "outside": (0x02000000, gateway.isp, gateway.corp),
    }[identity]
    with far.sniff("gw") as wanted, other.sniff("gw") as unwanted:
        gateway.gw.send(WILD[family], LAN_GATEWAY[family], mark=mark)
        gateway.gw.send(WILD[family], mark=mark)
        own = {"inside": INSIDE, "outside": OUTSIDE}[identity][family]
        sources = [str(packet.source) for packet in wanted.packets(destination=WILD[family])]
        assert sources == [LAN_GATEWAY[family], own]
        assert not unwanted.packets(destination=WILD[family])
    assert admin.counts()[f"id-{identity}-{family}-transmit"].packets >= 2


@both_families
def test_a_program_cannot_ask_for_the_other_identity(gateway: Gateway, admin: Admin, family: str) -> None:
    """The source decides: what is sent from I with O's mark leaves by I's link."""
    admin.apply(policy_text())
    with gateway.corp.sniff("gw") as vpn0, gateway.isp.sniff("gw") as wan:
        gateway.gw.send(WILD[family], INSIDE[family], mark=0x02000000)
        assert len(vpn0.packets(INSIDE[family], WILD[family])) == 1
        assert not wan.packets(INSIDE[family])


@both_families
@pytest.mark.parametrize("members", [MEMBERS, []], ids=["member", "nobody"])
def test_a_mark_that_arrives_is_not_trusted(gateway: Gateway, admin: Admin, family: str, members: list[str]) -> None:
    """A packet from the LAN that carries O's mark, or I's, before our hook is decided afresh by its source."""
    gateway.gw.nft(f"""
        table inet neighbour {{
            chain prerouting {{
                type filter hook prerouting priority mangle; policy accept;
                iifname lan meta mark set {"0x02000000" if members else "0x01000000"}
            }}
        }}
    """)
    admin.apply(policy_text({"members": members}))
    right, wrong = (gateway.corp, gateway.isp) if members else (gateway.isp, gateway.corp)
    with right.sniff("gw") as wanted, wrong.sniff("gw") as unwanted:
        gateway.lan.send(WILD[family])
        assert len(wanted.packets(LAN_HOST[family], WILD[family])) == 1
        assert not unwanted.packets(LAN_HOST[family])


@both_families
def test_a_mark_of_nobody_is_nobody_s(gateway: Gateway, admin: Admin, family: str) -> None:
    """SO_MARK with bits of ours that are no identity's: the packet of nobody's source passes, and is not counted."""
    source, length = {"ipv4": ("203.0.113.77", 24), "ipv6": ("2001:db8:2::77", 64)}[family]
    gateway.gw.ip("address", "add", f"{source}/{length}", "dev", "wan")
    gateway.gw.settle()
    gateway.isp.nft(f"add element inet bcp38 own{family[-1]} {{ {source} }}")
    admin.apply(policy_text(None, {"addresses": [*OUTSIDE.values()]}))
    assert gateway.gw.ping(WILD[family], source)
    before = admin.counts()
    for mark in (0x20000000, 0x6D6F6C65):
        assert gateway.gw.ping(WILD[family], source, mark=mark)
    assert counted(admin, before) == {}


@both_families
def test_a_neighbour_s_bit_among_ours_kills_no_packet(gateway: Gateway, admin: Admin, family: str) -> None:
    """A member whose mark a neighbour turned into nobody's is judged by its source: it leaves by its link, counted."""
    gateway.gw.nft("""
        table inet neighbour {
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname lan meta mark set meta mark or 0x20000000
            }
        }
    """)
    admin.apply(policy_text({"members": MEMBERS}))
    before = admin.counts()
    with gateway.corp.sniff("gw") as vpn0:
        gateway.lan.send(WILD[family])
        assert len(vpn0.packets(LAN_HOST[family], WILD[family])) == 1
    assert counted(admin, before)[f"id-inside-{family}-transmit"].packets >= 1


@both_families
def test_the_neighbours_bits_and_the_ct_mark_stay(gateway: Gateway, admin: Admin, family: str) -> None:
    """A packet keeps the bits of its mark that aren't ours, and its connection's mark, all the way."""
    gateway.gw.nft("""
        table inet neighbour {
            counter both { }
            chain prerouting {
                type filter hook prerouting priority mangle; policy accept;
                iifname lan meta mark set 0xc0abcdef ct mark set 0x11223344
            }
            chain postrouting {
                type filter hook postrouting priority 400; policy accept;
                oifname vpn0 meta mark 0xc1abcdef ct mark 0x11223344 counter name both
            }
        }
    """)
    admin.apply(policy_text({"members": MEMBERS}))
    gateway.lan.send(WILD[family])
    assert gateway.gw.counter("both", "neighbour") == 1


@pytest.mark.parametrize("destination", ["255.255.255.255", "10.9.0.255", "224.0.0.251", "ff02::fb"])
def test_what_is_for_everybody_stays_on_the_lan(gateway: Gateway, admin: Admin, destination: str) -> None:
    """Broadcast and multicast of the gateway from an address within the members leave by the LAN."""
    admin.apply(POLICY)
    family = "ipv6" if ":" in destination else "ipv4"
    with (
        gateway.lan.sniff("gw") as lan,
        gateway.corp.sniff("gw") as vpn0,
        gateway.gw.udp(LAN_GATEWAY[family]) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if family == "ipv6":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, gateway.gw.index("lan"))
        sock.sendto(b"everybody", (destination, 9))
        assert len(lan.packets(LAN_GATEWAY[family], destination)) == 1
        assert not vpn0.packets(protocol=socket.IPPROTO_UDP)


def test_neighbour_discovery_stays_on_its_link(gateway: Gateway, admin: Admin) -> None:
    """Members and gateway find each other anew, and nothing of it is seen in the VPN."""
    admin.apply(POLICY)
    gateway.gw.ip("-6", "neighbour", "flush", "dev", "lan")
    gateway.lan.ip("-6", "neighbour", "flush", "dev", "gw")
    with gateway.corp.sniff("gw") as vpn0, gateway.lan.sniff("gw") as lan:
        assert gateway.gw.ping(LAN_HOST["ipv6"], LAN_GATEWAY["ipv6"])
        assert [packet for packet in lan.packets(LAN_GATEWAY["ipv6"]) if packet.payload[0] in NEIGHBOUR_DISCOVERY]
        assert not vpn0.packets(LAN_GATEWAY["ipv6"])


# --- in the host's own name -------------------------------------------------------------------------------------------


def forged(source: str, destination: str, port: int) -> bytes:
    """An empty UDP packet over IPv4 (RFC 791, RFC 768); the kernel fills in what is 0 (raw(7))."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0)
    return header + addresses + struct.pack("!HHHH", 9, port, 8, 0)


@pytest.mark.parametrize(
    ("accept_local", "drop_own_sources", "comes"),
    [
        pytest.param(0, False, False, id="the-kernel-looks"),
        pytest.param(1, False, True, id="nobody-looks"),
        pytest.param(1, True, False, id="our-table-looks"),
    ],
)
@pytest.mark.parametrize("source", [OUTSIDE["ipv4"], LAN_GATEWAY["ipv4"]], ids=["own", "of-no-identity"])
def test_what_arrives_in_the_host_s_own_name(
    gateway: Gateway, admin: Admin, *, source: str, accept_local: int, drop_own_sources: bool, comes: bool
) -> None:
    """With accept_local the kernel lets in whoever claims to be this host; drop_own_sources keeps him out, and no
    other, nor what the host says to itself.
    """
    gateway.gw.sysctl("net/ipv4/conf/lan/accept_local", accept_local)
    admin.apply(policy_text(kernel={"drop_own_sources": drop_own_sources}))
    destination = INSIDE["ipv4"]
    with (
        gateway.gw.udp(destination, 4789) as server,
        gateway.lan.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock,
    ):
        senders = (source, LAN_HOST["ipv4"])
        for sender in senders:
            sock.sendto(forged(sender, destination, 4789), (destination, 0))
        gateway.gw.send(destination, source, port=4789)
        seen = [server.recvfrom(1)[1] for _ in range(2 + comes)]
    assert [address for address, port in seen if port == 9] == [*senders][not comes :]
    assert [address for address, port in seen if port != 9] == [source]


def test_the_host_hears_its_own_multicast(gateway: Gateway, admin: Admin) -> None:
    """What a program sends to a group comes to others of this host by the link that it left by: no forger's."""
    admin.apply(policy_text(kernel={"drop_own_sources": True}))
    own = socket.inet_aton(LAN_GATEWAY["ipv4"])
    group = "239.1.2.3"
    with gateway.gw.udp(group, 5353) as listener, gateway.gw.udp(LAN_GATEWAY["ipv4"]) as sock:
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + own)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
        sock.sendto(b"x", (group, 5353))
        assert listener.recvfrom(1)[1][0] == LAN_GATEWAY["ipv4"]


# --- translation -----------------------------------------------------------------------------------------------------


@both_families
def test_members_leave_as_their_identity(gateway: Gateway, admin: Admin, family: str) -> None:
    """With masquerade the far end sees I, and the host itself keeps its own address; without it sees the member."""
    admin.apply(POLICY)
    with gateway.corp.sniff("gw") as vpn0:
        gateway.lan.send(WILD[family])
        admin.apply(policy_text({"members": MEMBERS}))
        gateway.lan.send(WILD[family])
        seen = [str(packet.source) for packet in vpn0.packets(destination=WILD[family])]
    assert seen == [INSIDE[family], LAN_HOST[family]]


@both_families
@pytest.mark.parametrize("rp_filter", [0, 1])
@pytest.mark.parametrize("addressed", [INSIDE, OUTSIDE], ids=["I", "O"])
def test_forwarded_ports_answer_from_both_sides(
    gateway: Gateway, admin: Admin, family: str, addressed: dict[str, str], rp_filter: int
) -> None:
    """A port of I and one of O, forwarded to a member by the operator's own rules, is reached from either world."""
    host = LAN_HOST[family] if family == "ipv4" else f"[{LAN_HOST[family]}]"
    gateway.gw.nft(f"""
        table inet operator {{
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept;
                {NFT[family]} daddr {addressed[family]} tcp dport 80 dnat {NFT[family]} to {host}:80
            }}
        }}
    """)
    if rp_filter:
        strict(gateway.gw)
    admin.apply(POLICY)
    with gateway.lan.listen(LAN_HOST[family], 80):
        for client in (gateway.wild, gateway.chost):
            client.connect(addressed[family], 80, timeout=0.5).close()
    assert foreign(gateway, family) == 0


@both_families
@pytest.mark.parametrize("enforce", [True, False], ids=["enforced", "counted-only"])
def test_a_member_s_translated_address_answers_by_its_own_link(
    gateway: Gateway, admin: Admin, *, family: str, enforce: bool
) -> None:
    """What was asked of an address of O's members, translated to a member of I, is answered by O's link and counted."""
    gateway.isp.nft(f"add element inet bcp38 own{family[-1]} {{ {ROUTED[family]} }}")
    gateway.isp.ip("route", "add", ROUTED[family], "via", OUTSIDE[family])
    gateway.gw.nft(f"""
        table inet operator {{
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept;
                {NFT[family]} daddr {ROUTED_HOST[family]} dnat {NFT[family]} to {LAN_HOST[family]}
            }}
        }}
    """)
    admin.apply(policy_text({"members": MEMBERS}, {"members": [*ROUTED.values()]}, kernel={"enforce": enforce}))
    assert gateway.wild.ping(ROUTED_HOST[family])
    before = admin.counts()
    assert gateway.wild.ping(ROUTED_HOST[family], count=5)
    five = Count(5, 5 * ECHO_BYTES[family])
    assert counted(admin, before) == {f"id-outside-{family}-{way}": five for way in ("transmit", "receive")}
    assert foreign(gateway, family) == 0


@both_families
def test_segments_are_clamped_both_ways(gateway: Gateway, admin: Admin, family: str) -> None:
    """With clamp_mss a member's SYN and the far side's answer name what the link's MTU can carry."""
    gateway.gw.ip("link", "set", "vpn0", "mtu", "1280")
    admin.apply(policy_text({"members": MEMBERS, "masquerade": True, "clamp_mss": True}))
    fitting = {"ipv4": 1240, "ipv6": 1220}[family]
    with (
        gateway.corp.sniff("gw") as vpn0,
        gateway.lan.sniff("gw") as lan,
        gateway.wild.listen(WILD[family], 80),
    ):
        gateway.lan.connect(WILD[family], 80).close()
        syn = vpn0.packets(INSIDE[family], protocol=socket.IPPROTO_TCP)[0]
        answer = lan.packets(WILD[family], protocol=socket.IPPROTO_TCP)[0]
    assert (mss_of(syn), mss_of(answer)) == (fitting, fitting)


# --- the link goes down ----------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize(
    ("when_down", "arrives"),
    [
        pytest.param("unreachable", [], id="unreachable"),
        pytest.param("outside", [INSIDE, OUTSIDE], id="another"),
        pytest.param("main", [INSIDE, LAN_HOST], id="main"),
    ],
)
def test_while_the_link_has_no_carrier(
    gateway: Gateway, admin: Admin, family: str, when_down: str, arrives: list[dict[str, str]]
) -> None:
    """I and its member are refused, or leave by the road that when_down names, which counts as diverted."""
    text = policy_text({"members": MEMBERS, "masquerade": True, "when_down": when_down})
    admin.apply(text)
    gateway.corp.ip("link", "set", "gw", "down")
    admin.apply(text)
    with gateway.isp.sniff("gw") as wan:
        for host, source in ((gateway.gw, INSIDE[family]), (gateway.lan, "")):
            host.send(WILD[family], source)
        seen = [str(packet.source) for packet in wan.packets(destination=WILD[family], protocol=socket.IPPROTO_UDP)]
    assert seen == [source[family] for source in arrives]
    assert admin.counts().get(f"id-inside-{family}-diverted", NOTHING).packets == len(arrives)


@both_families
@pytest.mark.parametrize(
    ("when_down", "arrives"),
    [
        pytest.param("unreachable", [], id="unreachable"),
        pytest.param("outside", [OUTSIDE], id="another"),
        pytest.param("main", [LAN_HOST], id="main"),
    ],
)
def test_when_the_link_goes_down_nobody_needs_to_act(
    gateway: Gateway, admin: Admin, family: str, when_down: str, arrives: list[dict[str, str]]
) -> None:
    """The moment that the link is down, and the identity's own routes with it, the kernel has the right next one."""
    admin.apply(policy_text({"members": MEMBERS, "masquerade": True, "when_down": when_down}))
    gateway.gw.ip("link", "set", "vpn0", "down")
    with gateway.isp.sniff("gw") as wan:
        gateway.lan.send(WILD[family])
        seen = [str(packet.source) for packet in wan.packets(destination=WILD[family], protocol=socket.IPPROTO_UDP)]
    assert seen == [source[family] for source in arrives]
    assert admin.counts().get(f"id-inside-{family}-diverted", NOTHING).packets == len(arrives)
