"""nf_tables' sets by netlink: elements put in and taken out in transactions of our own.

For all that are no intervals. libnftables reads every interval set of the host before it adds an element (2.8 s beside
a foreign one of 100,000), and takes ten times as long for many. Message types and attributes are those of
linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from agent.addresses import Addresses
from agent.kernel import KernelError
from agent.kernel.attributes import attribute
from agent.kernel.elements import pack, stride
from agent.kernel.netlink import ATTRIBUTE, NETLINK_NETFILTER, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Message, Netlink
from agent.kernel.nfnl import ELEMENT_SET, ELEMENTS, NFGENMSG, NFNL_SUBSYS_NFTABLES, OF_TABLE
from agent.model import ElementChange

NEWSETELEM, DELSETELEM = NFNL_SUBSYS_NFTABLES << 8 | 12, NFNL_SUBSYS_NFTABLES << 8 | 14
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
#: nfgenmsg of a batch: no family, and the subsystem that it is for.
NFGENMSG_BATCH = struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES)

#: An attribute's length has 16 bits, and that of the list of elements counts its own header.
LIST_ROOM = 0xFFFF - ATTRIBUTE.size
#: Elements of a transaction that need not be one. While anybody on the host listens to nf_tables (`nft monitor`), the
#: kernel holds 8 KiB an element until the commit: this many stay under 64 MiB.
TRANSACTION = 4000
#: Bytes that a transaction may have, where we have the rights for so large a buffer (the kernel doubles it).
SEND_ROOM = 1 << 23
#: Bytes that an element has at most: two names of chains or counters (ours have at most 64 letters), two addresses.
ELEMENT_ROOM = 256
#: Bytes of a transaction besides the elements, and more than it is: headers, and names of at most 255 bytes each.
FRAME_ROOM = 4096

REASONS = {
    errno.ENFILE: "the set is full",
    errno.ENOENT: "the table, the set or an element is not there",
    errno.EEXIST: "an element is there already",
}


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

    def commit(self, table: str, changes: Sequence[ElementChange]) -> None:
        """Make all the changes in one transaction, or none of them: for a key that is not there to be deleted, and for
        one that is there already; where a set would hold more than its `size`, what goes in the same transaction left
        out; and "Message too long" if one send has no room for so much.
        """
        self._send(f"change elements in nft table inet {table}", transaction(table, changes))

    def change(self, table: str, changes: Sequence[ElementChange]) -> int:
        """Make all the changes, in as many transactions as it takes for so many elements; how many.

        When one fails those before it are taken back. Raises as `commit` does.
        """
        done: list[tuple[ElementChange, ...]] = []
        for part in portions(changes, min(TRANSACTION, (self._room - FRAME_ROOM) // ELEMENT_ROOM)):
            try:
                self.commit(table, part)
            except KernelError:
                for before in reversed(done):
                    self.commit(table, [replace(change, gone=change.new, new=change.gone) for change in before])
                raise
            done.append(part)
        return len(done)

    def _send(self, doing: str, messages: Sequence[Message]) -> None:
        answers = self._netlink.post(doing, messages) if messages else {0: 0}
        code = next((code for _, code in sorted(answers.items()) if code), 0)
        if code:
            raise KernelError(doing, f"{REASONS[code]} ({os.strerror(code)})" if code in REASONS else os.strerror(code))
        if not answers:
            raise KernelError(doing, "no answer")


def portions(changes: Sequence[ElementChange], size: int) -> Iterator[tuple[ElementChange, ...]]:
    """Changes as transactions of at most so many elements, first of what comes; what is none is left out."""
    if sum(len(change.gone) + len(change.new) for change in changes) <= size:
        yield from _batched(changes, size)
        return
    yield from _batched((part for change in changes for part in _split(change.but_going, size)), size)
    yield from _batched((part for change in changes for part in _split(change.going, size)), size)


def _split(change: ElementChange, size: int) -> Iterator[ElementChange]:
    """A change in parts, of which none is too large for one transaction."""
    if len(change.gone) + len(change.new) <= size:
        yield change
        return
    old = {key: (key, value) for key, value in change.gone} if change.new else {}
    half = max(1, size // 2)
    for first in range(0, len(change.new), half):
        new = change.new[first : first + half]
        yield ElementChange(change.set, change.key, tuple(old[key] for key, _ in new if key in old) if old else (), new)
    if not change.new:
        for first in range(0, len(change.gone), size):
            yield ElementChange(change.set, change.key, change.gone[first : first + size], ())


def _batched(changes: Iterable[ElementChange], size: int) -> Iterator[tuple[ElementChange, ...]]:
    batch: list[ElementChange] = []
    count = 0
    for change in changes:
        more = len(change.gone) + len(change.new)
        if batch and count + more > size:
            yield tuple(batch)
            batch, count = [], 0
        if change:
            batch.append(change)
            count += more
    if batch:
        yield tuple(batch)


def transaction(table: str, changes: Sequence[ElementChange]) -> list[Message]:
    """The messages of one batch: what goes before what comes, so that a key may do both. None without a change.

    An acknowledgement is asked for at the last message with elements: at the end of a batch only Linux 6.10 gives one.
    """
    messages = [
        *(Message(DELSETELEM, 0, body) for change in changes for body in _bodies(table, change, _keys(change.gone))),
        *(
            Message(NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, body)
            for change in changes
            for body in _bodies(table, change, change.new)
        ),
    ]
    if not messages:
        return []
    messages[-1] = messages[-1]._replace(flags=messages[-1].flags | NLM_F_ACK)
    return [
        Message(NFNL_MSG_BATCH_BEGIN, 0, NFGENMSG_BATCH),
        *messages,
        Message(NFNL_MSG_BATCH_END, 0, NFGENMSG_BATCH),
    ]


def _keys(elements: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    return elements if isinstance(elements, Addresses) else [(key, "") for key, _ in elements]


def _bodies(table: str, change: ElementChange, elements: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    """As few messages as hold the elements."""
    head = NFGENMSG + _name(OF_TABLE, table) + _name(ELEMENT_SET, change.set)
    count = LIST_ROOM // (stride(elements.family) if isinstance(elements, Addresses) else ELEMENT_ROOM)
    for first in range(0, len(elements), count):
        yield head + attribute(ELEMENTS, pack(elements[first : first + count], change.key))


def _name(kind: int, name: str) -> bytes:
    return attribute(kind, f"{name}\0".encode())
