"""One question to a far end, sent by one link: an ICMP echo request, or a TCP connect. Needs CAP_NET_RAW."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
from dataclasses import dataclass

from agent.addresses import Address, Family

ICMP_ECHO, ICMP_ECHOREPLY = 8, 0  # RFC 792
ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY = 128, 129  # RFC 4443
SOL_RAW, ICMP_FILTER = 255, 1  # linux/icmp.h: a set bit blocks a type
ICMPV6_FILTER = 1  # linux/icmpv6.h
#: Type, code, checksum, identifier, sequence number.
ECHO = struct.Struct("!BBHHH")
#: Of this process: its echo replies are told from others' by it.
IDENTIFIER = os.getpid() & 0xFFFF


@dataclass(frozen=True, slots=True)
class Question:
    """A question on its way: its answer makes the socket ready for `events`. Close it, and no state is left."""

    socket: socket.socket
    events: int
    reply: bytes

    def answered(self) -> bool:
        """Whether what made the socket ready is the answer. An ICMP error, or a refusal, is none."""
        if self.events == selectors.EVENT_WRITE:
            return self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        try:
            data = self.socket.recv(2048)
        except OSError:
            # An ICMP error: a connected socket tells of it once (net/ipv4/raw.c, raw_err).
            return False
        # IPv4 gives the IP header too, IPv6 doesn't.
        header = (data[0] & 0xF) * 4 if self.socket.family == socket.AF_INET else 0
        return data[header : header + 2] + data[header + 4 : header + ECHO.size] == self.reply

    def close(self) -> None:
        self.socket.close()


def ask(target: Address, source: Address, link: str, *, port: int | None, number: int) -> Question:
    """Send a question from an own address by a link, and by no other; a `port` makes it a TCP connect.

    `number` tells echo requests apart, modulo 65536. Raises OSError where it can't be sent.
    """
    family = Family.of(target)
    if port is not None:
        kind, protocol = socket.SOCK_STREAM, socket.IPPROTO_TCP
    else:
        kind = socket.SOCK_RAW
        protocol = socket.IPPROTO_ICMP if family is Family.IPV4 else socket.IPPROTO_ICMPV6
    sock = socket.socket(family.number, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(link))
        sock.bind((str(source), 0))
        return _echo(sock, family, target, number) if port is None else _connect(sock, target, port)
    except BaseException:
        sock.close()
        raise


def _echo(sock: socket.socket, family: Family, target: Address, number: int) -> Question:
    if family is Family.IPV4:
        request, reply = ICMP_ECHO, ICMP_ECHOREPLY
        sock.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", ~(1 << reply) & 0xFFFFFFFF))
    else:
        request, reply = ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY
        blocked = [0xFFFFFFFF] * 8
        blocked[reply >> 5] &= ~(1 << (reply & 31))
        sock.setsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, struct.pack("=8I", *blocked))
    # The kernel then gives it only what comes from there.
    sock.connect((str(target), 0))
    number &= 0xFFFF
    sock.send(ECHO.pack(request, 0, _checksum(request, number), IDENTIFIER, number))
    return Question(sock, selectors.EVENT_READ, struct.pack("!BBHH", reply, 0, IDENTIFIER, number))


def _checksum(request: int, number: int) -> int:
    """The checksum (RFC 1071) of an echo request without data; for ICMPv6 the kernel writes its own over it."""
    total = (request << 8) + IDENTIFIER + number
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _connect(sock: socket.socket, target: Address, port: int) -> Question:
    # Closed by a reset: nothing stays behind in TIME_WAIT.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    error = sock.connect_ex((str(target), port))
    if error not in (0, errno.EINPROGRESS):
        raise OSError(error, os.strerror(error))
    return Question(sock, selectors.EVENT_WRITE, b"")
