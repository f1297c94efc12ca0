"""The doctor's rules, over hosts as values: every check has a host on which it finds something."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Family, Prefix, parse_address
from agent.desired import desire
from agent.doctor import CHECKS, Finding, findings, text
from agent.host import EVERY_BIT, Flowtable, Host, KeptFile, Listener, MarkWrite, NftChain, ReverseCheck, Setting, conf
from agent.model import Facts, Fwmark, Hook, Kernel, Lookup, Policy, Rule
from agent.neighbours import NEIGHBOURS, traces, words
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
    link,
    policies,
    policy,
    route,
)

CLAMPED = replace(INSIDE, clamp_mss=True)
BOTH = policy(CLAMPED, OUTSIDE)
#: As a gateway has them: it forwards.
SYSCTLS = {conf(family, "lan", "forwarding"): 1 for family in ("ipv4", "ipv6")}
WELL = Host(facts=GATEWAY, in_force=True, sysctls=SYSCTLS)
OUTPUT = Hook("filter", "output", 0)
STRICT = replace(GATEWAY, links=tuple(replace(each, rp_filter=int(each.name == "vpn0")) for each in GATEWAY.links))


def chain(
    name: str = "c", *, table: str = "t", hook: Hook | None = OUTPUT, family: str = "ip", **more: object
) -> NftChain:
    return NftChain(family, table, name, hook, **more)  # type: ignore[arg-type]


def writer(bits: int = EVERY_BIT, ones: int = EVERY_BIT, **more: object) -> NftChain:
    return chain(writes=(MarkWrite(7, bits, ones),), **more)  # type: ignore[arg-type]


def found(sick: Host, written: Policy = BOTH) -> tuple[Finding, ...]:
    return findings(desire(written, sick.facts), sick)


def checks(sick: Host, written: Policy = BOTH) -> list[str]:
    return [each.check for each in found(sick, written)]


#: For each check a host that it finds something on; with another policy where it takes one.
ILL: dict[str, tuple[Host, Policy]] = {
    "kernel-feature": (replace(WELL, missing=(("maps", "Error: Could not process rule"),)), BOTH),
    "misfit": (
        replace(WELL, facts=host(LO, WAN, VPN, LAN, routes=DEFAULTS)),
        policy(replace(CLAMPED, next_hop=(parse_address("203.0.113.9"),)), OUTSIDE),
    ),
    "rule-before": (replace(WELL, rules=((Rule(Family.IPV4, 100, 254), False),)), BOTH),
    "number-taken": (replace(WELL, foreign_routes=(route("198.51.100.0/24 dev lan", 4001),)), BOTH),
    "mark-writer": (replace(WELL, chains=(writer(),)), BOTH),
    "mark-neighbour": (replace(WELL, chains=(chain("cali-PREROUTING", hook=None),)), BOTH),
    "mark-legacy": (replace(WELL, legacy=("ip filter", "ip mangle")), BOTH),
    "hook-tie": (replace(WELL, chains=(chain(hook=Hook("filter", "prerouting", -145)),)), BOTH),
    "reverse-check": (
        replace(
            WELL, chains=(chain(hook=Hook("filter", "prerouting", -300), reverse_checks=(ReverseCheck(3, True),)),)
        ),
        BOTH,
    ),
    "flowtable": (replace(WELL, flowtables=(Flowtable("inet", "fw", "f", ("lan", "wan")),)), BOTH),
    "rp-filter": (replace(WELL, facts=STRICT), BOTH),
    "mark-valid-for-all": (
        replace(
            WELL, sysctls={**SYSCTLS, conf("ipv4", "all", "src_valid_mark"): 1, conf("ipv4", "lan", "rp_filter"): 1}
        ),
        BOTH,
    ),
    "own-sources": (replace(WELL, sysctls={**SYSCTLS, conf("ipv4", "lan", "accept_local"): 1}), BOTH),
    "forwarding": (replace(WELL, sysctls={}), BOTH),
    "accept-ra": (
        Host(
            facts=host(LO, link("wan", "203.0.113.2/24"), VPN, LAN, routes=DEFAULTS[:1]),
            sysctls={**SYSCTLS, conf("ipv6", "wan", "accept_ra"): 1, conf("ipv6", "wan", "forwarding"): 1},
        ),
        BOTH,
    ),
    "mtu": (WELL, policy(INSIDE, OUTSIDE)),
    "containers": (
        replace(WELL, facts=host(LO, WAN, VPN, LAN, link("docker0", "172.17.0.1/16"), routes=DEFAULTS)),
        policy(CLAMPED, OUTSIDE, downstream=["lan"]),
    ),
    "members-behind": (
        replace(
            WELL, to_members=(("inside", Prefix.parse("10.9.0.0/24"), Lookup(254, "lan", parse_address("10.9.0.7"))),)
        ),
        BOTH,
    ),
    "conntrack": (
        replace(
            WELL, sysctls={**SYSCTLS, "net/netfilter/nf_conntrack_count": 80, "net/netfilter/nf_conntrack_max": 100}
        ),
        BOTH,
    ),
    "networkd": (
        replace(WELL, programs=frozenset({"systemd-network"}), networkd=(Setting("ManageForeignRoutes", "yes"),)),
        BOTH,
    ),
    "networkmanager": (
        replace(
            WELL,
            programs=frozenset({"NetworkManager"}),
            network_manager=(Setting("wan ipv4.route-table", "100", "/etc/x"),),
        ),
        BOTH,
    ),
    "udp-wildcard": (
        replace(WELL, listeners=(Listener("udp", parse_address("::"), 53, both=True, program="named"),)),
        BOTH,
    ),
    "address-gone": (
        replace(WELL, listeners=(Listener("tcp", parse_address("10.9.0.77"), 80, program="nginx"),)),
        BOTH,
    ),
    "file": (replace(WELL, files=(KeptFile("/etc/idmark/policy.toml", "policy", 0o664),)), BOTH),
    "clock": (replace(WELL, files=(KeptFile("/etc/idmark/policy.toml", "policy", 0o644, changed=1e9),), now=5e8), BOTH),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_finds_something(check: str) -> None:
    """On a host with just one thing that hurts that one check says so, with evidence and remedy, and no other does."""
    ((name, what, evidence, remedy),) = [
        (each.check, each.what, each.evidence, each.remedy) for each in found(*ILL[check])
    ]
    assert name == check
    assert what
    assert evidence
    assert remedy


def test_a_host_that_does_well() -> None:
    """On a gateway without anybody else nothing is found, with any of its policies in force or not."""
    assert found(WELL) == ()
    assert found(replace(WELL, in_force=False)) == ()
    assert found(WELL, policy(CLAMPED, OUTSIDE, downstream=["lan"])) == ()


@given(written=policies(), facts=hosts(), data=st.data())
def test_any_policy_and_host(written: Policy, facts: Facts, data: st.DataObject) -> None:
    """Whatever the policy and the host, the doctor has an answer, and the same once more."""
    rules = st.builds(
        Rule,
        st.sampled_from(Family),
        st.integers(0, 32767),
        st.sampled_from([52, 254, 4001]),
        fwmark=st.sampled_from([None, Fwmark(0x1000000, EVERY_BIT), Fwmark(0x100, 0x3F00)]),
    )
    sick = Host(
        facts=facts,
        in_force=data.draw(st.booleans()),
        rules=tuple((rule, False) for rule in data.draw(st.lists(rules, max_size=3))),
        chains=(writer(hook=Hook("filter", data.draw(st.sampled_from(["prerouting", "output"])), 0)),),
    )
    desired = desire(written, facts)
    assert findings(desired, sick) == findings(desired, sick)


def test_the_report() -> None:
    """For a person each finding is three lines: what hurts, what was seen, and the remedy."""
    assert list(text(found(*ILL["conntrack"]))) == [
        "conntrack: the connection table is nearly full: new connections are dropped then",
        "    seen    /proc/sys/net/netfilter: nf_conntrack_count 80, nf_conntrack_max 100",
        "    remedy  in /etc/sysctl.d/50-idmark.conf: net.netfilter.nf_conntrack_max = 400; then sysctl --system; and "
        "look who opens so many (conntrack -L)",
    ]


# --- who is who ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "traced"),
    [
        ("Tailscale", replace(WELL, chains=(chain("ts-forward"),))),
        ("Tailscale", replace(WELL, rules=((Rule(Family.IPV4, 5270, 52), False),))),
        ("Tailscale", replace(WELL, facts=host(LO, WAN, VPN, LAN, link("tailscale0"), routes=DEFAULTS))),
        ("Tailscale", replace(WELL, programs=frozenset({"tailscaled"}))),
        ("WireGuard's wg-quick", replace(WELL, chains=(chain("premangle", table="wg-quick-wg0"),))),
        ("mwan3", replace(WELL, chains=(chain("mwan3_hook"),))),
        ("pbr", replace(WELL, chains=(chain("pbr_prerouting"),))),
        ("kube-proxy", replace(WELL, chains=(chain("KUBE-MARK-MASQ"),))),
        ("kube-proxy", replace(WELL, chains=(chain("services", table="kube-proxy"),))),
        ("Calico", replace(WELL, chains=(chain("cali-from-host-endpoint"),))),
        ("Cilium", replace(WELL, chains=(chain("CILIUM_PRE_mangle"),))),
        ("Docker", replace(WELL, chains=(chain("DOCKER-USER"),))),
        ("Docker", replace(WELL, facts=host(LO, WAN, VPN, LAN, link("br-0123456789ab"), routes=DEFAULTS))),
        ("firewalld", replace(WELL, chains=(chain("filter_INPUT", table="firewalld"),))),
        ("NetworkManager", replace(WELL, programs=frozenset({"NetworkManager"}))),
    ],
)
def test_a_neighbour_is_known(name: str, traced: Host) -> None:
    """A known program is known by each of its traces, and is not taken for another."""
    assert [each.name for each in NEIGHBOURS if list(traces(each, traced))] == [name]


@pytest.mark.parametrize(
    ("name", "chain_name", "mask", "other"),
    [
        ("Tailscale", "ts-forward", 0x00FC0000, 0x3F000000),
        ("mwan3", "mwan3_hook", 0x00003F00, 0x3F000000),
        ("pbr", "pbr_output", 0x00FC0000, 0x3F000000),
        ("kube-proxy", "KUBE-POSTROUTING", 0x0000FC00, 0x3F000000),
        ("Calico", "cali-INPUT", 0x3F000000, 0x0000FC00),
        ("Cilium", "CILIUM_INPUT", 0x3F000000, 0x0000F000),
    ],
)
def test_bits_of_a_neighbour(name: str, chain_name: str, mask: int, other: int) -> None:
    """Each known program is found where the policy's mask has bits of its own, and only there."""
    sick = replace(WELL, chains=(chain(chain_name, hook=None),))
    (finding,) = found(sick, replace(policy(), kernel=Kernel(mark_mask=mask)))
    assert finding.what.startswith(f"{name} is on this host and uses bits ")
    assert finding.evidence == f"nft chain ip t {chain_name}"
    assert "mark_mask = " in finding.remedy
    assert found(sick, replace(policy(), kernel=Kernel(mark_mask=other))) == ()


