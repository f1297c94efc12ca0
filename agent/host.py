"""What the doctor sees of a host: frozen values that the seams fill and the rules of agent/symptoms judge."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from agent.addresses import Address, Prefix
from agent.model import Facts, Hook, Lookup, Route, Rule

#: All bits of a packet mark.
EVERY_BIT = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class MarkWrite:
    """A rule that writes packet marks, by its handle: the `bits` that it may change, and those that may be `ones` then.

    Where a value comes from elsewhere (the connection's mark, a map) any bit may be one.
    """

    handle: int
    bits: int
    ones: int


@dataclass(frozen=True, slots=True)
class ReverseCheck:
    """A rule that drops a packet unless the way back to its source leads over the link that it came by.

    `by_mark`: the way back is looked up with the packet's mark.
    """

    handle: int
    by_mark: bool


@dataclass(frozen=True, slots=True)
class NftChain:
    """A chain of any table of family ip, ip6 or inet. `jumps` are chains that it names, `by_map` says that a verdict
    map leads on from it.
    """

    family: str
    table: str
    name: str
    hook: Hook | None = None
    writes: tuple[MarkWrite, ...] = ()
    reverse_checks: tuple[ReverseCheck, ...] = ()
    jumps: frozenset[str] = frozenset()
    by_map: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """The table that it is in: family and name."""
        return (self.family, self.table)

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class Flowtable:
    """A flowtable: established connections between its links go past all hooks but ingress."""

    family: str
    table: str
    name: str
    links: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that waits for whoever comes: an unconnected UDP one, a listening TCP one.

    `link`: it is bound to that one. `both`: an IPv6 wildcard that takes IPv4 as well. `program` is empty for a socket
    of the kernel's own, and where the process is not to be seen.
    """

    protocol: str
    address: Address
    port: int
    link: str = ""
    both: bool = False
    program: str = ""
    pid: int | None = None

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        holder = f" ({self.program}, pid {self.pid})" if self.program else ""
        return f"{self.protocol} {host}:{self.port}{holder}"


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of another program as it takes effect, and the file that says so; no file: its default."""

    key: str
    value: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.file or 'no file'}: {self.key}={self.value}{'' if self.file else ', the default'}"


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file or directory that identities depend on. `purpose`: policy, list, state. `mode`: the permission bits.

    `owner` is a user's name, or its number; `changed` seconds since 1970. `refused`: the agent's own user may not read
    it.
    """

    path: str
    purpose: str
    mode: int
    owner: str = "root"
    changed: float = 0.0
    directory: bool = False
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """Everything that the doctor looks at.

    `rules` are all policy routing rules in the kernel's order with whether they are ours; `empty` the tables which
    foreign rules look up and which hold nothing; `foreign_routes` what others have in our tables; `to_members` some
    networks of members with whose they are and where main leads to them. `legacy` are tables
    of iptables-legacy with their families. `local` are addresses that are this host's besides its links' (local
    routes). `programs` are the names of processes in this network namespace. `sysctls` go by their path below
    /proc/sys. `missing` is what the kernel can't do, with its own words. `ephemeral` are the ports that clients get,
    `now` is in seconds since 1970.
    """

    facts: Facts = field(default_factory=Facts)
    in_force: bool = False
    rules: tuple[tuple[Rule, bool], ...] = ()
    empty: frozenset[int] = frozenset()
    foreign_routes: tuple[Route, ...] = ()
    to_members: tuple[tuple[str, Prefix, Lookup], ...] = ()
    chains: tuple[NftChain, ...] = ()
    flowtables: tuple[Flowtable, ...] = ()
    legacy: tuple[str, ...] = ()
    listeners: tuple[Listener, ...] = ()
    local: frozenset[Address] = frozenset()
    programs: frozenset[str] = frozenset()
    sysctls: Mapping[str, int] = field(default_factory=dict)
    networkd: tuple[Setting, ...] = ()
    network_manager: tuple[Setting, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    files: tuple[KeptFile, ...] = ()
    ephemeral: range = range(32768, 61000)
    now: float = 0.0

    def sysctl(self, key: str) -> int:
        """A sysctl's value; 0 for one that this kernel, or this link, does not have."""
        return self.sysctls.get(key, 0)

    def addresses(self) -> frozenset[Address]:
        """All addresses of the host."""
        return self.local | {item.address for link in self.facts.links for item in link.addresses}


def conf(family: str, link: str, name: str) -> str:
    """The path of a link's sysctl below /proc/sys; family as in there: ipv4, ipv6."""
    return f"net/{family}/conf/{link}/{name}"


def is_wildcard(address: Address) -> bool:
    """0.0.0.0 or ::."""
    return address.is_unspecified


def is_hosts_own_business(address: Address) -> bool:
    """An address that stays on the host or on a link: loopback, link-local, multicast, broadcast."""
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address == ipaddress.IPv4Address("255.255.255.255")
    )


def reachable(base: NftChain, chains: Iterable[NftChain]) -> tuple[NftChain, ...]:
    """The chains that a packet in a base chain may come to, that one first.

    What a map leads to is not read (maps may be huge): any chain of the table that no rule names.
    """
    there = {chain.name: chain for chain in chains if chain.place == base.place}
    named = {name for chain in there.values() for name in chain.jumps}
    unnamed = [name for name, chain in there.items() if name not in named and chain.hook is None]
    found: dict[str, NftChain] = {}
    ahead = [base.name]
    while ahead:
        name = ahead.pop()
        chain = there.get(name)
        if chain is None or name in found:
            continue
        found[name] = chain
        ahead += sorted(chain.jumps, reverse=True)
        ahead += unnamed if chain.by_map else []
    return tuple(found.values())
