"""Sources become disjoint classes by longest prefix."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Address, Family, Prefix, Prefixes
from agent.prefixes import Span, classes, lookup, outermost
from tests.unit.values import any_prefix, by_name

Sources = list[tuple[Prefix, str]]


def sources(*pairs: tuple[str, str]) -> Sources:
    return [(Prefix.parse(text), identity) for text, identity in pairs]


@pytest.mark.parametrize(
    ("pairs", "spans"),
    [
        pytest.param([], [], id="none"),
        pytest.param([("10.0.0.0/8", "a")], ["10.0.0.0/8 a"], id="one"),
        pytest.param([("192.0.2.130", "a"), ("2001:db8::1", "a")], ["192.0.2.130 a", "2001:db8::1 a"], id="addresses"),
        pytest.param(
            [("10.0.0.0/8", "a"), ("10.1.0.0/16", "b")],
            ["10.0.0.0/16 a", "10.1.0.0/16 b", "10.2.0.0-10.255.255.255 a"],
            id="nested",
        ),
        pytest.param(
            [("10.0.0.0/8", "a"), ("10.0.0.0/16", "b")],
            ["10.0.0.0/16 b", "10.1.0.0-10.255.255.255 a"],
            id="at-the-start",
        ),
        pytest.param(
            [("10.0.0.0/8", "a"), ("10.255.0.0/16", "b")],
            ["10.0.0.0-10.254.255.255 a", "10.255.0.0/16 b"],
            id="at-the-end",
        ),
        pytest.param(
            [("10.0.0.0/8", "a"), ("10.0.0.0/9", "b"), ("10.128.0.0/9", "c")],
            ["10.0.0.0/9 b", "10.128.0.0/9 c"],
            id="hidden",
        ),
        pytest.param(
            [("10.0.0.0/8", "a"), ("10.1.0.0/16", "b"), ("10.1.2.0/24", "a")],
            [
                "10.0.0.0/16 a",
                "10.1.0.0/23 b",
                "10.1.2.0/24 a",
                "10.1.3.0-10.1.255.255 b",
                "10.2.0.0-10.255.255.255 a",
            ],
            id="three-deep",
        ),
        pytest.param([("10.0.0.0/8", "a"), ("10.1.0.0/16", "a")], ["10.0.0.0/8 a"], id="swallowed"),
        pytest.param([("10.0.0.0/9", "a"), ("10.128.0.0/9", "a")], ["10.0.0.0/9 a", "10.128.0.0/9 a"], id="neighbours"),
        pytest.param([("10.0.0.0/8", "a"), ("10.0.0.0/8", "a")], ["10.0.0.0/8 a"], id="the-same-twice"),
        pytest.param(
            [("0.0.0.0/0", "a"), ("255.255.255.255", "b"), ("::/0", "b"), ("::", "a")],
            [
                "0.0.0.0-255.255.255.254 a",
                "255.255.255.255 b",
                ":: a",
                "::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff b",
            ],
            id="everything",
        ),
    ],
)
def test_classes(pairs: list[tuple[str, str]], spans: list[str]) -> None:
    """Longer prefixes are cut out of shorter ones, and nothing else is taken apart or put together."""
    assert [f"{span} {span.identity}" for span in classes(sources(*pairs))] == spans


@pytest.mark.parametrize(
    "between", [pytest.param([], id="alone"), pytest.param([("10.0.0.0/8", "a")], id="inside-one-of-the-two")]
)
def test_same_prefix_of_two(between: list[tuple[str, str]]) -> None:
    """One prefix can't be a source of two identities."""
    with pytest.raises(ValueError, match=r"^10\.1\.0\.0/16 is a source of a and of b$"):
        classes(sources(("10.1.0.0/16", "a"), *between, ("10.1.0.0/16", "b")))


def test_span_of_many() -> None:
    """A span as large as a prefix, but not where a prefix could begin, is written by its ends."""
    assert str(Span(Family.IPV4, 1, 2, "a")) == "0.0.0.1-0.0.0.2"


