"""nf_tables by netlink itself, for what libnftables would read everybody's sets for."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from agent.kernel import KernelError

NETLINK_NETFILTER = 12
#: linux/netfilter/nfnetlink.h, nf_tables.h
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_GETTABLE = 1
NFTA_TABLE_NAME = 1
NFPROTO_INET = 1
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3
#: nlmsghdr (length, type, flags, sequence, port) and nfgenmsg (family, version, resource).
HEADER = struct.Struct("=IHHII BBH")
ATTRIBUTE = struct.Struct("=HH")


def tables() -> tuple[str, ...]:
    """The names of the tables of family inet. Raises KernelError.

    `nft list tables` reads the sets of every table besides: 0.5 s and more beside a foreign set of 100,000 prefixes.
    """
    doing = "list the nft tables"
    kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE
    request = HEADER.pack(HEADER.size, kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0, NFPROTO_INET, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
            sock.bind((0, 0))
            for _attempt in range(5):
                sock.send(request)
                names = _names(sock, doing)
                if names is not None:
                    return names
    except OSError as error:
        raise KernelError(doing, os.strerror(error.errno or 0)) from error
    raise KernelError(doing, "they kept changing while they were read, five times")


def _names(sock: socket.socket, doing: str) -> tuple[str, ...] | None:
    """The names in a dump; None if somebody committed meanwhile."""
    names: list[str] = []
    interrupted = False
    while True:
        data = sock.recv(1 << 17)
        offset = 0
        while offset < len(data):
            size, kind, flags = struct.unpack_from("=IHH", data, offset)
            interrupted |= bool(flags & NLM_F_DUMP_INTR)
            if kind == NLMSG_DONE:
                return None if interrupted else tuple(names)
            if kind == NLMSG_ERROR:
                raise KernelError(doing, os.strerror(-struct.unpack_from("=i", data, offset + 16)[0]))
            attributes = _attributes(data[offset + HEADER.size : offset + size])
            names += [value.rstrip(b"\0").decode() for number, value in attributes if number == NFTA_TABLE_NAME]
            offset += (size + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < len(data):
        size, number = ATTRIBUTE.unpack_from(data, offset)
        yield number & 0x3FFF, data[offset + ATTRIBUTE.size : offset + size]
        offset += (size + 3) & ~3
