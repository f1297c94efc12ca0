"""Does the kernel route as is wanted: its own answers beside what the policy wants.

`verify --live` asks for every class of packets, a scrape and an apply for a few of each identity and family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from agent.addresses import Address, Family, parse_address
from agent.desired import Desired
from agent.given import Given
from agent.model import Facts, Identity, Lookup
from agent.walk import MAIN, REFUSED, Fate
from agent.wanted import Wanted

if TYPE_CHECKING:
    from agent.kernel.rtnl import Packet, Rtnl

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

    @property
    def packet(self) -> Packet:
        """What the kernel is asked about."""
        return (self.destination, self.source, self.fwmark, self.arriving)

    def ask(self, rtnl: Rtnl) -> Lookup:
        """The kernel's answer. Raises KernelError."""
        (answer,) = rtnl.lookups([self.packet])
        return answer

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


#: What is asked of each identity and family: by the mark alone, as for forwarded packets; and by each own address
#: alone, as before there is a mark.
Questions = Mapping[tuple[str, Family], tuple[Question, tuple[Question, ...]]]


def questions(desired: Desired) -> Questions:
    """The questions whose answers tell whether the kernel routes each identity as is wanted."""
    # To anywhere only defaults lead: the host's networks don't matter.
    wanted = {family: Wanted(family, desired, Facts()) for family in Family}
    return {
        (standing.identity.name, family): _few(wanted[family], standing.identity)
        for standing in desired.standings
        for family in standing.families
    }


def _few(wanted: Wanted, identity: Identity) -> tuple[Question, tuple[Question, ...]]:
    anywhere = ANYWHERE[wanted.family]
    way = wanted.way(identity, Given.of(destination=int(anywhere)))
    own = wanted.standings[identity.name].own(wanted.family)
    return (
        Question(identity, anywhere, way, fwmark=identity.fwmark.value),
        tuple(Question(identity, anywhere, way, source=source) for source in own),
    )


def disagreeing(asked: Questions, rtnl: Rtnl) -> dict[tuple[str, Family], tuple[tuple[Question, Lookup], ...]]:
    """By identity and family, what the kernel answers otherwise than is wanted: to the question by the mark, and to the
    first by an own address that this host has. Raises KernelError.

    One that it doesn't have can't be asked for: IPv4 refuses it, whatever the routes (net/ipv4/route.c,
    ip_route_output_key_hash_rcu). The way to one that it has is by lo.
    """
    here = rtnl.local_addresses()
    asking: list[tuple[tuple[str, Family], Question]] = []
    for road, (by_mark, by_source) in asked.items():
        own = (each for each in by_source if each.source in here or _is_local(each.source, rtnl))
        asking += ((road, question) for question in (by_mark, *islice(own, 1)))
    found: dict[tuple[str, Family], tuple[tuple[Question, Lookup], ...]] = dict.fromkeys(asked, ())
    answers = rtnl.lookups(question.packet for _, question in asking)
    for (road, question), answer in zip(asking, answers, strict=True):
        if not question.agrees(answer):
            found[road] = (*found[road], (question, answer))
    return found


def _is_local(address: Address | None, rtnl: Rtnl) -> bool:
    return address is not None and rtnl.lookup(address).link == "lo"


def faults(desired: Desired, rtnl: Rtnl) -> tuple[str, ...]:
    """The same in words, a line each; empty while the kernel agrees. Raises KernelError."""
    return tuple(
        f"identity {name}: {family} should go {_words(wrong[0][0])}, and the kernel says: {wrong[0][1]}"
        for (name, family), wrong in disagreeing(questions(desired), rtnl).items()
        if wrong
    )


def _words(question: Question) -> str:
    (wanted, *_) = question.wanted
    if wanted.what == MAIN:
        return "where the other tables lead"
    return "nowhere" if wanted.what == REFUSED else f"{wanted} table {question.identity.table}"
