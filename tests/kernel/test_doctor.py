"""What the doctor finds in a real namespace: a host made ill in one way, and the check that sees it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import doctor, reconcile
from agent.doctor import Finding
from agent.examination import examine, missing
from agent.kernel import chains
from agent.kernel.nft import Nft
from agent.kernel.processes import processes
from agent.model import Policy
from agent.policy import load
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Gateway, Peers
from tests.kernel.net import INSIDE, LAN_HOST, OUTSIDE, SILENCE, Host

POLICY = policy_text({"members": MEMBERS})
#: linux/netfilter/nfnetlink.h and nf_tables.h: what a batch of one rule wants.
NETLINK_NETFILTER = 12
BATCH_BEGIN, BATCH_END, NEWRULE = 0x10, 0x11, 10 << 8 | 6
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE, NLM_F_APPEND = 0x1, 0x4, 0x400, 0x800
#: What the chains of other programs look like.
CHAIN = "table {family} {table} {{ chain {chain} {{ type {kind} hook {hook} priority {priority}; {rule}; }}; }}"


@dataclass(frozen=True, slots=True)
class Patient:
    """A gateway with a policy in force."""

    admin: Admin

    @property
    def host(self) -> Host:
        return self.admin.host

    def findings(self, policy: Policy | None = None) -> tuple[Finding, ...]:
        """All that the doctor finds; but for the state kept on this machine, which is nothing of the test's."""
        with reconcile.opened() as kernel:
            found = doctor.findings(*examine(policy or load(self.admin.file), kernel))
        return tuple(each for each in found if "state" not in each.what)

    def only(self, check: str) -> Finding:
        """The one thing that is found, which this check does."""
        found = self.findings()
        assert [each.check for each in found] == [check], found
        return found[0]

    def chain(self, rule: str, hook: str = "prerouting", priority: int = 0, **names: str) -> None:
        """Somebody else's base chain, with one rule."""
        words = {"family": "ip", "table": "theirs", "chain": "c", "kind": "filter", **names}
        self.host.nft(CHAIN.format(rule=rule, hook=hook, priority=priority, **words))

    def command(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the real `idmark doctor`, with a state of the test's own."""
        state = {"STATE_DIRECTORY": str(self.admin.directory / "state")}
        command = self.admin.command("doctor", *words)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | state | environment
        )


@pytest.fixture
def patient(netns: Host, peers: Peers, tmp_path: Path) -> Patient:
    lay_links(netns, peers("far"))
    admin = Admin(netns, tmp_path)
    admin.apply(POLICY)
    return Patient(admin)


def test_a_gateway_that_does_well(patient: Patient) -> None:
    """With a policy in force and nothing else, nothing is found; doctor says so, with 0."""
    assert patient.findings() == ()
    done = patient.command()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{len(doctor.CHECKS)} checks: clean\n", "")


def test_it_changes_nothing(patient: Patient) -> None:
    """Whatever is looked at, all that idmark might touch is the same byte for byte."""
    before = patient.admin.inventory()
    patient.findings()
    assert patient.admin.inventory() == before


def test_before_there_is_a_policy_in_force(netns: Host, peers: Peers, tmp_path: Path) -> None:
    """A policy that is not in force yet is looked at like one that is."""
    lay_links(netns, peers("far"))
    admin = Admin(netns, tmp_path)
    admin.write(POLICY)
    patient = Patient(admin)
    assert patient.findings() == ()
    netns.ip("rule", "add", "priority", "100", "lookup", "main")
    assert {each.check for each in patient.findings()} == {"rule-before"}


def test_without_any_policy(netns: Host) -> None:
    """A host that is to get a policy is looked at too: who writes marks there, whose are the numbers."""
    netns.nft(CHAIN.format(family="ip", table="t", chain="c", kind="filter", hook="output", priority=0,
                           rule="meta mark set 0x01000000"))  # fmt: skip
    netns.ip("rule", "add", "priority", "4007", "lookup", "main")
    with reconcile.opened() as kernel:
        found = doctor.findings(*examine(Policy("", None, ()), kernel))
    assert {each.check for each in found} - {"file"} == {"mark-writer", "number-taken"}


