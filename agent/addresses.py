"""Addresses and networks, one at a time and by the million. Standard library only."""

from __future__ import annotations

import enum
import socket
import struct
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, filterfalse, islice, repeat
from operator import eq
from typing import NamedTuple, overload

Address = IPv4Address | IPv6Address


class Family(enum.StrEnum):
    """An address family, named as in the metrics' `family` label."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"

    #: AF_INET or AF_INET6; how many bits an address has, and how many bytes. Attributes, for they are asked for a
    #: million times.
    number: int
    bits: int
    size: int

    #: A member's own hash is a Python function (enum.Enum.__hash__), and a million prefixes are hashed by it.
    __hash__ = str.__hash__

    def __init__(self, name: str) -> None:
        self.number = socket.AF_INET if name == "ipv4" else socket.AF_INET6
        self.bits = 32 if name == "ipv4" else 128
        self.size = self.bits // 8

    @property
    def nft(self) -> str:
        """The nft payload keyword: `ip` or `ip6`."""
        return "ip" if self is Family.IPV4 else "ip6"

    @property
    def ip(self) -> str:
        """The ip(8) command of this family, as an operator types it."""
        return "ip" if self is Family.IPV4 else "ip -6"

    @classmethod
    def of(cls, address: Address) -> Family:
        """The family of an address."""
        return cls.IPV4 if address.version == 4 else cls.IPV6


class Prefix(NamedTuple):
    """A network: family, first address as an integer, length in bits. Sorts by family, address, length.

    A named tuple and not a class of `ipaddress`, which takes many times as long to read and to compare.
    """

    family: Family
    address: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read `10.9.0.0/24`, `2001:db8::/32` or a bare address.

        Raises ValueError, whose text completes "TEXT …": "is not a network", "has host bits set: …".
        """
        head, slash, tail = text.partition("/")
        family = Family.IPV6 if ":" in head else Family.IPV4
        try:
            address = int.from_bytes(socket.inet_pton(family.number, head), "big")
        except (OSError, ValueError):  # ValueError: an embedded NUL, or not ASCII
            raise ValueError("is not a network") from None
        bits = length = family.bits
        # No sign, no blank, no "٣": what int() would take besides is no prefix length.
        if slash and not (tail.isascii() and tail.isdigit() and len(tail) <= 3 and (length := int(tail)) <= bits):
            raise ValueError("is not a network")
        if length < bits and address & (host := (1 << bits - length) - 1):
            raise ValueError(f"has host bits set: the network is {cls(family, address & ~host, length)}")
        return tuple.__new__(cls, (family, address, length))  # as cls() does, by a function less

    @classmethod
    def host(cls, address: Address) -> Prefix:
        """The network of one address."""
        return cls(Family.of(address), int(address), address.max_prefixlen)

    @classmethod
    def default(cls, family: Family) -> Prefix:
        """0.0.0.0/0 or ::/0."""
        return cls(family, 0, 0)

    @property
    def last(self) -> int:
        """The last address, as an integer."""
        return self.address | (1 << self.family.bits - self.length) - 1

    def __contains__(self, address: object) -> bool:
        """Whether an IPv4Address or IPv6Address lies in the network."""
        if not isinstance(address, IPv4Address | IPv6Address):
            raise TypeError(f"{address!r} is no address")
        return Family.of(address) is self.family and self.address <= int(address) <= self.last

    def __str__(self) -> str:
        """As nft and ip(8) print it: a whole address goes without its length."""
        text = address_text(self.family, self.address)
        return text if self.length == self.family.bits else f"{text}/{self.length}"


def address_text(family: Family, value: int) -> str:
    """The usual text of an address given as an integer."""
    return socket.inet_ntop(family.number, value.to_bytes(family.size, "big"))


def sorted_addresses(addresses: Iterable[Address]) -> tuple[Address, ...]:
    """IPv4 first, then by value; each once."""
    return tuple(sorted(set(addresses), key=lambda address: (address.version, int(address))))


def parse_address(text: str) -> Address:
    """An address from its text, without a zone (`%eth0`). Raises ValueError: "is not an address"."""
    try:
        return ip_address(text.replace("%", " "))
    except ValueError:
        raise ValueError("is not an address") from None


# --- by the million --------------------------------------------------------------------------------------------------


