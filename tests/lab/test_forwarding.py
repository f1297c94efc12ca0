"""What goes through the gateway: members, port forwards, downloads over a narrow tunnel, and the LAN beside it all."""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple

import pytest

from agent.addresses import Family
from agent.lab import net
from agent.lab.lab import Lab
from agent.lab.probes import PORT, Probe
from tests.kernel.net import Host
from tests.lab.conftest import BuildGateway
from tests.lab.gateway import FORWARDED, LOCAL, REDIRECTED, Gateway, failures, forward_probes, forwards

FAMILIES = pytest.mark.parametrize("family", list(Family))


# --- members ---------------------------------------------------------------------------------------------------------


def route_members_back(lab: Lab) -> None:
    """Corp and isp know the way to the LAN's prefixes, and corp lets them in."""
    for family, lan, corp in (
        (Family.IPV4, "10.9.0.0/24", "198.18.0.2"),
        (Family.IPV6, "2001:db8:9::/64", "2001:db8:5::2"),
    ):
        lab.run("corp", ["ip", "route", "add", lan, "dev", "gw"])
        lab.run("isp", ["ip", "route", "add", lan, "via", corp])
        lab.nft("corp", f"insert rule inet {net.FILTER_TABLE} arriving {family.nft} saddr {lan} accept\n")


@pytest.mark.parametrize("masquerade", [True, False], ids=["masqueraded", "routed"])
@FAMILIES
def test_members(gateway: Gateway, family: Family, masquerade: bool) -> None:
    """A member reaches both sides over the VPN: under I's address with masquerade, under its own without."""
    if not masquerade:
        route_members_back(gateway.lab)
    gateway.apply({"masquerade": masquerade})
    source = (net.INSIDE if masquerade else net.LAN)[family]
    for far in (net.CHOST, net.WILD):
        match = f"{family.nft} saddr {source} {family.nft} daddr {far[family]}"
        with gateway.lab.counting("corp", f'iifname "gw" {match}') as seen:
            assert gateway.lab.ping("lan", far[family], count=5).ok
            assert seen().packets == 5
        download = Probe("lan", "lan", None, far[family], "tcp", size=200_000)
        assert failures(gateway.lab.probe([download])) == {}
    assert gateway.leaked() == {}


# --- port forwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("port", [FORWARDED, REDIRECTED, LOCAL], ids=["to-the-lan-host", "redirected", "to-itself"])
def test_port_forwards(gateway: Gateway, port: int, kind: str) -> None:
    """A port forward on I and one on O are reached from both sides, to whatever host the operator's table leads."""
    gateway.lab.nft("gw", forwards())
    gateway.apply()
    size = 200_000 if kind == "tcp" else 56
    assert failures(gateway.lab.probe(forward_probes(port, kind=kind, size=size, count=3))) == {}
    assert gateway.leaked() == {}


# --- a narrow tunnel -------------------------------------------------------------------------------------------------

#: The least that IPv6 allows (RFC 8200, 5).
NARROW = 1280
DOWNLOAD = 20_000_000

TOO_BIG = {
    Family.IPV4: "icmp type destination-unreachable icmp code frag-needed",
    Family.IPV6: "icmpv6 type packet-too-big",
}
#: A firewall that somebody was too careful with.
NO_TOO_BIG = f"""
    table inet careful {{
        chain leaving {{
            type filter hook postrouting priority -400; policy accept;
            {TOO_BIG[Family.IPV4]} drop
            {TOO_BIG[Family.IPV6]} drop
        }}
    }}
"""


#: Who fetches, from whom, as whom, from which address and port.
Download = tuple[str, str, dict[Family, str] | None, dict[Family, str], int]
DOWNLOADS: tuple[Download, ...] = (
    ("gw", "chost", net.INSIDE, net.CHOST, PORT),
    ("lan", "chost", None, net.CHOST, PORT),
    ("lan", "wild", None, net.WILD, PORT),
    ("chost", "gw", None, net.INSIDE, PORT),
    ("chost", "lan", None, net.INSIDE, FORWARDED),
    ("wild", "lan", None, net.INSIDE, FORWARDED),
)


def downloads(size: int, wait: float = 10.0) -> list[Probe]:
    """Over the tunnel, both ways, by the gateway as I and by a member: who fetches, from whom."""
    return [
        Probe(
            name=f"{host} <- {sender}",
            host=host,
            source=source[family] if source else None,
            target=target[family],
            kind="tcp",
            port=port,
            size=size,
            wait=wait,
        )
        for family in Family
        for host, sender, source, target, port in DOWNLOADS
    ]


#: Only where neither end is the gateway does anybody send more than the tunnel carries.
FORWARDED_DOWNLOADS = {(probe.name, probe.family) for probe in downloads(0) if "gw" not in probe.name}


