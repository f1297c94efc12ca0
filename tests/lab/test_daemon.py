"""The daemon over a real VPN, under traffic: whatever happens, nothing of an identity's gets where it has no business.

Enforcement is off wherever packets are counted at the far ends: it would hide what the routes let through.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.addresses import Family
from agent.lab import endpoint, net
from agent.lab.probes import PORT
from tests.kernel.admin import Table
from tests.kernel.net import Host
from tests.kernel.running import Running, eventually, running
from tests.lab.conftest import BuildGateway
from tests.lab.gateway import Gateway, failures
from tests.lab.test_leaks import DISCARD, ONE, OTHER, gone, started

TIMES = 20
NOT_ENFORCED: Table = {"enforce": False}


@contextlib.contextmanager
def daemon(gateway: Gateway) -> Iterator[Running]:
    """A daemon at the gateway, ready."""
    where = gateway.directory / "metrics.sock"
    words = ["-c", os.fspath(gateway.policy), "run", "--listen", f"unix:{where}", "--netns", "gw"]
    with running([sys.executable, "-m", "agent", *words], gateway.directory) as started:
        yield started


def in_force(gateway: Gateway) -> bool:
    """Whether there is nothing to do."""
    return gateway.idmark("plan", check=False).returncode == 0


class Talk:
    """I, O and a member, each with a socket of a family to both worlds; some hundred datagrams a second, all in all."""

    def __init__(self, gateway: Gateway, stack: contextlib.ExitStack) -> None:
        gw, lan = (stack.enter_context(gateway.host(name)) for name in ("gw", "lan"))
        self.sockets = [
            (stack.enter_context(host.udp(source[family])), far[family])
            for family in Family
            for host, source in ((gw, net.INSIDE), (gw, net.OUTSIDE), (lan, net.LAN))
            for far in (net.WILD, net.CHOST)
        ]
        self.taken = 0

    def once(self) -> None:
        """A datagram from each to each."""
        for sock, far in self.sockets:
            with contextlib.suppress(OSError):  # what has no way out is refused at once
                sock.sendto(b"x", (far, DISCARD))
                self.taken += 1


@contextlib.contextmanager
def talking(gateway: Gateway) -> Iterator[Talk]:
    """They send meanwhile."""
    done = threading.Event()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        talk = Talk(gateway, stack)

        def go_on() -> None:
            while not done.wait(0.005):
                talk.once()

        sending = pool.submit(go_on)
        try:
            yield talk
        finally:
            done.set()
            sending.result()


#: Bytes of a long transfer, and what is taken off it at a time: so that it lasts for some ten seconds.
TRANSFER, PORTION = 16_000_000, 8192


class Streams:
    """Through I and through O, in each family: datagrams that are echoed, one a millisecond, and a long transfer."""

    def __init__(self, gateway: Gateway, stack: contextlib.ExitStack) -> None:
        gw = stack.enter_context(gateway.host("gw"))
        ends = [(source[family], far[family]) for family in Family for source, far in WAYS]
        self.echoes = [stack.enter_context(gw.udp(source)) for source, _ in ends]
        self.transfers = [stack.enter_context(gw.connect(far, PORT, source)) for source, far in ends]
        self.asked = self.answered = 0
        self.fetched = {transfer: bytearray() for transfer in self.transfers}
        for sock, (_, far) in zip(self.echoes, ends, strict=True):
            sock.connect((far, PORT))
        for transfer in self.transfers:
            transfer.send(f"{TRANSFER}\n".encode())
        for sock in (*self.echoes, *self.transfers):
            sock.settimeout(0)

    def run(self, done: threading.Event) -> None:
        """Ask and fetch until it is done."""
        for turn in itertools.count():
            if done.wait(0.001):
                return
            for sock in self.echoes:
                sock.send(b"still there?")
                self.asked += 1
            self.receive()
            if turn % 5 == 0:
                for transfer, got in self.fetched.items():
                    with contextlib.suppress(BlockingIOError):
                        got.extend(transfer.recv(PORTION))

    def receive(self) -> None:
        """Take what has been answered."""
        for sock in self.echoes:
            with contextlib.suppress(BlockingIOError):
                while sock.recv(100):
                    self.answered += 1

    def all_answered(self) -> bool:
        """Whether each datagram has come back."""
        self.receive()
        return self.answered == self.asked

    def finish(self) -> Iterator[bytes]:
        """The rest of the transfers: all that each of them got."""
        for transfer, got in self.fetched.items():
            transfer.settimeout(10)
            while part := transfer.recv(1 << 16):
                got.extend(part)
            yield bytes(got)


#: I to the company's host, O to the wild one: each by its own link.
WAYS = ((net.INSIDE, net.CHOST), (net.OUTSIDE, net.WILD))


@contextlib.contextmanager
def streaming(gateway: Gateway) -> Iterator[None]:
    """The streams go on meanwhile; none has lost anything at the end."""
    done = threading.Event()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        streams = Streams(gateway, stack)
        going_on = pool.submit(streams.run, done)
        try:
            yield
        finally:
            done.set()
        going_on.result()
        assert streams.asked > 1000
        assert eventually(streams.all_answered), f"{streams.asked - streams.answered} of {streams.asked} lost"
        assert 0 < min(map(len, streams.fetched.values())) <= max(map(len, streams.fetched.values())) < TRANSFER
        whole = hashlib.sha256(endpoint.content(TRANSFER)).digest()
        assert {hashlib.sha256(got).digest() for got in streams.finish()} == {whole}
    assert gateway.leaked() == {}


def all_is_well(gateway: Gateway) -> bool:
    """Whether everybody reaches everybody that the policy lets."""
    return not failures(gateway.lab.probe_matrix())


@pytest.mark.parametrize("vpn_kind", ["wireguard", "openvpn"])
def test_flaps(build_gateway: BuildGateway, vpn_kind: str) -> None:
    """While the tunnel's link goes down and up twenty times under traffic nothing leaks, and then all works again."""
    gateway = build_gateway(vpn_kind)
    gateway.write(kernel=NOT_ENFORCED)
    with gateway.crossings() as crossed, daemon(gateway) as it, talking(gateway) as talk:
        for _ in range(TIMES):
            gateway.lab.link_down("gw", "vpn0")
            talk.once()
            gateway.lab.link_up("gw", "vpn0")
        assert eventually(lambda: in_force(gateway))
        assert eventually(lambda: all_is_well(gateway)), it.log
        assert talk.taken > 10 * TIMES
        assert it.metric("idmark_fights_total") == 0
        assert crossed() == {}


