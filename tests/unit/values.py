"""Small builders for the shared values, written as an operator writes them, and Hypothesis strategies for whole
policies, hosts and kernels. A strategy only makes what its real source could: the door, the kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_interface

from hypothesis import strategies as st

from agent import ruleset
from agent.addresses import Address, Addresses, Family, Prefix, Prefixes, parse_address, sorted_addresses
from agent.desired import Desired
from agent.model import (
    MAIN,
    METRIC_LAST,
    TABLE_MAIN,
    UNREACHABLE,
    Facts,
    Fwmark,
    Hop,
    Identity,
    Kernel,
    Link,
    LinkAddress,
    NextHop,
    Policy,
    Probe,
    Route,
    Rule,
    Table,
)
from agent.plan import Observed

# --- builders --------------------------------------------------------------------------------------------------------


def prefixes(*texts: str) -> Prefixes:
    """Networks from their texts."""
    return Prefixes.of(map(Prefix.parse, texts))


def by_name(sources: Iterable[tuple[Prefix, str]]) -> dict[str, Prefixes]:
    """Each name's networks, from pairs."""
    found: dict[str, list[Prefix]] = {}
    for prefix, name in sources:
        found.setdefault(name, []).append(prefix)
    return {name: Prefixes.of(several) for name, several in found.items()}


def identity(
    name: str,
    number: int,
    link: str,
    *,
    addresses: str | Sequence[str] = "auto",
    members: Sequence[str] = (),
    next_hop: str | Sequence[str] = "none",
    when_down: str = UNREACHABLE,
    masquerade: bool = False,
    clamp_mss: bool = False,
    probe: Probe | None = None,
    flush_flows: bool = False,
    kernel: Kernel | None = None,
) -> Identity:
    """An identity from the values that stand in a policy."""
    kernel = kernel or Kernel()
    hop: NextHop
    match next_hop:
        case "none":
            hop = "none"
        case "auto":
            hop = "auto"
        case _:
            hop = sorted_addresses(map(parse_address, next_hop))
    return Identity(
        name=name,
        id=number,
        link=link,
        fwmark=Fwmark(number * (kernel.mark_mask & -kernel.mark_mask), kernel.mark_mask),
        table=kernel.table_base + number,
        priority=kernel.rule_priority + number,
        addresses=None if addresses == "auto" else sorted_addresses(map(parse_address, addresses)),
        members=prefixes(*members),
        next_hop=hop,
        when_down=when_down,
        masquerade=masquerade,
        clamp_mss=clamp_mss,
        probe=probe,
        flush_flows=flush_flows,
    )


def policy(*identities: Identity, downstream: Sequence[str] | None = None, kernel: Kernel | None = None) -> Policy:
    """A policy with these identities."""
    return Policy(
        gateway="gw1",
        downstream=None if downstream is None else tuple(sorted(downstream)),
        identities=tuple(sorted(identities, key=lambda item: item.id)),
        kernel=kernel or Kernel(),
        digest="0" * 64,
    )


def link(
    name: str,
    *addresses: str,
    up: bool = True,
    carrier: bool = True,
    mtu: int = 1500,
    rp_filter: int = 0,
    src_valid_mark: bool = False,
) -> Link:
    """A link with its addresses, each as `203.0.113.2/24`."""
    interfaces = [ip_interface(text) for text in addresses]
    return Link(
        name=name,
        index=2 + sum(name.encode()),
        up=up,
        carrier=carrier,
        mtu=mtu,
        addresses=tuple(
            LinkAddress(item.ip, item.network.prefixlen, scope_global=not item.ip.is_link_local) for item in interfaces
        ),
        rp_filter=rp_filter,
        src_valid_mark=src_valid_mark,
    )


def route(text: str, table: int = TABLE_MAIN) -> Route:
    """A route as in ip-route(8), its destination always written out: `0.0.0.0/0 via 203.0.113.1 dev wan metric 100`."""
    head, *legs = text.split(" nexthop ")
    kind, words = "unicast", head.split()
    if words[0].isalpha():
        kind, *words = words
    options = dict(zip(words[1::2], words[2::2], strict=True))
    hops = [options] if "dev" in options else [dict(zip(*[iter(leg.split())] * 2, strict=True)) for leg in legs]
    return Route(
        destination=Prefix.parse(words[0]),
        table=table,
        hops=tuple(
            Hop(hop["dev"], parse_address(hop["via"]) if "via" in hop else None, weight=int(hop.get("weight", 1)))
            for hop in hops
        ),
        kind=kind,
        metric=int(options.get("metric", 0)),
        source=parse_address(options["src"]) if "src" in options else None,
    )


