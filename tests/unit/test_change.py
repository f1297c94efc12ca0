"""What a policy changes in meaning, in the words of who operates the gateway."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv6Address
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Family, Prefix, Prefixes, parse_address
from agent.change import CHANGED, GONE, NEW, SAME, Change, change, plain
from agent.desired import GUARDED, desire, sources_of
from agent.model import Facts, Identity, Kernel, Policy, Probe
from agent.policy import load
from agent.prefixes import lookup, pairs
from agent.settings import EFFECTS
from tests.unit.values import GATEWAY, host, hosts, identity, policies, policy, prefixes, toml

INSIDE = identity("inside", 1, "wg0", addresses=["192.0.2.130"], members=["10.9.0.0/24", "10.9.7.0/24"])
OUTSIDE = identity("outside", 2, "wan", addresses=["203.0.113.2"], members=["10.9.0.0/16"], next_hop=["203.0.113.1"])
BEFORE = policy(INSIDE, OUTSIDE)


def to(after: Policy, before: Policy = BEFORE, facts: Facts | None = None) -> Change:
    """What a policy changes."""
    return change(desire(before, facts), desire(after, facts))


def members(each: tuple[str, ...]) -> Prefixes:
    return prefixes(*each)


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        pytest.param(
            ("10.9.0.0/24",),
            ("10.9.0.0/16",),
            "10.9.7.0/24 moves from inside to outside: leaves by wan, not wg0",
            id="moves",
        ),
        pytest.param(
            ("10.9.0.0/24",),
            ("10.9.0.0/24",),
            None,
            id="same-prefix-in-two",
        ),
        pytest.param(
            ("10.9.0.0/24", "10.9.7.0/24", "10.8.0.0/24"),
            ("10.9.0.0/16",),
            "10.8.0.0/24 gets an identity (inside): leaves by wg0, and by table main no longer",
            id="gets",
        ),
    ],
)
def test_sources(inside: tuple[str, ...], outside: tuple[str, ...], expected: str | None) -> None:
    """Where sources go is said by both identities, and by both links."""
    after = policy(replace(INSIDE, members=members(inside)), replace(OUTSIDE, members=members(outside)))
    if expected is None:
        with pytest.raises(ValueError, match="is a source of"):
            to(after)
        return
    found = to(after)
    assert [f"{' '.join(map(str, move.prefixes))} {found.fate_of(move)}" for move in found.moves] == [expected]


def test_losing_an_identity_is_a_risk() -> None:
    """Sources that were an identity's and are nobody's go by table main: that is said first, and as a risk."""
    found = to(policy(replace(INSIDE, members=members(("10.9.0.0/24",))), replace(OUTSIDE, members=Prefixes())))
    assert found.risks[0].endswith("lose their identity (outside): go by table main")
    assert "10.9.7.0/24 loses its identity (inside): goes by table main" in found.risks


def test_same_link() -> None:
    """Identities that share a link are told apart by more than it: it stays the same."""
    twin = replace(OUTSIDE, link="wg0")
    found = to(policy(replace(INSIDE, members=Prefixes()), twin), policy(INSIDE, twin))
    assert [found.fate_of(move) for move in found.moves] == ["move from inside to outside: by wg0 still"]


@given(policies(), policies(), st.none() | hosts())
def test_a_move_is_another_owner(before: Policy, after: Policy, facts: Facts | None) -> None:
    """For every address: a change is told just when the longest prefix gives it to another identity.

    One that has only another name is the same identity. What stands for "auto" on the host counts.
    """
    found = to(after, before, facts)
    names = {part.before.name: part.name for part in found.parts if part.before and part.after}
    sides = [
        {known.get(name, name): held for name, held in sources_of(desire(each, facts).standings).items()}
        for each, known in ((before, names), (after, {}))
    ]
    for prefix, _ in chain.from_iterable(map(pairs, sides)):
        for number in {prefix.address - 1, prefix.address, prefix.last, prefix.last + 1}:
            if 0 <= number < 1 << prefix.family.bits:
                address = (IPv4Address if prefix.family is Family.IPV4 else IPv6Address)(number)
                owners = tuple(source and source[1] for source in (lookup(side, address) for side in sides))
                told = [(move.before, move.after) for move in found.moves for p in move.prefixes if address in p]
                assert told == ([owners] if owners[0] != owners[1] else [])


@given(policies(), st.none() | hosts(), st.randoms(use_true_random=False))
def test_spelling_changes_nothing(written: Policy, facts: Facts | None, luck: random.Random) -> None:
    """Two files that mean the same change nothing, in meaning or in text, in whatever order their tables stand."""
    head, *tables = toml(written).split("\n[")
    luck.shuffle(tables)
    with TemporaryDirectory() as folder:
        one, other = Path(folder, "one.toml"), Path(folder, "other.toml")
        one.write_text(toml(written), encoding="utf-8")
        other.write_text("# another spelling\n" + "\n[".join([head, *tables]), encoding="utf-8")
        found = to(load(other), load(one), facts)
    assert found.nothing
    assert (found.headline, found.risks, found.texts) == ("nothing changes", (), ())


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(("10.9.0.0/17", "10.9.128.0/17"), id="halves"),
        pytest.param(("10.9.0.0/16", "10.9.200.0/24"), id="one-inside-another"),
    ],
)
def test_text_alone(others: tuple[str, ...]) -> None:
    """Another way to write the same sources changes the text that is loaded, and that is said to be all."""
    found = to(policy(INSIDE, replace(OUTSIDE, members=members(others))))
    assert (found.means, found.nothing) == (False, False)
    assert found.headline == "nothing changes in meaning; the text does"


# --- identities ------------------------------------------------------------------------------------------------------

PROBE = Probe(parse_address("192.0.2.53"), 2.0, 3)


@pytest.mark.parametrize(
    ("changes", "key", "effect", "risky"),
    [
        pytest.param({"link": "wg1"}, "link", "its packets leave by wg1, not wg0", False, id="link"),
        pytest.param({"next_hop": "auto"}, "next_hop", "its default is main's on wg0", False, id="next-hop-auto"),
        pytest.param(
            {"next_hop": (parse_address("192.0.2.129"),)},
            "next_hop",
            "its default leads by 192.0.2.129",
            False,
            id="next-hop",
        ),
        pytest.param(
            {"when_down": "main"},
            "when_down",
            "while wg0 is down its packets leave by whatever table main says",
            True,
            id="when-down-main",
        ),
        pytest.param(
            {"when_down": "outside"}, "when_down", "while wg0 is down its packets leave by wan", True, id="when-down"
        ),
        pytest.param(
            {"masquerade": True}, "masquerade", "members leave by wg0 under its own address", False, id="masquerade"
        ),
        pytest.param(
            {"clamp_mss": True}, "clamp_mss", "the MSS of TCP is clamped to the path MTU of wg0", False, id="clamp-mss"
        ),
        pytest.param(
            {"probe": PROBE},
            "probe",
            "it counts as down, too, while 192.0.2.53 does not answer by wg0",
            False,
            id="probe",
        ),
        pytest.param(
            {"flush_flows": True}, "flush_flows", "its connections begin anew when its road changes", False, id="flows"
        ),
        pytest.param(
            {"addresses": (parse_address("192.0.2.130"), parse_address("192.0.2.131"))},
            "addresses",
            "this host speaks as it from 192.0.2.131",
            False,
            id="addresses",
        ),
        pytest.param(
            {"addresses": None},
            "addresses",
            "this host speaks as it from whatever global addresses wg0 has",
            False,
            id="addresses-auto",
        ),
    ],
)
def test_setting(changes: dict[str, object], key: str, effect: str, risky: bool) -> None:
    """A setting is told by its key and what it does to packets; one that opens something is a risk."""
    found = to(policy(replace(INSIDE, **changes), OUTSIDE))  # type: ignore[arg-type]
    (part,) = [each for each in found.parts if each.fate == CHANGED]
    (setting,) = part.settings
    assert (part.name, setting.key, setting.effect, setting.risky) == ("inside", key, effect, risky)
    assert found.risks == ((f"identity inside: {effect}",) if risky else ())


@pytest.mark.parametrize(
    ("changes", "key", "effect", "risky"),
    [
        pytest.param(
            {"masquerade": True},
            "masquerade",
            "members are not translated any more: wg0 shows their own addresses",
            True,
            id="masquerade",
        ),
        pytest.param(
            {"when_down": "main"}, "when_down", "while wg0 is down its packets are refused", False, id="when-down"
        ),
        pytest.param(
            {"probe": PROBE},
            "probe",
            "it counts as down only while its link is: a dead far end goes unnoticed",
            False,
            id="probe",
        ),
    ],
)
def test_setting_taken_back(changes: dict[str, object], key: str, effect: str, risky: bool) -> None:
    """What is no longer asked for is told as well, by what is not done any more."""
    found = to(BEFORE, policy(replace(INSIDE, **changes), OUTSIDE))  # type: ignore[arg-type]
    (setting,) = next(part for part in found.parts if part.fate == CHANGED).settings
    assert (setting.key, setting.effect, setting.risky) == (key, effect, risky)


def test_detour_of_another() -> None:
    """Who goes by another identity's road while its link is down is told when that road goes further than before."""
    before = policy(replace(INSIDE, when_down="outside"), OUTSIDE)
    found = to(policy(replace(INSIDE, when_down="outside"), replace(OUTSIDE, when_down="main")), before)
    told = {part.name: setting.after for part in found.parts for setting in part.settings}
    assert told == {"inside": "the road of outside, then table main", "outside": "table main"}
    assert len(found.risks) == 2


