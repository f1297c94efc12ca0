"""The nft table: what its rules say, and the transaction that gets there from what the kernel has."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ruleset
from agent.addresses import Addresses, Family, Prefix, Prefixes
from agent.desired import Desired, desire
from agent.layers import MANY
from agent.model import Chain, Facts, Fwmark, Hook, Kernel, Statement, Table
from agent.ruleset import COUNTS
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, hosts, identity, policies, policy, prefixes, read_back

#: What was wanted, and the table made of it.
Made = tuple[Desired, Table]

FAMILIES = [pytest.param(family, id=family) for family in Family]


def table_of(*identities: object, kernel: Kernel | None = None, facts: Facts | None = GATEWAY) -> Table:
    chosen = identities or (INSIDE, OUTSIDE)
    return ruleset.table(desire(policy(*chosen, kernel=kernel), facts))  # type: ignore[arg-type]


def elements(table: Table, name: str) -> list[str]:
    """A set's elements as nft writes them."""
    (found,) = (item for item in table.sets if item.name == name)
    return [f"{key} : {value}" if value else key for key, value in found.elements]


def texts(table: Table, chain: str | None = None) -> list[str]:
    return [rule.text for item in table.chains if chain in {None, item.name} for rule in item.rules]


# --- what the maps hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "held"),
    [
        pytest.param(
            "sources-ipv4-32", ["192.0.2.130 : goto id-inside", "203.0.113.2 : goto id-outside"], id="addresses"
        ),
        pytest.param("sources-ipv4-24", ["10.9.0.0 : goto id-inside"], id="networks"),
        pytest.param(
            "sources-ipv6-128",
            ["2001:db8:4::130 : goto id-inside", "2001:db8:203::2 : goto id-outside"],
            id="addresses-ipv6",
        ),
        pytest.param("home-ipv4", ['192.0.2.130 . "vpn0"', '203.0.113.2 . "wan"'], id="home"),
        pytest.param("home-ipv6", ['2001:db8:4::130 . "vpn0"', '2001:db8:203::2 . "wan"'], id="home-ipv6"),
        pytest.param("marks", ["0x01000000", "0x02000000"], id="marks"),
        pytest.param("links", ['"vpn0"', '"wan"'], id="links"),
        pytest.param("own-link", ['0x01000000 . "vpn0"', '0x02000000 . "wan"'], id="own-link"),
        pytest.param(
            "left",
            ['0x01000000 . "vpn0" : goto left-inside', '0x02000000 . "wan" : goto left-outside'],
            id="left",
        ),
        pytest.param(
            "arrived",
            ['0x01000000 . "vpn0" : goto arrived-inside', '0x02000000 . "wan" : goto arrived-outside'],
            id="arrived",
        ),
        pytest.param(
            "misrouted-dropped-ipv4",
            ['0x01000000 : "id-inside-ipv4-misrouted-dropped"', '0x02000000 : "id-outside-ipv4-misrouted-dropped"'],
            id="misrouted",
        ),
    ],
)
def test_elements(name: str, held: list[str]) -> None:
    """The maps of the test net hold exactly this."""
    assert elements(table_of(), name) == held


def test_no_intervals() -> None:
    """No set of ours holds intervals, which make everybody's changes slow, and everybody's ours: all are hashes."""
    assert not [item.name for item in table_of().sets if item.interval]


def test_intervals_of_many_lengths() -> None:
    """Only the sources are intervals, of the family whose networks have more lengths than are worth asking for."""
    members = [f"10.{length}.0.0/{length}" for length in range(16, 32)]
    table = table_of(replace(INSIDE, members=prefixes(*members)), OUTSIDE)
    assert {item.name: item.type for item in table.sets if item.interval} == {
        "sources-ipv4": ("ipv4_addr", "verdict", True, 0)
    }
    assert texts(table, "source")[0] == "ip saddr vmap @sources-ipv4"


