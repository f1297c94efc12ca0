"""nft's commands: the file of a review, and the transaction that gets from one table to another."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ruleset
from agent.addresses import Addresses, Family
from agent.commands import FEW, SMALL, difference, element_changes, render, transaction
from agent.desired import desire
from agent.model import Chain, ElementChange, Facts, Hook, Identity, Kernel, NftSet, Statement, Table
from agent.ruleset import COUNTS
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, hosts, policies, policy, read_back


def table_of(*identities: Identity, kernel: Kernel | None = None, facts: Facts | None = GATEWAY) -> Table:
    return ruleset.table(desire(policy(*(identities or (INSIDE, OUTSIDE)), kernel=kernel), facts))


def rule_count(table: Table) -> int:
    return sum(len(chain.rules) for chain in table.chains)


def sorts(commands: tuple[str, ...]) -> list[str]:
    """Each command's verb and object: "add element"; runs of one sort once."""
    words = [" ".join(command.split()[:2]) for command in commands]
    return [word for place, word in enumerate(words) if words[place - 1 : place] != [word]]


tables = st.builds(desire, policies(), hosts() | st.none()).map(ruleset.table)

# --- the text --------------------------------------------------------------------------------------------------------


def test_declared_before_used() -> None:
    """In the rendered file chains stand before the elements that go there, and what is flushed is declared."""
    text = render(table_of())
    assert text.index("chain id-inside { }") < text.index("map sources-ipv4-24 {") < text.index("goto id-inside")
    for name in re.findall(r"^flush (?:map|set) inet idmark (.+)$", text, re.MULTILINE):
        assert re.search(rf"^    (?:map|set) {name} {{ type", text[: text.index("flush table")], re.MULTILINE)


def test_counters_go_on() -> None:
    """The rendered file neither deletes nor resets anything: what is counted stays, however often it is loaded."""
    text = render(table_of())
    assert not re.search(r"\b(delete|destroy|reset)\b", re.sub(r"#.*", "", text))
    assert len(re.findall(r"^    counter \S+ \{ \}$", text, re.MULTILINE)) == len(table_of().counters)


def test_every_set_is_flushed() -> None:
    """Elements of before are gone after loading the rendered file: each set is flushed."""
    table = table_of()
    flushed = re.findall(r"^flush (?:map|set) inet idmark (.+)$", render(table), re.MULTILINE)
    assert sorted(flushed) == sorted(item.name for item in table.sets)


# --- the transaction -------------------------------------------------------------------------------------------------


@given(tables)
def test_second_pass_is_empty(wanted: Table) -> None:
    """What was loaded and read back is in force: nothing is sent."""
    assert transaction(wanted, read_back(wanted)) == ()


@given(tables)
def test_no_table_no_transaction_but_the_file(wanted: Table) -> None:
    """A table that is not there is made by the very text of the review."""
    assert transaction(wanted, None) == (render(wanted),)


@given(tables, tables)
def test_transaction_names_our_table_only(wanted: Table, before: Table) -> None:
    """Every command of a transaction is about our table, by its family and name, and never deletes the table."""
    present = read_back(replace(before, name=wanted.name))
    for command in transaction(wanted, present):
        assert re.match(
            rf"(add|delete|flush) (table|chain|rule|counter|map|set|element) inet {wanted.name}( |$)", command
        )
        assert not command.startswith("delete table")


@given(tables, tables)
def test_transaction_in_a_legal_order(wanted: Table, before: Table) -> None:
    """Chains and counters are there before what points at them; what held on to them is gone before they are."""
    present = read_back(replace(before, name=wanted.name))
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
                there_already = held.setdefault(rest[0], {})
                for key, target in _elements(command).items():
                    assert key not in there_already
                    assert target is None or target in there
                    there_already[key] = target
            case ("delete", "map" | "set"):
                assert not ruled
                del held[rest[0]]
            case ("delete", "chain" | "counter"):
                assert all(rest[0] not in items.values() for items in held.values())
                there.remove(rest[0])
            case ("add", "rule"):
                assert rest[0] in there
                ruled = True
    assert there == {chain.name for chain in wanted.chains} | set(wanted.counters)
    assert held == {item.name: {key: _target(value) for key, value in item.elements} for item in wanted.sets}


def _elements(command: str) -> dict[str, str | None]:
    """The elements in the declaration of a set, and where they lead."""
    words = command.partition(" elements = { ")[2].removesuffix(" }; }")
    return {key: _target(value) for key, _, value in (item.partition(" : ") for item in words.split(", ") if item)}


def _target(value: str) -> str | None:
    return value.removeprefix("goto ").strip('"') or None


def changed(table: Table, name: str, **fields: object) -> Table:
    """The table with one of its sets changed."""
    sets = [replace(item, **fields) if item.name == name else item for item in table.sets]  # type: ignore[arg-type]
    return replace(table, sets=tuple(sets))


