"""Hosts as they are: links that come and go, odd names, odd routes, and tables of others that are very large."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agent import facts, reconcile, render
from agent.addresses import Family
from agent.desired import desire
from agent.kernel import nft
from agent.kernel.nfnl import Nfnl
from agent.kernel.rtnl import RTM_TABLE, Rtnl, _Routing
from agent.model import Count, Route
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Gateway, Peers
from tests.kernel.net import CORP, INSIDE, ISP, OUTSIDE, WILD, Host
from tests.kernel.test_facts_marking import both_families
from tests.kernel.test_facts_nft import reads_elements

POLICY = policy_text({"members": MEMBERS})


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    lay_links(netns, peers("far"))
    return Admin(netns, tmp_path)


def notes(admin: Admin, text: str) -> list[str]:
    """What an operator is told about the host, beside the plan."""
    with reconcile.opened() as kernel:
        return list(reconcile.look(admin.write(text), kernel).desired.notes)


def defaults(admin: Admin, table: int) -> list[str]:
    """The defaults of a table, IPv4's first, as `ip` words them and without what is always the same."""
    listed = [
        line
        for option in ("-4", "-6")
        for line in admin.host.ip("-N", option, "route", "list", "table", str(table), "proto", "73").splitlines()
    ]
    return [
        line.replace("proto 73 ", "").replace(" pref medium", "").strip()
        for line in listed
        if "default" in line and "metric 4294967295" not in line
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(["delete", "vpn0"], "there is no link vpn0", id="absent"),
        pytest.param(["set", "vpn0", "down"], "link vpn0 is down", id="down"),
        pytest.param(["set", "vpn0", "name", "old0"], "there is no link vpn0", id="renamed"),
    ],
)
def test_without_its_link_an_identity_is_closed(admin: Admin, change: list[str], why: str) -> None:
    """An identity whose link isn't there is closed, and that is said; the others work; it opens with its link."""
    admin.host.ip("link", *change)
    admin.apply(POLICY)
    assert admin.plan(POLICY).text == ""
    told = [f"identity inside: {family} is closed: {why}" for family in Family]
    assert [note for note in notes(admin, POLICY) if "closed" in note] == told
    assert defaults(admin, 4001) == []
    assert len(defaults(admin, 4002)) == 2
    with pytest.raises(OSError, match=r"No route to host|Cannot assign requested address"):
        admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
    admin.host.send(WILD["ipv4"], OUTSIDE["ipv4"])
    if change[-1] == "down":
        admin.host.ip("link", "set", "vpn0", "up")
        admin.host.ip("address", "add", f"{INSIDE['ipv6']}/64", "dev", "vpn0")
        admin.host.settle()
        admin.apply(POLICY)
        assert len(defaults(admin, 4001)) == 2


