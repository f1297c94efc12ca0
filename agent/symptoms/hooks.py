"""Other programs in netfilter's hooks: marks, order, checks of the way back, what goes past the hooks."""

from __future__ import annotations

from collections.abc import Iterator

from agent import neighbours, ruleset
from agent.addresses import Family
from agent.desired import Desired
from agent.host import EVERY_BIT, Host, MarkWrite, NftChain, reachable
from agent.model import Hook, Kernel
from agent.neighbours import NEIGHBOURS, owner_of_chain
from agent.symptoms import Symptom, some

#: The hooks in which a mark still decides on a packet's road, if it is written before its last lookup.
DECIDING = ("prerouting", "output")
#: The families of packets that come to chains of which.
FAMILIES = {"ip": (Family.IPV4,), "ip6": (Family.IPV6,), "inet": tuple(Family)}
#: Where destinations are translated, and those of replies to translated sources.
DSTNAT = -100
#: The last priority that the door lets our chains have.
LAST_PRIORITY = DSTNAT - 1


def mark_writers(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Rules that take our marks away, or that set our bits.

    Before ours a whole mark may be restored from the connection's: ours is decided afresh, and only our bits of it.
    """
    kernel = desired.policy.kernel
    for base, hook in _foreign(host, kernel):
        late = hook.hook in DECIDING and hook.priority >= kernel.hook_priority
        if hook.hook == "input" or (hook.hook == "postrouting" and hook.priority > ruleset.POSTROUTING_PRIORITY):
            continue
        writes = [
            (chain, write)
            for chain in reachable(base, host.chains)
            for write in chain.writes
            if (write.bits if late else _chosen(write)) & kernel.mark_mask
        ]
        if not writes:
            continue
        who = _whose(writes[0][0])
        bits = 0
        for _, write in writes:
            bits |= write.bits if late else _chosen(write)
        shared = f"{bits & kernel.mark_mask:#010x} of {kernel.mark_mask:#010x}"
        seen = some((f"{chain}, handle {write.handle}, writes {write.bits:#010x}" for chain, write in writes), "; ")
        called = f"nft rules called at priority {hook.priority}: {seen} (nft -a list chain {writes[0][0]})"
        if late:
            # Who writes the whole mark wipes ours, whichever bits they are.
            elsewhere = "" if bits == EVERY_BIT else f"; or {_other_bits(desired, host)}"
            what = f"{who} changes packet marks after idmark has written them: {shared} in hook {hook.hook}"
            yield Symptom(what, called, f"{_behind(hook, host, kernel)}{elsewhere}")
        else:
            what = f"{who} sets bits of packet marks that are idmark's: {shared} in hook {hook.hook}"
            yield Symptom(what, called, _other_bits(desired, host))


def neighbours_bits(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Programs that are here and whose bits overlap ours, whatever they have written up to now."""
    mask = desired.policy.kernel.mark_mask
    for neighbour in NEIGHBOURS:
        seen = next(neighbours.traces(neighbour, host), None) if neighbour.bits & mask else None
        if seen:
            advice = f"; or {neighbour.advice}" if neighbour.advice else ""
            yield Symptom(
                f"{neighbour.name} is on this host and uses bits {neighbour.bits:#010x} of packet marks; idmark's are "
                f"{mask:#010x}",
                seen,
                f"{_other_bits(desired, host)}{advice}",
            )


def legacy_marks(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Rules that nf_tables doesn't know of, and so nobody here."""
    del desired
    for table in host.legacy:
        family, _, name = table.partition(" ")
        if name == "mangle":
            program = "iptables-legacy-save" if family == "ip" else "ip6tables-legacy-save"
            yield Symptom(
                f"{program.removesuffix('-save')} has a mangle table, whose rules are not seen here",
                f"/proc/net/{family}_tables_names: mangle",
                f"look for MARK and CONNMARK in what `{program} -t mangle` prints, and move to iptables-nft",
            )


def hook_ties(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Chains at exactly the priority of ours: which one comes first is by who was loaded first."""
    kernel = desired.policy.kernel
    ours = {(chain.hook.hook, chain.hook.priority): chain for chain in ruleset.table(desired).chains if chain.hook}
    for base, hook in _foreign(host, kernel):
        mine = ours.get((hook.hook, hook.priority))
        if mine:
            free = _free_priority(hook.priority, host, kernel)
            own = "in the policy, [kernel]: hook_priority = {}"
            yield Symptom(
                f"{_whose(base)} and idmark have the same place in hook {hook.hook}, priority {hook.priority}: whoever "
                "was loaded first comes first",
                f"nft chains {base} and inet {kernel.nft_table} {mine.name}",
                own.format(free)
                if hook.hook in DECIDING and free is not None
                else f"give chain {base} another priority than {hook.priority}",
            )


def reverse_checks(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Checks of the way back that know nothing of our marks: they drop what arrives for members by their link.

    They look the way back up from the packet's destination (net/ipv4/netfilter/nft_fib_ipv4.c), and an own address has
    its rule: only what is for a host behind is judged by main. Before dstnat that is not yet what is masqueraded.
    """
    kernel = desired.policy.kernel
    for base, hook in _foreign(host, kernel):
        if hook.hook != "prerouting":
            continue
        losing = [
            standing.identity.name
            for standing in desired.standings
            if (hook.priority > DSTNAT or not standing.identity.masquerade)
            and any(family in FAMILIES[base.family] for family in standing.identity.members.families)
        ]
        for chain in reachable(base, host.chains) if losing else ():
            for check in chain.reverse_checks:
                before = hook.priority <= kernel.hook_priority
                if not before and check.by_mark:
                    continue
                owner = owner_of_chain(chain)
                yield Symptom(
                    f"{_whose(chain)} drops what arrives for members of {some(losing)}: the way back is looked up "
                    f"{'before idmark has marked the packet' if before else 'without the mark'}",
                    f"nft chain {chain}, handle {check.handle}, called in hook prerouting at priority {hook.priority}",
                    "in /etc/firewalld/firewalld.conf: IPv6_rpfilter=no; then firewall-cmd --reload"
                    if owner and owner.name == "firewalld"
                    else f"nft delete rule {chain} handle {check.handle}; or write it as `fib saddr . mark . iif oif "
                    f"missing drop`, in a chain behind priority {kernel.hook_priority}",
                )


def flowtables(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Connections that go past our hooks: not counted, not stopped, and on the old road after a change."""
    own = {standing.identity.link for standing in desired.standings}
    for flowtable in host.flowtables:
        links = [link for link in flowtable.links if link in own]
        if links:
            owner = owner_of_chain(NftChain(flowtable.family, flowtable.table, ""))
            yield Symptom(
                f"a flowtable takes connections by {some(links)} past idmark's hooks: they are neither counted nor "
                "stopped, and stay on their road when it changes",
                f"nft flowtable {flowtable}, devices {', '.join(flowtable.links)}",
                "in /etc/firewalld/firewalld.conf: NftablesFlowtable=off; then firewall-cmd --reload"
                if owner and owner.name == "firewalld"
                else f"take {some(links)} out of its devices, or `flow add` only what belongs to no identity",
            )


# --- what they share -------------------------------------------------------------------------------------------------


def _foreign(host: Host, kernel: Kernel) -> Iterator[tuple[NftChain, Hook]]:
    """Base chains that are not ours, with their hooks."""
    for chain in host.chains:
        if chain.hook and chain.place != ("inet", kernel.nft_table):
            yield chain, chain.hook


def _whose(chain: NftChain) -> str:
    owner = owner_of_chain(chain)
    return owner.name if owner else f"table {chain.family} {chain.table}"


def _chosen(write: MarkWrite) -> int:
    """The bits that a rule sets by its own choice; a whole mark from elsewhere, a connection's, is none."""
    return 0 if write.bits == write.ones == EVERY_BIT else write.ones


def _behind(hook: Hook, host: Host, kernel: Kernel) -> str:
    """How to come after somebody who writes marks."""
    free = _free_priority(hook.priority, host, kernel)
    keep = ~kernel.mark_mask & EVERY_BIT
    narrow = f"have it write its own bits only: meta mark set meta mark & {keep:#010x} | …"
    return narrow if free is None else f"in the policy, [kernel]: hook_priority = {free}; or {narrow}"


def _free_priority(behind: int, host: Host, kernel: Kernel) -> int | None:
    """The next priority after one that nobody has in a hook where we decide; None: there is none before dstnat."""
    taken = {hook.priority for _, hook in _foreign(host, kernel) if hook.hook in DECIDING}
    return next((each for each in range(behind + 1, LAST_PRIORITY + 1) if each not in taken), None)


def _other_bits(desired: Desired, host: Host) -> str:
    """Bits of the mark that nobody here is known to use, as many as ours are."""
    mask = desired.policy.kernel.mark_mask
    used = 0
    for neighbour in NEIGHBOURS:
        if neighbour.bits and any(True for _ in neighbours.traces(neighbour, host)):
            used |= neighbour.bits
    for chain, _ in _foreign(host, desired.policy.kernel):
        for each in reachable(chain, host.chains):
            for write in each.writes:
                used |= write.bits if write.bits != EVERY_BIT else _chosen(write)
    for width in range(mask.bit_count(), _least(desired) - 1, -1):
        run = (1 << width) - 1
        free = next((run << place for place in range(32 - width, -1, -1) if not run << place & used), None)
        if free:
            return f"in the policy, [kernel]: mark_mask = {free:#010x}, which nobody here is known to use"
    return "no bits are free: one of the two must give up some of its own"


def _least(desired: Desired) -> int:
    """How many bits the largest id wants."""
    return max((standing.identity.id for standing in desired.standings), default=1).bit_length()
