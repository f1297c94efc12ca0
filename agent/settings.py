"""What an identity, and the gateway itself, does otherwise than before: keys, values, and the effect on packets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agent.desired import Desired, detours
from agent.model import UNREACHABLE, Identity, Policy


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting that is another: its key, both values in words ("" where there is none), what it does to packets.

    `risky`: something that was closed or hidden is not any longer, or might not be.
    """

    key: str
    before: str
    after: str
    effect: str
    risky: bool = False


#: What a setting does, in words, and whether that is risky.
Effect = tuple[str, bool]


#: What an identity does not do unless its policy says so; nothing needs to be said of it then.
PLAIN = {"addresses": "none", "masquerade": "no", "clamp_mss": "no", "probe": "none", "flush_flows": "no"}


class Sides(NamedTuple):
    """An identity and the policy around it, before and after; it wasn't there before if `before` is None."""

    old: Policy
    before: Identity | None
    new: Policy
    after: Identity


def identity_settings(sides: Sides, renamed: Mapping[str, str]) -> Iterator[Setting]:
    """What is different about an identity; of a new one, what it does. `renamed`: new names by old ones."""
    known = _words(sides.old, sides.before, renamed) if sides.before else {"name": sides.after.name, **PLAIN}
    for key, value in _words(sides.new, sides.after, {}).items():
        if value != known.get(key):
            effect, risky = EFFECTS[key](sides)
            yield Setting(key, known.get(key, "") if sides.before else "", value, effect, risky)


def _words(policy: Policy, identity: Identity, renamed: Mapping[str, str]) -> dict[str, str]:
    """An identity's settings by key, in the words of who operates it."""
    own = identity.addresses
    return {
        "name": identity.name,
        "id": str(identity.id),
        "link": identity.link,
        "addresses": "auto" if own is None else ", ".join(map(str, own)) or "none",
        "next_hop": identity.next_hop if isinstance(identity.next_hop, str) else ", ".join(map(str, identity.next_hop)),
        "when_down": _road(policy, identity, renamed),
        "masquerade": "yes" if identity.masquerade else "no",
        "clamp_mss": "yes" if identity.clamp_mss else "no",
        "probe": _probe(identity),
        "flush_flows": "yes" if identity.flush_flows else "no",
        "fwmark": str(identity.fwmark),
        "table": str(identity.table),
        "rule priority": str(identity.priority),
    }


def _road(policy: Policy, identity: Identity, renamed: Mapping[str, str]) -> str:
    """What is followed while the link is down, to its end: another identity's `when_down` counts too."""
    others, main_last = detours(policy, identity)
    roads = [f"the road of {renamed.get(other.name, other.name)}" for other in others] + ["table main"] * main_last
    return ", then ".join(roads) or "closed"


def _probe(identity: Identity) -> str:
    probe = identity.probe
    return f"{probe} every {probe.every:g} s, down after {probe.fail_after}" if probe else "none"


def _name(sides: Sides) -> Effect:
    return "is the same under another name; its counters begin at zero", False


def _link(sides: Sides) -> Effect:
    words = f"its packets leave by {sides.after.link}"
    return f"{words}, not {sides.before.link}" if sides.before else words, False


def _addresses(sides: Sides) -> Effect:
    before, after = sides.before, sides.after
    if after.addresses is None:
        return f"this host speaks as it from whatever global addresses {after.link} has", False
    known = before.addresses or () if before else ()
    more = [str(each) for each in after.addresses if each not in known]
    less = [str(each) for each in known if each not in after.addresses]
    words = [f"this host speaks as it from {', '.join(more)}"] if more else []
    words += [f"no longer from {', '.join(less)}"] if less else []
    if before and before.addresses is None:
        words.append(f"no longer from whatever {before.link} has")
    return "; ".join(words), False


def _next_hop(sides: Sides) -> Effect:
    match sides.after.next_hop:
        case "none":
            return f"its default leads straight into {sides.after.link} (point to point)", False
        case "auto":
            return f"its default is main's on {sides.after.link}", False
        case hops:
            return f"its default leads by {' and '.join(map(str, hops))}", False


def _when_down(sides: Sides) -> Effect:
    others, main_last = detours(sides.new, sides.after)
    known, was_main = detours(sides.old, sides.before) if sides.before else ((), False)
    links = [other.link for other in others] + ["whatever table main says"] * main_last
    away = f"while {sides.after.link} is down its packets"
    opens = (main_last and not was_main) or bool({each.link for each in others} - {each.link for each in known})
    return f"{away} leave by {', then '.join(links)}" if links else f"{away} are refused", opens


def _masquerade(sides: Sides) -> Effect:
    link = sides.after.link
    if sides.after.masquerade:
        return f"members leave by {link} under its own address", False
    return f"members are not translated any more: {link} shows their own addresses", True


def _clamp_mss(sides: Sides) -> Effect:
    on = "" if sides.after.clamp_mss else "no longer "
    return f"the MSS of TCP is {on}clamped to the path MTU of {sides.after.link}", False


