"""Counters are read out of a dump of objects in whatever form a kernel writes them, and whatever lies between them.

The bytes are those that the kernel sends (linux/netfilter/nf_tables.h); that it does is for the kernel tests to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.attributes import attribute
from agent.kernel.counters import counts
from agent.kernel.netlink import HEADER
from agent.model import Count

#: The table's own handle.
TABLE = 7
#: enum nft_object_attributes.
NAME, TYPE, DATA, USE, HANDLE, PAD, USERDATA = 2, 3, 4, 5, 6, 7, 8
#: Behind table and name, in the orders that kernels have had.
ORDERS = [
    pytest.param((TYPE, HANDLE, USE, DATA), id="type-handle-use-data"),
    pytest.param((HANDLE, TYPE, USE, DATA), id="handle-type-use-data"),
    pytest.param((TYPE, USE, DATA, HANDLE), id="type-use-data-handle"),
]


@dataclass(frozen=True)
class Counter:
    """An object of a table; a counter as a rule."""

    name: str
    packets: int = 0
    octets: int = 0
    handle: int = 1
    use: int = 0
    userdata: bytes = b""
    table: str = "idmark"
    type: int = 1
    # Where 64 bits have to lie on a multiple of 8, an empty attribute may come before them (nla_put_64bit).
    padded: bool = False

    def message(self, order: tuple[int, ...]) -> bytes:
        """What the kernel says of it."""
        pad = attribute(PAD, b"") if self.padded else b""
        data = attribute(1, self.octets.to_bytes(8, "big")) + attribute(2, self.packets.to_bytes(8, "big"))
        body = {
            TYPE: attribute(TYPE, self.type.to_bytes(4, "big")),
            HANDLE: pad + attribute(HANDLE, self.handle.to_bytes(8, "big")),
            USE: attribute(USE, self.use.to_bytes(4, "big")),
            DATA: attribute(DATA | 0x8000, data) if self.use % 2 else attribute(DATA, data),
        }
        said = attribute(1, f"{self.table}\0".encode()) + attribute(NAME, f"{self.name}\0".encode())
        said += b"".join(body[kind] for kind in order)
        said += attribute(USERDATA, self.userdata) if self.userdata else b""
        return HEADER.pack(HEADER.size + 4 + len(said), 0xA12, 2, 1, 0) + bytes(4) + said

    @property
    def count(self) -> Count:
        """What is to be read of it."""
        return Count(self.packets, self.octets, TABLE << 64 | self.handle)


NUMBERS = st.integers(0, (1 << 64) - 1)
OBJECTS = st.builds(
    Counter,
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
    packets=NUMBERS,
    octets=NUMBERS,
    handle=NUMBERS,
    use=st.integers(0, 3),
    userdata=st.sampled_from([b"", b"", b"\0\x05mine\0"]),
    table=st.sampled_from(["idmark", "idmark", "idmark", "other", "idmark2"]),
    type=st.sampled_from([1, 1, 1, 2]),
    padded=st.booleans(),
)


@pytest.mark.parametrize("order", ORDERS)
@given(objects=st.lists(OBJECTS, max_size=12, unique_by=lambda each: each.name))
def test_as_they_are(order: tuple[int, ...], objects: list[Counter]) -> None:
    """A table's counters are read with all their bits, whatever the first one looks like; and nothing else is."""
    ours = {each.name: each for each in objects if each.table == "idmark" and each.type == 1}
    found = counts([each.message(order) for each in objects], "idmark", TABLE)
    assert found == {name: each.count for name, each in ours.items()}
    assert {name: count.handle for name, count in found.items()} == {
        name: each.count.handle for name, each in ours.items()
    }


def test_name_that_is_no_text() -> None:
    """A counter that somebody gave a name of other bytes than UTF-8 keeps no other one from being read."""
    order = (TYPE, HANDLE, USE, DATA)
    odd = Counter("odd-", packets=3, handle=2).message(order).replace(b"odd-", b"odd\xff")
    found = counts([Counter("even", packets=1).message(order), odd], "idmark", TABLE)
    assert {name: count.packets for name, count in found.items()} == {"even": 1, "odd�": 3}