def test_new_and_gone() -> None:
    """An identity that comes is told with what it does, one that goes is a risk; the sources of both change hands."""
    guests = identity("guests", 3, "wlan1", addresses=["198.51.100.7"])
    found = to(policy(INSIDE, guests), BEFORE)
    assert {part.name: part.fate for part in found.parts} == {"inside": SAME, "outside": GONE, "guests": NEW}
    assert "identity outside is gone: its link, table and counters with it" in found.risks
    new = {setting.key: setting.after for part in found.parts if part.fate == NEW for setting in part.settings}
    assert new == {
        "id": "3",
        "link": "wlan1",
        "addresses": "198.51.100.7",
        "next_hop": "none",
        "when_down": "closed",
        "fwmark": "0x3000000/0x3f000000",
        "table": "4003",
        "rule priority": "4003",
    }
    assert [(move.before, move.after) for move in found.moves] == [("outside", None), (None, "guests")]


def test_renamed() -> None:
    """An identity with another name, and the id and the link that it had, is the same: no source changes hands."""
    found = to(
        policy(replace(INSIDE, name="corp"), replace(OUTSIDE, when_down="corp")),
        policy(INSIDE, replace(OUTSIDE, when_down="inside")),
    )
    assert not found.moves
    (part,) = [each for each in found.parts if each.fate != SAME]
    assert [(each.key, each.before, each.after) for each in part.settings] == [("name", "inside", "corp")]


