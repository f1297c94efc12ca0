"""Apply and remove: what is put into the kernel, what a second pass sends, and what is left when all is taken away."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from agent import facts, reconcile, render
from agent.addresses import Family
from agent.desired import desire
from agent.kernel import KernelError
from agent.kernel.rtnl import Rtnl
from agent.model import Fwmark, Rule
from agent.plan import Load
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import CORP, INSIDE, OUTSIDE, WILD, Host

# linux/rtnetlink.h: links, addresses, routes, rules and netconf of both families; linux/netfilter/nfnetlink.h.
RTNLGRP = (1, 5, 7, 8, 9, 11, 19, 24, 25)
NFNLGRP_NFTABLES = 7
NETLINK_NETFILTER = 12


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    lay_links(netns, peers("far"))
    return Admin(netns, tmp_path)


def of_family(family: str) -> str:
    """A policy of one family only."""
    return policy_text(
        {"addresses": [INSIDE[family]], "next_hop": [CORP[family]]},
        {"addresses": [OUTSIDE[family]]},
        downstream=["lan"],
    )


BACKUP = {
    "id": 4,
    "link": "wan",
    "addresses": ["203.0.113.3"],
    "next_hop": ["203.0.113.200"],
    "clamp_mss": True,
    "when_down": "outside",
}

#: One of everything. `staff` shares vpn0 with `inside`, and `backup` shares wan with `outside`.
EVERYTHING = policy_text(
    {"members": MEMBERS, "masquerade": True, "clamp_mss": True, "when_down": "backup"},
    {"addresses": [*OUTSIDE.values()], "when_down": "main"},
    staff={
        "id": 3,
        "link": "vpn0",
        "addresses": ["192.0.2.131", "2001:db8:4::131"],
        "members": ["file:staff.txt", "10.9.0.128/25"],
        "next_hop": ["192.0.2.200", "2001:db8:4::200"],
        "masquerade": True,
        "when_down": "inside",
    },
    backup=BACKUP,
    kernel={"enforce": False},
    downstream=["lan"],
)


def write_staff(directory: Path, count: int = 900) -> None:
    """A list of member prefixes, one a line, every third an IPv6 one.

    More need a larger socket buffer for libnftables' transaction than the kernel grants in a user namespace.
    """
    lines = [f"2001:db8:{n:x}::/48" if n % 3 == 0 else f"172.{16 + n // 256}.{n % 256}.0/24" for n in range(count)]
    (directory / "staff.txt").write_text("\n".join(["# staff", *lines]))


POLICIES = pytest.mark.parametrize(
    "text",
    [
        pytest.param(policy_text(), id="small"),
        pytest.param(EVERYTHING, id="everything"),
        pytest.param(of_family("ipv4"), id="ipv4-only"),
        pytest.param(of_family("ipv6"), id="ipv6-only"),
    ],
)


@POLICIES
def test_a_second_apply_sends_nothing(admin: Admin, text: str) -> None:
    """After an apply the plan is empty, and netlink announces nothing during a second one."""
    write_staff(admin.directory)
    assert admin.apply(text).steps
    with (
        admin.host.events(socket.NETLINK_ROUTE, *RTNLGRP) as routing,
        admin.host.events(NETLINK_NETFILTER, NFNLGRP_NFTABLES) as nft,
    ):
        assert admin.apply(text).text == ""
        assert routing.kinds() == nft.kinds() == []
        # And they do listen.
        admin.host.ip("rule", "add", "priority", "1", "lookup", "1")
        admin.host.nft("add table inet other")
        assert routing.kinds()
        assert nft.kinds()


@POLICIES
def test_remove_gives_back_the_machine(admin: Admin, text: str) -> None:
    """After `remove` ruleset, rules, routes of all tables and sysctls are byte for byte as before; again is nothing."""
    write_staff(admin.directory)
    admin.host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    before = admin.inventory()
    admin.apply(text)
    assert admin.inventory() != before
    assert admin.remove().steps
    assert admin.inventory() == before
    assert not admin.remove().steps


# --- changes of policy -----------------------------------------------------------------------------------------------

BASE = policy_text({"members": MEMBERS})


def test_no_change_in_another_namespace(netns: Host, peers: Peers) -> None:
    """Who was opened in one network namespace refuses to change another one, where the thread has gone since."""
    other = peers("other")
    before = [host.ip("rule") for host in (netns, other)]
    with Rtnl() as rtnl, other.inside(), pytest.raises(KernelError, match="gone to another network namespace"):
        rtnl.add_rule(Rule(Family.IPV4, 4001, 4001, fwmark=Fwmark(1 << 24, 0x3F000000)))
    assert [host.ip("rule") for host in (netns, other)] == before


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(policy_text({"members": MEMBERS}, backup=BACKUP), id="identity"),
        pytest.param(
            policy_text({"members": MEMBERS, "link": "wan", "next_hop": ["203.0.113.9", "2001:db8:2::9"]}), id="link"
        ),
        pytest.param(policy_text({"members": MEMBERS, "id": 9}), id="id"),
        pytest.param(policy_text({"members": MEMBERS, "id": 2}, {"id": 1}), id="ids-exchanged"),
        pytest.param(policy_text({"members": MEMBERS}, kernel={"table_base": 5000}), id="table_base"),
        pytest.param(policy_text({"members": MEMBERS}, kernel={"rule_priority": 3000}), id="rule_priority"),
        pytest.param(policy_text({"members": MEMBERS}, kernel={"mark_mask": 0x00FF0000}), id="mark_mask"),
        pytest.param(policy_text({"members": MEMBERS}, kernel={"hook_priority": -120}), id="hook_priority"),
        pytest.param(policy_text({"members": MEMBERS}, kernel={"enforce": False}), id="enforce"),
        pytest.param(policy_text({"members": ["10.9.0.0/25", "10.10.0.0/16"]}), id="members"),
        pytest.param(policy_text({}, {"members": MEMBERS}), id="members-of-another"),
        pytest.param(policy_text({"members": MEMBERS, "masquerade": True, "clamp_mss": True}), id="translation"),
        pytest.param(policy_text({"members": MEMBERS, "when_down": "outside"}), id="when_down"),
        pytest.param(policy_text({"members": MEMBERS}, {"when_down": "main"}), id="when_down-main"),
        pytest.param(policy_text({"members": MEMBERS}, downstream=["lan"]), id="downstream"),
        pytest.param(policy_text({"members": MEMBERS, "next_hop": "none"}), id="next_hop"),
    ],
)
def test_a_change_of_policy_there_and_back(admin: Admin, changed: str) -> None:
    """After a change of policy, and after taking it back, all is as if it were the first; the counters go on."""
    admin.apply(changed)
    there = settled(admin)
    admin.remove()
    admin.apply(BASE)
    back = settled(admin)
    admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
    admin.host.send(WILD["ipv6"], OUTSIDE["ipv6"])
    counts = admin.counts()
    assert counts
    for text, fresh in ((changed, there), (BASE, back)):
        admin.apply(text)
        assert admin.plan(text).text == ""
        assert settled(admin) == fresh
        assert admin.counts() == counts


def settled(admin: Admin) -> list[str]:
    """The inventory without the values of counters and without the order in which things were made."""
    return sorted(re.sub(r"packets \d+ bytes \d+", "", admin.inventory()).splitlines())


def test_another_name_for_the_table(admin: Admin) -> None:
    """When the policy names the table otherwise, the new one is there before the old one goes; `remove` finds it."""
    before = admin.inventory()
    admin.apply(BASE)
    plan = admin.apply(policy_text(kernel={"nft_table": "idmark_2"}))
    # Two transactions: maps that come in one with the rules which use them let packets pass unmarked.
    first, second = (step.text for step in plan.steps if isinstance(step, Load))
    assert "table inet idmark_2 {" in first
    assert second == "delete table inet idmark\n"
    assert re.findall("^table .*", admin.inventory(), re.MULTILINE) == ["table inet idmark_2 {"]
    admin.remove()
    assert admin.inventory() == before


# --- what is not ours ------------------------------------------------------------------------------------------------

FOREIGN_ROUTING = """
    rule add priority 100 fwmark 0x1/0xff lookup 100
    rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol static
    rule add priority 4002 from 203.0.113.2 lookup 4002
    rule add priority 220 not fwmark 0xca6c lookup 220
    rule add priority 100 from 10.0.0.1/24 lookup 100
    route add 10.77.0.0/16 via 203.0.113.1 table 4001
    route add default via 203.0.113.1 table 4001 metric 77 protocol static
    route add blackhole 10.78.0.0/16 table 4002
    route add 2001:db8:77::/64 via 2001:db8:2::1 table 4001
    route add 198.18.0.0/15 via 192.0.2.129 protocol bgp
