"""rtnetlink: links, addresses, routes, rules and route lookups of this network namespace.

The only importer of pyroute2, which writes. It takes longer to import than to read all that there is to read, and
decodes slower than the kernel tells: it is imported with the first change, or the first rule that isn't plain. No
netlink message crosses this room's door: what comes in and goes out are values of `agent.model`; a field's oddity is
explained where it is converted.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.addresses import Address, Family, Prefix
from agent.kernel import KernelError
from agent.kernel.attributes import Attributes, attribute, attributes, each
from agent.kernel.netlink import HEADER, Netlink, Wanted
from agent.model import (
    GOTO,
    LOOKUP,
    NOP,
    PROTOCOL,
    TABLE_LOCAL,
    TABLE_MAIN,
    UNREACHABLE,
    Fwmark,
    Hop,
    Link,
    LinkAddress,
    Lookup,
    Route,
    Rule,
)

if TYPE_CHECKING:
    from pyroute2 import IPRoute

RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE, RTM_GETRULE = 18, 22, 26, 34
#: ifinfomsg: family, type, index, flags, change; ifaddrmsg: family, length, flags, scope, index; rtmsg and
#: fib_rule_hdr: see `_Routing`; rtnexthop: size, flags, weight less one, index (linux/rtnetlink.h, linux/if_addr.h).
IFINFOMSG, IFADDRMSG, RTMSG = struct.Struct("=BxHiII"), struct.Struct("=BBBBI"), struct.Struct("=BBBBBBBBI")
RTNEXTHOP = struct.Struct("=HBBi")
#: Offsets of the destination's length, the table, the protocol, the scope, the type and the attributes from a route
#: message's start (linux/netlink.h, linux/rtnetlink.h). A table above 255 has another number there.
RTM_DST_LEN, RTM_TABLE, RTM_PROTOCOL, RTM_SCOPE, RTM_TYPE, RTM_ATTRIBUTES = 17, 20, 21, 22, 23, 28
#: Attributes of addresses, links, routes and rules (linux/if_addr.h, if_link.h, rtnetlink.h, fib_rules.h).
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFLA_IFNAME, IFLA_MTU, IFLA_EXT_MASK = 3, 4, 29
RTA_DST, RTA_SRC, RTA_IIF, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH = 1, 2, 3, 4, 5, 6, 7, 9
RTA_CACHEINFO, RTA_TABLE, RTA_MARK, RTA_VIA, RTA_PREF = 12, 15, 16, 18, 20
FRA_SRC, FRA_IIFNAME, FRA_GOTO, FRA_PRIORITY, FRA_FWMARK, FRA_FWMASK = 2, 3, 4, 6, 10, 16
FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_PROTOCOL = 14, 15, 21
#: Of rta_cacheinfo how long a route is good for yet, which is negative when it no longer is (linux/rtnetlink.h).
EXPIRES = struct.Struct("=8xi")

IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x1, 0x8, 0x20, 0x40
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
RTN_UNICAST, RTN_LOCAL = 1, 2
#: linux/rtnetlink.h: the types of routes, by ip-route(8)'s word for them.
KINDS = (
    *("unspec", "unicast", "local", "broadcast", "anycast", "multicast"),
    *("blackhole", "unreachable", "prohibit", "throw", "nat", "xresolve"),
)
RTNH_F_ONLINK = 4
RTM_F_LOOKUP_TABLE = 0x1000
FIB_RULE_INVERT = 2
#: linux/fib_rules.h: what a rule does, by ip-rule(8)'s word for it.
ACTIONS = {1: LOOKUP, 2: GOTO, 3: NOP, 6: "blackhole", 7: UNREACHABLE, 8: "prohibit"}
RTEXT_FILTER_SKIP_STATS = 8

#: Protocols of the routes that the kernel, its router discovery, ip(8) and DHCP clients make; not routing daemons.
RTPROT_KERNEL, RTPROT_RA = 2, 9
HOUSEHOLD = frozenset({RTPROT_KERNEL, 3, 4, RTPROT_RA, 16})
#: Those of connected networks.
CONNECTED = {Family.IPV4: (RTPROT_KERNEL,), Family.IPV6: (RTPROT_KERNEL, RTPROT_RA)}

#: What a rule of ours may say, with pyroute2's names; `FRA_SUPPRESS_PREFIXLEN` is in every dump, 0xffffffff meaning
#: "no".
RULE_ATTRIBUTES = {
    FRA_PRIORITY: "FRA_PRIORITY",
    FRA_TABLE: "FRA_TABLE",
    FRA_FWMARK: "FRA_FWMARK",
    FRA_FWMASK: "FRA_FWMASK",
    FRA_SRC: "FRA_SRC",
    FRA_IIFNAME: "FRA_IIFNAME",
    FRA_GOTO: "FRA_GOTO",
    FRA_PROTOCOL: "FRA_PROTOCOL",
}
SUPPRESS_NOTHING = 0xFFFFFFFF

#: The routes that are gone already when a delete comes: with their link, or by somebody else's hand.
GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})

#: A packet whose route is looked up: destination, source, mark, and the link it arrives on.
Packet = tuple[Address, Address | None, int, str | None]


class _Routing(NamedTuple):
    """What is said of a route, or of a rule, whose message has the same shape (rtmsg, fib_rule_hdr)."""

    family: int
    destination_length: int
    source_length: int
    tos: int
    table: int
    protocol: int
    scope: int
    kind: int  # a rule's action
    flags: int
    attributes: Attributes

    @classmethod
    def of(cls, data: bytes, offset: int = HEADER.size) -> _Routing:
        """From a message, whose header ends at an offset."""
        return cls._make((*RTMSG.unpack_from(data, offset), attributes(data[offset + RTMSG.size :])))

    def number(self, kind: int) -> int | None:
        """A number of 32 bits, if it is there."""
        return _number(self.attributes, kind)

    def address(self, kind: int) -> Address | None:
        """An address, if it is there."""
        return ip_address(self.attributes[kind]) if kind in self.attributes else None

    @property
    def table_number(self) -> int:
        """The header's byte says 252 for "see the attribute"."""
        return self.number(RTA_TABLE) or self.table  # FRA_TABLE is the same number


