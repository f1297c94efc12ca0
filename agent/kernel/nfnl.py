"""nf_tables by netlink: our table read back as the kernel has it.

Not by libnftables: it reads everybody's sets besides (0.5 s and more beside a foreign set of 100,000 prefixes), starts
again whenever somebody commits, and what it prints is not what was written. Message types and attributes are those of
linux/netfilter/nf_tables.h; numbers are big-endian there.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from types import TracebackType

from agent.kernel import KernelError
from agent.kernel.attributes import Attributes, attribute, attributes, each, number, text
from agent.kernel.netlink import ATTEMPTS, HEADER, NETLINK_NETFILTER, Netlink
from agent.model import Chain, Count, Family, Hook, NftSet, Statement, Table, address_text
from agent.prefixes import Span

NFNL_SUBSYS_NFTABLES = 10
NFPROTO_INET = 1
GETTABLE, GETCHAIN, GETRULE, GETSET, GETSETELEM, GETGEN, GETOBJ = 1, 4, 7, 10, 13, 16, 19
#: nfgenmsg: family, version, resource (linux/netfilter/nfnetlink.h).
NFGENMSG = struct.pack("=BBH", NFPROTO_INET, 0, 0)

#: In each of these messages attribute 1 is the table's name, except that a table's own name is its attribute 1.
OF_TABLE = 1
TABLE_FLAGS, TABLE_HANDLE = 2, 4
NFT_TABLE_F_DORMANT = 0x1
CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE = 3, 4, 5, 7
HOOK_NUMBER, HOOK_PRIORITY = 1, 2
RULE_CHAIN, RULE_USERDATA = 2, 7
SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_DATA_TYPE, SET_OBJECT_TYPE = 2, 3, 4, 6, 15
NFT_SET_ANONYMOUS, NFT_SET_INTERVAL, NFT_SET_MAP, NFT_SET_OBJECT = 0x1, 0x4, 0x8, 0x40
ELEMENT_SET, ELEMENTS = 2, 3
ELEMENT_KEY, ELEMENT_DATA, ELEMENT_FLAGS, ELEMENT_OBJECT = 1, 2, 3, 9
NFT_SET_ELEM_INTERVAL_END = 0x1
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
OBJECT_NAME, OBJECT_TYPE, OBJECT_DATA, OBJECT_HANDLE = 2, 3, 4, 6
NFT_OBJECT_COUNTER = 1
COUNTER_BYTES, COUNTER_PACKETS = 1, 2
NFT_DATA_VERDICT = 0xFFFFFF00
GEN_ID = 1

#: linux/netfilter.h, enum nf_inet_hooks.
HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")
#: linux/netfilter.h and nf_tables.h: verdicts.
VERDICTS = {0: "drop", 1: "accept", -1: "continue", -2: "break", -3: "jump", -4: "goto", -5: "return"}
#: libnftables' numbers of the types of our sets' keys (include/datatype.h, enum datatypes); six bits each in a
#: concatenation. The kernel keeps them for libnftables, and doesn't look at them.
KEY_TYPES = {7: "ipv4_addr", 8: "ipv6_addr", 19: "mark", 41: "ifname"}
KEY_BYTES = {"ipv4_addr": 4, "ipv6_addr": 16, "mark": 4, "ifname": 16}
#: libnftnl's userdata of a rule: type, length, value; type 0 is the comment (libnftnl/udata.h).
UDATA_COMMENT = 0


class Nfnl:
    """A conversation with nf_tables in the namespace of the thread that opened it. Every method raises KernelError."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._read: tuple[str, int, Table | None] | None = None

    def __enter__(self) -> Nfnl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()

    def generation(self) -> int:
        """The number of the last commit to any table of the namespace (NFT_MSG_GETGEN)."""
        answer = self._netlink.ask("ask for the ruleset's generation", NFNL_SUBSYS_NFTABLES << 8 | GETGEN, NFGENMSG)
        return number(attributes(answer[len(NFGENMSG) :])[GEN_ID])

    def tables(self) -> tuple[str, ...]:
        """The names of the tables of family inet."""
        return tuple(text(item[OF_TABLE]) for item in self._items("list the nft tables", GETTABLE))

    def table(self, name: str) -> Table | None:
        """A table as it is between two commits; rules come with their comments only. None: there is no such table.

        While nobody commits to any, what was read last is how it is. Others may commit to theirs all the time: what
        reads the same twice will do as well.
        """
        last = None
        for attempt in range(ATTEMPTS):
            before = self.generation()
            if self._read and self._read[:2] == (name, before):
                return self._read[2]
            found = self._table(name)
            if self.generation() == before or (attempt and found == last):
                self._read = (name, before, found)
                return found
            last = found
        raise KernelError(f"read nft table inet {name}", f"somebody changed it while it was read, {ATTEMPTS} times")

    def counts(self, name: str) -> dict[str, Count]:
        """The values of a table's counters by name; none without the table.

        The kernel numbers tables one after the other, and the objects of each table from 1: what `flush ruleset` took
        away and somebody put back is told from what was there before by both numbers, and `Count.handle` holds both.
        """
        doing = f"read the counters of nft table inet {name}"
        for _ in range(ATTEMPTS):
            before = self._table_handle(name)
            found = {}
            for item in self._dump(doing, GETOBJ, name):
                if number(item[OBJECT_TYPE]) == NFT_OBJECT_COUNTER:
                    values = attributes(item[OBJECT_DATA])
                    found[text(item[OBJECT_NAME])] = Count(
                        packets=number(values[COUNTER_PACKETS]),
                        bytes=number(values[COUNTER_BYTES]),
                        handle=before << 64 | number(item[OBJECT_HANDLE]),
                    )
            if self._table_handle(name) == before:
                return found
        raise KernelError(doing, f"somebody changed it while it was read, {ATTEMPTS} times")

    def _table_handle(self, name: str) -> int:
        """The kernel's number of a table, which no other one of this namespace gets; 0: there is no such table."""
        doing = f"read the handle of nft table inet {name}"
        return next((number(item[TABLE_HANDLE]) for item in self._dump(doing, GETTABLE, name)), 0)

    def _table(self, name: str) -> Table | None:
        doing = f"read nft table inet {name}"
        flags = next((number(item[TABLE_FLAGS]) for item in self._dump(doing, GETTABLE, name)), None)
        if flags is None:
            return None
        rules: dict[str, list[Statement]] = {}
        for item in self._dump(doing, GETRULE, name):
            statement = Statement("", _comment(item.get(RULE_USERDATA, b"")))
            rules.setdefault(text(item[RULE_CHAIN]), []).append(statement)
        chains = (item for item in self._dump(doing, GETCHAIN, name))
        sets = (item for item in self._dump(doing, GETSET, name))
        return Table(
            name=name,
            dormant=bool(flags & NFT_TABLE_F_DORMANT),
            counters=tuple(self.counts(name)),
            sets=tuple(self._set(name, item) for item in sets if not _flags(item) & NFT_SET_ANONYMOUS),
            chains=tuple(
                Chain(text(item[CHAIN_NAME]), tuple(rules.get(text(item[CHAIN_NAME]), ())), _hook(item))
                for item in chains
            ),
        )

    def _set(self, table: str, item: Attributes) -> NftSet:
        name, flags = text(item[SET_NAME]), _flags(item)
        types = _key_types(number(item[SET_KEY_TYPE]))
        value = ""
        if flags & NFT_SET_OBJECT:
            value = "counter" if number(item[SET_OBJECT_TYPE]) == NFT_OBJECT_COUNTER else "object"
        elif flags & NFT_SET_MAP:
            value = "verdict" if number(item[SET_DATA_TYPE]) == NFT_DATA_VERDICT else "data"
        elements = self._elements(table, name)
        interval = bool(flags & NFT_SET_INTERVAL)
        if interval and types in (["ipv4_addr"], ["ipv6_addr"]):
            words = _intervals(elements, types)
        else:
            words = ((_key(key, types), value) for key, _, value in elements)
        return NftSet(name, " . ".join(types), value, interval, tuple(words))

    def _elements(self, table: str, name: str) -> Iterator[tuple[bytes, bool, str]]:
        """Key, whether it ends an interval, and value as nft writes it."""
        doing = f"read the elements of {name} in nft table inet {table}"
        for answer in self._dump(doing, GETSETELEM, table, attribute(ELEMENT_SET, f"{name}\0".encode())):
            for _, data in each(answer.get(ELEMENTS, b"")):
                element = attributes(data)
                # No key: the element for all that no other one matches, which nft writes *.
                key = attributes(element[ELEMENT_KEY])[DATA_VALUE] if ELEMENT_KEY in element else b""
                ends = bool(number(element.get(ELEMENT_FLAGS, b"")) & NFT_SET_ELEM_INTERVAL_END)
                yield key, ends, _value(element)

    def _dump(self, doing: str, kind: int, table: str, more: bytes = b"") -> Iterator[Attributes]:
        """What belongs to a table; of tables and chains the kernel gives everybody's."""
        body = attribute(OF_TABLE, f"{table}\0".encode()) + more
        return (item for item in self._items(doing, kind, body) if text(item[OF_TABLE]) == table)

    def _items(self, doing: str, kind: int, body: bytes = b"") -> Iterator[Attributes]:
        """The attributes of each message of a dump."""
        answers = self._netlink.dump(doing, NFNL_SUBSYS_NFTABLES << 8 | kind, NFGENMSG + body)
        return (attributes(answer[HEADER.size + len(NFGENMSG) :]) for answer in answers)


