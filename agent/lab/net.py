"""The lab's net as data: hosts, wires, addresses, routes and filters, and the words that ip(8) and nft(8) get of it.

```
 wild 198.51.100.10 ── isp ──(wan) gw (vpn0)── corp ── chost 192.0.2.50
                        └───────────────────────┘      lan 10.9.0.5 ──(lan) gw
```

A link is named after the host at its other end, but the gateway's are wan, vpn0 and lan. The addresses are those of
documentation (RFC 5737, RFC 3849), benchmarking (RFC 2544) and private use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from agent.addresses import Family

HOSTS = ("wild", "isp", "gw", "corp", "chost", "lan")
ROUTERS = ("isp", "gw", "corp")

#: The ends of the probes, by family. OUTSIDE is O, INSIDE is I.
WILD = {Family.IPV4: "198.51.100.10", Family.IPV6: "2001:db8:1::10"}
OUTSIDE = {Family.IPV4: "203.0.113.2", Family.IPV6: "2001:db8:2::2"}
INSIDE = {Family.IPV4: "192.0.2.130", Family.IPV6: "2001:db8:4::130"}
CHOST = {Family.IPV4: "192.0.2.50", Family.IPV6: "2001:db8:3::50"}
LAN_GATEWAY = {Family.IPV4: "10.9.0.1", Family.IPV6: "2001:db8:9::1"}
LAN = {Family.IPV4: "10.9.0.5", Family.IPV6: "2001:db8:9::5"}
#: The far end of the tunnel, inside it; and the address that the tunnel's own packets go to.
TUNNEL_END = {Family.IPV4: "192.0.2.129", Family.IPV6: "2001:db8:4::1"}
ENDPOINT = "198.18.0.2"


class Interface(NamedTuple):
    """A link of a host, and its addresses with their prefix lengths."""

    host: str
    name: str
    addresses: tuple[str, ...]


class Wire(NamedTuple):
    """A cable between two hosts, or a tunnel."""

    near: Interface
    far: Interface


class Route(NamedTuple):
    """A route of a host's main table; without `via` the destination is on the link."""

    host: str
    destination: str
    link: str
    via: str = ""


WIRES = (
    Wire(
        Interface("wild", "isp", ("198.51.100.10/24", "2001:db8:1::10/64")),
        Interface("isp", "wild", ("198.51.100.1/24", "2001:db8:1::1/64")),
    ),
    Wire(
        Interface("gw", "wan", ("203.0.113.2/24", "2001:db8:2::2/64")),
        Interface("isp", "gw", ("203.0.113.1/24", "2001:db8:2::1/64")),
    ),
    Wire(
        Interface("corp", "isp", ("198.18.0.2/30", "2001:db8:5::2/64")),
        Interface("isp", "corp", ("198.18.0.1/30", "2001:db8:5::1/64")),
    ),
    Wire(
        Interface("chost", "corp", ("192.0.2.50/25", "2001:db8:3::50/64")),
        Interface("corp", "chost", ("192.0.2.1/25", "2001:db8:3::1/64")),
    ),
    Wire(
        Interface("lan", "gw", ("10.9.0.5/24", "2001:db8:9::5/64")),
        Interface("gw", "lan", ("10.9.0.1/24", "2001:db8:9::1/64")),
    ),
)

#: The VPN.
TUNNEL = Wire(
    Interface("gw", "vpn0", ("192.0.2.130/25", "2001:db8:4::130/64")),
    Interface("corp", "gw", ("192.0.2.129/25", "2001:db8:4::1/64")),
)