def test_fewer_bits() -> None:
    """Where there are not as many free bits as the mask has, the remedy has fewer: what the largest id needs."""
    finding = found(replace(WELL, chains=(chain("CILIUM_INPUT"),)))[0]
    assert "mark_mask = 0x0000f000" in finding.remedy


def test_no_bits_are_free() -> None:
    """Where neighbours use them all it is said that somebody must give some up."""
    sick = replace(WELL, chains=(chain("CILIUM_INPUT"), writer(0xF000, 0xF000)))
    assert "no bits are free" in found(sick)[0].remedy


# --- single rules ----------------------------------------------------------------------------------------------------


def test_wildcard_sockets_are_told_once() -> None:
    """A service with a socket for each family is one finding."""
    sockets = tuple(Listener("udp", parse_address(each), 53, program="named", pid=9) for each in ("0.0.0.0", "::"))
    (finding,) = found(replace(WELL, listeners=sockets))
    assert finding.evidence == "sock_diag: udp 0.0.0.0:53 (named, pid 9), udp [::]:53 (named, pid 9)"


@pytest.mark.parametrize(
    "listener",
    [
        pytest.param(Listener("udp", parse_address("0.0.0.0"), 53, program="dnsmasq"), id="answers-as-asked"),
        pytest.param(Listener("udp", parse_address("0.0.0.0"), 51820), id="the-kernels"),
        pytest.param(Listener("udp", parse_address("0.0.0.0"), 53, link="lan", program="named"), id="one-link"),
        pytest.param(Listener("udp", parse_address("::"), 5353, program="mdns"), id="link-scope"),
        pytest.param(Listener("udp", parse_address("0.0.0.0"), 45000, program="resolver"), id="client"),
    ],
)
def test_sockets_that_do_no_harm(listener: Listener) -> None:
    """What answers rightly by itself, or nobody but its own link, is no finding."""
    assert found(replace(WELL, listeners=(listener,))) == ()


