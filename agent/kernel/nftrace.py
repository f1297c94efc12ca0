"""The kernel's own account of packets: nftrace set on one flow for a while, and what nf_tables says of them.

Numbers from linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from types import TracebackType

from agent.addresses import Family
from agent.kernel import KernelError, tracing
from agent.kernel.attributes import attribute, attributes, number, text
from agent.kernel.elements import VERDICTS
from agent.kernel.netlink import HEADER, NETLINK_NETFILTER, SOL_NETLINK, Netlink
from agent.kernel.nfnl import (
    CHAIN_HOOK,
    CHAIN_NAME,
    HOOK_NUMBER,
    HOOKS,
    NFNL_SUBSYS_NFTABLES,
    OF_TABLE,
    RULE_CHAIN,
    RULE_USERDATA,
    VERDICT_CHAIN,
    VERDICT_CODE,
    comment_of,
)
from agent.kernel.nft import Nft
from agent.trace import Event, Flow, Place

GETCHAIN, GETRULE, TRACE = 4, 7, 17
RULE_HANDLE = 3
NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE = 1, 9
TABLE, CHAIN, HANDLE, TYPE, VERDICT, ID, NETWORK_HEADER = 1, 2, 3, 4, 5, 6, 8
MARK, POLICY = 14, 16
#: enum nft_trace_types.
POLICY_DECIDED, CHAIN_ENDED, RULE_MATCHED = 1, 2, 3
FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
NFGENMSG = struct.Struct("=BBH")
#: Bytes of messages that wait for us, at most: an event has some 200, a packet some twenty of them.
BUFFER = 1 << 22
#: Before whatever else looks at packets, raw (-300) and the defragmentation of fragments (-400) included.
PRIORITY = -450
#: So many packets a second have it set, at most: tracing costs the kernel a message a rule.
RATE = 20


class Tracer:
    """Traces a flow in the namespace of the thread that opened it, until it is closed. Every method raises KernelError.

    The rule that sets nftrace is in a table of its own. A process beside us deletes it, whatever becomes of us.
    """

    def __init__(self, flow: Flow, seconds: float) -> None:
        self._name, self._seconds = f"tracing-{os.getpid()}", seconds
        self._places: dict[tuple[int, str, str, int], Place] = {}
        doing = f"trace {flow}"
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE)
            index = socket.if_nametoindex(flow.link) if flow.link else 0
            # In a session of its own: a Ctrl-C at the terminal is for us.
            self._beside = subprocess.Popen(
                [sys.executable, "-m", tracing.__name__, self._name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._socket.close()
            raise KernelError(doing, error.strerror or str(error)) from error
        try:
            why = self._tell(table(self._name, flow, index))
        except BaseException:
            self.close()
            raise
        if why:
            self.close()
            raise KernelError(doing, why)

    def _tell(self, text: str) -> str:
        """Have the table loaded; why it couldn't be."""
        assert self._beside.stdin  # noqa: S101
        assert self._beside.stdout  # noqa: S101
        self._beside.stdin.write(f"{text}\n")
        self._beside.stdin.flush()
        answer = self._beside.stdout.readline().strip()
        return "" if answer == tracing.READY else "\n".join((answer, *self._beside.stdout)) or "nobody loaded the table"

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        if self._beside.poll() is None or not self._beside.returncode:
            self._beside.communicate()
        if self._beside.returncode < 0:  # somebody killed it
            with suppress(KernelError):  # it may not have come so far
                Nft().load(f"delete table inet {self._name}")

    def events(self) -> Iterator[Event]:
        """What is said of the flow's packets, in order, as it comes, until the time is over."""
        deadline = time.monotonic() + self._seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                return
            try:
                data = self._socket.recv(1 << 17)
            except OSError as error:
                why = "more came than could be read" if error.errno == errno.ENOBUFS else os.strerror(error.errno or 0)
                raise KernelError("read the trace", why) from error
            for kind, body in _messages(data):
                if kind == NFNL_SUBSYS_NFTABLES << 8 | TRACE:
                    yield self._event(body)

    def _event(self, body: bytes) -> Event:
        family = body[0]
        item = attributes(body[NFGENMSG.size :])
        table_name, chain = text(item[TABLE]), text(item[CHAIN])
        kind, handle = number(item[TYPE]), number(item.get(HANDLE, b""))
        return Event(
            packet=number(item[ID]),
            place=self._place(family, table_name, chain, handle),
            verdict=_verdict(kind, item.get(VERDICT, b""), item.get(POLICY, b"")),
            mark=number(item.get(MARK, b"")),
            ours=table_name == self._name,
            header=item.get(NETWORK_HEADER, b""),
        )

    def _place(self, family: int, table_name: str, chain: str, handle: int) -> Place:
        key = (family, table_name, chain, handle)
        if key not in self._places:
            with closing(Netlink(NETLINK_NETFILTER)) as netlink:
                header = NFGENMSG.pack(family, 0, 0) + attribute(OF_TABLE, table_name.encode() + b"\0")
                hook, comment = "", ""
                found = _one(netlink, GETCHAIN, header + attribute(CHAIN_NAME, chain.encode() + b"\0"))
                if CHAIN_HOOK in found:
                    hook = HOOKS[number(attributes(found[CHAIN_HOOK])[HOOK_NUMBER])]
                if handle:
                    where = attribute(RULE_CHAIN, chain.encode() + b"\0") + attribute(
                        RULE_HANDLE, struct.pack(">Q", handle)
                    )
                    comment = comment_of(_one(netlink, GETRULE, header + where).get(RULE_USERDATA, b""))
            self._places[key] = Place(FAMILIES.get(family, str(family)), table_name, chain, hook, handle, comment)
        return self._places[key]


def table(name: str, flow: Flow, index: int) -> str:
    """The table that has a flow traced, as nft reads it; `index` is the number of the flow's link, if it has one."""
    family = Family.of(flow.source).nft
    where, link = ("prerouting", f"iif {index} ") if flow.link else ("output", "")
    return (
        f"create table inet {name}\n"
        f"table inet {name} {{\n"
        f"    chain {where} {{\n"
        f"        type filter hook {where} priority {PRIORITY}; policy accept;\n"
        f"        {link}{family} saddr {flow.source} {family} daddr {flow.destination} "
        f"limit rate {RATE}/second burst {RATE} packets meta nftrace set 1\n"
        "    }\n"
        "}\n"
    )


def _one(netlink: Netlink, kind: int, body: bytes) -> dict[int, bytes]:
    """One chain or rule; nothing, if it has gone since."""
    try:
        answer = netlink.ask("look a rule up", NFNL_SUBSYS_NFTABLES << 8 | kind, body)
    except KernelError:
        return {}
    return attributes(answer[NFGENMSG.size :])


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + HEADER.size <= len(data):
        size, kind, *_ = HEADER.unpack_from(data, offset)
        yield kind, data[offset + HEADER.size : offset + size]
        offset += (size + 3) & ~3


def _verdict(kind: int, verdict: bytes, policy: bytes) -> str:
    if kind == POLICY_DECIDED:
        return f"policy {VERDICTS.get(number(policy), str(number(policy)))}"
    if kind == CHAIN_ENDED:
        return "return, the chain's end"
    found = attributes(verdict)
    code = int.from_bytes(found.get(VERDICT_CODE, b""), "big", signed=True)
    chain = f" {text(found[VERDICT_CHAIN])}" if VERDICT_CHAIN in found else ""
    return f"{VERDICTS.get(code, str(code))}{chain}"
