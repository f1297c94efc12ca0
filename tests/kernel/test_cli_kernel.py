"""The real command against a real kernel: exit codes, what it says and where, and `--netns`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.kernel import KernelError, runtime
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, ISP, OUTSIDE, WILD, Host

POLICY = policy_text({"members": MEMBERS})
DIGEST = "[0-9a-f]{64}"


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    lay_links(netns, peers("far"))
    admin = Admin(netns, tmp_path)
    admin.write(POLICY)
    return admin


@pytest.mark.parametrize("words", [["status"], ["plan"], ["explain", "10.9.0.5", WILD["ipv4"], "--in", "lan"]])
def test_who_only_looks_waits_for_nothing_heavy(admin: Admin, words: list[str]) -> None:
    """A look at the kernel imports neither pydantic nor pyroute2, nor what these bring along."""
    code = "import sys\nfrom agent import cli\ncli.main(sys.argv[1:])\nprint(*sys.modules)"
    ran = admin.host.run([sys.executable, "-c", code, "-c", str(admin.file), *words])
    assert {"pydantic", "pyroute2", "asyncio", "sqlite3", "rich"}.isdisjoint(ran.splitlines()[-1].split())


def test_plan_apply_plan_remove(admin: Admin) -> None:
    """plan says 1 and what differs, apply 0, plan 0 then, remove 0 and what it took, and again that nothing is here."""
    before = admin.inventory()
    plan = admin.idmark("plan")
    assert (plan.returncode, plan.stderr) == (1, "")
    *steps, last = plan.stdout.splitlines()
    assert all(line.startswith(("+ ", "- ")) for line in steps)
    digest = re.fullmatch(f"# plan ({DIGEST})", last)[1]  # type: ignore[index]
    assert admin.inventory() == before

    apply = admin.idmark("apply", "--expect", digest)
    assert (apply.returncode, apply.stderr) == (0, "")
    assert re.fullmatch(rf"in force: [1-9]\d* changes, plan {digest}\n", apply.stdout)

    plan = admin.idmark("plan")
    assert (plan.returncode, plan.stdout, plan.stderr) == (0, "# in force: nothing to do\n", "")

    admin.file.unlink()
    remove = admin.idmark("remove")
    assert (remove.returncode, remove.stderr) == (0, "")
    assert remove.stdout.splitlines()[-1] == "removed"
    assert admin.inventory() == before
    assert admin.idmark("remove").stdout == "nothing of idmark's is here\n"


@pytest.mark.parametrize("digest", [pytest.param("0" * 64, id="another"), pytest.param("", id="an-unset-variable")])
def test_an_unexpected_plan_is_refused(admin: Admin, digest: str) -> None:
    """apply --expect with another digest, or with none at all, changes nothing, shows the plan, and says 1."""
    before = admin.inventory()
    apply = admin.idmark("apply", "--expect", digest)
    assert apply.returncode == 1
    assert "+ ip route add " in apply.stdout
    refusal = f"idmark: the plan is {DIGEST}, not '{digest}' as expected; nothing was changed\n"
    assert re.fullmatch(refusal, apply.stderr)
    assert admin.inventory() == before


@pytest.mark.parametrize("verb", ["apply", "plan", "status"])
def test_a_policy_at_fault_changes_nothing(admin: Admin, verb: str) -> None:
    """With a policy that can't be used each verb says 2 and every fault, and what is in force stays; remove works."""
    clean = admin.inventory()
    admin.apply(POLICY)
    before = admin.inventory()
    admin.file.write_text(POLICY.replace('"10.9.0.0/24"', '"10.9.0.1/24"').replace("id = 2", "id = 99"))
    done = admin.idmark(verb)
    assert (done.returncode, done.stdout) == (2, "")
    assert "10.9.0.1/24 has host bits set" in done.stderr
    assert "99 does not fit mask 0x3f000000 (1..63)" in done.stderr
    assert admin.inventory() == before
    assert admin.idmark("remove").returncode == 0
    assert admin.inventory() == clean


