"""Services of this host, and the identity that they answer as."""

from __future__ import annotations

from collections.abc import Iterator

from agent.addresses import Family
from agent.desired import Desired
from agent.host import Host, Listener, is_hosts_own_business, is_wildcard
from agent.neighbours import ANSWER_AS_ASKED
from agent.symptoms import Symptom, some

#: DHCP and DHCPv6, NetBIOS, multicast DNS, link-local name resolution, SSDP: they speak to their own link only.
OF_THE_LINK = frozenset({67, 68, 137, 138, 546, 547, 1900, 5353, 5355})


def wildcard_sockets(desired: Desired, host: Host) -> Iterator[Symptom]:
    """UDP services that answer from whatever source the route back picks: no mark can repair that.

    Not those of the kernel and of programs that take the address they were asked at; nor what has a port of the range
    from which clients get theirs.
    """
    services: dict[tuple[str, int], list[Listener]] = {}
    for listener in host.listeners:
        if (
            listener.protocol == "udp"
            and is_wildcard(listener.address)
            and not listener.link
            and listener.program
            and listener.program not in ANSWER_AS_ASKED
            and listener.port not in OF_THE_LINK
            and listener.port not in host.ephemeral
        ):
            services.setdefault((listener.program, listener.port), []).append(listener)
    for (program, port), sockets in services.items():
        own = [
            (standing.identity.name, address)
            for standing in desired.standings
            for family in sorted({family for each in sockets for family in _families(each)})
            if _has_choice(family, host)
            for address in standing.own(family)
        ]
        if own:
            yield Symptom(
                f"{program} waits on UDP port {port} of any address, and answers as whom the route back says: asked as "
                f"{some(dict.fromkeys(name for name, _ in own))} it may answer as another identity",
                f"sock_diag: {some(sockets)}",
                f"in the program's own configuration, let it listen on the addresses instead: "
                f"{some(address for _, address in own)}",
            )


def gone_addresses(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Services that wait on an address which this host no longer has: nobody reaches them."""
    del desired
    there = host.addresses()
    for listener in host.listeners:
        address = listener.address
        if is_wildcard(address) or is_hosts_own_business(address) or address in there:
            continue
        if host.sysctl(f"net/{Family.of(address)}/ip_nonlocal_bind"):
            continue  # meant to wait for an address that comes and goes (VRRP)
        yield Symptom(
            f"{listener.program or 'a socket'} waits on {address}, which is on no link of this host",
            f"sock_diag: {listener}",
            f"give the address back to its link (ip address add {address} dev …), or let the service listen elsewhere",
        )


def _families(listener: Listener) -> tuple[Family, ...]:
    """What reaches a socket: an IPv6 wildcard may take IPv4 as well."""
    return tuple(Family) if listener.both else (Family.of(listener.address),)


def _has_choice(family: Family, host: Host) -> bool:
    """Whether there are several links to have a source from."""
    links = [
        link
        for link in host.facts.links
        if any(Family.of(a.address) is family and not is_hosts_own_business(a.address) for a in link.addresses)
    ]
    return len(links) > 1
