"""One thing altered: the plan shows exactly it, an apply puts it right, and the counters go on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, OUTSIDE, WILD, Host

POLICY = policy_text({"members": MEMBERS, "when_down": "outside", "clamp_mss": True}, downstream=["lan"])


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    """With the policy in force, and packets counted."""
    lay_links(netns, peers("far"))
    netns.sysctl("net/ipv4/conf/vpn0/rp_filter", 1)
    admin = Admin(netns, tmp_path)
    admin.apply(POLICY)
    netns.send(WILD["ipv4"], INSIDE["ipv4"])
    netns.send(WILD["ipv6"], OUTSIDE["ipv6"])
    return admin


def alter(host: Host, commands: str) -> None:
    """Run commands of ip, nft and sysctl, one a line; no shell is between."""
    for line in commands.strip().splitlines():
        host.run(line.split())


def ordered(inventory: str) -> list[str]:
    """Without the order in which things were made."""
    return sorted(inventory.splitlines())


@pytest.mark.parametrize(
    ("alteration", "expected"),
    [
        pytest.param(
            "ip rule delete priority 4001 fwmark 0x1000000/0x3f000000 protocol 73",
            ["+ ip rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73"],
            id="rule-deleted",
        ),
        pytest.param(
            "ip -6 rule delete priority 4002 from 2001:db8:2::2 protocol 73",
            ["+ ip -6 rule add priority 4002 from 2001:db8:2::2 lookup 4002 protocol 73"],
            id="source-rule-deleted",
        ),
        pytest.param(
            "ip route delete unreachable default table 4001 metric 4294967295",
            ["+ ip route add unreachable default table 4001 metric 4294967295 protocol 73"],
            id="last-route-deleted",
        ),
        pytest.param(
            "ip -6 route delete 2001:db8:9::/64 table 4002",
            ["+ ip -6 route add 2001:db8:9::/64 dev lan table 4002 metric 256 protocol 73"],
            id="downstream-route-deleted",
        ),
        pytest.param(
            "ip route replace default via 203.0.113.77 dev wan table 4002 metric 1024 src 203.0.113.2 protocol 73",
            [
                "- ip route delete default via 203.0.113.77 dev wan table 4002 metric 1024 src 203.0.113.2 protocol 73",
                "+ ip route replace default via 203.0.113.1 dev wan table 4002 metric 1024 src 203.0.113.2 protocol 73",
            ],
            id="hop-replaced",
        ),
        pytest.param(
            "ip route add 10.99.0.0/16 dev lan table 4001 protocol 73",
            ["- ip route delete 10.99.0.0/16 dev lan table 4001 protocol 73"],
            id="route-of-ours-too-many",
        ),
        pytest.param(
            "ip route add blackhole 10.99.0.0/16 table 77 protocol 73",
            ["- ip route delete blackhole 10.99.0.0/16 table 77 protocol 73"],
            id="route-of-ours-elsewhere",
        ),
        pytest.param(
            "sysctl -qw net.ipv4.conf.vpn0.src_valid_mark=0",
            ["+ sysctl -w net/ipv4/conf/vpn0/src_valid_mark=1"],
            id="src_valid_mark-cleared",
        ),
        pytest.param(
            "nft delete element inet idmark sources-ipv4-24 { 10.9.0.0 }",
            ["+ nft add element inet idmark sources-ipv4-24 { 10.9.0.0 : goto id-inside }"],
            id="element-deleted",
        ),
        pytest.param(
            "nft add element inet idmark sources-ipv6-64 { 2001:db8:99:: : goto id-inside }",
            ["- nft delete element inet idmark sources-ipv6-64 { 2001:db8:99:: }"],
            id="element-added",
        ),
        pytest.param(
            "nft delete element inet idmark sources-ipv4-32 { 192.0.2.130 }\n"
            "nft add element inet idmark sources-ipv4-32 { 192.0.2.130 : goto id-outside }",
            [
                "- nft delete element inet idmark sources-ipv4-32 { 192.0.2.130 }",
                "+ nft add element inet idmark sources-ipv4-32 { 192.0.2.130 : goto id-inside }",
            ],
            id="verdict-altered",
        ),
        pytest.param(
            "nft delete element inet idmark diverted-ipv4 { 0x01000000 . wan }",
            ['+ nft add element inet idmark diverted-ipv4 { 0x01000000 . "wan" : "id-inside-ipv4-diverted" }'],
            id="counter-mapping-deleted",
        ),
        pytest.param(
            "nft delete element inet idmark left { 0x01000000 . vpn0 }",
            ['+ nft add element inet idmark left { 0x01000000 . "vpn0" : goto left-inside }'],
            id="goto-by-mark-and-link-deleted",
        ),
        pytest.param(
            "nft delete element inet idmark home-ipv6 { 2001:db8:4::130 . vpn0 }",
            ['+ nft add element inet idmark home-ipv6 { 2001:db8:4::130 . "vpn0" }'],
            id="address-and-link-deleted",
        ),
        pytest.param(
            "nft add element inet idmark downstream { eth9 }",
            ['- nft delete element inet idmark downstream { "eth9" }'],
            id="set-element-added",
        ),
        pytest.param(
            "nft delete counter inet idmark id-inside-ipv4-misrouted-passed",
            ["+ nft add counter inet idmark id-inside-ipv4-misrouted-passed"],
            id="counter-deleted",
        ),
        pytest.param(
            "nft add counter inet idmark id-stranger",
            ["- nft delete counter inet idmark id-stranger"],
            id="counter-added",
        ),
    ],
)
def test_one_alteration_is_the_whole_plan(admin: Admin, alteration: str, expected: list[str]) -> None:
    """The plan is the one thing that differs, and applying it gives back what was there, counters and all."""
    before = ordered(admin.inventory())
    alter(admin.host, alteration)
    assert ordered(admin.inventory()) != before
    assert admin.plan(POLICY).text.splitlines() == expected
    admin.apply(POLICY)
    assert ordered(admin.inventory()) == before


@pytest.mark.parametrize(
    "selector",
    [
        "iif lan",
        "oif wan",
        "tos 0x10",
        "to 198.18.0.0/15",
        "ipproto udp",
        "uidrange 0-0",
        "sport 1-2",
        "dport 53",
        "tun_id 7",
        "suppress_prefixlength 0",
        "suppress_ifgroup 3",
        "realms 5",
    ],
)
def test_a_narrower_twin_is_not_taken_for_ours(admin: Admin, selector: str) -> None:
    """A rule under our protocol number that says more than ours is one too many, and it alone is deleted."""
    before = admin.inventory()
    admin.host.ip_batch(
        f"rule add priority 4001 fwmark 0x1000000/0x3f000000 {selector} lookup 4001 protocol 73\n", "-4"
    )
    (line,) = admin.plan(POLICY).text.splitlines()
    marked = "(?=.* fwmark 0x1000000/0x3f000000 )"
    assert re.fullmatch(f"- ip rule delete priority 4001{marked} .+ lookup 4001 protocol 73", line)
    admin.apply(POLICY)
    assert admin.inventory() == before


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("priority 3999 fwmark 0/0x3f000000 lookup 4001", id="mark-0"),
        pytest.param("priority 3999 not fwmark 0x1000000/0x3f000000 lookup 4001", id="not"),
        pytest.param("priority 4001 fwmark 0x1000000 lookup 4001", id="no-mask"),
        pytest.param("priority 4001 fwmark 0x1000000/0x3f000000 lookup 4002", id="another-table"),
        pytest.param("priority 3999 fwmark 0x1000000/0x3f000000 lookup 4001", id="another-priority"),
        pytest.param("priority 3999 fwmark 0x1000000/0x3f000000 goto 4001", id="goto"),
        pytest.param("priority 3999 fwmark 0x1000000/0x3f000000 goto 5000", id="goto-nowhere"),
        pytest.param("priority 4001 fwmark 0x1000000/0x3f000000 blackhole", id="blackhole"),
        pytest.param("priority 4001 fwmark 0x1000000/0x3f000000 prohibit", id="prohibit"),
        pytest.param("priority 4001 fwmark 0x1000000/0x3f000000 unreachable", id="unreachable"),
        pytest.param("priority 4001 nop", id="nop"),
        pytest.param("priority 4001 l3mdev", id="l3mdev"),
        pytest.param("priority 4000 from all lookup 4001", id="from-all"),
        pytest.param("priority 0 fwmark 0x1000000/0x3f000000 lookup 4001", id="priority-0"),
    ],
)
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_a_strange_rule_under_our_number_goes(admin: Admin, family: str, rule: str) -> None:
    """Whatever else is made under our protocol number is ours to delete, and nothing else goes with it."""
    before = admin.inventory()
    admin.host.ip_batch(f"rule add {rule} protocol 73", family)
    assert len(admin.plan(POLICY).text.splitlines()) == 1
    admin.apply(POLICY)
    assert admin.inventory() == before


@pytest.mark.parametrize(
    ("option", "source", "twin"),
    [
        pytest.param("-4", "10.0.0.1/24", "10.0.0.2/24", id="ipv4"),
        pytest.param("-6", "2001:db8::1/64", "2001:db8::2/64", id="ipv6"),
    ],
)
def test_a_rule_with_host_bits_goes_alone(admin: Admin, option: str, source: str, twin: str) -> None:
    """A rule under our number whose source has host bits is deleted exactly, and no twin of somebody else's."""
    rule = ("rule", "add", "priority", "3999", "lookup", "100", "from")
    for foreign in (source, twin):
        admin.host.ip(option, *rule, foreign, "protocol", "static")
    before = admin.inventory()
    admin.host.ip(option, *rule, source, "protocol", "73")
    (line,) = admin.plan(POLICY).text.splitlines()
    assert line.startswith("- ip ")
    assert source.partition("/")[0] in line
    admin.apply(POLICY)
    assert admin.inventory() == before