def test_for_a_program(patient: Patient) -> None:
    """--json has the names of all checks, and each finding with evidence and remedy; with findings the code is 1."""
    patient.host.ip("rule", "add", "priority", "100", "lookup", "main")
    done = patient.command("--json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["checks"] == list(doctor.CHECKS)
    assert {tuple(each) for each in report["findings"]} == {("check", "what", "evidence", "remedy")}
    assert report["findings"][0]["evidence"] == "ip rule: priority 100 lookup 254; ours begin at 4001"


def test_trouble(patient: Patient) -> None:
    """A policy that can't be used is trouble, 2, and so is a namespace that there isn't."""
    assert patient.command("--netns", "nowhere").returncode == 2
    patient.admin.file.write_text("gateway = 1")
    done = patient.command()
    assert (done.returncode, done.stdout) == (2, "")


def test_in_another_namespace(patient: Patient, peers: Peers) -> None:
    """With --netns it is that namespace which is looked at, not this one."""
    elsewhere = peers("elsewhere", forwarding=True)
    lay_links(elsewhere, peers("beyond"))
    patient.host.ip("rule", "add", "priority", "100", "lookup", "main")
    done = patient.command("--netns", "elsewhere")
    assert (done.returncode, done.stderr) == (0, "")
    elsewhere.ip("rule", "add", "priority", "4001", "lookup", "main")
    assert "number-taken" in patient.command("--netns", "elsewhere").stdout


# --- other programs' rules and routes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        pytest.param("lookup main", "inside, outside", id="everything"),
        pytest.param(f"from {INSIDE['ipv4']} lookup main", "inside", id="own-address"),
        pytest.param("from 10.9.0.0/28 lookup main", "inside", id="some-of-the-members"),
        pytest.param("fwmark 0x2000000/0x2000000 lookup main", "outside", id="our-bits"),
        pytest.param("fwmark 0x100/0x3f00 lookup main", "inside, outside", id="bits-that-a-packet-may-have"),
        pytest.param("not fwmark 0xca6c lookup main", "inside, outside", id="wg-quick"),
        pytest.param("iif lan unreachable", "inside, outside", id="refused"),
    ],
)
def test_a_rule_that_comes_first(patient: Patient, rule: str, taken: str) -> None:
    """A rule before ours that may take an identity's packets is found, with whose they are."""
    patient.host.ip("rule", "add", "priority", "100", *rule.split())
    finding = patient.only("rule-before")
    assert finding.what == f"a rule that comes first takes packets of {taken}"
    assert finding.remedy.startswith("in the policy, [kernel]: rule_priority = 93; or move the rule behind ours")


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("priority 100 from 10.88.0.0/16 lookup main", id="another-source"),
        pytest.param("priority 100 fwmark 0x3000000/0x3f000000 lookup main", id="another-mark"),
        pytest.param("priority 220 lookup 220", id="an-empty-table"),
        pytest.param("priority 1000 l3mdev", id="vrf"),
        pytest.param("priority 5270 lookup main", id="behind-ours"),
        pytest.param("priority 100 lookup local", id="this-hosts-own"),
    ],
)
def test_a_rule_that_takes_nothing_of_ours(patient: Patient, rule: str) -> None:
    """A rule that takes no identity's packets is no finding."""
    patient.host.ip("rule", "add", *rule.split())
    assert patient.findings() == ()


def test_wg_quick_after_us(patient: Patient) -> None:
    """What wg-quick adds without a priority comes before ours, and it is told what to do about wg-quick."""
    patient.host.ip("route", "add", "default", "dev", "vpn0", "table", "51820")
    patient.host.ip("rule", "add", "not", "fwmark", "51820", "lookup", "51820")
    finding = patient.only("rule-before")
    assert "priority 4000" in finding.evidence
    assert finding.remedy.endswith(
        "WireGuard's wg-quick: set `Table = off` in its wg0.conf, and leave the roads to idmark"
    )


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        pytest.param("priority 4002 from 10.88.0.0/16 lookup main", "a rule at priority 4002", id="priority"),
        pytest.param("priority 9000 from 10.88.0.0/16 lookup 4002", "looks up table 4002", id="table"),
    ],
)
def test_a_number_of_ours(patient: Patient, rule: str, what: str) -> None:
    """A rule at a priority of ours, or one that leads to a table of ours, is found."""
    patient.host.ip("rule", "add", *rule.split())
    assert what in patient.only("number-taken").what