def host(*links: Link, routes: Iterable[str] = ()) -> Facts:
    """A host with these links, with the connected routes that the kernel makes for their addresses, and these routes.

    The kernel makes them when a link comes up, with metric 256 for IPv6.
    """
    connected = [
        Route(
            Prefix.parse(str(ip_interface(f"{item.address}/{item.length}").network)),
            TABLE_MAIN,
            (Hop(each.name),),
            metric=0 if item.address.version == 4 else 256,
            source=item.address if item.address.version == 4 else None,
        )
        for each in links
        for item in each.addresses
        if each.up and item.length < item.address.max_prefixlen
    ]
    # Of two routes with one key main has one.
    every = {item.key: item for item in reversed([*connected, *map(route, routes)])}
    return Facts(tuple(links), tuple(sorted(every.values(), key=lambda item: (item.key, str(item)))))


#: The lab's net: I on the VPN, O on the provider's link, a LAN behind.
INSIDE = identity("inside", 1, "vpn0", addresses=["192.0.2.130", "2001:db8:4::130"], members=["10.9.0.0/24"])
OUTSIDE = identity("outside", 2, "wan", next_hop="auto")
WAN = link("wan", "203.0.113.2/24", "2001:db8:203::2/64", "fe80::2/64")
VPN = link("vpn0", "192.0.2.130/25", "2001:db8:4::130/64", mtu=1360)
LAN = link("lan", "10.9.0.1/24", "2001:db8:9::1/64", "fe80::9/64")
LO = link("lo", "127.0.0.1/8", "::1/128")
DEFAULTS = ("0.0.0.0/0 via 203.0.113.1 dev wan", "::/0 via 2001:db8:203::1 dev wan metric 1024")
GATEWAY = host(LO, WAN, VPN, LAN, routes=DEFAULTS)


def read_back(table: Table) -> Table:
    """A table as `agent.kernel.nfnl` reads it: the kernel has no rule as it was written, knows nothing of what is said
    to a reader, and has an order of its own for all but the rules of a chain.
    """
    return replace(
        table,
        counters=table.counters[::-1],
        sets=tuple(
            replace(
                item,
                elements=item.elements if isinstance(item.elements, Addresses) else item.elements[::-1],
                about=(),
                pending=(),
            )
            for item in table.sets[::-1]
        ),
        chains=tuple(
            replace(chain, rules=tuple(replace(rule, text="") for rule in chain.rules), about=())
            for chain in table.chains[::-1]
        ),
    )


def toml(written: Policy) -> str:
    """A policy as a file."""
    lines = [f"gateway = {json.dumps(written.gateway)}"]
    if written.downstream is not None:
        lines.append(f"downstream = {json.dumps(written.downstream)}")
    for each in written.identities:
        lines += [f"[identity.{each.name}]", f"id = {each.id}", f"link = {json.dumps(each.link)}"]
        own = "auto" if each.addresses is None else [*map(str, each.addresses)]
        hop = each.next_hop if isinstance(each.next_hop, str) else [*map(str, each.next_hop)]
        lines += [f"addresses = {json.dumps(own)}", f"members = {json.dumps([*map(str, each.members)])}"]
        lines += [f"next_hop = {json.dumps(hop)}", f"when_down = {json.dumps(each.when_down)}"]
        lines += [f"masquerade = {json.dumps(each.masquerade)}", f"clamp_mss = {json.dumps(each.clamp_mss)}"]
        lines += [f"flush_flows = {json.dumps(each.flush_flows)}"]
        if each.probe:
            port = "" if each.probe.port is None else f", port = {each.probe.port}"
            every = f"{round(each.probe.every * 1000)}ms"
            target = f'target = "{each.probe.target}", every = "{every}", fail_after = {each.probe.fail_after}'
            lines += [f"probe = {{ {target}{port} }}"]
    kernel = written.kernel
    lines += ["[kernel]", f"mark_mask = {kernel.mark_mask:#x}", f"table_base = {kernel.table_base}"]
    lines += [f"rule_priority = {kernel.rule_priority}", f'nft_table = "{kernel.nft_table}"']
    lines += [f"hook_priority = {kernel.hook_priority}", f"enforce = {json.dumps(kernel.enforce)}"]
    return "\n".join([*lines, ""])


# --- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def any_prefix(draw: st.DrawFn) -> Prefix:
    """A prefix among few addresses at either end of a family, so that many hold each other."""
    family = draw(st.sampled_from(Family))
    host = draw(st.integers(0, 4) | st.sampled_from([family.bits - 1, family.bits]))
    address = draw(st.integers(0, 31)) ^ draw(st.sampled_from([0, (1 << family.bits) - 1]))
    return Prefix(family, address >> host << host, family.bits - host)


