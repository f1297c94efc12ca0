"""Everybody's nft chains, by netlink: where they are called and lead, and which bits of packet marks they write.

Not by `nft -j list ruleset`: that reads everybody's sets besides, and of an iptables-nft rule with a target it says the
target's name and no more. Numbers from linux/netfilter/nf_tables.h and the targets' own headers.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from agent.host import EVERY_BIT, Flowtable, MarkWrite, NftChain, ReverseCheck
from agent.kernel import KernelError
from agent.kernel.attributes import Attributes, attributes, each, number, text
from agent.kernel.netlink import HEADER, NETLINK_NETFILTER, Netlink
from agent.model import Hook

NFNL_SUBSYS_NFTABLES = 10
GETCHAIN, GETRULE, GETFLOWTABLE = 4, 7, 23
#: nfgenmsg: family (0: all), version, resource.
NFGENMSG = struct.pack("=BBH", 0, 0, 0)
#: linux/netfilter.h: the families whose packets are routed.
FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")

TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_TYPE = 1, 3, 4, 7
HOOK_NUMBER, HOOK_PRIORITY = 1, 2
RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS = 2, 3, 4
EXPRESSION_NAME, EXPRESSION_DATA = 1, 2
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
NF_DROP, NFT_JUMP, NFT_GOTO = 0, -3, -4
#: NFT_REG_VERDICT; of the others 1 to 4 have 16 bytes, and 8 to 23 are the same bytes in fours.
VERDICT = 0
META_DREG, META_KEY, META_SREG = 1, 2, 3
NFT_META_MARK = 3
#: Of ct, exthdr, numgen, payload and rt alike.
LOAD_DREG = 1
IMMEDIATE_DREG, IMMEDIATE_DATA = 1, 2
BITWISE_SREG, BITWISE_DREG, BITWISE_MASK, BITWISE_XOR, BITWISE_OP, BITWISE_SREG2 = 1, 2, 4, 5, 6, 8
MASK_XOR, BOOL_AND = 0, 3
LOOKUP_DREG = 3
FIB_RESULT, FIB_FLAGS = 2, 3
NFT_FIB_RESULT_ADDRTYPE = 3
FIB_SADDR, FIB_MARK, FIB_IIF = 0x1, 0x4, 0x8
TARGET_NAME, TARGET_REVISION, TARGET_INFO = 1, 2, 3
FLOWTABLE_NAME, FLOWTABLE_HOOK, HOOK_DEVICES = 2, 3, 3
#: linux/netfilter/xt_CONNMARK.h and xt_rpfilter.h.
XT_CONNMARK_RESTORE = 2
XT_RPFILTER_LOOSE, XT_RPFILTER_VALID_MARK = 0x1, 0x2
#: The names of the tables that iptables-legacy has, which nf_tables does not show.
LEGACY = {"ip": "ip_tables_names", "ip6": "ip6_tables_names"}


class Chains(NamedTuple):
    """The chains and flowtables of a namespace."""

    chains: tuple[NftChain, ...]
    flowtables: tuple[Flowtable, ...]


class _Value(NamedTuple):
    """What is known of a register: the bits that are those of the packet's mark, and those that may be one."""

    kept: int
    ones: int


_MARK, _ANYTHING = _Value(EVERY_BIT, EVERY_BIT), _Value(0, EVERY_BIT)


@dataclass(slots=True)
class Effect:
    """What a rule does: `bits` of the mark that it changes, those that may be `ones` then, and where it leads.

    `registers` is what they hold of the mark, on the way through the rule.
    """

    bits: int = 0
    ones: int = 0
    reverse_check: bool = False
    by_mark: bool = False
    drops: bool = False
    by_map: bool = False
    jumps: set[str] = field(default_factory=set)
    registers: dict[int, _Value] = field(default_factory=dict)

    def writes(self, changed: int, ones: int) -> None:
        self.bits |= changed
        self.ones |= ones & changed

    def held(self, register: int) -> _Value:
        return self.registers.get(_place(register), _ANYTHING)

    def hold(self, register: int, value: _Value) -> None:
        place = _place(register)
        # What is wider than a mark lies over its neighbours.
        for behind in range(place, place + 4):
            self.registers.pop(behind, None)
        self.registers[place] = value


