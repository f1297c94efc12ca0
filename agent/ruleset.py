"""`Desired` → our nft table: what happens to a packet in which hook."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from agent.commands import chain_lines
from agent.desired import Desired, detours
from agent.model import Chain, Family, Fwmark, Hook, Identity, NftSet, Statement, Table
from agent.prefixes import Span

#: The kinds of packets that are counted, for each identity and family. All are always there, so that no counter is
#: lost, and none starts again from 0, when a setting goes back and forth.
COUNTS = ("transmit", "receive", "diverted", "misrouted-dropped", "misrouted-passed")
#: After every translation of sources (srcnat is 100): what is looked at here is what the wire will see.
POSTROUTING_PRIORITY = 300
#: Just before the priority at which masquerading rules usually stand: of two translations the first one wins.
SRCNAT_PRIORITY = 95
#: TCP and IP headers without options (RFC 9293, 3.7.1), in bytes: what an MTU has to carry beside a full segment.
TCP_HEADERS = {Family.IPV4: 40, Family.IPV6: 60}

#: Where the kernel keeps what was loaded, and how it starts.
DIGEST_CHAIN, DIGEST_COMMENT = "digest", "rules sha256:"
#: How the comment starts of a rule that closes an identity while roads change.
CLOSING_COMMENT = "closed while roads change: "

IS_DNAT_REPLY = "ct status dnat ct direction reply"
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
        yield NftSet(
            f"sources-{family}",
            f"{family}_addr",
            "verdict",
            interval=True,
            elements=_elements(_Spans(desired.classes), family),
            about=(f"{_title(family)} sources: the longest prefix decided, what is here is disjoint.",),
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
    yield from _counter_maps(desired, "transmit", by_link=True)
    yield from _counter_maps(desired, "receive", by_link=True)
    yield from _detour_sets(desired)
    yield from _counter_maps(desired, _misrouted(desired), by_link=False)
    if any(s.identity.clamp_mss for s in standings):
        yield NftSet(
            "clamp",
            "mark . ifname",
            elements=tuple(
                dict.fromkeys(
                    (_mark_and_link(s.identity, road.link), "")
                    for s in standings
                    for road in (s.identity, *detours(policy, s.identity)[0])
                    if road.clamp_mss
                )
            ),
            about=("Whose segments are kept small enough for which link.",),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Classes as a key to what was made of them: the same only if they are the very same value."""

    spans: tuple[Span, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Spans) and self.spans is other.spans

    def __hash__(self) -> int:
        return id(self.spans)


@lru_cache(maxsize=4)
def _elements(classes: _Spans, family: Family) -> tuple[tuple[str, str], ...]:
    """A hundred thousand of them take their time: a pass has those at hand that were made for the one before."""
    return tuple((str(span), f"goto id-{span.identity}") for span in classes.spans if span.family is family)