def test_an_address_that_came_and_went_is_followed(admin: Admin) -> None:
    """ "auto" is the link's global addresses as they are at the apply."""
    admin.apply(POLICY)
    admin.host.ip("address", "add", "203.0.113.7/24", "dev", "wan")
    assert (
        admin.plan(POLICY).text.splitlines()[0]
        == "+ ip rule add priority 4002 from 203.0.113.7 lookup 4002 protocol 73"
    )
    admin.apply(POLICY)
    admin.host.ip("address", "delete", "203.0.113.7/24", "dev", "wan")
    assert "- ip rule delete priority 4002 from 203.0.113.7 lookup 4002 protocol 73\n" in admin.plan(POLICY).text
    admin.apply(POLICY)
    assert admin.plan(POLICY).text == ""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(
            "",
            ["default via 203.0.113.1 dev wan src 203.0.113.2 metric 1024"],
            id="one",
        ),
        pytest.param(
            "route delete default\nroute add default via 203.0.113.8 dev wan metric 50\n"
            "route add default via 203.0.113.9 dev wan metric 20\nroute add default via 192.0.2.129 dev vpn0 metric 5",
            ["default via 203.0.113.9 dev wan src 203.0.113.2 metric 1024"],
            id="several-the-best-on-the-link",
        ),
        pytest.param(
            "route delete default\nroute add default via 198.18.7.7 dev wan onlink",
            ["default via 198.18.7.7 dev wan src 203.0.113.2 metric 1024 onlink"],
            id="onlink",
        ),
        pytest.param(
            "route delete default\nroute add default nexthop via 203.0.113.1 dev wan weight 3 "
            "nexthop via 203.0.113.8 dev wan weight 1 nexthop via 192.0.2.129 dev vpn0 weight 9",
            [
                "default src 203.0.113.2 metric 1024",
                "nexthop via 203.0.113.1 dev wan weight 3",
                "nexthop via 203.0.113.8 dev wan weight 1",
            ],
            id="multipath",
        ),
        pytest.param(
            "route delete default\nroute add default nexthop via 203.0.113.1 dev wan weight 3 "
            "nexthop via 192.0.2.129 dev vpn0 weight 1",
            ["default via 203.0.113.1 dev wan src 203.0.113.2 metric 1024"],
            id="multipath-one-on-the-link",
        ),
        pytest.param(
            "route delete default\nroute add default dev wan",
            ["default dev wan scope 253 src 203.0.113.2 metric 1024"],
            id="point-to-point",
        ),
        pytest.param(
            "route delete default\nroute add default via inet6 2001:db8:2::1 dev wan",
            ["default via inet6 2001:db8:2::1 dev wan src 203.0.113.2 metric 1024"],
            id="via-ipv6",
        ),
        pytest.param("route delete default", [], id="none"),
    ],
)
def test_the_next_hop_auto(admin: Admin, lines: str, expected: list[str]) -> None:
    """ "auto" copies main's best default on the link: gateway, onlink, and those of several hops that are on it."""
    admin.host.ip_batch(lines, "-4")
    text = policy_text(None, {"addresses": [OUTSIDE["ipv4"]]})
    admin.apply(text)
    assert admin.plan(text).text == ""
    listed = admin.host.ip("-N", "route", "list", "table", "4002").replace("proto 73 ", "")
    found = re.findall(r"^(?:default|\s+nexthop) .*", listed, re.MULTILINE)
    assert [" ".join(line.split()) for line in found] == expected


@pytest.mark.parametrize("protocol", ["ra", "dhcp", "bird"])
def test_a_default_of_any_origin_is_followed(admin: Admin, protocol: str) -> None:
    """Router discovery, DHCP or a routing daemon: whoever made main's default, the identity follows it."""
    admin.host.ip("-6", "route", "delete", "default")
    admin.host.ip("-6", "route", "add", "default", "via", "fe80::1", "dev", "wan", "proto", protocol)
    admin.apply(POLICY)
    assert "default via fe80::1 dev wan src 2001:db8:2::2 metric 1024" in defaults(admin, 4002)


def test_a_multipath_route_behind_the_gateway_is_good_for_all(admin: Admin) -> None:
    """A downstream network by two hops is in every identity's table with both, and the next plan is empty."""
    admin.host.ip(
        *("route", "add", "10.50.0.0/16", "nexthop", "via", "10.9.0.5", "dev", "lan"),
        *("nexthop", "via", "10.9.0.6", "dev", "lan", "weight", "2"),
    )
    text = policy_text({"members": MEMBERS}, downstream=["lan"])
    admin.apply(text)
    assert admin.plan(text).text == ""
    for table in ("4001", "4002"):
        listed = admin.host.ip("route", "list", "10.50.0.0/16", "table", table).split()
        assert [listed[n + 1] for n, word in enumerate(listed) if word == "via"] == ["10.9.0.5", "10.9.0.6"]


def test_of_a_multipath_route_the_hop_behind_the_gateway(admin: Admin) -> None:
    """Of a network by two hops with weights the one on a downstream link is in the tables; the next plan is empty."""
    admin.host.ip(
        *("route", "add", "10.50.0.0/16", "nexthop", "via", "10.9.0.5", "dev", "lan", "weight", "3"),
        *("nexthop", "via", "203.0.113.1", "dev", "wan", "weight", "2"),
    )
    text = policy_text({"members": MEMBERS}, downstream=["lan"])
    admin.apply(text)
    assert admin.plan(text).text == ""
    for table in ("4001", "4002"):
        listed = admin.host.ip("-N", "route", "list", "10.50.0.0/16", "table", table)
        assert listed.strip() == "10.50.0.0/16 via 10.9.0.5 dev lan proto 73"


