"""Does the kernel route as is wanted: its answers to each identity's mark and addresses, beside the desired state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from agent.desired import Desired, Standing
from agent.kernel.rtnl import Rtnl
from agent.model import Address, Family, Lookup, Route, parse_address

#: Addresses that only a default leads to: nobody has them (RFC 7600, 6.1; RFC 6666).
ANYWHERE: Mapping[Family, Address] = {Family.IPV4: parse_address("192.0.0.8"), Family.IPV6: parse_address("100::1")}


def disagreeing(desired: Desired, rtnl: Rtnl) -> dict[tuple[str, Family], tuple[Lookup, ...]]:
    """By identity and family, the kernel's answers that are not what is wanted. Raises KernelError."""
    wanted = roads(desired)
    return {
        (standing.identity.name, family): tuple(
            answer
            for answer in _answers(rtnl, standing, family)
            if not agrees(wanted[standing.identity.name, family], standing.identity.table, answer)
        )
        for standing in desired.standings
        for family in standing.families
    }


def faults(desired: Desired, rtnl: Rtnl) -> tuple[str, ...]:
    """The same in words, a line each; empty while the kernel agrees. Raises KernelError."""
    wanted = roads(desired)
    return tuple(
        f"identity {name}: {family} should go {_words(wanted[name, family])}, and the kernel says: {answers[0]}"
        for (name, family), answers in disagreeing(desired, rtnl).items()
        if answers
    )


def roads(desired: Desired) -> dict[tuple[str, Family], Route | None]:
    """The route that is wanted now to anywhere, by identity and family; None: the identity's table has none.

    Of the routes that match the longest prefix wins, and then the smallest metric: so a detour's road counts while the
    identity's own is closed, and the last route of the table when there is none left.
    """
    tables: dict[tuple[int, Family], list[Route]] = {}
    for route in desired.routes:
        if ANYWHERE[route.family] in route.destination:
            tables.setdefault((route.table, route.family), []).append(route)
    return {
        (standing.identity.name, family): _best(tables.get((standing.identity.table, family), ()))
        for standing in desired.standings
        for family in standing.families
    }


def _best(routes: Iterable[Route]) -> Route | None:
    return min(routes, key=lambda route: (-route.destination.length, route.metric), default=None)


def agrees(wanted: Route | None, table: int, answer: Lookup) -> bool:
    """Whether the kernel's answer is what is wanted of an identity's table."""
    if wanted is None:  # when_down = "main": whatever the other tables say
        return answer.table != table
    if wanted.kind != "unicast":
        return answer.link is None
    return answer.table == table and answer.link in {hop.link for hop in wanted.hops}


def _answers(rtnl: Rtnl, standing: Standing, family: Family) -> Iterator[Lookup]:
    """The kernel's answers to the mark alone, as for forwarded packets, and to an own address alone, as before it.

    An address that this host doesn't have can't be asked for: IPv4 refuses it, whatever the routes (net/ipv4/route.c,
    ip_route_output_key_hash_rcu). The way to one that it has is by lo.
    """
    yield rtnl.lookup(ANYWHERE[family], fwmark=standing.identity.fwmark.value)
    for source in standing.own(family):
        if rtnl.lookup(source).link == "lo":
            yield rtnl.lookup(ANYWHERE[family], source=source)
            return


def _words(route: Route | None) -> str:
    if route is None:
        return "where the other tables lead"
    if route.kind != "unicast":
        return "nowhere"
    return " or ".join(f"{hop.words(route.family)} table {route.table}" for hop in route.hops)
