"""`Desired` → our nft table: what happens to a packet in which hook."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from agent.addresses import Family
from agent.commands import chain_lines
from agent.desired import Desired, Standing, detours, is_open
from agent.layers import MANY, Layer, why
from agent.model import Chain, Fwmark, Hook, Identity, NftSet, Statement, Table

#: The kinds of packets that are counted, for each identity and family. All are always there, so that no counter is
#: lost, and none starts again from 0, when a setting goes back and forth.
COUNTS = ("transmit", "receive", "diverted", "misrouted-dropped", "misrouted-passed")
#: After every translation of sources (srcnat is 100): what is looked at here is what the wire will see.
POSTROUTING_PRIORITY = 300
#: Just before the priority at which masquerading rules usually stand: of two translations the first one wins.
SRCNAT_PRIORITY = 95
#: So many links, or identities, are compared one by one: a name costs a packet half of what a lookup in a set does.
FEW = 4
#: TCP and IP headers without options (RFC 9293, 3.7.1), in bytes: what an MTU has to carry beside a full segment.
TCP_HEADERS = {Family.IPV4: 40, Family.IPV6: 60}

#: Where the kernel keeps what was loaded, and how it starts.
DIGEST_CHAIN, DIGEST_COMMENT = "digest", "rules sha256:"
#: The table that lets nothing out with certain marks while roads change: one of its own (a policy can't name one so),
#: which stays whatever becomes of the other; just before all else is looked at there. How its rules' comments start.
CLOSED, CLOSED_PRIORITY, CLOSED_COMMENT = "idmark-closed", POSTROUTING_PRIORITY - 1, "closed while roads change: "

IS_DNAT_REPLY = "ct status dnat ct direction reply"
#: What the kernel's own check of sources does where a host has no rules: inet_lookup_ifaddr_rcu() in
#: fib_validate_source() (net/ipv4/fib_frontend.c); that of IPv6 has none. Multicast that a program on this host sends
#: comes back to others on it by the link that it left by (ip_mc_output()): that is no packet "host".
FROM_OUR_OWN = 'meta nfproto ipv4 fib saddr type local iifname != "lo" meta pkttype host drop'
IS_SYN = "tcp flags & (syn|rst) == syn"


def counter_name(identity: str, family: Family, count: str) -> str:
    """The name of a named counter: `id-inside-ipv4-transmit`."""
    return f"id-{identity}-{family}-{count}"


def table(desired: Desired) -> Table:
    """The whole table."""
    sets = tuple(_sets(desired))
    chains = (*_identity_chains(desired), *_path_chains(desired, {nft_set.name for nft_set in sets}))
    return Table(
        name=desired.policy.kernel.nft_table,
        counters=tuple(_counters(desired)),
        sets=sets,
        chains=(_digest_chain(chains), *chains),
    )


# --- sets and maps ---------------------------------------------------------------------------------------------------


def _counters(desired: Desired) -> Iterator[str]:
    for standing, count in product(desired.standings, COUNTS):
        for family in standing.families:
            yield counter_name(standing.identity.name, family, count)


def _sets(desired: Desired) -> Iterator[NftSet]:
    policy, standings = desired.policy, desired.standings
    unknown = tuple(
        f'{s.identity.name}: addresses = "auto", what {s.identity.link} has when this is applied'
        for s in standings
        if s.identity.addresses is None and not s.addresses
    )
    for family in Family:
        for layer in desired.layers(family):
            yield _source_set(layer, unknown)
        yield NftSet(
            f"home-{family}",
            f"{family}_addr . ifname",
            size=_room(sum(len(standing.own(family)) for standing in standings)),
            # While it is closed, a program that is bound to no address may still be led there by main.
            elements=tuple(
                (f"{address} . {_quoted(st.identity.link)}", "")
                for st in standings
                if is_open(st, family)
                for address in st.own(family)
            ),
            about=(f"{_title(family)}: what this host sends from here by there is on its road already.",),
            pending=unknown,
        )
    yield NftSet(
        "links",
        "ifname",
        elements=tuple((_quoted(link), "") for link in sorted({s.identity.link for s in standings})),
        about=("The identities' links.",),
    )
    yield NftSet(
        "marks",
        "mark",
        elements=tuple((_mark(s.identity), "") for s in standings),
        about=("The identities' marks; others in our bits are a neighbour's or nobody's.",),
    )
    yield NftSet(
        "own-link",
        "mark . ifname",
        elements=tuple((_mark_and_link(s.identity, s.identity.link), "") for s in standings),
        about=("Which link is whose.",),
    )
    if policy.downstream is not None:
        yield NftSet(
            "downstream",
            "ifname",
            elements=tuple((_quoted(link), "") for link in policy.downstream),
            about=("The links with the hosts behind this gateway: every identity may leave by them.",),
        )
    for name, about in (
        ("left", "Who leaves by its own link, and is counted."),
        ("arrived", "Who arrives on its own link, and is counted."),
    ):
        yield NftSet(
            name,
            "mark . ifname",
            "verdict",
            elements=tuple(
                (_mark_and_link(s.identity, s.identity.link), f"goto {name}-{s.identity.name}") for s in standings
            ),
            about=(about,),
        )
    yield from _detour_sets(desired)
    misrouted = _misrouted(desired)
    for family in Family:
        yield _counter_map(f"{misrouted}-{family}", family, misrouted, standings)
    clamped = dict.fromkeys(
        _mark_and_link(s.identity, road.link)
        for s in standings
        for road in detours(policy, s.identity)[0]
        if road.clamp_mss
    )
    if clamped:
        yield NftSet(
            "clamp",
            "mark . ifname",
            elements=tuple((key, "") for key in clamped),
            about=("Whose segments are kept small enough for another identity's link.",),
        )


def _source_set(layer: Layer, unknown: tuple[str, ...]) -> NftSet:
    title = _title(layer.family)
    if layer.length is None:
        about = f"{title} sources: the longest prefix decided, what is here is disjoint."
    elif layer.identity:
        about = f"{title} sources of {layer.identity} with {layer.length} bits."
    else:
        about = f"{title} sources with {layer.length} bits."
    return NftSet(
        layer.name,
        f"{layer.family}_addr",
        "" if layer.identity else "verdict",
        interval=layer.length is None,
        # A set may grow to any size, and can't be replaced at once by one with more room; a map is a small one.
        size=0 if layer.length is None or layer.identity else _room(len(layer.elements)),
        elements=layer.elements,
        about=(about,),
        pending=tuple(words for words in unknown if words.startswith(f"{layer.identity}:") or not layer.identity)
        if layer.length in {None, layer.family.bits}
        else (),
    )


def _room(count: int) -> int:
    """The size of a hash for so many. One that grows out of it is another set under the same name, and packets on their
    way through the old rules miss its elements: hence the room, which costs 128 KiB.
    """
    return max(2 * MANY, 1 << (2 * count).bit_length())


def _counter_map(name: str, family: Family, count: str, standings: Iterable[Standing]) -> NftSet:
    return NftSet(
        name,
        "mark",
        "counter",
        elements=tuple(
            (_mark(s.identity), _quoted(counter_name(s.identity.name, family, count)))
            for s in standings
            if family in s.families
        ),
    )


def _detour_sets(desired: Desired) -> Iterator[NftSet]:
    """What `when_down` allows: the roads of other identities, and of main, which may be any."""
    # Two of the roads may share a link.
    detour_links = dict.fromkeys(
        (s, other.link)
        for s in desired.standings
        for other in detours(desired.policy, s.identity)[0]
        if other.link != s.identity.link
    )
    main = [s for s in desired.standings if detours(desired.policy, s.identity)[1]]
    if detour_links:
        for family in Family:
            yield NftSet(
                f"diverted-{family}",
                "mark . ifname",
                "counter",
                elements=tuple(
                    (_mark_and_link(s.identity, link), _quoted(counter_name(s.identity.name, family, "diverted")))
                    for s, link in detour_links
                    if family in s.families
                ),
            )
        yield NftSet(
            "detour",
            "mark . ifname",
            elements=tuple((_mark_and_link(s.identity, link), "") for s, link in detour_links),
            about=("By whose link else an identity may leave, because its when_down says so.",),
        )
    if main:
        for family in Family:
            yield _counter_map(f"diverted-to-main-{family}", family, "diverted", main)
        yield NftSet(
            "follows-main",
            "mark",
            elements=tuple((_mark(s.identity), "") for s in main),
            about=("Who may follow table main, because its when_down says so.",),
        )


# --- chains ----------------------------------------------------------------------------------------------------------


def _identity_chains(desired: Desired) -> Iterator[Chain]:
    keep = ~desired.policy.kernel.mark_mask & 0xFFFFFFFF
    for standing in desired.standings:
        identity = standing.identity
        yield Chain(
            f"id-{identity.name}",
            (Statement(f"meta mark set meta mark & {keep:#010x} | {_mark(identity)}", f"fwmark {identity.fwmark}"),),
            about=(
                f"Identity {identity.id}, {identity.name}: fwmark {identity.fwmark}, table {identity.table}, link "
                f"{identity.link}. Writes our bits of the packet mark, and keeps the neighbours'.",
            ),
        )
    for standing in desired.standings:
        name = standing.identity.name
        clamp = Statement(f"{IS_SYN} tcp option maxseg size set rt mtu", "segments fit the path")
        yield Chain(f"left-{name}", ((clamp,) if standing.identity.clamp_mss else ()) + _counted(standing, "transmit"))
        yield Chain(f"arrived-{name}", _counted(standing, "receive"))


def _counted(standing: Standing, count: str) -> tuple[Statement, ...]:
    name = standing.identity.name
    return tuple(
        Statement(
            f"meta nfproto {family} counter name {_quoted(counter_name(name, family, count))} accept",
            f"{_title(family)} {count}",
        )
        for family in standing.families
    )


def _asked(desired: Desired, field: str) -> Iterator[Statement]:
    """Whose an address is: `saddr`, `daddr`, or `original daddr`, of the connection."""
    connection, _, address = field.rpartition(" ")
    for family in Family:
        words = f"ct {connection} {family.nft} {address}" if connection else f"{family.nft} {address}"
        for layer in desired.layers(family):
            masked = f"{words} & {layer.mask}" if layer.mask else words
            verdict = f"@{layer.name} goto id-{layer.identity}" if layer.identity else f"vmap @{layer.name}"
            length = "" if layer.length is None else f" /{layer.length}"
            yield Statement(f"{masked} {verdict}", f"{_title(family)}{length}")


def _path_chains(desired: Desired, names: set[str]) -> Iterator[Chain]:
    kernel = desired.policy.kernel
    keep = f"{~kernel.mark_mask & 0xFFFFFFFF:#010x}"
    mark = f"meta mark & {kernel.mark_mask:#010x}"
    undecide = f"meta mark set meta mark & {keep}"
    links = [_quoted(link) for link in sorted({s.identity.link for s in desired.standings})]
    yield Chain("destination", tuple(_asked(desired, "daddr")), about=("The identity that a destination belongs to.",))
    reasons = {_title(family): why(desired.layers(family)) for family in Family}
    yield Chain(
        "source",
        tuple(_asked(desired, "saddr")),
        about=(
            "The identity that a source belongs to: the first that knows it is the longest prefix.",
            *(f"{title}: {reason}." for title, reason in reasons.items() if reason),
        ),
    )
    if desired.nat:
        yield Chain(
            "answering",
            (*_asked(desired, "original daddr"), Statement("goto source", "it was nobody's: by the source")),
            about=(
                "A reply of a translated connection is whose that was which the connection was made to: its source is "
                "still that of the host behind.",
            ),
        )
    yield Chain(
        "arriving",
        (
            Statement("jump destination", "whose destination is it"),
            Statement(f"{mark} . iifname vmap @arrived", "it is that identity's link: decided"),
            Statement(undecide, "it is not: undecided again"),
        ),
        about=(
            "A packet that arrives on its identity's own link is that identity's by its destination: so the route back "
            "is looked for in its table, and strict rp_filter is content, also behind a translation.",
        ),
    )
    answering = (Statement(f"{IS_DNAT_REPLY} goto answering", "a reply, by what was asked"),) * desired.nat
    by_source = Statement("goto source", "everything else by its source")
    yield Chain(
        "prerouting",
        (
            *(Statement(FROM_OUR_OWN, "nobody else is this host"),) * kernel.drop_own_sources,
            Statement(f"{mark} != 0x00000000 {undecide}", "no trust in a mark that arrives"),
            *(
                Statement(f"iifname {link} jump arriving", "on an identity's link")
                for link in (links if len(links) <= FEW else ["@links"])
            ),
            *answering,
            # Not by `goto source`: most packets of a gateway come by here.
            *_asked(desired, "saddr"),
        ),
        Hook("filter", "prerouting", kernel.hook_priority),
        about=(
            "Whatever arrives. After conntrack (-200) and mangle (-150), where neighbours restore whole marks from "
            "connections and would wipe our bits; before dstnat (-100), which changes the destination.",
            "A mark can be left over from a tunnel's outer packet, so it is decided afresh: on an identity's link by "
            "the destination; replies of translated connections by what the connection was made to; everything else "
            "by the source.",
        ),
    )
    yield Chain(
        "output",
        (
            *answering,
            *(
                Statement(
                    f"{mark} == 0x00000000 {family.nft} saddr . oifname @home-{family} accept",
                    f"{_title(family)}: on its own road already",
                )
                for family in Family
            ),
            by_source,
        ),
        Hook("route", "output", kernel.hook_priority),
        about=(
            "Whatever this host sends. Of type route: only there does the kernel look for the route again when the "
            "mark has changed, which a packet is spared whose source's rule has led it to its own link already. A "
            "source of no identity keeps the mark that its program asked for (SO_MARK).",
        ),
    )
    yield from _translation_chains(desired, mark)
    if "follows-main" in names:
        yield Chain(
            "diverted-to-main",
            (
                *(
                    _count(family, f"{mark} map @diverted-to-main-{family}", f"count {_title(family)} diverted")
                    for family in Family
                ),
                Statement("accept", "as when_down allows"),
            ),
            about=("Identities that follow table main while their link is down.",),
        )
    yield Chain(
        "leaving",
        tuple(_leaving(desired, mark, names)),
        about=(
            "What is not plainly on its own road. Judged by the source that the wire will see is a packet without an "
            "identity's mark, for somebody may have wiped it, and one of a translated connection: the translation may "
            "be older than the route.",
        ),
    )
    yield Chain(
        "unmarked",
        (
            Statement("jump source", "by the source on the wire"),
            Statement(f"{mark} == 0x00000000 accept", "nobody's"),
            *_by_own_link(desired, mark),
        ),
        about=("Nobody has marked it: what this host sends by its own road, and what is no identity's.",),
    )
    yield Chain(
        "postrouting",
        tuple(_postrouting(desired, mark)),
        Hook("filter", "postrouting", POSTROUTING_PRIORITY),
        about=(
            "What really leaves, by the link it leaves by, after all routing and all translation of sources (srcnat, "
            "100). The plain case comes first: by the link of its own identity.",
        ),
    )


def _postrouting(desired: Desired, mark: str) -> Iterator[Statement]:
    if desired.nat:
        yield Statement("ct status snat,dnat goto leaving", "translated: not what it seems")
    yield from _by_own_link(desired, mark)
    yield Statement(f"{mark} == 0x00000000 jump unmarked", "no mark: by the source on the wire")
    yield Statement("goto leaving", "not plainly on its own road")


def _by_own_link(desired: Desired, mark: str) -> Iterator[Statement]:
    if len(desired.standings) > FEW:
        yield Statement(f"{mark} . oifname vmap @left", "by its own link")
        return
    for identity in (standing.identity for standing in desired.standings):
        yield Statement(
            f"{mark} == {_mark(identity)} oifname {_quoted(identity.link)} goto left-{identity.name}",
            "by its own link",
        )


def _leaving(desired: Desired, mark: str, names: set[str]) -> Iterator[Statement]:
    misrouted = _misrouted(desired)
    yield Statement('oifname "lo" accept', "never leaves this host")
    yield Statement(f"{mark} != @marks jump source", "no identity's mark: by the source on the wire")
    if "clamp" in names:
        yield Statement(
            f"{mark} . oifname @clamp {IS_SYN} tcp option maxseg size set rt mtu", "leaving: segments fit the path"
        )
    yield from _clamp_arriving(desired, mark)
    if "detour" in names:
        for family in Family:
            key = f"{mark} . oifname map @diverted-{family}"
            yield _count(family, key, f"count {_title(family)} diverted")
        yield Statement(f"{mark} . oifname @detour accept", "by a road that when_down names")
    if "follows-main" in names:
        elsewhere = "oifname @links" if desired.policy.downstream is None else "oifname != @downstream"
        yield Statement(
            f"{mark} @follows-main {elsewhere} {mark} . oifname != @own-link goto diverted-to-main",
            "by a road of main's, as when_down allows",
        )
    if desired.nat:
        yield Statement("ct status snat,dnat oifname @links jump source", "translated: by the source on the wire")
    yield Statement(f"{mark} != @marks accept", "no identity's")
    yield Statement(f"{mark} . oifname vmap @left", "by its own link")
    if desired.policy.downstream is None:
        yield Statement("oifname != @links accept", "to the hosts behind this gateway: by no identity's link")
    else:
        yield Statement("oifname @downstream accept", "to the hosts behind this gateway")
    for family in Family:
        yield _count(family, f"{mark} map @{misrouted}-{family}", f"count {_title(family)} {misrouted}")
    if desired.policy.kernel.enforce:
        yield Statement("drop", "misrouted: no identity's packet leaves by a link that is not its own")


def _clamp_arriving(desired: Desired, mark: str) -> Iterator[Statement]:
    """The other half of a forwarded connection: the far side's SYN tells the host behind us how much to send.

    By the link's MTU as it is now: `rt mtu` would look at the route back without our mark.
    """
    for standing in desired.standings:
        identity = standing.identity
        if identity.clamp_mss and standing.mtu:
            for family in standing.families:
                yield Statement(
                    f"iifname {_quoted(identity.link)} {mark} == {_mark(identity)} meta nfproto {family} {IS_SYN} "
                    f"tcp option maxseg size set {standing.mtu - TCP_HEADERS[family]}",
                    f"arriving on {identity.link}: {_title(family)} segments fit the way back",
                )


def _translation_chains(desired: Desired, mark: str) -> Iterator[Chain]:
    rules = []
    by_name = {standing.identity.name: standing for standing in desired.standings}
    for standing in desired.standings:
        if not standing.identity.masquerade:
            continue
        for road in (standing.identity, *detours(desired.policy, standing.identity)[0]):
            for family in standing.families:
                own = by_name[road.name].own(family)
                if own:
                    hosts = _either(dict.fromkeys((*standing.own(family), *own)))
                    rules.append(
                        Statement(
                            f"oifname {_quoted(road.link)} {mark} == {_mark(standing.identity)} {family.nft} saddr != "
                            f"{hosts} snat {family.nft} to {own[0]}",
                            f"members of {standing.identity.name} leave by {road.link} as {own[0]}",
                        )
                    )
    if rules:
        yield Chain(
            "srcnat",
            tuple(rules),
            Hook("nat", "postrouting", SRCNAT_PRIORITY),
            about=(
                "Members take on their identity's own address as they leave by its link; by the road of another "
                "identity that stands in for it, that one's. Before the usual srcnat (100): of two translations of a "
                "connection the first wins.",
            ),
        )


def _count(family: Family, key: str, comment: str) -> Statement:
    return Statement(f"meta nfproto {family} counter name {key}", comment)


def _digest_chain(chains: tuple[Chain, ...]) -> Chain:
    """Hooks and rules by their digest, kept in the kernel beside them: what is listed can't be compared with texts."""
    text = "\n".join("\n".join(chain_lines(chain)) for chain in chains)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Chain(
        DIGEST_CHAIN,
        (Statement("continue", f"{DIGEST_COMMENT}{digest}"),),
        about=("No packet comes here: this is the digest of the rules below, for whoever asks which are loaded.",),
    )


