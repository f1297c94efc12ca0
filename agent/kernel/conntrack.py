"""ctnetlink: the connections that the kernel tracks in this network namespace, to be forgotten.

Numbers from linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from agent.addresses import Family
from agent.flows import Flow
from agent.kernel import KernelError
from agent.kernel.netlink import (
    ATTRIBUTE,
    HEADER,
    NETLINK_NETFILTER,
    NLA_TYPE_MASK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    SOL_NETLINK,
    Netlink,
)

NETLINK_CAP_ACK = 10
NLM_F_ACK = 0x4
NFNL_SUBSYS_CTNETLINK = 1
CT_GET, CT_DELETE = NFNL_SUBSYS_CTNETLINK << 8 | 1, NFNL_SUBSYS_CTNETLINK << 8 | 2
#: nfgenmsg: family, version, resource.
NFGENMSG = struct.Struct("=BBH")
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_ZONE = 1, 2, 12, 18
#: How a tuple begins: its own header, that of CTA_TUPLE_IP, then source and destination, each with its own. The kernel
#: writes them in this order, the original tuple before the reply's (net/netfilter/nf_conntrack_netlink.c,
#: ctnetlink_fill_info); to look for them would take three times as long, and there may be 200,000 connections.
TUPLE = {Family.IPV4: struct.Struct("=HHHHHH4sHH4s"), Family.IPV6: struct.Struct("=HHHHHH16sHH16s")}
#: CTA_IP_V4_SRC and _DST, CTA_IP_V6_SRC and _DST.
CTA_IP = {Family.IPV4: (1, 2), Family.IPV6: (3, 4)}
#: How many connections one message to the kernel takes away: what it answers has room in the socket's buffer.
BATCH = 128

Attributes = dict[int, tuple[int, int]]


class Conntrack:
    """The connections tracked in the namespace of the calling thread."""

    def forget(self, wanted: Callable[[Flow], bool]) -> int:
        """Delete the connections that are wanted, and say how many those were; the others stay. Raises KernelError.

        One that was there and has gone, or another one of the same addresses that came since (its id tells), is left.
        """
        with closing(Netlink(NETLINK_NETFILTER)) as netlink:
            found = netlink.dump(
                "list connections",
                CT_GET,
                NFGENMSG.pack(socket.AF_UNSPEC, 0, 0),
                lambda data, offset: _is_wanted(data, offset, wanted),
            )
        return _delete([_name(message) for message in found])


def _is_wanted(data: bytes, offset: int, wanted: Callable[[Flow], bool]) -> bool:
    flow = read_flow(data, offset)
    return flow is not None and wanted(flow)


def read_flow(data: bytes, offset: int = 0) -> Flow | None:
    """The connection that a message at an offset of a buffer is about; None for one of another family."""
    match data[offset + HEADER.size]:
        case socket.AF_INET:
            family = Family.IPV4
        case socket.AF_INET6:
            family = Family.IPV6
        case _:
            return None
    start = offset + HEADER.size + NFGENMSG.size
    size, source, destination = _addresses(data, start, CTA_TUPLE_ORIG, family)
    return Flow(family, source, destination, *_addresses(data, start + size, CTA_TUPLE_REPLY, family)[1:])


def _addresses(data: bytes, start: int, expected: int, family: Family) -> tuple[int, int, int]:
    """Size, source and destination of the tuple that begins there."""
    size, kind, _, _, _, first, source, _, second, destination = TUPLE[family].unpack_from(data, start)
    if kind & NLA_TYPE_MASK != expected or (first, second) != CTA_IP[family]:
        raise KernelError("list connections", "this kernel has another order of attributes")
    return size + 3 & ~3, int.from_bytes(source, "big"), int.from_bytes(destination, "big")


def _attributes(data: bytes, start: int, end: int) -> Attributes:
    """Where the values of attributes begin and end, by their types."""
    found: Attributes = {}
    while start < end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        found[kind & NLA_TYPE_MASK] = (start + ATTRIBUTE.size, start + length)
        start += (length + 3) & ~3
    return found


def _name(message: bytes) -> bytes:
    """What the kernel knows one connection by: family, original tuple, zone and id, as it said them itself."""
    start = HEADER.size + NFGENMSG.size
    attributes = _attributes(message, start, len(message))
    named = (attributes[kind] for kind in (CTA_TUPLE_ORIG, CTA_ZONE, CTA_ID) if kind in attributes)
    # An attribute is cut out with its header, and padded to four bytes.
    return message[HEADER.size : start] + b"".join(
        message[begin - ATTRIBUTE.size : end] + bytes(-end % 4) for begin, end in named
    )


def _delete(names: Sequence[bytes]) -> int:
    """Delete connections by their names; how many there still were."""
    doing = "delete connections"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as netlink:
            # Else each error comes with the request that it is about.
            netlink.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            netlink.bind((0, 0))
            return sum(_delete_batch(netlink, doing, names[at : at + BATCH]) for at in range(0, len(names), BATCH))
    except OSError as error:
        raise KernelError(doing, os.strerror(error.errno or 0)) from error


def _delete_batch(netlink: socket.socket, doing: str, names: Sequence[bytes]) -> int:
    # Errors come for each, that all went well is said only where it is asked for: of the last one.
    last = len(names)
    netlink.send(
        b"".join(
            HEADER.pack(HEADER.size + len(name), CT_DELETE, NLM_F_REQUEST | NLM_F_ACK * (number == last), number, 0)
            + name
            for number, name in enumerate(names, start=1)
        )
    )
    gone = 0
    while True:
        for number, code in _answers(netlink.recv(1 << 17)):
            if code not in (0, errno.ENOENT):
                raise KernelError(doing, os.strerror(code))
            gone += bool(code)
            if number == last:
                return last - gone


def _answers(data: bytes) -> Iterator[tuple[int, int]]:
    """The number of each request that is answered, and its error, 0 for none."""
    offset = 0
    while offset < len(data):
        length, kind, _, number, _ = HEADER.unpack_from(data, offset)
        if kind == NLMSG_ERROR:
            yield number, -struct.unpack_from("=i", data, offset + HEADER.size)[0]
        offset += (length + 3) & ~3
