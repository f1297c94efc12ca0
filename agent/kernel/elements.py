"""Elements of an nf_tables set as blocks of bytes: their keys, their values, and netlink's attributes around them.

The elements of one set all have the same shape, so their attributes are one template over and over, into which keys and
values are laid in columns of 32-bit words: no Python object per element. The attributes are those of
linux/netfilter/nf_tables.h, written as the kernel writes them: without NLA_F_NESTED, which it doesn't ask for either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.kernel.attributes import attribute

#: In each element; a key and a value are a struct nft_data, of which ours have a plain value.
LIST_ELEMENT, ELEMENT_KEY, ELEMENT_DATA, DATA_VALUE = 1, 1, 2, 1
#: Bytes of a value: one register.
VALUE_BYTES = 4
WORD = 4
#: Words of headers before an element's key (its own, the key's, the plain value's), and between key and value.
BEFORE_KEY, BEFORE_VALUE = 3, 2


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements of one set; the order says nothing. Raises ValueError if keys or values are not whole.

    `key_bytes` is 4 for IPv4 addresses and 16 for IPv6 ones; `keys` holds them one after the other, in network byte
    order. `values` holds the 4 bytes of each one's mark as a register does, in the host's byte order; a set that is no
    map has none.
    """

    key_bytes: int
    keys: bytes = b""
    values: bytes = b""

    def __post_init__(self) -> None:
        if self.key_bytes <= 0 or self.key_bytes % WORD:
            raise ValueError(f"a key of {self.key_bytes} bytes does not fill registers of {WORD}")
        if len(self.keys) % self.key_bytes:
            raise ValueError(f"{len(self.keys)} bytes are no whole keys of {self.key_bytes}")
        if self.values and len(self.values) != len(self) * VALUE_BYTES:
            raise ValueError(f"{len(self.values)} bytes are not the values of {len(self)} elements")

    def __len__(self) -> int:
        return len(self.keys) // self.key_bytes

    def part(self, first: int, count: int) -> Elements:
        """At most `count` elements, from the one at place `first` on."""
        keys, values = self.key_bytes, VALUE_BYTES
        last = first + count
        return Elements(keys, self.keys[first * keys : last * keys], self.values[first * values : last * values])


def stride(key_bytes: int, *, valued: bool) -> int:
    """The bytes that one element takes in a message."""
    return len(_template(key_bytes, valued=valued))


def pack(elements: Elements) -> bytes:
    """The attributes of the elements, one after the other: the inside of an NFTA_SET_ELEM_LIST_ELEMENTS."""
    data = bytearray(_template(elements.key_bytes, valued=bool(elements.values)) * len(elements))
    for there, here in _columns(data, elements.key_bytes, elements.keys, elements.values):
        there[:] = here
    return bytes(data)


def unpack(data: bytes | bytearray, key_bytes: int, *, valued: bool) -> Elements:
    """What `pack` made, as the kernel has it in a dump too. Raises ValueError if an element has another shape."""
    count, rest = divmod(len(data), stride(key_bytes, valued=valued))
    keys, values = bytearray(count * key_bytes), bytearray(count * VALUE_BYTES if valued else 0)
    if not rest:
        for there, here in _columns(data, key_bytes, keys, values):
            here[:] = there
    elements = Elements(key_bytes, bytes(keys), bytes(values))
    if pack(elements) != data:
        raise ValueError(f"not elements with keys of {key_bytes} bytes and {'a mark' if valued else 'no value'} each")
    return elements


def _template(key_bytes: int, *, valued: bool) -> bytes:
    """An element whose key and value are zeros."""
    key = attribute(ELEMENT_KEY, attribute(DATA_VALUE, bytes(key_bytes)))
    value = attribute(ELEMENT_DATA, attribute(DATA_VALUE, bytes(VALUE_BYTES))) if valued else b""
    return attribute(LIST_ELEMENT, key + value)


def _columns(
    data: bytes | bytearray, key_bytes: int, keys: bytes | bytearray, values: bytes | bytearray
) -> Iterator[tuple[memoryview, memoryview]]:
    """Views of the same words: each in `data`, and in `keys` or `values`."""
    if not data:  # a view of nothing can't be cast
        return
    step = stride(key_bytes, valued=bool(values)) // WORD
    width = key_bytes // WORD
    words, packed = memoryview(data).cast("I"), memoryview(keys).cast("I")
    for column in range(width):
        yield words[BEFORE_KEY + column :: step], packed[column::width]
    if values:
        yield words[BEFORE_KEY + width + BEFORE_VALUE :: step], memoryview(values).cast("I")