def test_routes_in_our_tables(patient: Patient) -> None:
    """Somebody's route in a table of ours is found, and told in ip's words."""
    patient.host.ip("route", "add", "198.51.100.0/24", "dev", "lan", "table", "4001")
    finding = patient.only("number-taken")
    assert finding.evidence == "ip route show table 4001: 198.51.100.0/24 dev lan table 4001"


def test_a_policy_that_does_not_fit(patient: Patient) -> None:
    """A next hop that isn't on its link is found."""
    patient.admin.write(policy_text({"next_hop": ["203.0.113.9", "2001:db8:4::1"]}))
    assert "203.0.113.9 is not on vpn0" in patient.only("misfit").evidence


# --- other programs in the hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "priority", "rule", "bits"),
    [
        pytest.param("prerouting", -140, "meta mark set ct mark", "0x3f000000 of 0x3f000000", id="restored-after-ours"),
        pytest.param("output", 0, "meta mark set 0xca6c", "0x3f000000 of 0x3f000000", id="set-whole"),
        pytest.param(
            "output", 0, "meta mark set meta mark and 0xfeffffff", "0x01000000 of 0x3f000000", id="one-bit-cleared"
        ),
        pytest.param(
            "prerouting", -300, "meta mark set 0x6d6f6c65", "0x2d000000 of 0x3f000000", id="a-value-that-has-our-bits"
        ),
        pytest.param("forward", 0, "meta mark set meta mark or 0x01000000", "0x01000000 of", id="behind-the-routing"),
    ],
)
def test_a_writer_of_marks(patient: Patient, hook: str, priority: int, rule: str, bits: str) -> None:
    """Who takes our marks away, or sets bits of ours, is found: which bits, by which rule of which chain."""
    patient.chain(rule, hook, priority)
    finding = patient.only("mark-writer")
    assert bits in finding.what
    assert f"called at priority {priority}: ip theirs c, handle " in finding.evidence


@pytest.mark.parametrize(
    ("hook", "priority", "rule"),
    [
        pytest.param("prerouting", -150, "meta mark set ct mark", id="restored-before-ours"),
        pytest.param("output", 0, "meta mark set meta mark and 0xff00ffff or 0x00040000", id="other-bits"),
        pytest.param("postrouting", 0, "ct mark set meta mark", id="saved"),
        pytest.param("input", 0, "meta mark set 0x01000000", id="for-this-host"),
    ],
)
def test_a_writer_who_does_no_harm(patient: Patient, hook: str, priority: int, rule: str) -> None:
    """Who restores whole marks before ours are written, or writes other bits, is no finding."""
    patient.chain(rule, hook, priority)
    assert patient.findings() == ()


def test_a_writer_behind_jumps_and_maps(patient: Patient) -> None:
    """A rule is found in a chain that a base chain leads to, by a jump and from there by a verdict map."""
    patient.host.nft("""
        table inet theirs {
            chain writes { meta mark set 0x01000000; }
            chain middle { tcp dport vmap { 22 : jump writes, 23 : drop }; }
            chain unused { meta mark set 0x3f000000; }
            chain base { type filter hook output priority 0; jump middle; jump unused; }
        }
        flush chain inet theirs base
        add rule inet theirs base jump middle
    """)
    assert "inet theirs writes" in patient.only("mark-writer").evidence


def test_the_remedy_for_a_late_writer(patient: Patient) -> None:
    """Where there is a free priority behind the writer, and before dstnat, the remedy names it; and it helps."""
    patient.chain("meta mark set ct mark", "prerouting", -140)
    patient.chain("accept", "output", -139, table="others")
    assert "hook_priority = -138;" in patient.only("mark-writer").remedy
    patient.admin.apply(policy_text({"members": MEMBERS}, kernel={"hook_priority": -138}))
    assert patient.findings() == ()


def test_an_iptables_target(patient: Patient) -> None:
    """The bits that a MARK of iptables-nft writes are found, which nft itself does not tell.

    The rule is sent as iptables sends it: `-t mangle -A OUTPUT -j MARK --or-mark 0x1000000`.
    """
    patient.chain("accept", "output", -100, table="mangle", chain="OUTPUT")
    _add_target("mangle", "OUTPUT", "MARK", 2, struct.pack("=II", 0x01000000, 0x01000000))
    finding = patient.only("mark-writer")
    assert "sets bits" not in finding.what
    assert "0x01000000 of 0x3f000000 in hook output" in finding.what