class Survey(NamedTuple):
    """What a walk through the routes of all tables shows.

    `near` are routes of main that are defaults, or lead straight onto a link; `connected` those of main that have the
    protocols of connected networks; `ours` those of our protocol number, whatever the table.
    """

    near: tuple[Route, ...]
    connected: tuple[Route, ...]
    ours: frozenset[Route]


class Rtnl:
    """A conversation with rtnetlink in the namespace of the thread that opened it. Every method raises KernelError."""

    def __init__(self) -> None:
        self._namespace = _namespace()
        self._dumps = Netlink(socket.NETLINK_ROUTE, strict=True)
        self._names: dict[int, str] = {}

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dumps.close()
        if "_writer" in self.__dict__:
            self._writer.close()

    # --- reading ---

    def links(self) -> tuple[Link, ...]:
        """All links with their addresses, by name; the sysctls are `agent.kernel.sysctl`'s to add.

        An address that turned out to be a neighbour's is left out: nothing can be sent from it, nor arrives for it.
        """
        addresses: dict[int, list[LinkAddress]] = {}
        for answer in self._dumps.dump("list addresses", RTM_GETADDR, bytes(IFADDRMSG.size)):
            family, length, _, scope, index = IFADDRMSG.unpack_from(answer, HEADER.size)
            said = attributes(answer[HEADER.size + IFADDRMSG.size :])
            flags = _number(said, IFA_FLAGS) or 0
            if flags & IFA_F_DADFAILED:
                continue
            address = LinkAddress(
                # On a point-to-point link IFA_ADDRESS is the peer's, IFA_LOCAL ours; IPv6 gives the latter only there.
                address=ip_address(said[IFA_LOCAL if IFA_LOCAL in said else IFA_ADDRESS]),
                length=length,
                scope_global=scope == RT_SCOPE_UNIVERSE,
                tentative=bool(flags & IFA_F_TENTATIVE),
                deprecated=bool(flags & IFA_F_DEPRECATED),
                # The same bit is IFA_F_SECONDARY in IPv4: a second address of one network.
                temporary=family == socket.AF_INET6 and bool(flags & IFA_F_TEMPORARY),
            )
            addresses.setdefault(index, []).append(address)
        links = []
        request = bytes(IFINFOMSG.size) + attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, sys.byteorder))
        for answer in self._dumps.dump("list links", RTM_GETLINK, request):
            _, _, index, flags, _ = IFINFOMSG.unpack_from(answer, HEADER.size)
            said = attributes(answer[HEADER.size + IFINFOMSG.size :])
            links.append(
                Link(
                    name=_text(said[IFLA_IFNAME]),
                    index=index,
                    up=bool(flags & IFF_UP),
                    carrier=bool(flags & IFF_LOWER_UP),
                    mtu=_number(said, IFLA_MTU) or 0,
                    addresses=tuple(sorted(addresses.get(index, ()), key=_address_order)),
                )
            )
        self._names = {link.index: link.name for link in links}
        return tuple(sorted(links, key=lambda link: link.name))

    def is_up(self, name: str) -> bool:
        """Whether a link is there, up and with carrier: one question, however many links the host has."""
        try:
            index = socket.if_nametoindex(name)
        except OSError:
            return False
        answer = self._dumps.ask(f"ask for link {name}", RTM_GETLINK, IFINFOMSG.pack(0, 0, index, 0, 0))
        flags: int = IFINFOMSG.unpack_from(answer)[3]
        return flags & (IFF_UP | IFF_LOWER_UP) == IFF_UP | IFF_LOWER_UP

    def survey(self) -> Survey:
        """All that a look needs of tables which may be long, main before all.

        Whatever is asked, the kernel walks through all routes that there are, 50,000 of them in some milliseconds: so
        it is asked once for each family. What leads through a gateway is passed over before it is decoded, for to
        decode a full BGP table takes seconds.
        """
        near, connected, ours = list[_Routing](), list[_Routing](), list[_Routing]()
        for family in Family:
            found = self._dump_routes(family, _is_kept, _PASSED)
            ours += map(_Routing.of, (data for data in found if not _is_foreign(data, 0)))
            main = [data for data in found if data[RTM_TABLE] == TABLE_MAIN]
            near += _used(data for data in main if _NEAR[family](data, 0))
            for protocol in CONNECTED[family]:
                connected += _used(data for data in main if data[RTM_PROTOCOL] == protocol)
        return Survey(
            tuple(map(self._to_route, near)),
            tuple(map(self._to_route, connected)),
            frozenset(map(self._to_route, ours)),
        )

    def main_routes(self, family: Family, link: str) -> tuple[Route, ...]:
        """The unicast routes of table main by one link, which the kernel filters; none by a link that is gone."""
        index = _index_of(link)
        if index is None:
            return ()
        try:
            found = self._dump_routes(family, table=TABLE_MAIN, link=index)
        except KernelError:
            # The kernel knows no filter by a link that went just now.
            if _index_of(link) != index:
                return ()
            raise
        return tuple(map(self._to_route, _used(found)))

    def our_routes(self) -> frozenset[Route]:
        """The routes of our protocol number, whatever the table."""
        return frozenset(
            self._to_route(_Routing.of(data))
            for family in Family
            for data in self._dump_routes(family, protocol=PROTOCOL)
        )

    def foreign_routes(self, table: int) -> tuple[Route, ...]:
        """The routes of one table that are not of our protocol number."""
        return tuple(
            self._to_route(_Routing.of(data))
            for family in Family
            for data in self._dump_routes(family, _is_foreign, table=table)
        )

    def is_empty(self, table: int) -> bool:
        """Whether a table has no route at all, in no family; those that are there are not decoded."""
        return not any(self._dump_routes(family, table=table) for family in Family)

    def local_addresses(self) -> frozenset[Address]:
        """The addresses that are this host's own by routes of table local."""
        return frozenset(
            ip_address(_Routing.of(data).attributes[RTA_DST])
            for family in Family
            for data in self._dump_routes(family, _IS_OWN[family], table=TABLE_LOCAL)
        )

    def rules(self) -> tuple[tuple[Rule, bool], ...]:
        """All rules in the kernel's order, each with whether it is ours by its protocol number."""
        return tuple((_to_rule(data), _is_our_rule(data)) for data in self._dump_rules())

    def our_rules(self) -> tuple[Rule, ...]:
        """The rules of our protocol number, in the kernel's order; a rule that is there twice is here twice."""
        return tuple(_to_rule(data) for data in self._dump_rules() if _is_our_rule(data))

    def lookup(
        self, destination: Address, *, source: Address | None = None, fwmark: int = 0, arriving: str | None = None
    ) -> Lookup:
        """Ask the kernel for a packet's route, as `ip route get` does; with `arriving` as for one that is forwarded."""
        (answer,) = self.lookups([(destination, source, fwmark, arriving)])
        return answer

    def lookups(self, packets: Iterable[Packet]) -> tuple[Lookup, ...]:
        """The same for many packets, which takes half as long each."""
        bodies = [self._asking_for(*packet) for packet in packets]
        return tuple(map(self._to_lookup, self._dumps.ask_each("look up routes", RTM_GETROUTE, bodies)))

    def _asking_for(self, destination: Address, source: Address | None, fwmark: int, arriving: str | None) -> bytes:
        family = Family.of(destination)
        # Else IPv4 answers "254" whatever the table. IPv6 always tells, and refuses the flag.
        flags = RTM_F_LOOKUP_TABLE if family is Family.IPV4 else 0
        header = RTMSG.pack(family.number, family.bits, family.bits if source else 0, 0, 0, 0, 0, 0, flags)
        asked = {RTA_DST: destination.packed}
        if source:
            asked[RTA_SRC] = source.packed
        if fwmark:
            asked[RTA_MARK] = fwmark.to_bytes(4, sys.byteorder)
        if arriving:
            asked[RTA_IIF] = self._index(arriving).to_bytes(4, sys.byteorder)
        return header + b"".join(attribute(kind, value) for kind, value in asked.items())

    def _to_lookup(self, said: bytes | str) -> Lookup:
        if isinstance(said, str):
            return Lookup(error=said)
        answer = _Routing.of(said, 0)
        if answer.kind not in (RTN_UNICAST, RTN_LOCAL):
            # IPv6 answers with the route itself where IPv4 answers with an error.
            return Lookup(table=answer.table_number, error=_kind(answer))
        hop = self._to_hops(answer)[0]
        return Lookup(table=answer.table_number, link=hop.link, via=hop.via)

    # --- writing ---

    @cached_property
    def _writer(self) -> IPRoute:
        if _namespace() != self._namespace:
            raise KernelError("open rtnetlink for changes", "this thread has gone to another network namespace")
        from pyroute2 import IPRoute  # noqa: PLC0415

        return IPRoute(strict_check=True, ext_ack=True)

    def prepare(self) -> None:
        """Have at hand what changes are made with, so that the first one is not kept waiting for its import."""
        _ = self._writer

    def add_route(self, route: Route) -> None:
        self._change_route("add", route)

    def replace_route(self, route: Route) -> None:
        """Put a route in the place of the one with the same key, in one step."""
        self._change_route("replace", route)

    def delete_route(self, route: Route) -> None:
        """Delete a route; one that is gone already is fine."""
        self._change_route("del", route)

    def add_rule(self, rule: Rule) -> None:
        """Add a rule; one that is there already, of our protocol number, is fine."""
        self._change_rule("add", rule, frozenset({errno.EEXIST}))

    def delete_rule(self, rule: Rule) -> None:
        """Delete a rule; one that is gone already is fine."""
        self._change_rule("del", rule, GONE)

    def _change_route(self, verb: str, route: Route) -> None:
        request: dict[str, Any] = {
            "family": route.family.number,
            "dst": str(route.destination) if route.destination.length else "default",
            "table": route.table,
            "type": route.kind,
            "proto": PROTOCOL,
        }
        if route.destination.length == route.family.bits:
            request["dst"] = f"{route.destination}/{route.family.bits}"
        if route.metric:
            request["priority"] = route.metric
        if route.tos:
            request["tos"] = route.tos
        if verb == "del":
            # By its key and protocol alone: what somebody made under our number may have hops that we don't model.
            if route.family is Family.IPV4:
                request["scope"] = RT_SCOPE_NOWHERE
            with _asking(f"{route.family.ip} route {verb} {route}", GONE):
                self._writer.route(verb, **request)
            return
        if route.source:
            request["prefsrc"] = str(route.source)
        if route.family is Family.IPV4 and route.kind == "unicast":
            # A gateway is looked for among routes of a narrower scope only (net/ipv4/fib_semantics.c, fib_check_nh).
            direct = all(hop.via is None for hop in route.hops)
            request["scope"] = RT_SCOPE_LINK if direct else RT_SCOPE_UNIVERSE
        with _asking(f"{route.family.ip} route {verb} {route}"):
            if len(route.hops) == 1:
                request |= self._from_hop(route.hops[0], route.family)
            elif route.hops:
                request["multipath"] = [
                    {"hops": hop.weight - 1, **self._from_hop(hop, route.family)} for hop in route.hops
                ]
            self._writer.route(verb, **request)

    def _change_rule(self, verb: str, rule: Rule, fine: frozenset[int]) -> None:
        request: dict[str, Any] = {
            "family": rule.family.number,
            "priority": rule.priority,
            "table": rule.table,
            "action": _action_number(rule.action),
            "protocol": PROTOCOL,
        }
        if rule.fwmark:
            request |= {"fwmark": rule.fwmark.value, "fwmask": rule.fwmark.mask}
        if rule.unmarked:
            request |= {"FRA_FWMARK": 0, "FRA_FWMASK": rule.unmarked}
        if rule.iif:
            request["iifname"] = rule.iif
        if rule.target:
            request["goto"] = rule.target
        if rule.source:
            request |= {"src": str(rule.source).partition("/")[0], "src_len": rule.source.length}
        request |= {name: _thaw(value) for name, value in rule.extra}
        with _asking(f"{rule.family.ip} rule {verb} {rule}", fine):
            self._writer.rule(verb, **request)

    # --- conversions ---

    def _index(self, name: str) -> int:
        index = _index_of(name)
        if index is None:
            raise KernelError(f"find link {name}", os.strerror(errno.ENODEV))
        return index

    def _name(self, index: int) -> str:
        if index not in self._names:
            # A link that was renamed or re-created keeps or changes its index: links() starts the names afresh.
            try:
                self._names[index] = socket.if_indextoname(index)
            except OSError:
                return f"if{index}"  # gone between the dump and now; a next pass sees it gone
        return self._names[index]

    def _to_route(self, message: _Routing) -> Route:
        family = _family(message)
        destination = message.attributes.get(RTA_DST)
        kind = _kind(message)
        return Route(
            destination=(
                Prefix(family, int.from_bytes(destination, "big"), message.destination_length)
                if destination
                else Prefix.default(family)
            ),
            table=message.table_number,
            # An IPv6 route that is not unicast reads back with "dev lo", which nobody asked for.
            hops=self._to_hops(message) if kind == "unicast" else (),
            kind=kind,
            metric=message.number(RTA_PRIORITY) or 0,
            source=message.address(RTA_PREFSRC),
            tos=message.tos,
        )

    def _to_hops(self, message: _Routing) -> tuple[Hop, ...]:
        several = message.attributes.get(RTA_MULTIPATH)
        if not several:
            return (self._to_hop(message.attributes, message.number(RTA_OIF) or 0, message.flags, 1),)
        hops, offset = list[Hop](), 0
        while offset < len(several):
            size, flags, others, index = RTNEXTHOP.unpack_from(several, offset)
            said = attributes(several[offset + RTNEXTHOP.size : offset + size])
            hops.append(self._to_hop(said, index, flags, others + 1))
            offset += (size + 3) & ~3
        return tuple(hops)

    def _to_hop(self, said: Attributes, index: int, flags: int, weight: int) -> Hop:
        # RTA_VIA, a gateway of the other family: two bytes that say which one, then the address (struct rtvia).
        via = said.get(RTA_GATEWAY) or said.get(RTA_VIA, b"")[2:]
        return Hop(
            link=self._name(index),
            via=ip_address(via) if via else None,
            # The same word holds the kernel's own notes (dead, linkdown, offload): only this one is configuration.
            onlink=bool(flags & RTNH_F_ONLINK),
            weight=weight,
        )

    def _from_hop(self, hop: Hop, family: Family) -> dict[str, Any]:
        request: dict[str, Any] = {"oif": self._index(hop.link)}
        if hop.via and Family.of(hop.via) is family:
            request["gateway"] = str(hop.via)
        elif hop.via:
            request["via"] = {"family": Family.of(hop.via).number, "addr": str(hop.via)}
        if hop.onlink:
            request["flags"] = RTNH_F_ONLINK
        return request

    def _dump_routes(
        self,
        family: Family,
        wanted: Wanted | None = None,
        over: bytes = b"",
        *,
        table: int = 0,
        link: int = 0,
        protocol: int = 0,
    ) -> list[bytes]:
        """The messages of a dump that the kernel filters by table, link and protocol (NETLINK_GET_STRICT_CHK).

        pyroute2's own dumps don't let it (4 s with 50,000 foreign routes where this takes 1 ms), and take one for whole
        that a change interrupted.
        """
        body = RTMSG.pack(family.number, 0, 0, 0, 0, protocol, 0, 0, 0)
        for kind, value in ((RTA_TABLE, table), (RTA_OIF, link)):
            body += attribute(kind, value.to_bytes(4, sys.byteorder)) if value else b""
        return self._dumps.dump(f"list {family} routes", RTM_GETROUTE, body, wanted, over)

    def _dump_rules(self) -> Iterator[bytes]:
        for family in Family:
            body = RTMSG.pack(family.number, *bytes(8))
            yield from self._dumps.dump(f"list {family} rules", RTM_GETRULE, body)


