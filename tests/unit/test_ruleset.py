"""The nft table: what its rules say, and the transaction that gets there from what the kernel has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ruleset
from agent.desired import Desired, desire
from agent.model import Chain, Facts, Family, Hook, Kernel, NftSet, Statement, Table
from agent.ruleset import COUNTS, FEW, element_changes, transaction
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, hosts, identity, policies, policy, read_back

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


def sorts(commands: tuple[str, ...]) -> list[str]:
    """Each command's verb and object: "add element"; runs of one sort once."""
    words = [" ".join(command.split()[:2]) for command in commands]
    return [word for place, word in enumerate(words) if words[place - 1 : place] != [word]]


# --- what the maps hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "held"),
    [
        pytest.param(
            "sources-ipv4",
            ["10.9.0.0/24 : goto id-inside", "192.0.2.130 : goto id-inside", "203.0.113.2 : goto id-outside"],
            id="sources",
        ),
        pytest.param("own-ipv4", ["192.0.2.130 : goto id-inside", "203.0.113.2 : goto id-outside"], id="own"),
        pytest.param("own-ipv6", ["2001:db8:4::130 : goto id-inside", "2001:db8:203::2 : goto id-outside"], id="own-6"),
        pytest.param("links", ['"vpn0"', '"wan"'], id="links"),
        pytest.param("own-link", ['0x01000000 . "vpn0"', '0x02000000 . "wan"'], id="own-link"),
        pytest.param(
            "transmit-ipv6",
            [
                '0x01000000 . "vpn0" : "id-inside-ipv6-transmit"',
                '0x02000000 . "wan" : "id-outside-ipv6-transmit"',
            ],
            id="transmit",
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


def test_shared_link_is_there_once() -> None:
    """A link of two identities is one element of the links, and one of each identity's own."""
    one = identity("one", 1, "wan", addresses=["203.0.113.2"], next_hop=["203.0.113.1"])
    two = identity("two", 2, "wan", addresses=["203.0.113.3"], next_hop=["203.0.113.9"])
    assert elements(table_of(one, two), "links") == ['"wan"']
    assert elements(table_of(one, two), "own-link") == ['0x01000000 . "wan"', '0x02000000 . "wan"']


def test_longest_prefix_is_cut_out() -> None:
    """nft is given disjoint elements where one identity's network lies in another's."""
    one = identity("one", 1, "wan", addresses=[], members=["10.0.0.0/8"])
    two = identity("two", 2, "vpn0", addresses=[], members=["10.1.0.0/16"])
    assert elements(table_of(one, two), "sources-ipv4") == [
        "10.0.0.0/16 : goto id-one",
        "10.1.0.0/16 : goto id-two",
        "10.2.0.0-10.255.255.255 : goto id-one",
    ]


def test_detours_of_two_kinds() -> None:
    """A road that is another identity's is known by its link; a road of main's may be any link."""
    inside = replace(INSIDE, when_down="outside")
    table = table_of(inside, replace(OUTSIDE, when_down="main"))
    assert elements(table, "detour") == ['0x01000000 . "wan"']
    assert elements(table, "diverted-ipv4") == ['0x01000000 . "wan" : "id-inside-ipv4-diverted"']
    assert elements(table, "follows-main") == ["0x01000000", "0x02000000"]
    assert elements(table, "diverted-main-ipv4") == [
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
    (sources,) = (item for item in table_of(facts=None).sets if item.name == "sources-ipv4")
    assert sources.pending == ('outside: addresses = "auto", what wan has when this is applied',)


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
    assert texts(table_of(), "prerouting")[0] == "meta mark set meta mark & 0xc0ffffff"


def test_own_source_keeps_a_program_s_mark() -> None:
    """The output chain writes no mark of its own: a source of no identity keeps the one that was asked for."""
    assert not [text for text in texts(table_of(), "output") if "mark set" in text]


@pytest.mark.parametrize("enforce", [pytest.param(True, id="enforce"), pytest.param(False, id="count-only")])
def test_enforce(enforce: bool) -> None:
    """What is misrouted is dropped as the last word of all, and counted as that; or counted and let pass."""
    table = table_of(kernel=Kernel(enforce=enforce))
    assert [text for text in texts(table) if re.search(r"\b(drop|reject)\b", text)] == ["drop"] * enforce
    assert (texts(table, "postrouting")[-1] == "drop") == enforce
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
    found = texts(table, "postrouting")
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
    """SYNs that leave are clamped to the path, those that arrive to what the link carries: MTU less both headers."""
    table = table_of(replace(INSIDE, clamp_mss=True), OUTSIDE)
    syn = "tcp flags & (syn|rst) == syn tcp option maxseg size set"
    assert elements(table, "clamp") == ['0x01000000 . "vpn0"']
    assert [text for text in texts(table) if "maxseg" in text] == [
        f"meta mark & 0x3f000000 . oifname @clamp {syn} rt mtu",
        f'iifname "vpn0" meta mark & 0x3f000000 == 0x01000000 meta nfproto ipv4 {syn} 1320',
        f'iifname "vpn0" meta mark & 0x3f000000 == 0x01000000 meta nfproto ipv6 {syn} 1300',
    ]
    assert not [text for text in texts(table_of()) if "maxseg" in text]


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
        match = WRITES.fullmatch(text)
        assert match, text
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
    for text in texts(table):
        for reading in re.findall(r"meta mark(?! set)(.{13})", text.removeprefix("meta mark set meta mark & 0x")):
            assert reading == f" & {desired.policy.kernel.mark_mask:#010x}", text


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


# --- the text --------------------------------------------------------------------------------------------------------


def test_declared_before_used() -> None:
    """In the rendered file chains stand before the elements that go there, and what is flushed is declared."""
    text = ruleset.render(table_of())
    assert text.index("chain id-inside { }") < text.index("map sources-ipv4 {") < text.index("goto id-inside")
    for name in re.findall(r"^flush (?:map|set) inet idmark (.+)$", text, re.MULTILINE):
        assert re.search(rf"^    (?:map|set) {name} {{ type", text[: text.index("flush table")], re.MULTILINE)


def test_counters_go_on() -> None:
    """The rendered file neither deletes nor resets anything: what is counted stays, however often it is loaded."""
    text = ruleset.render(table_of())
    assert not re.search(r"\b(delete|destroy|reset)\b", re.sub(r"#.*", "", text))
    assert len(re.findall(r"^    counter \S+ \{ \}$", text, re.MULTILINE)) == len(table_of().counters)


def test_every_set_is_flushed() -> None:
    """Elements of before are gone after loading the rendered file: each set is flushed."""
    table = table_of()
    flushed = re.findall(r"^flush (?:map|set) inet idmark (.+)$", ruleset.render(table), re.MULTILINE)
    assert sorted(flushed) == sorted(item.name for item in table.sets)


# --- the transaction -------------------------------------------------------------------------------------------------


@given(tables)
def test_second_pass_is_empty(made: Made) -> None:
    """What was loaded and read back is in force: nothing is sent."""
    assert transaction(made[1], read_back(made[1])) == ()


@given(tables)
def test_no_table_no_transaction_but_the_file(made: Made) -> None:
    """A table that is not there is made by the very text of the review."""
    assert transaction(made[1], None) == (ruleset.render(made[1]),)


@given(tables, tables)
def test_transaction_names_our_table_only(made: Made, before: Made) -> None:
    """Every command of a transaction is about our table, by its family and name, and never deletes the table."""
    wanted, present = made[1], read_back(replace(before[1], name=made[1].name))
    for command in transaction(wanted, present):
        assert re.match(
            rf"(add|delete|flush) (table|chain|rule|counter|map|set|element) inet {wanted.name}( |$)", command
        )
        assert not command.startswith("delete table")


@given(tables, tables)
def test_transaction_in_a_legal_order(made: Made, before: Made) -> None:
    """Chains and counters are there before what points at them; what held on to them is gone before they are."""
    wanted, present = made[1], read_back(replace(before[1], name=made[1].name))
    commands = transaction(wanted, present)
    there = {chain.name for chain in present.chains} | set(present.counters)
    held = {item.name: {key: _target(value) for key, value in item.elements} for item in present.sets}
    ruled = bool(present.chains)
    for command in commands:
        verb, kind, _, _, *rest = command.split(" ")
        match (verb, kind):
            case ("flush", "table"):
                ruled = False
            case ("flush", _):
                held[rest[0]] = {}
            case ("add", "chain" | "counter"):
                there.add(rest[0])
            case ("add", "map" | "set"):
                assert rest[0] not in held
                held[rest[0]] = {}
            case ("delete", "map" | "set"):
                assert not ruled
                del held[rest[0]]
            case ("delete", "element"):
                for key in _elements(command):
                    del held[rest[0]][key]
            case ("add", "element"):
                for key, target in _elements(command).items():
                    assert key not in held[rest[0]]
                    assert target is None or target in there
                    held[rest[0]][key] = target
            case ("delete", "chain" | "counter"):
                assert all(rest[0] not in items.values() for items in held.values())
                there.remove(rest[0])
            case ("add", "rule"):
                assert rest[0] in there
                ruled = True
    assert there == {chain.name for chain in wanted.chains} | set(wanted.counters)
    assert held == {item.name: {key: _target(value) for key, value in item.elements} for item in wanted.sets}


def _elements(command: str) -> dict[str, str | None]:
    pairs = (item.partition(" : ") for item in command.partition(" { ")[2].removesuffix(" }").split(", "))
    return {key: _target(value) for key, _, value in pairs}


def _target(value: str) -> str | None:
    return value.removeprefix("goto ").strip('"') or None


def changed(table: Table, name: str, **fields: object) -> Table:
    """The table with one of its sets changed."""
    sets = [replace(item, **fields) if item.name == name else item for item in table.sets]  # type: ignore[arg-type]
    return replace(table, sets=tuple(sets))


def without(table: Table, chain: str) -> Table:
    return replace(table, chains=tuple(item for item in table.chains if item.name != chain))


@pytest.mark.parametrize(
    ("have", "commands"),
    [
        pytest.param(
            [("10.9.0.0/24", "goto id-inside"), ("192.0.2.130", "goto id-inside")],
            ["add element inet idmark sources-ipv4 { 203.0.113.2 : goto id-outside }"],
            id="one-missing",
        ),
        pytest.param(
            [
                ("10.9.0.0/24", "goto id-inside"),
                ("10.10.0.0/24", "goto id-inside"),
                ("192.0.2.130", "goto id-inside"),
                ("203.0.113.2", "goto id-outside"),
            ],
            ["delete element inet idmark sources-ipv4 { 10.10.0.0/24 }"],
            id="one-too-many",
        ),
        pytest.param(
            [("10.9.0.0/24", "goto id-outside"), ("192.0.2.130", "goto id-inside"), ("203.0.113.2", "goto id-outside")],
            [
                "delete element inet idmark sources-ipv4 { 10.9.0.0/24 }",
                "add element inet idmark sources-ipv4 { 10.9.0.0/24 : goto id-inside }",
            ],
            id="another-verdict",
        ),
    ],
)
def test_element_differences(have: list[tuple[str, str]], commands: list[str]) -> None:
    """Only the elements that differ are sent; one with another verdict is deleted first, or nft says "File exists"."""
    wanted = table_of()
    present = changed(read_back(wanted), "sources-ipv4", elements=tuple(have))
    assert list(transaction(wanted, present)) == commands


@pytest.mark.parametrize(
    ("gone", "verbs"),
    [
        pytest.param(FEW, ["delete element"], id="few"),
        pytest.param(FEW + 1, ["flush map", "add element"], id="many"),
    ],
)
def test_many_deletions(gone: int, verbs: list[str]) -> None:
    """nft looks for each element that is deleted from the start: many are flushed away, and the rest put in anew."""
    wanted = table_of()
    (now,) = (item for item in wanted.sets if item.name == "sources-ipv4")
    more = tuple((f"10.10.{number}.0/24", "goto id-inside") for number in range(gone))
    commands = transaction(wanted, changed(read_back(wanted), "sources-ipv4", elements=(*now.elements, *more)))
    assert sorts(commands) == verbs


def test_all_gone() -> None:
    """A map that is to be empty and holds many elements is flushed, and nothing is added."""
    wanted = NftSet("s", "ipv4_addr")
    present = replace(wanted, elements=tuple((f"10.0.0.{number}", "") for number in range(FEW + 1)))
    assert list(element_changes("idmark", wanted, present)) == ["flush set inet idmark s"]


few_elements = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["goto id-x", "goto id-y"]))


@given(few_elements, few_elements)
def test_element_changes_get_there(want: dict[str, str], have: dict[str, str]) -> None:
    """Element changes turn one content into the other; nothing is deleted that isn't there, nor added that is."""
    wanted = NftSet("m", "ipv4_addr", "verdict", elements=tuple(want.items()))
    now = dict(have)
    for command in element_changes("t", wanted, replace(wanted, elements=tuple(have.items()))):
        items = command.partition("{ ")[2].removesuffix(" }").split(", ")
        if command.startswith("delete element inet t m { "):
            for key in items:
                del now[key]
        else:
            assert command.startswith("add element inet t m { ")
            for key, _, value in (item.partition(" : ") for item in items):
                assert now.setdefault(key, value) is value
    assert now == want


def test_hook_changed() -> None:
    """A hook can't be changed in place: the chain is deleted and added, in one transaction with all of the rules."""
    wanted = table_of()
    commands = transaction(wanted, read_back(table_of(kernel=Kernel(hook_priority=-140))))
    assert commands[0] == "flush table inet idmark"
    assert [command for command in commands if "chain" in command.split()[:2]] == [
        "delete chain inet idmark output",
        "delete chain inet idmark prerouting",
        "add chain inet idmark prerouting { type filter hook prerouting priority -145; policy accept; }",
        "add chain inet idmark output { type route hook output priority -145; policy accept; }",
    ]
    assert sorts(commands) == ["flush table", "delete chain", "add chain", "add rule"]
    assert sum(command.startswith("add rule") for command in commands) == len(texts(wanted))


def test_type_changed() -> None:
    """A set of another type is made anew: what looks it up goes first, its own kind of object is deleted."""
    wanted = table_of()
    present = changed(read_back(wanted), "links", value="verdict", elements=(('"vpn0"', "accept"),))
    commands = transaction(wanted, present)
    assert sorts(commands) == ["flush table", "delete map", "add set", "add element", "add rule"]
    assert "delete map inet idmark links" in commands
    assert "add set inet idmark links { type ifname; }" in commands
    assert 'add element inet idmark links { "vpn0", "wan" }' in commands


def test_identity_gone() -> None:
    """Of an identity that is gone the rules, elements, chain and counters go, in this order, and no other counter."""
    wanted = table_of(INSIDE)
    commands = transaction(wanted, read_back(table_of()))
    assert sorts(commands) == ["flush table", "delete element", "add rule", "delete chain", "delete counter"]
    deleted = [command.split()[-1] for command in commands if command.startswith("delete counter")]
    assert sorted(deleted) == sorted(f"id-outside-{family}-{count}" for family in Family for count in COUNTS)
    assert commands[-len(deleted) - 1] == "delete chain inet idmark id-outside"


def test_identity_new() -> None:
    """The chain and counters of a new identity are there before the elements that point at them."""
    commands = transaction(table_of(), read_back(table_of(INSIDE)))
    assert sorts(commands) == ["flush table", "add counter", "add chain", "add element", "add rule"]


@pytest.mark.parametrize(
    "kernel",
    [pytest.param(Kernel(enforce=False), id="count-only"), pytest.param(Kernel(hook_priority=-140), id="hook")],
)
def test_counters_stay_while_the_identity_does(kernel: Kernel) -> None:
    """No setting deletes a counter of an identity that stays, back or forth."""
    inside = replace(INSIDE, when_down="outside", clamp_mss=True, masquerade=True)
    one, other = table_of(), table_of(inside, replace(OUTSIDE, when_down="main"), kernel=kernel)
    for wanted, present in ((one, other), (other, one)):
        assert not [command for command in transaction(wanted, read_back(present)) if "counter inet" in command]


def test_chain_missing() -> None:
    """A chain that somebody deleted comes back with its rules."""
    wanted = table_of()
    commands = transaction(wanted, without(read_back(wanted), "postrouting"))
    assert "add chain inet idmark postrouting { type filter hook postrouting priority 300; policy accept; }" in commands
    assert 'add rule inet idmark postrouting oifname "lo" accept comment "never leaves this host"' in commands


def test_set_missing() -> None:
    """A set that somebody deleted, rules and all, comes back with its elements."""
    wanted = table_of()
    present = replace(read_back(wanted), sets=tuple(item for item in wanted.sets if item.name != "own-ipv4"))
    commands = transaction(wanted, present)
    assert commands[0] == "add map inet idmark own-ipv4 { type ipv4_addr : verdict; }"
    assert commands[1].startswith("add element inet idmark own-ipv4 { 192.0.2.130 : goto id-inside,")


def edited(table: Table, name: str, *rules: Statement) -> Table:
    """The table with other rules in one of its chains."""
    chains = [replace(chain, rules=rules) if chain.name == name else chain for chain in table.chains]
    return replace(table, chains=tuple(chains))


FOREIGN = Statement("", "")
Edit = Callable[[tuple[Statement, ...]], tuple[Statement, ...]]
EDITS: dict[str, Edit] = {
    "foreign-rule-in-front": lambda rules: (FOREIGN, *rules),
    "foreign-rule-behind": lambda rules: (*rules, FOREIGN),
    "first-rule-gone": lambda rules: rules[1:],
    "last-rule-gone": lambda rules: rules[:-1],
    "one-twice": lambda rules: (rules[0], *rules),
    "flushed": lambda _: (),
    "other-order": lambda rules: rules[::-1],
}


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        pytest.param(name, edit, id=f"{name}-{words}")
        for name, rules in {"digest": 1, "id-inside": 1, "arriving": 5, "prerouting": 6, "postrouting": 10}.items()
        for words, edit in EDITS.items()
        if rules > 1 or words != "other-order"
    ],
)
def test_rules_edited(name: str, edit: Edit) -> None:
    """When somebody has edited one of our chains, the rules of all are put in anew."""
    wanted = table_of()
    there = read_back(wanted)
    (rules,) = (chain.rules for chain in there.chains if chain.name == name)
    commands = transaction(wanted, edited(there, name, *edit(rules)))
    assert sorts(commands) == ["flush table", "add rule"]
    assert sum(command.startswith("add rule") for command in commands) == len(texts(wanted))