def test_kills(gateway: Gateway) -> None:
    """Over twenty kills of the daemon while the link goes or the policy changes nothing leaks, and then all works."""
    chance = random.Random(73)  # noqa: S311
    gateway.apply(kernel=NOT_ENFORCED)
    with talking(gateway) as talk:
        for turn in range(TIMES):
            link_goes = chance.random() < 0.5
            with daemon(gateway) as it:
                if link_goes:
                    gateway.lab.link_down("gw", "vpn0")
                else:
                    gateway.write({"id": 3 + turn % 2, "clamp_mss": bool(turn % 2)}, kernel=NOT_ENFORCED)
                    it.process.send_signal(signal.SIGHUP)
                time.sleep(chance.uniform(0.0, 0.1))
                it.stop(signal.SIGKILL)
            if link_goes:
                gateway.lab.link_up("gw", "vpn0")
        with daemon(gateway):
            assert eventually(lambda: in_force(gateway))
            assert eventually(lambda: all_is_well(gateway))
        assert talk.taken > 0
    assert gateway.leaked() == {}


def test_reloads(gateway: Gateway) -> None:
    """Over twenty reloads, in which I and O exchange their ids and more, nothing leaks."""
    policies: tuple[tuple[Table, Table], ...] = (
        ({}, {}),
        ({"id": 2}, {"id": 1}),
        ({"id": 3, "clamp_mss": True, "members": ["10.9.0.0/25", "2001:db8:9::/80"]}, {"id": 1}),
        ({"id": 1}, {"id": 2, "members": ["10.9.0.128/25"]}),
    )
    gateway.write(kernel=NOT_ENFORCED)
    with daemon(gateway) as it, talking(gateway):
        for turn in range(TIMES):
            inside, outside = policies[turn % len(policies)]
            gateway.write(inside, outside, kernel=NOT_ENFORCED)
            it.reload()
        gateway.write(kernel=NOT_ENFORCED)
        it.reload()
        assert in_force(gateway)
        assert it.metric("idmark_policy_last_reload_successful") == 1
        assert all_is_well(gateway)
    assert gateway.leaked() == {}


