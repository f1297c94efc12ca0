"""Hosts in network namespaces, the links between them, tiny packets and what a far end sees of them.

Everything happens in the calling thread: it enters a host's namespace, does one thing there, and comes back. A socket
stays in the namespace that it was made in, so a test may hold both ends of a conversation without a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, NamedTuple

Address = IPv4Address | IPv6Address

CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_MARK = 36  # asm-generic/socket.h
SOL_NETLINK = 270  # linux/socket.h
NETLINK_ADD_MEMBERSHIP = 1  # linux/netlink.h
PACKET_OUTGOING = 4  # linux/if_packet.h
ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
ICMP_ECHO, ICMP_ECHOREPLY = 8, 0
ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY = 128, 129

#: Addresses of the test net (see Gateway), by family: the gateway's O on `wan` and I on `vpn0`, and its own on `lan`.
OUTSIDE = {"ipv4": "203.0.113.2", "ipv6": "2001:db8:2::2"}
INSIDE = {"ipv4": "192.0.2.130", "ipv6": "2001:db8:4::130"}
LAN_GATEWAY = {"ipv4": "10.9.0.1", "ipv6": "2001:db8:9::1"}
#: The gateway's next hops, on `wan` and `vpn0`.
ISP = {"ipv4": "203.0.113.1", "ipv6": "2001:db8:2::1"}
CORP = {"ipv4": "192.0.2.129", "ipv6": "2001:db8:4::1"}
#: The hosts at the ends.
WILD = {"ipv4": "198.51.100.10", "ipv6": "2001:db8:1::10"}
CHOST = {"ipv4": "192.0.2.50", "ipv6": "2001:db8:3::50"}
LAN_HOST = {"ipv4": "10.9.0.5", "ipv6": "2001:db8:9::5"}

#: A packet over a few veths takes a fraction of a millisecond; silence of this many seconds means: there is no more.
SILENCE = 0.1
#: Seconds until something that must come is given up.
PATIENCE = 5.0

_identifiers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns and os.unshare came with Python 3.12


def _libc_call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Packet(NamedTuple):
    """An IP packet as it came over a link; `payload` begins behind the IP header, `protocol` is an IPPROTO number."""

    source: Address
    destination: Address
    protocol: int
    payload: bytes

    @classmethod
    def parse(cls, data: bytes) -> Packet:
        """From the bytes of an IPv4 packet, or of an IPv6 packet without extension headers."""
        if data[0] >> 4 == 4:
            header = (data[0] & 0xF) * 4
            return cls(IPv4Address(data[12:16]), IPv4Address(data[16:20]), data[9], data[header:])
        return cls(IPv6Address(data[8:24]), IPv6Address(data[24:40]), data[6], data[40:])


class Sniffer:
    """What arrives on one link, from the moment that it was made. Holds a packet socket: close it, or use `with`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def __enter__(self) -> Sniffer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def packets(self, source: str = "", destination: str = "", protocol: int = 0) -> list[Packet]:
        """The IP packets that arrived since the last call, until the link is silent; only those asked for."""
        found = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and select.select([self._socket], [], [], SILENCE)[0]:
            data, (_, ethertype, kind, *_) = self._socket.recvfrom(65535)
            if kind == PACKET_OUTGOING or ethertype not in {ETH_P_IP, ETH_P_IPV6}:
                continue
            packet = Packet.parse(data)
            if (
                (not source or packet.source == ip_address(source))
                and (not destination or packet.destination == ip_address(destination))
                and (not protocol or packet.protocol == protocol)
            ):
                found.append(packet)
        return found