def test_sets_of_many() -> None:
    """Of many sources each identity has sets of its own, of addresses alone: one more is no matter to the kernel."""
    many = tuple(Prefix(Family.IPV4, (10 << 24) + number, 32) for number in range(MANY))
    table = table_of(replace(INSIDE, members=Prefixes.of(many)), OUTSIDE)
    sets = {item.name: (item.type, len(item.elements)) for item in table.sets if item.name.startswith("id-")}
    assert sets == {
        "id-inside-ipv4-32": (("ipv4_addr", "", False, 0), MANY + 1),
        "id-outside-ipv4-32": (("ipv4_addr", "", False, 0), 1),
    }
    assert all(isinstance(item.elements, Addresses) for item in table.sets if item.name in sets)
    assert texts(table, "source")[:2] == [
        "ip saddr @id-inside-ipv4-32 goto id-inside",
        "ip saddr @id-outside-ipv4-32 goto id-outside",
    ]


def test_shared_link_is_there_once() -> None:
    """A link of two identities is one element of the links, and one of each identity's own."""
    one = identity("one", 1, "wan", addresses=["203.0.113.2"], next_hop=["203.0.113.1"])
    two = identity("two", 2, "wan", addresses=["203.0.113.3"], next_hop=["203.0.113.9"])
    assert elements(table_of(one, two), "links") == ['"wan"']
    assert elements(table_of(one, two), "own-link") == ['0x01000000 . "wan"', '0x02000000 . "wan"']


@pytest.mark.parametrize(
    ("chain", "field"),
    [
        pytest.param("source", "ip saddr", id="source"),
        pytest.param("destination", "ip daddr", id="destination"),
        pytest.param("answering", "ct original ip daddr", id="original-destination"),
    ],
)
def test_longest_prefix_is_asked_first(chain: str, field: str) -> None:
    """Where one identity's network lies in another's, the longer one is asked for first, whatever is looked at."""
    one = identity("one", 1, "wan", addresses=[], members=["10.0.0.0/8"])
    two = identity("two", 2, "vpn0", addresses=[], members=["10.1.0.0/16"])
    table = table_of(one, two)
    assert elements(table, "sources-ipv4-16") == ["10.1.0.0 : goto id-two"]
    assert elements(table, "sources-ipv4-8") == ["10.0.0.0 : goto id-one"]
    assert texts(table, chain)[:2] == [
        f"{field} & 255.255.0.0 vmap @sources-ipv4-16",
        f"{field} & 255.0.0.0 vmap @sources-ipv4-8",
    ]


def test_detours_of_two_kinds() -> None:
    """A road that is another identity's is known by its link; a road of main's may be any link."""
    inside = replace(INSIDE, when_down="outside")
    table = table_of(inside, replace(OUTSIDE, when_down="main"))
    assert elements(table, "detour") == ['0x01000000 . "wan"']
    assert elements(table, "diverted-ipv4") == ['0x01000000 . "wan" : "id-inside-ipv4-diverted"']
    assert elements(table, "follows-main") == ["0x01000000", "0x02000000"]
    assert elements(table, "diverted-to-main-ipv4") == [
        '0x01000000 : "id-inside-ipv4-diverted"',
        '0x02000000 : "id-outside-ipv4-diverted"',
    ]


def test_no_detour_no_words() -> None:
    """Where every identity is closed while its link is down, no rule speaks of detours."""
    assert not [text for text in texts(table_of()) if "detour" in text or "diverted" in text or "main" in text]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_has_no_counters_of_the_other(family: Family) -> None:
    """An identity of one family has counters and map elements in that family only."""
    address = {"ipv4": "192.0.2.130", "ipv6": "2001:db8:4::130"}[family]
    table = table_of(identity("inside", 1, "vpn0", addresses=[address]))
    assert table.counters == tuple(f"id-inside-{family}-{count}" for count in COUNTS)
    for item in table.sets:
        if item.value == "counter" and item.name.endswith(tuple(Family)):
            assert bool(item.elements) == item.name.endswith(family)


