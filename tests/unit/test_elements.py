"""Elements of a set become netlink's attributes; addresses come back."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Addresses, Family
from agent.kernel import nfnl
from agent.kernel.attributes import attributes, each, number, text
from agent.kernel.elements import pack, stride, unpack

#: linux/netfilter/nf_tables.h: NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE.
ELEMENT, KEY, VALUE = 1, 1, 1

families = st.sampled_from(Family)


@st.composite
def addresses(draw: st.DrawFn) -> Addresses:
    """Of either family, none too."""
    family = draw(families)
    return Addresses.of(family, draw(st.lists(st.integers(0, (1 << family.bits) - 1), max_size=40)))


def keys(data: bytes) -> Iterator[bytes]:
    """The keys of elements that have nothing else."""
    for kind, element in each(data):
        assert kind == ELEMENT
        parts = attributes(element)
        assert list(parts) == [KEY]
        value = attributes(parts[KEY])
        assert list(value) == [VALUE]
        yield value[VALUE]


@given(addresses())
def test_packed(packed: Addresses) -> None:
    """Each address is an attribute with its key, and nothing else, in the order given."""
    data = pack(packed, f"{packed.family}_addr")
    assert b"".join(keys(data)) == packed.packed
    assert len(data) == len(packed) * stride(packed.family)


@given(addresses())
def test_packed_as_any_other(packed: Addresses) -> None:
    """Addresses in columns are, byte for byte, what one after the other makes of their texts."""
    key = f"{packed.family}_addr"
    assert pack(packed, key) == pack(tuple(packed), key)


@given(addresses())
def test_unpacked(packed: Addresses) -> None:
    """What was packed comes back."""
    assert unpack(pack(packed, f"{packed.family}_addr"), packed.family) == packed


@given(addresses(), st.randoms(use_true_random=False))
def test_unpacked_in_order(packed: Addresses, order: object) -> None:
    """The kernel's hash has an order of its own; what is read back is sorted."""
    pairs = list(packed)
    order.shuffle(pairs)  # type: ignore[attr-defined]
    assert unpack(pack(tuple(pairs), f"{packed.family}_addr"), packed.family) == packed


TWO = (("10.9.0.5", ""), ("10.9.0.6", ""))
SET = pack(TWO, "ipv4_addr")
MAP = pack((("10.9.0.5", "goto a"), ("10.9.0.6", "goto b")), "ipv4_addr")


@pytest.mark.parametrize(
    ("data", "family"),
    [
        pytest.param(MAP, Family.IPV4, id="a-map"),
        pytest.param(pack((("10.9.0.5", '"c"'),), "ipv4_addr"), Family.IPV4, id="a-map-of-objects"),
        pytest.param(SET, Family.IPV6, id="another-family"),
        pytest.param(SET[:-4], Family.IPV4, id="cut-off"),
        pytest.param(SET + b"\x08\0\3\0\0\0\0\1", Family.IPV4, id="something-behind"),
        pytest.param(SET[:-16] + b"\x10\0\1\0\x0c\0\3\0\0\0\0\1\0\0\0\0", Family.IPV4, id="as-long-without-key"),
        pytest.param(SET.replace(b"\x08\0\1\0", b"\x08\0\2\0"), Family.IPV4, id="a-verdict-for-a-key"),
        pytest.param(pack((("10.9.0.5 . eth0", ""),), "ipv4_addr . ifname"), Family.IPV4, id="several-keys"),
    ],
)
def test_another_shape(data: bytes, family: Family) -> None:
    """Elements with other attributes than addresses have are refused, whole."""
    with pytest.raises(ValueError, match=f"not a set of {family} addresses"):
        unpack(data, family)


@pytest.mark.parametrize(("family", "size"), [(Family.IPV4, 16), (Family.IPV6, 28)])
def test_stride(family: Family, size: int) -> None:
    """An element takes its key, and four bytes of header for the plain value, for the key and for itself."""
    assert stride(family) == size


# --- elements of any set of ours -------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_-]{0,14}", fullmatch=True)
#: The parts of our keys as nft writes them, by their types.
PARTS = {
    "ipv4_addr": st.ip_addresses(v=4).map(str),
    "ipv6_addr": st.ip_addresses(v=6).map(lambda address: socket.inet_ntop(socket.AF_INET6, address.packed)),
    "mark": st.integers(0, 0xFFFFFFFF).map("0x{:08x}".format),
    "ifname": names.map('"{}"'.format),
}
TYPES = ["ipv4_addr", "ipv6_addr", "mark", "ifname", "mark . ifname", "ipv4_addr . ifname", "ipv6_addr . ifname"]
VERDICTS = st.sampled_from(["accept", "drop", "continue", "break", "return"])
values = (
    st.just("") | names.map("goto id-{}".format) | names.map("jump {}".format) | names.map('"{}"'.format) | VERDICTS
)


@st.composite
def elements(draw: st.DrawFn) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A type of keys, and elements with such, whatever they have for them."""
    types = draw(st.sampled_from(TYPES))
    key = st.tuples(*(PARTS[kind] for kind in types.split(" . "))).map(" . ".join)
    return types, tuple(draw(st.lists(st.tuples(key, values), max_size=8)))


#: libnftables' numbers of these types (nfnl.KEY_TYPES).
NUMBERS = {name: kind for kind, name in nfnl.KEY_TYPES.items()}


@given(elements())
def test_read_as_written(made: tuple[str, tuple[tuple[str, str], ...]]) -> None:
    """Keys and values of all kinds of ours, and verdicts that somebody else may have put there, come back as words."""
    types, pairs = made
    found = []
    for kind, data in each(pack(pairs, types)):
        assert kind == ELEMENT
        element = attributes(data)
        key = attributes(element[KEY])[VALUE]
        assert len(key) == sum(nfnl.KEY_BYTES[part] for part in types.split(" . "))
        found.append((nfnl._key(key, types.split(" . ")), nfnl._value(element)))
    assert tuple(found) == pairs


@pytest.mark.parametrize(
    ("pairs", "types", "fault"),
    [
        pytest.param([("80", "")], "inet_service", "no key of ours is a inet_service", id="key"),
        pytest.param([("10.9.0.5", "queue")], "ipv4_addr", "no verdict or object: queue", id="value"),
        pytest.param([("0x01000000", "")], "mark . ifname", "longer than", id="a-part-missing"),
        pytest.param([("*", "")], "mark", "invalid literal", id="all-others"),
    ],
)
def test_no_element_of_ours(pairs: list[tuple[str, str]], types: str, fault: str) -> None:
    """What can't be packed is refused, and never sent as something else."""
    with pytest.raises(ValueError, match=fault):
        pack(pairs, types)


def test_verdict() -> None:
    """A goto is its number, negative and big-endian, and its chain's name with a NUL (NFTA_VERDICT_CODE, _CHAIN)."""
    ((_, data),) = each(pack([("10.9.0.5", "goto id-inside")], "ipv4_addr"))
    verdict = attributes(attributes(attributes(data)[2])[2])
    assert (number(verdict[1]), text(verdict[2]), verdict[2][-1]) == (0xFFFFFFFC, "id-inside", 0)


few = st.frozensets(st.integers(0, 40))


@given(held=few, gone=few, new=few, family=families)
def test_changed(held: frozenset[int], gone: frozenset[int], new: frozenset[int], family: Family) -> None:
    """After a change a set holds what it held, without what went, and what came."""
    before, went, came = (Addresses.of(family, numbers) for numbers in (held, gone, new))
    assert before.changed(went, came) == Addresses.of(family, (held - gone) | new)