@pytest.mark.parametrize(
    ("address", "decided"),
    [
        pytest.param("10.1.2.3", "10.1.2.0/24 a", id="longest"),
        pytest.param("10.1.3.0", "10.1.0.0/16 b", id="middle"),
        pytest.param("10.9.0.1", "10.0.0.0/8 a", id="shortest"),
        pytest.param("11.0.0.0", None, id="outside"),
        pytest.param("::10.1.2.3", None, id="other-family"),
    ],
)
def test_lookup(address: str, decided: str | None) -> None:
    """The longest prefix that holds an address decides, and is told as it was written."""
    found = lookup(
        by_name(sources(("10.0.0.0/8", "a"), ("10.1.0.0/16", "b"), ("10.1.2.0/24", "a"))), ip_address(address)
    )
    assert (f"{found[0]} {found[1]}" if found else None) == decided


# --- laws ------------------------------------------------------------------------------------------------------------


some_sources = st.dictionaries(any_prefix(), st.sampled_from("abc"), max_size=12).map(lambda found: list(found.items()))


def to_address(family: Family, value: int) -> Address:
    return IPv4Address(value) if family is Family.IPV4 else IPv6Address(value)


def interesting(found: Sources) -> set[tuple[Family, int]]:
    """The first and last addresses of all prefixes, and those just outside."""
    edges = {(prefix.family, value) for prefix, _ in found for value in (prefix.address, prefix.last)}
    around = {(family, value + step) for family, value in edges for step in (-1, 0, 1)}
    return {(family, value) for family, value in around if 0 <= value < 1 << family.bits}


def longest_prefix(found: Sources, family: Family, value: int) -> list[str]:
    """Whose an address is, asked of every length in turn."""
    for length in range(family.bits, -1, -1):
        host = family.bits - length
        owners = [identity for prefix, identity in found if prefix == (family, value >> host << host, length)]
        if owners:
            return owners
    return []


@given(some_sources)
def test_longest_prefix_decides(found: Sources) -> None:
    """An address that any prefix holds lies in exactly one span, of the identity of the longest; others lie in none."""
    spans = classes(found)
    for family, value in interesting(found):
        owners = [span.identity for span in spans if span.family is family and span.first <= value <= span.last]
        assert owners == longest_prefix(found, family, value)


@given(some_sources)
def test_lookup_agrees(found: Sources) -> None:
    """Looking up one address and taking all apart give the same identity."""
    for family, value in interesting(found):
        decided = lookup(by_name(found), to_address(family, value))
        assert ([decided[1]] if decided else []) == longest_prefix(found, family, value)


@given(some_sources)
def test_disjoint_and_in_order(found: Sources) -> None:
    """Spans are in order, none is empty, and none overlaps the next."""
    spans = classes(found)
    assert all(span.first <= span.last for span in spans)
    assert all((one.family, one.last) < (two.family, two.first) for one, two in pairwise(spans))


@given(some_sources.flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))))
def test_order_means_nothing(orders: tuple[Sources, Sources]) -> None:
    """Whatever the order of the sources, the spans are the same."""
    one, other = orders
    assert classes(one) == classes(other)


@given(some_sources)
def test_what_nothing_cuts_stays(found: Sources) -> None:
    """A prefix that holds no other and lies in none of its own identity's is a span as it stands."""
    spans = set(classes(found))
    for prefix, identity in found:
        others = [(other, owner) for other, owner in found if other != prefix and other.family is prefix.family]
        holds = any(prefix.address <= other.address and other.last <= prefix.last for other, _ in others)
        around = [(other, owner) for other, owner in others if other.address <= prefix.address <= other.last]
        inside_own = around and max(around, key=lambda pair: pair[0].length)[1] == identity
        if not holds and not inside_own:
            assert Span(prefix.family, prefix.address, prefix.last, identity) in spans


@given(st.lists(st.lists(any_prefix()), max_size=3))
def test_outermost(found: list[list[Prefix]]) -> None:
    """The outermost networks of several policies' are those of a family that lie in none of the others, in order."""
    together = set(chain.from_iterable(found))
    for family in Family:
        assert [*outermost(family, map(Prefixes.of, found))] == [
            prefix
            for prefix in sorted(together)
            if prefix.family is family and not any(_is_inside(prefix, other) for other in together)
        ]


def _is_inside(one: Prefix, other: Prefix) -> bool:
    return one != other and one.family is other.family and other.address <= one.address and one.last <= other.last