def _counter_maps(desired: Desired, count: str, *, by_link: bool) -> Iterator[NftSet]:
    for family in Family:
        yield NftSet(
            f"{count}-{family}",
            "mark . ifname" if by_link else "mark",
            "counter",
            elements=tuple(
                (
                    _mark_and_link(s.identity, s.identity.link) if by_link else _mark(s.identity),
                    _quoted(counter_name(s.identity.name, family, count)),
                )
                for s in desired.standings
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
            yield NftSet(
                f"diverted-to-main-{family}",
                "mark",
                "counter",
                elements=tuple(
                    (_mark(s.identity), _quoted(counter_name(s.identity.name, family, "diverted")))
                    for s in main
                    if family in s.families
                ),
            )
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


def _path_chains(desired: Desired, names: set[str]) -> Iterator[Chain]:
    kernel = desired.policy.kernel
    keep = f"{~kernel.mark_mask & 0xFFFFFFFF:#010x}"
    mark = f"meta mark & {kernel.mark_mask:#010x}"
    by_source = (
        Statement("ip saddr vmap @sources-ipv4", "IPv4 source"),
        Statement("ip6 saddr vmap @sources-ipv6", "IPv6 source"),
    )
    by_original_destination = (
        Statement(f"{IS_DNAT_REPLY} ct original ip daddr vmap @sources-ipv4", "IPv4 reply, by what was asked"),
        Statement(f"{IS_DNAT_REPLY} ct original ip6 daddr vmap @sources-ipv6", "IPv6 reply, by what was asked"),
    )
    yield Chain(
        "destination",
        (
            Statement("ip daddr vmap @sources-ipv4", "IPv4 destination"),
            Statement("ip6 daddr vmap @sources-ipv6", "IPv6 destination"),
        ),
        about=("The identity that a destination belongs to.",),
    )
    yield Chain("source", by_source, about=("The identity that a source belongs to.",))
    yield Chain(
        "arriving",
        (
            Statement("jump destination", "whose destination is it"),
            *_counting(mark, "iifname", "receive"),
            Statement(f"{mark} . iifname @own-link accept", "it is that identity's link: decided"),
            Statement(f"meta mark set meta mark & {keep}", "it is not: undecided again"),
        ),
        about=(
            "A packet that arrives on its identity's own link is that identity's by its destination: so the route back "
            "is looked for in its table, and strict rp_filter is content, also behind a translation.",
        ),
    )
    yield Chain(
        "prerouting",
        (
            Statement(f"meta mark set meta mark & {keep}", "no trust in a mark that arrives"),
            Statement("iifname @links jump arriving", "on an identity's link"),
            *by_original_destination,
            *by_source,
        ),
        Hook("filter", "prerouting", kernel.hook_priority),
        about=(
            "Whatever arrives. After conntrack (-200) and mangle (-150), where neighbours restore whole marks from "
            "connections and would wipe our bits; before dstnat (-100), which changes the destination.",
            "A mark can be left over from a tunnel's outer packet, so it is decided afresh: on an identity's link by "
            "the destination; replies of translated connections by what the connection was made to, for their source "
            "is still that of the host behind; everything else by the source.",
        ),
    )
    yield Chain(
        "output",
        (*by_original_destination, *by_source),
        Hook("route", "output", kernel.hook_priority),
        about=(
            "Whatever this host sends. Of type route: only there does the kernel look for the route again when the "
            "mark has changed. A source of no identity keeps the mark that its program asked for (SO_MARK).",
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
        "postrouting",
        tuple(_postrouting(desired, mark, names)),
        Hook("filter", "postrouting", POSTROUTING_PRIORITY),
        about=(
            "What really leaves, by the link it leaves by, after all routing and all translation of sources (srcnat, "
            "100). Judged by the source that the wire will see is a packet without an identity's mark, for somebody "
            "may have wiped it, and one of a translated connection: the translation may be older than the route.",
        ),
    )


def _postrouting(desired: Desired, mark: str, names: set[str]) -> Iterator[Statement]:
    misrouted = _misrouted(desired)
    yield Statement('oifname "lo" accept', "never leaves this host")
    yield Statement(f"{mark} != @marks jump source", "no identity's mark: by the source on the wire")
    if "clamp" in names:
        yield Statement(
            f"{mark} . oifname @clamp {IS_SYN} tcp option maxseg size set rt mtu", "leaving: segments fit the path"
        )
        yield from _clamp_arriving(desired, mark)
    if "detour" in names:
        yield from _counting(mark, "oifname", "diverted")
        yield Statement(f"{mark} . oifname @detour accept", "by a road that when_down names")
    if "follows-main" in names:
        elsewhere = "oifname @links" if desired.policy.downstream is None else "oifname != @downstream"
        yield Statement(
            f"{mark} @follows-main {elsewhere} {mark} . oifname != @own-link goto diverted-to-main",
            "by a road of main's, as when_down allows",
        )
    yield Statement("ct status snat,dnat oifname @links jump source", "translated: by the source on the wire")
    yield Statement(f"{mark} != @marks accept", "no identity's")
    yield from _counting(mark, "oifname", "transmit")
    yield Statement(f"{mark} . oifname @own-link accept", "by its own link")
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


def _counting(mark: str, link: str, count: str) -> Iterator[Statement]:
    for family in Family:
        yield _count(family, f"{mark} . {link} map @{count}-{family}", f"count {_title(family)} {count}")


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


def closing(name: str, marks: Iterable[Fwmark]) -> tuple[str, ...]:
    """Commands that let no packet with these marks out, until the rules are put in anew."""
    return tuple(
        f'insert rule inet {name} postrouting oifname != "lo" meta mark & {mark.mask:#010x} == {mark.value:#010x} drop '
        f'comment "{CLOSING_COMMENT}{mark}"'
        for mark in marks
    )


def is_closing(present: Table) -> bool:
    """Whether a table still has what `closing` put there."""
    return any(rule.comment.startswith(CLOSING_COMMENT) for chain in present.chains for rule in chain.rules)


@dataclass(frozen=True, slots=True)
class Roads:
    """By which links a mark's packets may leave: the identity's own, and those that its `when_down` names."""

    own: str
    detours: frozenset[str] = frozenset()


def roads(present: Table) -> dict[int, Roads]:
    """By which links a table lets packets of each mark leave; nothing where it has no chain to look at them."""
    if "postrouting" not in {chain.name for chain in present.chains}:
        return {}
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