def test_a_policy_that_cannot_be_here_changes_nothing(admin: Admin) -> None:
    """A next hop that does not lie on its link is said in the reader's terms, with 2."""
    before = admin.inventory()
    admin.write(policy_text({"next_hop": ["203.0.113.9", "2001:db8:4::1"]}))
    apply = admin.idmark("apply")
    assert (apply.returncode, apply.stdout) == (2, "")
    assert apply.stderr == ("idmark: identity.inside.next_hop: 203.0.113.9 is not on vpn0, which has 192.0.2.128/25\n")
    assert admin.inventory() == before


def test_a_closed_identity_is_noted(admin: Admin) -> None:
    """apply without a link works, says 0, and on stderr which identity is closed and why."""
    admin.host.ip("link", "set", "vpn0", "down")
    apply = admin.idmark("apply")
    assert apply.returncode == 0
    assert "note: identity inside: ipv4 is closed: link vpn0 is down\n" in apply.stderr


def test_netns_names_where(admin: Admin, peers: Peers) -> None:
    """With --netns each verb works in that namespace, and this one stays as it is."""
    elsewhere = peers("elsewhere")
    lay_links(elsewhere, peers("beyond"))
    here = admin.inventory()
    assert admin.idmark("apply", "--netns", "elsewhere").returncode == 0
    assert admin.idmark("status", "--netns", "elsewhere").returncode == 0
    assert "proto 73" in elsewhere.ip("-N", "rule")
    assert admin.inventory() == here
    assert admin.idmark("remove", "--netns", "elsewhere").returncode == 0
    assert "proto 73" not in elsewhere.ip("-N", "rule")