def test_a_rule_that_names_no_mark_goes_in_two_passes(admin: Admin) -> None:
    """A rule for mark 0 at our priority, to our table: the kernel takes 0 for "any" in a delete, and ours goes first.

    So one pass is not enough, and `idmark apply` makes up to three: the next one adds ours and deletes the other.
    """
    alter(admin.host, "ip rule add priority 4001 fwmark 0/0x3f000000 lookup 4001 protocol 73")
    admin.apply(POLICY)
    assert [line[:2] for line in admin.plan(POLICY).text.splitlines()] == ["+ ", "- "]
    admin.apply(POLICY)
    assert not admin.plan(POLICY).text


#: Sets that are none of ours, of kinds that we have none of.
STRANGE_SETS = [
    pytest.param("set inet idmark stranger { type ipv4_addr; }", id="addresses"),
    pytest.param(
        "set inet idmark stranger { type ether_addr; flags interval; "
        "elements = { 00:01:02:03:04:05-00:01:02:03:04:09 }; }",
        id="interval-of-other-keys",
    ),
    pytest.param(
        "set inet idmark stranger { type ipv4_addr . inet_service; flags interval; "
        "elements = { 10.0.0.0/8 . 1-100 }; }",
        id="interval-of-several-keys",
    ),
    pytest.param(
        "map inet idmark stranger { type ipv4_addr : inet_service; elements = { 10.0.0.1 : 1, * : 2 }; }", id="data"
    ),
    pytest.param("map inet idmark stranger { type ipv4_addr : verdict; elements = { * : drop }; }", id="catch-all"),
    pytest.param(
        "map inet idmark stranger { type ipv6_addr : verdict; flags interval; elements = { * : drop }; }",
        id="catch-all-of-intervals",
    ),
]


