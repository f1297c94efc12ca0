"""No packet of an identity leaves by another one's link: with the tunnel down, through changes and kills of them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from agent.addresses import Family
from agent.lab import endpoint, net
from agent.lab.probes import PORT, Probe, matrix
from tests.kernel.admin import Table
from tests.kernel.net import Host
from tests.kernel.running import eventually
from tests.lab.conftest import BuildGateway
from tests.lab.gateway import Gateway, failures, forward_probes, forwards

PACKETS = 200
#: A port where nobody answers: these packets are only counted.
DISCARD = 9


# --- who sends -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Senders:
    """I on the gateway and a member on the LAN host, with sockets that they have had open for a while."""

    datagrams: list[tuple[socket.socket, Family]]
    connections: list[socket.socket]

    def send(self, packets: int) -> int:
        """So many datagrams from each to both worlds, and a line on each connection; how many the kernel took."""
        taken = 0
        for sock, family in self.datagrams:
            for _ in range(packets // 2):
                for far in (net.WILD, net.CHOST):
                    # What has no way out is refused at once.
                    with contextlib.suppress(OSError):
                        sock.sendto(b"x", (far[family], DISCARD))
                        taken += 1
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(b"1")
        return taken


@pytest.fixture
def senders() -> Iterator[Callable[[Gateway], Senders]]:
    """Makes the sockets of a gateway's senders; the connections are established, and their first line is begun."""
    with contextlib.ExitStack() as stack:

        def make(gateway: Gateway) -> Senders:
            gw, lan = (stack.enter_context(gateway.host(name)) for name in ("gw", "lan"))
            speakers = [(gw, net.INSIDE), (lan, net.LAN)]
            made = Senders(
                [(host.udp(source[family]), family) for family in Family for host, source in speakers],
                [
                    host.connect(far[family], PORT, source[family])
                    for family in Family
                    for host, source in speakers
                    for far in (net.WILD, net.CHOST)
                ],
            )
            for sock in (*(sock for sock, _ in made.datagrams), *made.connections):
                stack.enter_context(sock)
                sock.settimeout(0)
            made.send(2)
            return made

        yield make


# --- the tunnel is down ----------------------------------------------------------------------------------------------

#: Takes the tunnel down; what it returns brings it back.
Break = Callable[[Gateway], Callable[[], None]]


def link_down(gateway: Gateway) -> Callable[[], None]:
    """The link goes down, and comes up again."""
    gateway.lab.link_down("gw", "vpn0")
    return lambda: None


def program_killed(gateway: Gateway) -> Callable[[], None]:
    """The VPN's program is killed, which takes the link along; it is started again."""
    pid, words = gateway.vpn_process()
    os.kill(pid, signal.SIGKILL)
    return lambda: started(gateway, words)


def link_deleted(gateway: Gateway) -> Callable[[], None]:
    """WireGuard's link is deleted; it is made anew with the keys that it had."""
    keys = gateway.lab.run("gw", ["wg", "showconf", "vpn0"]).stdout
    try:
        words = gateway.vpn_process()[1]
    except LookupError:  # the kernel's WireGuard
        words = ["ip", "link", "add", "vpn0", "type", "wireguard"]
    gateway.lab.run("gw", ["ip", "link", "delete", "vpn0"])

    def make() -> None:
        started(gateway, words)
        assert eventually(lambda: answers(gateway, ["wg", "show", "vpn0"]))
        gateway.lab.run("gw", ["wg", "setconf", "vpn0", "/dev/stdin"], text=keys)

    return make


