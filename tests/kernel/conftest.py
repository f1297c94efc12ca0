"""A fresh network namespace for every test, and the test net of a gateway with a VPN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pytest

from tests.kernel.net import INSIDE, OUTSIDE, Host, fresh_namespace, join, named_namespace

#: The far side of a link: only those sources come in that are its customer's own; the others are counted.
BCP38 = """
table inet bcp38 {{
    counter foreign4 {{ }}
    counter foreign6 {{ }}
    set own4 {{ type ipv4_addr; flags interval; elements = {{ {own4} }}; }}
    set own6 {{ type ipv6_addr; flags interval; elements = {{ {own6}, ::, fe80::/10 }}; }}
    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
        iifname "gw" meta nfproto ipv4 ip saddr != @own4 counter name foreign4 drop
        iifname "gw" meta nfproto ipv6 ip6 saddr != @own6 counter name foreign6 drop
    }}
}}
"""


class Peers(Protocol):
    """Makes a named host; with `link`, joined to the test's own namespace: LINK there, "gw" at the host."""

    def __call__(self, name: str, link: str = "", *, forwarding: bool = False) -> Host: ...


@pytest.fixture
def netns() -> Iterator[Host]:
    """The test's own new namespace: pytest's main thread is in it, and so is what the test does in this process."""
    with fresh_namespace("gw") as host:
        yield host


@pytest.fixture
def peers(netns: Host) -> Iterator[Peers]:
    """More hosts, which go with the test."""
    with contextlib.ExitStack() as stack:

        def make(name: str, link: str = "", *, forwarding: bool = False) -> Host:
            host = stack.enter_context(named_namespace(name, forwarding=forwarding))
            if link:
                join(netns, link, host, "gw")
            return host

        yield make


@dataclass(frozen=True, slots=True)
class Gateway:
    """The test net, with a plain cable in place of the VPN. `gw` is the test's own namespace.

    ```
     wild ── isp ──(wan) gw (vpn0)── corp ── chost        lan host ──(lan) gw
              └────────────────────────┘
    ```
    Every host has IPv4 and IPv6; each far end calls its link to the gateway "gw".
    """

    gw: Host
    wild: Host
    isp: Host
    corp: Host
    chost: Host
    lan: Host


@pytest.fixture
def gateway(netns: Host, peers: Peers) -> Gateway:
    """The test net, where nothing of idmark is installed."""
    net = Gateway(
        gw=netns,
        wild=peers("wild"),
        isp=peers("isp", "wan", forwarding=True),
        corp=peers("corp", "vpn0", forwarding=True),
        chost=peers("chost"),
        lan=peers("lan", "lan"),
    )
    join(net.isp, "wild", net.wild, "isp")
    join(net.isp, "corp", net.corp, "isp")
    join(net.corp, "chost", net.chost, "corp")
    net.gw.ip_batch("""
        address add 203.0.113.2/24 dev wan
        address add 2001:db8:2::2/64 dev wan
        address add 192.0.2.130/25 dev vpn0
        address add 2001:db8:4::130/64 dev vpn0
        address add 10.9.0.1/24 dev lan
        address add 2001:db8:9::1/64 dev lan
        route add default via 203.0.113.1 dev wan
        route add default via 2001:db8:2::1 dev wan
        route add 192.0.2.0/25 via 192.0.2.129 dev vpn0
        route add 2001:db8:3::/64 via 2001:db8:4::1 dev vpn0
    """)
    net.wild.ip_batch("""
        address add 198.51.100.10/24 dev isp
        address add 2001:db8:1::10/64 dev isp
        route add default via 198.51.100.1
        route add default via 2001:db8:1::1
    """)
    net.isp.ip_batch("""
        address add 198.51.100.1/24 dev wild
        address add 2001:db8:1::1/64 dev wild
        address add 203.0.113.1/24 dev gw
        address add 2001:db8:2::1/64 dev gw
        address add 198.18.0.1/30 dev corp
        address add 2001:db8:5::1/64 dev corp
        route add 192.0.2.0/24 via 198.18.0.2
        route add 2001:db8:3::/64 via 2001:db8:5::2
        route add 2001:db8:4::/64 via 2001:db8:5::2
    """)
    net.corp.ip_batch("""
        address add 192.0.2.129/25 dev gw
        address add 2001:db8:4::1/64 dev gw
        address add 198.18.0.2/30 dev isp
        address add 2001:db8:5::2/64 dev isp
        address add 192.0.2.1/25 dev chost
        address add 2001:db8:3::1/64 dev chost
        route add default via 198.18.0.1
        route add default via 2001:db8:5::1
        route add 10.9.0.0/24 via 192.0.2.130
        route add 2001:db8:9::/64 via 2001:db8:4::130
    """)
    net.chost.ip_batch("""
        address add 192.0.2.50/25 dev corp
        address add 2001:db8:3::50/64 dev corp
        route add default via 192.0.2.1
        route add default via 2001:db8:3::1
    """)
    net.lan.ip_batch("""
        address add 10.9.0.5/24 dev gw
        address add 2001:db8:9::5/64 dev gw
        route add default via 10.9.0.1
        route add default via 2001:db8:9::1
    """)
    for host in (net.gw, net.wild, net.isp, net.corp, net.chost, net.lan):
        host.settle()
    net.isp.nft(BCP38.format(own4=OUTSIDE["ipv4"], own6=OUTSIDE["ipv6"]))
    net.corp.nft(BCP38.format(own4=INSIDE["ipv4"], own6=INSIDE["ipv6"]))
    return net
