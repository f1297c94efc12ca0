"""A list of networks, one a line, with `#` comments: read whole, or line by line for whoever has a fault to tell."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import repeat
from socket import inet_pton

from agent.addresses import Addresses, Family, Prefix, Prefixes
from agent.values import has_special, parse_source

#: What a network or the end of its line is not made of.
_NO_NETWORK = re.compile(r"[^0-9A-Fa-f.:/\n]")
#: So many letters are read at a time, and the rest of a line: each line is an object, for as long.
BLOCK = 1 << 20


def read(text: str) -> Prefixes | None:
    """The networks of a list. None: not everything in it is one, and a source; or one stands there twice; or it isn't
    written as plainly as usual.
    """
    columns: dict[tuple[Family, int], bytearray] = defaultdict(bytearray)
    try:
        for lines in _blocks(text):
            six = [line for line in lines if ":" in line]
            four = [line for line in lines if ":" not in line] if six else lines
            _fill(columns, Family.IPV4, four)
            _fill(columns, Family.IPV6, six)
        return Prefixes({key: _column(*key, packed) for key, packed in columns.items()})
    except (OSError, ValueError):
        return None


def entries(text: str) -> Iterator[tuple[int, str]]:
    """What stands in the lines of a list, with their numbers."""
    for number, line in enumerate(text.split("\n"), 1):
        if entry := _entry(line):
            yield number, entry


def _entry(line: str) -> str:
    """What of a line is neither a comment nor a blank."""
    # No regular expression: one tries a long run of blanks from each of them, and lists come from anywhere.
    return line.partition("#")[0].strip()


def located(text: str) -> Iterator[tuple[int, Prefix]]:
    """The networks of a list with their lines, in its order. Raises ValueError for what is none."""
    return ((number, parse_source(entry)) for number, entry in entries(text))


def _blocks(text: str) -> Iterator[list[str]]:
    """Lines of networks, some at a time. Raises ValueError where something else stands."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + BLOCK) + 1 or len(text)
        block = text[start:end]
        lines = block.split("\n")
        if _NO_NETWORK.search(block):
            lines = [_entry(line) for line in lines]
            if _NO_NETWORK.search("\n".join(lines)):
                raise ValueError("is no plain list")
        yield [*filter(None, lines)]
        start = end


def _fill(columns: dict[tuple[Family, int], bytearray], family: Family, lines: list[str]) -> None:
    """Lines to the columns of their lengths, by no code of Python's for each. Raises OSError, ValueError."""
    hosts = [line for line in lines if "/" not in line]
    columns[family, family.bits] += b"".join(map(inet_pton, repeat(family.number), hosts))
    words = "/".join(line for line in lines if "/" in line).split("/") if len(hosts) < len(lines) else []
    if len(words) != 2 * (len(lines) - len(hosts)):
        raise ValueError("is no network: more than one /")
    by_length: dict[str, list[bytes]] = defaultdict(list)
    for address, length in zip(map(inet_pton, repeat(family.number), words[::2]), words[1::2], strict=True):
        by_length[length].append(address)
    for digits, addresses in by_length.items():
        columns[family, _length(family, digits)] += b"".join(addresses)


def _length(family: Family, digits: str) -> int:
    if not digits.isdigit() or len(digits) > 3 or int(digits) > family.bits:
        raise ValueError("is no length")
    return int(digits)


def _column(family: Family, length: int, packed: bytearray) -> Addresses:
    """Raises ValueError for what is no source."""
    column = Addresses.sorted(family, packed)
    if len(column.packed) < len(packed):
        raise ValueError("stands there twice")
    host_bits = ((1 << family.bits - length) - 1).to_bytes(family.size, "big")
    # As one number each: all are looked at in one operation.
    if length < family.bits and int.from_bytes(packed, "big") & int.from_bytes(host_bits * len(column), "big"):
        raise ValueError("has host bits set")
    if has_special(column, length):
        raise ValueError("cannot be a source")
    return column
