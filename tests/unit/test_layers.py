"""The sets that are asked for an address: the first that knows it is its longest prefix's, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import layers as module
from agent.addresses import Addresses, Family, Prefix
from agent.layers import MANY, SETS, Layer, layers
from tests.unit.values import by_name

Sources = list[tuple[Prefix, str]]
#: Forces a shape, whatever the number of sources.
Forced = Callable[[pytest.MonkeyPatch], None]

# --- a plain trie ----------------------------------------------------------------------------------------------------


class Trie:
    """Sources by their bits, one node a bit: slow and plain."""

    def __init__(self, sources: Iterable[tuple[Prefix, str]]) -> None:
        self.root: dict[str, object] = {}
        for prefix, name in sources:
            node = self.root
            for bit in f"{prefix.address:0{prefix.family.bits}b}"[: prefix.length]:
                node = node.setdefault(bit, {})  # type: ignore[assignment]
            node["name"] = name

    def owner(self, family: Family, address: int) -> str:
        """Whose an address is by its longest prefix; "": nobody's."""
        node: object = self.root
        found = ""
        for bit in [*f"{address:0{family.bits}b}", ""]:
            assert isinstance(node, dict)
            found = node.get("name", found)
            node = node.get(bit)
            if node is None:
                break
        return found


def asked(found: Sequence[Layer], family: Family, address: int) -> str:
    """Whose an address is to who asks one layer after the other, as the chains do."""
    for layer in found:
        if layer.length is None:
            for key, verdict in layer.elements:
                if _within(key, address):
                    return verdict.removeprefix("goto id-")
            continue
        mask = int(ip_address(layer.mask)) if layer.mask else (1 << family.bits) - 1
        key = str(ip_address((address & mask).to_bytes(family.bits // 8, "big")))
        value = dict(layer.elements).get(key)
        if value is not None:
            assert bool(value) != bool(layer.identity)
            return layer.identity or value.removeprefix("goto id-")
    return ""


def _within(key: str, address: int) -> bool:
    """Whether an element of intervals, as nft writes it, holds an address."""
    first, dash, last = key.partition("-")
    if dash:
        return int(ip_address(first)) <= address <= int(ip_address(last))
    prefix = Prefix.parse(key)
    return prefix.address <= address <= prefix.last


# --- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def sources(draw: st.DrawFn, family: Family) -> Sources:
    """Networks of a family, many within each other, at both of its ends; all lengths may be there."""
    found: dict[Prefix, str] = {}
    for _ in range(draw(st.integers(0, 12))):
        host_bits = draw(st.sampled_from([0, 1, 2, 3, 4, 9, family.bits - 1, family.bits]))
        address = draw(st.integers(0, 31)) ^ draw(st.sampled_from([0, (1 << family.bits) - 1]))
        found[Prefix(family, address >> host_bits << host_bits, family.bits - host_bits)] = draw(st.sampled_from("abc"))
    return list(found.items())


def places(made: Sources, family: Family) -> set[int]:
    """Addresses at every edge, and some more."""
    top = (1 << family.bits) - 1
    edges = {edge + step for prefix, _ in made for edge in (prefix.address, prefix.last) for step in (-1, 0, 1)}
    return {place for place in (*edges, 0, 7, 31, 1 << 20, top - 5, top) if 0 <= place <= top}


NEVER = ((1, 10**9),)
FREE = ((1, 0),)


def as_sets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "MANY", -1)
    patch.setattr(module, "SETS", 10**9)


def as_maps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "MANY", 10**9)
    patch.setattr(module, "HASH", FREE)


def as_intervals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "MANY", 10**9)
    patch.setattr(module, "HASH", NEVER)
    patch.setattr(module, "INTERVAL", FREE)


SHAPES: dict[str, tuple[Forced, Callable[[tuple[Layer, ...]], bool]]] = {
    "sets": (as_sets, lambda found: all(layer.identity for layer in found)),
    "maps": (as_maps, lambda found: not any(layer.identity or layer.length is None for layer in found)),
    "intervals": (as_intervals, lambda found: [layer.length for layer in found] == [None]),
}


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", Family)
@given(data=st.data())
def test_longest_prefix(shape: str, family: Family, data: st.DataObject) -> None:
    """In every shape the first layer that knows an address says what a trie does."""
    made = data.draw(sources(family))
    force, has_shape = SHAPES[shape]
    with pytest.MonkeyPatch.context() as patch:
        force(patch)
        found = layers(family, by_name(made))
    assert has_shape(found) or not made
    trie = Trie(made)
    for place in places(made, family):
        assert asked(found, family, place) == trie.owner(family, place)


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data(), order=st.randoms(use_true_random=False))
def test_order_of_lines(shape: str, data: st.DataObject, order: object) -> None:
    """The order of a policy's lines, and what it says twice, make no difference to any layer."""
    made = data.draw(sources(Family.IPV4))
    shuffled = [*made, *made[:3]]
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        SHAPES[shape][0](patch)
        assert layers(Family.IPV4, by_name(shuffled)) == layers(Family.IPV4, by_name(made))