@pytest.mark.parametrize("definition", STRANGE_SETS)
def test_a_strange_set_in_our_table_goes(admin: Admin, definition: str) -> None:
    """Whatever set somebody puts into our table, the plan says that it goes, and apply takes it and nothing else."""
    before, counts = ordered(admin.inventory()), admin.counts()
    admin.host.nft(f"add {definition}")
    keyword = definition.partition(" ")[0]
    assert f"- nft delete {keyword} inet idmark stranger" in admin.plan(POLICY).text.splitlines()
    admin.apply(POLICY)
    assert ordered(admin.inventory()) == before
    assert admin.counts() == counts


@pytest.mark.parametrize("definition", STRANGE_SETS)
def test_a_strange_set_is_no_obstacle_to_remove(admin: Admin, definition: str) -> None:
    """Whatever set is in our table, `remove` takes it along."""
    admin.host.nft(f"add {definition}")
    admin.remove()
    assert "idmark" not in admin.host.run(["nft", "list", "ruleset"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("marks", "", id="set"),
        pytest.param("own-link", "", id="set-of-several-keys"),
        pytest.param("diverted-ipv4", ' : "id-inside-ipv4-diverted"', id="map-of-counters"),
        pytest.param("sources-ipv4-24", " : goto id-inside", id="map-of-verdicts"),
    ],
)
def test_an_element_for_all_others_goes(admin: Admin, name: str, value: str) -> None:
    """A catch-all element in a set of ours, which makes every link everybody's own, goes alone."""
    before = ordered(admin.inventory())
    admin.host.nft(f"add element inet idmark {name} {{ *{value} }}")
    flushed, filled = admin.plan(POLICY).text.splitlines()
    kind = "map" if value else "set"
    assert flushed == f"- nft flush {kind} inet idmark {name}"
    assert re.fullmatch(rf"\+ nft add {kind} inet idmark {name} {{ type .+ elements = {{ [^*]+ }}; }}", filled)
    admin.apply(POLICY)
    assert ordered(admin.inventory()) == before


