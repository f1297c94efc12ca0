"""Does the kernel route as is wanted: its own answers beside what the policy wants.

`verify --live` asks for every class of packets, a scrape and an apply for a few of each identity and family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.desired import Desired
from agent.given import Given
from agent.model import Address, Facts, Family, Identity, Lookup, parse_address
from agent.walk import MAIN, REFUSED, Fate
from agent.wanted import Wanted

if TYPE_CHECKING:
    from agent.kernel.rtnl import Rtnl

#: Addresses that only a default leads to: nobody has them (RFC 7600, 6.1; RFC 6666).
ANYWHERE: Mapping[Family, Address] = {Family.IPV4: parse_address("192.0.0.8"), Family.IPV6: parse_address("100::1")}


@dataclass(frozen=True, slots=True)
class Question:
    """A packet of an identity's, and which way it is to go: one of those that are wanted."""

    # To hash it takes as long as it has members.
    identity: Identity = field(hash=False)
    destination: Address
    wanted: tuple[Fate, ...]
    fwmark: int = 0
    source: Address | None = None
    arriving: str | None = None

    def ask(self, rtnl: Rtnl) -> Lookup:
        """The kernel's answer. Raises KernelError."""
        return rtnl.lookup(self.destination, source=self.source, fwmark=self.fwmark, arriving=self.arriving)

    def agrees(self, answer: Lookup) -> bool:
        """Whether an answer is what is wanted."""
        return any(agrees(fate, self.identity.table, answer) for fate in self.wanted)


def agrees(wanted: Fate, table: int, answer: Lookup) -> bool:
    """Whether the kernel's answer is what is wanted of a packet, in an identity's table."""
    if wanted.what == MAIN:
        return answer.table != table
    if wanted.what == REFUSED:
        return bool(answer.error)
    return answer.table == table and (answer.link, answer.via) in wanted.hops


def disagreeing(desired: Desired, rtnl: Rtnl) -> dict[tuple[str, Family], tuple[tuple[Question, Lookup], ...]]:
    """By identity and family, what the kernel answers otherwise than is wanted; at most two questions each, and one
    for each own address that this host hasn't. Raises KernelError.
    """
    found: dict[tuple[str, Family], tuple[tuple[Question, Lookup], ...]] = {}
    # To anywhere only defaults lead: the host's networks don't matter.
    wanted = {family: Wanted(family, desired, Facts()) for family in Family}
    for standing in desired.standings:
        for family in standing.families:
            asked = ((question, question.ask(rtnl)) for question in _few(wanted[family], standing.identity, rtnl))
            wrong = tuple(each for each in asked if not each[0].agrees(each[1]))
            found[standing.identity.name, family] = wrong
    return found


def faults(desired: Desired, rtnl: Rtnl) -> tuple[str, ...]:
    """The same in words, a line each; empty while the kernel agrees. Raises KernelError."""
    return tuple(
        f"identity {name}: {family} should go {_words(wrong[0][0])}, and the kernel says: {wrong[0][1]}"
        for (name, family), wrong in disagreeing(desired, rtnl).items()
        if wrong
    )


def _few(wanted: Wanted, identity: Identity, rtnl: Rtnl) -> Iterator[Question]:
    """Of the mark alone, as for forwarded packets, and of an own address alone, as before there is a mark.

    An address that this host doesn't have can't be asked for: IPv4 refuses it, whatever the routes (net/ipv4/route.c,
    ip_route_output_key_hash_rcu). The way to one that it has is by lo.
    """
    anywhere = ANYWHERE[wanted.family]
    way = wanted.way(identity, Given.of(destination=int(anywhere)))
    yield Question(identity, anywhere, way, fwmark=identity.fwmark.value)
    for source in wanted.standings[identity.name].own(wanted.family):
        if rtnl.lookup(source).link == "lo":
            yield Question(identity, anywhere, way, source=source)
            return


def _words(question: Question) -> str:
    (wanted, *_) = question.wanted
    if wanted.what == MAIN:
        return "where the other tables lead"
    return "nowhere" if wanted.what == REFUSED else f"{wanted} table {question.identity.table}"
