"""Sources that change hands: exactly those addresses whose longest prefix is another identity's."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Address, Family, Prefix
from agent.model import Policy
from agent.moves import aggregated, few, moves, size
from agent.prefixes import classes, lookup
from tests.unit.values import by_name, policies

Sources = list[tuple[Prefix, str]]


def sources(*words: str) -> Sources:
    """Each as `10.9.0.0/24 inside`."""
    return [(Prefix.parse(prefix), name) for prefix, name in (each.split() for each in words)]


def told(before: Sources, after: Sources) -> list[str]:
    """Moves as `inside > outside: 10.9.0.0/24`."""
    return [
        f"{move.before} > {move.after}: {' '.join(map(str, move.prefixes))}"
        for move in moves(classes(before), classes(after))
    ]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param(["10.9.0.0/24 i"], ["10.9.0.0/24 o"], ["i > o: 10.9.0.0/24"], id="whole"),
        pytest.param(["10.9.0.0/24 i"], [], ["i > None: 10.9.0.0/24"], id="loses"),
        pytest.param([], ["2001:db8::/32 i"], ["None > i: 2001:db8::/32"], id="gains"),
        pytest.param(
            ["10.9.0.0/16 o"], ["10.9.0.0/16 o", "10.9.7.0/24 i"], ["o > i: 10.9.7.0/24"], id="a-longer-prefix-comes"
        ),
        pytest.param(
            ["10.9.0.0/16 o", "10.9.7.0/24 i"], ["10.9.0.0/16 o"], ["i > o: 10.9.7.0/24"], id="a-longer-prefix-goes"
        ),
        pytest.param(["10.9.0.0/25 i", "10.9.0.128/25 i"], ["10.9.0.0/24 i"], [], id="another-spelling"),
        pytest.param(["10.9.0.0/16 o"], ["10.9.0.0/16 o", "10.9.7.0/24 o"], [], id="says-nothing-new"),
        pytest.param(
            ["10.9.0.0/25 i", "10.9.0.128/25 o"],
            ["10.9.0.0/25 n", "10.9.0.128/25 n"],
            ["i > n: 10.9.0.0/25", "o > n: 10.9.0.128/25"],
            id="from-two",
        ),
        pytest.param(
            ["255.255.255.0/24 i"], ["::/8 i"], ["i > None: 255.255.255.0/24", "None > i: ::/8"], id="two-families"
        ),
        pytest.param(["0.0.0.0/0 i"], ["0.0.0.0/0 o"], ["i > o: 0.0.0.0/0"], id="everything"),
    ],
)
def test_moves(before: list[str], after: list[str], expected: list[str]) -> None:
    """What changes hands is told in as few prefixes as can be, and what is only spelled otherwise is not."""
    assert told(sources(*before), sources(*after)) == expected


_owned = st.lists(
    st.tuples(
        st.builds(
            lambda address, hosts: Prefix(Family.IPV4, (address >> hosts << hosts) + (10 << 24), 32 - hosts),
            st.integers(0, 63),
            st.integers(0, 6),
        ),
        st.sampled_from("abc"),
    ),
    unique_by=lambda source: source[0],
    max_size=12,
)


@given(_owned, _owned)
def test_a_move_is_another_owner(before: Sources, after: Sources) -> None:
    """For every address: it is in one move, from its old to its new owner, just when these differ."""
    found = moves(classes(before), classes(after))
    was, becomes = by_name(before), by_name(after)
    for number in range((10 << 24) - 1, (10 << 24) + 65):
        address = IPv4Address(number)
        owners = tuple(source and source[1] for source in (lookup(was, address), lookup(becomes, address)))
        told = [(move.before, move.after) for move in found for prefix in move.prefixes if address in prefix]
        assert told == ([owners] if owners[0] != owners[1] else [])


def edges(prefixes: list[Prefix]) -> list[Address]:
    """Both sides of each end of these networks: between two of them nothing changes."""
    return [
        (IPv4Address if prefix.family is Family.IPV4 else IPv6Address)(number)
        for prefix in prefixes
        for number in {prefix.address - 1, prefix.address, prefix.last, prefix.last + 1}
        if 0 <= number < 1 << prefix.family.bits
    ]


@given(policies(), policies())
def test_a_move_is_another_owner_in_policies(first: Policy, second: Policy) -> None:
    """The same for whole policies of both families, at each end of each of their networks."""
    before, after = (
        [(prefix, each.name) for each in policy.identities for prefix in each.members] for policy in (first, second)
    )
    found = moves(classes(before), classes(after))
    was, becomes = by_name(before), by_name(after)
    for address in edges([prefix for prefix, _ in before + after]):
        owners = tuple(source and source[1] for source in (lookup(was, address), lookup(becomes, address)))
        told = [(move.before, move.after) for move in found for prefix in move.prefixes if address in prefix]
        assert told == ([owners] if owners[0] != owners[1] else [])


@given(_owned)
def test_aggregated_is_shortest(owned: Sources) -> None:
    """No two neighbours could be written as one: what is left are different parents, or ends that don't fit."""
    spans = classes([(prefix, "a") for prefix, _ in owned])
    found = aggregated([(span.family, span.first, span.last) for span in spans])
    for one, two in pairwise(found):
        parent = Prefix(one.family, one.address, one.length - 1) if not one.address & 1 << 32 - one.length else None
        assert not (parent and two.length == one.length and two.address == one.last + 1)


def test_who_loses_comes_first() -> None:
    """The moves that a reviewer has to see first stand first: who loses an identity, then who changes it."""
    before = sources("10.0.0.0/24 i", "10.1.0.0/24 i")
    after = sources("10.0.0.0/24 o", "10.2.0.0/24 o")
    assert [move.after is None for move in moves(classes(before), classes(after))] == [True, False, False]
    assert [move.before is None for move in moves(classes(before), classes(after))] == [False, False, True]


def test_hundred_thousand() -> None:
    """A list of 100,000 networks, every second of which changes hands, is one move of 50,000 prefixes."""
    networks = [Prefix(Family.IPV4, (10 << 24) + (number << 8), 24) for number in range(65_536)]
    networks += [Prefix(Family.IPV4, (11 << 24) + (number << 8), 24) for number in range(34_464)]
    before = classes([(network, "i") for network in networks])
    after = classes([(network, "io"[place % 2]) for place, network in enumerate(networks)])
    assert [(move.before, move.after, len(move.prefixes)) for move in moves(before, after)] == [("i", "o", 50_000)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("10.9.7.0/24", "256 IPv4 addresses", id="ipv4"),
        pytest.param("10.9.7.1 2001:db8::1", "1 IPv4 address, 1 IPv6 address", id="one-each"),
        pytest.param("2001:db8::/63 2001:db8:9::1", "2 IPv6 /64s, 1 IPv6 address", id="ipv6-networks"),
        pytest.param("0.0.0.0/0", "4,294,967,296 IPv4 addresses", id="all"),
    ],
)
def test_size(words: str, expected: str) -> None:
    """How many addresses move is said in numbers that say something."""
    assert size(map(Prefix.parse, words.split())) == expected


def test_few() -> None:
    """Of many prefixes the first are named, and how many more there are."""
    prefixes = [Prefix(Family.IPV4, number << 8, 24) for number in range(1_000)]
    assert few(prefixes[:2]) == "0.0.0.0/24, 0.0.1.0/24"
    assert few(prefixes, 1) == "0.0.0.0/24 and 999 more"