def test_bits_of_a_neighbour(patient: Patient) -> None:
    """A program that is here, and uses bits that are ours, is found by its traces; the remedy's mask helps."""
    patient.host.ip("link", "add", "cali0123456789a", "type", "veth", "peer", "name", "pod")
    finding = patient.only("mark-neighbour")
    assert finding.evidence == "link cali0123456789a"
    assert "mark_mask = 0x0000fc00" in finding.remedy
    patient.admin.apply(policy_text({"members": MEMBERS}, kernel={"mark_mask": 0x0000FC00}))
    assert patient.findings() == ()


@pytest.mark.parametrize(
    ("hook", "kind", "priority"),
    [
        pytest.param("prerouting", "filter", -145, id="prerouting"),
        pytest.param("output", "route", -145, id="output"),
        pytest.param("postrouting", "filter", 300, id="postrouting"),
    ],
)
def test_the_same_place_in_a_hook(patient: Patient, hook: str, kind: str, priority: int) -> None:
    """Somebody's chain at exactly the priority of ours is found."""
    patient.chain("accept", hook, priority, kind=kind)
    assert f"hook {hook}, priority {priority}" in patient.only("hook-tie").what


@pytest.mark.parametrize(
    ("family", "priority", "rule"),
    [
        pytest.param("ip", -300, "fib saddr . mark . iif oif missing drop", id="before-our-marks"),
        pytest.param("ip6", 10, "fib saddr . iif oif missing drop", id="without-marks"),
    ],
)
def test_a_check_of_the_way_back(patient: Patient, family: str, priority: int, rule: str) -> None:
    """A reverse path check that can't know our marks is found."""
    patient.chain(rule, "prerouting", priority, family=family)
    assert f"nft chain {family} theirs c, handle " in patient.only("reverse-check").evidence


@pytest.mark.parametrize(
    ("masquerade", "priority", "rule", "lost"),
    [
        pytest.param(False, -300, "fib saddr . mark . iif oif missing drop", True, id="before-our-marks"),
        pytest.param(False, 10, "fib saddr . iif oif missing drop", True, id="without-marks"),
        pytest.param(False, 10, "fib saddr . mark . iif oif missing drop", False, id="by-marks"),
        pytest.param(False, -300, "fib saddr . mark oif missing drop", False, id="loose"),
        pytest.param(True, -300, "fib saddr . mark . iif oif missing drop", False, id="masqueraded"),
        pytest.param(True, 10, "fib saddr . iif oif missing drop", True, id="masqueraded-without-marks"),
    ],
)
def test_what_is_found_is_lost(
    gateway: Gateway, tmp_path: Path, *, masquerade: bool, priority: int, rule: str, lost: bool
) -> None:
    """A reverse path check is found exactly if it drops what comes from afar, by I's link, for a member."""
    patient = Patient(Admin(gateway.gw, tmp_path))
    patient.admin.apply(policy_text({"members": MEMBERS, "masquerade": masquerade}))
    patient.chain(rule, "prerouting", priority)
    assert [each.check for each in patient.findings()] == ["reverse-check"] * lost
    afar = "198.51.100.77"
    gateway.corp.ip("address", "add", f"{afar}/32", "dev", "lo")
    with gateway.lan.udp(LAN_HOST["ipv4"], 514) as member, gateway.corp.udp(afar, 514) as far:
        if masquerade:
            # The member asks, and is answered.
            member.sendto(b"x", (afar, 514))
            _, address = far.recvfrom(100)
            far.sendto(b"x", address)
        else:
            far.sendto(b"x", (LAN_HOST["ipv4"], 514))
        member.settimeout(SILENCE)
        with pytest.raises(TimeoutError) if lost else contextlib.nullcontext():
            assert member.recv(100) == b"x"


def test_firewallds_check(patient: Patient) -> None:
    """firewalld's check is told from others' by its table, and the remedy is firewalld's own setting."""
    rule = "meta nfproto ipv6 fib saddr . mark . iif oif missing drop"
    patient.chain(rule, "prerouting", -290, family="inet", table="firewalld", chain="raw_PREROUTING")
    assert "IPv6_rpfilter=no" in patient.only("reverse-check").remedy


# --- settings of the kernel ------------------------------------------------------------------------------------------


