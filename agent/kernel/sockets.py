"""sock_diag: the sockets of this network namespace that wait for whoever comes, and whose they are.

Numbers from linux/sock_diag.h and linux/inet_diag.h; sock_diag(7).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address

from agent.host import Listener
from agent.kernel.attributes import attributes
from agent.kernel.netlink import HEADER, Netlink
from agent.kernel.processes import Process

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
#: Of inet_diag_req_v2: family, protocol, extensions, states; a socket's id follows, all zero for any.
REQUEST = struct.Struct("=BBBxI48x")
#: inet_diag_msg: family, state, (timer, retransmissions,) id: ports, addresses, link; (cookie, expiry, queues, user,)
#: inode.
ANSWER = struct.Struct("=BB2x2s2x16s16xI8x16xI")
INET_DIAG_SKV6ONLY = 11
#: Who waits is in one of these states: an unconnected UDP socket, a listening TCP one (net/tcp_states.h).
TCP_CLOSE, TCP_LISTEN = 7, 10
WAITING = {"udp": (socket.IPPROTO_UDP, TCP_CLOSE), "tcp": (socket.IPPROTO_TCP, TCP_LISTEN)}


def listeners(processes: Mapping[int, Process]) -> tuple[Listener, ...]:
    """The sockets that wait, with the programs that hold them, by the sockets' inodes. Raises KernelError.

    A socket of the kernel's own (a VXLAN link's) is held by no process, and is not told from one whose process is out
    of sight: in a container with a process namespace of its own this has to be asked outside.
    """
    found = []
    with closing(Netlink(NETLINK_SOCK_DIAG)) as netlink:
        for protocol, (number, state) in WAITING.items():
            for family in (socket.AF_INET, socket.AF_INET6):
                request = REQUEST.pack(family, number, 0, 1 << state)
                for answer in netlink.dump(f"list {protocol} sockets", SOCK_DIAG_BY_FAMILY, request):
                    inode, listener = _listener(protocol, answer[HEADER.size :])
                    holder = processes.get(inode)
                    found.append(replace(listener, program=holder.name, pid=holder.pid) if holder else listener)
    return tuple(sorted(found, key=lambda each: (each.protocol, each.port, each.address.version, str(each.address))))


def _listener(protocol: str, answer: bytes) -> tuple[int, Listener]:
    """A socket's inode, and the socket; without its program as yet."""
    family, _, port, address, link, inode = ANSWER.unpack_from(answer)
    is_v6 = family == socket.AF_INET6
    return inode, Listener(
        protocol,
        ip_address(address if is_v6 else address[:4]),
        int.from_bytes(port, "big"),
        link=_link(link),
        both=is_v6 and not any(attributes(answer[ANSWER.size :]).get(INET_DIAG_SKV6ONLY, b"\0")),
    )


def _link(index: int) -> str:
    """The name of the link that a socket is bound to; link-local addresses have one, too."""
    if not index:
        return ""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"if{index}"


def inodes(found: Iterable[Process]) -> dict[int, Process]:
    """Who holds which socket; of several the one with the lowest number, which the others mostly come from."""
    held: dict[int, Process] = {}
    for process in sorted(found, key=lambda each: each.pid):
        for inode in process.sockets:
            held.setdefault(inode, process)
    return held
