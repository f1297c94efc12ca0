"""Netlink attributes, one after the other, as types and values."""

from __future__ import annotations

from collections.abc import Iterator

from agent.kernel.netlink import ATTRIBUTE, NLA_TYPE_MASK

Attributes = dict[int, bytes]


def each(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in their order, type and value."""
    offset, end = 0, len(data)
    while offset < end:
        size, kind = ATTRIBUTE.unpack_from(data, offset)
        yield kind & NLA_TYPE_MASK, data[offset + 4 : offset + size]
        offset += (size + 3) & ~3


def attributes(data: bytes) -> Attributes:
    """The values by their types."""
    # Not by `each`: a scrape reads some ten thousand of them.
    found, unpack = Attributes(), ATTRIBUTE.unpack_from
    offset, end = 0, len(data)
    while offset < end:
        size, kind = unpack(data, offset)
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + size]
        offset += (size + 3) & ~3
    return found


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def text(data: bytes) -> str:
    """A string, which ends with a NUL."""
    return data.rstrip(b"\0").decode(errors="replace")


def number(data: bytes) -> int:
    """A number as nf_tables has them: big-endian."""
    return int.from_bytes(data, "big")
