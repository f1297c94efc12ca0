"""nf_tables by netlink: our table read back as the kernel has it.

Not by libnftables: it reads everybody's sets besides (0.5 s and more beside a foreign set of 100,000 prefixes), starts
again whenever somebody commits, and what it prints is not what was written. Message types and attributes are those of
linux/netfilter/nf_tables.h; numbers are big-endian there.
"""

from __future__ import annotations

import math
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

from agent.addresses import Addresses, Family, address_text
from agent.kernel import KernelError
from agent.kernel.attributes import Attributes, attribute, attributes, each, number, text
from agent.kernel.counters import NFT_OBJECT_COUNTER, counts
from agent.kernel.elements import VERDICTS, unpack
from agent.kernel.known import Known
from agent.kernel.netlink import ATTEMPTS, HEADER, NETLINK_NETFILTER, PAUSE, Netlink
from agent.model import ADDRESSES, Chain, Count, ElementChange, Hook, NftSet, Statement, Table
from agent.prefixes import Span

NFNL_SUBSYS_NFTABLES = 10
NFPROTO_INET = 1
GETTABLE, GETCHAIN, GETRULE, GETSET, GETSETELEM, GETGEN, GETOBJ = 1, 4, 7, 10, 13, 16, 19
#: nfgenmsg: family, version, resource (linux/netfilter/nfnetlink.h).
NFGENMSG = struct.pack("=BBH", NFPROTO_INET, 0, 0)
#: Of all families.
NFGENMSG_ALL = bytes(4)

#: In each of these messages attribute 1 is the table's name, except that a table's own name is its attribute 1.
OF_TABLE = 1
TABLE_FLAGS, TABLE_HANDLE = 2, 4
NFT_TABLE_F_DORMANT = 0x1
CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE = 3, 4, 5, 7
HOOK_NUMBER, HOOK_PRIORITY = 1, 2
RULE_CHAIN, RULE_USERDATA = 2, 7
SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_DATA_TYPE, SET_DESC, SET_OBJECT_TYPE, SET_COUNT = 2, 3, 4, 6, 9, 15, 20
SET_DESC_SIZE = 1
NFT_SET_ANONYMOUS, NFT_SET_INTERVAL, NFT_SET_MAP, NFT_SET_OBJECT = 0x1, 0x4, 0x8, 0x40
ELEMENT_SET, ELEMENTS = 2, 3
ELEMENT_KEY, ELEMENT_DATA, ELEMENT_FLAGS, ELEMENT_OBJECT = 1, 2, 3, 9
NFT_SET_ELEM_INTERVAL_END = 0x1
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
NFT_DATA_VERDICT = 0xFFFFFF00
GEN_ID = 1

#: linux/netfilter.h, enum nf_inet_hooks.
HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")
#: libnftables' numbers of the types of our sets' keys (include/datatype.h, enum datatypes); six bits each in a
#: concatenation. The kernel keeps them for libnftables, and doesn't look at them.
KEY_TYPES = {7: "ipv4_addr", 8: "ipv6_addr", 19: "mark", 41: "ifname"}
KEY_BYTES = {"ipv4_addr": 4, "ipv6_addr": 16, "mark": 4, "ifname": 16}
#: More elements than this are not read back at every look; but again after so many times what that took (a million: a
#: quarter of an hour), and when there are more or less.
TRUSTED, TRUST = 4096, 50
#: libnftnl's userdata of a rule: type, length, value; type 0 is the comment (libnftnl/udata.h).
UDATA_COMMENT = 0


class _Held(NamedTuple):
    """What a set held when it was read or written: for certain as of a generation, and nobody has committed since;
    besides trusted until then (monotonic seconds) while it holds as many.
    """

    addresses: Addresses
    generation: int
    until: float