def without(table: Table, chain: str) -> Table:
    return replace(table, chains=tuple(item for item in table.chains if item.name != chain))


DECLARED = "add map inet idmark sources-ipv4-32 { type ipv4_addr : verdict; size 8192;"
FILLED = f"{DECLARED} elements = {{ 192.0.2.130 : goto id-inside, 203.0.113.2 : goto id-outside }}; }}"


@pytest.mark.parametrize(
    ("have", "commands"),
    [
        pytest.param(
            [("192.0.2.130", "goto id-inside")],
            [f"{DECLARED} elements = {{ 203.0.113.2 : goto id-outside }}; }}"],
            id="one-missing",
        ),
        pytest.param(
            [
                ("192.0.2.129", "goto id-inside"),
                ("192.0.2.130", "goto id-inside"),
                ("203.0.113.2", "goto id-outside"),
            ],
            ["flush map inet idmark sources-ipv4-32", FILLED],
            id="one-too-many",
        ),
        pytest.param(
            [("192.0.2.130", "goto id-outside"), ("203.0.113.2", "goto id-outside")],
            ["flush map inet idmark sources-ipv4-32", FILLED],
            id="another-verdict",
        ),
    ],
)
def test_element_differences(have: list[tuple[str, str]], commands: list[str]) -> None:
    """What is missing is put in. When something goes, or gets another verdict (or nft says "File exists"), all are put
    in anew: libnftables reads every interval set of the host before it deletes an element.
    """
    wanted = table_of()
    present = changed(read_back(wanted), "sources-ipv4-32", elements=tuple(have))
    assert list(transaction(wanted, present)) == commands


@pytest.mark.parametrize(
    ("size", "gone", "verbs"),
    [
        pytest.param(SMALL, 1, ["flush map", "add map"], id="small"),
        pytest.param(SMALL + 1, FEW, ["delete element"], id="few-of-many"),
        pytest.param(SMALL + 1, FEW + 1, ["flush map", "add map"], id="many"),
        pytest.param(0, FEW + 1, ["flush map"], id="all"),
    ],
)
def test_deletions(size: int, gone: int, verbs: list[str]) -> None:
    """nft reads whole sets to delete an element of one, and looks for each from the start: a small set is filled anew,
    and a large one when many go.
    """
    elements = tuple((f"10.10.{number >> 8}.{number & 255}", "goto id-inside") for number in range(size + gone))
    wanted = NftSet("m", "ipv4_addr", "verdict", elements=elements[:size])
    assert sorts(tuple(element_changes("t", wanted, replace(wanted, elements=elements)))) == verbs


few_elements = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["goto id-x", "goto id-y"]))


@given(few_elements, few_elements)
def test_element_changes_get_there(want: dict[str, str], have: dict[str, str]) -> None:
    """Element changes turn one content into the other; nothing is added that is there."""
    wanted = NftSet("m", "ipv4_addr", "verdict", elements=tuple(want.items()))
    now: dict[str, str | None] = {key: _target(value) for key, value in have.items()}
    for command in element_changes("t", wanted, replace(wanted, elements=tuple(have.items()))):
        if command == "flush map inet t m":
            now.clear()
            continue
        assert command.startswith("add map inet t m { type ipv4_addr : verdict; elements = { ")
        for key, target in _elements(command).items():
            assert now.setdefault(key, target) is target
    assert now == {key: _target(value) for key, value in want.items()}


few_addresses = st.sets(st.integers(0, 20)).map(lambda values: Addresses.of(Family.IPV4, values))


@given(few_addresses, few_addresses)
def test_difference_of_addresses(want: Addresses, have: Addresses) -> None:
    """Of packed addresses exactly those go that are too many, and those come that are missing; and stay packed."""
    wanted = NftSet("s", "ipv4_addr", elements=want)
    change = difference(wanted, replace(wanted, elements=have))
    assert set(change.gone) == set(have) - set(want)
    assert set(change.new) == set(want) - set(have)
    assert all(isinstance(part, Addresses) or not part for part in (change.gone, change.new))


def test_difference_of_what_is_no_address() -> None:
    """Where somebody put an element for all others among addresses, it goes, and the addresses stay."""
    wanted = NftSet("s", "ipv4_addr", elements=Addresses.of(Family.IPV4, [1, 2]))
    present = replace(wanted, elements=(("*", ""), ("0.0.0.2", ""), ("0.0.0.1", "")))
    assert difference(wanted, present) == ElementChange("s", "ipv4_addr", (("*", ""),), ())


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
    assert sum(command.startswith("add rule") for command in commands) == rule_count(wanted)