def _namespace() -> tuple[int, int]:
    """What tells the network namespace of this thread from all others (namespaces(7))."""
    status = os.stat("/proc/thread-self/ns/net")
    return status.st_dev, status.st_ino


def _index_of(link: str) -> int | None:
    try:
        return socket.if_nametoindex(link)
    except OSError:
        return None


def _used(messages: Iterable[bytes]) -> list[_Routing]:
    """Other people's unicast routes of main. Of those that routers advertise, without what the kernel doesn't use:
    whose time is over, or beside which a router that is preferred has one.
    """
    found = [
        message
        for message in map(_Routing.of, messages)
        # IPv6 told of a table above 255 by its lower byte once (net/ipv6/route.c, rt6_fill_node): 510 looks like main.
        if message.table_number == TABLE_MAIN
        and message.kind == RTN_UNICAST
        and message.protocol != PROTOCOL
        and not _is_expired(message)
    ]
    best: dict[object, int] = {}
    for message in found:
        best[_rivals(message)] = max(_preference(message), best.get(_rivals(message), -1))
    return [message for message in found if _preference(message) == best[_rivals(message)]]


def _is_expired(message: _Routing) -> bool:
    """An IPv6 route whose time is over is dumped until it is collected, half a minute later; lookups pass it over."""
    cache = message.attributes.get(RTA_CACHEINFO)
    return cache is not None and int(EXPIRES.unpack_from(cache)[0]) < 0


