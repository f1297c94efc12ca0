"""Explanations: whose a packet is, by what, and which way it goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import render
from agent.addresses import Address, Family, Prefix
from agent.artefact import in_order, read
from agent.desired import Desired, desire
from agent.model import Facts, Fwmark, Kernel, Lookup, Policy, Rule
from agent.proof import Ask, Explanation, Loaded, Packet, arrival, decide, explain, route_of
from tests.unit.values import (
    DEFAULTS,
    GATEWAY,
    INSIDE,
    LAN,
    LO,
    OUTSIDE,
    VPN,
    WAN,
    host,
    hosts,
    identity,
    policies,
    policy,
)

BOTH = desire(policy(INSIDE, OUTSIDE), GATEWAY)
LOCAL = frozenset(item.address for link in GATEWAY.links for item in link.addresses)


def packet(source: str, destination: str, arriving: str | None = None) -> Packet:
    return Packet(ip_address(source), ip_address(destination), arriving)


def explained(
    sent: Packet,
    desired: Desired = BOTH,
    facts: Facts = GATEWAY,
    *,
    rules: Iterable[tuple[Rule, bool]] = (),
    ask: Ask | None = None,
) -> Explanation:
    """The packet's way by what is rendered; with `rules` or `ask`, that is loaded, and these rules besides, each
    with whether it is ours.
    """
    rendered = read(render.files(desired))
    others = tuple(rules)
    if not others and not ask:
        return explain(desired, facts, rendered, sent)
    present = in_order((*rendered.rules, *(rule for rule, _ in others)))
    foreign = frozenset(rule for rule, ours in others if not ours)
    loaded = Loaded(replace(rendered, rules=present, foreign=foreign), (), ask or (lambda *_: Lookup(4001, "vpn0")))
    return explain(desired, facts, rendered, sent, loaded)


def said(explanation: Explanation, what: str) -> list[str]:
    return [words for step, words in explanation.steps if step == what]


# --- whose it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "dropped"),
    [
        pytest.param(packet("192.0.2.130", "198.51.100.10", "lan"), True, id="own-source"),
        pytest.param(packet("192.0.2.130", "198.51.100.10"), False, id="its-own-packet"),
        pytest.param(packet("192.0.2.130", "203.0.113.2", "lo"), False, id="to-itself"),
        pytest.param(packet("10.9.0.5", "198.51.100.10", "lan"), False, id="a-member"),
        pytest.param(packet("2001:db8:4::130", "2001:db8:99::1", "lan"), False, id="ipv6"),
    ],
)
def test_who_claims_to_be_this_host(sent: Packet, dropped: bool) -> None:
    """With drop_own_sources a packet that arrives in this host's own name goes no further, and without it nothing says
    so.
    """
    dropping = desire(policy(INSIDE, OUTSIDE, kernel=Kernel(drop_own_sources=True)), GATEWAY)
    assert any("drop_own_sources" in words for words in said(explained(sent, dropping), "dropped")) == dropped
    assert said(explained(sent), "dropped") == []


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        pytest.param(packet("192.0.2.130", "198.51.100.10"), "inside: the source is its own address", id="own-source"),
        pytest.param(
            packet("10.9.0.5", "198.51.100.10", "lan"), "inside: the source is in its members, 10.9.0.0/24", id="member"
        ),
        pytest.param(
            packet("198.51.100.10", "203.0.113.2", "wan"),
            "outside: arrives on its link wan for 203.0.113.2",
            id="arriving-on-its-own-link",
        ),
        pytest.param(
            packet("192.0.2.50", "10.9.0.5", "vpn0"),
            "inside: arrives on its link vpn0 for 10.9.0.0/24",
            id="arriving-for-a-member",
        ),
        pytest.param(
            packet("192.0.2.50", "203.0.113.2", "vpn0"),
            "none: no identity's sources hold 192.0.2.50",
            id="arriving-elsewhere",
        ),
        pytest.param(
            packet("10.9.0.5", "192.0.2.130", "lan"),
            "inside: the source is in its members, 10.9.0.0/24",
            id="arriving-from-behind",
        ),
        pytest.param(
            packet("192.0.2.130", "203.0.113.2", "wan"),
            "outside: arrives on its link wan for 203.0.113.2",
            id="destination-before-source",
        ),
        pytest.param(
            packet("10.8.0.5", "198.51.100.10", "lan"), "none: no identity's sources hold 10.8.0.5", id="none"
        ),
        pytest.param(
            packet("2001:db8:4::130", "2001:db8::1"), "inside: the source is its own address", id="own-source-ipv6"
        ),
    ],
)
def test_decide(sent: Packet, why: str) -> None:
    """On an identity's own link the destination decides, everywhere else the source, and it is said which did."""
    assert decide(BOTH, sent).why == why
    assert explained(sent).steps[0] == ("identity", why)
    assert explained(sent).identity == (None if why.startswith("none") else why.partition(":")[0])