def started(gateway: Gateway, words: list[str]) -> None:
    """Start the VPN's program on the gateway and wait for its link."""
    gateway.lab.popen("gw", words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually(lambda: answers(gateway, ["ip", "link", "show", "vpn0"]))


def answers(gateway: Gateway, command: list[str]) -> bool:
    return gateway.lab.run("gw", command, check=False).returncode == 0


def gone(gateway: Gateway) -> bool:
    """Whether the tunnel's link is down or absent."""
    shown = gateway.lab.run("gw", ["ip", "link", "show", "up", "dev", "vpn0"], check=False)
    return not shown.stdout


def of_the_tunnel(probe: Probe) -> bool:
    """Whether a row of the matrix needs the tunnel: I speaks, or is spoken to, or a member goes out."""
    return "I" in probe.name or probe.name in {"lan -> wild", "lan -> chost"}


@pytest.mark.parametrize(
    ("vpn_kind", "fail", "why"),
    [
        pytest.param("wireguard", link_down, "link vpn0 is down", id="wireguard-link-down"),
        pytest.param("openvpn", link_down, "link vpn0 is down", id="openvpn-link-down"),
        pytest.param("wireguard", link_deleted, "there is no link vpn0", id="wireguard-link-deleted"),
        pytest.param("openvpn", program_killed, "there is no link vpn0", id="openvpn-killed"),
    ],
)
def test_tunnel_down(
    build_gateway: BuildGateway, senders: Callable[[Gateway], Senders], vpn_kind: str, fail: Break, why: str
) -> None:
    """While the tunnel is down nothing of I's leaks, and O goes on working; plan and status say what is closed.

    Sent are 200 packets in each family by I and by a member, on sockets and through connections from before: when the
    tunnel has gone, after an apply without it, when it is there again, and after the apply that opens it. Enforcement
    is off: it would hide what the routes let through.
    """
    gateway = build_gateway(vpn_kind)
    gateway.apply(kernel={"enforce": False})
    senders_there = senders(gateway)
    assert senders_there.send(PACKETS) > 0
    assert gateway.leaked() == {}

    bring_back = fail(gateway)
    assert eventually(lambda: gone(gateway))
    senders_there.send(PACKETS)
    assert gateway.leaked() == {}
    notes = json.loads(gateway.idmark("plan", "--json", check=False).stdout)["notes"]
    assert [f"identity inside: {family} is closed: {why}" for family in Family] == notes[:2]

    gateway.idmark("apply")
    senders_there.send(PACKETS)
    broken = failures(gateway.lab.probe(replace(probe, wait=0.5) for probe in matrix()))
    assert set(broken) == {(probe.name, probe.family) for probe in matrix() if of_the_tunnel(probe)}
    assert gateway.leaked() == {}
    status = gateway.status()
    inside, outside = status["identities"]
    assert status["in_force"]
    assert {(state["open"], state["way"]) for state in inside["families"].values()} == {(False, why)}
    assert {state["open"] for state in outside["families"].values()} == {True}

    bring_back()
    gateway.lab.link_up("gw", "vpn0")
    senders_there.send(PACKETS)
    assert gateway.leaked() == {}
    gateway.idmark("apply")
    assert eventually(lambda: gateway.lab.ping("gw", net.CHOST[Family.IPV4], net.INSIDE[Family.IPV4], wait=0.5).ok)
    senders_there.send(PACKETS)
    assert failures(gateway.lab.probe_matrix()) == {}
    assert gateway.leaked() == {}


def test_tunnel_down_without_the_agent(gateway: Gateway, senders: Callable[[Gateway], Senders]) -> None:
    """The same packets do leak where the agent has been removed: the test above can fail."""
    gateway.apply()
    there = senders(gateway)
    gateway.idmark("remove")
    gateway.lab.link_down("gw", "vpn0")
    there.send(PACKETS)
    assert {"isp ipv4", "isp ipv6"} <= gateway.leaked().keys()


# --- what postrouting catches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enforce", "action", "leaked"), [(True, "dropped", 0), (False, "passed", PACKETS)], ids=["enforce", "count-only"]
)
@pytest.mark.parametrize("family", list(Family))
def test_enforcement_alone(gateway: Gateway, family: Family, enforce: bool, action: str, leaked: int) -> None:
    """When somebody has deleted our rules, what I sends to the wild is counted as misrouted, and dropped if enforced.

    systemd-networkd does so when it restarts (ManageForeignRoutingPolicyRules=).
    """
    gateway.apply(kernel={"enforce": enforce})
    for number in ("-4", "-6"):
        gateway.lab.run("gw", ["ip", number, "rule", "flush", "protocol", "73"])
    with gateway.host("gw") as gw, gw.udp(net.INSIDE[family]) as sock:
        for _ in range(PACKETS):
            with contextlib.suppress(PermissionError):  # what the local sender is told of a dropped packet
                sock.sendto(b"x", (net.WILD[family], DISCARD))
    misrouted = {key: count.packets for key, count in gateway.counts().items() if "misrouted" in key[2] and any(count)}
    assert misrouted == {("inside", family, f"misrouted-{action}"): PACKETS}
    assert sum(seen.packets for seen in gateway.leaked().values()) == leaked
    assert gateway.idmark("plan", check=False).returncode == 1


