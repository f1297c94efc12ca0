"""rtnetlink: links, addresses, routes, rules and route lookups of this network namespace.

The only importer of pyroute2. No netlink message crosses this room's door: what comes in and goes out are values of
`agent.model`; a field's oddity is explained where it is converted.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from types import TracebackType
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import rt_type
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.kernel import KernelError
from agent.kernel.netlink import HEADER, Netlink, Wanted
from agent.model import (
    GOTO,
    LOOKUP,
    NOP,
    PROTOCOL,
    TABLE_MAIN,
    UNREACHABLE,
    Address,
    Family,
    Fwmark,
    Hop,
    Link,
    LinkAddress,
    Lookup,
    Prefix,
    Route,
    Rule,
)

RTM_GETLINK, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE, RTM_GETRULE = 18, 22, 24, 26, 34
#: Offsets of the destination's length, the protocol, the scope and the attributes from a route message's start
#: (linux/netlink.h, linux/rtnetlink.h).
RTM_DST_LEN, RTM_PROTOCOL, RTM_SCOPE, RTM_ATTRIBUTES = 17, 21, 22, 28
RTA_GATEWAY = 5

#: ifinfomsg: family, type, index, flags, change (linux/rtnetlink.h).
IFINFOMSG = struct.Struct("=BxHiII")
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x1, 0x8, 0x20, 0x40
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
RTN_UNICAST = 1
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

#: What a rule of ours may say; `FRA_SUPPRESS_PREFIXLEN` is in every dump, 0xffffffff meaning "no".
RULE_ATTRIBUTES = frozenset(
    {
        "FRA_PRIORITY",
        "FRA_TABLE",
        "FRA_FWMARK",
        "FRA_FWMASK",
        "FRA_SRC",
        "FRA_IIFNAME",
        "FRA_GOTO",
        "FRA_PROTOCOL",
    }
)
SUPPRESS_NOTHING = 0xFFFFFFFF

#: The routes that are gone already when a delete comes: with their link, or by somebody else's hand.
GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})

Message = Any  # pyroute2's nlmsg: a dict of header fields, with get_attr()


class Rtnl:
    """A conversation with rtnetlink in the namespace of the thread that opened it. Every method raises KernelError."""

    def __init__(self) -> None:
        self._ipr = IPRoute(strict_check=True, ext_ack=True)
        self._dumps = Netlink(socket.NETLINK_ROUTE, strict=True)
        self._names: dict[int, str] = {}

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dumps.close()
        self._ipr.close()

    # --- reading ---

    def links(self) -> tuple[Link, ...]:
        """All links with their addresses, by name; the sysctls are `agent.kernel.sysctl`'s to add.

        An address that turned out to be a neighbour's is left out: nothing can be sent from it, nor arrives for it.
        """
        addresses: dict[int, list[LinkAddress]] = {}
        for message in self._dump("list addresses", RTM_GETADDR, ifaddrmsg()):
            flags = message.get_attr("IFA_FLAGS") or 0
            if flags & IFA_F_DADFAILED:
                continue
            # On a point-to-point link IFA_ADDRESS is the peer's, IFA_LOCAL ours; IPv6 gives the latter only there.
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            address = LinkAddress(
                address=ip_address(text),
                length=message["prefixlen"],
                scope_global=message["scope"] == RT_SCOPE_UNIVERSE,
                tentative=bool(flags & IFA_F_TENTATIVE),
                deprecated=bool(flags & IFA_F_DEPRECATED),
                # The same bit is IFA_F_SECONDARY in IPv4: a second address of one network.
                temporary=message["family"] == socket.AF_INET6 and bool(flags & IFA_F_TEMPORARY),
            )
            addresses.setdefault(message["index"], []).append(address)
        request = ifinfmsg()
        request["attrs"] = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS)]
        links = [
            Link(
                name=_link_name(message.get_attr("IFLA_IFNAME")),
                index=message["index"],
                up=bool(message["flags"] & IFF_UP),
                carrier=bool(message["flags"] & IFF_LOWER_UP),
                mtu=message.get_attr("IFLA_MTU"),
                addresses=tuple(sorted(addresses.get(message["index"], ()), key=_address_order)),
            )
            for message in self._dump("list links", RTM_GETLINK, request)
        ]
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

    def main_routes(
        self, family: Family, *, link: str | None = None, protocol: int = 0, near: bool = False
    ) -> tuple[Route, ...]:
        """Unicast routes of table main, by one link or by all, of one protocol or of all; none by a link that is gone.

        The kernel filters by table, link and protocol (kernel-side only since Linux 4.20, NETLINK_GET_STRICT_CHK).
        With `near` only defaults and what leads straight onto the link; the others are passed over before they are
        decoded, for to decode a full BGP table takes seconds. Of the routes that routers advertise, those are left out
        that the kernel doesn't use: whose time is over, or beside which a router that is preferred has one.
        """
        index = _index_of(link) if link else 0
        if index is None:
            return ()
        wanted = _NEAR[family] if near else None
        messages = self._dump_routes(family, table=TABLE_MAIN, link=index, protocol=protocol, wanted=wanted)
        try:
            found = [
                message
                for message in messages
                if message["type"] == RTN_UNICAST and message["proto"] != PROTOCOL and not _is_expired(message)
            ]
        except KernelError:
            # The kernel knows no filter by a link that went just now.
            if link and _index_of(link) != index:
                return ()
            raise
        best: dict[object, int] = {}
        for message in found:
            best[_rivals(message)] = max(_preference(message), best.get(_rivals(message), -1))
        return tuple(self._to_route(message) for message in found if _preference(message) == best[_rivals(message)])

    def our_routes(self) -> frozenset[Route]:
        """The routes of our protocol number, whatever the table."""
        return frozenset(
            self._to_route(message) for family in Family for message in self._dump_routes(family, protocol=PROTOCOL)
        )

    def foreign_routes(self, table: int) -> tuple[Route, ...]:
        """The routes of one table that are not of our protocol number."""
        return tuple(
            self._to_route(message)
            for family in Family
            for message in self._dump_routes(family, table=table, wanted=_is_foreign)
        )

    def is_empty(self, table: int) -> bool:
        """Whether a table has no route at all, in no family; those that are there are not decoded."""
        return not any(True for family in Family for _ in self._dump_routes(family, table=table))

    def rules(self) -> tuple[tuple[Rule, bool], ...]:
        """All rules in the kernel's order, each with whether it is ours by its protocol number."""
        return tuple(
            (_to_rule(message), message.get_attr("FRA_PROTOCOL") == PROTOCOL)
            for family in Family
            for message in self._dump(f"list {family} rules", RTM_GETRULE, _of_family(fibmsg(), family))
        )

    def our_rules(self) -> tuple[Rule, ...]:
        """The rules of our protocol number, in the kernel's order; a rule that is there twice is here twice."""
        return tuple(rule for rule, ours in self.rules() if ours)

    def lookup(
        self, destination: Address, *, source: Address | None = None, fwmark: int = 0, arriving: str | None = None
    ) -> Lookup:
        """Ask the kernel for a packet's route, as `ip route get` does; with `arriving` as for one that is forwarded."""
        family = Family.of(destination)
        question = _of_family(rtmsg(), family)
        question["dst_len"] = family.bits
        question["attrs"] = [("RTA_DST", str(destination))]
        if family is Family.IPV4:
            # Else IPv4 answers "254" whatever the table. IPv6 always tells, and refuses the flag.
            question["flags"] = RTM_F_LOOKUP_TABLE
        if source:
            question["src_len"] = family.bits
            question["attrs"].append(("RTA_SRC", str(source)))
        if fwmark:
            question["attrs"].append(("RTA_MARK", fwmark))
        if arriving:
            question["attrs"].append(("RTA_IIF", self._index(arriving)))
        question.encode()
        # By pyroute2's own request this takes three times as long, and every scrape asks once an identity and family.
        doing = f"look up the route to {destination}"
        try:
            body = self._dumps.ask(doing, RTM_GETROUTE, bytes(question.data[HEADER.size :]))
        except KernelError as error:
            return Lookup(error=error.why)
        answer = rtmsg(HEADER.pack(HEADER.size + len(body), RTM_NEWROUTE, 0, 0, 0) + body)
        answer.decode()
        if answer["type"] not in (RTN_UNICAST, 2):  # 2: RTN_LOCAL
            # IPv6 answers with the route itself where IPv4 answers with an error.
            return Lookup(table=_table(answer), error=rt_type.get(answer["type"], str(answer["type"])))
        hop = self._to_hops(answer)[0]
        return Lookup(table=_table(answer), link=hop.link, via=hop.via)

    # --- writing ---

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
                self._ipr.route(verb, **request)
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
            self._ipr.route(verb, **request)

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
            self._ipr.rule(verb, **request)

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

    def _to_route(self, message: Message) -> Route:
        family = Family.IPV4 if message["family"] == socket.AF_INET else Family.IPV6
        destination = message.get_attr("RTA_DST")
        kind = rt_type.get(message["type"], str(message["type"]))
        source = message.get_attr("RTA_PREFSRC")
        return Route(
            destination=(
                Prefix.parse(f"{destination}/{message['dst_len']}") if destination else Prefix.default(family)
            ),
            table=_table(message),
            # An IPv6 route that is not unicast reads back with "dev lo", which nobody asked for.
            hops=self._to_hops(message) if kind == "unicast" else (),
            kind=kind,
            metric=message.get_attr("RTA_PRIORITY") or 0,
            source=ip_address(source) if source else None,
            tos=message["tos"],
        )

    def _to_hops(self, message: Message) -> tuple[Hop, ...]:
        several = message.get_attr("RTA_MULTIPATH")
        if several:
            return tuple(self._to_hop(hop, hop["oif"], hop["hops"] + 1) for hop in several)
        return (self._to_hop(message, message.get_attr("RTA_OIF") or 0, 1),)

    def _to_hop(self, message: Message, index: int, weight: int) -> Hop:
        via = message.get_attr("RTA_GATEWAY")
        other = message.get_attr("RTA_VIA")
        if other:
            via = other["addr"]
        return Hop(
            link=self._name(index),
            via=ip_address(via) if via else None,
            # The same word holds the kernel's own notes (dead, linkdown, offload): only this one is configuration.
            onlink=bool(message["flags"] & RTNH_F_ONLINK),
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
        *,
        table: int = 0,
        link: int = 0,
        protocol: int = 0,
        wanted: Wanted | None = None,
    ) -> Iterator[Message]:
        """Routes of a dump that the kernel filters by table, link and protocol."""
        request = _of_family(rtmsg(), family)
        request["proto"] = protocol
        request["attrs"] = [("RTA_TABLE", table)] * bool(table) + [("RTA_OIF", link)] * bool(link)
        return self._dump(f"list {family} routes", RTM_GETROUTE, request, wanted)

    def _dump(self, doing: str, kind: int, request: Message, wanted: Wanted | None = None) -> Iterator[Message]:
        """The messages of a dump, decoded by pyroute2.

        Its own dumps don't let the kernel filter (4 s with 50,000 foreign routes where this takes 1 ms), and take one
        for whole that a change interrupted.
        """
        request.encode()
        for answer in self._dumps.dump(doing, kind, bytes(request.data[HEADER.size :]), wanted):
            message = type(request)(answer)
            message.decode()
            yield message