#: Links that identities leave by, and those with the hosts behind the gateway. Each has networks of its own.
ROADS = ("wan", "wan2", "vpn0", "vpn1")
BEHIND = ("lan", "dmz")
EVERY_LINK = (*ROADS, *BEHIND)
NETWORKS = {Family.IPV4: 24, Family.IPV6: 64}
#: Where main has routes to beside the links' networks.
DESTINATIONS = {Family.IPV4: ("0.0.0.0/0", "10.77.0.0/16"), Family.IPV6: ("::/0", "2001:db8:77::/48")}


#: Names of every kind that the door lets pass, the longest among them.
NAMES = ("inside", "outside", "a", "map", "x-1", "y_2", "z" * 31)

# Strategies that are drawn from often are made once: making one costs more than drawing.
_families = st.sampled_from(Family)
_family_sets = st.sets(_families)
_roads = st.sampled_from(ROADS)
_some_hosts = st.integers(1, 4)
_numbered_hosts = st.sets(st.tuples(_families, _some_hosts), max_size=3)
_small = st.integers(0, 31)
_metrics = st.sampled_from([0, 100, 1024])
_mtus = st.sampled_from([1280, 1420, 1500])
_names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
_numbers = st.permutations(range(1, 8))
_link_lists = st.lists(st.sampled_from(EVERY_LINK), unique=True)
_link_sets = st.frozensets(st.sampled_from(EVERY_LINK))
_downstreams = st.none() | st.lists(st.sampled_from(BEHIND), unique=True)


def _address(link_name: str, family: Family, number: int) -> Address:
    """A host of a link's network: 198.18.N.0/24, 2001:db8:N::/64."""
    place = EVERY_LINK.index(link_name)
    return parse_address(f"198.18.{place}.{number}" if family is Family.IPV4 else f"2001:db8:{place}::{number:x}")


@st.composite
def _prefixes(draw: st.DrawFn) -> Prefix:
    """A network among few, so that many hold each other; now and then a single address that a link may have."""
    family = draw(_families)
    if draw(st.booleans()):
        return Prefix.host(_address(draw(_roads), family, draw(_some_hosts)))
    hosts = draw(_host_bits[family])
    base = int(parse_address("198.18.0.0" if family is Family.IPV4 else "2001:db8::"))
    return Prefix(family, (base + draw(_small)) >> hosts << hosts, family.bits - hosts)


_host_bits = {family: st.sampled_from([0, 1, 2, 3, 4, family.bits - 15]) for family in Family}
_any_prefix = _prefixes()


@st.composite
def kernels(draw: st.DrawFn) -> Kernel:
    """A `[kernel]` section: any mask with room for seven identities or more."""
    width = draw(st.integers(3, 8))
    return Kernel(
        mark_mask=((1 << width) - 1) << draw(st.integers(0, 32 - width)),
        table_base=draw(st.sampled_from([4000, 300])),
        rule_priority=draw(st.sampled_from([4000, 100])),
        nft_table=draw(st.sampled_from(["idmark", "idmark_2"])),
        hook_priority=draw(st.sampled_from([-145, -149])),
        enforce=draw(st.booleans()),
    )


#: Probes by the families that an identity can ask in: of a host far away, and of one in a link's network.
_probes_of = {
    frozenset(families): st.none()
    | st.builds(
        Probe,
        target=st.sampled_from(
            [
                address
                for family in families
                for address in (
                    parse_address("203.0.113.53" if family is Family.IPV4 else "2001:db8:53::53"),
                    _address("vpn0", family, 253),
                )
            ]
        ),
        every=st.sampled_from([0.1, 2.0, 60.0]),
        fail_after=st.integers(1, 3),
        port=st.sampled_from([None, 443]),
    )
    if families
    else st.none()
    for families in ((), *((family,) for family in Family), tuple(Family))
}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """A policy as the door lets it pass."""
    kernel = draw(kernels())
    names = draw(_names)
    numbers = draw(_numbers)
    owners = draw(st.dictionaries(_any_prefix, st.sampled_from(names), max_size=8))
    auto: set[str] = set()
    identities: list[Identity] = []
    for place, name in enumerate(names):
        road = draw(_roads)
        members = [prefix for prefix, owner in owners.items() if owner == name]
        numbered = draw(_numbered_hosts)
        own = [_address(road, family, number) for family, number in sorted(numbered)]
        own = [address for address in own if Prefix.host(address) not in owners]
        if not own and not members:
            own = [_address(road, Family.IPV4, 100 + place)]
        # The addresses of a link can be one identity's.
        is_auto = road not in auto and draw(st.booleans())
        if is_auto:
            auto.add(road)
        else:
            owners |= dict.fromkeys(map(Prefix.host, own), name)
        own_families = set(Family) if is_auto else {Family.of(address) for address in own}
        member_families = {prefix.family for prefix in members}
        gateways = [str(_address(road, family, 200 + place)) for family in own_families | member_families]
        # Identities that share a link are told apart by their next hops.
        shared = any(other.link == road for other in identities)
        identities.append(
            identity(
                name,
                numbers[place],
                road,
                addresses="auto" if is_auto else [*map(str, own)],
                members=[*map(str, members)],
                next_hop=gateways if shared else draw(st.sampled_from([gateways, "none", "auto"])),
                # Only one that came before: no cycles.
                when_down=draw(st.sampled_from([UNREACHABLE, MAIN, *names[:place]])),
                masquerade=member_families <= own_families and draw(st.booleans()),
                clamp_mss=draw(st.booleans()),
                probe=draw(_probes_of[frozenset(own_families)]),
                flush_flows=draw(st.booleans()),
                kernel=kernel,
            )
        )
    downstream = draw(_downstreams)
    return policy(*identities, downstream=downstream, kernel=kernel)