def read() -> Chains:
    """The chains and flowtables of the calling thread's namespace, of all that is routed. Raises KernelError."""
    with closing(Netlink(NETLINK_NETFILTER)) as netlink:
        rules: dict[tuple[str, str, str], list[tuple[int, Effect]]] = {}
        for family, item in _items(netlink, "list everybody's nft rules", GETRULE):
            chain = (family, text(item[TABLE]), text(item[RULE_CHAIN]))
            found = number(item[RULE_HANDLE]), effect(item.get(RULE_EXPRESSIONS, b""))
            rules.setdefault(chain, []).append(found)
        chains = tuple(
            _chain(family, item, rules) for family, item in _items(netlink, "list everybody's nft chains", GETCHAIN)
        )
        flowtables = tuple(
            flowtable(family, item) for family, item in _items(netlink, "list everybody's flowtables", GETFLOWTABLE)
        )
    return Chains(chains, flowtables)


def legacy() -> tuple[str, ...]:
    """The tables of iptables-legacy with their families, `ip mangle`; none where the kernel has no such thing.

    Raises KernelError.
    """
    found = []
    for family, name in LEGACY.items():
        # Not /proc/net: that is the namespace of the process's first thread.
        path = Path("/proc/thread-self/net") / name
        try:
            found += [f"{family} {table}" for table in path.read_text(encoding="ascii").split()]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise KernelError(f"read {path}", os.strerror(error.errno or 0)) from error
    return tuple(found)


def _items(netlink: Netlink, doing: str, kind: int) -> Iterator[tuple[str, Attributes]]:
    for answer in netlink.dump(doing, NFNL_SUBSYS_NFTABLES << 8 | kind, NFGENMSG):
        family = FAMILIES.get(answer[HEADER.size])
        if family:
            yield family, attributes(answer[HEADER.size + len(NFGENMSG) :])


def _chain(family: str, item: Attributes, rules: Mapping[tuple[str, str, str], list[tuple[int, Effect]]]) -> NftChain:
    table, name = text(item[TABLE]), text(item[CHAIN_NAME])
    found = rules.get((family, table, name), [])
    hook = None
    if CHAIN_HOOK in item:
        where = attributes(item[CHAIN_HOOK])
        priority = int.from_bytes(where[HOOK_PRIORITY], "big", signed=True)
        hook = Hook(text(item[CHAIN_TYPE]), HOOKS[number(where[HOOK_NUMBER])], priority)
    return NftChain(
        family,
        table,
        name,
        hook,
        writes=tuple(MarkWrite(handle, rule.bits, rule.ones) for handle, rule in found if rule.bits),
        reverse_checks=tuple(
            ReverseCheck(handle, rule.by_mark) for handle, rule in found if rule.reverse_check and rule.drops
        ),
        jumps=frozenset(name for _, rule in found for name in rule.jumps),
        by_map=any(rule.by_map for _, rule in found),
    )


def flowtable(family: str, item: Attributes) -> Flowtable:
    """A flowtable from the attributes of its message."""
    hook = attributes(item.get(FLOWTABLE_HOOK, b""))
    links = tuple(text(name) for _, name in each(hook.get(HOOK_DEVICES, b"")))
    return Flowtable(family, text(item[TABLE]), text(item[FLOWTABLE_NAME]), links)


# --- a rule ----------------------------------------------------------------------------------------------------------


def effect(expressions: bytes) -> Effect:
    """What the expressions of a rule (NFTA_RULE_EXPRESSIONS) do to a packet and its mark.

    Follows what each register holds of the mark: `meta mark set meta mark & 0xff00ffff | 0x10000` changes eight bits.
    """
    found = Effect()
    for _, data in each(expressions):
        expression = attributes(data)
        name = text(expression[EXPRESSION_NAME])
        if name in READERS:
            READERS[name](found, attributes(expression.get(EXPRESSION_DATA, b"")))
        elif name not in PASSIVE:
            # Whatever it left in the registers, it isn't known to be the mark.
            found.registers.clear()
    return found


def _meta(found: Effect, item: Attributes) -> None:
    is_mark = number(item[META_KEY]) == NFT_META_MARK
    if META_SREG not in item:
        found.hold(number(item[META_DREG]), _MARK if is_mark else _ANYTHING)
    elif is_mark:
        value = found.held(number(item[META_SREG]))
        found.writes(EVERY_BIT & ~value.kept, value.ones)


def _load(found: Effect, item: Attributes) -> None:
    """What loads something else; without a destination it writes, and not the packet's mark."""
    if LOAD_DREG in item:
        found.hold(number(item[LOAD_DREG]), _ANYTHING)