@given(st.data(), st.sets(st.sampled_from("abc")))
def test_hosts(data: st.DataObject, hosts: set[str]) -> None:
    """A place for whole addresses, empty so far, comes first and changes nothing."""
    made = data.draw(sources(Family.IPV6))
    found, trie = layers(Family.IPV6, by_name(made), sorted(hosts)), Trie(made)
    for place in places(made, Family.IPV6):
        assert asked(found, Family.IPV6, place) == trie.owner(Family.IPV6, place)
    if hosts and found[0].length is not None:
        assert found[0].length == 128


def test_the_other_family_is_not_asked() -> None:
    """Sources of the other family are in no layer of this one."""
    made = [(Prefix.parse("10.9.0.0/24"), "a"), (Prefix.parse("2001:db8::/32"), "b")]
    assert [(layer.name, *layer.elements) for layer in layers(Family.IPV4, by_name(made))] == [
        ("sources-ipv4-24", ("10.9.0.0", "goto id-a"))
    ]
    assert [(layer.name, *layer.elements) for layer in layers(Family.IPV6, by_name(made))] == [
        ("sources-ipv6-32", ("2001:db8::", "goto id-b"))
    ]


# --- which shape -----------------------------------------------------------------------------------------------------


def many(family: Family, lengths: Sequence[int], count: int, names: str = "a") -> Sources:
    """That many networks of each length, of these identities in turn."""
    return [
        (Prefix(family, number << family.bits - length, length), names[number % len(names)])
        for length in lengths
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("made", "named"),
    [
        pytest.param([], [], id="nobody"),
        pytest.param(many(Family.IPV4, [32], 2, "ab"), ["sources-ipv4-32"], id="two-addresses"),
        pytest.param(
            many(Family.IPV4, [32, 24, 16], 4, "ab"),
            ["sources-ipv4-32", "sources-ipv4-24", "sources-ipv4-16"],
            id="three-lengths",
        ),
        pytest.param(many(Family.IPV4, range(16, 33), 4, "ab"), ["sources-ipv4"], id="few-of-many-lengths"),
        pytest.param(many(Family.IPV4, [32], MANY, "ab"), ["sources-ipv4-32"], id="not-yet-many"),
        pytest.param(many(Family.IPV4, [32], MANY + 1, "ab"), ["id-a-ipv4-32", "id-b-ipv4-32"], id="many"),
        pytest.param(
            many(Family.IPV4, [24, 32], 3000, "ab"),
            ["id-a-ipv4-32", "id-b-ipv4-32", "id-a-ipv4-24", "id-b-ipv4-24"],
            id="many-of-two-lengths",
        ),
        pytest.param(
            many(Family.IPV6, [64], MANY + 1, "abcdefghijklmnopqrstuvwxyz0123456"),
            ["sources-ipv6-64"],
            id="many-of-more-identities-than-sets",
        ),
        pytest.param(
            many(Family.IPV6, range(48, 64), 500, "abc"), ["sources-ipv6"], id="many-of-many-lengths-and-identities"
        ),
    ],
)
def test_shape(made: Sources, named: list[str]) -> None:
    """The shape is the one that costs a packet least; with many sources, sets of each identity while they are few."""
    family = made[0][0].family if made else Family.IPV4
    found = layers(family, by_name(made))
    assert [layer.name for layer in found] == named
    assert len(found) <= SETS or not made


@pytest.mark.parametrize(
    ("made", "hosts", "named"),
    [
        pytest.param([], ["a"], ["sources-ipv4-32"], id="nothing-yet"),
        pytest.param([("10.9.0.0/24", "b")], ["a"], ["sources-ipv4-32", "sources-ipv4-24"], id="before-networks"),
        pytest.param([("192.0.2.1", "a")], ["a"], ["sources-ipv4-32"], id="there-already"),
    ],
)
def test_place_for_hosts(made: list[tuple[str, str]], hosts: list[str], named: list[str]) -> None:
    """Who may get addresses at any moment has a set for them, so that no rule changes when one comes."""
    found = layers(Family.IPV4, by_name((Prefix.parse(text), name) for text, name in made), hosts)
    assert [layer.name for layer in found] == named


def test_place_for_hosts_among_many() -> None:
    """Where each identity has sets of its own, the place is a set of its own too."""
    found = layers(Family.IPV4, by_name(many(Family.IPV4, [24], MANY + 1, "ab")), ["c"])
    assert [layer.name for layer in found] == ["id-c-ipv4-32", "id-a-ipv4-24", "id-b-ipv4-24"]
    assert found[0].elements == Addresses(Family.IPV4)


@pytest.mark.parametrize(
    ("family", "length", "mask"),
    [
        pytest.param(Family.IPV4, 32, "", id="whole"),
        pytest.param(Family.IPV4, 24, "255.255.255.0", id="ipv4"),
        pytest.param(Family.IPV4, 0, "0.0.0.0", id="everything"),
        pytest.param(Family.IPV4, None, "", id="intervals"),
        pytest.param(Family.IPV6, 128, "", id="whole-ipv6"),
        pytest.param(Family.IPV6, 52, "ffff:ffff:ffff:f000::", id="ipv6"),
    ],
)
def test_mask(family: Family, length: int | None, mask: str) -> None:
    """The mask keeps as many bits as the prefixes have; where nothing is cut off there is none."""
    assert Layer("x", family, length, "a", ()).mask == mask