def test_ids_exchanged() -> None:
    """Two identities that exchange their ids are renumbered: no packet takes another way."""
    found = to(
        policy(
            identity("inside", 2, "wg0", addresses=["192.0.2.130"]),
            identity("outside", 1, "wan", addresses=["203.0.113.2"]),
        ),
        policy(
            identity("inside", 1, "wg0", addresses=["192.0.2.130"]),
            identity("outside", 2, "wan", addresses=["203.0.113.2"]),
        ),
    )
    assert not found.moves
    assert [each.key for each in found.parts[0].settings] == ["id", "fwmark", "table", "rule priority"]


def test_auto_is_unknown() -> None:
    """Without facts nobody knows what "auto" stands for: an address that was written down is not said to be lost."""
    found = to(policy(INSIDE, replace(OUTSIDE, addresses=None)))
    (move,) = found.moves
    assert found.fate_of(move) == "is no longer written down for outside, and stays so as long as wan has it"
    assert not found.risks
    assert any('its own addresses are "auto"' in note for note in found.notes)


def test_auto_is_known() -> None:
    """With facts "auto" is what the host has, and an address that it does not have is lost."""
    found = to(policy(INSIDE, replace(OUTSIDE, addresses=None)), facts=GATEWAY)
    assert [f"{move.prefixes[0]} {found.fate_of(move)}" for move in found.moves] == [
        "2001:db8:203::2 gets an identity (outside): leaves by wan, and by table main no longer"
    ]
    found = to(policy(INSIDE, replace(OUTSIDE, addresses=None)), facts=host())
    assert [found.fate_of(move) for move in found.moves] == ["loses its identity (outside): goes by table main"]


def test_closed_is_noted() -> None:
    """A family that the policy leaves without a next hop is said to be closed."""
    guests = identity("guests", 3, "wlan1", addresses=["198.51.100.7", "2001:db8::7"], next_hop=["198.51.100.1"])
    assert to(policy(INSIDE, OUTSIDE, guests)).notes == (
        "identity guests: ipv6 is closed: the policy names no ipv6 next hop",
    )


# --- the gateway -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "key", "risky"),
    [
        pytest.param(lambda: replace(BEFORE, gateway="gw2"), "gateway", False, id="name"),
        pytest.param(lambda: replace(BEFORE, downstream=("lan",)), "downstream", False, id="downstream"),
        pytest.param(lambda: replace(BEFORE, kernel=Kernel(enforce=False)), "kernel.enforce", True, id="enforce"),
        pytest.param(
            lambda: replace(BEFORE, kernel=Kernel(hook_priority=-140)), "kernel.hook_priority", False, id="hook"
        ),
        pytest.param(
            lambda: replace(BEFORE, kernel=Kernel(nft_table="idmark2")), "kernel.nft_table", False, id="table"
        ),
    ],
)
def test_gateway(made: Callable[[], Policy], key: str, risky: bool) -> None:
    """What concerns the whole gateway is told apart; not to enforce is a risk, to enforce again is none."""
    found = to(made())
    (setting,) = found.gateway
    assert (setting.key, setting.risky, bool(setting.effect)) == (key, risky, True)
    assert not any(each.risky for each in to(BEFORE, made()).gateway)