def _immediate(found: Effect, item: Attributes) -> None:
    data = attributes(item[IMMEDIATE_DATA])
    if DATA_VERDICT not in data:
        found.hold(number(item[IMMEDIATE_DREG]), _Value(0, _register(data[DATA_VALUE])))
        return
    verdict = attributes(data[DATA_VERDICT])
    code = int.from_bytes(verdict[VERDICT_CODE], "big", signed=True)
    found.drops |= code == NF_DROP
    if code in (NFT_JUMP, NFT_GOTO):
        found.jumps.add(text(verdict[VERDICT_CHAIN]))


def _bitwise(found: Effect, item: Attributes) -> None:
    source, destination = number(item[BITWISE_SREG]), number(item[BITWISE_DREG])
    operation = number(item.get(BITWISE_OP, b""))
    kept, ones = found.held(source)
    value = _ANYTHING  # a shift
    if operation == MASK_XOR:
        mask, xor = (_register(attributes(item[name])[DATA_VALUE]) for name in (BITWISE_MASK, BITWISE_XOR))
        value = _Value(kept & mask & ~xor, ones & mask | xor)
    elif BITWISE_SREG2 in item:
        other = found.held(number(item[BITWISE_SREG2]))
        if operation == BOOL_AND:
            value = _Value(kept & other.kept, ones & other.ones)
        else:  # one's bit stays where the other has none
            value = _Value(kept & ~other.ones | other.kept & ~ones, ones | other.ones)
    found.hold(destination, value)


def _lookup(found: Effect, item: Attributes) -> None:
    if LOOKUP_DREG in item:
        register = number(item[LOOKUP_DREG])
        found.by_map |= register == VERDICT
        found.hold(register, _ANYTHING)


def _fib(found: Effect, item: Attributes) -> None:
    flags = number(item[FIB_FLAGS])
    if flags & (FIB_SADDR | FIB_IIF) == FIB_SADDR | FIB_IIF and number(item[FIB_RESULT]) != NFT_FIB_RESULT_ADDRTYPE:
        found.reverse_check, found.by_mark = True, bool(flags & FIB_MARK)
    found.registers.clear()


def _match(found: Effect, item: Attributes) -> None:
    """A match of iptables'."""
    if text(item[TARGET_NAME]) == "rpfilter":
        flags = item[TARGET_INFO][0]
        found.reverse_check = not flags & XT_RPFILTER_LOOSE
        found.by_mark = bool(flags & XT_RPFILTER_VALID_MARK)


def _target(found: Effect, item: Attributes) -> None:
    """A target of iptables'."""
    info, revision = item[TARGET_INFO], number(item[TARGET_REVISION])
    match text(item[TARGET_NAME]):
        case "MARK" if revision == 2:  # struct xt_mark_tginfo2: mark = mark & ~mask ^ value
            value, mask = struct.unpack_from("=II", info)
            found.writes(mask | value, value)
        case "CONNMARK" if revision in (1, 2):  # struct xt_connmark_tginfo1; in the second a shift is before the mode
            (nfmask,), mode = struct.unpack_from("=I", info, 8), info[12 if revision == 1 else 14]
            found.writes(nfmask if mode == XT_CONNMARK_RESTORE else 0, nfmask)
        case "TPROXY":  # struct xt_tproxy_target_info
            mask, value = struct.unpack_from("=II", info)
            found.writes(mask | value, value)
        case "MARK" | "CONNMARK":
            found.writes(EVERY_BIT, EVERY_BIT)
        case "DROP" | "REJECT":
            found.drops = True


def _reject(found: Effect, item: Attributes) -> None:
    del item
    found.drops = True


#: What is done to packets, marks and registers by which expression; and those that do nothing to them.
READERS: Mapping[str, Callable[[Effect, Attributes], None]] = {
    "meta": _meta,
    **dict.fromkeys(("ct", "exthdr", "numgen", "payload", "rt"), _load),
    "immediate": _immediate,
    "bitwise": _bitwise,
    "lookup": _lookup,
    "fib": _fib,
    "match": _match,
    "target": _target,
    "reject": _reject,
}
PASSIVE = frozenset({"cmp", "counter", "limit", "log"})


def _place(register: int) -> int:
    """Where a register begins, in fours of bytes."""
    return (register - 1) * 4 if register < 8 else register - 8


def _register(data: bytes) -> int:
    """A mark is in a register in the machine's own byte order."""
    return int.from_bytes(data[:4], sys.byteorder)