def _probed(sides: Sides) -> Effect:
    if probe := sides.after.probe:
        return f"it counts as down, too, while {probe.target} does not answer by {sides.after.link}", False
    return "it counts as down only while its link is: a dead far end goes unnoticed", False


def _flush_flows(sides: Sides) -> Effect:
    return f"its connections {'begin anew' if sides.after.flush_flows else 'go on'} when its road changes", False


def _number(sides: Sides) -> Effect:
    return (
        "is renumbered: whatever else on this host speaks of the old number has to follow" if sides.before else "",
        False,
    )


#: What another value of each key does.
EFFECTS: dict[str, Callable[[Sides], Effect]] = {
    "name": _name,
    "id": _number,
    "link": _link,
    "addresses": _addresses,
    "next_hop": _next_hop,
    "when_down": _when_down,
    "masquerade": _masquerade,
    "clamp_mss": _clamp_mss,
    "probe": _probed,
    "flush_flows": _flush_flows,
    "fwmark": _number,
    "table": _number,
    "rule priority": _number,
}


# --- the gateway -----------------------------------------------------------------------------------------------------


def gateway_settings(before: Desired, after: Desired) -> Iterator[Setting]:
    old, new = before.policy, after.policy
    if old.gateway != new.gateway:
        yield Setting("gateway", old.gateway, new.gateway, "the gateway has another name, in reviews and metrics")
    if old.downstream != new.downstream:
        was, becomes = (_downstream(policy) for policy in (old, new))
        effect = "the routes of these links are good for every identity, and leaving by them is not misrouted"
        yield Setting("downstream", was, becomes, effect)
    yield from _kernel(old, new)
    yield from _guards(before, after)


def _downstream(policy: Policy) -> str:
    return "auto" if policy.downstream is None else ", ".join(policy.downstream) or "none"


def _kernel(old: Policy, new: Policy) -> Iterator[Setting]:
    was, becomes = old.kernel, new.kernel
    if was.enforce != becomes.enforce:
        effect = (
            "a packet about to leave by a link that is not its identity's is dropped"
            if becomes.enforce
            else "a packet about to leave by a link that is not its identity's is only counted, and leaves; "
            "members follow table main while the ruleset is not there"
        )
        shown = [str(each.enforce).lower() for each in (was, becomes)]
        yield Setting("kernel.enforce", shown[0], shown[1], effect, was.enforce)
    if was.nat != becomes.nat:
        effect = (
            "replies of translated connections are decided by their source, and nothing of ours tracks connections"
            if becomes.nat is False
            else "replies of translated connections are decided by what the connection was made to"
        )
        shown = ["auto" if each.nat is None else str(each.nat).lower() for each in (was, becomes)]
        yield Setting("kernel.nat", shown[0], shown[1], effect, becomes.nat is False)
    if was.drop_own_sources != becomes.drop_own_sources:
        effect = (
            "what arrives over IPv4 in this host's own name is dropped here, so a link may have accept_local"
            if becomes.drop_own_sources
            else "a link with accept_local lets in what claims to be this host; look that none has it"
        )
        shown = [str(each.drop_own_sources).lower() for each in (was, becomes)]
        yield Setting("kernel.drop_own_sources", shown[0], shown[1], effect, was.drop_own_sources)
    renumbered = {
        "way_bits": "ways out have other numbers in the packet mark, or none: marks and tables are others",
        "mark_mask": "other bits of the packet mark are ours: does a neighbour write them?",
        "table_base": "every routing table has another number",
        "rule_priority": "every rule has another priority: which neighbours' rules come before ours now?",
        "nft_table": "the nft table has another name; all counters begin at zero",
        "hook_priority": "the chains are called at another place among the neighbours'",
    }
    for key, effect in renumbered.items():
        values = [getattr(each, key) for each in (was, becomes)]
        if values[0] != values[1]:
            shown = [f"{value:#x}" if key == "mark_mask" else str(value) for value in values]
            yield Setting(f"kernel.{key}", shown[0], shown[1], effect)


def _guards(before: Desired, after: Desired) -> Iterator[Setting]:
    """Members whose packets nobody has marked are closed by rules, up to so many prefixes (`desired.GUARDED`)."""
    if not before.policy.kernel.enforce or not after.policy.kernel.enforce:  # which is told for itself
        return
    families = [{rule.family for rule in each.rules if rule.action == UNREACHABLE} for each in (before, after)]
    members = [{family for i in each.policy.identities for family in i.members.families} for each in (before, after)]
    for family in sorted(members[0] & members[1]):
        was, becomes = (family in each for each in families)
        if was != becomes:
            shown = ["yes" if each else "no" for each in (was, becomes)]
            effect = (
                f"{family} members are refused a route while the ruleset is not there"
                if becomes
                else f"{family} members follow table main while the ruleset is not there: no rule closes them any more"
            )
            yield Setting(f"{family} guard rules", shown[0], shown[1], effect, was)
