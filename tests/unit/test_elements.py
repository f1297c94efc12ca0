"""Elements of a set become netlink's attributes and come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.attributes import attributes, each
from agent.kernel.elements import Elements, pack, stride, unpack

#: linux/netfilter/nf_tables.h: NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_DATA_VALUE.
ELEMENT, KEY, DATA, VALUE = 1, 1, 2, 1


@st.composite
def elements(draw: st.DrawFn) -> Elements:
    """Of a set or a map of either family, none too."""
    key_bytes = draw(st.sampled_from([4, 16]))
    count = draw(st.integers(0, 40))
    values = draw(st.sampled_from([0, 4]))
    data = draw(st.randoms(use_true_random=False))
    return Elements(key_bytes, data.randbytes(count * key_bytes), data.randbytes(count * values))


@given(elements())
def test_packed(packed: Elements) -> None:
    """Each element is an attribute with its key, and with its value if it has one, in the order given."""
    found = []
    for kind, data in each(pack(packed)):
        assert kind == ELEMENT
        element = attributes(data)
        assert list(element) == ([KEY, DATA] if packed.values else [KEY])
        found.append([attributes(part) for part in element.values()])
    keys = b"".join(element[0].pop(VALUE) for element in found)
    values = b"".join(element[1].pop(VALUE) for element in found if packed.values)
    assert (keys, values) == (packed.keys, packed.values)
    assert not any(part for element in found for part in element)


@given(elements(), st.booleans())
def test_unpacked(packed: Elements, valued: bool) -> None:
    """What was packed comes back; where there is nothing it doesn't matter whether there would be values."""
    valued = bool(packed.values) if packed.keys else valued
    assert unpack(pack(packed), packed.key_bytes, valued=valued) == packed


@given(elements(), st.integers(1, 50))
def test_parts(whole: Elements, count: int) -> None:
    """The parts of a block, one after the other, are the block."""
    parts = [whole.part(first, count) for first in range(0, len(whole), count)]
    assert all(0 < len(part) <= count for part in parts)
    assert b"".join(part.keys for part in parts) == whole.keys
    assert b"".join(part.values for part in parts) == whole.values


IPV4_MARKS = Elements(4, b"\x0a\x09\0\x05\x0a\x09\0\x06", b"\0\0\0\1\0\0\0\2")


@pytest.mark.parametrize(
    ("data", "key_bytes", "valued"),
    [
        pytest.param(pack(IPV4_MARKS), 4, False, id="a-map-as-a-set"),
        pytest.param(pack(Elements(4, IPV4_MARKS.keys)), 4, True, id="a-set-as-a-map"),
        pytest.param(pack(IPV4_MARKS), 16, True, id="another-family"),
        pytest.param(pack(IPV4_MARKS)[:-4], 4, True, id="cut-off"),
        pytest.param(pack(IPV4_MARKS) + b"\x08\0\3\0\0\0\0\1", 4, True, id="something-behind"),
        pytest.param(pack(IPV4_MARKS).replace(b"\x08\0\1\0", b"\x08\0\2\0"), 4, True, id="a-verdict"),
        pytest.param(pack(IPV4_MARKS).replace(b"\x0c\0\2\0", b"\x0c\0\3\0"), 4, True, id="as-long-without-value"),
    ],
)
def test_another_shape(data: bytes, key_bytes: int, valued: bool) -> None:
    """Elements with other attributes than those asked for are refused, whole."""
    with pytest.raises(ValueError, match=f"not elements with keys of {key_bytes} bytes"):
        unpack(data, key_bytes, valued=valued)


@pytest.mark.parametrize(
    ("key_bytes", "keys", "values", "fault"),
    [
        pytest.param(0, b"", b"", "0 bytes does not fill", id="no-key"),
        pytest.param(6, b"", b"", "6 bytes does not fill", id="half-a-register"),
        pytest.param(4, b"12345", b"", "5 bytes are no whole keys of 4", id="half-a-key"),
        pytest.param(4, b"1234", b"12345678", "8 bytes are not the values of 1 elements", id="too-many-values"),
        pytest.param(4, b"12345678", b"1234", "4 bytes are not the values of 2 elements", id="too-few-values"),
    ],
)
def test_not_whole(key_bytes: int, keys: bytes, values: bytes, fault: str) -> None:
    """Keys that don't fill registers, and values that aren't one for each key, are no elements."""
    with pytest.raises(ValueError, match=fault):
        Elements(key_bytes, keys, values)


@pytest.mark.parametrize(
    ("key_bytes", "valued", "size"),
    [
        pytest.param(4, True, 28, id="ipv4-map"),
        pytest.param(4, False, 16, id="ipv4-set"),
        pytest.param(16, True, 40, id="ipv6-map"),
        pytest.param(16, False, 28, id="ipv6-set"),
    ],
)
def test_stride(key_bytes: int, valued: bool, size: int) -> None:
    """An element takes its key, its value and four bytes of header for each of them, twice, and for itself."""
    assert stride(key_bytes, valued=valued) == size
