"""Networks in columns are a set of networks, in their order."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Address, Family, Prefix, Prefixes
from tests.unit.values import any_prefix, prefixes

several = st.lists(any_prefix(), max_size=12)


def to_address(family: Family, number: int) -> Address:
    return IPv4Address(number) if family is Family.IPV4 else IPv6Address(number)


def edges(found: Iterable[Prefix]) -> set[Address]:
    """The ends of each network, and their neighbours."""
    numbers = {(each.family, end + step) for each in found for end in (each.address, each.last) for step in (-1, 0, 1)}
    return {to_address(family, number) for family, number in numbers if 0 <= number < 1 << family.bits}


@given(several, any_prefix())
def test_as_a_set_in_order(found: list[Prefix], other: Prefix) -> None:
    """Each is there once, in the order of Prefix, and no other is."""
    columns = Prefixes.of(found)
    assert [*columns] == sorted(set(found))
    assert (len(columns), bool(columns)) == (len(set(found)), bool(found))
    assert all(each in columns for each in found)
    assert (other in columns) == (other in found)
    assert columns.families == tuple(sorted({each.family for each in found}))


@given(several, several)
def test_equal(one: list[Prefix], other: list[Prefix]) -> None:
    """Two are equal, and have one hash, just when they hold the same."""
    left, right = Prefixes.of(one), Prefixes.of(other)
    assert (left == right) == (set(one) == set(other))
    assert hash(Prefixes.of(reversed(one))) == hash(left)


@given(st.lists(several, max_size=3))
def test_joined(found: list[list[Prefix]]) -> None:
    """Several joined are those of all of them."""
    assert Prefixes.joined(map(Prefixes.of, found)) == Prefixes.of(prefix for each in found for prefix in each)


@given(several)
def test_around(found: list[Prefix]) -> None:
    """The longest network that holds an address is found, and none where none does."""
    columns = Prefixes.of(found)
    for address in edges(found):
        holding = [each for each in found if address in each]
        assert columns.around(address) == max(holding, key=lambda each: each.length, default=None)


def test_no_column_is_empty() -> None:
    """What holds nothing has no columns, however it was made."""
    assert Prefixes.joined([prefixes(), prefixes()]).columns == prefixes().columns == {}