class Nfnl:
    """A conversation with nf_tables in the namespace of the thread that opened it. Every method raises KernelError."""

    def __init__(self, recall: Callable[[], Known | None] | None = None) -> None:
        """`recall` gives what another process knew of large sets; it is asked at the first set of addresses."""
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._read: tuple[str, int, Table | None] | None = None
        self._nat = ("", -1, True)
        self._recall = recall
        self._held: dict[tuple[str, str], _Held] = {}
        # Between the last look and this generation all commits were our own; up to that one all is told.
        self._alone = self._told = -1
        # Until then what was read last is trusted, as far as it was not read.
        self._until = math.inf

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

    def translates(self, but: str) -> bool:
        """Whether a chain of another table than this one of ours translates addresses."""
        before = self.generation()
        if self._nat[:2] != (but, before):
            answers = self._netlink.dump("list the nft chains", NFNL_SUBSYS_NFTABLES << 8 | GETCHAIN, NFGENMSG_ALL)
            chains = [attributes(answer[HEADER.size + len(NFGENMSG) :]) for answer in answers]
            nat = (text(chain[OF_TABLE]) for chain in chains if text(chain.get(CHAIN_TYPE, b"")) == "nat")
            self._nat = but, before, any(table != but for table in nat)
        return self._nat[2]

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
            if self._read and self._read[:2] == (name, before) and time.monotonic() < self._until:
                return self._read[2]
            self._until = math.inf
            found = self._table(name, before)
            undisturbed = self.generation() == before
            if undisturbed or (attempt and found == last):
                self._read = (name, before, found)
                self._alone = before if undisturbed else -1
                return found
            last = found
        raise KernelError(f"read nft table inet {name}", f"somebody changed it while it was read, {ATTEMPTS} times")

    def counts(self, name: str) -> dict[str, Count]:
        """The values of a table's counters by name; none without the table.

        The kernel numbers tables one after the other, and the objects of each table from 1: what `flush ruleset` took
        away and somebody put back is told from what was there before by both numbers, and `Count.handle` holds both.
        """
        doing = f"read the counters of nft table inet {name}"
        body = NFGENMSG + attribute(OF_TABLE, f"{name}\0".encode())
        for _ in range(ATTEMPTS):
            before = self._table_handle(name)
            found = counts(self._netlink.dump(doing, NFNL_SUBSYS_NFTABLES << 8 | GETOBJ, body), name, before)
            if self._table_handle(name) == before:
                return found
        raise KernelError(doing, f"somebody changed it while it was read, {ATTEMPTS} times")

    def _table_handle(self, name: str) -> int:
        """The kernel's number of a table, which no other one of this namespace gets; 0: there is no such table."""
        doing = f"read the handle of nft table inet {name}"
        return next((number(item[TABLE_HANDLE]) for item in self._dump(doing, GETTABLE, name)), 0)

    def _table(self, name: str, generation: int) -> Table | None:
        doing = f"read nft table inet {name}"
        flags = next((number(item[TABLE_FLAGS]) for item in self._dump(doing, GETTABLE, name)), None)
        if flags is None:
            return None
        rules: dict[str, list[Statement]] = {}
        for item in self._dump(doing, GETRULE, name):
            statement = Statement("", comment_of(item.get(RULE_USERDATA, b"")))
            rules.setdefault(text(item[RULE_CHAIN]), []).append(statement)
        chains = (item for item in self._dump(doing, GETCHAIN, name))
        sets = (item for item in self._dump(doing, GETSET, name))
        return Table(
            name=name,
            dormant=bool(flags & NFT_TABLE_F_DORMANT),
            counters=tuple(self.counts(name)),
            sets=tuple(self._set(name, item, generation) for item in sets if not _flags(item) & NFT_SET_ANONYMOUS),
            chains=tuple(
                Chain(text(item[CHAIN_NAME]), tuple(rules.get(text(item[CHAIN_NAME]), ())), _hook(item))
                for item in chains
            ),
        )

    def _set(self, table: str, item: Attributes, generation: int) -> NftSet:
        name, flags = text(item[SET_NAME]), _flags(item)
        types = _key_types(number(item[SET_KEY_TYPE]))
        value = ""
        if flags & NFT_SET_OBJECT:
            value = "counter" if number(item[SET_OBJECT_TYPE]) == NFT_OBJECT_COUNTER else "object"
        elif flags & NFT_SET_MAP:
            value = "verdict" if number(item[SET_DATA_TYPE]) == NFT_DATA_VERDICT else "data"
        interval = bool(flags & NFT_SET_INTERVAL)
        size = number(attributes(item.get(SET_DESC, b"")).get(SET_DESC_SIZE, b""))
        key = " . ".join(types)
        if key in ADDRESSES and not (value or interval):
            addresses = self._addresses(table, name, ADDRESSES[key], item, generation)
            if addresses is not None:
                return NftSet(name, key, size=size, elements=addresses)
        elements = self._elements(table, name)
        if key in ADDRESSES and interval:
            words = _intervals(elements, ADDRESSES[key])
        else:
            words = ((_key(found, types), value) for found, _, value in elements)
        return NftSet(name, key, value, interval, tuple(words), size=size)

    def _addresses(self, table: str, name: str, family: Family, item: Attributes, generation: int) -> Addresses | None:
        """What a set of plain addresses holds; None if there are other elements in it.

        The kernel counts anew from the first element for every 32 KiB of its answer: the time goes with the square of
        their number, 0.1 s for 100,000 and 20 s for a million. So many are as they were known to be while nobody has
        committed since; and as they were known to be last, as long as there are as many (the kernel says how many since
        Linux 6.16), for fifty times what it takes to read them.
        """
        began = time.monotonic()
        count = number(item[SET_COUNT]) if SET_COUNT in item else None
        held = self._recalled(table, name)
        if held and len(held.addresses) > TRUSTED and count in (None, len(held.addresses)):
            if held.generation == generation:
                return held.addresses
            if count is not None and began < held.until:
                self._until = min(self._until, held.until)
                return held.addresses
        doing = f"read the elements of {name} in nft table inet {table}"
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE)
            data = bytearray()
            for answer in self._dump(doing, GETSETELEM, table, attribute(ELEMENT_SET, f"{name}\0".encode())):
                data += answer.get(ELEMENTS, b"")
            try:
                found = unpack(data, family)
            except ValueError:
                self._held.pop((table, name), None)
                return None
            # After many have come the kernel still moves them to a larger hash (lib/rhashtable.c, rht_deferred_worker),
            # and a dump that comes in pieces misses some.
            if count in (None, len(found)):
                break
        else:
            raise KernelError(doing, f"it gave {len(found)} of {count}, and never all of them")
        now = time.monotonic()
        self._held[table, name] = _Held(found, generation, now + TRUST * (now - began))
        return found

    def _recalled(self, table: str, name: str) -> _Held | None:
        """What is known of a set, by this process or the one before."""
        if self._recall:
            known, self._recall = self._recall(), None
            if known:
                self._told = known.generation
                for each, addresses in known.sets.items():
                    self._held.setdefault((known.table, each), _Held(addresses, known.generation, -math.inf))
        return self._held.get((table, name))

    def certain(self, table: str) -> Known | None:
        """What large sets of a table hold, as far as that is certain; None: no more than was told or recalled before.

        Raises KernelError.
        """
        generation = self.generation()
        sets = {
            name: held.addresses
            for (of, name), held in self._held.items()
            if of == table and held.generation == generation and len(held.addresses) > TRUSTED
        }
        if not sets or self._told == generation:
            return None
        self._told = generation
        return Known(table, generation, sets)

    @contextmanager
    def changing(self, table: str, changes: Sequence[ElementChange]) -> Iterator[Callable[[int], None]]:
        """Around changes of sets of addresses, which need not be read back then, unless one failed.

        What it gives is to be told how many transactions that took.
        """
        before = {change.set: self._held.pop((table, change.set), None) for change in changes}
        with self._committing() as tell:
            # A set that was not there at the last look is one that we have made since, with nothing in it.
            new, until = self._alone, time.monotonic() + TRUST
            yield tell
            for change in changes:
                if isinstance(change.new, Addresses) and isinstance(change.gone, Addresses):
                    held = before[change.set] or _Held(Addresses(change.new.family), new, until)
                    now = held.addresses.changed(change.gone, change.new)
                    self._held[table, change.set] = held._replace(addresses=now)

    @contextmanager
    def loading(self, table: str, commands: str) -> Iterator[None]:
        """Around nft's running commands: what sets they name is read anew. Rules name them with an @."""
        named = set(commands.split())
        self._held = {key: held for key, held in self._held.items() if key[0] != table or key[1] not in named}
        with self._committing() as tell:
            yield
            tell(1)

    @contextmanager
    def _committing(self) -> Iterator[Callable[[int], None]]:
        """Around commits of our own: if they were the only ones, what was certain before is certain still."""
        before, own = self.generation(), 0

        def tell(count: int) -> None:
            nonlocal own
            own = count

        yield tell
        now = self.generation()
        if now == before + own:
            self._held = {
                key: held._replace(generation=now) if held.generation == before else held
                for key, held in self._held.items()
            }
            self._alone = now if self._alone == before else -1

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


def comment_of(userdata: bytes) -> str:
    """The comment in a rule's userdata; "" without one."""
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


def _intervals(elements: Iterator[tuple[bytes, bool, str]], family: Family) -> Iterator[tuple[str, str]]:
    """The intervals of a set: the kernel has their first addresses, and behind each last one a mark that it ended.

    An interval that reaches the last address of all has no end, and libnftables ends one at 0 that never began.
    """
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