def test_own_sources() -> None:
    """That nobody drops any more what claims to be this host is a risk; that somebody does is none."""
    dropping = replace(BEFORE, kernel=Kernel(drop_own_sources=True))
    for settings, risky in ((to(dropping).gateway, False), (to(BEFORE, dropping).gateway, True)):
        (setting,) = settings
        assert (setting.key, setting.risky) == ("kernel.drop_own_sources", risky)


def test_renumbered() -> None:
    """Another base renumbers every identity's table, and each is told."""
    kernel = Kernel(table_base=5000)
    after = replace(policy(replace(INSIDE, table=5001), replace(OUTSIDE, table=5002)), kernel=kernel)
    found = to(after)
    assert [setting.key for setting in found.gateway] == ["kernel.table_base"]
    assert {part.name: [(each.before, each.after) for each in part.settings] for part in found.parts} == {
        "inside": [("4001", "5001")],
        "outside": [("4002", "5002")],
    }


def test_guards_are_lost() -> None:
    """Members of so many prefixes that no rule closes them any more without the ruleset: that is a risk."""
    many = tuple(Prefix(Family.IPV4, (11 << 24) + (number << 9), 24) for number in range(GUARDED + 1))
    found = to(policy(replace(INSIDE, members=Prefixes.of(many)), OUTSIDE))
    (setting,) = found.gateway
    assert (setting.key, setting.before, setting.after, setting.risky) == ("ipv4 guard rules", "yes", "no", True)


@pytest.mark.parametrize("key", [each.name for each in fields(Kernel)])
def test_every_setting_of_the_kernel(key: str) -> None:
    """No key of [kernel] can change without being told."""
    value = getattr(Kernel(), key)
    other: Any = (
        f"{value}_2" if isinstance(value, str) else not value if value is None or isinstance(value, bool) else value + 1
    )
    found = to(replace(BEFORE, kernel=replace(Kernel(), **{key: other})))
    assert [setting.key for setting in found.gateway] == [f"kernel.{key}"]


def test_every_setting_of_an_identity() -> None:
    """No key of an identity can change without being told; its members are told as what changes hands, and the number
    of its way out is a part of its fwmark.
    """
    keys = {each.name for each in fields(Identity)} - {"members", "priority", "way"}
    assert {*EFFECTS} == keys | {"rule priority"}


# --- the whole -------------------------------------------------------------------------------------------------------


def test_text_differs() -> None:
    """Behind the meaning stands how the rendered files differ; the policy's digest is no difference."""
    found = to(replace(policy(replace(INSIDE, link="wg1"), OUTSIDE), digest="1" * 64))
    assert [each.name for each in found.texts] == ["ruleset.nft", "routing.txt"]
    lines = [line for each in found.texts for line in each.lines]
    assert "+ip route replace default dev wg1 table 4001 metric 1024 src 192.0.2.130 protocol 73" in lines
    assert not any("policy sha256" in line for line in lines)


def test_plain() -> None:
    """For a program: what changes hands with every prefix, and what else changes."""
    found = plain(to(policy(replace(INSIDE, members=members(("10.9.0.0/24",)), masquerade=True), OUTSIDE)))
    assert found["moves"] == [{"from": "inside", "to": "outside", "prefixes": ["10.9.7.0/24"]}]
    assert found["identities"] == [
        {
            "name": "inside",
            "fate": "changed",
            "settings": [
                {
                    "key": "masquerade",
                    "before": "no",
                    "after": "yes",
                    "effect": "members leave by wg0 under its own address",
                }
            ],
        }
    ]


def test_hundred_thousand() -> None:
    """Two policies of 100,000 prefixes each are compared, in meaning and in text."""
    networks = tuple(Prefix(Family.IPV4, (10 << 24) + (number << 9), 24) for number in range(100_000))
    found = to(
        policy(replace(INSIDE, members=Prefixes.of(networks[::2]))),
        policy(replace(INSIDE, members=Prefixes.of(networks))),
    )
    assert [(move.before, move.after, len(move.prefixes)) for move in found.moves] == [("inside", None, 50_000)]