def test_longest_prefix_is_told_as_written() -> None:
    """Of two prefixes the longest decides, and is told as it stands in the policy, not as it was cut."""
    other = identity("other", 3, "vpn1", addresses=[], members=["10.0.0.0/8"])
    desired = desire(policy(INSIDE, other), GATEWAY)
    assert decide(desired, packet("10.9.0.5", "192.0.2.1")).why == "inside: the source is in its members, 10.9.0.0/24"
    assert decide(desired, packet("10.8.0.5", "192.0.2.1")).why == "other: the source is in its members, 10.0.0.0/8"


@pytest.mark.parametrize(
    ("arriving", "hook"), [pytest.param("lan", "prerouting", id="forwarded"), pytest.param(None, "output", id="local")]
)
def test_mark_step(arriving: str | None, hook: str) -> None:
    """It is said which hook and chain write the mark."""
    steps = explained(packet("10.9.0.5", "198.51.100.10", arriving))
    assert said(steps, "mark") == [f"0x1000000/0x3f000000, written in hook {hook} by chain id-inside"]


# --- which way it goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "route", "link"),
    [
        pytest.param(
            packet("192.0.2.130", "198.51.100.10"),
            "default dev vpn0 table 4001 metric 1024 src 192.0.2.130 protocol 73",
            "vpn0, its own",
            id="default",
        ),
        pytest.param(
            packet("10.9.0.5", "10.9.0.9"),
            "10.9.0.0/24 dev lan table 4001 src 10.9.0.1 protocol 73",
            "lan, behind this gateway",
            id="behind",
        ),
        pytest.param(
            packet("203.0.113.2", "192.0.2.50"),
            "default via 203.0.113.1 dev wan table 4002 metric 1024 src 203.0.113.2 protocol 73",
            "wan, its own",
            id="never-by-the-other-link",
        ),
    ],
)
def test_way(sent: Packet, route: str, link: str) -> None:
    """The identity's table alone is asked, whatever main says of the destination."""
    assert said(explained(sent), "route") == [route]
    assert said(explained(sent), "link") == [link]


def test_rules_of_both_lookups() -> None:
    """What this host sends from its own address its rule takes and, where that leads off its link, then the mark's;
    a member's packet the mark's alone.
    """
    mark = "priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73"
    own = "priority 4001 from 192.0.2.130 lookup 4001 protocol 73"
    assert said(explained(packet("192.0.2.130", "198.51.100.10")), "rule") == [own]
    assert said(explained(packet("192.0.2.130", "10.9.0.5")), "rule") == [own, mark]
    assert said(explained(packet("10.9.0.5", "198.51.100.10", "lan")), "rule") == [mark]


def test_closed() -> None:
    """A closed identity's packets are refused, and the reason is said."""
    facts = host(LO, WAN, replace(VPN, up=False, addresses=()), LAN, routes=DEFAULTS)
    steps = explained(packet("192.0.2.130", "198.51.100.10"), desire(policy(INSIDE, OUTSIDE), facts))
    assert said(steps, "route") == ["unreachable default table 4001 metric 4294967295 protocol 73"]
    assert said(steps, "link") == ["none: refused, link vpn0 is down"]


def test_detour() -> None:
    """A packet that takes the road of another identity is said to."""
    inside = replace(INSIDE, when_down="outside")
    facts = host(LO, WAN, replace(VPN, carrier=False), LAN, routes=DEFAULTS)
    steps = explained(packet("192.0.2.130", "198.51.100.10"), desire(policy(inside, OUTSIDE), facts))
    assert said(steps, "link") == ["wan, a road that when_down names"]


@pytest.mark.parametrize(
    ("enforce", "words"),
    [
        pytest.param(True, "whatever they say; misrouted packets are counted and dropped", id="enforce"),
        pytest.param(False, "whatever they say; misrouted packets are counted", id="count-only"),
    ],
)
def test_no_route_at_all(enforce: bool, words: str) -> None:
    """Where a table has nothing for a destination, the packet falls through to the host's other rules."""
    inside = replace(INSIDE, when_down="main")
    written = policy(inside)
    desired = desire(replace(written, kernel=replace(written.kernel, enforce=enforce)), host(LO))
    steps = explained(packet("192.0.2.130", "198.51.100.10"), desired)
    assert said(steps, "route") == ["none in table 4001: falls through to the next rules"]
    assert said(steps, "link") == [words]


