"""What a policy needs to know of its host: taken there, and carried to a review as a file."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from agent.kernel.rtnl import HOUSEHOLD, RTPROT_KERNEL, RTPROT_RA, Rtnl
from agent.kernel.sysctl import Sysctls
from agent.model import Facts, Family, Policy, Prefix, Route


class FactsError(Exception):
    """A facts file that can't be used; the text names the file and why."""


def take(policy: Policy, rtnl: Rtnl, sysctls: Sysctls) -> Facts:
    """Ask the kernel for what this policy needs, and no more: a full BGP table in main stays where it is.

    Raises KernelError.
    """
    own = {identity.link for identity in policy.identities}
    links = rtnl.links()
    known = tuple(
        replace(link, rp_filter=sysctls.rp_filter(link.name), src_valid_mark=sysctls.src_valid_mark(link.name))
        if link.name in own
        else link
        for link in links
    )
    there = {link.name for link in links}
    routes: dict[Route, None] = {}
    for family in Family:
        for link in sorted(own & there):
            routes |= dict.fromkeys(rtnl.main_routes(family, link=link, wanted=_of_the_household))
        if policy.downstream is None:
            for protocol in (RTPROT_KERNEL, RTPROT_RA):
                routes |= dict.fromkeys(rtnl.main_routes(family, protocol=protocol))
        else:
            for link in sorted(there & set(policy.downstream)):
                routes |= dict.fromkeys(rtnl.main_routes(family, link=link))
    return Facts(known, tuple(sorted(routes, key=lambda route: (route.key, str(route)))))


def _of_the_household(length: int, protocol: int) -> bool:
    """Defaults by whomever, and else what no routing daemon made."""
    return not length or protocol in HOUSEHOLD


def dump(facts: Facts) -> str:
    """Facts as JSON text, a key a line, for a change-control repository."""
    return json.dumps(_plain(facts), indent=1) + "\n"


def load(path: Path) -> Facts:
    """Facts from a file that `dump` wrote. Raises FactsError."""
    # Only a review reads facts from a file, and pydantic takes its time to import.
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for route in document["routes"]:
            route["destination"] = Prefix.parse(route["destination"])
        return TypeAdapter(Facts).validate_python(document)
    except OSError as error:
        raise FactsError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise FactsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FactsError(f"{path}: this is no facts file as `idmark facts` writes it ({error})") from error


def _plain(value: Any) -> Any:
    """A value of `agent.model` as JSON has it; addresses and prefixes as their texts."""
    if isinstance(value, Prefix | IPv4Address | IPv6Address):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return value