@both_families
def test_an_address_on_lo_is_an_identity_s(gateway: Gateway, tmp_path: Path, family: str) -> None:
    """An own address that no link has but lo (VRRP, anycast) leaves by its identity's link."""
    admin = Admin(gateway.gw, tmp_path)
    service = {"ipv4": "192.0.2.200", "ipv6": "2001:db8:4::200"}[family]
    gateway.gw.ip("address", "add", service, "dev", "lo")
    admin.apply(policy_text({"addresses": [*INSIDE.values(), service]}))
    with gateway.corp.sniff("gw") as vpn0, gateway.isp.sniff("gw") as wan:
        gateway.gw.send(WILD[family], service)
        assert len(vpn0.packets(service, WILD[family])) == 1
        assert not wan.packets(service)


@pytest.mark.parametrize(
    "name", ["wan.100", "fifteen-bytes-1", "ü.ñ", "a+b@c", "-x", "0", "any", "dev", "map", "a;id", "$(id)"]
)
def test_a_link_may_have_any_name_that_the_kernel_takes(admin: Admin, name: str) -> None:
    """Dots, 15 bytes, other letters and words of nft's and ip's languages: apply, an empty plan, remove."""
    admin.host.ip("link", "set", "dev", "vpn0", "down")
    admin.host.ip("link", "set", "dev", "vpn0", "name", name)
    admin.host.ip("link", "set", "dev", name, "up")
    admin.host.ip("address", "add", f"{INSIDE['ipv6']}/64", "dev", name)
    admin.host.settle()
    admin.host.sysctl(f"net/ipv4/conf/{name}/rp_filter", 1)
    before = admin.inventory()
    text = policy_text({"link": name, "members": MEMBERS, "masquerade": True, "clamp_mss": True, "when_down": "main"})
    admin.apply(text)
    assert admin.plan(text).text == ""
    assert admin.host.sysctl(f"net/ipv4/conf/{name}/src_valid_mark") == 1
    admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
    assert admin.counts()["id-inside-ipv4-transmit"].packets == 1
    admin.remove()
    assert admin.inventory() == before


@pytest.mark.parametrize("name", ["a;id", "$(id)", "`id`", "a'b", "a|b", "a&b", "#", "$x", "<x>"])
def test_a_link_s_name_is_no_command(admin: Admin, name: str) -> None:
    """Whatever a shell makes of a link's name, the lines of routing.txt and of the plan's + lines run as they stand."""
    for link, was in ((name, "vpn0"), (f"{name}1", "wan")):
        admin.host.ip("link", "set", "dev", was, "down")
        admin.host.ip("link", "set", "dev", was, "name", link)
        admin.host.ip("link", "set", "dev", link, "up")
        admin.host.sysctl(f"net/ipv4/conf/{link}/rp_filter", 1)
    admin.host.ip("route", "add", "default", "via", ISP["ipv4"], "dev", f"{name}1")
    admin.host.settle()
    text = policy_text(
        {"link": name, "addresses": [INSIDE["ipv4"]], "next_hop": [CORP["ipv4"]]},
        {"link": f"{name}1", "addresses": [OUTSIDE["ipv4"]]},
    )
    policy = admin.write(text)
    with reconcile.opened() as kernel:
        files = render.files(desire(policy, facts.take(policy, kernel.rtnl, kernel.nfnl, kernel.sysctls)))
    plan = [line[2:] for line in admin.plan(text).text.splitlines() if line.startswith(("+ ip ", "+ sysctl "))]
    assert any("net/ipv4/conf/" in line for line in plan)
    for lines in (files[render.ROUTING].splitlines(), plan):
        for line in lines:
            admin.host.run(["sh", "-c", line])
        admin.host.nft(files[render.RULESET])
        assert admin.plan(text).text == ""
        admin.remove()


def test_a_tentative_address(admin: Admin) -> None:
    """While an address is still being checked for duplicates, an apply works, and the address is covered."""
    host = admin.host
    host.sysctl("net/ipv6/conf/wan/accept_dad", 1)
    host.sysctl("net/ipv6/conf/wan/dad_transmits", 60)
    host.ip("address", "flush", "dev", "wan", "scope", "global")
    host.ip_batch(
        f"address add {OUTSIDE['ipv4']}/24 dev wan\naddress add {OUTSIDE['ipv6']}/64 dev wan\n"
        f"route replace default via {ISP['ipv4']} dev wan\nroute replace default via {ISP['ipv6']} dev wan"
    )
    assert "tentative" in host.ip("-6", "address", "show", "dev", "wan")
    admin.apply(POLICY)
    assert f"from {OUTSIDE['ipv6']} lookup 4002" in host.ip("-6", "rule")