def test_ipv6_only() -> None:
    """An identity of IPv6 alone has no IPv4 packet, and its IPv6 ones go its way."""
    six = identity("six", 1, "vpn0", addresses=["2001:db8:4::130"])
    desired = desire(policy(six), GATEWAY)
    assert explained(packet("192.0.2.130", "198.51.100.10"), desired).identity is None
    assert said(explained(packet("2001:db8:4::130", "2001:db8:ffff::1"), desired), "link") == ["vpn0, its own"]


def test_local_destination() -> None:
    """A packet for this host is taken by table local, before any rule of ours."""
    steps = explained(packet("10.9.0.5", "10.9.0.1", "lan"))
    assert said(steps, "rule") == ["priority 0 from all lookup local: it is for this host"]
    assert said(steps, "route") == []


def test_no_identity() -> None:
    """A packet of no identity is left to the host, and there is nothing to agree to."""
    steps = explained(packet("198.51.100.7", "198.51.100.10"), ask=lambda *_: Lookup(254, "wan"))
    assert (steps.identity, steps.agrees) == (None, None)
    assert said(steps, "mark") == ["none: the host's other rules and tables decide"]
    assert said(steps, "kernel") == ["dev wan table 254"]


# --- beside the kernel -----------------------------------------------------------------------------------------------

UNREACHABLE = desire(policy(INSIDE, OUTSIDE), host(LO, WAN, LAN, routes=DEFAULTS))
OPEN = desire(policy(replace(INSIDE, when_down="main")), host(LO))


@pytest.mark.parametrize(
    ("desired", "answer", "agrees"),
    [
        pytest.param(BOTH, Lookup(4001, "vpn0"), True, id="our-table-our-link"),
        pytest.param(BOTH, Lookup(4001, "wan"), False, id="our-table-another-link"),
        pytest.param(BOTH, Lookup(254, "vpn0"), False, id="another-table"),
        pytest.param(BOTH, Lookup(error="Network is unreachable"), False, id="refused"),
        pytest.param(UNREACHABLE, Lookup(error="Network is unreachable"), True, id="refused-as-wanted"),
        pytest.param(UNREACHABLE, Lookup(254, "wan"), False, id="open-though-closed"),
        pytest.param(OPEN, Lookup(254, "wan"), True, id="falls-through"),
        pytest.param(OPEN, Lookup(4001, "wan"), False, id="a-route-nobody-wants"),
    ],
)
def test_agrees(desired: Desired, answer: Lookup, agrees: bool) -> None:
    """The kernel agrees when it answers with our table and link, or refuses what is closed."""
    steps = explained(packet("192.0.2.130", "198.51.100.10"), desired, ask=lambda *_: answer)
    assert steps.agrees is agrees
    (words,) = said(steps, "kernel")
    expected = answer.error or f"dev {answer.link} table {answer.table}"
    assert words == f"{'agrees' if agrees else 'DISAGREES'}: {expected}"
    assert bool(said(steps, "remedy")) == (not agrees)


@pytest.mark.parametrize(
    ("answer", "agrees"),
    [pytest.param(Lookup(255, "lo"), True, id="local"), pytest.param(Lookup(4001, "vpn0"), False, id="elsewhere")],
)
def test_agrees_on_local(answer: Lookup, agrees: bool) -> None:
    """For a packet to this host the kernel is to answer with table local."""
    assert explained(packet("10.9.0.5", "10.9.0.1", "lan"), ask=lambda *_: answer).agrees is agrees


def test_question() -> None:
    """The kernel is asked about this very packet with its identity's mark; one of no identity is asked without."""
    asked: list[tuple[Packet, int]] = []

    def ask(sent: Packet, mark: int) -> Lookup:
        asked.append((sent, mark))
        return Lookup(4001, "vpn0")

    sent = [
        packet("10.9.0.5", "198.51.100.10", "lan"),
        packet("10.8.0.5", "198.51.100.10"),
        packet("10.9.0.5", "10.9.0.1"),
    ]
    for each in sent:
        explained(each, ask=ask)
    assert asked == list(zip(sent, [0x1000000, 0, 0x1000000], strict=True))


def test_without_asking() -> None:
    """Without the kernel nothing is said of it."""
    steps = explained(packet("192.0.2.130", "198.51.100.10"))
    assert steps.agrees is None
    assert said(steps, "kernel") == said(steps, "remedy") == []


FOREIGN = Rule(Family.IPV4, 100, 52, source=Prefix.parse("192.0.2.0/24"))