"""
FOREIGN_RULES6 = """
    rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol static
    rule add priority 220 not fwmark 0xca6c lookup 220
    rule add priority 100 from 2001:db8::1/64 lookup 100
"""
FOREIGN_NFT = """
    table inet idmark_mine {
        counter n { packets 7 bytes 700; }
        chain prerouting {
            type filter hook prerouting priority mangle; policy accept;
            meta mark set ct mark
        }
    }
    table ip nat {
        chain postrouting {
            type nat hook postrouting priority srcnat; policy accept;
            oifname "eth9" masquerade
        }
    }
"""


def foreign(inventory: str) -> list[str]:
    """What is neither of our protocol number, nor in our table, nor one of the sysctls that we may set."""
    without_table = re.sub(r"^table inet idmark \{.*?^\}$", "", inventory, flags=re.DOTALL | re.MULTILINE)
    ours = re.compile(r"proto 73|/(wan|vpn0)/src_valid_mark ")
    return [line for line in without_table.splitlines() if line and not ours.search(line)]


def test_what_is_not_ours_stays(admin: Admin) -> None:
    """Foreign rules, routes (in our tables too), nft tables and sysctls outlive every verb, byte for byte."""
    write_staff(admin.directory)
    admin.host.ip_batch(FOREIGN_ROUTING)
    admin.host.ip_batch(FOREIGN_RULES6, "-6")
    admin.host.nft(FOREIGN_NFT)
    for key, value in {
        "all/rp_filter": 1,
        "lan/src_valid_mark": 1,
        "wan/src_valid_mark": 1,
        "lan/rp_filter": 2,
    }.items():
        admin.host.sysctl(f"net/ipv4/conf/{key}", value)
    before = admin.inventory()
    for text in (BASE, BASE, EVERYTHING, policy_text(kernel={"table_base": 5000, "mark_mask": 0xFF0000})):
        admin.apply(text)
        assert admin.plan(text).text == ""
        assert foreign(admin.inventory()) == foreign(before)
    admin.remove()
    assert admin.inventory() == before


def test_a_foreign_route_in_our_place_is_reported_and_stays(admin: Admin) -> None:
    """Where somebody else's route has the place of one of ours, apply says so, and changes nothing."""
    admin.host.ip("route", "add", "default", "via", "203.0.113.9", "table", "4001", "metric", "1024", "proto", "static")
    before = admin.inventory()
    with pytest.raises(reconcile.ApplyError, match=r"table 4001 metric 1024 .*File exists"):
        admin.apply(BASE)
    assert admin.inventory() == before


