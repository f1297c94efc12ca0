"""The programs that an idmark gateway often shares its host with: how to know them, and what they do to packets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from agent.host import Host, NftChain
from agent.model import Rule


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A program by its traces: names of its nft tables, chains and links (regular expressions), the routing tables that
    its rules look up, its processes. `bits` of packet marks are its own by its documentation or source.
    """

    name: str
    bits: int = 0
    tables: str = ""
    chains: str = ""
    links: str = ""
    lookups: frozenset[int] = field(default_factory=frozenset)
    programs: frozenset[str] = field(default_factory=frozenset)
    advice: str = ""


#: Marks: Tailscale util/linuxfw (TailscaleFwmarkMask), wg-quick(8) (the port, 51820, as the whole mark),
#: mwan3's `mmx_mask`, pbr's `fw_mask`, kube-proxy's masquerade and drop bits (14 and 15), Felix' IptablesMarkMask
#: (`0xffff0000` unless set), Cilium's bpf/lib/common.h (MARK_MAGIC_*, the identity above and below).
NEIGHBOURS = (
    Neighbour(
        "Tailscale",
        0x00FF0000,
        chains=r"ts-(input|forward|postrouting|prerouting)",
        links=r"tailscale\d+",
        lookups=frozenset({52}),
        programs=frozenset({"tailscaled"}),
        advice="choose a kernel.rule_priority that keeps our rules below its 5210",
    ),
    Neighbour(
        "WireGuard's wg-quick",
        0,  # a value of its own, and not bits: what is compared is the whole mark
        tables=r"wg-quick-.+",
        lookups=frozenset({51820}),
        advice="set `Table = off` in its wg0.conf, and leave the roads to idmark",
    ),
    Neighbour("mwan3", 0x00003F00, chains=r"mwan3_.+", advice="let one of the two decide on the roads of a source"),
    Neighbour("pbr", 0x00FF0000, chains=r"pbr_.+", advice="let one of the two decide on the roads of a source"),
    Neighbour(
        "kube-proxy",
        0x0000C000,
        tables=r"kube-proxy",
        chains=r"KUBE-.+",
        programs=frozenset({"kube-proxy"}),
    ),
    Neighbour(
        "Calico",
        0xFFFF0000,
        tables=r"calico",
        chains=r"cali-.+",
        links=r"cali[0-9a-f]{11}|vxlan\.calico",
        programs=frozenset({"calico-node"}),
        advice="give Felix fewer bits (iptablesMarkMask, nftablesMarkMask)",
    ),
    Neighbour(
        "Cilium",
        0xFFFF0FFF,
        chains=r"CILIUM_.+",
        links=r"cilium_(host|net|vxlan|geneve)|lxc_health",
        lookups=frozenset({2004, 2005}),
        programs=frozenset({"cilium-agent"}),
    ),
    Neighbour("Docker", chains=r"DOCKER.*", links=r"docker\d+|br-[0-9a-f]{12}", programs=frozenset({"dockerd"})),
    Neighbour("Podman", chains=r"NETAVARK.*", links=r"podman\d+"),
    Neighbour("libvirt", chains=r"LIBVIRT_.+", links=r"virbr\d+"),
    Neighbour("firewalld", tables=r"firewalld", programs=frozenset({"firewalld"})),
    Neighbour("NetworkManager", tables=r"nm-.+", programs=frozenset({"NetworkManager"})),
    Neighbour("strongSwan", lookups=frozenset({220}), programs=frozenset({"charon", "charon-systemd"})),
    Neighbour("Mullvad", 0x6D6F6C65, tables=r"mullvad", programs=frozenset({"mullvad-daemon"})),
)

#: What a rule may ask besides (see Rule.extra): FIB_RULE_INVERT (linux/fib_rules.h), and options in ip-rule(8)'s words.
INVERTED = ("flags", 2)
OPTIONS = {"FRA_SUPPRESS_PREFIXLEN": "suppress_prefixlength", "FRA_OIFNAME": "oif", "FRA_DST": "to"}

#: Programs that answer a datagram from the address that it was sent to, though they wait on a wildcard (IP_PKTINFO).
#: Names as the kernel has them, 15 bytes at most.
ANSWER_AS_ASKED = frozenset(
    {"avahi-daemon", "charon", "charon-systemd", "chronyd", "dnsmasq", "systemd-resolve", "wireguard-go"}
)


def traces(neighbour: Neighbour, host: Host) -> Iterator[str]:
    """What was seen of a neighbour, the surest first."""
    names = dict.fromkeys(chain for chain in host.chains if _is_of(neighbour, chain))
    return chain(
        (f"nft chain {name}" for name in names),
        (f"ip rule {words(rule)}" for rule, ours in host.rules if not ours and rule.table in neighbour.lookups),
        (f"link {link.name}" for link in host.facts.links if _whole(neighbour.links, link.name)),
        (f"process {name}" for name in sorted(host.programs & neighbour.programs)),
    )


def owner_of_chain(found: NftChain) -> Neighbour | None:
    """Whose a chain is, by its names."""
    return next((neighbour for neighbour in NEIGHBOURS if _is_of(neighbour, found)), None)


def owner_of_rule(rule: Rule) -> Neighbour | None:
    """Whose a policy routing rule is, by the table that it looks up."""
    return next((neighbour for neighbour in NEIGHBOURS if rule.table in neighbour.lookups), None)


def owner_of_link(name: str) -> Neighbour | None:
    """Whose a link is, by its name."""
    return next((neighbour for neighbour in NEIGHBOURS if _whole(neighbour.links, name)), None)


def words(rule: Rule) -> str:
    """A rule that is not ours, in ip-rule(8)'s words."""
    extra = tuple((OPTIONS.get(name, name), value) for name, value in rule.extra if (name, value) != INVERTED)
    text = str(replace(rule, extra=extra)).rpartition(" protocol ")[0]
    head = f"priority {rule.priority}"
    return f"{head} not{text.removeprefix(head)}" if INVERTED in rule.extra else text


def _is_of(neighbour: Neighbour, found: NftChain) -> bool:
    return _whole(neighbour.tables, found.table) or _whole(neighbour.chains, found.name)


def _whole(pattern: str, name: str) -> bool:
    return bool(pattern) and re.fullmatch(pattern, name) is not None