# --- very large tables of others -------------------------------------------------------------------------------------


class Counting(Rtnl):
    """Counts the routes that it makes values of."""

    decoded = 0

    def _to_route(self, message: Any) -> Route:
        self.decoded += 1
        return super()._to_route(message)


def test_a_full_table_in_main_is_not_read(admin: Admin) -> None:
    """With 50,000 routes of a routing daemon in main, a look decodes the others and no more."""
    texts = (POLICY, policy_text({"members": MEMBERS}, downstream=["lan"]))
    admin.apply(POLICY)
    decoded = {}
    for foreign in (0, 50_000):
        routes = (f"route add 100.{n >> 8}.{n & 255}.0/24 via {ISP['ipv4']} dev wan proto bird" for n in range(foreign))
        admin.host.ip_batch("\n".join(routes))
        for text in texts:
            counting = Counting()
            with reconcile.opened() as kernel, counting:
                reconcile.look(admin.write(text), replace(kernel, rtnl=counting))
                decoded[foreign, text] = counting.decoded
        assert admin.plan(POLICY).text == ""
    for text in texts:
        assert decoded[50_000, text] == decoded[0, text] < 100


def foreign_routes(family: Family, number: int) -> str:
    """A route of others by wan, each kind now and then among many through a gateway; of several lengths as messages."""
    # Numbers: a name that stands where a number was ip(8) takes for that number.
    address = f"100.{number >> 8}.{number & 255}.0/24" if family is Family.IPV4 else f"2001:db8:{number:x}::/48"
    through = f"via {ISP[family]} dev wan"
    # Without a gateway, and as long as a message as others with one; a routing daemon's only in IPv4.
    direct = f"{address} dev wan proto {12 if family is Family.IPV4 else 4} metric 7"
    kinds = {
        0: direct,
        1: f"{address} dev wan proto 73 table 77",
        2: f"{address} {through} proto 12 table 254 metric {number + 7}",
        3: f"blackhole {address} proto 12",
        4: f"{address} {through} proto 2",
        5: f"default {through} proto 12 metric {number + 7}",
        6: f"{address} dev wan proto 12 table 78",
        7: f"{address} {through} proto 73",
    }
    return f"route add {kinds.get(number % 97, f'{address} {through} proto 12')}"


@pytest.mark.parametrize("family", [pytest.param(each, id=each) for each in Family])
def test_a_survey_finds_what_lies_among_many(admin: Admin, family: Family) -> None:
    """A survey passes over thousands of routes, and has all that questions about one link, or about ours, have."""
    admin.host.ip_batch("\n".join(foreign_routes(family, number) for number in range(1, 5000)))
    with Rtnl() as rtnl:
        survey, by_wan = rtnl.survey(), rtnl.main_routes(family, "wan")
        ours = rtnl.our_routes()
    near = {route for route in by_wan if not route.destination.length or all(hop.via is None for hop in route.hops)}
    assert len(by_wan) > 4000
    assert len(near) > 100
    assert {route for route in survey.near if route.family is family and route.hops[0].link == "wan"} == near
    assert len(ours) > 100
    assert survey.ours == ours
    assert {route for route in by_wan if route not in near} & set(survey.connected)
    assert {route for route in survey.connected if route.hops[0].link == "wan"} < {*by_wan, *survey.near}


class Truncating(Rtnl):
    """Has a table's lower byte in the header, as IPv6 once had (net/ipv6/route.c, rt6_fill_node)."""

    def _dump_routes(self, *args: Any, **filters: Any) -> list[bytes]:
        return [
            data[:RTM_TABLE] + bytes((_Routing.of(data).table_number & 0xFF,)) + data[RTM_TABLE + 1 :]
            for data in super()._dump_routes(*args, **filters)
        ]


def test_a_table_whose_lower_byte_is_that_of_main(admin: Admin) -> None:
    """A survey takes no other table's routes for main's, whatever byte the header has for a larger number."""
    admin.host.ip_batch("route add 2001:db8:77::/48 dev wan table 510\nroute add ::/0 dev wan table 510")
    with Rtnl() as rtnl, Truncating() as truncating:
        survey = rtnl.survey()
        assert truncating.survey() == survey
    assert not any(route.table == 510 for route in (*survey.near, *survey.connected))


