"""What is in force now, identity by identity: for a program as JSON, for a person as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from agent.addresses import Family
from agent.desired import Standing, Way
from agent.model import Count, Link, Policy, Route, Rule
from agent.plan import Load
from agent.reconcile import Look
from agent.ruleset import COUNTS, counter_name


def report(policy: Policy, look: Look, counts: Mapping[str, Count]) -> dict[str, Any]:
    """Policy, differences, identities with link, addresses, ways out and counters (packets and bytes since loaded)."""
    return {
        "gateway": policy.gateway,
        "policy_digest": policy.digest,
        "in_force": not look.plan.steps,
        "differences": look.plan.text.splitlines(),
        "notes": list(look.observed.notes),
        "identities": [_identity(standing, look, counts) for standing in look.desired.standings],
    }


def _identity(standing: Standing, look: Look, counts: Mapping[str, Count]) -> dict[str, Any]:
    identity = standing.identity
    return {
        "name": identity.name,
        "id": identity.id,
        "fwmark": str(identity.fwmark),
        "table": identity.table,
        "link": identity.link,
        "link_state": link_state(look.facts.link(identity.link)),
        "addresses": [str(address) for address in standing.addresses],
        "members": len(identity.members),
        "when_down": identity.when_down,
        "notes": list(standing.notes),
        "families": {
            way.family.value: {
                "open": bool(way.hops) and _in_force(standing, way.family, look),
                "in_force": _in_force(standing, way.family, look),
                "way": _way(way),
                "counters": {
                    count: _counter(counts.get(counter_name(identity.name, way.family, count))) for count in COUNTS
                },
            }
            for way in standing.ways
        },
    }


def _in_force(standing: Standing, family: Family, look: Look) -> bool:
    """Whether the kernel has this identity's routes and rules of a family, and no others of ours, and the marks."""
    table = standing.identity.table

    def mine(routes: Iterable[Route]) -> set[Route]:
        return {route for route in routes if (route.table, route.family) == (table, family)}

    def my_rules(rules: Iterable[Rule]) -> set[Rule]:
        return {rule for rule in rules if (rule.table, rule.family) == (table, family)}

    return (
        mine(look.desired.routes) == mine(look.observed.routes)
        and my_rules(look.desired.rules) == my_rules(look.observed.rules)
        and not any(isinstance(step, Load) for step in look.plan.steps)
    )


def link_state(link: Link | None) -> str:
    """`absent`, `down`, `no carrier` or `up`."""
    if link is None:
        return "absent"
    return ("up" if link.carrier else "no carrier") if link.up else "down"


def _way(way: Way) -> str:
    return way.closed or ", ".join(hop.words(way.family) for hop in way.hops)


def _counter(count: Count | None) -> dict[str, int] | None:
    """A counter that isn't there is no zero."""
    return None if count is None else {"packets": count.packets, "bytes": count.bytes}


def text(status: Mapping[str, Any]) -> Iterator[str]:
    """The report's lines for a terminal of 80 columns."""
    force = "in force" if status["in_force"] else "NOT IN FORCE: idmark plan shows what differs"
    yield f"{status['gateway']}: {force}    policy {status['policy_digest'][:12]}"
    yield _daemon(status.get("daemon"))
    yield from (f"note: {note}" for note in status["notes"])
    for identity in status["identities"]:
        yield ""
        yield f"{identity['name']}    id {identity['id']}, fwmark {identity['fwmark']}, table {identity['table']}"
        yield f"  link       {identity['link']}, {identity['link_state']}"
        yield f"  addresses  {', '.join(identity['addresses']) or 'none'}"
        if identity["members"]:
            yield f"  members    {identity['members']} prefix{'es' * (identity['members'] != 1)}"
        for family, state in identity["families"].items():
            now = ("open, " if state["open"] else "CLOSED, ") if state["in_force"] else "NOT IN FORCE, wanted: "
            yield f"  {family:<9}  {now}{state['way']}"
        yield from (f"  note       {note}" for note in identity["notes"])
        yield from _counter_lines(identity["families"])


def _daemon(ledger: Mapping[str, Any] | None) -> str:
    if ledger is None:
        return "daemon: none is at work, nobody follows what changes (idmark run)"
    since = datetime.fromtimestamp(ledger["since"]).strftime("%Y-%m-%d %H:%M")
    repairs = [repair for repair in ledger["repairs"] if repair["kind"] != "follow"]
    last = datetime.fromtimestamp(repairs[-1]["at"]).strftime(", last repair %m-%d %H:%M:%S") if repairs else ""
    return f"daemon: pid {ledger['pid']} since {since}{last}{'' if ledger['in_sync'] else ', NOT IN SYNC: see its log'}"


def _counter_lines(families: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'packets (bytes)':<18}" + "".join(f"{family:>28}" for family in families)
    for count in COUNTS:
        values = [state["counters"][count] for state in families.values()]
        # The rare ones only when there is something to see.
        if count in ("transmit", "receive") or any(value and value["packets"] for value in values):
            yield f"    {count:<16}" + "".join(f"{_amount(value):>28}" for value in values)


def _amount(value: Mapping[str, int] | None) -> str:
    return "no counter" if value is None else f"{value['packets']:,} ({value['bytes']:,})"
