"""The daemon puts right exactly what is gone or wrong, and only what is ours."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.net import fresh_namespace, named_namespace
from tests.kernel.running import Site, eventually, kept

POLICY = policy_text({"members": MEMBERS, "masquerade": True, "clamp_mss": True}, {"when_down": "main"})
#: What is not ours, in each of the places where ours is.
FOREIGN = """
    rule add priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 99
    rule add priority 90 from 192.0.2.130 lookup main
    -6 rule add priority 4002 from 2001:db8:2::2 lookup 4002 protocol 4
    route add 198.51.100.0/24 via 203.0.113.1 dev wan
    route add 10.77.0.0/16 dev wan table 4009 protocol 99
    -6 route add 2001:db8:77::/64 dev vpn0 table 4001 protocol 99
"""
FOREIGN_TABLE = """
    table inet idmark-not { chain c { type filter hook postrouting priority 0; }; }
    table ip filter { map m { type ipv4_addr : verdict; elements = { 192.0.2.130 : drop }; }; }
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One daemon for all tests of this room: they leave all as it was, or have failed."""
    with contextlib.ExitStack() as stack:
        gw = stack.enter_context(fresh_namespace("gw"))
        lay_links(gw, stack.enter_context(named_namespace("far")))
        gw.sysctl("net/ipv4/conf/all/rp_filter", 1)
        for line in FOREIGN.strip().splitlines():
            gw.ip(*line.split())
        gw.nft(FOREIGN_TABLE)
        site = stack.enter_context(kept(Admin(gw, Path(tmp_path_factory.mktemp("daemon"))), POLICY))
        assert eventually(site.in_force), site.said()
        yield site


@pytest.fixture(scope="module")
def untouched(site: Site) -> list[str]:
    """All that there is while nobody has done anything."""
    return inventory(site)


def inventory(site: Site) -> list[str]:
    """All that there is, without the order in which it was made."""
    return sorted(site.admin.inventory().splitlines())


def repairs(site: Site) -> dict[str, float]:
    """How many repairs the metrics tell of, by kind."""
    kinds = ("route", "rule", "nft", "sysctl")
    return {kind: site.daemon.metric("idmark_repairs_total", kind=kind) for kind in kinds}


@contextlib.contextmanager
def one_repair(site: Site, untouched: list[str], kind: str, **happens: int) -> Iterator[None]:
    """What is done in the block is undone by one repair of this kind, and `happens` is all that happens meanwhile.

    All is as it was then: what is ours, and what isn't. The log has one line of it, or none when it is a fight already.
    """
    counted, lines = repairs(site), len(site.daemon.log)
    with site.watched() as watch:
        yield
        assert eventually(site.in_force), site.said()
        assert watch.settled() == {word.replace("_", " "): count for word, count in happens.items()}
    assert inventory(site) == untouched
    assert repairs(site) == counted | {kind: counted[kind] + 1}
    assert len(site.daemon.log) <= lines + 1


@pytest.mark.parametrize(
    "words",
    [
        "-4 rule delete priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73",
        "-6 rule delete priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73",
        "-4 rule delete priority 4001 from 192.0.2.130 lookup 4001 protocol 73",
        "-6 rule delete priority 4002 from 2001:db8:2::2 lookup 4002 protocol 73",
    ],
)
def test_rule(site: Site, untouched: list[str], words: str) -> None:
    """One rule that somebody deleted costs one RTM_NEWRULE, and a foreign twin of it stays."""
    with one_repair(site, untouched, "rule", del_rule=1, new_rule=1):
        site.admin.host.ip(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        "-4 route delete 192.0.2.128/25 dev vpn0 table 4001",
        "-6 route delete 2001:db8:2::/64 dev wan table 4002",
        "-4 route delete 10.9.0.0/24 dev lan table 4001",
        "-6 route delete 2001:db8:9::/64 dev lan table 4002",
        "-4 route delete default via 192.0.2.129 table 4001",
        "-6 route delete default via 2001:db8:2::1 table 4002",
        "-4 route delete unreachable default table 4001 metric 4294967295",
        "-6 route delete unreachable default table 4001 metric 4294967295",
    ],
)
def test_route(site: Site, untouched: list[str], words: str) -> None:
    """One route that somebody deleted costs one RTM_NEWROUTE: connected, downstream, default and the last one."""
    with one_repair(site, untouched, "route", del_route=1, new_route=1):
        site.admin.host.ip(*words.split())


def test_route_changed(site: Site, untouched: list[str]) -> None:
    """A route of ours that somebody replaced is replaced in its turn: there is no moment without either."""
    with one_repair(site, untouched, "route", new_route=2):
        site.admin.host.ip_batch("route replace default via 192.0.2.140 dev vpn0 table 4001 metric 1024 proto 73")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("rule add priority 4001 from 192.0.2.99 lookup 4001 protocol 73", id="other-source"),
        pytest.param("rule add priority 4003 from 192.0.2.130 lookup 4001 protocol 73", id="other-priority"),
        pytest.param("-6 rule add priority 4001 iif lan lookup 4001 protocol 73", id="other-selector"),
        pytest.param("rule add priority 7 blackhole protocol 73", id="other-action"),
    ],
)
def test_twin_rule(site: Site, untouched: list[str], words: str) -> None:
    """A rule that somebody made under our protocol number is taken away: one RTM_DELRULE."""
    with one_repair(site, untouched, "rule", new_rule=1, del_rule=1):
        site.admin.host.ip(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("route add 198.51.100.0/24 dev wan table 4001 protocol 73", id="our-table"),
        pytest.param("-6 route add 2001:db8:1::/64 via 2001:db8:2::1 protocol 73", id="main"),
        pytest.param("route add default via 192.0.2.140 dev vpn0 table 4001 metric 7 protocol 73", id="before-ours"),
        pytest.param("-6 route add blackhole default table 4002 metric 9 protocol 73", id="blackhole"),
    ],
)
def test_twin_route(site: Site, untouched: list[str], words: str) -> None:
    """A route that somebody made under our protocol number is taken away: one RTM_DELROUTE."""
    with one_repair(site, untouched, "route", new_route=1, del_route=1):
        site.admin.host.ip(*words.split())


def test_twin_route_by_another_link(site: Site, untouched: list[str]) -> None:
    """A default by another identity's link that somebody made under our number: closed at once, taken away, opened."""
    with site.watched() as watch:
        site.admin.host.ip_batch("route add default via 203.0.113.1 table 4001 metric 7 protocol 73")
        assert eventually(site.in_force), site.said()
        assert watch.settled() == {"new route": 1, "del route": 1, "commits": 3}
    assert inventory(site) == untouched


