"""nf_tables' sets by netlink: elements put in and taken out in transactions of our own, and read back as blocks.

For hash sets and maps of marks (no interval), which are large: libnftables reads every set of the host before it adds
an element, and takes ten times as long for the rest. Message types and attributes are those of
linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from agent.kernel import KernelError
from agent.kernel.attributes import attribute, attributes
from agent.kernel.elements import Elements, pack, stride, unpack
from agent.kernel.netlink import (
    ATTRIBUTE,
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
)
from agent.kernel.nfnl import ELEMENT_SET, ELEMENTS, GETSETELEM, NFGENMSG, NFNL_SUBSYS_NFTABLES, OF_TABLE

NEWSETELEM, DELSETELEM = NFNL_SUBSYS_NFTABLES << 8 | 12, NFNL_SUBSYS_NFTABLES << 8 | 14
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
NFNL_BATCH_GENID = 1
#: nfgenmsg of a batch: no family, and the subsystem that it is for.
NFGENMSG_BATCH = struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES)

#: An attribute's length has 16 bits, and that of the list of elements counts its own header.
LIST_ROOM = 0xFFFF - ATTRIBUTE.size
#: Elements of a transaction that need not be one. While anybody on the host listens to nf_tables (`nft monitor`), the
#: kernel holds 8 KiB an element until the commit: this many stay under 64 MiB.
TRANSACTION = 4000
#: Bytes that a transaction may have, where we have the rights for so large a buffer (the kernel doubles it).
SEND_ROOM = 1 << 23
#: Bytes of a transaction besides the elements, and more than it is: headers, and names of at most 255 bytes each.
FRAME_ROOM = 4096

REASONS = {
    errno.ENFILE: "the set is full",
    errno.ENOENT: "the table, the set or an element is not there",
    errno.EEXIST: "an element is there already",
    errno.ERESTART: "somebody else changed the ruleset",
}


class StaleError(KernelError):
    """Nothing was done: what the kernel has is not what the change was made for. Read it, and make the change anew."""


class FullError(KernelError):
    """Nothing was done: a set would hold more than its `size`, what goes in the same transaction left out."""


@dataclass(frozen=True, slots=True)
class Change:
    """What leaves a set and what enters it, at once; a key in both gets another value. `gone` needs no values."""

    set: str
    gone: Elements
    new: Elements


class Nfset:
    """Transactions on the sets of family inet, in the namespace of the thread that opened it.

    Every method raises KernelError. Not for several threads at a time.
    """

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._room = self._netlink.widen(SEND_ROOM)

    def __enter__(self) -> Nfset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()

    def commit(self, table: str, changes: Sequence[Change], generation: int | None = None) -> None:
        """Make all the changes in one transaction, or none of them.

        With `generation` only if nobody committed anything since; the one that this commit makes is then
        `following(generation)`. Raises StaleError if somebody did, for a key that is not there to be deleted, and for
        one that is there already; raises FullError. KernelError besides: "Message too long" if one send has no room
        for so much: more than some 400,000 elements, or in a user namespace than what net.core.wmem_max allows.
        """
        self._send(f"change elements in nft table inet {table}", transaction(table, changes, generation))

    def fill(self, table: str, name: str, elements: Elements) -> None:
        """Add elements to a set or map that no rule uses yet, in as many transactions as it takes.

        What a failure leaves is part of them. Raises as `commit` does.
        """
        each = stride(elements.key_bytes, valued=bool(elements.values))
        count = max(1, min(TRANSACTION, (self._room - FRAME_ROOM) // each))
        for first in range(0, len(elements), count):
            part = Change(name, Elements(elements.key_bytes), elements.part(first, count))
            self._send(f"fill {name} in nft table inet {table}", transaction(table, [part]))

    def elements(self, table: str, name: str, key_bytes: int, *, valued: bool) -> Elements:
        """What a set or map holds, in the kernel's order; nothing if it is not there.

        The kernel counts anew from the first element for every 32 KiB of its answer: the time goes with the square.
        Raises KernelError if an element has another shape.
        """
        doing = f"read the elements of {name} in nft table inet {table}"
        body = NFGENMSG + _name(OF_TABLE, table) + _name(ELEMENT_SET, name)
        found = bytearray()
        for answer in self._netlink.dump(doing, NFNL_SUBSYS_NFTABLES << 8 | GETSETELEM, body):
            found += attributes(answer[HEADER.size + len(NFGENMSG) :]).get(ELEMENTS, b"")
        try:
            return unpack(found, key_bytes, valued=valued)
        except ValueError as error:
            raise KernelError(doing, str(error)) from error

    def _send(self, doing: str, messages: Sequence[Message]) -> None:
        answers = self._netlink.post(doing, messages) if messages else {0: 0}
        code = next((code for _, code in sorted(answers.items()) if code), 0)
        if code:
            why = f"{REASONS[code]} ({os.strerror(code)})" if code in REASONS else os.strerror(code)
            match code:
                case errno.ERESTART | errno.ENOENT | errno.EEXIST:
                    raise StaleError(doing, why)
                case errno.ENFILE:
                    raise FullError(doing, why)
                case _:
                    raise KernelError(doing, why)
        if not answers:
            raise KernelError(doing, "no answer")


def following(generation: int) -> int:
    """The generation after one: a 32-bit number that is never 0 (nf_tables_commit in net/netfilter/nf_tables_api.c)."""
    return (generation + 1) % (1 << 32) or 1


def transaction(table: str, changes: Sequence[Change], generation: int | None = None) -> list[Message]:
    """The messages of one batch: what goes before what comes, so that a key may do both. None without a change.

    An acknowledgement is asked for at the last message with elements: at the end of a batch only Linux 6.10 gives one.
    """
    messages = [
        *(Message(DELSETELEM, 0, body) for change in changes for body in _bodies(table, change.set, change.gone)),
        *(
            Message(NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, body)
            for change in changes
            for body in _bodies(table, change.set, change.new)
        ),
    ]
    if not messages:
        return []
    messages[-1] = messages[-1]._replace(flags=messages[-1].flags | NLM_F_ACK)
    since = attribute(NFNL_BATCH_GENID, struct.pack(">I", generation)) if generation is not None else b""
    return [
        Message(NFNL_MSG_BATCH_BEGIN, 0, NFGENMSG_BATCH + since),
        *messages,
        Message(NFNL_MSG_BATCH_END, 0, NFGENMSG_BATCH),
    ]


def _bodies(table: str, name: str, elements: Elements) -> Iterator[bytes]:
    """As few messages as hold the elements."""
    head = NFGENMSG + _name(OF_TABLE, table) + _name(ELEMENT_SET, name)
    count = LIST_ROOM // stride(elements.key_bytes, valued=bool(elements.values))
    for first in range(0, len(elements), count):
        yield head + attribute(ELEMENTS, pack(elements.part(first, count)))


def _name(kind: int, name: str) -> bytes:
    return attribute(kind, f"{name}\0".encode())
