"""The kernel's own account of a flow's packets, rule by rule, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from agent.addresses import Address

#: So many packets are told of, and no more.
PACKETS = 10
#: IANA's numbers of what an operator sends.
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}


@dataclass(frozen=True, slots=True)
class Flow:
    """Packets of one source and destination that arrive on one link; without a link: that this host sends."""

    source: Address
    destination: Address
    link: str | None = None

    def __str__(self) -> str:
        where = f"arriving on {self.link}" if self.link else "sent by this host"
        return f"{self.source} -> {self.destination}, {where}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a packet was: a chain's rule and its comment, or (handle 0) the chain's end; the hook of a base chain."""

    family: str
    table: str
    chain: str
    hook: str = ""
    handle: int = 0
    comment: str = ""

    def __str__(self) -> str:
        rule = f'"{self.comment}"' if self.comment else f"rule {self.handle}" if self.handle else ""
        return f"{self.family} {self.table} {self.chain}{f', {rule}' if rule else ''}"


@dataclass(frozen=True, slots=True)
class Event:
    """What the kernel says of one packet (a number of its own) at one place: the verdict, and the mark at that time.

    `ours`: the rule that has the packet traced. `header` is the IP header as it was then, where the kernel gives it.
    """

    packet: int
    place: Place
    verdict: str
    mark: int = 0
    ours: bool = False
    header: bytes = b""


def lines(events: Iterable[Event]) -> Iterator[str]:
    """The account for a person, as it comes: each packet, and each place with verdict and mark."""
    hooks: dict[int, str] = {}
    last = 0
    for event in events:
        if event.packet not in hooks:
            if len(hooks) == PACKETS:
                return
            hooks[event.packet] = ""
        if event.packet != last:
            last = event.packet
            yield f"packet {[*hooks].index(last) + 1}{_described(event.header)}"
        hooks[last] = event.place.hook or hooks[last]
        if not event.ours:
            mark = f", mark {event.mark:#x}" if event.mark else ""
            yield f"  {hooks[last]:<11} {event.place} -> {event.verdict}{mark}"


def plain(events: Iterable[Event]) -> Iterator[dict[str, object]]:
    """The account for a program."""
    hooks: dict[int, str] = {}
    for event in events:
        if event.packet not in hooks and len(hooks) == PACKETS:
            return
        hooks[event.packet] = event.place.hook or hooks.get(event.packet, "")
        if not event.ours:
            place = event.place
            yield {
                "packet": [*hooks].index(event.packet) + 1,
                "hook": hooks[event.packet],
                "table": f"{place.family} {place.table}",
                "chain": place.chain,
                "rule": place.handle or None,
                "comment": place.comment,
                "verdict": event.verdict,
                "mark": event.mark,
            }


def _described(header: bytes) -> str:
    """An IP header in words."""
    if len(header) >= 20 and header[0] >> 4 == 4:
        source, destination, protocol = header[12:16], header[16:20], header[9]
    elif len(header) >= 40:
        source, destination, protocol = header[8:24], header[24:40], header[6]
    else:
        return ""
    return f": {ip_address(source)} -> {ip_address(destination)}, {PROTOCOLS.get(protocol, f'protocol {protocol}')}"
