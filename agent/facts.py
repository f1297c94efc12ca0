"""What a policy needs to know of its host: taken there, and carried to a review as a file."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields, is_dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from itertools import product
from pathlib import Path
from typing import Any

from agent import IdmarkError
from agent.addresses import Family, Prefix
from agent.kernel import modules
from agent.kernel.nfnl import Nfnl
from agent.kernel.rtnl import Rtnl
from agent.kernel.sysctl import Sysctls, index_of
from agent.model import Facts, Link, Policy, Route

#: How often links are looked at, while they are renamed or made anew in the midst of it.
ATTEMPTS = 3


class FactsError(IdmarkError):
    """A facts file that can't be used; the text names the file and why."""


def take(policy: Policy, rtnl: Rtnl, nfnl: Nfnl, sysctls: Sysctls) -> Facts:
    """Ask the kernel for what this policy needs, and no more: a full BGP table in main stays where it is.

    Raises KernelError.
    """
    return take_with_ours(policy, rtnl, nfnl, sysctls)[0]


def take_with_ours(policy: Policy, rtnl: Rtnl, nfnl: Nfnl, sysctls: Sysctls) -> tuple[Facts, frozenset[Route]]:
    """The same, and the routes of our protocol number: one walk through all routes shows both. Raises KernelError."""
    own = {identity.link for identity in policy.identities}
    links = _links(own, rtnl, sysctls)
    there = {link.name for link in links}
    used = own & there
    survey = rtnl.survey()
    routes = {route for route in survey.near if any(hop.link in used for hop in route.hops)}
    if policy.downstream is None:
        routes.update(survey.connected)
    else:
        for family, link in product(Family, there & set(policy.downstream)):
            routes.update(rtnl.main_routes(family, link))
    kernel = policy.kernel
    nat = kernel.nat is None and (nfnl.translates(kernel.nft_table) or modules.may_translate())
    return Facts(links, tuple(sorted(routes, key=lambda route: (route.key, str(route)))), nat), survey.ours


def _links(own: Collection[str], rtnl: Rtnl, sysctls: Sysctls) -> tuple[Link, ...]:
    """All links; those of `own` with their sysctls, which go by the link's name: one that is another by then, or none,
    would seem to have none set. A host that never stands still is taken as it was seen last.
    """
    for _attempt in range(ATTEMPTS):
        links = tuple(_with_sysctls(link, sysctls) if link.name in own else link for link in rtnl.links())
        if all(index_of(link.name) == link.index for link in links if link.name in own):
            break
    return links


def _with_sysctls(link: Link, sysctls: Sysctls) -> Link:
    return replace(link, rp_filter=sysctls.rp_filter(link.name), src_valid_mark=sysctls.src_valid_mark(link.name))


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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