class Events:
    """What the kernel announces to one netlink socket, from the moment that it was made. Close it, or use `with`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def kinds(self) -> list[int]:
        """The types (nlmsg_type) of what came since the last call: all that was caused by requests answered."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            data = self._socket.recv(1 << 20)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                found.append(kind)
                data = data[(length + 3) & ~3 :]
        return found


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace; `descriptor` is open on it."""

    name: str
    descriptor: int

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is in this host's namespace. Raises OSError."""
        before = _own_namespace()
        try:
            _libc_call("setns", self.descriptor, CLONE_NEWNET)
            yield
        finally:
            _libc_call("setns", before, CLONE_NEWNET)
            os.close(before)

    # --- commands ----------------------------------------------------------------------------------------------------

    def run(self, words: list[str], text: str = "") -> str:
        """What a command prints that runs here, given `text` on its standard input. Raises RuntimeError if it fails."""
        with self.inside():
            done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(words)}: exit {done.returncode}: {done.stderr}{text}")
        return done.stdout

    def ip(self, *words: str) -> str:
        """What `ip` prints."""
        return self.run(["ip", *words])

    def ip_json(self, *words: str) -> Any:
        """What `ip -j` prints, read; `ip` prints nothing at all where it has nothing to show."""
        return json.loads(self.ip("-j", *words) or "[]")

    def ip_batch(self, lines: str, *options: str) -> None:
        """Run lines of ip(8) in one go. Raises RuntimeError at the first that fails."""
        self.run(["ip", *options, "-batch", "-"], "\n".join(line.strip() for line in lines.strip().splitlines()) + "\n")

    def nft(self, text: str) -> str:
        """Load nft text as one transaction. Raises RuntimeError with nft's own words."""
        return self.run(["nft", "-f", "-"], text)

    def nft_json(self, *words: str) -> list[dict[str, Any]]:
        """The objects that `nft -j` lists."""
        objects = json.loads(self.run(["nft", "-j", *words]))["nftables"]
        return [item for item in objects if "metainfo" not in item]

    def counter(self, name: str, table: str = "t") -> int:
        """The packets of a named counter in table `inet TABLE`."""
        listed = self.nft_json("list", "counter", "inet", table, name)
        return int(listed[0]["counter"]["packets"])

    def sysctl(self, key: str, value: int | None = None) -> int:
        """Write a sysctl, given by its path below /proc/sys, and read it."""
        path = Path("/proc/sys", key)
        with self.inside():
            if value is not None:
                path.write_text(f"{value}\n")
            return int(path.read_text())

    def settle(self) -> None:
        """Wait until every link carries packets and answers for its IPv6 addresses. Raises TimeoutError.

        The kernel activates a link that got its carrier, and joins the solicited-node groups of its addresses, in
        work of its own (net/core/link_watch.c, addrconf_dad_work): on a busy machine the first packet may come sooner.
        """
        deadline = time.monotonic() + PATIENCE
        with self.inside():
            while not _settled():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.name}: links are not ready after {PATIENCE} s")
                time.sleep(0.002)

    def index(self, link: str) -> int:
        """The number of a link."""
        with self.inside():
            return socket.if_nametoindex(link)

    def events(self, protocol: int, *groups: int) -> Events:
        """Listen to multicast groups of a netlink protocol, such as NETLINK_ROUTE's RTNLGRP_IPV4_ROUTE."""
        with self.inside():
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        sock.bind((0, 0))
        for group in groups:
            sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        return Events(sock)

    # --- packets -----------------------------------------------------------------------------------------------------

    def open_socket(
        self, family: int, kind: int, protocol: int = 0, *, source: str = "", port: int = 0, mark: int = 0
    ) -> socket.socket:
        """A socket in this namespace, bound to an address and port, with SO_MARK. Raises OSError."""
        with self.inside():
            sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(PATIENCE)
            if mark:
                sock.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("I", mark))
            if source or port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source, port))
        except OSError:
            sock.close()
            raise
        return sock

    def udp(self, source: str, port: int = 0, *, mark: int = 0) -> socket.socket:
        """A datagram socket bound to an address."""
        return self.open_socket(family_of(source), socket.SOCK_DGRAM, source=source, port=port, mark=mark)

    def send(self, destination: str, source: str = "", *, port: int = 9, data: bytes = b"x", mark: int = 0) -> None:
        """Send one datagram. Raises OSError."""
        with self.open_socket(family_of(destination), socket.SOCK_DGRAM, source=source, mark=mark) as sock:
            sock.sendto(data, (destination, port))

    def listen(self, address: str, port: int) -> socket.socket:
        """A TCP socket that listens; the kernel answers a SYN without anybody who accepts."""
        sock = self.open_socket(family_of(address), socket.SOCK_STREAM, source=address, port=port)
        sock.listen()
        return sock

    def connect(self, destination: str, port: int, source: str = "", *, timeout: float = PATIENCE) -> socket.socket:
        """A connected TCP socket. Raises OSError: TimeoutError, or what the kernel knows at once."""
        sock = self.open_socket(family_of(destination), socket.SOCK_STREAM, source=source)
        sock.settimeout(timeout)
        try:
            sock.connect((destination, port))
        except OSError:
            sock.close()
            raise
        return sock

    def ping(self, destination: str, source: str = "", count: int = 1, *, timeout: float = 0.3, mark: int = 0) -> bool:
        """Whether each of `count` echo requests is answered, within `timeout` seconds each; False if one can't go."""
        try:
            self.echo(destination, source, count, timeout=timeout, mark=mark)
        except OSError:
            return False
        return True

    def echo(self, destination: str, source: str = "", count: int = 1, *, timeout: float = 0.3, mark: int = 0) -> None:
        """As `ping`, but raises OSError: what the kernel said to the request, or TimeoutError."""
        family = family_of(destination)
        protocol, request, reply = (
            (socket.IPPROTO_ICMP, ICMP_ECHO, ICMP_ECHOREPLY)
            if family == socket.AF_INET
            else (socket.IPPROTO_ICMPV6, ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY)
        )
        with self.open_socket(family, socket.SOCK_RAW, protocol, source=source, mark=mark) as sock:
            sock.connect((destination, 0))
            # Each call is a flow of its own: conntrack remembers what NAT did to an identifier that it has seen.
            identifier = next(_identifiers) & 0xFFFF
            for sequence in range(count):
                body = struct.pack("!HH8s", identifier, sequence, b"identity")
                sock.send(_icmp(request, body))
                deadline = time.monotonic() + timeout
                while True:
                    sock.settimeout(max(deadline - time.monotonic(), 0.001))
                    data = sock.recv(2048)
                    message = Packet.parse(data).payload if family == socket.AF_INET else data
                    if message[0] == reply and message[4:] == body:
                        break

    def sniff(self, link: str) -> Sniffer:
        """Watch what arrives on a link."""
        with self.inside():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        sock.bind((link, ETH_P_ALL))
        return Sniffer(sock)