def test_other_text_under_the_same_comment() -> None:
    """A rule whose text alone differs is seen, by the digest of all: what nft lists can't be compared."""
    inside = replace(INSIDE, clamp_mss=True)
    smaller = tuple(replace(link, mtu=link.mtu - 100) for link in GATEWAY.links)
    wanted, present = table_of(inside), table_of(inside, facts=replace(GATEWAY, links=smaller))
    for one, other in zip(wanted.chains[1:], present.chains[1:], strict=True):
        assert [rule.comment for rule in one.rules] == [rule.comment for rule in other.rules]
    assert sorts(transaction(wanted, read_back(present))) == ["flush table", "add rule"]


def test_stranger_in_our_table() -> None:
    """A chain and a set in our table that nobody wants are taken away."""
    wanted = table_of()
    there = read_back(wanted)
    present = replace(
        there,
        chains=(*there.chains, Chain("mine", (FOREIGN,), Hook("filter", "forward", 0))),
        sets=(*there.sets, NftSet("theirs", "ipv4_addr")),
        counters=(*there.counters, "old"),
    )
    commands = transaction(wanted, present)
    assert commands[:2] == ("flush table inet idmark", "delete set inet idmark theirs")
    assert commands[-2:] == ("delete chain inet idmark mine", "delete counter inet idmark old")


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
