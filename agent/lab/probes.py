"""The probe matrix: who should reach whom as which identity, and why that fails while nothing sees to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from agent.addresses import Family
from agent.lab.net import CHOST, INSIDE, LAN, LAN_GATEWAY, OUTSIDE, WILD

#: Where the answering ends listen, in UDP and TCP.
PORT = 5007


@dataclass(frozen=True, slots=True)
class Probe:
    """One question: does `host`, speaking as `source` (None: the kernel's choice), reach `target`?

    `count` exchanges, each within `wait` seconds. `size`: bytes of an echo's body (at least 8), or to fetch by TCP.
    """

    name: str
    host: str
    source: str | None
    target: str
    kind: str = "ping"
    port: int = PORT
    count: int = 1
    size: int = 56
    wait: float = 2.0

    @property
    def family(self) -> Family:
        return Family.IPV6 if ":" in self.target else Family.IPV4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a probe: `reason` is empty for success."""

    probe: Probe
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


class Pair(NamedTuple):
    """A row of the matrix; `why` is why it fails without the agent, empty where it doesn't."""

    name: str
    host: str
    source: dict[Family, str] | None
    target: dict[Family, str]
    why: str = ""


MATRIX = (
    Pair("wild -> O", "wild", None, OUTSIDE),
    Pair("wild -> I", "wild", None, INSIDE, "the reply leaves by wan: isp drops source I"),
    Pair("chost -> I", "chost", None, INSIDE),
    Pair("chost -> O", "chost", None, OUTSIDE, "the reply enters the VPN: corp drops source O"),
    Pair("gw(O) -> wild", "gw", OUTSIDE, WILD),
    Pair("gw(I) -> wild", "gw", INSIDE, WILD, "leaves by wan: isp drops source I"),
    Pair("gw(I) -> chost", "gw", INSIDE, CHOST),
    Pair("gw(O) -> chost", "gw", OUTSIDE, CHOST, "enters the VPN: corp drops source O"),
    Pair("lan -> wild", "lan", None, WILD, "leaves by wan as itself: isp drops it"),
    Pair("lan -> chost", "lan", None, CHOST, "enters the VPN as itself: corp drops it"),
    Pair("lan -> gw", "lan", None, LAN_GATEWAY),
    Pair("gw -> lan", "gw", None, LAN),
)

#: The rows that fail without the agent, and why.
BROKEN = {pair.name: pair.why for pair in MATRIX if pair.why}


def matrix(kind: str = "ping") -> tuple[Probe, ...]:
    """The matrix as probes of one kind, IPv4 and then IPv6."""
    return tuple(
        Probe(pair.name, pair.host, pair.source[family] if pair.source else None, pair.target[family], kind)
        for family in Family
        for pair in MATRIX
    )