def test_what_is_loaded_is_told() -> None:
    """A mark that the loaded chains don't write is told, and that they are others than the rendered ones."""
    sent, rendered = packet("192.0.2.130", "198.51.100.10"), read(render.files(BOTH))
    for loaded, why in (
        (Loaded(replace(rendered, chains={}), (), lambda *_: Lookup(254, "wan")), "what is loaded makes it 0x0"),
        (Loaded(rendered, ("the nft table: is not there",), lambda *_: Lookup(254)), "the nft table: is not there"),
    ):
        steps = explain(BOTH, GATEWAY, rendered, sent, loaded)
        assert said(steps, "mark") == [f"NOT SO: 0x1000000/0x3f000000 is wanted, and {why}"]
        assert steps.agrees is False


def test_a_mark_that_is_not_written_is_no_agreement() -> None:
    """The kernel may agree about the mark that is wanted; a packet that doesn't get it goes another way."""
    sent, rendered = packet("192.0.2.130", "198.51.100.10"), read(render.files(BOTH))
    steps = explain(
        BOTH, GATEWAY, rendered, sent, Loaded(replace(rendered, chains={}), (), lambda *_: Lookup(4001, "vpn0"))
    )
    assert said(steps, "kernel") == ["agrees: dev vpn0 table 4001"]
    assert (steps.agrees, len(said(steps, "remedy"))) == (False, 1)


@pytest.mark.parametrize(
    ("sent", "hook"),
    [
        pytest.param(packet("10.9.0.5", "198.51.100.10", "lan"), "prerouting", id="forwarded"),
        pytest.param(packet("192.0.2.130", "198.51.100.10"), "postrouting", id="at-home"),
    ],
)
def test_where_the_mark_is_written(sent: Packet, hook: str) -> None:
    """The hook is told that wrote the mark which chose the route, also of packets that are translated."""
    translated = desire(policy(replace(INSIDE, masquerade=True), OUTSIDE), GATEWAY)
    (words,) = said(explained(sent, translated), "mark")
    assert f"written in hook {hook}" in words


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        pytest.param(packet("192.0.2.130", "198.51.100.10"), "passes, counted by id-inside-ipv4-transmit", id="own"),
        pytest.param(
            packet("10.9.0.5", "198.51.100.10", "lan"),
            "passes, as 192.0.2.130, counted by id-inside-ipv4-transmit",
            id="translated",
        ),
        pytest.param(packet("192.0.2.130", "10.9.0.5"), "passes", id="behind"),
    ],
)
def test_out(sent: Packet, words: str) -> None:
    """What happens to a packet as it leaves is told: its translation, and what counts it."""
    desired = desire(policy(replace(INSIDE, masquerade=True), OUTSIDE), GATEWAY)
    assert said(explained(sent, desired), "out") == [words]


@pytest.mark.parametrize(
    ("rule", "ours", "words"),
    [
        pytest.param(FOREIGN, False, ["priority 100 from 192.0.2.0/24 lookup 52"], id="before-ours"),
        pytest.param(replace(FOREIGN, source=None), False, ["priority 100 lookup 52"], id="from-all"),
        pytest.param(FOREIGN, True, [], id="our-own"),
        pytest.param(replace(FOREIGN, priority=4001), False, [], id="not-before"),
        pytest.param(replace(FOREIGN, priority=5270), False, [], id="behind"),
        pytest.param(replace(FOREIGN, priority=0, table=255), False, [], id="table-local"),
        pytest.param(replace(FOREIGN, source=Prefix.parse("10.0.0.0/8")), False, [], id="another-source"),
        pytest.param(replace(FOREIGN, source=None, family=Family.IPV6), False, [], id="another-family"),
        pytest.param(
            replace(FOREIGN, source=None, fwmark=Fwmark(0x1000000, 0xFF000000)),
            False,
            [],
            id="by-our-mark-that-it-gets-later",
        ),
        pytest.param(replace(FOREIGN, fwmark=Fwmark(0x80000, 0xFF0000)), False, [], id="by-another-mark"),
        pytest.param(
            replace(FOREIGN, extra=(("FRA_IIFNAME", "lan"),)),
            False,
            ["priority 100 from 192.0.2.0/24 FRA_IIFNAME lan lookup 52"],
            id="perhaps",
        ),
    ],
)
def test_foreign_rule(rule: Rule, ours: bool, words: list[str]) -> None:
    """A rule of somebody else's that takes the packet before ours is named; one that doesn't is not."""
    steps = explained(packet("192.0.2.130", "198.51.100.10"), rules=[(rule, ours)])
    assert said(steps, "before it") == [f"a rule of somebody else's: {found}" for found in words]