def _settled() -> bool:
    """Whether each link of the thread's namespace has its link-local address, and each address its group."""
    addresses = [line.split() for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()]
    groups = {tuple(line.split()[1:3]) for line in Path("/proc/thread-self/net/igmp6").read_text().splitlines()}
    waited_for = {name for _, name in socket.if_nameindex()} - {"lo"}
    return waited_for <= {name for address, *_, name in addresses if address.startswith("fe80")} and all(
        (name, f"ff0200000000000000000001ff{address[-6:]}") in groups
        for address, *_, name in addresses
        if name in waited_for
    )


def _icmp(kind: int, body: bytes) -> bytes:
    """An ICMP message with its checksum (RFC 792); for ICMPv6 the kernel writes its own over it."""
    data = struct.pack("!BBH", kind, 0, 0) + body
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return struct.pack("!BBH", kind, 0, ~total & 0xFFFF) + body


# --- namespaces and links --------------------------------------------------------------------------------------------


def _prepare(host: Host, *, forwarding: bool) -> None:
    """Known sysctls: no reverse path filter, no duplicate address detection, ICMP errors as often as they are due."""
    for key, value in {
        "net/ipv4/conf/all/rp_filter": 0,
        "net/ipv4/conf/default/rp_filter": 0,
        "net/ipv4/ip_forward": int(forwarding),
        "net/ipv4/icmp_ratelimit": 0,
        "net/ipv6/conf/all/accept_dad": 0,
        "net/ipv6/conf/default/accept_dad": 0,
        "net/ipv6/conf/all/forwarding": int(forwarding),
        "net/ipv6/conf/default/router_solicitations": 0,
        "net/ipv6/icmp/ratelimit": 0,
    }.items():
        host.sysctl(key, value)
    host.ip("link", "set", "lo", "up")


@contextlib.contextmanager
def fresh_namespace(name: str) -> Iterator[Host]:
    """The calling thread is in a new network namespace that forwards packets; it ends with the block."""
    home = _own_namespace()
    try:
        _libc_call("unshare", CLONE_NEWNET)
        host = Host(name, _own_namespace())
        try:
            _prepare(host, forwarding=True)
            yield host
        finally:
            os.close(host.descriptor)
    finally:
        _libc_call("setns", home, CLONE_NEWNET)
        os.close(home)


@contextlib.contextmanager
def named_namespace(name: str, *, forwarding: bool = False) -> Iterator[Host]:
    """A new namespace under /run/netns, where `ip -n NAME` finds it."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        host = Host(name, os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC))
        try:
            _prepare(host, forwarding=forwarding)
            yield host
        finally:
            os.close(host.descriptor)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def join(near: Host, near_link: str, far: Host, far_link: str) -> None:
    """Lay a cable (a veth pair) between two hosts, and bring both ends up. The far host is a named one."""
    near.ip("link", "add", near_link, "type", "veth", "peer", "name", far_link, "netns", far.name)
    near.ip("link", "set", near_link, "up")
    far.ip("link", "set", far_link, "up")
