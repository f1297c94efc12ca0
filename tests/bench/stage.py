"""The lab with a daemon at its gateway, and traffic of every identity that never stops."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.addresses import Family
from agent.lab import net
from agent.lab.lab import Lab
from tests.kernel.running import Running, running
from tests.lab.gateway import Gateway

#: A port where nobody answers, and seconds between two rounds of one datagram each.
DISCARD, PAUSE = 9, 0.005
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
    crossed: Callable[[], Mapping[str, int]]

    def leaked(self) -> str:
        """How many packets of an identity left by the other one's link; empty for none."""
        return ", ".join(f"{count} of {place}" for place, count in self.crossed().items())


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
        crossed = stack.enter_context(gateway.crossings())
        thread = threading.Thread(target=traffic.run)
        thread.start()
        try:
            yield Stage(gateway, daemon, traffic, crossed)
        finally:
            traffic.done.set()
            thread.join()
