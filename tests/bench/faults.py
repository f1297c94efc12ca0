"""What other programs and the weather do to a gateway, one command each, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agent.kernel.rtnl import Rtnl
from agent.model import LOOKUP
from tests.kernel.net import Host

#: The daemon's table, and the identities' routing tables.
TABLE, ROUTING = "idmark", (4001, 4002)


@dataclass(frozen=True, slots=True)
class Fault:
    """Commands that somebody runs on the gateway, and what they amount to."""

    kind: str
    commands: tuple[tuple[str, ...], ...]


def faults(gw: Host, chance: random.Random) -> Iterator[Fault]:
    """Faults without end; each is made of what the kernel has at that moment. The calling thread is on the gateway."""
    makers: tuple[Callable[[Host, random.Random], Fault], ...] = (
        _rule_deleted,
        _route_deleted,
        _element_deleted,
        _chain_rule_deleted,
        _chain_flushed,
        _table_deleted,
        _ruleset_flushed,
        _rules_flushed,
        _table_of_routes_flushed,
        _twin_rule,
        _twin_route,
    )
    while True:
        yield chance.choice(makers)(gw, chance)


def _rule_deleted(gw: Host, chance: random.Random) -> Fault:
    with Rtnl() as rtnl:
        rule = chance.choice([rule for rule in rtnl.our_rules() if rule.action == LOOKUP])
    return Fault("a rule deleted", ((*rule.family.ip.split(), "rule", "delete", *str(rule).split()),))


def _route_deleted(gw: Host, chance: random.Random) -> Fault:
    with Rtnl() as rtnl:
        route = chance.choice(sorted(rtnl.our_routes(), key=str))
    return Fault("a route deleted", ((*route.family.ip.split(), "route", "delete", *str(route).split()),))


def _element_deleted(gw: Host, chance: random.Random) -> Fault:
    sets = [
        item["set"] for item in gw.nft_json("list", "sets", "table", "inet", TABLE) if item.get("set", {}).get("elem")
    ]
    one = chance.choice([each for each in sets if each["name"] in {"links", "marks"}])
    element = chance.choice(one["elem"])
    words = f'"{element}"' if isinstance(element, str) else str(element)
    return Fault("an element deleted", (("nft", f"delete element inet {TABLE} {one['name']} {{ {words} }}"),))


def _chain_rule_deleted(gw: Host, chance: random.Random) -> Fault:
    rules = [item["rule"] for item in gw.nft_json("list", "table", "inet", TABLE) if "rule" in item]
    one = chance.choice(rules)
    return Fault(
        "a chain's rule deleted",
        (("nft", "delete", "rule", "inet", TABLE, one["chain"], "handle", str(one["handle"])),),
    )


def _chain_flushed(gw: Host, chance: random.Random) -> Fault:
    chain = chance.choice(("prerouting", "output", "postrouting", "arriving", "source"))
    return Fault("a chain flushed", (("nft", "flush", "chain", "inet", TABLE, chain),))


def _table_deleted(gw: Host, chance: random.Random) -> Fault:
    return Fault("the table deleted", (("nft", "delete", "table", "inet", TABLE),))


def _ruleset_flushed(gw: Host, chance: random.Random) -> Fault:
    return Fault("the ruleset flushed", (("nft", "flush", "ruleset"),))


def _rules_flushed(gw: Host, chance: random.Random) -> Fault:
    family = chance.choice(("-4", "-6"))
    return Fault("all rules flushed", (("ip", family, "rule", "flush", "protocol", "73"),))


def _table_of_routes_flushed(gw: Host, chance: random.Random) -> Fault:
    family, table = chance.choice(("-4", "-6")), chance.choice(ROUTING)
    return Fault("a table of routes flushed", (("ip", family, "route", "flush", "table", str(table)),))


def _twin_rule(gw: Host, chance: random.Random) -> Fault:
    source = f"10.{chance.randrange(100, 200)}.0.0/16"
    words = f"rule add priority {chance.randrange(4001, 4100)} from {source} lookup main protocol 73"
    return Fault("a rule in our name", (("ip", *words.split()),))


def _twin_route(gw: Host, chance: random.Random) -> Fault:
    words = f"route add 10.{chance.randrange(100, 200)}.0.0/16 dev lan table {chance.choice(ROUTING)} protocol 73"
    return Fault("a route in our name", (("ip", *words.split()),))