def digest(present: Table) -> str | None:
    """The digest of the rules that were loaded into a table; None for a table that is not ours."""
    comments = [rule.comment for chain in present.chains if chain.name == DIGEST_CHAIN for rule in chain.rules]
    return next((c.removeprefix(DIGEST_COMMENT) for c in comments if c.startswith(DIGEST_COMMENT)), None)


def _misrouted(desired: Desired) -> str:
    return "misrouted-dropped" if desired.policy.kernel.enforce else "misrouted-passed"


# --- on the way from one table to the next ----------------------------------------------------------------------------


def closed(marks: Iterable[Fwmark]) -> str:
    """The table that lets no packet with these marks out; what never leaves this host stays."""
    rules = tuple(
        Statement(f'oifname != "lo" meta mark & {m.mask:#010x} == {m.value:#010x} drop', f"{CLOSED_COMMENT}{m}")
        for m in marks
    )
    chain = Chain("leaving", rules, Hook("filter", "postrouting", CLOSED_PRIORITY))
    return "\n".join([f"table inet {CLOSED} {{", *(f"    {line}" for line in chain_lines(chain)), "}"])


def marks_closed(present: Table) -> frozenset[Fwmark]:
    """The marks that such a table lets out nowhere."""
    comments = [rule.comment for chain in present.chains for rule in chain.rules]
    said = (re.fullmatch(f"{CLOSED_COMMENT}0x([0-9a-f]+)/0x([0-9a-f]+)", comment) for comment in comments)
    pairs = {(int(found[1], 16), int(found[2], 16)) for found in said if found}
    return frozenset(Fwmark(value, mask) for value, mask in pairs if value and not value & ~mask)