def test_policy_changed() -> None:
    """A chain whose policy somebody changed is made anew, as with its hook: its packets were dropped, or let pass."""
    wanted = table_of()
    there = read_back(wanted)
    chains = [
        replace(chain, hook=replace(chain.hook, policy="drop")) if chain.hook and chain.name == "output" else chain
        for chain in there.chains
    ]
    commands = transaction(wanted, replace(there, chains=tuple(chains)))
    assert [found for found in commands if found.startswith("delete")] == ["delete chain inet idmark output"]
    assert "add chain inet idmark output { type route hook output priority -145; policy accept; }" in commands


def test_rules_anew() -> None:
    """Rules are put in anew when that is asked for, though nothing differs."""
    wanted = table_of()
    assert sorts(transaction(wanted, read_back(wanted), rules_anew=True)) == ["flush table", "add rule"]


def test_type_changed() -> None:
    """A set of another type is made anew: what looks it up goes first, its own kind of object is deleted."""
    wanted = table_of()
    present = changed(read_back(wanted), "links", value="verdict", elements=(('"vpn0"', "accept"),))
    commands = transaction(wanted, present)
    assert sorts(commands) == ["flush table", "delete map", "add set", "add rule"]
    assert "delete map inet idmark links" in commands
    assert 'add set inet idmark links { type ifname; elements = { "vpn0", "wan" }; }' in commands


def test_identity_gone() -> None:
    """Of an identity that is gone the rules, elements, chain and counters go, in this order, and no other counter."""
    wanted = table_of(INSIDE)
    commands = transaction(wanted, read_back(table_of()))
    assert {*sorts(commands)[1:-3]} == {"flush map", "add map", "flush set", "add set"}
    assert sorts(commands)[-3:] == ["add rule", "delete chain", "delete counter"]
    deleted = [command.split()[-1] for command in commands if command.startswith("delete counter")]
    assert sorted(deleted) == sorted(f"id-outside-{family}-{count}" for family in Family for count in COUNTS)
    assert commands[-len(deleted) - 1] == "delete chain inet idmark id-outside"


def test_identity_new() -> None:
    """The chain and counters of a new identity are there before the elements that point at them."""
    commands = transaction(table_of(), read_back(table_of(INSIDE)))
    assert sorts(commands)[:3] == ["flush table", "add counter", "add chain"]
    assert {*sorts(commands)[3:]} == {"add map", "add set", "add rule"}


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
    assert 'add rule inet idmark postrouting goto leaving comment "not plainly on its own road"' in commands


def test_set_missing() -> None:
    """A set that somebody deleted, rules and all, comes back with its elements."""
    wanted = table_of()
    present = replace(read_back(wanted), sets=tuple(item for item in wanted.sets if item.name != "sources-ipv4-32"))
    commands = transaction(wanted, present)
    assert commands[0] == FILLED


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
        for name, rules in {"digest": 1, "id-inside": 1, "arriving": 3, "prerouting": 5, "leaving": 9}.items()
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
    assert sum(command.startswith("add rule") for command in commands) == rule_count(wanted)


def test_other_text_under_the_same_comment() -> None:
    """A rule whose text alone differs is seen, by the digest of all: what nft lists can't be compared."""
    inside = replace(INSIDE, clamp_mss=True)
    smaller = tuple(replace(link, mtu=link.mtu - 100) for link in GATEWAY.links)
    wanted, present = table_of(inside), table_of(inside, facts=replace(GATEWAY, links=smaller))
    for one, other in zip(wanted.chains[1:], present.chains[1:], strict=True):
        assert [rule.comment for rule in one.rules] == [rule.comment for rule in other.rules]
    assert sorts(transaction(wanted, read_back(present))) == ["flush table", "add rule"]


STRANGERS = Table(
    "idmark", ("old",), (NftSet("theirs", "ipv4_addr"),), (Chain("mine", (FOREIGN,), Hook("filter", "forward", 0)),)
)


@pytest.mark.parametrize(
    ("field", "command", "rules_anew"),
    [
        pytest.param("chains", "delete chain inet idmark mine", True, id="chain"),
        pytest.param("sets", "delete set inet idmark theirs", True, id="set"),
        pytest.param("counters", "delete counter inet idmark old", False, id="counter"),
    ],
)
def test_stranger_in_our_table(field: str, command: str, rules_anew: bool) -> None:
    """What nobody wants in our table is deleted; of a chain or set the rules, which may hold on to it, go first."""
    wanted = table_of()
    there = read_back(wanted)
    everything = {name: getattr(there, name) for name in ("counters", "sets", "chains")}
    everything[field] += getattr(STRANGERS, field)
    commands = transaction(wanted, replace(there, **everything))
    assert [found for found in commands if found.startswith("delete")] == [command]
    assert (commands[0] == "flush table inet idmark") == rules_anew
    assert sum(found.startswith("add rule") for found in commands) == rule_count(wanted) * rules_anew