# --- connections from before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("translation", "misrouted", "as_inside"),
    [
        pytest.param("snat ip to 203.0.113.2", 50, 0, id="snat"),
        # The kernel itself drops a masqueraded connection's packet that leaves by another link, and forgets the
        # connection (nf_nat_oif_changed): the next packet is a new one's, and goes out as I.
        pytest.param("masquerade", 0, 49, id="masquerade"),
    ],
)
def test_connection_from_before(gateway: Gateway, translation: str, misrouted: int, as_inside: int) -> None:
    """A member's connection that was translated to O before the apply does not enter the VPN as O: it is counted."""
    gateway.lab.nft("gw", BEFORE.format(translation=translation))
    with gateway.host("lan") as lan, lan.udp(net.LAN[Family.IPV4]) as sock:
        sock.connect((net.WILD[Family.IPV4], PORT))
        sock.send(b"before")
        assert sock.recv(100) == b"before"
        gateway.apply()
        with gateway.lab.counting("corp", f'iifname "gw" ip saddr {net.INSIDE[Family.IPV4]} udp dport {PORT}') as seen:
            for _ in range(50):
                sock.send(b"after")
            assert eventually(lambda: seen().packets == as_inside)
    assert gateway.counts()["outside", Family.IPV4, "misrouted-dropped"].packets == misrouted
    assert gateway.leaked() == {}


BEFORE = """
    table inet nat {{
        chain postrouting {{
            type nat hook postrouting priority srcnat; policy accept;
            ip saddr 10.9.0.0/24 oifname "wan" {translation}
        }}
    }}
"""


# --- changes under traffic -------------------------------------------------------------------------------------------

#: Two policies for the same traffic, with another mark, table, priority and other chains.
ONE: Table = {}
OTHER: Table = {"id": 3, "clamp_mss": True}


#: Datagrams a second, and bytes that are taken off one connection at each of them.
RATE, PORTION = 500, 1024
DOWNLOAD = 1_000_000


def flows() -> Iterator[tuple[str, str, str, int]]:
    """Every row of the matrix and every port forward: host, its address, target and port."""
    addresses = {"wild": net.WILD, "chost": net.CHOST, "lan": net.LAN, "gw": net.LAN_GATEWAY}
    for probe in (*matrix(), *forward_probes()):
        yield probe.host, probe.source or addresses[probe.host][probe.family], probe.target, probe.port


class Conversations:
    """A UDP conversation and a slow TCP download on each of the flows, kept going by `run`."""

    def __init__(self, gateway: Gateway, stack: contextlib.ExitStack) -> None:
        there = {name: stack.enter_context(gateway.host(name)) for name in ("wild", "chost", "lan", "gw")}
        self.asked: dict[socket.socket, int] = {}
        self.answered: dict[socket.socket, int] = {}
        self.fetched: dict[socket.socket, bytearray] = {}
        for host, source, target, port in flows():
            sock = stack.enter_context(there[host].udp(source))
            sock.connect((target, port))
            connection = stack.enter_context(there[host].connect(target, port, source))
            # No more under way than a queue holds: what is lost shall be lost by what the gateway does.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            connection.send(f"{DOWNLOAD}\n".encode())
            sock.settimeout(0)
            connection.settimeout(0)
            self.asked[sock] = self.answered[sock] = 0
            self.fetched[connection] = bytearray()

    def run(self, done: threading.Event) -> None:
        """Ask and fetch, one flow after the other, until it is done."""
        for sock, connection in itertools.cycle(zip(self.asked, self.fetched, strict=True)):
            if done.wait(1 / RATE):
                return
            sock.send(b"still there?")
            self.asked[sock] += 1
            self.receive(sock)
            with contextlib.suppress(BlockingIOError):
                self.fetched[connection] += connection.recv(PORTION)

    def receive(self, sock: socket.socket) -> None:
        """Take what has been answered."""
        with contextlib.suppress(BlockingIOError):
            while sock.recv(100):
                self.answered[sock] += 1

    def unanswered(self) -> int:
        """How many datagrams have had no answer yet."""
        for sock in self.asked:
            self.receive(sock)
        return sum(self.asked.values()) - sum(self.answered.values())

    def finish(self) -> Iterator[bytes]:
        """The rest of the downloads: all that each of them got."""
        for connection, got in self.fetched.items():
            connection.settimeout(10)
            while part := connection.recv(1 << 16):
                got.extend(part)
            yield bytes(got)