def test_elements(site: Site, untouched: list[str]) -> None:
    """One element that somebody deleted, of any set or map, costs one commit."""
    table = site.kernel.nfnl.table("idmark")
    assert table
    assert len(table.sets) >= 15
    with site.watched() as watch:
        for nft_set in table.sets:
            site.admin.host.nft(f"delete element inet idmark {nft_set.name} {{ {nft_set.elements[0][0]} }}")
            assert eventually(site.in_force), site.said()
        assert watch.settled() == {"commits": 2 * len(table.sets)}
    assert inventory(site) == untouched


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("flush map inet idmark sources-ipv4-24", id="map-flushed"),
        pytest.param("flush chain inet idmark postrouting", id="chain-flushed"),
        pytest.param("flush chain inet idmark id-inside", id="identity-chain-flushed"),
        pytest.param("flush chain inet idmark output; delete chain inet idmark output", id="base-chain-deleted"),
        pytest.param("flush table inet idmark", id="table-flushed"),
        pytest.param("delete table inet idmark", id="table-deleted"),
        pytest.param("insert rule inet idmark prerouting accept", id="rule-inserted"),
        pytest.param("add element inet idmark sources-ipv4-32 { 192.0.2.77 : accept }", id="element-added"),
        pytest.param("add element inet idmark sources-ipv6-64 { 2001:db8:bad:: : goto id-outside }", id="widened"),
    ],
)
def test_ruleset(site: Site, untouched: list[str], text: str) -> None:
    """Whatever somebody does to our table is undone in one commit, and other tables stay as they are."""
    with one_repair(site, untouched, "nft", commits=2):
        site.admin.host.nft(text)