# --- conversions -----------------------------------------------------------------------------------------------------


def _flags(item: Attributes) -> int:
    """A set's flags; a set without any has no such attribute."""
    return number(item.get(SET_FLAGS, b""))


def _comment(userdata: bytes) -> str:
    offset = 0
    while offset + 2 <= len(userdata):
        kind, size = userdata[offset], userdata[offset + 1]
        if kind == UDATA_COMMENT:
            return text(userdata[offset + 2 : offset + 2 + size])
        offset += 2 + size
    return ""


def _hook(item: Attributes) -> Hook | None:
    if CHAIN_HOOK not in item:
        return None
    hook = attributes(item[CHAIN_HOOK])
    priority = int.from_bytes(hook[HOOK_PRIORITY], "big", signed=True)
    policy = VERDICTS[number(item[CHAIN_POLICY])]
    return Hook(text(item[CHAIN_TYPE]), HOOKS[number(hook[HOOK_NUMBER])], priority, policy)


def _key_types(packed: int) -> list[str]:
    """The types of a key, the first in the highest bits; one that no set of ours has goes by its number."""
    types = []
    while packed:
        types.append(KEY_TYPES.get(packed & 0x3F, f"type-{packed & 0x3F}"))
        packed >>= 6
    return types[::-1]


def _key(key: bytes, types: list[str]) -> str:
    """An element's key as nft writes it; in a concatenation each part fills whole 32-bit registers."""
    words = [] if key else ["*"]
    for kind in types if key else ():
        size = KEY_BYTES.get(kind, len(key))
        part, key = key[:size], key[size:]
        match kind:
            case "ipv4_addr":
                words.append(address_text(Family.IPV4, number(part)))
            case "ipv6_addr":
                words.append(address_text(Family.IPV6, number(part)))
            case "mark":  # a register's own byte order
                words.append(f"0x{int.from_bytes(part, sys.byteorder):08x}")
            case "ifname":
                words.append(f'"{text(part)}"')
            case _:
                words.append(part.hex())
    return " . ".join(words)