def test_of_a_shared_table_a_foreign_route_is_told_once(admin: Admin) -> None:
    """Identities that share a way out have one table, and what others put there is one thing to hear of."""
    shared = {"link": "vpn0", "next_hop": "none", "addresses": []}
    members = ({**shared, "members": [network]} for network in ("10.9.0.0/24", "10.8.0.0/24"))
    text = policy_text(*members, kernel={"way_bits": 1})
    admin.host.ip("route", "add", "10.5.0.0/16", "dev", "lan", "table", "4001")
    with reconcile.opened() as kernel:
        notes = reconcile.look(admin.write(text), kernel).notes
    assert len([note for note in notes if "10.5.0.0/16" in note]) == 1


@dataclass
class Overtaken(Nfnl):
    """Somebody else commits to a table of theirs whenever ours is half read."""

    host: Host

    def __post_init__(self) -> None:
        super().__init__()

    def counts(self, name: str) -> dict[str, Count]:
        self.host.nft("add table inet other\ndelete table inet other\n")
        return super().counts(name)


def test_somebody_else_commits_all_the_time(admin: Admin) -> None:
    """Our table is read, and what differs is found, though a commit to another table comes into each reading of it."""
    admin.apply(POLICY)
    with reconcile.opened() as kernel, Overtaken(admin.host) as overtaken:
        overtaken_kernel = replace(kernel, nfnl=overtaken)
        assert reconcile.look(admin.write(POLICY), overtaken_kernel).plan.text == ""
        admin.host.nft("delete element inet idmark sources-ipv4-24 { 10.9.0.0 }")
        plan = reconcile.look(admin.write(POLICY), overtaken_kernel).plan
        assert plan.text == "+ nft add element inet idmark sources-ipv4-24 { 10.9.0.0 : goto id-inside }\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What libnftables asks the kernel, for each of our commands; they get no listing."""
    nftables = nft.binding()
    original = nftables.Nftables.cmd
    found: list[str] = []

    def cmd(context: Any, text: str) -> tuple[int, str, str]:
        context.set_debug("mnl")
        code, output, error = original(context, text)
        found.append(output)
        return code, "", error

    monkeypatch.setattr(nftables.Nftables, "cmd", cmd)
    return found


def spans(*lengths: int) -> list[str]:
    """Members of so many lengths that they are in an interval map."""
    return [f"10.{length}.0.0/{length}" for length in lengths]


def test_the_sets_of_other_tables_are_not_read(admin: Admin, asked: list[str]) -> None:
    """Beside a foreign interval map no plan of ours makes libnftables read an element of it, and it stays as it is."""
    elements = ", ".join(f"100.{n >> 8}.{n & 255}.0/24 : accept" for n in range(3000))
    admin.host.nft(
        f"table inet zzzz {{ map m {{ type ipv4_addr : verdict; flags interval; elements = {{ {elements} }}; }}; }}"
    )
    there = admin.host.run(["nft", "list", "table", "inet", "zzzz"])
    new = {"id": 3, "link": "vpn0", "addresses": ["192.0.2.131"], "next_hop": ["192.0.2.200"]}
    (admin.directory / "many.txt").write_text("".join(f"10.{n >> 8}.{n & 255}.0/24\n" for n in range(5000)))
    for text in (
        POLICY,
        policy_text({"members": MEMBERS}, new=new),
        policy_text({"members": ["10.9.0.0/25"]}, new=new),
        policy_text({"members": spans(*range(18, 30))}),
        policy_text({"members": spans(*range(17, 29))}, new=new),
        policy_text({"members": ["file:many.txt"]}),
        policy_text({"members": ["file:many.txt", "10.9.0.7"]}, new=new),
        policy_text({"members": MEMBERS}, kernel={"hook_priority": -140}),
    ):
        assert admin.apply(text).steps
        assert admin.plan(text).text == ""
    alteration = "add element inet idmark own-link { * }\nadd counter inet idmark strange"
    admin.host.nft(alteration)
    assert admin.apply(text).steps
    assert admin.remove().steps
    assert len(asked) > 10
    assert not [output for output in asked if reads_elements(output, "zzzz")]
    assert admin.host.run(["nft", "list", "table", "inet", "zzzz"]) == there