@pytest.mark.parametrize(
    ("vpn_kind", "size", "told_to_send_less"),
    [
        pytest.param("wireguard", DOWNLOAD, FORWARDED_DOWNLOADS, id="wireguard"),
        # OpenVPN clamps by itself what goes through it (mssfix): nobody sends too much.
        pytest.param("openvpn", DOWNLOAD // 4, set(), id="openvpn"),
    ],
)
def test_path_mtu_discovery(
    build_gateway: BuildGateway, vpn_kind: str, size: int, told_to_send_less: set[tuple[str, Family]]
) -> None:
    """20 MB arrive whole over a tunnel with MTU 1280, forwarded ones too: "too big" reaches whoever sent too much."""
    gateway = build_gateway(vpn_kind, NARROW)
    gateway.lab.nft("gw", forwards())
    gateway.apply({"clamp_mss": False})
    told = set()
    for probe in downloads(size):
        sender = probe.name.split()[-1]
        with gateway.lab.counting(sender, TOO_BIG[probe.family]) as too_big:
            assert failures(gateway.lab.probe([probe])) == {}
            if too_big().packets:
                told.add((probe.name, probe.family))
        for host in ("wild", "chost", "lan"):
            # Who knows the path's MTU also asks for no more than that.
            for number in ("-4", "-6"):
                gateway.lab.run(host, ["ip", number, "route", "flush", "cache"])
    assert told == told_to_send_less
    assert gateway.leaked() == {}


def test_clamping_suffices(build_gateway: BuildGateway) -> None:
    """Where "too big" is dropped forwarded downloads hang, and clamp_mss alone cures them, in both directions."""
    gateway = build_gateway(mtu=NARROW)
    for host in ("gw", "corp"):
        gateway.lab.nft(host, NO_TOO_BIG)
    gateway.lab.nft("gw", forwards())
    gateway.apply({"clamp_mss": False})
    assert set(failures(gateway.lab.probe(downloads(100_000, wait=1.0)))) == FORWARDED_DOWNLOADS
    gateway.apply({"clamp_mss": True})
    for probe in downloads(DOWNLOAD):
        assert failures(gateway.lab.probe([probe])) == {}
    assert gateway.leaked() == {}


# --- the LAN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ping", "udp", "tcp"])
def test_lan_and_gateway(gateway: Gateway, kind: str) -> None:
    """The LAN host and the gateway reach each other by all their addresses, as if there were no identities."""
    gateway.apply()
    probes = []
    for family in Family:
        for own in (net.LAN_GATEWAY, net.INSIDE, net.OUTSIDE):
            probes.append(Probe("lan -> gw", "lan", None, own[family], kind))
            probes.append(Probe("gw -> lan", "gw", own[family], net.LAN[family], kind))
    assert failures(gateway.lab.probe(probes)) == {}
    assert gateway.leaked() == {}


@FAMILIES
def test_neighbour_discovery(gateway: Gateway, family: Family) -> None:
    """After both have forgotten each other, LAN host and gateway find each other again, whoever asks first."""
    gateway.apply()
    for first, source, target in (("lan", net.LAN, net.LAN_GATEWAY), ("gw", net.LAN_GATEWAY, net.LAN)):
        for host, link in (("lan", "gw"), ("gw", "lan")):
            gateway.lab.run(host, ["ip", "neighbour", "flush", "dev", link])
            assert net.LAN[family] not in gateway.lab.run(host, ["ip", "neighbour", "show"]).stdout
        assert gateway.lab.ping(first, target[family], source[family]).ok
    assert gateway.leaked() == {}


class Cast(NamedTuple):
    """A datagram to more than one host; `bound`: to the LAN's link, as DHCP servers do."""

    source: str
    destination: str
    bound: bool = False


@pytest.mark.parametrize(
    "cast",
    [
        pytest.param(Cast("10.9.0.1", "255.255.255.255"), id="limited-broadcast"),
        pytest.param(Cast("10.9.0.1", "255.255.255.255", bound=True), id="limited-broadcast-of-a-bound-socket"),
        pytest.param(Cast("10.9.0.1", "10.9.0.255"), id="directed-broadcast"),
        pytest.param(Cast("10.9.0.1", "224.0.0.251"), id="multicast"),
        pytest.param(Cast("10.9.0.1", "239.1.2.3"), id="multicast-beyond-the-link"),
        pytest.param(Cast("2001:db8:9::1", "ff02::fb", bound=True), id="ipv6-multicast"),
        pytest.param(Cast("2001:db8:9::1", "ff05::1:3", bound=True), id="ipv6-multicast-beyond-the-link"),
    ],
)
def test_broadcast_and_multicast(gateway: Gateway, cast: Cast) -> None:
    """What a DHCP server or mDNS sends from a LAN address inside a member prefix gets to the LAN, and nowhere else."""
    gateway.apply()
    family = Family.IPV6 if ":" in cast.source else Family.IPV4
    match = f"{family.nft} saddr {cast.source} udp dport 68"
    with contextlib.ExitStack() as stack:
        seen = {
            host: stack.enter_context(gateway.lab.counting(host, f'iifname "gw" {match}'))
            for host in ("lan", "isp", "corp")
        }
        send(stack.enter_context(gateway.host("gw")), cast)
        assert {host: count().packets for host, count in seen.items()} == {"lan": 3, "isp": 0, "corp": 0}


def send(gw: Host, cast: Cast) -> None:
    """Three times."""
    with gw.udp(cast.source, 67) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if cast.bound:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lan")
        for _ in range(3):
            sock.sendto(b"offer", (cast.destination, 68))