def test_pending_is_said_in_review() -> None:
    """Without facts the maps say in words what only the host knows."""
    (sources,) = (item for item in table_of(facts=None).sets if item.name == "sources-ipv4-32")
    (networks,) = (item for item in table_of(facts=None).sets if item.name == "sources-ipv4-24")
    assert sources.pending == ('outside: addresses = "auto", what wan has when this is applied',)
    assert networks.pending == ()


# --- what the rules say ----------------------------------------------------------------------------------------------


def test_hooks() -> None:
    """Local packets are marked in a `type route` chain, others just after mangle; what leaves is seen last."""
    hooks = {chain.name: str(chain.hook) for chain in table_of().chains if chain.hook}
    assert hooks == {
        "prerouting": "type filter hook prerouting priority -145; policy accept;",
        "output": "type route hook output priority -145; policy accept;",
        "postrouting": "type filter hook postrouting priority 300; policy accept;",
    }


def test_marks_that_arrive_are_cleared_first() -> None:
    """The first thing that happens to an arriving packet is that it loses our bits."""
    assert texts(table_of(), "prerouting")[0] == (
        "meta mark & 0x3f000000 != 0x00000000 meta mark set meta mark & 0xc0ffffff"
    )


def test_own_source_keeps_a_program_s_mark() -> None:
    """The output chain writes no mark of its own: a source of no identity keeps the one that was asked for."""
    assert not [text for text in texts(table_of(), "output") if "mark set" in text]


@pytest.mark.parametrize("enforce", [pytest.param(True, id="enforce"), pytest.param(False, id="count-only")])
def test_enforce(enforce: bool) -> None:
    """What is misrouted is dropped as the last word of all, and counted as that; or counted and let pass."""
    table = table_of(kernel=Kernel(enforce=enforce))
    assert [text for text in texts(table) if re.search(r"\b(drop|reject)\b", text)] == ["drop"] * enforce
    assert (texts(table, "leaving")[-1] == "drop") == enforce
    counted = [text.rpartition("@")[2] for text in texts(table) if "misrouted" in text]
    assert counted == [f"misrouted-{'dropped' if enforce else 'passed'}-{family}" for family in Family]


@pytest.mark.parametrize(
    ("downstream", "text"),
    [
        pytest.param(None, "oifname != @links accept", id="auto"),
        pytest.param(["lan"], "oifname @downstream accept", id="explicit"),
    ],
)
def test_downstream_is_let_through(downstream: list[str] | None, text: str) -> None:
    """Packets to the hosts behind the gateway are neither misrouted nor dropped."""
    table = ruleset.table(desire(policy(INSIDE, OUTSIDE, downstream=downstream), GATEWAY))
    found = texts(table, "leaving")
    assert found.index(text) < found.index("drop")
    assert ("downstream" in {item.name for item in table.sets}) == (downstream is not None)


def test_masquerade() -> None:
    """Members take on the own address on their own link; on another identity's road, that one's; only where asked."""
    assert "srcnat" not in {chain.name for chain in table_of().chains}
    inside = replace(INSIDE, masquerade=True, when_down="outside")
    mark = "meta mark & 0x3f000000 == 0x01000000"
    own, own6, road, road6 = "192.0.2.130", "2001:db8:4::130", "203.0.113.2", "2001:db8:203::2"
    assert texts(table_of(inside, OUTSIDE), "srcnat") == [
        f'oifname "vpn0" {mark} ip saddr != {own} snat ip to {own}',
        f'oifname "vpn0" {mark} ip6 saddr != {own6} snat ip6 to {own6}',
        f'oifname "wan" {mark} ip saddr != {{ {own}, {road} }} snat ip to {road}',
        f'oifname "wan" {mark} ip6 saddr != {{ {own6}, {road6} }} snat ip6 to {road6}',
    ]


