"""The files of a review: `ruleset.nft`, which `nft -f` loads, and `routing.txt`, whose lines are ip(8) commands."""

from __future__ import annotations

from collections.abc import Iterator

from agent import commands, ruleset
from agent.desired import Desired, Standing, detours
from agent.model import LOOKUP, Rule
from agent.plan import SetSrcValidMark, addition_order, rule_order

RULESET = "ruleset.nft"
ROUTING = "routing.txt"


def files(desired: Desired) -> dict[str, str]:
    """Name and text of each file. They depend on what is given alone, and not on the order of a policy's lines."""
    return {RULESET: ruleset_text(desired), ROUTING: routing_text(desired)}


def ruleset_text(desired: Desired) -> str:
    """The nft table as the kernel is given it."""
    header = (
        *_header(desired),
        "Load with: nft -f ruleset.nft; again and again, the counters go on. No packet passes unmarked meanwhile.",
        *_unknown_nat(desired),
    )
    return commands.render(ruleset.table(desired), header)


def _unknown_nat(desired: Desired) -> Iterator[str]:
    if not desired.host_known and desired.policy.kernel.nat is None:
        yield 'nat = "auto": where nothing translates addresses it is loaded without the rules about connections (ct).'


def routing_text(desired: Desired) -> str:
    """Routes before rules: a rule whose table has no last route yet would let packets fall through to main."""
    lines = [f"# {line}".rstrip() for line in _header(desired)]
    lines += [
        "# Run the lines as they stand, once, before the ruleset is loaded. All of it has protocol 73, which is ours.",
    ]
    told: set[int] = set()
    for standing in desired.standings:
        lines += ["", *_identity_lines(desired, standing, first=standing.identity.table not in told)]
        told.add(standing.identity.table)
    guards = sorted((rule for rule in desired.rules if rule.action != LOOKUP), key=rule_order)
    if guards:
        lines += ["", "# Members whose packets nobody has marked are closed; what this host sends itself goes around."]
        lines += map(_rule_line, guards)
    if desired.src_valid_mark:
        lines += [
            "",
            "# Strict rp_filter is to judge a packet by the table of its mark (never set conf/all: it would judge",
        ]
        lines += ["# every other mark user's packets too)."]
        lines += [str(SetSrcValidMark(link, True)) for link in sorted(desired.src_valid_mark)]
    return "\n".join([*lines, ""])


def _header(desired: Desired) -> tuple[str, ...]:
    policy = desired.policy
    return (f"idmark, gateway {policy.gateway}", f"policy sha256:{policy.digest}")


def _identity_lines(desired: Desired, standing: Standing, *, first: bool) -> Iterator[str]:
    """An identity; the way out that it may share is told with the first one."""
    identity = standing.identity
    where = f"link {identity.link}, table {identity.table}, fwmark {identity.fwmark}"
    yield f"# Identity {identity.id}, {identity.name}: {where}"
    yield from (f"# {line}" for line in _unknown(desired, standing))
    yield from (f"# {way.family}: closed, {way.closed}" for way in standing.ways if way.closed)
    if not first:
        return
    routes = sorted((r for r in desired.routes if r.table == identity.table), key=addition_order)
    yield from (f"{route.family.ip} route replace {route}" for route in routes)
    rules = sorted((r for r in desired.rules if r.table == identity.table), key=rule_order)
    yield from (_rule_line(rule) for rule in rules)


def _rule_line(rule: Rule) -> str:
    return f"{rule.family.ip} rule add {rule}"


def _unknown(desired: Desired, standing: Standing) -> Iterator[str]:
    """What only the host knows."""
    identity = standing.identity
    if not desired.host_known:
        if identity.addresses is None:
            rule = f"from ADDRESS lookup {identity.table}"
            yield f'addresses = "auto": a rule "{rule}" for each global address of {identity.link}'
        for way in standing.ways:
            if way.unknown:
                yield f'next_hop = "auto": {way.unknown}'
        downstream = desired.policy.downstream
        behind = ", ".join(downstream) if downstream is not None else "every link that is no identity's"
        routes = f", the routes of {behind}" if behind else ""
        yield f"from the host as well: the connected networks of {identity.link}{routes}"
    others, main = detours(desired.policy, identity)
    roads = [f"the road of {other.name}" for other in others] + ["main"] * main
    yield "while its link is down: " + (", then ".join(roads) if roads else "unreachable")
