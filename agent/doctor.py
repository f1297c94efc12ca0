"""What on this host will hurt identities: every rule asked, every finding with its evidence and its remedy. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from agent.desired import Desired
from agent.host import Host
from agent.symptoms import Symptom, hooks, routing, services, settings


@dataclass(frozen=True, slots=True)
class Finding:
    """What hurts: `check` names the rule that found it; `evidence` is what was read where, `remedy` a command or a line
    for a file.
    """

    check: str
    what: str
    evidence: str
    remedy: str


#: Every rule by its name, in the order in which they are told: what loses packets, then what may come to.
CHECKS: Mapping[str, Callable[[Desired, Host], Iterator[Symptom]]] = {
    "kernel-feature": settings.missing_features,
    "misfit": routing.misfits,
    "rule-before": routing.rules_before,
    "number-taken": routing.numbers_taken,
    "mark-writer": hooks.mark_writers,
    "mark-neighbour": hooks.neighbours_bits,
    "mark-legacy": hooks.legacy_marks,
    "hook-tie": hooks.hook_ties,
    "reverse-check": hooks.reverse_checks,
    "flowtable": hooks.flowtables,
    "rp-filter": settings.strict_rp_filter,
    "mark-valid-for-all": settings.marks_for_all,
    "own-sources": settings.own_sources,
    "forwarding": settings.forwarding_off,
    "accept-ra": settings.deaf_to_routers,
    "mtu": settings.unclamped,
    "containers": settings.containers_not_downstream,
    "members-behind": settings.members_behind_a_router,
    "conntrack": settings.connections_full,
    "networkd": settings.networkd_deletes,
    "networkmanager": settings.network_manager_tables,
    "udp-wildcard": services.wildcard_sockets,
    "address-gone": services.gone_addresses,
    "file": settings.files_of_others,
    "clock": settings.clock_behind,
}


def findings(desired: Desired, host: Host) -> tuple[Finding, ...]:
    """All that is found, in the order of CHECKS; nothing is found on a host that does well."""
    return tuple(Finding(name, *symptom) for name, check in CHECKS.items() for symptom in check(desired, host))


def text(found: Iterable[Finding]) -> Iterator[str]:
    """The lines of a report for a person."""
    for finding in found:
        yield f"{finding.check}: {finding.what}"
        yield f"    seen    {finding.evidence}"
        yield f"    remedy  {finding.remedy}"