def test_masquerade_stands_before_the_usual_place() -> None:
    """Of two translations of a connection the first wins, so ours stands before priority 100."""
    (chain,) = (item for item in table_of(replace(INSIDE, masquerade=True)).chains if item.name == "srcnat")
    assert chain.hook == Hook("nat", "postrouting", 95)


def test_clamp() -> None:
    """SYNs that leave are clamped to the path, by whatever road; those that arrive to what the link carries: its MTU
    less both headers.
    """
    table = table_of(replace(INSIDE, clamp_mss=True), OUTSIDE)
    syn = "tcp flags & (syn|rst) == syn tcp option maxseg size set"
    assert texts(table, "left-inside")[0] == f"{syn} rt mtu"
    assert [text for text in texts(table) if "maxseg" in text] == [
        f"{syn} rt mtu",
        f'iifname "vpn0" meta mark & 0x3f000000 == 0x01000000 meta nfproto ipv4 {syn} 1320',
        f'iifname "vpn0" meta mark & 0x3f000000 == 0x01000000 meta nfproto ipv6 {syn} 1300',
    ]
    assert not [text for text in texts(table_of()) if "maxseg" in text]


def test_clamp_on_a_detour() -> None:
    """By the road of an identity that clamps, segments of another one that takes it are clamped as well."""
    table = table_of(replace(INSIDE, clamp_mss=True), replace(OUTSIDE, when_down="inside"))
    assert elements(table, "clamp") == ['0x02000000 . "vpn0"']
    syn = "tcp flags & (syn|rst) == syn tcp option maxseg size set"
    assert f"meta mark & 0x3f000000 . oifname @clamp {syn} rt mtu" in texts(table, "leaving")
    assert "clamp" not in {item.name for item in table_of(replace(INSIDE, clamp_mss=True), OUTSIDE).sets}


# --- who is asked, and who is spared ---------------------------------------------------------------------------------


def test_own_road_is_not_looked_for_again() -> None:
    """What the host sends from an own address by that identity's own link, and nobody has marked, keeps its route."""
    rules = texts(table_of(), "output")
    spared = [f"meta mark & 0x3f000000 == 0x00000000 {f.nft} saddr . oifname @home-{f} accept" for f in Family]
    assert [text for text in rules if "@home" in text] == spared
    assert rules[-1] == "goto source"


@pytest.mark.parametrize("drop", [True, False])
def test_own_sources_are_dropped_first(drop: bool) -> None:
    """What arrives in the host's own name is dropped before anything is asked of it, where the policy says so."""
    first, *others = texts(table_of(kernel=Kernel(drop_own_sources=drop)), "prerouting")
    assert (first == 'meta nfproto ipv4 fib saddr type local iifname != "lo" meta pkttype host drop') == drop
    assert not any("fib" in text for text in others)


@pytest.mark.parametrize(
    ("nat", "seen", "asks"),
    [
        pytest.param(None, True, True, id="auto-seen"),
        pytest.param(None, False, False, id="auto-not-seen"),
        pytest.param(True, False, True, id="said"),
        pytest.param(False, True, False, id="denied"),
    ],
)
def test_connections_are_asked_for_where_there_is_translation(nat: bool | None, seen: bool, asks: bool) -> None:
    """Where nothing translates no rule speaks of connections: netfilter tracks them for the first that does."""
    table = table_of(kernel=Kernel(nat=nat), facts=replace(GATEWAY, nat=seen))
    assert any(re.search(r"\bct\b", text) for text in texts(table)) == asks
    assert ("answering" in {chain.name for chain in table.chains}) == asks


def test_review_without_facts_asks_for_connections() -> None:
    """Without facts a review shows the table that a host with translation has."""
    assert "answering" in {chain.name for chain in table_of(facts=None).chains}


