"""A change of sets becomes one batch of messages, each as long as netlink allows and no longer."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel import nfset
from agent.kernel.attributes import attributes, text
from agent.kernel.elements import Elements, unpack
from agent.kernel.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Message
from agent.kernel.nfset import Change, following, transaction

NONE = Elements(4)
DELETE, NEW = 0xA0E, 0xA0C
ADD_FLAGS = NLM_F_CREATE | NLM_F_EXCL


def keys(first: int, count: int) -> bytes:
    """That many addresses from 10.0.0.FIRST on."""
    return struct.pack(f">{count}I", *range(0x0A000000 + first, 0x0A000000 + first + count))


def content(message: Message, *, valued: bool) -> tuple[int, str, str, Elements]:
    """What a message with IPv4 elements says: type, table, set, elements."""
    found = attributes(message.body[4:])
    return message.kind, text(found[1]), text(found[2]), unpack(found[3], 4, valued=valued)


def test_order() -> None:
    """Between the batch's ends everything goes before anything comes, of whatever set, and the last is answered."""
    marked = Elements(4, keys(1, 2), b"\1\0\0\0\2\0\0\0")
    changes = [Change("first", Elements(4, keys(0, 2)), marked), Change("second", NONE, Elements(4, keys(9, 1)))]
    changes.append(Change("third", Elements(4, keys(7, 1)), NONE))
    begin, *messages, end = transaction("idmark", changes)
    assert begin == Message(16, 0, b"\0\0\0\x0a")
    assert end == Message(17, 0, b"\0\0\0\x0a")
    assert [message.flags for message in messages] == [0, 0, ADD_FLAGS, ADD_FLAGS | NLM_F_ACK]
    assert [content(message, valued=place == 2) for place, message in enumerate(messages)] == [
        (DELETE, "idmark", "first", Elements(4, keys(0, 2))),
        (DELETE, "idmark", "third", Elements(4, keys(7, 1))),
        (NEW, "idmark", "first", marked),
        (NEW, "idmark", "second", Elements(4, keys(9, 1))),
    ]


@pytest.mark.parametrize("generation", [1, 0x01020304])
def test_generation(generation: int) -> None:
    """The generation that a change is made for stands in the batch's beginning, big-endian."""
    begin = transaction("idmark", [Change("m", Elements(4, keys(0, 1)), NONE)], generation)[0]
    assert attributes(begin.body[4:]) == {1: generation.to_bytes(4, "big")}


def test_nothing() -> None:
    """Without a change there is no batch."""
    assert transaction("idmark", [], 7) == transaction("idmark", [Change("m", NONE, NONE)], 7) == []


@given(st.integers(0, 10_000), st.sampled_from([4, 16]), st.booleans())
def test_lengths(count: int, key_bytes: int, valued: bool) -> None:
    """Every element is in one message, in order; the length of a list fits an attribute's 16 bits; all are aligned."""
    elements = Elements(key_bytes, bytes(range(256)) * (count * key_bytes // 256 + 1), b"")
    elements = Elements(key_bytes, elements.keys[: count * key_bytes], bytes(4 * count) if valued else b"")
    messages = transaction("idmark", [Change("m", NONE, elements)])[1:-1]
    lists = [attributes(message.body[4:])[3] for message in messages]
    assert all(
        len(data) <= 0xFFFF - 4 and len(message.body) % 4 == 0 for data, message in zip(lists, messages, strict=True)
    )
    assert b"".join(unpack(data, key_bytes, valued=valued).keys for data in lists) == elements.keys


def test_following() -> None:
    """A generation is followed by the next number; behind the last one of 32 bits comes 1, for 0 is none."""
    assert (following(1), following(0xFFFFFFFE), following(0xFFFFFFFF)) == (2, 0xFFFFFFFF, 1)


def test_frame() -> None:
    """A batch with the longest names and the most elements of a transaction has less besides them than is kept free."""
    elements = Elements(16, bytes(16 * nfset.TRANSACTION), bytes(4 * nfset.TRANSACTION))
    messages = transaction("t" * 255, [Change("m" * 255, NONE, elements)], 7)
    assert sum(16 + len(message.body) for message in messages) <= 40 * nfset.TRANSACTION + nfset.FRAME_ROOM