def _index_of(link: str) -> int | None:
    try:
        return socket.if_nametoindex(link)
    except OSError:
        return None


def _is_expired(message: Message) -> bool:
    """An IPv6 route whose time is over is dumped until it is collected, half a minute later; lookups pass it over."""
    cache = message.get_attr("RTA_CACHEINFO")
    return bool(cache) and int(cache["rta_expires"]) < 0


def _rivals(message: Message) -> object:
    """What the routes of several routers on a link have in common: the kernel keeps them side by side."""
    attributes = [message.get_attr(name) for name in ("RTA_DST", "RTA_PRIORITY", "RTA_OIF")]
    return (message["dst_len"], *attributes)


def _preference(message: Message) -> int:
    """A router's preference (RFC 4191): 1 high, 0 medium, -1 low; two bits, 3 for the last (linux/icmpv6.h)."""
    return {1: 1, 3: -1}.get(message.get_attr("RTA_PREF") or 0, 0)


def _of_family(request: Message, family: Family) -> Message:
    request["family"] = family.number
    return request


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


_NEAR: dict[Family, Wanted] = {Family.IPV4: _near_ipv4, Family.IPV6: _near_ipv6}


def _link_name(name: str | bytes) -> str:
    """The kernel allows any bytes in a name; pyroute2 leaves those undecoded that are not UTF-8."""
    return name if isinstance(name, str) else os.fsdecode(name)