def test_no_loss(gateway: Gateway) -> None:
    """Restarts, kills and reloads of the daemon lose no packet of a thousand a second, break no transfer."""
    gateway.write(ONE)
    with daemon(gateway) as first, streaming(gateway):
        for number in (signal.SIGTERM, signal.SIGKILL):
            first.stop(number)
            with daemon(gateway) as it:
                for policy in (OTHER, ONE):
                    gateway.write(policy)
                    it.reload()
                it.stop(number)


def test_wireguard_restarted(gateway: Gateway) -> None:
    """WireGuard's program is killed, which takes the link along, and started anew: closed, then open, and no leak."""
    gateway.write(kernel=NOT_ENFORCED)
    with daemon(gateway), talking(gateway):
        for _ in range(3):
            keys = gateway.lab.run("gw", ["wg", "showconf", "vpn0"]).stdout
            pid, words = gateway.vpn_process()
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: gone(gateway))
            started(gateway, words)
            assert eventually(
                lambda: gateway.lab.run("gw", ["wg", "show", "vpn0"], check=False).returncode == 0,
            )
            gateway.lab.run("gw", ["wg", "setconf", "vpn0", "/dev/stdin"], text=keys)
            gateway.lab.link_up("gw", "vpn0")
        assert eventually(lambda: all_is_well(gateway))
    assert gateway.leaked() == {}


#: What I is called after a reconnection.
ANOTHER = {Family.IPV4: "192.0.2.140", Family.IPV6: "2001:db8:4::140"}


def test_openvpn_with_another_address(build_gateway: BuildGateway) -> None:
    """OpenVPN comes back with another address under load: that one is I from then on, and members speak as it, from
    the first packet on, also those whose connections began before.

    A program that is bound to the old one gets an error: from IPv4 by itself, from IPv6, which would let it speak on
    (a socket's source is looked at when it is bound, and never again), by a rule.
    """
    gateway = build_gateway("openvpn")
    gateway.write({"addresses": "auto", "flush_flows": True}, kernel=NOT_ENFORCED)
    with daemon(gateway) as it, gateway.host("lan") as lan:
        with talking(gateway) as talk:
            assert eventually(lambda: talk.taken > 5 * len(talk.sockets))
            reconnect(gateway)
            assert eventually(lambda: all(reaches(gateway, family) for family in Family)), it.log
            assert eventually(lambda: all(as_another(gateway, lan, family) for family in Family)), it.log
        rules = "".join(gateway.lab.run("gw", ["ip", number, "rule"]).stdout for number in ("-4", "-6"))
        assert all(f"from {address} " in rules for address in ANOTHER.values())
        assert not any(f"from {address} lookup" in rules for address in net.INSIDE.values())
        assert f"from {net.INSIDE[Family.IPV6]} iif lo unreachable" in rules
    assert gateway.leaked() == {}


def reconnect(gateway: Gateway) -> None:
    """OpenVPN's client ends, and comes back with another address."""
    pid, words = gateway.vpn_process()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: gone(gateway))
    gateway.lab.nft("corp", f"delete table inet {net.FILTER_TABLE}\n" + corp_filter())
    started(gateway, words)
    lines = [f"address add {address}/{25 if '.' in address else 64} dev vpn0" for address in ANOTHER.values()]
    lines = ["link set vpn0 addrgenmode none", "link set vpn0 up", *lines, *net.route_lines("gw", "vpn0")]
    gateway.lab.run("gw", ["ip", "-batch", "-"], text="\n".join([*lines, ""]))


def reaches(gateway: Gateway, family: Family) -> bool:
    """Whether I reaches corp's hosts under its new address."""
    return gateway.lab.ping("gw", net.CHOST[family], ANOTHER[family], wait=0.5).ok


def corp_filter() -> str:
    """What corp lets in now."""
    text = net.filter_text("corp")
    for family in Family:
        text = text.replace(net.INSIDE[family], ANOTHER[family])
    return text


def as_another(gateway: Gateway, lan: Host, family: Family) -> bool:
    """Whether a member's packets reach corp under I's new address."""
    match = f'iifname "gw" {family.nft} saddr {ANOTHER[family]} udp dport {PORT}'
    with gateway.lab.counting("corp", match) as seen:
        lan.send(net.CHOST[family], net.LAN[family], port=PORT)
        return eventually(lambda: seen().packets == 1)
