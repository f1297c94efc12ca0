"""What deploy/sysctl.d/50-idmark.conf says of the kernel."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.kernel.conftest import Peers
from tests.kernel.net import Host

ROUTER_ADVERTISEMENT = 134  # RFC 4861
ALL_NODES = "ff02::1"


@pytest.fixture
def router(netns: Host, peers: Peers) -> Host:
    """A router on `wan`, that advertises itself when it is told to."""
    router = peers("router", "wan")
    netns.ip("address", "add", "2001:db8:2::2/64", "dev", "wan")
    router.ip("address", "add", "2001:db8:2::1/64", "dev", "gw")
    netns.settle()
    router.settle()
    return router


def advertise(router: Host, netns: Host) -> None:
    """One router advertisement, good for half an hour, to the far end of `gw`; returns when it has been there."""
    with router.inside(), socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        index = socket.if_nametoindex("gw")
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        message = struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 64, 0, 1800, 0, 0)
        sock.sendto(message, (ALL_NODES, 0, 0, index))
    assert netns.ping("2001:db8:2::1", timeout=5.0)


def has_default(netns: Host) -> bool:
    return bool(netns.ip("-6", "route", "list", "default", "proto", "ra"))


@pytest.mark.parametrize(("accept_ra", "learned"), [(1, False), (2, True)])
def test_a_router_does_not_listen_to_advertisements(netns: Host, router: Host, accept_ra: int, learned: bool) -> None:
    """With forwarding on a default is learned from a router advertisement only where accept_ra is 2."""
    netns.sysctl("net/ipv6/conf/all/forwarding", 1)
    netns.sysctl("net/ipv6/conf/wan/accept_ra", accept_ra)
    advertise(router, netns)
    assert has_default(netns) is learned


@pytest.mark.parametrize(("accept_ra", "kept"), [(1, False), (2, True)])
def test_forwarding_drops_what_was_learned(netns: Host, router: Host, accept_ra: int, kept: bool) -> None:
    """Switching forwarding on takes the default away that was learned before, unless accept_ra is 2."""
    netns.sysctl("net/ipv6/conf/all/forwarding", 0)
    netns.sysctl("net/ipv6/conf/wan/accept_ra", accept_ra)
    advertise(router, netns)
    assert has_default(netns)
    netns.sysctl("net/ipv6/conf/all/forwarding", 1)
    assert has_default(netns) is kept


@pytest.mark.parametrize(("keep", "there"), [(0, False), (1, True)])
def test_static_ipv6_addresses_go_with_the_link(netns: Host, router: Host, keep: int, there: bool) -> None:
    """A link that goes down and comes back has its static global IPv6 address still only with keep_addr_on_down."""
    netns.sysctl("net/ipv6/conf/wan/keep_addr_on_down", keep)
    netns.ip("link", "set", "wan", "down")
    netns.ip("link", "set", "wan", "up")
    netns.settle()
    assert ("2001:db8:2::2" in netns.ip("-6", "address", "show", "dev", "wan")) is there
