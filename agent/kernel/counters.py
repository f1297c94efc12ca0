"""Counters as nf_tables dumps them: thousands of messages that differ in nothing but names and values.

Where the values lie is looked up in the first one, and they are taken from there in all that have its shape. Any other
is read attribute by attribute: in what order a kernel writes them, and with what padding, is its own affair.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from agent.kernel.attributes import attribute, attributes, number, text
from agent.kernel.netlink import ATTRIBUTE, HEADER, NLA_TYPE_MASK
from agent.model import Count

#: linux/netfilter/nf_tables.h, enum nft_object_attributes and nft_counter_attributes.
OBJECT_TABLE, OBJECT_NAME, OBJECT_TYPE, OBJECT_DATA, OBJECT_USE, OBJECT_HANDLE = 1, 2, 3, 4, 5, 6
COUNTER_BYTES, COUNTER_PACKETS = 1, 2
NFT_OBJECT_COUNTER = 1
#: Where attributes begin: behind nlmsghdr and nfgenmsg.
BODY = HEADER.size + 4

#: The attributes that lead to a counter's values, in Count's order; each value has 64 bits. Besides these only its use
#: differs from counter to counter: how many rules and elements hold on to it.
VALUES: tuple[tuple[int, ...], ...] = ((OBJECT_DATA, COUNTER_PACKETS), (OBJECT_DATA, COUNTER_BYTES), (OBJECT_HANDLE,))


def counts(messages: Iterable[bytes], table: str, handle: int) -> dict[str, Count]:
    """The counters of a table among the objects of a dump, by name. `handle`: the table's own, of 64 bits as theirs."""
    found: dict[str, Count] = {}
    first = attribute(OBJECT_TABLE, f"{table}\0".encode())
    name_at = BODY + len(first)
    upper, shape = handle << 64, _NONE
    header = ATTRIBUTE.unpack_from
    for message in messages:
        end = len(message) - shape.size
        # A scrape comes along here for every counter.
        if end > name_at and int.from_bytes(message[end:], "big") & shape.mask == shape.fixed:
            size, kind = header(message, name_at)
            if kind == OBJECT_NAME and message.startswith(first, BODY):
                packets, data, lower = shape.in_order(shape.values(message, end))
                name = message[name_at + 4 : name_at + size - 1].decode("utf-8", "replace")
                found[name] = Count(packets, data, upper | lower)
                continue
        said = attributes(message[BODY:])
        if text(said[OBJECT_TABLE]) == table and number(said[OBJECT_TYPE]) == NFT_OBJECT_COUNTER:
            values = attributes(said[OBJECT_DATA])
            packets, data, lower = values[COUNTER_PACKETS], values[COUNTER_BYTES], said[OBJECT_HANDLE]
            found[text(said[OBJECT_NAME])] = Count(number(packets), number(data), upper | number(lower))
            if shape is _NONE:
                shape = _Shape.of(message)
    return found


class _Shape(NamedTuple):
    """What a counter's message is behind its name: bytes in all; as one number, which bits of it are the same in every
    counter, and what these are. And how to get at the values.
    """

    size: int
    mask: int
    fixed: int
    values: Callable[[bytes, int], tuple[Any, ...]]
    in_order: Callable[[tuple[Any, ...]], tuple[Any, ...]]

    @classmethod
    def of(cls, message: bytes) -> _Shape:
        """That of a counter."""
        begin = (_span(message, OBJECT_NAME)[1] + 3) & ~3
        mask = bytearray(b"\xff" * (len(message) - begin))
        for way in (*VALUES, (OBJECT_USE,)):
            first, last = _span(message, *way)
            mask[first - begin : last - begin] = bytes(last - first)
        places = [_span(message, *way)[0] - begin for way in VALUES]
        there = sorted(places)
        gaps = (place - end for place, end in zip(there, (0, *(place + 8 for place in there)), strict=False))
        bits = int.from_bytes(mask, "big")
        return cls(
            len(mask),
            bits,
            int.from_bytes(message[begin:], "big") & bits,
            struct.Struct(">" + "".join(f"{gap}xQ" for gap in gaps)).unpack_from,
            itemgetter(*map(there.index, places)),
        )


#: Of no counter: what it says of no bits is never so.
_NONE = _Shape(0, 0, 1, lambda _, __: (), tuple)


def _span(message: bytes, *way: int) -> tuple[int, int]:
    """Where the value of an attribute lies, by the types that lead there. Raises StopIteration if it is nowhere."""
    first, last = BODY, len(message)
    for wanted in way:
        first, last = next((a, b) for kind, a, b in _spans(message, first, last) if kind == wanted)
    return first, last


def _spans(message: bytes, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    while first < last:
        size, kind = ATTRIBUTE.unpack_from(message, first)
        yield kind & NLA_TYPE_MASK, first + ATTRIBUTE.size, first + size
        first += (size + 3) & ~3
