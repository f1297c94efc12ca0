"""What a single value of the policy's document may be: from how TOML has it to how the agent has it.

Every function raises ValueError, whose text completes "VALUE …".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from agent.addresses import Address, Addresses, Family, Prefix, parse_address

#: Where packets of an identity neither come from nor go to by a next hop (RFC 1122, 4291; IANA's special registries).
_SPECIAL = {
    Prefix.parse(network): kind
    for network, kind in {
        "0.0.0.0/32": "unspecified",
        "127.0.0.0/8": "loopback",
        "169.254.0.0/16": "link-local",
        "224.0.0.0/4": "multicast",
        "255.255.255.255/32": "limited broadcast",
        "::/128": "unspecified",
        "::1/128": "loopback",
        "::ffff:0:0/96": "IPv4-mapped",
        "fe80::/10": "link-local",
        "ff00::/8": "multicast",
    }.items()
}
#: A duration: digits and a unit.
DURATION = r"([0-9]{1,7})(ms|s|m|h)"

_SPECIAL_OF = {family: [special for special in _SPECIAL.items() if special[0].family is family] for family in Family}
#: The first bytes that addresses of these have; nearly all of a million prefixes have another.
_SPECIAL_BYTES = {
    family: {
        byte
        for special, _ in specials
        for byte in range(special.address >> family.bits - 8, (special.last >> family.bits - 8) + 1)
    }
    for family, specials in _SPECIAL_OF.items()
}


@dataclass(frozen=True, slots=True)
class ListFile:
    """A member of the form `file:NAME`."""

    name: str


def _special(prefix: Prefix) -> str | None:
    """What a network is that lies wholly in a special one. 0.0.0.0/0 does not: it stands for all the others too."""
    if prefix.address >> prefix.family.bits - 8 not in _SPECIAL_BYTES[prefix.family]:
        return None
    for special, kind in _SPECIAL_OF[prefix.family]:
        if special.length <= prefix.length and special.address <= prefix.address <= special.last:
            return kind
    return None


def has_special(column: Addresses, length: int) -> bool:
    """Whether one of many networks of this length lies wholly in a special one."""
    return any(
        special.length <= length and (found := column.next(special.address)) is not None and found <= special.last
        for special, _ in _SPECIAL_OF[column.family]
    )


def parse_source(text: str) -> Prefix:
    prefix = Prefix.parse(text)
    if kind := _special(prefix):
        raise ValueError(f"is {kind}: it cannot be a source")
    return prefix


def member(text: str) -> Prefix | ListFile:
    if not text.startswith("file:"):
        return parse_source(text)
    if text == "file:":
        raise ValueError("names no file")
    return ListFile(text.removeprefix("file:"))


def _address(text: str) -> Address:
    for mark in "/%":
        if mark in text:
            raise ValueError(f'is not a plain address: leave out "{mark}{text.partition(mark)[2]}"')
    return parse_address(text)


def own_address(text: str) -> Address:
    address = _address(text)
    parse_source(str(address))
    return address


def next_hop(text: str) -> Address:
    address = _address(text)
    if (kind := _special(Prefix.host(address))) not in {None, "link-local"}:
        raise ValueError(f"is {kind}: it cannot be a next hop")
    return address


def probe_target(text: str) -> Address:
    address = _address(text)
    if kind := _special(Prefix.host(address)):
        raise ValueError(f"is {kind}: it cannot be probed")
    return address


def every(text: str) -> float:
    """Seconds, from a duration with its unit."""
    match = re.fullmatch(DURATION, text)
    if match is None:
        raise ValueError('is no duration: "500ms", "2s" and "1m" are')
    seconds = int(match[1]) * {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}[match[2]] / 1000
    if not 0.1 <= seconds <= 3600:
        raise ValueError("does not lie in 100ms..1h")
    return seconds


def fail_after(count: int) -> int:
    if not 1 <= count <= 100:
        raise ValueError("does not lie in 1..100")
    return count


def port(port: int) -> int:
    if not 1 <= port <= 65535:
        raise ValueError("is no port: 1..65535 is")
    return port


def link(name: str) -> str:
    if not 1 <= len(name.encode()) <= 15:
        raise ValueError("is no link name: the kernel takes 1 to 15 bytes")
    if name in {".", "..", "all", "default"}:
        raise ValueError("is no link name: the kernel keeps it for itself")
    if name == "lo":
        raise ValueError("is the loopback: nothing leaves the host by it")
    for char in name:
        # The kernel: dev_valid_name() in net/core/dev.c; % makes a pattern of a name. nft: no escape in its strings.
        if char in '/:%"\\' or char.isspace() or not char.isprintable():
            raise ValueError(f"is no link name: it holds {json.dumps(char)}")
    if name.endswith("*"):
        raise ValueError("is no link name: nft takes the last * for a wildcard")
    return name


def gateway(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ValueError("is no name: 1 to 63 letters, digits, dots, hyphens and underscores are")
    return name


def integer(number: int) -> int:
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("does not fit 64 bits")
    return number


def mark_mask(mask: int) -> int:
    if not 0 < mask <= 0xFFFFFFFF:
        raise ValueError("is no mask: 1 to 0xffffffff is")
    ones = mask // (mask & -mask)
    if ones & ones + 1:
        raise ValueError(f"({mask:#x}) is no mask: its bits must stand side by side")
    return mask


def nft_table(name: str) -> str:
    if not re.fullmatch(r"idmark[A-Za-z0-9_]{0,25}", name):
        raise ValueError('is no name of ours: "idmark" and up to 25 letters, digits or underscores are')
    return name


def hook_priority(priority: int) -> int:
    if not -200 < priority < -100:
        raise ValueError("does not lie in -199..-101: after conntrack (-200), before dstnat (-100)")
    return priority


def way_bits(bits: int) -> int:
    if not 0 <= bits <= 16:
        raise ValueError("does not lie in 0..16")
    return bits


def nat(value: object) -> object:
    if value is not None and value != "auto" and not isinstance(value, bool):
        raise ValueError('must be "auto", true or false')
    return value