def test_a_wildcard_without_a_choice() -> None:
    """On a host with one link there is no wrong source to answer from."""
    sick = Host(
        facts=host(LO, WAN, routes=DEFAULTS),
        listeners=(Listener("udp", parse_address("0.0.0.0"), 53, program="named"),),
    )
    assert found(sick, policy(OUTSIDE)) == ()


@pytest.mark.parametrize("address", ["127.0.0.53", "fe80::1", "ff02::fb", "224.0.0.251", "10.9.0.1"])
def test_addresses_that_are_not_gone(address: str) -> None:
    """Loopback, link-local and multicast addresses, and the host's own, are nobody's loss."""
    assert found(replace(WELL, listeners=(Listener("udp", parse_address(address), 53, program="x"),))) == ()


def test_an_address_to_come() -> None:
    """Where the host lets services wait for addresses that are not its own (VRRP), none is gone."""
    sick = replace(ILL["address-gone"][0], sysctls={**SYSCTLS, "net/ipv4/ip_nonlocal_bind": 1})
    assert found(sick) == ()


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        pytest.param(Rule(Family.IPV6, 1, 254, source=Prefix.parse("2001:db8:4::/64")), True, id="v6"),
        pytest.param(Rule(Family.IPV4, 1, 254, unmarked=0x3F000000), False, id="the-unmarked"),
        pytest.param(Rule(Family.IPV4, 1, 254, extra=(("FRA_OIFNAME", "vrf0"),)), False, id="bound-sockets"),
        pytest.param(
            Rule(Family.IPV4, 1, 254, fwmark=Fwmark(0x30000, 0xFF0000), extra=(("flags", 2),)), True, id="not"
        ),
        pytest.param(Rule(Family.IPV4, 1, action="nop"), False, id="nop"),
        pytest.param(Rule(Family.IPV4, 1, action="goto", target=30000), True, id="goto"),
    ],
)
def test_a_rule_that_comes_first(rule: Rule, taken: bool) -> None:
    """A rule before ours is found if it may take a packet of an identity, whatever it does with it."""
    assert ("rule-before" in checks(replace(WELL, rules=((rule, False),)))) is taken


