"""What nf_tables answers becomes the words of our ruleset: keys, values, intervals, comments, hooks.

The bytes are those that the kernel sends (linux/netfilter/nf_tables.h); that it does is for the kernel tests to say.
"""

from __future__ import annotations

import random
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Family, Prefix
from agent.kernel import nfnl
from agent.kernel.attributes import Attributes, each
from agent.model import Hook
from agent.prefixes import Span, classes


def attribute(number: int, value: bytes) -> bytes:
    """A netlink attribute: length, type, value, padded to four bytes."""
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


IPV4 = bytes([192, 0, 2, 130])
IPV6 = bytes.fromhex("20010db8000400000000000000000130")
MARK = (0x1000000).to_bytes(4, sys.byteorder)
LINK = b"vpn0".ljust(16, b"\0")


@pytest.mark.parametrize(
    ("number", "types", "key", "text"),
    [
        pytest.param(7, ["ipv4_addr"], IPV4, "192.0.2.130", id="ipv4"),
        pytest.param(8, ["ipv6_addr"], IPV6, "2001:db8:4::130", id="ipv6"),
        pytest.param(19, ["mark"], MARK, "0x01000000", id="mark"),
        pytest.param(41, ["ifname"], LINK, '"vpn0"', id="link"),
        pytest.param(41, ["ifname"], b"fifteen-letters\0", '"fifteen-letters"', id="long-link"),
        pytest.param(19 << 6 | 41, ["mark", "ifname"], MARK + LINK, '0x01000000 . "vpn0"', id="mark-and-link"),
        pytest.param(7 << 6 | 41, ["ipv4_addr", "ifname"], IPV4 + LINK, '192.0.2.130 . "vpn0"', id="address-and-link"),
        pytest.param(8 << 6 | 41, ["ipv6_addr", "ifname"], IPV6 + LINK, '2001:db8:4::130 . "vpn0"', id="the-same-ipv6"),
        pytest.param(13, ["type-13"], b"\0\x50", "0050", id="somebody-else-s"),
        pytest.param(7, ["ipv4_addr"], b"", "*", id="all-others"),
    ],
)
def test_key(number: int, types: list[str], key: bytes, text: str) -> None:
    """A key's type and an element's key are written as nft takes them, which is as we write them."""
    assert nfnl._key_types(number) == types
    assert nfnl._key(key, types) == text


def verdict(code: int, chain: bytes = b"") -> Attributes:
    words = attribute(1, code.to_bytes(4, "big", signed=True)) + (attribute(2, chain + b"\0") if chain else b"")
    return {2: attribute(2, words)}


@pytest.mark.parametrize(
    ("element", "text"),
    [
        pytest.param({}, "", id="of-a-set"),
        pytest.param(verdict(-4, b"id-inside"), "goto id-inside", id="goto"),
        pytest.param(verdict(-3, b"id-inside"), "jump id-inside", id="jump"),
        pytest.param(verdict(0), "drop", id="drop"),
        pytest.param(verdict(1), "accept", id="accept"),
        pytest.param({9: b"id-inside-ipv4-transmit\0"}, '"id-inside-ipv4-transmit"', id="counter"),
        pytest.param({2: attribute(1, b"\x01\x02")}, "0102", id="data"),
    ],
)
def test_value(element: Attributes, text: str) -> None:
    """An element's value is a verdict or an object's name, as nft writes them."""
    assert nfnl._value(element) == text


@pytest.mark.parametrize(
    ("userdata", "comment"),
    [
        pytest.param(b"", "", id="none"),
        pytest.param(b"\0\x05mine\0", "mine", id="comment"),
        pytest.param(b"\x01\x02xy\0\x05mine\0", "mine", id="behind-another"),
        pytest.param(b"\x01\x02xy", "", id="another-alone"),
        pytest.param(b"\0\x80" + b"x" * 127 + b"\0", "x" * 127, id="long"),
        pytest.param(b"\0", "", id="cut-off"),
        pytest.param(b"\0\x04\xc3\xa9!\0", "é!", id="not-ascii"),
    ],
)
def test_comment(userdata: bytes, comment: str) -> None:
    """A rule's comment is found in what libnftnl keeps with it: type, length, value."""
    assert nfnl.comment_of(userdata) == comment


@pytest.mark.parametrize(
    ("number", "priority", "policy", "kind", "hook"),
    [
        pytest.param(0, -145, 1, b"filter\0", Hook("filter", "prerouting", -145), id="prerouting"),
        pytest.param(3, -145, 1, b"route\0", Hook("route", "output", -145), id="output"),
        pytest.param(4, 95, 1, b"nat\0", Hook("nat", "postrouting", 95), id="postrouting"),
        pytest.param(4, 300, 0, b"filter\0", Hook("filter", "postrouting", 300, "drop"), id="policy-drop"),
    ],
)
def test_hook(number: int, priority: int, policy: int, kind: bytes, hook: Hook) -> None:
    """A base chain has its hook by number, a priority with a sign and a policy; any other chain has none."""
    words = attribute(1, number.to_bytes(4, "big")) + attribute(2, priority.to_bytes(4, "big", signed=True))
    assert nfnl._hook({4: words, 5: policy.to_bytes(4, "big"), 7: kind}) == hook
    assert nfnl._hook({3: b"id-inside\0"}) is None


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=9))))
def test_attributes(pairs: list[tuple[int, bytes]]) -> None:
    """Attributes are read one after the other, whatever their length; two flags beside the type are no part of it."""
    data = b"".join(attribute(number | 0x8000, value) for number, value in pairs)
    assert list(each(data)) == pairs


@st.composite
def spans(draw: st.DrawFn) -> tuple[Family, tuple[Span, ...]]:
    """Disjoint intervals at either end of a family, many of them next to each other."""
    family = draw(st.sampled_from(Family))
    sources = {}
    for host in draw(st.lists(st.sampled_from([0, 1, 2, 3, family.bits]))):
        address = draw(st.integers(0, 31)) ^ draw(st.sampled_from([0, (1 << family.bits) - 1]))
        sources[Prefix(family, address >> host << host, family.bits - host)] = draw(st.sampled_from("ab"))
    return family, classes(sources.items())


@given(spans(), st.booleans(), st.randoms(use_true_random=False))
def test_intervals(made: tuple[Family, tuple[Span, ...]], merged: bool, order: random.Random) -> None:
    """Intervals come back as they were, in whatever order their edges do.

    The kernel has the first address of each, and a mark behind the last one; none behind the last address of all,
    and none (or one all the same) where the next interval begins.
    """
    family, intervals = made
    size = family.bits // 8
    firsts = {span.first for span in intervals}
    edges = [(span.first.to_bytes(size, "big"), False, span.identity) for span in intervals]
    edges += [
        ((span.last + 1).to_bytes(size, "big"), True, "")
        for span in intervals
        if span.last + 1 < 1 << family.bits and not (merged and span.last + 1 in firsts)
    ]
    if 0 not in firsts:
        edges.append((bytes(size), True, ""))  # libnftables ends an interval there that never began
    order.shuffle(edges)
    assert list(nfnl._intervals(iter(edges), family)) == [(str(span), span.identity) for span in intervals]