def test_strict_rp_filter(patient: Patient) -> None:
    """Strict rp_filter on an identity's link is found while the mark does not count there; not once apply set it."""
    patient.host.sysctl("net/ipv4/conf/vpn0/rp_filter", 1)
    finding = patient.only("rp-filter")
    assert "rp_filter: all 0, vpn0 1, in effect 1" in finding.evidence
    patient.admin.apply(POLICY)
    assert patient.findings() == ()


def test_marks_for_all_links(patient: Patient) -> None:
    """conf/all/src_valid_mark is found where some link's rp_filter is strict; where none is, it changes nothing."""
    patient.host.sysctl("net/ipv4/conf/all/src_valid_mark", 1)
    assert patient.findings() == ()
    patient.host.sysctl("net/ipv4/conf/lan/rp_filter", 1)
    assert "on every link, and so by any program's: lan" in patient.only("mark-valid-for-all").what


def test_own_sources(patient: Patient) -> None:
    """A link with accept_local, and nobody who drops what claims to be this host; and the other way round."""
    patient.host.sysctl("net/ipv4/conf/lan/accept_local", 1)
    assert "accept_local: all 0, lan 1, in effect 1" in patient.only("own-sources").evidence
    patient.admin.apply(policy_text(kernel={"drop_own_sources": True}))
    assert patient.findings() == ()
    patient.host.sysctl("net/ipv4/conf/lan/rp_filter", 2)
    assert "spares nobody" in patient.only("own-sources").what


def test_members_behind_another_router(patient: Patient) -> None:
    """Members that main reaches through a router on the LAN are found, until the policy names the link."""
    patient.admin.apply(policy_text({"members": ["10.77.0.0/16"]}))
    patient.host.ip("route", "add", "10.77.0.0/16", "via", "10.9.0.7", "dev", "lan")
    found = patient.only("members-behind")
    assert found.what.startswith("members of inside are behind another router")
    assert "10.77.0.0/16: via 10.9.0.7 dev lan table 254" in found.evidence
    assert found.remedy.startswith('in the policy: downstream = ["lan"]')
    patient.admin.apply(policy_text({"members": ["10.77.0.0/16"]}, downstream=["lan"]))
    assert patient.findings() == ()


@pytest.mark.parametrize(
    ("sysctl", "setting"),
    [
        pytest.param("net/ipv4/conf/all/forwarding", "net.ipv4.ip_forward = 1", id="ipv4"),
        pytest.param("net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding = 1", id="ipv6"),
    ],
)
def test_members_without_forwarding(patient: Patient, sysctl: str, setting: str) -> None:
    """Members of a family that this host does not forward are found."""
    patient.host.sysctl(sysctl, 0)
    patient.admin.apply(POLICY)  # the IPv6 default may have gone with it
    assert setting in patient.only("forwarding").remedy


def test_deaf_to_routers(patient: Patient) -> None:
    """accept_ra = 1 with forwarding is found on the link of an "auto" identity without a way, and not with 2."""
    patient.host.sysctl("net/ipv6/conf/wan/accept_ra", 1)
    assert patient.findings() == ()
    patient.host.ip("-6", "route", "delete", "default")
    assert 'next_hop and addresses = "auto"' in patient.only("accept-ra").what
    patient.host.sysctl("net/ipv6/conf/wan/accept_ra", 2)
    assert patient.findings() == ()


def test_a_narrow_link(patient: Patient) -> None:
    """A link that carries less than the members' is found, unless the policy clamps."""
    patient.host.ip("link", "set", "vpn0", "mtu", "1360")
    patient.admin.apply(POLICY)
    assert patient.only("mtu").evidence == "the MTU of vpn0 is 1360, of lan 1500"
    patient.admin.apply(policy_text({"members": MEMBERS, "clamp_mss": True}))
    assert patient.findings() == ()


def test_a_container_network(patient: Patient) -> None:
    """Docker's network is found where the policy lists what is downstream, and not that; with "auto" it is."""
    patient.host.ip_batch("""
        link add docker0 type veth peer name container
        link set docker0 up
        address add 172.17.0.1/16 dev docker0
    """)
    assert patient.admin.apply(POLICY).steps
    assert patient.findings() == ()
    patient.admin.apply(policy_text({"members": MEMBERS}, downstream=["lan"]))
    assert patient.only("containers").remedy == 'in the policy: downstream = ["lan", "docker0"]'