@pytest.mark.parametrize(
    "alteration",
    [
        pytest.param("nft add table inet idmark { flags dormant; }", id="dormant"),
        pytest.param("nft chain inet idmark postrouting { policy drop; }", id="policy-drop"),
        pytest.param(
            "nft chain inet idmark prerouting { policy drop; }\nnft add table inet idmark { flags dormant; }", id="both"
        ),
        pytest.param("nft flush chain inet idmark prerouting", id="chain-flushed"),
        pytest.param("nft flush chain inet idmark id-inside", id="identity-chain-flushed"),
        pytest.param("nft insert rule inet idmark postrouting accept", id="foreign-rule-first"),
        pytest.param("nft add rule inet idmark output meta mark set 0", id="foreign-rule-last"),
        pytest.param("nft delete chain inet idmark output", id="base-chain-deleted"),
        pytest.param("nft flush chain inet idmark postrouting\nnft delete chain inet idmark postrouting", id="flushed"),
        pytest.param("nft flush table inet idmark", id="table-flushed"),
        pytest.param("nft flush chain inet idmark leaving\nnft delete map inet idmark diverted-ipv4", id="map-deleted"),
        pytest.param("nft add chain inet idmark stranger", id="foreign-chain"),
    ],
)
def test_an_altered_table_is_put_right_and_counts_on(admin: Admin, alteration: str) -> None:
    """What is wrong with our rules is put right in the nft table alone, and no counter is lost."""
    before, counts = ordered(admin.inventory()), admin.counts()
    assert counts
    alter(admin.host, alteration)
    assert ordered(admin.inventory()) != before
    lines = admin.plan(POLICY).text.splitlines()
    assert lines
    assert all(line[2:].startswith("nft ") for line in lines)
    admin.apply(POLICY)
    assert ordered(admin.inventory()) == before
    assert admin.counts() == counts


@pytest.mark.parametrize("alteration", ["nft delete table inet idmark", "nft flush ruleset"])
def test_a_table_that_is_gone_is_loaded_anew(admin: Admin, alteration: str) -> None:
    """Without its table the plan is the whole rendered table, and nothing but it."""
    before = re.sub(r"packets \d+ bytes \d+", "packets 0 bytes 0", admin.inventory())
    alter(admin.host, alteration)
    lines = admin.plan(POLICY).text.splitlines()
    assert all(line[2:].startswith("nft ") for line in lines)
    assert lines[0] == "+ nft table inet idmark {"
    admin.apply(POLICY)
    assert admin.inventory() == before


def test_rules_of_another_protocol_number_are_not_counted_in(admin: Admin) -> None:
    """A twin of our rule under another number is foreign: it neither is deleted, nor does it stand in for ours."""
    twin = "fwmark 0x1000000/0x3f000000 lookup 4001 priority 4001"
    alter(admin.host, f"ip rule add {twin} protocol static\nip rule delete {twin} protocol 73")
    assert admin.plan(POLICY).text == (
        "+ ip rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73\n"
    )
    admin.apply(POLICY)
    assert admin.plan(POLICY).text == ""
    assert admin.host.ip("-N", "rule", "list", "priority", "4001").count("fwmark") == 2