@st.composite
def hosts(draw: st.DrawFn) -> Facts:
    """A host: any of the links, in any state, with addresses, defaults and static routes."""
    links, routes = [LO], []
    for name in draw(_link_lists):
        numbered = draw(_numbered_hosts)
        own = [f"{_address(name, family, number)}/{NETWORKS[family]}" for family, number in sorted(numbered)]
        up = draw(st.sampled_from([True, True, True, False]))
        links.append(
            link(
                name,
                *own,
                *draw(st.sampled_from([(), (f"fe80::{len(links)}/64",)])),
                up=up,
                carrier=up and draw(st.booleans()),
                mtu=draw(_mtus),
                rp_filter=draw(st.integers(0, 2)),
                src_valid_mark=draw(st.booleans()),
            )
        )
        for family in sorted(draw(_family_sets)) if up else ():
            hop = f"dev {name} metric {draw(_metrics)}"
            if draw(st.booleans()):
                hop = f"via {_address(name, family, 254)} {hop}"
            routes += [f"{destination} {hop}" for destination in DESTINATIONS[family]]
    return host(*links, routes=draw(st.permutations(routes)))


#: Under our protocol number, and wanted by nobody: an older version's, an operator's.
STRANGE_ROUTES = (
    route("unreachable 0.0.0.0/0 metric 4294967295", 4050),
    route("10.99.0.0/16 dev lan", 4001),
    route("2001:db8:99::/48 via 2001:db8:9::7 dev lan metric 1", 4002),
)
STRANGE_RULES = (
    Rule(Family.IPV4, 4050, 4050, fwmark=Fwmark(0x32000000, 0x3F000000)),
    Rule(Family.IPV6, 4001, 4001, source=Prefix.parse("2001:db8:99::/48")),
    Rule(Family.IPV4, 4001, 4001, extra=(("FRA_IIFNAME", "lan"),)),
)


@st.composite
def observations(draw: st.DrawFn, desired: Desired, before: Desired) -> Observed:
    """What a kernel may hold: any part of what is wanted and of what was wanted before, strangers, things twice,
    routes in the place of ours. The kernel tells routes apart by their keys.
    """
    known = [*sorted(desired.routes | before.routes, key=str), *STRANGE_ROUTES]
    routes = draw(st.lists(st.sampled_from(known), max_size=12))
    blackholes = [replace(item, kind="blackhole", hops=(), source=None) for item in routes if draw(st.booleans())]
    rules = [*sorted(desired.rules | before.rules, key=str), *STRANGE_RULES]
    table = draw(st.sampled_from([None, ruleset.table(desired), ruleset.table(before)]))
    return Observed(
        routes=frozenset({item.key: item for item in (*routes, *blackholes)}.values()),
        rules=tuple(draw(st.lists(st.sampled_from(rules), max_size=12))),
        table=(
            replace(read_back(table), name=desired.policy.kernel.nft_table, dormant=draw(st.booleans()))
            if table
            else None
        ),
        other_tables=draw(st.sampled_from([(), ("idmark_old",)])),
        src_valid_mark=draw(_link_sets),
        src_valid_mark_ours=draw(_link_sets),
    )


def last_route(family: Family, table: int) -> Route:
    """The route that closes a table."""
    return Route(Prefix.default(family), table, kind="unreachable", metric=METRIC_LAST)