def test_against_what_was_applied_there(admin: Admin, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan --against applied --netns` compares with the policy of that namespace, and not with this one's."""
    monkeypatch.setenv("STATE_DIRECTORY", str(admin.directory / "state"))
    lay_links(peers("elsewhere"), peers("beyond"))
    assert admin.idmark("apply", "--netns", "elsewhere").returncode == 0
    there = admin.idmark("plan", "--against", "applied", "--netns", "elsewhere")
    assert (there.returncode, there.stderr) == (0, "")
    assert admin.idmark("plan", "--against", "applied").returncode == 2


@pytest.mark.parametrize("name", ["nowhere", "../netns/far", "", "."])
def test_an_unknown_netns_is_refused(admin: Admin, name: str) -> None:
    """A namespace that there isn't gives 2 and one line, and is not made."""
    plan = admin.idmark("plan", "--netns", name)
    assert (plan.returncode, plan.stdout) == (2, "")
    assert re.fullmatch("idmark: enter network namespace .*: .+\n", plan.stderr)
    assert [path.name for path in Path("/run/netns").iterdir()] == ["far"]


def test_status_for_a_program(admin: Admin) -> None:
    """status --json has each identity's link, ways and exact counters, and says 1 once something differs."""
    admin.apply(POLICY)
    admin.host.send(WILD["ipv4"], INSIDE["ipv4"], data=b"12345")
    done = admin.idmark("status", "--json")
    assert done.returncode == 0
    inside, outside = json.loads(done.stdout)["identities"]
    assert (inside["link_state"], inside["members"], inside["table"]) == ("up", 2, 4001)
    assert inside["families"]["ipv4"]["counters"]["transmit"] == {"packets": 1, "bytes": 33}
    assert outside["addresses"] == [OUTSIDE["ipv4"], OUTSIDE["ipv6"]]
    admin.host.ip("rule", "flush", "protocol", "73")
    done = admin.idmark("status", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["in_force"] is False


def test_explain_asks_the_kernel(admin: Admin) -> None:
    """explain says step by step where a packet goes, and whether the kernel's own lookup agrees."""
    packet = ("explain", "10.9.0.5", WILD["ipv4"], "--in", "lan")
    done = admin.idmark(*packet)
    assert done.returncode == 1
    assert "DISAGREES" in done.stdout
    admin.apply(POLICY)
    done = admin.idmark(*packet)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"  kernel     agrees: (via \S+ )?dev vpn0 table 4001\n", done.stdout)


def test_explain_names_the_foreign_rule(admin: Admin) -> None:
    """What a foreign rule would do to the packet is told, with the rule and the remedy."""
    admin.apply(POLICY)
    admin.host.ip("rule", "add", "priority", "100", "from", INSIDE["ipv4"], "lookup", "main")
    done = admin.idmark("explain", INSIDE["ipv4"], WILD["ipv4"])
    assert done.returncode == 1
    assert "a rule of somebody else's: priority 100 from 192.0.2.130 lookup 254" in done.stdout
    assert f"DISAGREES: via {ISP['ipv4']} dev wan table 254" in done.stdout


def test_explain_compares_next_hop_and_rules(admin: Admin) -> None:
    """A default by another gateway of the same link is no agreement, and a rule of ours that is gone is told."""
    admin.apply(POLICY)
    words = "route replace default via 203.0.113.77 dev wan table 4002 metric 1024 protocol 73"
    admin.host.ip(*words.split())
    done = admin.idmark("explain", OUTSIDE["ipv4"], WILD["ipv4"])
    assert done.returncode == 1
    assert "DISAGREES: via 203.0.113.77 dev wan table 4002" in done.stdout
    admin.host.ip("rule", "delete", "priority", "4002", "from", OUTSIDE["ipv4"])
    done = admin.idmark("explain", OUTSIDE["ipv4"], WILD["ipv4"])
    assert done.returncode == 1
    assert "DISAGREES: via 203.0.113.1 dev wan table 254" in done.stdout
    assert f"NOT THERE: priority 4002 from {OUTSIDE['ipv4']} lookup 4002" in done.stdout
    status = admin.idmark("status").stdout
    assert f"ipv4       NOT IN FORCE, wanted: via {ISP['ipv4']} dev wan" in status


def test_a_route_with_a_tos_goes_too(admin: Admin) -> None:
    """A route under our number that says more than ours do is deleted like any other that is not wanted."""
    admin.apply(POLICY)
    for words in ("8.8.9.0/24 dev wan tos 0x10", "8.8.10.0/24 dev wan scope host"):
        admin.host.ip("route", "add", *words.split(), "table", "4002", "protocol", "73")
    assert admin.idmark("apply").returncode == 0
    assert not admin.plan(POLICY).text


def test_a_link_whose_name_is_no_text(admin: Admin) -> None:
    """A link of somebody else's with a name that is not UTF-8 disturbs no verb."""
    name = os.fsdecode(b"\xff\xfe")
    admin.host.ip("link", "add", name, "type", "veth", "peer", "name", "other")
    assert admin.idmark("apply").returncode == 0
    assert admin.idmark("status").returncode == 0
    assert admin.idmark("facts").returncode == 0


@pytest.mark.parametrize(
    "record",
    ["[]", '{"wan": -1}', '{"wan": true}', '{"wan": 99999999999999999999}', "[" * 100_000, "{"],
    ids=["list", "negative", "boolean", "huge", "deep", "cut-short"],
)
def test_a_record_that_cannot_be_read(admin: Admin, record: str) -> None:
    """What was recorded of sysctls and can't be read is told with its file and what to do, and stands in nobody's way.

    remove takes away all else, and says that it could not do all; what would have to be recorded is refused.
    """
    path = runtime.directory() / "src_valid_mark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record, encoding="utf-8")
    try:
        for verb, code in (("plan", 1), ("apply", 0), ("plan", 0), ("remove", 2)):
            done = admin.idmark(verb)
            assert (verb, done.returncode) == (verb, code), done.stderr
            assert f": read {path}: " in done.stderr
            assert "delete it" in done.stderr
        admin.host.sysctl("net/ipv4/conf/wan/rp_filter", 1)
        done = admin.idmark("apply")
        assert (done.returncode, "what was in force before still is" in done.stderr) == (2, True)
        assert path.read_text(encoding="utf-8") == record
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("option", "source", "packet"),
    [
        pytest.param("-4", "192.0.2.1/24", (INSIDE["ipv4"], WILD["ipv4"]), id="ipv4"),
        pytest.param("-6", "2001:db8:4::1/64", (INSIDE["ipv6"], WILD["ipv6"]), id="ipv6"),
    ],
)
def test_a_foreign_rule_with_host_bits(admin: Admin, option: str, source: str, packet: tuple[str, str]) -> None:
    """Beside somebody's rule whose source has host bits each verb works, and explain says whom the rule takes."""
    admin.host.ip(option, "rule", "add", "priority", "100", "from", source, "lookup", "100")
    before = admin.inventory()
    assert admin.idmark("plan").returncode == 1
    assert admin.idmark("apply").returncode == 0
    assert admin.idmark("status").returncode == 0
    done = admin.idmark("explain", *packet)
    assert (done.returncode, done.stderr) == (0, "")
    (told,) = (line for line in done.stdout.splitlines() if "a rule of somebody else's: priority 100 from " in line)
    assert source.partition("/")[0] in told
    others = ("10.9.0.5" if option == "-4" else "2001:db8:9::5", packet[1], "--in", "lan")
    assert "somebody else's" not in admin.idmark("explain", *others).stdout
    assert admin.idmark("remove").returncode == 0
    assert admin.inventory() == before


def test_a_foreign_route_in_our_table_is_told(admin: Admin) -> None:
    """Where somebody's route in an identity's table comes before ours, each verb says so, and the route stays."""
    admin.apply(POLICY)
    foreign = ("default", "via", "203.0.113.1", "dev", "wan", "table", "4001")
    admin.host.ip("route", "add", *foreign)
    note = f"note: table 4001 holds a route that is not idmark's, and packets may follow it: {' '.join(foreign)}\n"
    for verb in ("plan", "apply"):
        done = admin.idmark(verb)
        assert (done.returncode, done.stderr) == (0, note)
    done = admin.idmark("status")
    assert done.returncode == 0
    assert note in done.stdout
    for words in (("status", "--json"), ("plan", "--json")):
        assert [f"note: {told}\n" for told in json.loads(admin.idmark(*words).stdout)["notes"]] == [note]
    done = admin.idmark("explain", INSIDE["ipv4"], WILD["ipv4"])
    assert done.returncode == 1
    assert "another route in table 4001 leads there" in done.stdout
    assert admin.host.ip("route", "list", "table", "4001", "proto", "boot").strip() == "default via 203.0.113.1 dev wan"


# --- one at a time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_apply_waits_for_the_lock(admin: Admin, number: signal.Signals) -> None:
    """While another holds the lock an apply changes nothing, and can be ended, by a terminal that hangs up too."""
    before = admin.inventory()
    with runtime.lock("a test"):
        process = subprocess.Popen(admin.command("apply"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lock = runtime.directory() / "lock"
        while process.poll() is None and not _has_open(process.pid, lock):
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == 128 + number
    assert admin.inventory() == before


def _has_open(pid: int, file: Path) -> bool:
    """Whether a process has a file open, as far as it can be seen: it opens and closes others meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return any(each.readlink() == file for each in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_who_holds_the_lock_is_named(admin: Admin) -> None:
    """When patience ends, the error names the holder by pid and verb."""
    with runtime.lock("apply"), pytest.raises(KernelError) as error, runtime.lock("remove", patience=0):
        pass
    assert str(error.value).endswith(f"it is held by pid {os.getpid()} (idmark apply)")


def test_without_the_privilege_it_says_so(admin: Admin) -> None:
    """Without CAP_NET_ADMIN the answer is 2 and how to get it."""
    words = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin", *admin.command("plan")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "idmark: plan looks at the kernel's network state: it needs CAP_NET_ADMIN (sudo)\n"
