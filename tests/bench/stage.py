"""The lab with a daemon at its gateway, and traffic of every identity that never stops."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.lab import net
from agent.lab.lab import Count, Lab
from agent.model import Family
from tests.kernel.running import Running, running
from tests.lab.gateway import Gateway

#: A port where nobody answers, and seconds between two rounds of one datagram each.
DISCARD, PAUSE = 9, 0.005
#: Where what would be a leak arrives: I and its members at the provider's, O at the company's.
LEAKS = (
    (
        "isp",
        'iifname "gw" ip saddr { 192.0.2.0/24, 10.9.0.0/24 } counter name seen; '
        'iifname "gw" ip6 saddr { 2001:db8:4::/64, 2001:db8:9::/64 }',
    ),
    ("corp", 'iifname "gw" ip saddr 203.0.113.0/24 counter name seen; iifname "gw" ip6 saddr 2001:db8:2::/64'),
)
METRICS = "unix:/run/idmark-bench.sock"


@dataclass
class Traffic:
    """Datagrams of I, of O and of a member to both worlds, in both families."""

    sockets: list[tuple[socket.socket, str]]
    sent: int = 0
    refused: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Send until it is done."""
        while not self.done.wait(PAUSE):
            for sock, target in self.sockets:
                try:
                    sock.sendto(b"x", (target, DISCARD))
                    self.sent += 1
                except OSError:
                    self.refused += 1


@dataclass(frozen=True, slots=True)
class Stage:
    """What a benchmark plays on."""

    gateway: Gateway
    daemon: Running
    traffic: Traffic
    seen_at_isp: Callable[[], Count]
    seen_at_corp: Callable[[], Count]

    def leaked(self) -> str:
        """How many packets of an identity left by the other one's link; empty for none."""
        seen = {"I at isp": self.seen_at_isp().packets, "O at corp": self.seen_at_corp().packets}
        return ", ".join(f"{count} of {place}" for place, count in seen.items() if count)


@contextlib.contextmanager
def stage(**policy: Any) -> Iterator[Stage]:
    """The lab over WireGuard, with the policy's defaults and members that are masqueraded."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        gateway = Gateway(stack.enter_context(Lab("wireguard")), directory)
        gateway.write(**policy)
        words = ["-c", os.fspath(gateway.policy), "run", "--netns", "gw", "--listen", METRICS]
        daemon = stack.enter_context(running([sys.executable, "-m", "agent", *words], directory))
        gw, lan = (stack.enter_context(gateway.host(name)) for name in ("gw", "lan"))
        speakers = ((gw, net.INSIDE), (gw, net.OUTSIDE), (lan, net.LAN))
        traffic = Traffic(
            [
                (stack.enter_context(host.udp(source[family])), far[family])
                for family in Family
                for host, source in speakers
                for far in (net.WILD, net.CHOST)
            ]
        )
        for sock, _ in traffic.sockets:
            sock.settimeout(0)
        isp, corp = (stack.enter_context(gateway.lab.counting(*place)) for place in LEAKS)
        thread = threading.Thread(target=traffic.run)
        thread.start()
        try:
            yield Stage(gateway, daemon, traffic, isp, corp)
        finally:
            traffic.done.set()
            thread.join()