def _rivals(message: _Routing) -> object:
    """What the routes of several routers on a link have in common: the kernel keeps them side by side."""
    return (message.destination_length, *map(message.attributes.get, (RTA_DST, RTA_PRIORITY, RTA_OIF)))


def _preference(message: _Routing) -> int:
    """A router's preference (RFC 4191): 1 high, 0 medium, -1 low; two bits, 3 for the last (linux/icmpv6.h)."""
    return {1: 1, 3: -1}.get(message.attributes.get(RTA_PREF, b"\0")[0], 0)


def _family(message: _Routing) -> Family:
    return Family.IPV4 if message.family == socket.AF_INET else Family.IPV6


def _kind(message: _Routing) -> str:
    return KINDS[message.kind] if message.kind < len(KINDS) else str(message.kind)


def _number(said: Attributes, kind: int) -> int | None:
    """A number of 32 bits in the machine's byte order, if it is there."""
    return int.from_bytes(said[kind], sys.byteorder) if kind in said else None


def _text(data: bytes) -> str:
    """A name. The kernel allows any bytes in a link's."""
    return os.fsdecode(data.rstrip(b"\0"))


def _is_foreign(data: bytes, offset: int) -> bool:
    return data[offset + RTM_PROTOCOL] != PROTOCOL


def _near_ipv4(data: bytes, offset: int) -> bool:
    """The scope tells: a route through a gateway has a wider one than `link`."""
    return not data[offset + RTM_DST_LEN] or data[offset + RTM_SCOPE] == RT_SCOPE_LINK


