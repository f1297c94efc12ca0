"""Who is measured: nothing, the least that this approach takes, idmark, and what people write by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_interface
from pathlib import Path

from agent.addresses import Family
from tests.bench.sources import Sources
from tests.bench.world import LENGTH, NEXT_HOP, OWN, UPLINKS, World

#: So many sources may be looked at one after the other; with more there is nothing left to measure.
LINEAR = 1024
#: The routing tables of the peers' two identities; their marks are 1 and 2.
TABLES = (101, 102)

#: Makes the kernel track connections, and costs nothing else: no packet comes into a chain without a hook.
CONNTRACK = "table inet tracked {\n    chain nobody {\n        ct state new accept\n    }\n}\n"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way to configure a gateway. `limit`: with more sources it is hopeless."""

    name: str
    load: Callable[[World, Sources], None]
    limit: int = 1 << 30

    def tracked(self) -> Contestant:
        """The same, with conntrack at work."""

        def load(world: World, sources: Sources) -> None:
            world.nft(CONNTRACK)
            self.load(world, sources)

        return replace(self, name=f"{self.name}, ct", load=load)


def _bare(world: World, sources: Sources) -> None:
    """Neither nft nor rules."""


def _floor(world: World, sources: Sources) -> None:
    for family in ("-4", "-6"):
        world.ip(["rule add priority 4001 fwmark 0x7f000000/0xff000000 lookup 101"], family)


def _roads(world: World) -> None:
    """A table for each identity."""
    for family, option in ((Family.IPV4, "-4"), (Family.IPV6, "-6")):
        lines = []
        for table, own, hop, link in zip(TABLES, OWN[family], NEXT_HOP[family], UPLINKS, strict=True):
            network = ip_interface(f"{own}/{LENGTH[family]}").network
            lines += [
                f"route add {network} dev {link} table {table}",
                f"route add default via {hop} dev {link} table {table}",
            ]
        world.ip(lines, option)


def _mark_rules(world: World) -> None:
    _roads(world)
    for option in ("-4", "-6"):
        lines = [
            f"rule add priority {4000 + mark} fwmark {mark} lookup {table}" for mark, table in enumerate(TABLES, 1)
        ]
        world.ip(lines, option)


def _from_rules(world: World, sources: Sources) -> None:
    _roads(world)
    option = "-4" if sources.family is Family.IPV4 else "-6"
    hosts = [(own, identity) for identity, own in enumerate(OWN[sources.family])]
    every = [*sources.each(), *hosts]
    world.ip([f"rule add priority 4001 from {source} lookup {TABLES[identity]}" for source, identity in every], option)


def _marking(body: str, local: str) -> str:
    return (
        "table inet marks {\n"
        f"    chain prerouting {{ type filter hook prerouting priority mangle; policy accept;\n{body}\n}}\n"
        f"    chain output {{ type route hook output priority mangle; policy accept;\n{local}\n}}\n"
    )


def _linear(world: World, sources: Sources) -> None:
    _mark_rules(world)
    nft = sources.family.nft
    rules = "\n".join(
        f"{nft} saddr {prefix} meta mark set {identity + 1} accept" for prefix, identity in sources.each()
    )
    world.nft(_marking(rules, "\n".join(_own_rules(sources.family))) + "}\n")


def _own_rules(family: Family) -> Iterator[str]:
    for identity, own in enumerate(OWN[family]):
        yield f"{family.nft} saddr {own} meta mark set {identity + 1}"


def _interval_map(world: World, sources: Sources) -> None:
    _mark_rules(world)
    world.nft(interval_map(sources))


def interval_map(sources: Sources) -> str:
    """The nft text of one interval map, and the rule that asks it, for arriving and for local packets."""
    nft = sources.family.nft
    key = "ipv4_addr" if sources.family is Family.IPV4 else "ipv6_addr"
    hosts = [f"{own} : {identity + 1}" for identity, own in enumerate(OWN[sources.family])]
    elements = [*(f"{prefix} : {identity + 1}" for prefix, identity in sources.each()), *hosts]
    rule = f"meta mark set {nft} saddr map @sources"
    listed = ",\n".join(elements)
    declared = f"map sources {{ type {key} : mark; flags interval; elements = {{\n{listed}\n}}\n}}\n"
    return _marking(rule, rule).replace("table inet marks {\n", f"table inet marks {{\n{declared}", 1) + "}\n"


def _iptables(world: World, sources: Sources) -> None:
    _mark_rules(world)
    every = [f"-A PREROUTING -s {prefix} -j MARK --set-mark {identity + 1}" for prefix, identity in sources.each()]
    _restore(world, sources.family, every)