def _table(message: Message) -> int:
    """The header's byte says 252 for "see the attribute"."""
    return int(message.get_attr("RTA_TABLE") or message["table"])


def _to_rule(message: Message) -> Rule:
    family = Family.IPV4 if message["family"] == socket.AF_INET else Family.IPV6
    value, mask = message.get_attr("FRA_FWMARK"), message.get_attr("FRA_FWMASK")
    source = message.get_attr("FRA_SRC")
    extra = [
        (name, _freeze(value))
        for name, value in message["attrs"]
        if name not in RULE_ATTRIBUTES and (name, value) != ("FRA_SUPPRESS_PREFIXLEN", SUPPRESS_NOTHING)
    ]
    network = ip_network(f"{source}/{message['src_len']}", strict=False) if source else None
    # ip(8) lets a source have host bits; the kernel masks them when it matches, and wants them for a delete.
    if network and str(network.network_address) != source:
        extra.append(("src", source))
    # The kernel takes a mark that does not fit its mask, and matches nothing by it.
    fits = not (value or 0) & ~(mask or 0)
    if not fits:
        extra += [("FRA_FWMARK", value), ("FRA_FWMASK", mask)]
    extra += [(name, message[name]) for name in ("dst_len", "tos") if message[name]]
    if message["flags"] & FIB_RULE_INVERT:
        extra.append(("flags", FIB_RULE_INVERT))
    return Rule(
        family=family,
        priority=message.get_attr("FRA_PRIORITY") or 0,
        # msg["table"] is one byte (252: "see the attribute"); FRA_TABLE is the truth.
        table=message.get_attr("FRA_TABLE") or message["table"],
        # A rule without an explicit mask reads back 0xffffffff.
        fwmark=Fwmark(value, mask) if value and fits else None,
        source=Prefix.parse(str(network)) if network else None,
        unmarked=mask if mask and not value else 0,
        iif=message.get_attr("FRA_IIFNAME") or "",
        action=ACTIONS.get(message["action"], f"type {message['action']}"),
        target=message.get_attr("FRA_GOTO") or 0,
        extra=tuple(extra),
    )


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
