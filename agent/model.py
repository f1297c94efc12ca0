"""The frozen values that every room of the agent shares. Standard library only."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agent.addresses import Address, Addresses, Family, Prefix, Prefixes

#: The routing protocol number of everything that is ours (deploy/rt_protos.d names it "idmark").
PROTOCOL = 73
#: Routing tables that the kernel gives a meaning of its own (linux/rtnetlink.h, enum rt_class_t).
TABLE_MAIN, TABLE_LOCAL = 254, 255
#: The largest metric there is: a route with it is the last resort of its table.
METRIC_LAST = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, order=True)
class Fwmark:
    """A packet mark with its mask; a mark is never written without one: the other bits are the neighbours'."""

    value: int
    mask: int

    def __post_init__(self) -> None:
        if not self.value or self.value & ~self.mask:
            raise ValueError(f"fwmark {self.value:#x} does not fit mask {self.mask:#x}")

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"


# --- the policy ------------------------------------------------------------------------------------------------------

#: What a policy says of a next hop: a point-to-point link, main's default on the link, or one address a family.
NextHop = Literal["none", "auto"] | tuple[Address, ...]

#: `when_down` of an identity that is to be closed while its link is down, and of one that then follows table main.
UNREACHABLE = "unreachable"
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Kernel:
    """The `[kernel]` section: where in the kernel's name spaces we live.

    `way_bits` are the upper bits of the mask that tell ways out apart; 0: identities do. `nat` is whether anything on
    the host translates addresses; None for "auto". `drop_own_sources`: our table, and not the kernel's lookup of the
    way back, drops what arrives in the host's own name.
    """

    mark_mask: int = 0x3F000000
    table_base: int = 4000
    rule_priority: int = 4000
    nft_table: str = "idmark"
    hook_priority: int = -145
    enforce: bool = True
    nat: bool | None = None
    way_bits: int = 0
    drop_own_sources: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """A health check that an identity sends by its own link: echo requests, or TCP connects where there is a `port`.

    Every `every` seconds; `fail_after` that nobody answers, one after the other, and the identity counts as down.
    """

    target: Address
    every: float
    fail_after: int
    port: int | None = None

    def __str__(self) -> str:
        return str(self.target) if self.port is None else f"{self.target} port {self.port}"