def test_the_words_of_a_rule() -> None:
    """A rule of somebody else's is told as ip(8) would have it: inverted, and with the options that it has."""
    rule = Rule(Family.IPV4, 7, 254, fwmark=Fwmark(1, 3), extra=(("FRA_SUPPRESS_PREFIXLEN", 0), ("flags", 2)))
    assert words(rule) == "priority 7 not fwmark 0x1/0x3 suppress_prefixlength 0 lookup 254"


def test_another_mask_for_a_late_writer() -> None:
    """Who writes some bits late is got rid of by other bits; who writes them all is not."""
    some, every = (found(replace(WELL, chains=(each,)))[0].remedy for each in (writer(1 << 24, 0), writer()))
    assert "mark_mask = 0xfc000000" in some
    assert "mark_mask" not in every


def test_our_own_rules() -> None:
    """Rules of our protocol number are no finding, wherever they are."""
    assert found(replace(WELL, rules=((Rule(Family.IPV4, 100, 254), True),))) == ()


def test_where_to_go_before_a_rule() -> None:
    """With room before the first of such rules the remedy names a priority for all of ours; else the rule must move."""
    rules = tuple((Rule(Family.IPV4, priority, 254), False) for priority in (1001, 300))
    assert "rule_priority = 293;" in found(replace(WELL, rules=rules))[0].remedy
    first = ((Rule(Family.IPV4, 3, 254), False),)
    assert found(replace(WELL, rules=first))[0].remedy.startswith("move the rule behind ours")