ROUTES = (
    Route("wild", "0.0.0.0/0", "isp", "198.51.100.1"),
    Route("wild", "::/0", "isp", "2001:db8:1::1"),
    Route("isp", "192.0.2.0/24", "corp", "198.18.0.2"),
    Route("isp", "2001:db8:3::/64", "corp", "2001:db8:5::2"),
    Route("isp", "2001:db8:4::/64", "corp", "2001:db8:5::2"),
    Route("gw", "0.0.0.0/0", "wan", "203.0.113.1"),
    Route("gw", "::/0", "wan", "2001:db8:2::1"),
    # A VPN client's own route: the tunnel's packets find the endpoint also where main has no default.
    Route("gw", "198.18.0.2/32", "wan", "203.0.113.1"),
    Route("gw", "192.0.2.0/25", "vpn0"),
    Route("gw", "2001:db8:3::/64", "vpn0"),
    Route("corp", "0.0.0.0/0", "isp", "198.18.0.1"),
    Route("corp", "::/0", "isp", "2001:db8:5::1"),
    Route("chost", "0.0.0.0/0", "corp", "192.0.2.1"),
    Route("chost", "::/0", "corp", "2001:db8:3::1"),
    Route("lan", "0.0.0.0/0", "gw", "10.9.0.1"),
    Route("lan", "::/0", "gw", "2001:db8:9::1"),
)

#: Who drops what arrives from the gateway with a source that isn't its customer's (BCP 38): the provider lets in O, the
#: corporate network lets in I. Neighbour discovery needs the link-local and the unspecified address.
FILTERS = {"isp": OUTSIDE, "corp": INSIDE}
FILTER_TABLE = "bcp38"
FILTER = """\
table inet {table} {{
    counter ipv4 {{ }}
    counter ipv6 {{ }}
    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
        iifname "gw" ip saddr != {ipv4} counter name ipv4 drop
        iifname "gw" ip6 saddr != {{ {ipv6}, ::, fe80::/10 }} counter name ipv6 drop
    }}
}}
"""

#: Every host's sysctls. What a namespace starts with depends on the machine (net.core.devconf_inherit_init_net).
SYSCTLS = {
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
    "net.ipv4.conf.all.src_valid_mark": "0",
    "net.ipv4.conf.default.src_valid_mark": "0",
    "net.ipv4.icmp_ratelimit": "0",
    # Echo sockets without a raw socket's work; this group is the sandbox's only one (icmp(7)).
    "net.ipv4.ping_group_range": "0 0",
    "net.ipv6.icmp.ratelimit": "0",
    "net.ipv6.conf.all.disable_ipv6": "0",
    "net.ipv6.conf.default.disable_ipv6": "0",
    "net.ipv6.conf.default.accept_ra": "0",
    "net.ipv6.conf.default.router_solicitations": "0",
    # Duplicate address detection would keep every address back for a second.
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
}
FORWARDING = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1", "net.ipv6.conf.default.forwarding": "1"}


def interfaces(host: str) -> list[Interface]:
    """The links of a host, the tunnel's end last."""
    return [end for wire in (*WIRES, TUNNEL) for end in wire if end.host == host]


def sysctl_words(host: str) -> list[str]:
    """What `sysctl -qw` gets. Forwarding comes first: switching it resets others (ip-sysctl.rst)."""
    settings = {**(FORWARDING if host in ROUTERS else {}), **SYSCTLS}
    return [f"{key}={value}" for key, value in settings.items()]


def namespace_lines() -> list[str]:
    """Lines for `ip -batch`: the hosts."""
    return [f"netns add {host}" for host in HOSTS]


def wire_lines() -> list[str]:
    """Lines for `ip -batch`: the cables between the hosts, all down as yet."""
    return [
        f"link add {near.name} netns {near.host} type veth peer name {far.name} netns {far.host}" for near, far in WIRES
    ]


def interface_lines(end: Interface) -> Iterator[str]:
    """Lines for `ip -n HOST -batch`: a link up, with its addresses. `replace`: what is there already stays."""
    yield f"link set {end.name} up"
    yield from (f"address replace {address} dev {end.name}" for address in end.addresses)


def route_lines(host: str, link: str) -> Iterator[str]:
    """Lines for `ip -n HOST -batch`: the routes of main over a link."""
    for route in ROUTES:
        if (route.host, route.link) == (host, link):
            yield f"route replace {route.destination}" + (f" via {route.via}" if route.via else "") + f" dev {link}"


def filter_text(host: str) -> str:
    """The nft text of a host's source filter, with its counters at zero."""
    own = FILTERS[host]
    return FILTER.format(table=FILTER_TABLE, ipv4=own[Family.IPV4], ipv6=own[Family.IPV6])
