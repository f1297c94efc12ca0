"""Netlink requests and their answers, as bytes: what rtnl.py and nfnl.py have in common."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable

from agent.kernel import KernelError

SOL_NETLINK = 270
NETLINK_GET_STRICT_CHK = 12
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3
NETLINK_NETFILTER = 12
#: nlattr: length, type; the type's upper two bits say "nested" and "big endian" (linux/netlink.h).
ATTRIBUTE = struct.Struct("=HH")
NLA_TYPE_MASK = 0x3FFF
#: nlmsghdr: length, type, flags, sequence, port (linux/netlink.h).
HEADER = struct.Struct("=IHHII")
#: Bytes that one receive has room for: a dump comes in pieces of 32 KiB at most (net/netlink/af_netlink.c).
DUMP_ROOM, ANSWER_ROOM = 1 << 17, 1 << 13
#: How often a dump is asked for again that a change interrupted, and after how many seconds.
ATTEMPTS, PAUSE = 40, 0.005

#: Whether a message is wanted, by the buffer it lies in and its offset there.
Wanted = Callable[[bytes, int], bool]


class Netlink:
    """A netlink socket of one protocol, in the namespace of the thread that opened it. Raises KernelError."""

    def __init__(self, protocol: int, *, strict: bool = False) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        if strict:
            # The kernel filters dumps by what the request says, and refuses what it doesn't know (Linux 4.20).
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def ask(self, doing: str, kind: int, body: bytes) -> bytes:
        """The one message that answers a request, without its header."""
        answers = self._ask(doing, kind, NLM_F_REQUEST, body, None)
        if not answers:
            raise KernelError(doing, "somebody changed it while it was read")
        return answers[0][HEADER.size :]

    def dump(self, doing: str, kind: int, body: bytes, wanted: Wanted | None = None) -> list[bytes]:
        """The messages of a dump, with their headers: those that are `wanted`, or all.

        One that a change interrupted is not to be trusted (NLM_F_DUMP_INTR), and is asked for again.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE)
            answers = self._ask(doing, kind, NLM_F_REQUEST | NLM_F_DUMP, body, wanted)
            if answers is not None:
                return answers
        raise KernelError(doing, f"somebody changed it while it was read, {ATTEMPTS} times")

    def _ask(self, doing: str, kind: int, flags: int, body: bytes, wanted: Wanted | None) -> list[bytes] | None:
        self._sequence += 1
        found: list[bytes] = []
        interrupted = False
        unpack, expected = HEADER.unpack_from, self._sequence  # this loop sees every route of a BGP table
        room = DUMP_ROOM if flags & NLM_F_DUMP else ANSWER_ROOM
        try:
            self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
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
                        if not flags & NLM_F_DUMP:
                            return found
                    offset += (size + 3) & ~3
        except OSError as error:
            raise KernelError(doing, os.strerror(error.errno or 0)) from error