def test_changes_lose_nothing(gateway: Gateway) -> None:
    """While ten applies change ids, tables and rules and ten `nft -f` reload them, no packet is lost, and none leaks.

    Every flow of the matrix and of the port forwards is under way as a UDP conversation and as a TCP download.
    """
    gateway.lab.nft("gw", forwards())
    texts = []
    for policy in (OTHER, ONE):
        gateway.apply(policy)
        texts.append(gateway.rendered())
    done = threading.Event()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        talk = Conversations(gateway, stack)
        talking = pool.submit(talk.run, done)
        try:
            for turn in range(10):
                assert "changes, plan" in gateway.apply((OTHER, ONE)[turn % 2])
                gateway.lab.nft("gw", texts[turn % 2])
        finally:
            done.set()
        talking.result()
        assert gateway.idmark("plan").stdout == "# in force: nothing to do\n"
        assert sum(talk.asked.values()) > 20 * len(talk.asked)
        assert eventually(lambda: talk.unanswered() == 0), f"{talk.unanswered()} of {sum(talk.asked.values())} lost"
        assert min(map(len, talk.fetched.values())) < DOWNLOAD
        assert {hashlib.sha256(got).digest() for got in talk.finish()} == {
            hashlib.sha256(endpoint.content(DOWNLOAD)).digest()
        }
    assert gateway.leaked() == {}


def test_killed_applies(gateway: Gateway, senders: Callable[[Gateway], Senders]) -> None:
    """Packets go on while ten applies are killed in the middle: none leaks, and the next apply is a good one."""
    gateway.apply(ONE)
    chance = random.Random(4001)  # noqa: S311
    there = senders(gateway)
    done = threading.Event()

    def talk() -> int:
        sent = 0
        while not done.wait(0.01):
            sent += there.send(2)
        return sent

    with ThreadPoolExecutor(1) as pool, gateway.host("gw") as gw:
        talking = pool.submit(talk)
        try:
            for turn in range(10):
                gateway.write(ONE if turn % 2 else OTHER)
                kill_in_the_middle(gateway, gw, chance.randrange(20))
        finally:
            done.set()
        assert talking.result() > 0
    assert gateway.leaked() == {}
    gateway.apply(OTHER)
    assert failures(gateway.lab.probe_matrix()) == {}
    assert gateway.idmark("plan").stdout == "# in force: nothing to do\n"
    assert gateway.leaked() == {}


def kill_in_the_middle(gateway: Gateway, gw: Host, changes: int) -> None:
    """Kill an apply as soon as so many rules and routes have changed, if it has not ended by then."""
    with gw.events(socket.NETLINK_ROUTE, *RULES_AND_ROUTES) as events:
        process = gateway.start("apply")
        seen = 0
        while seen <= changes and process.poll() is None:
            seen += len(events.kinds())
        process.send_signal(signal.SIGKILL)
        process.wait()


#: RTNLGRP_IPV4_ROUTE, _IPV4_RULE, _IPV6_ROUTE, _IPV6_RULE (linux/rtnetlink.h).
RULES_AND_ROUTES = (7, 8, 11, 19)


# --- remove ----------------------------------------------------------------------------------------------------------


def test_remove(gateway: Gateway) -> None:
    """After traffic and a change of policy `remove` gives the gateway back as it was, byte for byte."""
    gateway.lab.run("gw", ["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
    gateway.lab.nft("gw", forwards())
    before = gateway.lab.snapshot("gw")
    gateway.apply()
    assert failures(gateway.lab.probe_matrix()) == {}
    gateway.apply(OTHER)
    assert failures(gateway.lab.probe(forward_probes(kind="tcp", size=20_000))) == {}
    assert gateway.lab.snapshot("gw") != before
    gateway.idmark("remove")
    assert gateway.lab.snapshot("gw") == before
