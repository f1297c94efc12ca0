"""Netlink requests and their answers, as bytes: what rtnl.py and nfnl.py have in common."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from agent.kernel import KernelError

SOL_NETLINK = 270
NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK = 10, 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
NETLINK_NETFILTER = 12
#: nlattr: length, type; the type's upper two bits say "nested" and "big endian" (linux/netlink.h).
ATTRIBUTE = struct.Struct("=HH")
NLA_TYPE_MASK = 0x3FFF
#: nlmsghdr: length, type, flags, sequence, port (linux/netlink.h).
HEADER = struct.Struct("=IHHII")
#: Bytes that one receive has room for: a dump comes in pieces of 32 KiB at most (net/netlink/af_netlink.c).
DUMP_ROOM, ANSWER_ROOM = 1 << 17, 1 << 13
#: In a piece of a dump with fewer bytes than this messages are sooner looked at than passed over by a pattern.
LONG = 1 << 13
#: So many questions are asked at once: the answers have to fit the socket's buffer, 4 KiB each at the worst.
TOGETHER = 32
#: asm-generic/socket.h; what netlink_sendmsg() keeps of a socket's buffer for itself (net/netlink/af_netlink.c).
SO_SNDBUFFORCE, SEND_OVERHEAD = 32, 32
#: How often a dump is asked for again that a change interrupted, and after how many seconds.
ATTEMPTS, PAUSE = 40, 0.005

#: Whether a message is wanted, by the buffer it lies in and its offset there.
Wanted = Callable[[bytes, int], bool]


class Message(NamedTuple):
    """A request, without what its header says besides; `body` is padded to four bytes."""

    kind: int
    flags: int
    body: bytes


class Netlink:
    """A netlink socket of one protocol, in the namespace of the thread that opened it. Raises KernelError."""

    def __init__(self, protocol: int, *, strict: bool = False) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        if strict:
            # The kernel filters dumps by what the request says, and refuses what it doesn't know (Linux 4.20).
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        # An error comes without the request that it is about, which may be long (Linux 4.3).
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def ask(self, doing: str, kind: int, body: bytes) -> bytes:
        """The one message that answers a request, without its header."""
        answers = self._ask(doing, Message(kind, 0, body))
        if not answers:
            raise KernelError(doing, "somebody changed it while it was read")
        return answers[0][HEADER.size :]

    def ask_each(self, doing: str, kind: int, bodies: Sequence[bytes]) -> list[bytes | str]:
        """The one message that answers each of several requests, without its header; or the error, in words.

        For rtnetlink, which has answered when the send returns (net/core/rtnetlink.c, rtnetlink_rcv).
        """
        answers: list[bytes | str] = []
        for at in range(0, len(bodies), TOGETHER):
            answers += self._ask_together(doing, kind, bodies[at : at + TOGETHER])
        return answers

    def _ask_together(self, doing: str, kind: int, bodies: Sequence[bytes]) -> list[bytes | str]:
        answers: dict[int, bytes | str] = {}
        try:
            first = self._send([Message(kind, 0, body) for body in bodies])
            while len(answers) < len(bodies):
                data = self._socket.recv(ANSWER_ROOM, socket.MSG_DONTWAIT)
                size, answer, _, sequence, _ = HEADER.unpack_from(data)
                if sequence < first:  # of a question that was given up
                    continue
                if answer == NLMSG_ERROR:
                    answers[sequence - first] = os.strerror(-struct.unpack_from("=i", data, HEADER.size)[0])
                else:
                    answers[sequence - first] = data[HEADER.size : size]
        except OSError as error:
            raise KernelError(doing, os.strerror(error.errno or 0)) from error
        return [answers[place] for place in range(len(bodies))]

    def dump(self, doing: str, kind: int, body: bytes, wanted: Wanted | None = None, over: bytes = b"") -> list[bytes]:
        """The messages of a dump, with their headers: those that are `wanted`, or all.

        `over` is how bodies begin that are not wanted, as a regular expression: where many follow one another they are
        passed over ten times as fast as they are looked at.

        One that a change interrupted is not to be trusted (NLM_F_DUMP_INTR), and is asked for again.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE)
            answers = self._ask(doing, Message(kind, NLM_F_DUMP, body), wanted, over)
            if answers is not None:
                return answers
        raise KernelError(doing, f"somebody changed it while it was read, {ATTEMPTS} times")

    def widen(self, size: int) -> int:
        """Ask for room to send `size` bytes at once; the bytes that there is room for, which may be fewer or more."""
        for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):
            # In a user namespace the first is refused, and the second gives twice net.core.wmem_max.
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, option, size)
                break
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - SEND_OVERHEAD

    def post(self, doing: str, messages: Sequence[Message]) -> dict[int, int]:
        """Send messages all at once to nfnetlink, which has answered when the send returns.

        The answers by the places of the messages they are to: error numbers, and 0 where NLM_F_ACK asked for one.
        """
        answers: dict[int, int] = {}
        try:
            first = self._send(messages)
            while True:
                try:
                    data = self._socket.recv(ANSWER_ROOM, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return answers
                except OSError as error:
                    # More errors than there is room for: the last are lost, the first are yet to be read.
                    if error.errno != errno.ENOBUFS:
                        raise
                    continue
                _, answer, _, sequence, _ = HEADER.unpack_from(data)
                if answer == NLMSG_ERROR and sequence >= first:
                    answers[sequence - first] = -struct.unpack_from("=i", data, HEADER.size)[0]
        except OSError as error:
            raise KernelError(doing, os.strerror(error.errno or 0)) from error

    def _send(self, messages: Sequence[Message]) -> int:
        """Send messages all at once; the number of the first, which the others follow. Raises OSError."""
        first = self._sequence + 1
        self._sequence += len(messages)
        self._socket.send(
            b"".join(
                HEADER.pack(HEADER.size + len(body), kind, flags | NLM_F_REQUEST, first + place, 0) + body
                for place, (kind, flags, body) in enumerate(messages)
            )
        )
        return first

    def _ask(self, doing: str, request: Message, wanted: Wanted | None = None, over: bytes = b"") -> list[bytes] | None:
        found: list[bytes] = []
        interrupted = False
        unpack = HEADER.unpack_from  # this loop sees every route of a BGP table
        is_dump = bool(request.flags & NLM_F_DUMP)
        room = DUMP_ROOM if is_dump else ANSWER_ROOM
        try:
            expected = self._send([request])
            while True:
                data = self._socket.recv(room)
                offset = 0
                while offset < len(data):
                    size, answer, flag, sequence, _ = unpack(data, offset)
                    if sequence == expected:
                        if flag & NLM_F_DUMP_INTR:
                            interrupted = True
                        if answer in (NLMSG_DONE, NLMSG_ERROR):
                            # A dump that fails on its way says so in its end; ENOENT: the table or set is not there.
                            code = -struct.unpack_from("=i", data, offset + HEADER.size)[0]
                            if code not in (0, errno.ENOENT, errno.EINTR):
                                raise KernelError(doing, os.strerror(code))
                            return None if interrupted or code == errno.EINTR else found
                        if wanted is None or wanted(data, offset):
                            found.append(data[offset : offset + size])
                        elif over and len(data) > LONG:
                            # All messages of a piece are of one dump.
                            alike = _alike(data[offset : offset + 8], size, over).match(data, offset)
                            if alike:
                                offset = alike.end()
                                continue
                        if not is_dump:
                            return found
                    offset += (size + 3) & ~3
        except OSError as error:
            raise KernelError(doing, os.strerror(error.errno or 0)) from error


@lru_cache
def _alike(head: bytes, size: int, over: bytes) -> re.Pattern[bytes]:
    """Messages of the same length, type and flags, one behind the other, with bodies that begin like this."""
    rest = ((size + 3) & ~3) - HEADER.size
    return re.compile(b"(?s)(?:%b.{8}(?=%b).{%d})+" % (re.escape(head), over, rest))