class Addresses(Sequence[tuple[str, str]]):
    """Addresses of one family, in order, each once; as a set of nft has them for elements: text only where it is read.

    `packed` holds them one after the other, in network byte order. There may be a million.
    """

    __slots__ = ("_lines", "family", "packed")

    def __init__(self, family: Family, packed: bytes = b"") -> None:
        self.family, self.packed = family, packed
        self._lines: str | None = None

    @classmethod
    def of(cls, family: Family, addresses: Iterable[int]) -> Addresses:
        """From addresses as integers, in any order."""
        return cls(family, b"".join(value.to_bytes(family.size, "big") for value in sorted(set(addresses))))

    @classmethod
    def sorted(cls, family: Family, packed: bytes | bytearray) -> Addresses:
        """From packed addresses in any order."""
        keys = sorted(cls(family, bytes(packed)).each())
        twice = any(map(eq, keys, islice(keys, 1, None)))
        return cls(family, b"".join(dict.fromkeys(keys) if twice else keys))

    def without(self, others: Addresses) -> Addresses:
        """Those that are not among others."""
        return Addresses(self.family, b"".join(filterfalse(set(others.each()).__contains__, self.each())))

    def changed(self, gone: Addresses, new: Addresses) -> Addresses:
        """With some gone and others come, at a cost by the size of the change, but for one copy of the rest."""
        if not self:
            return new
        size, packed = self.family.size, memoryview(self.packed)
        coming = set(new.each())
        parts: list[bytes | memoryview] = []
        rest = 0
        for key in sorted(coming.union(gone.each())):
            place = self.place(key, rest)
            parts.append(packed[rest * size : place * size])
            parts.append(key if key in coming else b"")
            rest = place + (packed[place * size : (place + 1) * size] == key)
        return Addresses(self.family, b"".join((*parts, packed[rest * size :])))

    def place(self, key: bytes, first: int = 0) -> int:
        """Where a packed address is, or would be; not before `first`."""
        size = self.family.size
        return bisect_left(range(len(self)), key, lo=first, key=lambda at: self.packed[at * size : (at + 1) * size])

    def next(self, address: int) -> int | None:
        """The first one, as integers, that is not before an address; None: all are."""
        place = self.place(address.to_bytes(self.family.size, "big"))
        return self.number(place) if place < len(self) else None

    def each(self) -> Iterator[bytes]:
        """Packed, one by one, by no code of Python's for each."""
        return chain.from_iterable(struct.iter_unpack(f"{self.family.size}s", self.packed))

    def numbers(self) -> Iterator[int]:
        """As integers."""
        return map(int.from_bytes, self.each())  # in network byte order, its default

    def number(self, place: int) -> int:
        """The one at a place, as an integer."""
        size = self.family.size
        return int.from_bytes(self.packed[place * size : (place + 1) * size], "big")

    def texts(self) -> Iterator[str]:
        """In their usual text."""
        return map(socket.inet_ntop, repeat(self.family.number), self.each())

    def text(self, between: str) -> str:
        """All their texts in one. Kept, for what is applied is written three times: plan, ruleset and policy."""
        if self._lines is None:
            self._lines = "\n".join(self.texts())
        return self._lines.replace("\n", between)

    def __len__(self) -> int:
        return len(self.packed) // self.family.size

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self.texts(), repeat(""))

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> Addresses: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | Addresses:
        """One of them, or those side by side (no slice with a step)."""
        size = self.family.size
        first, last, _ = (index if isinstance(index, slice) else slice(index, index + 1 or None)).indices(len(self))
        part = Addresses(self.family, self.packed[first * size : last * size])
        if isinstance(index, slice):
            return part
        if not part:
            raise IndexError(index)
        return next(iter(part))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Addresses) and (self.family, self.packed) == (other.family, other.packed)

    def __hash__(self) -> int:
        return hash((self.family, self.packed))

    def __repr__(self) -> str:
        return f"Addresses({self.family}, {len(self)} of them)"


class Prefixes(Collection[Prefix]):
    """Networks, each once, in columns: by family and length the first addresses of all that have it. May be a million.

    No column is empty, and they are in order.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Mapping[tuple[Family, int], Addresses] | None = None) -> None:
        self.columns = {key: column for key, column in sorted((columns or {}).items()) if column}

    @classmethod
    def of(cls, prefixes: Iterable[Prefix]) -> Prefixes:
        """From networks in any order."""
        found: dict[tuple[Family, int], list[int]] = {}
        for family, address, length in prefixes:
            found.setdefault((family, length), []).append(address)
        return cls({key: Addresses.of(key[0], addresses) for key, addresses in found.items()})

    @classmethod
    def joined(cls, several: Iterable[Prefixes]) -> Prefixes:
        """Those of all of them."""
        found: dict[tuple[Family, int], list[Addresses]] = {}
        for prefixes in several:
            for key, column in prefixes.columns.items():
                found.setdefault(key, []).append(column)
        return cls(
            {
                key: columns[0]
                if len(columns) == 1
                else Addresses.sorted(key[0], b"".join(column.packed for column in columns))
                for key, columns in found.items()
            }
        )

    @property
    def families(self) -> tuple[Family, ...]:
        """The families that there are networks of."""
        return tuple(dict.fromkeys(family for family, _ in self.columns))

    def lengths(self, family: Family) -> Iterator[tuple[int, Addresses]]:
        """The columns of one family, by length, the shortest first."""
        return ((length, column) for (each, length), column in self.columns.items() if each is family)

    def ordered(self, family: Family) -> Iterator[tuple[int, int]]:
        """The address and length of each one of a family, in their order."""
        # Both in one number; and runs that are in order already cost the sort little.
        keys = [number << 8 | length for length, column in self.lengths(family) for number in column.numbers()]
        keys.sort()
        return map(divmod, keys, repeat(1 << 8))

    def around(self, address: Address) -> Prefix | None:
        """The longest one that holds an address; None: there is none."""
        family, number = Family.of(address), int(address)
        around = (
            Prefix(family, number >> family.bits - length << family.bits - length, length)
            for length, _ in reversed([*self.lengths(family)])
        )
        return next((prefix for prefix in around if prefix in self), None)

    def __contains__(self, prefix: object) -> bool:
        if not isinstance(prefix, Prefix) or (column := self.columns.get((prefix.family, prefix.length))) is None:
            return False
        return column.next(prefix.address) == prefix.address

    def __len__(self) -> int:
        return sum(map(len, self.columns.values()))

    def __iter__(self) -> Iterator[Prefix]:
        """In the order of Prefix: by address, a network just before those inside it."""
        return (Prefix(family, *each) for family in self.families for each in self.ordered(family))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prefixes) and self.columns == other.columns

    def __hash__(self) -> int:
        return hash(tuple(self.columns.items()))

    def __repr__(self) -> str:
        return f"Prefixes({len(self)} of them)"
