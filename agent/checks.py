"""The checks of a draft: what its values are to each other, and to the kernel. Each is a generator of faults."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from agent.addresses import Address, Family, Prefix, Prefixes
from agent.draft import ROLES, Draft, Source, first_faults, way_of
from agent.faults import Fault, dotted, meant, plain
from agent.model import MAIN, UNREACHABLE
from agent.toml_lines import Place

T = TypeVar("T")
_Check = Callable[[Draft], Iterator[Fault]]


def _repeated(entries: Iterable[tuple[T, Place]]) -> Iterator[tuple[T, Place, Place]]:
    """The entries whose value has been there before, and the place where it was."""
    first: dict[T, Place] = {}
    for value, where in entries:
        before = first.setdefault(value, where)
        if before is not where:
            yield value, where, before


def _names(draft: Draft) -> Iterator[Fault]:
    if draft.document.identity == {}:
        yield draft.fault(("identity",), "holds no identity")
    for name in draft.names:
        where: Place = ("identity", name)
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
            yield draft.fault(where, f"{plain(name)} is no identity's name: [a-z][a-z0-9_-]{{0,30}} is")
        elif name in {MAIN, UNREACHABLE, "auto", "none"}:
            yield draft.fault(where, f"{name} is no identity's name: the policy has another meaning for it")


def _ids(draft: Draft) -> Iterator[Fault]:
    mask, way_bits = draft.kernel.mark_mask, draft.kernel.way_bits or 0
    ids: list[tuple[int, Place]] = [
        (table.id, ("identity", name, "id")) for name, table in draft.identities if table.id is not None
    ]
    for number, where in ids:
        most = (mask // (mask & -mask)) >> way_bits if mask else number
        if not 1 <= number <= most:
            without = f" without its {way_bits} bits for ways" if way_bits else ""
            fits = f"(1..{most}){_wider(number, way_bits)}"
            yield draft.fault(where, f"{number} does not fit mask {mask:#x}{without} {fits}")
    for number, where, before in _repeated(ids):
        yield draft.fault(where, f"{number} is also the id of {draft.owner(*before)}")


def _wider(number: int, way_bits: int) -> str:
    """The mask that an id fits, at the upper end of the quiet bits (kernel-facts: 24 to 29), if there is one."""
    bits = max(number, 1).bit_length() + way_bits
    return f": kernel.mark_mask = {((1 << bits) - 1) << 30 - bits:#x} would do" if number > 0 and bits <= 30 else ""


def _ways(draft: Draft) -> Iterator[Fault]:
    bits, mask = draft.kernel.way_bits, draft.kernel.mark_mask
    if not bits or not mask:
        return
    if bits >= mask.bit_count():
        rule = f"{bits} of the {mask.bit_count()} bits of {mask:#x}: none is left for ids"
        yield draft.fault(("kernel", "way_bits"), rule)
    shared = Counter(way for _, table in draft.identities if (way := way_of(table)))
    ways = sum(count > 1 for count in shared.values())
    if ways >= 1 << bits:
        yield draft.fault(("kernel", "way_bits"), f"{bits} bits number {(1 << bits) - 1} ways, and {ways} are shared")


def _tables(draft: Draft) -> Iterator[Fault]:
    base = draft.kernel.table_base
    for name, table in draft.identities:
        if table.id is None or base is None:
            continue
        number = base + table.id
        # linux/rtnetlink.h: RT_TABLE_UNSPEC, _DEFAULT, _MAIN, _LOCAL; the attribute has 32 bits.
        if number in {0, 253, 254, 255}:
            rule = "the kernel keeps 0 and 253..255 for itself"
        elif not 0 < number <= 0xFFFFFFFF:
            rule = "the kernel has tables 1..4294967295"
        else:
            continue
        sum_ = f"{table.id} gives table {number} (kernel.table_base {base} + {table.id})"
        yield draft.fault(("identity", name, "id"), f"{sum_}: {rule}")


def _priorities(draft: Draft) -> Iterator[Fault]:
    for where, sum_, priority in _rule_priorities(draft):
        if priority < 1:
            yield draft.fault(where, f"{sum_}: the kernel's rule for table local has 0, ours come after it")
        elif priority >= 32766:
            yield draft.fault(where, f"{sum_}: the kernel's rule for table main has 32766, ours come before it")


def _late_priorities(draft: Draft) -> Iterator[Fault]:
    for where, sum_, priority in _rule_priorities(draft):
        if priority >= 5210:
            yield draft.fault(where, f"{sum_}: where there are Tailscale's rules, 5210..5270, they come first")


def _rule_priorities(draft: Draft) -> Iterator[tuple[Place, str, int]]:
    base = draft.kernel.rule_priority
    for name, table in draft.identities:
        if table.id is not None and base is not None:
            priority = base + table.id
            sum_ = f"{table.id} gives rule priority {priority} (kernel.rule_priority {base} + {table.id})"
            yield ("identity", name, "id"), sum_, priority


def _early_hook(draft: Draft) -> Iterator[Fault]:
    priority = draft.kernel.hook_priority
    if priority is not None and priority <= -150:
        # "meta mark set ct mark" of a mangle chain that runs later (wg-quick, NetworkManager) wipes our bits.
        yield draft.fault(
            ("kernel", "hook_priority"),
            f"{priority} is not after mangle (-150): a table there that restores marks takes ours away",
        )


def _empty_lists(draft: Draft) -> Iterator[Fault]:
    """An export that was cut short would open everybody who was on it."""
    for source in draft.sources:
        if source.file != draft.file and not source.count:
            yield Fault(source.file, None, source.path, "holds no prefix")


def _shared_links(draft: Draft) -> Iterator[Fault]:
    """What tells two identities on one link apart is the next hop; and the link's own addresses are one's."""
    hops: dict[tuple[str, Family, str], str] = {}
    owners: dict[str, str] = {}
    for name, table, families in draft.known:
        if table.link is None or table.next_hop is None or None in [*table.next_hop]:
            continue
        for family in families:
            if draft.kernel.way_bits and way_of(table):
                break  # it shares the way out with others
            hop = _hop_text(table.next_hop, family)
            other = hops.setdefault((table.link, family, hop), name)
            if other != name:
                place = draft.owner("identity", other, "link")
                rule = f"their next hops must differ, and both are {hop} for {family}"
                yield draft.fault(("identity", name, "link"), f"{table.link} is also the link of {place}: {rule}")
                break
        if table.addresses == "auto" and (other := owners.setdefault(table.link, name)) != name:
            place = draft.owner("identity", other, "addresses")
            rule = f"the addresses of {table.link} can be one identity's"
            yield draft.fault(("identity", name, "addresses"), f'"auto" also stands in {place}: {rule}')


def _hop_text(next_hop: str | list[Address | None], family: Family) -> str:
    """The next hop of one family, as a message says it."""
    if isinstance(next_hop, str):
        return f'"{next_hop}"'
    return next((str(hop) for hop in next_hop if hop and Family.of(hop) is family), "absent")


def _sources(draft: Draft) -> Iterator[Fault]:
    """A prefix stands once, whosever it is. A member that is also an own address is the one at fault of the two."""
    for source in draft.sources:
        yield from source.faults
    # Without a look at their lines.
    if sum(source.count for source in draft.sources) == len(Prefixes.joined(each.prefixes for each in draft.sources)):
        return
    holders: dict[Prefix, tuple[Source, int]] = {}
    for source in sorted(draft.sources, key=lambda source: source.key):  # "addresses" before "members"
        again = ((line, (source, prefix, *holder)) for line, prefix, holder in _held(source, holders))
        yield from first_faults(source, again, _also)


def _held(
    source: Source, holders: dict[Prefix, tuple[Source, int]]
) -> Iterator[tuple[int, Prefix, tuple[Source, int]]]:
    """The prefixes of a source that are there already, and where. Makes the source the holder of the others."""
    for line, prefix in source.located():
        count = len(holders)
        holder = holders.setdefault(prefix, (source, line))
        if len(holders) == count:
            yield line, prefix, holder


def _also(found: tuple[Source, Prefix, Source, int]) -> str:
    source, prefix, holder, line = found
    place = f"line {line}" if holder.file == source.file else f"{holder.file}:{line}"
    return f"{prefix} is also {ROLES[holder.key]} of {dotted(('identity', holder.identity))} ({place})"


def _next_hops(draft: Draft) -> Iterator[Fault]:
    for name, table in draft.identities:
        if not isinstance(table.next_hop, list):
            continue
        where: Place = ("identity", name, "next_hop")
        if not table.next_hop:
            yield draft.fault(where, '[] holds no next hop: write "none" for a point-to-point link')
        hops: dict[Family, Address] = {}
        for index, hop in enumerate(table.next_hop):
            if hop is None:
                continue
            family = Family.of(hop)
            if hops.setdefault(family, hop) is not hop:
                yield draft.fault((*where, index), f"{hop} is a second {family} next hop, beside {hops[family]}")
            if isinstance(table.addresses, list) and hop in table.addresses:
                yield draft.fault((*where, index), f"{hop} is the identity's own address")


def _next_hop_families(draft: Draft) -> Iterator[Fault]:
    for name, table, families in draft.known:
        for index, hop in enumerate(table.next_hop if isinstance(table.next_hop, list) else ()):
            if hop and families and Family.of(hop) not in families:
                rule = f"the identity has no {Family.of(hop)} address or member"
                yield draft.fault(("identity", name, "next_hop", index), f"{hop} leads nowhere: {rule}")


def _empty_identities(draft: Draft) -> Iterator[Fault]:
    for name, _, families in draft.known:
        if not families:
            yield draft.fault(("identity", name), "has neither an address nor a member")


def _masquerades(draft: Draft) -> Iterator[Fault]:
    for name, table, _ in draft.known:
        for family in sorted(draft.families[name, "members"] - draft.families[name, "addresses"]):
            if table.masquerade:
                rule = f"the identity has {family} members, and no {family} address to translate them to"
                yield draft.fault(("identity", name, "masquerade"), f"true cannot work: {rule}")
        if table.masquerade and draft.kernel.nat is False:
            rule = "kernel.nat = false says that nothing on this host translates addresses"
            yield draft.fault(("identity", name, "masquerade"), f"true cannot work: {rule}")


def _when_down(draft: Draft) -> Iterator[Fault]:
    roads = {name: table.when_down for name, table in draft.identities if table.when_down is not None}
    words = {UNREACHABLE, MAIN, *draft.names}
    told: set[str] = set()
    for start, road in roads.items():
        where: Place = ("identity", start, "when_down")
        if road not in words:
            rule = f'is neither "{UNREACHABLE}", "{MAIN}" nor an identity{meant(road, sorted(words))}'
            yield draft.fault(where, f"{plain(road)} {rule}")
        name, walk = start, list[str]()
        while name in roads and name not in told:
            told.add(name)
            walk.append(name)
            name = roads[name]
        if name in walk:
            cycle = " -> ".join([*walk[walk.index(name) :], name])
            yield draft.fault(("identity", name, "when_down"), f"{roads[name]} closes a cycle: {cycle}")


def _probes(draft: Draft) -> Iterator[Fault]:
    own = [source for source in draft.sources if source.key == "addresses"]
    for name, table in draft.identities:
        target = table.probe.target if table.probe else None
        if target is None:
            continue
        where: Place = ("identity", name, "probe", "target")
        families = draft.families[name, "addresses"]
        host = Prefix.host(target)
        if owner := next((source for source in own if host in source.prefixes), None):
            line = next(line for line, prefix in owner.located() if prefix == host)
            place = f"{dotted(('identity', owner.identity))} (line {line})"
            yield draft.fault(where, f"{target} is an address of {place}: this gateway itself would answer")
        elif table.addresses is not None and None not in [*table.addresses] and Family.of(target) not in families:
            rule = f"the identity has no {Family.of(target)} address to ask from"
            yield draft.fault(where, f"{target} cannot be probed: {rule}")


def _downstream(draft: Draft) -> Iterator[Fault]:
    if not isinstance(draft.document.downstream, list):
        return
    links: list[tuple[str, Place]] = [
        (link, ("downstream", i)) for i, link in enumerate(draft.document.downstream) if link is not None
    ]
    for link, where, before in _repeated(links):
        yield draft.fault(where, f"{link} stands there twice (line {draft.lines.of(before)})")
    for link, where in links:
        for name, table in draft.identities:
            if table.link == link:
                yield draft.fault(where, f"{link} is the link of {draft.owner('identity', name, 'link')}")
                break


CHECKS: tuple[_Check, ...] = (
    _names,
    _ids,
    _tables,
    _priorities,
    _shared_links,
    _sources,
    _empty_identities,
    _next_hops,
    _next_hop_families,
    _masquerades,
    _ways,
    _when_down,
    _probes,
    _downstream,
)

#: What an operator should hear of, and what refuses nothing.
WARNINGS: tuple[_Check, ...] = (_late_priorities, _early_hook, _empty_lists)
