"""What the benchmarks draw their packets and policies from."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from agent.addresses import Family, Prefix
from tests.bench.sources import FLOWS, SHAPES, Sources, draw


@pytest.fixture(params=[*Family])
def mixed(request: pytest.FixtureRequest) -> Sources:
    """A thousand prefixes in four lengths."""
    return draw(request.param, "mixed", 1000, random.Random(1))


def test_disjoint(mixed: Sources) -> None:
    """No prefix lies in another: nft, which refuses overlaps, takes the same list as a policy does."""
    ordered = sorted(mixed.prefixes, key=lambda prefix: prefix.address)
    assert all(before.last < after.address for before, after in pairwise(ordered))


def test_lengths(mixed: Sources) -> None:
    """Each length stands in a list as often as the others."""
    lengths = [prefix.length for prefix in mixed.prefixes]
    assert {length: lengths.count(length) for length in set(lengths)} == dict.fromkeys(
        SHAPES["mixed"][mixed.family], 250
    )


def test_flows(mixed: Sources) -> None:
    """Every flow's address is a source of the list: no packet is measured that nobody marks."""
    size = mixed.family.bits // 8
    data = mixed.flows(random.Random(1))
    records = [data[at : at + size] for at in range(0, len(data), size + 2)]
    known = {*mixed.prefixes}
    lengths = SHAPES["mixed"][mixed.family]

    def networks(address: int) -> set[Prefix]:
        bits = mixed.family.bits
        return {Prefix(mixed.family, address >> bits - length << bits - length, length) for length in lengths}

    assert len(records) == FLOWS
    assert all(networks(int.from_bytes(record, "big")) & known for record in records)


def test_move(mixed: Sources) -> None:
    """As many sources as were asked for have got the other identity, and no other has."""
    before, after = dict(mixed.each()), dict(mixed.move(7, random.Random(1)).each())
    assert before.keys() == after.keys()
    assert sum(before[prefix] != after[prefix] for prefix in before) == 7