# --- remove ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("nft flush ruleset", id="ruleset"),
        pytest.param("nft delete chain inet idmark postrouting", id="chain"),
        pytest.param("nft flush table inet idmark", id="digest"),
        pytest.param("ip rule flush protocol 73", id="rules"),
        pytest.param("ip -6 rule delete priority 4001 protocol 73", id="rule"),
        pytest.param("ip route flush table 4001", id="routes"),
        pytest.param("ip -6 route delete default metric 1024 table 4001", id="route"),
        pytest.param("sysctl -qw net.ipv4.conf.vpn0.src_valid_mark=0", id="sysctl"),
    ],
)
def test_remove_when_half_of_it_is_gone(admin: Admin, damage: str) -> None:
    """What is missing already is no obstacle: `remove` takes the rest."""
    admin.host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    before = admin.inventory()
    admin.apply(BASE)
    admin.host.run(damage.split())
    admin.remove()
    assert admin.inventory() == before


@pytest.mark.parametrize(
    "change", [pytest.param(["delete", "vpn0"], id="gone"), pytest.param(["set", "vpn0", "name", "old0"], id="renamed")]
)
def test_remove_after_a_link_has_changed(admin: Admin, change: list[str]) -> None:
    """A link that is gone, or has another name now, keeps nothing of ours."""
    admin.host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    admin.apply(BASE)
    admin.host.ip("link", *change)
    admin.remove()
    left = admin.inventory()
    assert "idmark" not in left
    assert "proto 73" not in left
    assert "/src_valid_mark 1" not in left


# --- what was reviewed is what is loaded -----------------------------------------------------------------------------


def test_the_rendered_ruleset_loads_again_and_again(admin: Admin) -> None:
    """Text rendered without facts loads with plain `nft -f`, twice, and the counters go on."""
    write_staff(admin.directory)
    text = render.files(desire(admin.write(EVERYTHING), None))[render.RULESET]
    admin.host.nft(text)
    admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
    counts, loaded = admin.counts(), admin.inventory()
    assert counts
    admin.host.nft(text)
    assert (admin.counts(), admin.inventory()) == (counts, loaded)


@POLICIES
def test_the_rendered_files_by_hand_are_what_apply_does(admin: Admin, text: str) -> None:
    """After each line of routing.txt has run as it stands, and ruleset.nft is loaded, the plan is empty."""
    write_staff(admin.directory)
    admin.host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    policy = admin.write(text)
    with reconcile.opened() as kernel:
        files = render.files(desire(policy, facts.take(policy, kernel.rtnl, kernel.nfnl, kernel.sysctls)))
    for line in files[render.ROUTING].splitlines():
        admin.host.run(["sh", "-c", line])
    admin.host.nft(files[render.RULESET])
    assert admin.plan(text).text == ""


def test_a_review_without_facts_lacks_only_what_the_host_knows(admin: Admin) -> None:
    """Loaded from a review that did not know the host, what the plan adds is "auto" and the connected networks.

    Whether anything translates addresses only the host knows, too, unless the policy says so.
    """
    text = policy_text({"members": MEMBERS}, kernel={"nat": True})
    files = render.files(desire(admin.write(text), None))
    for line in files[render.ROUTING].splitlines():
        admin.host.run(["sh", "-c", line])
    admin.host.nft(files[render.RULESET])
    plan = admin.plan(text).text.splitlines()
    assert plan
    of_the_host = re.compile(r"from (203\.|2001:db8:2:)| (dev|via) | nft add element .*(203\.|2001:db8:2:)")
    assert [line for line in plan if not of_the_host.search(line)] == []
