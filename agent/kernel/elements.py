"""Elements of an nf_tables set as netlink's attributes (linux/netfilter/nf_tables.h), and back.

Addresses go in columns: the elements of their sets all have the same shape, so the attributes are one template over and
over, into which the keys are laid by 32-bit words, with no Python object each. They are written as the kernel writes
them, without NLA_F_NESTED, which it doesn't ask for either.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, Sequence

from agent.addresses import Addresses, Family
from agent.kernel.attributes import attribute

#: In each element. A key is a struct nft_data with a plain value; what a map has for it is a verdict or an object.
LIST_ELEMENT, ELEMENT_KEY, ELEMENT_DATA, ELEMENT_OBJECT = 1, 1, 2, 9
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
#: linux/netfilter.h and nf_tables.h.
VERDICTS = {0: "drop", 1: "accept", -1: "continue", -2: "break", -3: "jump", -4: "goto", -5: "return"}
CODES = {word: code for code, word in VERDICTS.items()}
WORD = 4
#: Words of headers before an element's key: its own, the key's, the plain value's.
BEFORE_KEY = 3
#: Bytes that a name fills in a key (linux/if.h, IFNAMSIZ).
IFNAMSIZ = 16


def pack(elements: Sequence[tuple[str, str]], key: str) -> bytes:
    """The attributes of elements as nft writes them, one after the other: the inside of NFTA_SET_ELEM_LIST_ELEMENTS.

    `key` is the type of a set's keys, as in `NftSet`.
    """
    if isinstance(elements, Addresses):
        return _pack_addresses(elements)
    types = key.split(" . ")
    return b"".join(_element(words, value, types) for words, value in elements)


def _element(words: str, value: str, types: list[str]) -> bytes:
    parts = words.split(" . ")
    packed = b"".join(_key(part, kind) for part, kind in zip(parts, types, strict=True))
    return attribute(LIST_ELEMENT, attribute(ELEMENT_KEY, attribute(DATA_VALUE, packed)) + _value(value))


def _key(part: str, kind: str) -> bytes:
    """A part of a key; each fills whole 32-bit registers."""
    match kind:
        case "ipv4_addr":
            return socket.inet_pton(socket.AF_INET, part)
        case "ipv6_addr":
            return socket.inet_pton(socket.AF_INET6, part)
        case "mark":  # a register's own byte order
            return int(part, 16).to_bytes(4, sys.byteorder)
        case "ifname":
            return part.strip('"').encode().ljust(IFNAMSIZ, b"\0")
    raise ValueError(f"no key of ours is a {kind}")


def _value(value: str) -> bytes:
    if not value:
        return b""
    if value.startswith('"'):
        return attribute(ELEMENT_OBJECT, _text(value.strip('"')))
    verb, _, chain = value.partition(" ")
    if verb not in CODES:
        raise ValueError(f"no verdict or object: {value}")
    verdict = attribute(VERDICT_CODE, struct.pack(">i", CODES[verb]))
    if chain:
        verdict += attribute(VERDICT_CHAIN, _text(chain))
    return attribute(ELEMENT_DATA, attribute(DATA_VERDICT, verdict))


def _text(name: str) -> bytes:
    return f"{name}\0".encode()


# --- addresses -------------------------------------------------------------------------------------------------------


def stride(family: Family) -> int:
    """The bytes that an address takes in a message."""
    return len(_template(family))


def _pack_addresses(addresses: Addresses) -> bytes:
    data = bytearray(_template(addresses.family) * len(addresses))
    for there, here in _columns(data, addresses.family, addresses.packed):
        there[:] = here
    return bytes(data)


def unpack(data: bytes | bytearray, family: Family) -> Addresses:
    """What `pack` made of addresses, as the kernel has it in a dump too. Raises ValueError for any other shape."""
    count, rest = divmod(len(data), stride(family))
    keys = bytearray(count * family.size)
    if not rest:
        for there, here in _columns(data, family, keys):
            here[:] = there
    if _template_of(data, family) != _template(family) * count or rest:
        raise ValueError(f"not a set of {family} addresses")
    return Addresses.sorted(family, bytes(keys))


def _template_of(data: bytes | bytearray, family: Family) -> bytes:
    """The attributes without their keys."""
    blank = bytearray(data)
    if len(data) % stride(family) == 0:
        for there, here in _columns(blank, family, bytes(len(data) // stride(family) * family.size)):
            there[:] = here
    return bytes(blank)


def _template(family: Family) -> bytes:
    """An element whose key is zero."""
    return attribute(LIST_ELEMENT, attribute(ELEMENT_KEY, attribute(DATA_VALUE, bytes(family.size))))


def _columns(
    data: bytes | bytearray, family: Family, keys: bytes | bytearray
) -> Iterator[tuple[memoryview, memoryview]]:
    """Views of the same words: each in `data`, and in `keys`."""
    if not data:  # a view of nothing can't be cast
        return
    step, width = stride(family) // WORD, family.bits // 32
    words, packed = memoryview(data).cast("I"), memoryview(keys).cast("I")
    for column in range(width):
        yield words[BEFORE_KEY + column :: step], packed[column::width]