def _near_ipv6(data: bytes, offset: int) -> bool:
    """IPv6 has no scopes; a routing daemon's routes lead through gateways, of the others the attributes tell."""
    if not data[offset + RTM_DST_LEN]:
        return True
    if data[offset + RTM_PROTOCOL] not in HOUSEHOLD:
        return False
    (size,) = struct.unpack_from("=I", data, offset)
    at, end = offset + RTM_ATTRIBUTES, offset + size
    while at < end:
        length, kind = struct.unpack_from("=HH", data, at)
        if kind == RTA_GATEWAY:
            return False
        at += (length + 3) & ~3
    return True


def _is_own(family: Family) -> Wanted:
    """Whether a route is that of one address which is the host's own."""

    def wanted(data: bytes, offset: int) -> bool:
        return data[offset + RTM_DST_LEN] == family.bits and data[offset + RTM_TYPE] == RTN_LOCAL

    return wanted


_IS_OWN = {family: _is_own(family) for family in Family}
_NEAR: dict[Family, Wanted] = {Family.IPV4: _near_ipv4, Family.IPV6: _near_ipv6}
#: Routes with these protocols are ours, or may be near, or connected.
_PROTOCOLS = bytes(sorted({*HOUSEHOLD, PROTOCOL}))
#: How an rtmsg begins that is none of that: no default, of another protocol, and of another scope than `link`.
_PASSED = rb".[^\0].{3}[^%b][^%c]" % (re.escape(_PROTOCOLS), RT_SCOPE_LINK)