def test_a_feature_that_is_missing() -> None:
    """What the kernel can't do is told with nft's own words, and only that; what it can do is nothing."""
    assert missing(Nft()) == ()
    nonsense = {"sums": "chain c { meta mark set 1; }", "wonders": "chain c { wonder; }"}
    ((what, why),) = missing(Nft(), nonsense)
    assert what == "wonders"
    assert "Error: syntax error" in why


# --- services --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting(kind: int, address: str, port: int) -> Iterator[socket.socket]:
    """A socket that waits for whoever comes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, kind)) as sock:
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock


@pytest.mark.parametrize(
    ("address", "names"),
    [
        pytest.param("0.0.0.0", [INSIDE["ipv4"], OUTSIDE["ipv4"]], id="ipv4"),
        pytest.param("::", [INSIDE["ipv4"], INSIDE["ipv6"], OUTSIDE["ipv4"]], id="both"),
    ],
)
def test_a_wildcard_udp_service(patient: Patient, address: str, names: list[str]) -> None:
    """A UDP service on a wildcard socket is found, with the process's name and the addresses to bind to."""
    with waiting(socket.SOCK_DGRAM, address, 514):
        finding = patient.only("udp-wildcard")
    name = Path("/proc/self/comm").read_text().strip()
    assert finding.what.startswith(f"{name} waits on UDP port 514 of any address")
    assert f":514 ({name}, pid {os.getpid()})" in finding.evidence
    assert finding.remedy.partition(": ")[2].partition(" and ")[0] == ", ".join(names[:3])


@pytest.mark.parametrize(
    ("kind", "address", "port"),
    [
        pytest.param(socket.SOCK_DGRAM, INSIDE["ipv4"], 514, id="bound-to-an-address"),
        pytest.param(socket.SOCK_STREAM, "0.0.0.0", 514, id="tcp"),
        pytest.param(socket.SOCK_DGRAM, "0.0.0.0", 68, id="dhcp"),
        pytest.param(socket.SOCK_DGRAM, "0.0.0.0", 0, id="a-client"),
    ],
)
def test_a_service_that_answers_rightly(patient: Patient, kind: int, address: str, port: int) -> None:
    """A service that is bound to an address, or goes by TCP, and who is no service, are no findings."""
    with waiting(kind, address, port):
        assert patient.findings() == ()


def test_a_kernel_socket(patient: Patient) -> None:
    """A tunnel of the kernel's own waits on a wildcard too, and nobody can bind it."""
    patient.host.ip("link", "add", "vx0", "type", "vxlan", "id", "7", "dstport", "4789", "dev", "lan")
    patient.host.ip("link", "set", "vx0", "up")
    assert patient.findings() == ()


def test_an_address_that_is_gone(patient: Patient) -> None:
    """A service on an address that has gone from its link is found; not before, nor on one of a local route."""
    with _bound_to("10.9.0.77", patient.host):
        finding = patient.only("address-gone")
        assert "waits on 10.9.0.77, which is on no link" in finding.what
        patient.host.ip("route", "add", "local", "10.9.0.77", "dev", "lo")
        assert patient.findings() == ()


@contextlib.contextmanager
def _bound_to(address: str, host: Host) -> Iterator[None]:
    host.ip("address", "add", f"{address}/32", "dev", "lan")
    with waiting(socket.SOCK_STREAM, address, 8080):
        host.ip("address", "delete", f"{address}/32", "dev", "lan")
        yield


def test_processes_of_this_namespace(patient: Patient, peers: Peers) -> None:
    """A process is here or elsewhere by its network namespace, and known by its name's first 15 bytes."""
    program = patient.admin.directory / "systemd-networkd"
    shutil.copy(shutil.which("sleep") or "", program)
    words = [str(program), "60"]
    here = subprocess.Popen(words)
    there = subprocess.Popen(["ip", "netns", "exec", peers("elsewhere").name, *words])
    try:
        while Path(f"/proc/{there.pid}/comm").read_text() != "systemd-network\n":
            pass
        known = {each.pid: (each.name, each.here) for each in processes()}
        assert (known[here.pid], known[there.pid]) == (("systemd-network", True), ("systemd-network", False))
    finally:
        for process in (here, there):
            process.kill()
            process.wait()


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_of_a_policy(patient: Patient) -> None:
    """A list that others may write, and a policy in a directory that is anybody's, are found."""
    place = patient.admin.directory
    (place / "members.txt").write_text("\n".join(MEMBERS))
    patient.admin.apply(policy_text({"members": ["file:members.txt"]}))
    assert patient.findings() == ()
    (place / "members.txt").chmod(0o664)
    assert patient.only("file").remedy == f"chmod go-w {place}/members.txt"
    (place / "members.txt").chmod(0o644)
    place.chmod(0o777)
    assert patient.only("file").what == "the directory of the policy may be changed by others"


