"""Other programs' policy routing rules and routes, where ours are."""

from __future__ import annotations

from collections.abc import Iterator

from agent.addresses import Prefix
from agent.desired import Desired, Standing
from agent.host import Host
from agent.model import LOOKUP, NOP, Rule
from agent.neighbours import INVERTED, owner_of_rule, words
from agent.symptoms import Symptom, some

#: linux/rtnetlink.h: what is this host's own.
TABLE_LOCAL = 255
#: So many priorities behind the identities' are ours too: what refuses packets that nobody has marked.
BEHIND = 4
#: The kernel makes it for VRFs, and it takes only packets on their links; the other takes only sockets bound to a link.
ELSEWHERE = frozenset({"FRA_L3MDEV", "FRA_OIFNAME"})


def misfits(desired: Desired, host: Host) -> Iterator[Symptom]:
    """What the policy gets wrong about this host."""
    del host
    for fault in desired.faults:
        yield Symptom(
            "the policy does not fit this host", fault, "correct it in the policy; `idmark plan` says if it fits"
        )


def rules_before(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Rules that take an identity's packets before ours do."""
    before = [
        (rule, taken)
        for rule, ours in host.rules
        if not (ours or rule.action == NOP or rule.table == TABLE_LOCAL or _is_idle(rule, host))
        and (taken := [each.identity.name for each in desired.standings if _comes_first(rule, each, desired)])
    ]
    for rule, taken in before:
        owner = owner_of_rule(rule)
        advice = f"; {owner.name}: {owner.advice}" if owner and owner.advice else ""
        yield Symptom(
            f"a rule that comes first takes packets of {some(taken)}",
            f"{rule.family.ip} rule: {words(rule)}; ours begin at {_first(desired)}",
            f"{_ahead_of(min(other.priority for other, _ in before), desired)} (a rule that is added without a "
            f"priority comes before all others){advice}",
        )


def numbers_taken(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Priorities and tables of ours that others use."""
    kernel = desired.policy.kernel
    highest = kernel.mark_mask.bit_count()
    ids = [standing.identity.id for standing in desired.standings] or range(1, 1 << highest)
    priorities = {kernel.rule_priority + number for number in ids}
    priorities |= {max(priorities) + number for number in range(1, BEHIND + 1) if desired.standings}
    tables = {kernel.table_base + number for number in ids}
    for rule, ours in host.rules:
        if ours:
            continue
        line = f"{rule.family.ip} rule: {words(rule)}"
        if rule.priority in priorities:
            yield Symptom(
                f"somebody else has a rule at priority {rule.priority}, which is idmark's: the older comes first",
                line,
                "give it another priority; or in the policy, [kernel], another rule_priority",
            )
        if rule.action == LOOKUP and rule.table in tables:
            yield Symptom(
                f"somebody else's rule looks up table {rule.table}, which is idmark's",
                line,
                "give it another table; or in the policy, [kernel], another table_base",
            )
    for table in sorted({route.table for route in host.foreign_routes}):
        routes = [route for route in host.foreign_routes if route.table == table]
        yield Symptom(
            f"somebody else has routes in table {table}, which is idmark's: packets of its identity follow them",
            f"ip route show table {table}: {some((route.words for route in routes), '; ')}",
            "have them put elsewhere; or in the policy, [kernel], another table_base",
        )


def _is_idle(rule: Rule, host: Host) -> bool:
    """A table with nothing in it takes nobody: strongSwan's 220, while no tunnel is up."""
    return rule.action == LOOKUP and rule.table in host.empty


def _first(desired: Desired) -> int:
    return min(standing.identity.priority for standing in desired.standings)


def _ahead_of(priority: int, desired: Desired) -> str:
    """How to come before a priority with all of our rules."""
    room = priority - max(standing.identity.id for standing in desired.standings) - BEHIND - 1
    move = "move the rule behind ours"
    return move if room < 0 else f"in the policy, [kernel]: rule_priority = {room}; or {move}"


def _comes_first(rule: Rule, standing: Standing, desired: Desired) -> bool:
    return rule.priority < standing.identity.priority and _may_take(rule, standing, desired)


def _may_take(rule: Rule, standing: Standing, desired: Desired) -> bool:
    """Whether packets of an identity may match a rule. What it asks besides marks and sources is taken for granted."""
    identity = standing.identity
    if rule.family not in standing.families or any(name in ELSEWHERE for name, _ in rule.extra):
        return False
    if INVERTED in rule.extra:
        return True
    if rule.fwmark:
        # Of the bits that are not ours a packet may have any.
        common = rule.fwmark.mask & identity.fwmark.mask
        if rule.fwmark.value & common != identity.fwmark.value & common:
            return False
    if rule.unmarked & identity.fwmark.value:
        return False
    return rule.source is None or _speaks_from(rule.source, standing, desired)


def _speaks_from(source: Prefix, standing: Standing, desired: Desired) -> bool:
    return any(
        span.identity == standing.identity.name
        and span.family is source.family
        and span.first <= source.last
        and source.address <= span.last
        for span in desired.classes
    )