def _is_kept(data: bytes, offset: int) -> bool:
    return (
        not data[offset + RTM_DST_LEN]
        or data[offset + RTM_PROTOCOL] in _PROTOCOLS
        or data[offset + RTM_SCOPE] == RT_SCOPE_LINK
    )


def _is_our_rule(data: bytes) -> bool:
    protocol = bytes((PROTOCOL,))
    return any(kind == FRA_PROTOCOL and value == protocol for kind, value in each(data[HEADER.size + RTMSG.size :]))


def _to_rule(data: bytes) -> Rule:
    message = _Routing.of(data)
    family = _family(message)
    value, mask = message.number(FRA_FWMARK), message.number(FRA_FWMASK)
    extra = _more(data, message)
    source, text = None, message.attributes.get(FRA_SRC)
    if text:
        written, host = int.from_bytes(text, "big"), (1 << family.bits - message.source_length) - 1
        source = Prefix(family, written & ~host, message.source_length)
        # ip(8) lets a source have host bits; the kernel masks them when it matches, and wants them for a delete.
        if written & host:
            extra.append(("src", str(ip_address(text))))
    # The kernel takes a mark that does not fit its mask, and matches nothing by it.
    fits = not (value or 0) & ~(mask or 0)
    if not fits:
        extra += [("FRA_FWMARK", value), ("FRA_FWMASK", mask)]
    if message.destination_length:
        extra.append(("dst_len", message.destination_length))
    if message.tos:
        extra.append(("tos", message.tos))
    if message.flags & FIB_RULE_INVERT:
        extra.append(("flags", FIB_RULE_INVERT))
    return Rule(
        family=family,
        priority=message.number(FRA_PRIORITY) or 0,
        table=message.table_number,
        # A rule without an explicit mask reads back 0xffffffff.
        fwmark=Fwmark(value, mask or 0) if value and fits else None,
        source=source,
        unmarked=mask if mask and not value else 0,
        iif=_text(message.attributes.get(FRA_IIFNAME, b"")),
        action=ACTIONS.get(message.kind, f"type {message.kind}"),
        target=message.number(FRA_GOTO) or 0,
        extra=tuple(extra),
    )