def test_files_of_the_state(patient: Patient) -> None:
    """What is kept for the next boot is nothing for everybody's eyes."""
    state = patient.admin.directory / "state"
    state.mkdir(0o750)
    (state / "applied.toml").touch(0o640)
    assert patient.command().returncode == 0
    (state / "applied.toml").chmod(0o644)
    assert f"chmod o-rwx {state}/applied.toml" in patient.command().stdout


def test_a_clock_that_was_set_back(patient: Patient) -> None:
    """A policy from the future is found: it is the clock that is wrong."""
    os.utime(patient.admin.file, (4_000_000_000, 4_000_000_000))
    assert str(patient.admin.file) in patient.only("clock").evidence


# --- what the kernel really says -------------------------------------------------------------------------------------


def test_both_ways_to_write_marks(patient: Patient) -> None:
    """The same bits are read from what nft and what iptables-nft send: set, or, xor, restored from the connection's."""
    patient.chain("accept", "output", -150, table="mangle", chain="OUTPUT", kind="route")
    _add_target("mangle", "OUTPUT", "MARK", 2, struct.pack("=II", 0x4000, 0x4000))
    _add_target("mangle", "OUTPUT", "CONNMARK", 1, struct.pack("=IIIB", 0, 0xFF00, 0xFF00, 2) + bytes(3))
    _add_target("mangle", "OUTPUT", "CONNMARK", 1, struct.pack("=IIIB", 0, 0xFF00, 0xFF00, 1) + bytes(3))
    patient.chain("meta mark set meta mark or 0x4000", "output", -150, chain="c_or")
    patient.chain("meta mark set meta mark xor 0x10", "output", -150, chain="c_xor")
    patient.chain("meta mark set meta mark and 0xffff00ff", "output", -150, chain="c_and")
    patient.chain("meta mark set ip daddr map { 192.0.2.1 : 0x1 }", "output", -150, chain="c_map")
    patient.chain("ip daddr 192.0.2.1 meta mark 0x3 meta mark set 0x5", "output", -150, chain="c_set")
    written = {chain.name: [(hex(w.bits), hex(w.ones)) for w in chain.writes] for chain in chains.read().chains}
    everything = "0xffffffff"
    assert written["OUTPUT"] == [("0x4000", "0x4000"), ("0xff00", "0xff00")]
    assert written["c_or"] == [("0x4000", "0x4000")]
    assert written["c_xor"] == [("0x10", "0x10")]
    assert written["c_and"] == [("0xff00", "0x0")]
    assert written["c_map"] == [(everything, everything)]
    assert written["c_set"] == [(everything, "0x5")]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _message(kind: int, flags: int, family: int, resource: int, body: bytes = b"") -> bytes:
    body = struct.pack("=BBH", family, 0, socket.htons(resource)) + body
    return struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body


def _add_target(table: str, chain: str, name: str, revision: int, info: bytes) -> None:
    """Append a rule with a target of iptables' to a chain of family ip. Raises OSError."""
    target = _attribute(1, f"{name}\0".encode()) + _attribute(2, struct.pack(">I", revision)) + _attribute(3, info)
    expression = _attribute(1, b"target\0") + _attribute(2, target)
    body = _attribute(1, f"{table}\0".encode()) + _attribute(2, f"{chain}\0".encode())
    body += _attribute(4, _attribute(1, expression))
    flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND
    batch = _message(BATCH_BEGIN, 0, 0, 10) + _message(NEWRULE, flags, socket.AF_INET, 0, body)
    with contextlib.closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)) as sock:
        sock.send(batch + _message(BATCH_END, 0, 0, 10))
        (error,) = struct.unpack_from("=i", sock.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error))
