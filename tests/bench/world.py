"""A gateway between a source of packets and a sink, joined by virtual links.

```
 source (out) ── (lan) gateway (up1) ── (up1) sink
                               (up2) ── (up2)
```

Both next hops have a link-layer address that is nobody's: what is sent there has cost the gateway all that a packet
costs, and the far end drops it as the first thing that it does (PACKET_OTHERHOST in ip_rcv_core()). A second host of
the sink on each link is real, for whoever wants an answer.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.addresses import Family
from tests.bench import room
from tests.kernel.net import Host, join, named_namespace

UPLINKS = ("up1", "up2")
NOBODY = "02:00:00:00:00:99"

#: By uplink and family: the gateway's own address (an identity's), its next hop, and a host that answers.
OWN = {
    Family.IPV4: ("192.0.2.2", "203.0.113.2"),
    Family.IPV6: ("2001:db8:1::2", "2001:db8:2::2"),
}
NEXT_HOP = {
    Family.IPV4: ("192.0.2.1", "203.0.113.1"),
    Family.IPV6: ("2001:db8:1::1", "2001:db8:2::1"),
}
ANSWERS = {
    Family.IPV4: ("192.0.2.3", "203.0.113.3"),
    Family.IPV6: ("2001:db8:1::3", "2001:db8:2::3"),
}
LENGTH = {Family.IPV4: 24, Family.IPV6: 64}
LAN = {Family.IPV4: "10.99.0.1/24", Family.IPV6: "2001:db8:9::1/64"}
#: Where forwarded packets want to go: nothing but the default route leads there.
DESTINATION = {Family.IPV4: "198.51.100.10", Family.IPV6: "2001:db8:ff::10"}


class FailedError(RuntimeError):
    """A command of a contestant failed; the text is the first line of what it said."""


@dataclass(frozen=True, slots=True)
class World:
    """A gateway with all around it. `directory` is for its files."""

    source: Host
    gateway: Host
    sink: Host
    directory: Path

    def run(self, words: list[str], text: str = "") -> str:
        """What a command on the gateway prints. Raises FailedError."""
        environment = {**os.environ, "STATE_DIRECTORY": os.fspath(self.directory / "state")}
        with self.gateway.inside():
            done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise FailedError(f"{words[0]}: {(done.stderr.strip() or f'exit {done.returncode}').splitlines()[0]}")
        return done.stdout

    def ip(self, lines: list[str], *options: str) -> None:
        """Lines of ip(8) in one go. Raises FailedError."""
        self.run(["ip", *options, "-batch", "-"], "\n".join([*lines, ""]))

    def nft(self, text: str) -> None:
        """Load nft text. Raises FailedError."""
        self.run(["nft", "-f", "-"], text)

    def idmark(self, *words: str, policy: Path) -> str:
        """Run a verb with a policy. Raises FailedError."""
        return self.run([sys.executable, "-m", "agent", "-c", os.fspath(policy), *words])

    def has_conntrack(self) -> bool:
        """Whether the kernel remembers the gateway's connections: after traffic it then has some."""
        return bool(self.gateway.sysctl("net/netfilter/nf_conntrack_count"))

    def received(self) -> int:
        """Packets that have come to the sink."""
        with self.sink.inside():
            lines = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()
        fields = (line.replace(":", " ").split() for line in lines[2:])
        return sum(int(words[2]) for words in fields if words[0] in UPLINKS)


@contextlib.contextmanager
def world(name: str, directory: Path) -> Iterator[World]:
    """A new world; it ends with the block."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(named_namespace(f"source-{name}"))
        gateway = stack.enter_context(named_namespace(f"gw-{name}", forwarding=True))
        sink = stack.enter_context(named_namespace(f"sink-{name}"))
        join(source, "out", gateway, "lan")
        for link in UPLINKS:
            join(gateway, link, sink, link)
        for family in Family:
            gateway.ip("address", "add", LAN[family], "dev", "lan", *(["nodad"] if family is Family.IPV6 else []))
            for link, own, hop, answers in zip(UPLINKS, OWN[family], NEXT_HOP[family], ANSWERS[family], strict=True):
                length = LENGTH[family]
                gateway.ip("address", "add", f"{own}/{length}", "dev", link)
                sink.ip("address", "add", f"{answers}/{length}", "dev", link)
                gateway.ip("neighbour", "replace", hop, "lladdr", NOBODY, "dev", link, "nud", "permanent")
            gateway.ip("route", "add", "default", "via", NEXT_HOP[family][0], "dev", UPLINKS[0])
        for host in (source, gateway, sink):
            host.settle()
        place = directory / name
        place.mkdir()
        yield World(source, gateway, sink, place)


@dataclass(frozen=True, slots=True)
class Bursts:
    """So many bursts of `size` each are sent; the first ones, which warm the caches, are not counted."""

    count: int
    size: int
    warm: int


@dataclass(frozen=True, slots=True)
class Generator:
    """traffic.c, compiled. What it measured comes as nanoseconds a packet, exchange or block, one number a burst.

    `under` are the words of a command that runs it and watches.
    """

    program: Path
    under: tuple[str, ...] = ()

    def forwarded(self, world: World, family: Family, flows: Path, bursts: Bursts) -> list[float]:
        """Send through the gateway. Raises FailedError: some packets were lost."""
        mac = world.gateway.ip_json("link", "show", "lan")[0]["address"]
        before = world.received()
        times = self._run(world.source, "forward", bursts, ["out", mac, DESTINATION[family], os.fspath(flows)])
        sent = (bursts.warm + bursts.count) * bursts.size
        lost = sent - (world.received() - before)
        if lost > 0:
            raise FailedError(f"{lost} of {sent} packets didn't come through")
        return times

    def local(self, world: World, kind: str, uplink: int, family: Family, bursts: Bursts) -> list[float]:
        """Send from the gateway itself, from its own address on an uplink. Raises FailedError."""
        source = OWN[family][uplink]
        if kind == "udp":
            return self._run(world.gateway, kind, bursts, [source, DESTINATION[family]])
        names = [source, ANSWERS[family][uplink], f"/run/netns/{world.sink.name}"]
        return self._run(world.gateway, kind, bursts, names)

    def _run(self, host: Host, kind: str, bursts: Bursts, operands: list[str]) -> list[float]:
        numbers = [room.cpu(), bursts.warm + bursts.count, bursts.size]
        command = [*self.under, os.fspath(self.program), kind, *map(str, numbers), *operands]
        with host.inside():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FailedError(done.stderr.strip())
        return [int(line) / bursts.size for line in done.stdout.split()[bursts.warm :]]