@pytest.mark.parametrize("count", [pytest.param(4, id="few"), pytest.param(5, id="more")])
def test_few_links_are_compared_one_by_one(count: int) -> None:
    """A handful of links is compared by name, more are looked up."""
    many = [
        identity(f"i{number}", number, f"wan{number}", addresses=[f"203.0.113.{number}"])
        for number in range(1, count + 1)
    ]
    table = table_of(*many)
    arriving = [text for text in texts(table, "prerouting") if "iifname" in text]
    leaving = [text for text in texts(table, "postrouting") if "oifname" in text]
    if count == 4:
        assert arriving == [f'iifname "wan{number}" jump arriving' for number in range(1, 5)]
        assert leaving == [
            f'meta mark & 0x3f000000 == 0x0{number}000000 oifname "wan{number}" goto left-i{number}'
            for number in range(1, 5)
        ]
    else:
        assert arriving == ["iifname @links jump arriving"]
        assert leaving == ["meta mark & 0x3f000000 . oifname vmap @left"]


# --- laws of the rules -----------------------------------------------------------------------------------------------

#: The only form in which a mark is written: `meta mark set meta mark & KEEP` and perhaps `| OURS`.
WRITES = re.compile(r"meta mark set meta mark & (0x[0-9a-f]{8})(?: \| (0x[0-9a-f]{8}))?")

tables = st.builds(desire, policies(), hosts() | st.none()).map(lambda desired: (desired, ruleset.table(desired)))


@given(tables, st.integers(0, 0xFFFFFFFF))
def test_only_our_bits_are_written(made: Made, mark: int) -> None:
    """Whatever mark a packet has, each rule that writes it keeps every bit that is not ours."""
    desired, table = made
    mask = desired.policy.kernel.mark_mask
    written = [text for text in texts(table) if "mark set" in text]
    assert len(written) > len(desired.standings)
    for text in written:
        match = WRITES.search(text)
        assert match, text
        assert match.end() == len(text)
        keep, ours = (int(word or "0", 16) for word in match.groups())
        assert (mark & keep | ours) & ~mask == mark & ~mask
        assert not mark & keep & mask


@given(tables)
def test_each_identity_writes_its_own_mark(made: Made) -> None:
    """The chain of an identity writes the mark that its rule looks for."""
    desired, table = made
    for standing in desired.standings:
        (text,) = texts(table, f"id-{standing.identity.name}")
        match = WRITES.fullmatch(text)
        assert match
        assert int(match[2], 16) == standing.identity.fwmark.value


@given(tables)
def test_the_mark_is_read_with_the_mask(made: Made) -> None:
    """No rule looks at a mark without our mask: the other bits are the neighbours'."""
    desired, table = made
    readings = [text for text in (WRITES.sub("", text) for text in texts(table)) if "mark" in text]
    assert readings
    for text in readings:
        masked = text.count(f"meta mark & {desired.policy.kernel.mark_mask:#010x}")
        assert len(re.findall(r"\bmark\b", text)) == masked, text


@given(tables)
def test_no_connection_mark(made: Made) -> None:
    """The connection mark is neither read nor written: it is the neighbours'."""
    assert not [text for text in texts(made[1]) if "ct mark" in text]


@given(tables)
def test_no_drop_without_enforce(made: Made) -> None:
    """Without `enforce` no packet is dropped, by no rule and no chain's policy."""
    desired, table = made
    words = " ".join([*texts(table), *(str(chain.hook) for chain in table.chains)])
    assert bool(re.search(r"\b(drop|reject|queue)\b", words)) == desired.policy.kernel.enforce


@given(tables)
def test_comments_fit(made: Made) -> None:
    """Every rule has a comment, of at most 128 bytes, which is nft's limit, and without a quote in it."""
    for chain in made[1].chains:
        for rule in chain.rules:
            assert 0 < len(rule.comment.encode()) <= 128
            assert '"' not in rule.comment