@dataclass(frozen=True, slots=True)
class Identity:
    """One identity of the policy. `addresses` is None for "auto".

    Identities that share a way out share `table` and `priority`, those of the first of them, and `way`: the part of
    their fwmarks that their one rule looks at. None: the rule looks at all of it.
    """

    name: str
    id: int
    link: str
    fwmark: Fwmark
    table: int
    priority: int
    addresses: tuple[Address, ...] | None
    members: Prefixes = field(default_factory=Prefixes)
    next_hop: NextHop = "auto"
    when_down: str = UNREACHABLE
    masquerade: bool = False
    clamp_mss: bool = False
    probe: Probe | None = None
    flush_flows: bool = False
    way: Fwmark | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that passed the door. Identities are sorted by id; `downstream` is None for "auto".

    `digest` is the SHA-256 (hex) of what the policy means: comments, order and the spelling of lists don't change it.
    `warnings` are faults that an operator should hear of and that refuse nothing; `files` is what it was read from.
    """

    gateway: str
    downstream: tuple[str, ...] | None
    identities: tuple[Identity, ...]
    kernel: Kernel = field(default_factory=Kernel)
    digest: str = ""
    warnings: tuple[str, ...] = ()
    files: tuple[str, ...] = field(default=(), compare=False)

    def identity(self, name: str) -> Identity:
        """The identity of that name. Raises KeyError."""
        for identity in self.identities:
            if identity.name == name:
                return identity
        raise KeyError(name)


# --- the kernel's objects --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hop:
    """One next hop of a route: a link by its name, and the gateway's address unless the link leads straight there.

    `onlink`: the gateway is taken to be on the link though no route says so (hosters' /32 set-ups).
    """

    link: str
    via: Address | None = None
    onlink: bool = False
    weight: int = 1

    def words(self, family: Family) -> str:
        """As in ip-route(8). A gateway of the other family (RFC 5549) is announced by its family's name."""
        # The kernel allows link names that a shell would not leave alone.
        words = f"dev {shlex.quote(self.link)}"
        if self.via:
            words = f"via {'' if Family.of(self.via) is family else 'inet6 '}{self.via} {words}"
        return f"{words} onlink" if self.onlink else words


@dataclass(frozen=True, slots=True)
class Route:
    """A route of one of our tables, or of main. `kind` is a route type of ip-route(8); unicast routes have hops."""

    destination: Prefix
    table: int
    hops: tuple[Hop, ...] = ()
    kind: str = "unicast"
    metric: int = 0
    source: Address | None = None
    tos: int = 0

    @property
    def family(self) -> Family:
        return self.destination.family

    @property
    def key(self) -> tuple[Prefix, int, int, int]:
        """What the kernel tells routes apart by; a second route with the same key replaces the first."""
        return (self.destination, self.table, self.metric, self.tos)

    @property
    def words(self) -> str:
        """The words of ip-route(8), without whose it is."""
        return str(self).replace(f" protocol {PROTOCOL}", "")

    def __str__(self) -> str:
        """The words behind `ip route add`."""
        words = [] if self.kind == "unicast" else [self.kind]
        words.append(str(self.destination) if self.destination.length else "default")
        if len(self.hops) == 1:
            words.append(self.hops[0].words(self.family))
        words.append(f"table {self.table}")
        if self.metric:
            words.append(f"metric {self.metric}")
        if self.tos:
            words.append(f"tos {self.tos:#x}")
        if self.source:
            words.append(f"src {self.source}")
        words.append(f"protocol {PROTOCOL}")
        if len(self.hops) > 1:
            words += [f"nexthop {hop.words(self.family)} weight {hop.weight}" for hop in self.hops]
        return " ".join(words)


#: What a rule does besides UNREACHABLE, in ip-rule(8)'s words.
LOOKUP, GOTO, NOP = "lookup", "goto", "nop"


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy routing rule: whom it takes, and what happens then. `action` is a word of ip-rule(8).

    It takes a packet by its mark (`fwmark`), by the absence of any in these bits (`unmarked`, a mask), by its source,
    by the link that it arrives on (`iif`; the host's own come from "lo"). `table` is what is looked up, `target` the
    priority that `goto` leads to. `extra` holds whatever else the kernel says of a rule (netlink attribute, value):
    none of ours has any, so that a rule which somebody made under our protocol number can be told from ours, and
    deleted.
    """

    family: Family
    priority: int
    table: int = 0
    fwmark: Fwmark | None = None
    source: Prefix | None = None
    unmarked: int = 0
    iif: str = ""
    action: str = LOOKUP
    target: int = 0
    extra: tuple[tuple[str, str | int], ...] = ()

    def __str__(self) -> str:
        """The words behind `ip rule add`."""
        words = [f"priority {self.priority}"]
        words += [f"from {self.source}"] if self.source else []
        words += [f"iif {shlex.quote(self.iif)}"] if self.iif else []
        words += [f"fwmark {self.fwmark}"] if self.fwmark else []
        words += [f"fwmark 0/{self.unmarked:#x}"] if self.unmarked else []
        words += [f"{name} {value}" for name, value in self.extra]
        words.append({LOOKUP: f"lookup {self.table}", GOTO: f"goto {self.target}"}.get(self.action, self.action))
        words.append(f"protocol {PROTOCOL}")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Lookup:
    """The kernel's answer to "where would this packet go": a table and a link, or the error that the sender gets."""

    table: int | None = None
    link: str | None = None
    via: Address | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.error:
            return self.error
        return f"{f'via {self.via} ' if self.via else ''}dev {self.link} table {self.table}"


# --- the nft table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Statement:
    """A rule of a chain: what nft reads, and the comment that stays with it in the kernel and tells it from others.

    `text` is empty for a rule that was read back: nft never lists what was written, so texts can't be compared.
    """

    text: str
    comment: str


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain is called: its type, hook and priority, which can't be changed in place; and its policy."""

    kind: str
    hook: str
    priority: int
    policy: str = "accept"

    def __str__(self) -> str:
        return f"type {self.kind} hook {self.hook} priority {self.priority}; policy {self.policy};"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain with its rules; `about` says, for the reviewer, what happens to a packet here."""

    name: str
    rules: tuple[Statement, ...] = ()
    hook: Hook | None = None
    about: tuple[str, ...] = field(default=(), compare=False)


#: The keys of sets that are asked for an address, and its family.
ADDRESSES = {f"{family}_addr": family for family in Family}


@dataclass(frozen=True, slots=True)
class NftSet:
    """A named set, or a map when `value` is given: key and value types, elements as nft writes them.

    `size` is how many it may hold, 0 where nothing is said of it: a hash that knows needs not grow, and is faster. An
    element is (key, value): ("10.9.0.0/24", "goto id-inside"), in a set the value is "". `about` as for chains;
    `pending` are elements that only the host knows, in words.
    """

    name: str
    key: str
    value: str = ""
    interval: bool = False
    elements: Sequence[tuple[str, str]] = ()
    about: tuple[str, ...] = field(default=(), compare=False)
    pending: tuple[str, ...] = field(default=(), compare=False)
    size: int = 0

    @property
    def keyword(self) -> str:
        """What nft calls it."""
        return "map" if self.value else "set"

    @property
    def type(self) -> tuple[str, str, bool, int]:
        """What can't be changed in place."""
        return (self.key, self.value, self.interval, self.size)


@dataclass(frozen=True, slots=True)
class ElementChange:
    """What leaves a set and what comes into it, elements as in `NftSet`; a key in both gets another value."""

    set: str
    key: str
    gone: Sequence[tuple[str, str]]
    new: Sequence[tuple[str, str]]

    @property
    def coming(self) -> ElementChange:
        """The keys that only come."""
        return replace(self, gone=(), new=_but(self.new, self.gone))

    @property
    def going(self) -> ElementChange:
        """The keys that only go."""
        return replace(self, gone=_but(self.gone, self.new), new=())

    @property
    def but_going(self) -> ElementChange:
        """The others: those that come, and those that get another value."""
        if isinstance(self.gone, Addresses):
            return replace(self, gone=())
        keys = {key for key, _ in self.new}
        return replace(self, gone=tuple(each for each in self.gone if each[0] in keys))

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return bool(self.gone or self.new)


def _but(elements: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """Those with keys that no other has."""
    if isinstance(elements, Addresses) or not others:  # what has no value can't have another
        return elements
    keys = {key for key, _ in others}
    return tuple(each for each in elements if each[0] not in keys)


@dataclass(frozen=True, slots=True)
class Table:
    """Our nft table: names of counters, sets and maps, chains. A dormant table's chains are not called."""

    name: str
    counters: tuple[str, ...] = ()
    sets: tuple[NftSet, ...] = ()
    chains: tuple[Chain, ...] = ()
    dormant: bool = False


@dataclass(frozen=True, slots=True)
class Count:
    """What a named counter holds; another one of the same name, made later, has another `handle`."""

    packets: int = 0
    bytes: int = 0
    handle: int = field(default=0, compare=False)


# --- what only the host knows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of a link with its prefix length; the rest as in ip-address(8)."""

    address: Address
    length: int
    scope_global: bool = True
    tentative: bool = False
    deprecated: bool = False
    temporary: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `up`: administratively; `carrier`: the lower layer too; `mtu` in bytes.

    `rp_filter` and `src_valid_mark` are the values that take effect: the larger, and the OR, of the link's and `all`'s
    (Documentation/networking/ip-sysctl.rst).
    """

    name: str
    index: int
    up: bool
    carrier: bool
    mtu: int
    addresses: tuple[LinkAddress, ...] = ()
    rp_filter: int = 0
    src_valid_mark: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy needs to know of its host: the links, those routes of main which it copies or points along, and
    whether somebody else's rules translate addresses.
    """

    links: tuple[Link, ...] = ()
    routes: tuple[Route, ...] = ()
    nat: bool = True

    def link(self, name: str) -> Link | None:
        """The link of that name, or None while there is none."""
        return next((link for link in self.links if link.name == name), None)