def test_foreign_rule_by_our_mark() -> None:
    """A foreign rule that looks at our mark takes what has it when its route is looked for."""
    marked = replace(FOREIGN, source=None, fwmark=Fwmark(0x1000000, 0xFF000000))
    steps = explained(packet("10.9.0.5", "198.51.100.10", "lan"), rules=[(marked, False)])
    assert said(steps, "before it") == ["a rule of somebody else's: priority 100 fwmark 0x1000000/0xff000000 lookup 52"]


def test_foreign_rule_by_one_bit_of_ours() -> None:
    """A foreign rule that looks at one bit of a mark takes every identity whose mark has it."""
    desired = desire(policy(identity("third", 3, "vpn0", members=["10.9.0.0/24"])), GATEWAY)
    bit = replace(FOREIGN, source=None, fwmark=Fwmark(0x1000000, 0x1000000))
    steps = explained(packet("10.9.0.5", "198.51.100.10", "lan"), desired, rules=[(bit, False)])
    assert said(steps, "before it") == ["a rule of somebody else's: priority 100 fwmark 0x1000000/0x1000000 lookup 52"]


def test_remedy_for_a_foreign_rule() -> None:
    """When the kernel disagrees and a foreign rule comes first, that is the remedy."""
    steps = explained(
        packet("192.0.2.130", "198.51.100.10"), rules=[(FOREIGN, False)], ask=lambda *_: Lookup(52, "tailscale0")
    )
    assert said(steps, "remedy") == ["move the rule that comes first behind ours, or ours before it (rule_priority)"]


# --- arrivals and lookups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "link"),
    [
        pytest.param("10.9.0.5", "lan", id="behind"),
        pytest.param("2001:db8:9::5", "lan", id="behind-ipv6"),
        pytest.param("10.9.0.1", None, id="this-host"),
        pytest.param("192.0.2.130", None, id="this-host-s-identity"),
        pytest.param("198.51.100.7", None, id="anywhere"),
        pytest.param("203.0.113.9", None, id="on-an-identity-s-link"),
    ],
)
def test_arrival(source: str, link: str | None) -> None:
    """A source behind the gateway arrives on the link of its network; for any other the operator says where."""
    assert arrival(BOTH, GATEWAY, ip_address(source)) == link


def test_arrival_by_the_longest_prefix() -> None:
    """Of two networks behind the gateway the longer one tells the link."""
    facts = host(LAN, replace(LAN, name="dmz", addresses=()), routes=["10.0.0.0/8 dev dmz", "10.9.0.5/32 dev dmz"])
    desired = desire(policy(INSIDE), facts)
    found = [arrival(desired, facts, ip_address(text)) for text in ("10.9.0.5", "10.9.0.6", "10.8.0.1")]
    assert found == ["dmz", "lan", "dmz"]


@given(policies(), hosts(), st.ip_addresses(network="198.18.0.0/21") | st.ip_addresses(network="2001:db8::/45"))
def test_route_of(written: Policy, facts: Facts, destination: Address) -> None:
    """The route of a destination holds it, and none that does is longer, or as long with a smaller metric."""
    desired = desire(written, facts)
    for each in written.identities:
        found = route_of(desired, each.table, destination)
        holding = [item for item in desired.routes if item.table == each.table and destination in item.destination]
        assert (found is None) == (not holding)
        for item in holding:
            assert found
            assert (item.destination.length, -item.metric) <= (found.destination.length, -found.metric)
            assert found in holding


@given(policies(), hosts(), st.ip_addresses(network="198.18.0.0/21"), st.ip_addresses(network="198.18.0.0/21"))
def test_decides_as_the_maps_do(written: Policy, facts: Facts, source: Address, destination: Address) -> None:
    """A local packet is the identity's in whose class its source lies: explained is what the kernel is given."""
    desired = desire(written, facts)
    owners = [
        span.identity
        for span in desired.classes
        if span.family is Family.IPV4 and span.first <= int(source) <= span.last
    ]
    found = explained(Packet(source, destination), desired, facts)
    assert not any(words.startswith("NOT") for _, words in found.steps)
    assert ([found.identity] if found.identity else []) == owners


def test_packet_text() -> None:
    """A packet is said with where it comes from."""
    assert str(packet("10.9.0.5", "10.9.0.1", "lan")) == "10.9.0.5 -> 10.9.0.1, arriving on lan"
    assert str(packet("10.9.0.5", "10.9.0.1")) == "10.9.0.5 -> 10.9.0.1, sent by this host"