def test_longest_comments_fit() -> None:
    """With the longest names, links and addresses there are, comments stay within nft's 128 bytes."""
    address = "2001:db8:1111:2222:3333:4444:5555:6666"
    names = ["a" * 30 + "1", "a" * 30 + "2"]
    links = ["é" * 7 + "1", "é" * 7 + "2"]
    one, two = (
        identity(
            name,
            62 + number,
            link,
            addresses=[f"{address[:-1]}{number}", f"203.0.113.{200 + number}"],
            masquerade=True,
            clamp_mss=True,
            when_down="main" if number else names[1],
        )
        for number, (name, link) in enumerate(zip(names, links, strict=True))
    )
    facts = Facts(tuple(replace(GATEWAY.links[1], name=link) for link in links))
    comments = [rule.comment for chain in table_of(one, two, facts=facts).chains for rule in chain.rules]
    assert max(len(comment.encode()) for comment in comments) <= 128
    assert any(links[1] in comment and names[0] in comment for comment in comments)


@given(tables)
def test_nothing_points_nowhere(made: Made) -> None:
    """Each set, chain and counter that a rule or an element names is there."""
    _, table = made
    names = {item.name for item in table.sets}
    chains = {chain.name for chain in table.chains if not chain.hook}
    assert {name for text in texts(table) for name in re.findall(r"@([a-z0-9-]+)", text)} <= names
    targets = {name for text in texts(table) for name in re.findall(r"(?:goto|jump) ([a-z0-9_-]+)", text)}
    targets |= {value.removeprefix("goto ") for item in table.sets for _, value in item.elements if "goto " in value}
    assert targets <= chains
    counters = {value.strip('"') for item in table.sets if item.value == "counter" for _, value in item.elements}
    assert counters <= set(table.counters)


@given(tables)
def test_one_element_a_key(made: Made) -> None:
    """No set holds a key twice: nft would refuse it, or take it for the one that is there."""
    for item in made[1].sets:
        assert len(dict(item.elements)) == len(item.elements)


# --- on the way from one table to the next ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0x3F000000, 0xFF])
def test_closed(mask: int) -> None:
    """While roads change hands a mark's packets are let out nowhere, whatever their other bits are; local ones stay."""
    mark = Fwmark(mask & -mask, mask)
    text = ruleset.closed([mark])
    assert f'oifname != "lo" meta mark & {mask:#010x} == {mask & -mask:#010x} drop' in text
    comments = re.findall('comment "(.*)"', text)
    assert comments == [f"closed while roads change: {mask & -mask:#x}/{mask:#x}"]
    strange = (*comments, "closed while roads change: 0x3/0x1", "closed while roads change: x/y", "drop")
    chain = Chain("leaving", tuple(Statement("", comment) for comment in strange))
    assert ruleset.marks_closed(Table("idmark-closed", chains=(chain,))) == {mark}


def test_roads() -> None:
    """What a table lets its marks leave by is read from its own elements: own links, and the detours."""
    inside = replace(INSIDE, when_down="outside")
    table = read_back(table_of(inside, OUTSIDE))
    assert ruleset.roads(table) == {
        0x1000000: ruleset.Roads("vpn0", frozenset({"wan"})),
        0x2000000: ruleset.Roads("wan"),
    }


# --- the digest -------------------------------------------------------------------------------------------------------


@given(tables, tables)
def test_digest_tells_rules_apart(made: Made, other: Made) -> None:
    """Two tables have one digest exactly when their chains, hooks and rules are the same, whatever their elements."""
    one, two = made[1], other[1]
    chains = [[chain for chain in table.chains if chain.name != "digest"] for table in (one, two)]
    assert (ruleset.digest(one) == ruleset.digest(two)) == (chains[0] == chains[1])


def test_digest_of_a_foreign_table() -> None:
    """A table that only bears our name has no digest."""
    assert ruleset.digest(Table("idmark", chains=(Chain("digest", (Statement("", "mine"),)),))) is None
    assert ruleset.digest(Table("idmark", chains=(Chain("other", (Statement("", "rules sha256:0"),)),))) is None