def test_rules_of_chains(site: Site, untouched: list[str]) -> None:
    """One rule that somebody deleted, of any chain, is put back in one commit."""
    table = site.kernel.nfnl.table("idmark")
    assert table
    assert len(table.chains) > 10
    with site.watched() as watch:
        for chain in table.chains:
            listed = site.admin.host.run(["nft", "-a", "list", "chain", "inet", "idmark", chain.name])
            handle = next(line.rpartition("# handle ")[2] for line in listed.splitlines() if "comment" in line)
            site.admin.host.nft(f"delete rule inet idmark {chain.name} handle {handle}")
            assert eventually(site.in_force), site.said()
        assert watch.settled() == {"commits": 2 * len(table.chains)}
    assert inventory(site) == untouched


def test_dormant(site: Site, untouched: list[str]) -> None:
    """A table that somebody put to sleep is awake again: one commit."""
    with one_repair(site, untouched, "nft", commits=2):
        site.admin.host.nft("add table inet idmark { flags dormant; }")


def test_flush_ruleset(site: Site, untouched: list[str]) -> None:
    """After `flush ruleset` our table is back, and it alone: the others are for somebody else to load."""
    with site.watched() as watch:
        site.admin.host.nft("flush ruleset")
        assert eventually(site.in_force), site.said()
        assert watch.settled() == {"commits": 2}
    assert "table ip filter" not in site.admin.inventory()
    site.admin.host.nft(FOREIGN_TABLE)
    assert eventually(lambda: inventory(site) == untouched)


def test_rules_flushed(site: Site, untouched: list[str]) -> None:
    """All rules of ours at once, as systemd-networkd deletes them, come back in one pass: a line in the log."""
    lines = len(site.daemon.log)
    with site.daemon.stopped():
        for family in ("-4", "-6"):
            site.admin.host.ip(family, "rule", "flush", "protocol", "73")
    assert eventually(lambda: inventory(site) == untouched), site.said()
    assert len(site.daemon.log) == lines + 1


def test_sysctl(site: Site, untouched: list[str]) -> None:
    """src_valid_mark that somebody cleared, which the kernel announces to nobody, is set with the next look."""
    with one_repair(site, untouched, "sysctl", new_route=1, del_route=1):
        assert site.admin.host.sysctl("net/ipv4/conf/vpn0/src_valid_mark") == 1
        site.admin.host.sysctl("net/ipv4/conf/vpn0/src_valid_mark", 0)
        site.admin.host.ip_batch("route add 192.0.0.8 via 203.0.113.1\nroute delete 192.0.0.8 via 203.0.113.1")


def test_lost_events(site: Site, untouched: list[str]) -> None:
    """When more is announced than the daemon's buffer holds (ENOBUFS), what is gone is repaired all the same."""
    many = [f"{n >> 8}.{n & 255}" for n in range(8000)]
    with site.daemon.stopped():
        for verb in ("add", "delete"):
            site.admin.host.ip_batch("\n".join(f"route {verb} 100.{each}.0/24 dev lan table 9" for each in many))
        site.admin.host.ip_batch("rule delete priority 4001 from 192.0.2.130 lookup 4001 protocol 73")
    assert eventually(lambda: inventory(site) == untouched), site.said()


def test_foreign_changes(site: Site) -> None:
    """What others change of their own is nothing to us: nothing is sent, nothing said."""
    host, lines = site.admin.host, len(site.daemon.log)
    with site.watched() as watch:
        for number in range(20):
            host.ip_batch(f"""
                rule add priority {number + 100} lookup 99
                rule delete priority {number + 100}
                route add 192.0.0.{number} via 203.0.113.1
                route delete 192.0.0.{number} via 203.0.113.1
            """)
            host.nft(f"add table ip t{number}\ndelete table ip t{number}")
        seen = watch.settled()
    assert seen == {"new rule": 20, "del rule": 20, "new route": 20, "del route": 20, "commits": 20}
    assert len(site.daemon.log) == lines


def test_quiet(site: Site) -> None:
    """In force: nothing is sent, nothing said, and no pass is made."""
    lines = len(site.daemon.log)
    passes = site.daemon.metric("idmark_reconcile_duration_seconds_count")
    with site.watched() as watch:
        for _ in itertools.repeat(None, 8):
            assert watch.settled() == {}
    assert len(site.daemon.log) == lines
    assert site.daemon.metric("idmark_reconcile_duration_seconds_count") == passes
    assert site.daemon.metric("idmark_in_sync") == 1
