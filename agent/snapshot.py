"""What the kernel had of ours at one moment, and the way back to it.

Where a known policy was in force then, that policy leads back, by the ordinary transactions: hitless, counters going
on, and right also for a host that has moved meanwhile. Else routes, rules, sysctls and the listed tables are put back
one by one as they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import model, reconcile, ruleset, state
from agent.addresses import Address, Family, Prefix, parse_address
from agent.desired import NOBODY
from agent.model import Facts, Fwmark, Hop, Policy, Route, Rule
from agent.plan import Observed, Plan, restoration
from agent.reconcile import Seams

#: A named counter as nft lists it; what it has counted is no part of how things were.
COUNTER = re.compile(r"(?P<head>\tcounter (?P<name>\S+) \{(?:\n\t\tcomment [^\n]*)?\n\t\t)packets \d+ bytes \d+")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Routes, rules, links whose src_valid_mark is ours, nft tables' listings by name.

    `policy` is the text of what was kept in force then, as state.text() writes it, or empty; `in_force`: whether the
    kernel had exactly that.
    """

    routes: frozenset[Route] = frozenset()
    rules: tuple[Rule, ...] = ()
    src_valid_mark: frozenset[str] = frozenset()
    tables: Mapping[str, str] = field(default_factory=dict)
    policy: str = ""
    in_force: bool = False

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "routes": sorted((_plain_route(route) for route in self.routes), key=str),
            "rules": [_plain_rule(rule) for rule in self.rules],
            "src_valid_mark": sorted(self.src_valid_mark),
            "tables": dict(self.tables),
            "policy": self.policy,
            "in_force": self.in_force,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Snapshot:
        """From what `plain` gave. Raises LookupError, TypeError or ValueError for anything else."""
        tables = dict(plain["tables"])
        if any(re.search(r"\binclude\b", re.sub(r'"[^"\n]*"', "", text)) for text in tables.values()):
            # The file lies in the agent's own user's directory, and root may be who loads it.
            raise ValueError("nft never lists `include`")
        return cls(
            routes=frozenset(map(_route, plain["routes"])),
            rules=tuple(map(_rule, plain["rules"])),
            src_valid_mark=frozenset(plain["src_valid_mark"]),
            tables=tables,
            policy=plain["policy"],
            in_force=plain["in_force"],
        )


def take(kernel: Seams, kept: Policy | None, down: Mapping[str, str] = NOBODY) -> Snapshot:
    """Look at what there is. `kept` is the policy that is to be in force now, if there is one. Raises KernelError."""
    if kept and not reconcile.look(kept, kernel, down).plan.steps:
        return Snapshot(policy=state.text(kept), in_force=True)
    found = _observed(kernel)
    return Snapshot(
        routes=found.routes,
        rules=found.rules,
        src_valid_mark=found.src_valid_mark_ours,
        tables={name: kernel.nft.text(name) or "" for name in found.tables},
        policy=state.text(kept) if kept else "",
    )


def restore(before: Snapshot, kernel: Seams, down: Mapping[str, str] = NOBODY) -> list[str]:
    """Go back to it as far as it goes; what could not be put back, in words. Raises KernelError if nothing could."""
    if not before.in_force:
        return _restore_exactly(before, kernel)
    policy = state.parse(before.policy, Path(state.NAME))
    left: list[str] = []
    for _ in range(3):  # the host may be in motion
        plan = reconcile.look(policy, kernel, down).plan
        left = _taken(plan, kernel)
        if not plan.steps:
            break
    return left


def _taken(plan: Plan, kernel: Seams) -> list[str]:
    """Take the steps, all of them or as many as can be; what could not be, in words."""
    try:
        reconcile.apply(plan, kernel)
    except reconcile.ApplyError:
        mended = [reconcile.mend(Plan((step,)), kernel) for step in plan.steps]
        failed = [str(each.failure) for each in mended if each.failure]
        return [*failed, *(words for each in mended for words in each.refused)]
    return []


def _restore_exactly(before: Snapshot, kernel: Seams) -> list[str]:
    now = _observed(kernel)
    counts = {name: kernel.nfnl.counts(name) for name in now.tables}
    listings = {}
    for name, text in before.tables.items():
        if name == ruleset.CLOSED or uncounted(kernel.nft.text(name) or "") != uncounted(text):
            listings[name] = counted_on(text, counts.get(name, {}))
    names = tuple(before.tables)
    then = Observed(
        routes=before.routes, rules=before.rules, other_tables=names, src_valid_mark_ours=before.src_valid_mark
    )
    return _taken(restoration(then, listings, now), kernel)


def _observed(kernel: Seams) -> Observed:
    return reconcile.observe(kernel, model.Kernel().nft_table, Facts())


def uncounted(listing: str) -> str:
    """A table's listing without what its named counters have counted."""
    return COUNTER.sub(r"\g<head>", listing)


def counted_on(listing: str, counts: Mapping[str, model.Count]) -> str:
    """A listing whose counters go on from where they are now."""

    def now(found: re.Match[str]) -> str:
        count = counts.get(found["name"].strip('"'))
        return f"{found['head']}packets {count.packets} bytes {count.bytes}" if count else found[0]

    return COUNTER.sub(now, listing)


# --- as JSON ---------------------------------------------------------------------------------------------------------


def _plain_route(route: Route) -> dict[str, Any]:
    return {
        "destination": [route.destination.family, route.destination.address, route.destination.length],
        "table": route.table,
        "hops": [[hop.link, hop.via and str(hop.via), hop.onlink, hop.weight] for hop in route.hops],
        "kind": route.kind,
        "metric": route.metric,
        "source": route.source and str(route.source),
        "tos": route.tos,
    }


def _route(plain: Mapping[str, Any]) -> Route:
    return Route(
        destination=_prefix(plain["destination"]),
        table=plain["table"],
        hops=tuple(Hop(link, _address(via), onlink, weight) for link, via, onlink, weight in plain["hops"]),
        kind=plain["kind"],
        metric=plain["metric"],
        source=_address(plain["source"]),
        tos=plain["tos"],
    )


def _plain_rule(rule: Rule) -> dict[str, Any]:
    return {
        "family": rule.family,
        "priority": rule.priority,
        "table": rule.table,
        "fwmark": rule.fwmark and [rule.fwmark.value, rule.fwmark.mask],
        "source": rule.source and [*rule.source],
        "unmarked": rule.unmarked,
        "iif": rule.iif,
        "action": rule.action,
        "target": rule.target,
        "extra": rule.extra,
    }


def _rule(plain: Mapping[str, Any]) -> Rule:
    return Rule(
        family=Family(plain["family"]),
        priority=plain["priority"],
        table=plain["table"],
        fwmark=Fwmark(*plain["fwmark"]) if plain["fwmark"] else None,
        source=_prefix(plain["source"]) if plain["source"] else None,
        unmarked=plain["unmarked"],
        iif=plain["iif"],
        action=plain["action"],
        target=plain["target"],
        extra=_frozen(plain["extra"]),
    )


def _prefix(plain: list[Any]) -> Prefix:
    family, address, length = plain
    return Prefix(Family(family), address, length)


def _address(text: str | None) -> Address | None:
    return parse_address(text) if text else None


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