def _more(data: bytes, message: _Routing) -> list[tuple[str, Any]]:
    """What else a rule says, in pyroute2's names and values: with these it is deleted."""
    more = message.attributes.keys() - RULE_ATTRIBUTES.keys()
    if message.number(FRA_SUPPRESS_PREFIXLEN) == SUPPRESS_NOTHING:
        more -= {FRA_SUPPRESS_PREFIXLEN}
    if not more:
        return []
    from pyroute2.netlink.rtnl.fibmsg import fibmsg  # noqa: PLC0415

    decoded = fibmsg(data)
    decoded.decode()
    return [
        (name, _freeze(value))
        for name, value in decoded["attrs"]
        if name not in RULE_ATTRIBUTES.values() and (name, value) != ("FRA_SUPPRESS_PREFIXLEN", SUPPRESS_NOTHING)
    ]


def _action_number(word: str) -> int:
    return next((number for number, known in ACTIONS.items() if known == word), None) or int(word.split()[1])


def _freeze(value: object) -> Any:
    """A netlink value as something that can be compared and put into a set."""
    return tuple((key, _freeze(item)) for key, item in value.items()) if isinstance(value, Mapping) else value


def _thaw(value: object) -> Any:
    return {key: _thaw(item) for key, item in value} if isinstance(value, tuple) else value


def _address_order(address: LinkAddress) -> tuple[int, int]:
    return (address.address.version, int(address.address))


@contextmanager
def _asking(doing: str, fine: frozenset[int] = frozenset()) -> Iterator[None]:
    """Turn what pyroute2 and the socket raise into KernelError; errors in `fine` are passed over."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        yield
    except NetlinkError as error:
        if error.code in fine:
            return
        why = os.strerror(error.code)
        # The kernel's extended acknowledgement, where there is one, says more than the number.
        said = str(error.args[1])
        raise KernelError(doing, why if said == why else f"{why} ({said})") from error
    except OSError as error:
        raise KernelError(doing, os.strerror(error.errno or 0)) from error