@dataclass(frozen=True, slots=True)
class Roads:
    """By which links a mark's packets may leave: the identity's own, and those that its `when_down` names."""

    own: str
    detours: frozenset[str] = frozenset()

    @property
    def links(self) -> frozenset[str]:
        """All of them."""
        return self.detours | {self.own}


def roads(present: Table) -> dict[int, Roads]:
    """By which links a table lets packets of each mark leave."""
    sets = {nft_set.name: nft_set for nft_set in present.sets}
    detours: dict[int, set[str]] = {}
    for mark, link in _links(sets.get("detour")):
        detours.setdefault(mark, set()).add(link)
    return {mark: Roads(link, frozenset(detours.get(mark, ()))) for mark, link in _links(sets.get("own-link"))}


def _links(nft_set: NftSet | None) -> Iterator[tuple[int, str]]:
    for key, _ in nft_set.elements if nft_set else ():
        mark, concatenated, link = key.partition(" . ")
        if concatenated:  # else somebody's element for all others, *
            yield int(mark, 16), link.strip('"')


# --- words -----------------------------------------------------------------------------------------------------------


def _mark(identity: Identity) -> str:
    return f"0x{identity.fwmark.value:08x}"


def _mark_and_link(identity: Identity, link: str) -> str:
    return f"{_mark(identity)} . {_quoted(link)}"


def _quoted(word: str) -> str:
    return f'"{word}"'


def _either(addresses: Iterable[object]) -> str:
    words = [str(address) for address in addresses]
    return words[0] if len(words) == 1 else f"{{ {', '.join(words)} }}"


def _title(family: Family) -> str:
    return "IPv4" if family is Family.IPV4 else "IPv6"