def _ipset(world: World, sources: Sources) -> None:
    _mark_rules(world)
    kind = "hash:net" if sources.shape == "mixed" else "hash:ip"
    family = "inet" if sources.family is Family.IPV4 else "inet6"
    count = len(sources.prefixes)
    lines = [f"create sources {kind} family {family} skbinfo hashsize {max(64, count)} maxelem {2 * count}"]
    lines += [f"add sources {prefix} skbmark {identity + 1:#x}" for prefix, identity in sources.each()]
    world.run(["ipset", "restore"], "\n".join([*lines, ""]))
    _restore(world, sources.family, ["-A PREROUTING -j SET --map-set sources src --map-mark"])


def _restore(world: World, family: Family, rules: list[str]) -> None:
    program = "iptables-restore" if family is Family.IPV4 else "ip6tables-restore"
    world.run([program], "\n".join(["*mangle", *rules, "COMMIT", ""]))


def _idmark(world: World, sources: Sources) -> None:
    world.idmark("apply", policy=write_policy(sources, world.directory))


def _idmark_looks(world: World, sources: Sources) -> None:
    """The kernel is told not to look up the way back, and the table drops what arrives in the gateway's own name."""
    world.gateway.sysctl("net/ipv4/conf/lan/accept_local", 1)
    world.idmark("apply", policy=write_policy(sources, world.directory, ["[kernel]", "drop_own_sources = true"]))


def write_policy(sources: Sources, directory: Path, more: Iterable[str] = ()) -> Path:
    """A policy of two identities over two uplinks whose members are the sources; everything else is as usual, but for
    lines that are given.
    """
    lines = ['gateway = "bench"', 'downstream = ["lan"]']
    for number, link in enumerate(UPLINKS):
        (directory / f"{link}.txt").write_text(
            "".join(f"{prefix}\n" for prefix in sources.of(number)), encoding="ascii"
        )
        lines += [
            f"[identity.{link}]",
            f"id = {number + 1}",
            f'link = "{link}"',
            f"addresses = {json.dumps([OWN[family][number] for family in Family])}",
            f"next_hop = {json.dumps([NEXT_HOP[family][number] for family in Family])}",
            f'members = ["file:{link}.txt"]',
        ]
    policy = directory / "policy.toml"
    policy.write_text("\n".join([*lines, *more, ""]), encoding="ascii")
    return policy


def _only(*rules: str) -> Callable[[World, Sources], None]:
    """idmark's policy routing, and in the hooks that every packet goes through nothing but these rules."""

    def load(world: World, sources: Sources) -> None:
        _idmark(world, sources)
        flushed = [f"flush chain inet idmark {hook}" for hook in ("prerouting", "output", "postrouting")]
        world.nft("\n".join([*flushed, *(f"add rule inet idmark {rule}" for rule in rules), ""]))

    return load


def variant(ruleset: Path, routing: Path | None) -> Contestant:
    """An nft file in the place of idmark's table; `routing`: lines of ip(8) in the place of its rules and routes."""

    def load(world: World, sources: Sources) -> None:
        if routing:
            for line in routing.read_text(encoding="utf-8").splitlines():
                words = line.partition("#")[0].split()
                if words:
                    world.run(words)
        else:
            _idmark(world, sources)
            world.run(["nft", "delete", "table", "inet", "idmark"])
        world.run(["nft", "-f", str(ruleset.resolve())])

    return Contestant(ruleset.stem, load)


BARE = Contestant("bare gateway", _bare)
FLOOR = Contestant("one ip rule", _floor)
IDMARK = Contestant("idmark", _idmark)
IDMARK_LOOKS = Contestant("idmark, drop_own_sources", _idmark_looks)
PEERS = (
    Contestant("interval map", _interval_map),
    Contestant("ipset", _ipset),
    Contestant("linear ip saddr", _linear, LINEAR),
    Contestant("from rules", _from_rules, LINEAR),
    Contestant("iptables MARK", _iptables, LINEAR),
)
#: What idmark would cost if it did less, in forwarding and for local packets: none of these counts or guards anything.
EMPTY = Contestant("idmark, hooks empty", _only())
FORWARDED_PARTS = (
    EMPTY,
    Contestant("idmark, a constant mark", _only("prerouting meta mark set 0x01000000")),
    Contestant("idmark, only marking", _only("prerouting goto source")),
)
LOCAL_PARTS = (
    EMPTY,
    Contestant(
        "idmark, only who is at home",
        _only(
            "output meta mark & 0x3f000000 == 0 ip saddr . oifname @home-ipv4 accept",
            "output meta mark & 0x3f000000 == 0 ip6 saddr . oifname @home-ipv6 accept",
        ),
    ),
)
PARTS = tuple(dict.fromkeys((*FORWARDED_PARTS, *LOCAL_PARTS)))
YARDSTICKS = (BARE, BARE.tracked(), FLOOR, FLOOR.tracked())
EVERYBODY = (*YARDSTICKS, IDMARK, IDMARK_LOOKS, *PEERS, *(peer.tracked() for peer in PEERS))
SOME = (*YARDSTICKS, IDMARK, IDMARK_LOOKS, *PEERS[:3], *(peer.tracked() for peer in PEERS[:2]))