def test_a_foreign_table_in_the_flow() -> None:
    """A flowtable of links that are no identity's changes nothing."""
    assert found(replace(WELL, flowtables=(Flowtable("inet", "fw", "f", ("lan", "dmz")),))) == ()


def test_networkd_that_is_told_not_to() -> None:
    """networkd's settings matter where it runs, and where they say yes."""
    no, yes = Setting("ManageForeignRoutes", "no", "/etc/x"), Setting("ManageForeignRoutingPolicyRules", "yes")
    runs = frozenset({"systemd-network"})
    assert found(replace(WELL, networkd=(yes,))) == ()
    assert found(replace(WELL, programs=runs, networkd=(no,))) == ()
    (finding,) = found(replace(WELL, programs=runs, networkd=(yes, no)))
    assert finding.evidence == "no file: ManageForeignRoutingPolicyRules=yes, the default"


@pytest.mark.parametrize(
    ("key", "runs", "told"),
    [
        pytest.param("ipv4.route-table", True, True, id="any-link"),
        pytest.param("wan ipv6.route-table", True, True, id="an-identitys"),
        pytest.param("lan ipv4.route-table", True, False, id="another"),
        pytest.param("wan ipv4.route-table", False, False, id="not-running"),
    ],
)
def test_network_manager(key: str, runs: bool, told: bool) -> None:
    """A table of NetworkManager's matters where it runs, and for an identity's link."""
    programs = frozenset({"NetworkManager"}) if runs else frozenset[str]()
    sick = replace(WELL, programs=programs, network_manager=(Setting(key, "100", "/etc/x"),))
    assert bool(found(sick)) is told


@pytest.mark.parametrize(
    ("file", "words"),
    [
        pytest.param(KeptFile("/p", "policy", 0o644), "", id="good"),
        pytest.param(KeptFile("/p", "policy", 0o644, owner="eve"), "eve may change it", id="owner"),
        pytest.param(KeptFile("/p", "list", 0o646), "the list of a policy may be changed", id="others"),
        pytest.param(KeptFile("/d", "policy", 0o1777, directory=True), "", id="sticky"),
        pytest.param(KeptFile("/d", "policy", 0o777, directory=True), "the directory of the policy", id="directory"),
        pytest.param(KeptFile("/s", "state", 0o640), "", id="state"),
        pytest.param(KeptFile("/s", "state", 0o644), "may be read by others", id="open-state"),
        pytest.param(KeptFile("/p", "policy", 0o600, refused=True), "can't be read by idmark", id="refused"),
    ],
)
def test_files(file: KeptFile, words: str) -> None:
    """Who owns a file, who may change it, who may read it: each fault by itself."""
    seen = found(replace(WELL, files=(file,)))
    assert len(seen) == bool(words)
    assert words in "".join(each.what for each in seen)


def test_a_full_table() -> None:
    """A connection table that is full is told from one that is nearly so."""
    full = {"net/netfilter/nf_conntrack_count": 100, "net/netfilter/nf_conntrack_max": 100}
    assert "is full" in found(replace(WELL, sysctls={**SYSCTLS, **full}))[0].what
    assert found(replace(WELL, sysctls={**SYSCTLS, **full, "net/netfilter/nf_conntrack_count": 79})) == ()


def test_a_link_with_a_dot() -> None:
    """sysctl(8) takes a dot for a slash: the remedy writes a VLAN's link as sysctl wants it."""
    vlan = replace(OUTSIDE, link="eth0.7")
    facts = host(LO, link("eth0.7", "203.0.113.2/24"), VPN, LAN, routes=["0.0.0.0/0 via 203.0.113.1 dev eth0.7"])
    deaf = {conf("ipv6", "eth0.7", "accept_ra"): 1, conf("ipv6", "eth0.7", "forwarding"): 1}
    (finding,) = found(Host(facts=facts, sysctls={**SYSCTLS, **deaf}), policy(CLAMPED, vlan))
    assert "net.ipv6.conf.eth0/7.accept_ra = 2" in finding.remedy


def test_docker_behind_auto() -> None:
    """With downstream = "auto" container networks are downstream."""
    sick, _ = ILL["containers"]
    assert found(sick) == ()