def _value(element: Attributes) -> str:
    if ELEMENT_OBJECT in element:
        return f'"{text(element[ELEMENT_OBJECT])}"'
    if ELEMENT_DATA not in element:
        return ""
    data = attributes(element[ELEMENT_DATA])
    if DATA_VERDICT not in data:
        return data.get(DATA_VALUE, b"").hex()
    verdict = attributes(data[DATA_VERDICT])
    code = int.from_bytes(verdict[VERDICT_CODE], "big", signed=True)
    chain = f" {text(verdict[VERDICT_CHAIN])}" if VERDICT_CHAIN in verdict else ""
    return f"{VERDICTS.get(code, str(code))}{chain}"


def _intervals(elements: Iterator[tuple[bytes, bool, str]], types: list[str]) -> Iterator[tuple[str, str]]:
    """The intervals of a set: the kernel has their first addresses, and behind each last one a mark that it ended.

    An interval that reaches the last address of all has no end, and libnftables ends one at 0 that never began.
    """
    family = Family.IPV6 if types == ["ipv6_addr"] else Family.IPV4
    edges = []
    for key, ends, value in elements:
        if key:
            edges.append((number(key), not ends, value))
        else:
            yield "*", value
    beginning: tuple[int, str] | None = None
    for place, begins, value in sorted(edges):
        if beginning:
            yield str(Span(family, beginning[0], place - 1, "")), beginning[1]
        beginning = (place, value) if begins else None
    if beginning:
        yield str(Span(family, beginning[0], (1 << family.bits) - 1, "")), beginning[1]
