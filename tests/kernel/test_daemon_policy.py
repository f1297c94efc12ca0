"""Which policy the daemon keeps: reloads of good and faulty files, and what other verbs do beside it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from agent import ledger, state
from agent.kernel import known, runtime
from agent.kernel.nfnl import TRUSTED, Nfnl
from agent.policy import load
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, OUTSIDE, WILD, Host
from tests.kernel.running import QUIET, Site, eventually, kept, running

ONE = policy_text({"members": MEMBERS, "masquerade": True})
#: The ids exchanged, other members, a chain more.
OTHER = policy_text({"id": 2, "members": ["10.9.0.0/25"], "clamp_mss": True}, {"id": 1, "when_down": "main"})
#: Three faults: of the file's shape, of two keys, and of one that is missing.
FAULTY = policy_text({"id": 99, "members": ["10.9.0.7/24"]}, {"colour": "blue"})
#: A next hop that is not on its link, which only the host knows.
NOT_HERE = policy_text({"next_hop": ["192.0.2.1", "2001:db8:4::1"]})


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    lay_links(netns, peers("far"))
    return Admin(netns, tmp_path)


def digest() -> str:
    """The policy that the daemon says it keeps."""
    at_work = ledger.current()
    return at_work.policy if at_work else ""


def keeps(site: Site, file: Path) -> bool:
    """Whether what a file says is kept, and is in force."""
    return digest() == load(file).digest and site.in_force(file)


def reloaded(site: Site) -> float:
    """Whether the last reload was a good one, by the metrics."""
    return site.daemon.metric("idmark_policy_last_reload_successful")


# --- reload ----------------------------------------------------------------------------------------------------------


def test_hangup(admin: Admin) -> None:
    """SIGHUP: another policy is in force when the service manager hears READY=1."""
    with kept(admin, ONE) as site:
        admin.file.write_text(OTHER)
        site.daemon.reload()
        assert keeps(site, admin.file), site.said()
        assert site.daemon.metric("idmark_policy_info", digest=load(admin.file).digest) == 1


def test_hangup_without_a_change(admin: Admin) -> None:
    """SIGHUP with the same policy: READY=1, and nothing is sent."""
    with kept(admin, ONE) as site, site.watched() as watch:
        admin.file.write_text(f"# a comment\n{ONE}")
        site.daemon.reload()
        assert watch.settled() == {}
        assert reloaded(site) == 1


def test_changed_file(admin: Admin) -> None:
    """A policy file that is written to is in force soon, without a word to the daemon."""
    with kept(admin, ONE) as site:
        admin.file.write_text(OTHER)
        assert eventually(lambda: keeps(site, admin.file)), site.said()


def test_replaced_file(admin: Admin) -> None:
    """So is one that another file was renamed over, even one of its size and time: as configuration management does."""
    with kept(admin, ONE) as site:
        new = admin.file.with_suffix(".new")
        new.write_text(ONE.replace("10.9.0.0/24", "10.8.0.0/24"))
        status = admin.file.stat()
        os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
        new.rename(admin.file)
        assert eventually(lambda: keeps(site, admin.file)), site.said()


def test_symbolic_link(admin: Admin) -> None:
    """So is one behind a symbolic link that leads elsewhere now: as in a versioned folder."""
    for name, text in (("1.toml", ONE), ("2.toml", OTHER)):
        (admin.directory / name).write_text(text)
    admin.file.symlink_to("1.toml")
    with kept(admin) as site:
        new = admin.directory / "new"
        new.symlink_to("2.toml")
        new.rename(admin.file)
        assert eventually(lambda: keeps(site, admin.file)), site.said()


def test_changed_list(admin: Admin) -> None:
    """A list that the policy names, written in pieces, is in force when it is whole; a new list is watched as well."""
    first, second = admin.directory / "first.txt", admin.directory / "second.txt"
    first.write_text("10.9.0.0/24\n")
    second.write_text("10.8.0.0/24\n")
    with kept(admin, policy_text({"members": ["file:first.txt"]})) as site:
        with first.open("a") as file:
            for number in range(50):
                file.write(f"10.10.{number}.0/24\n")
                file.flush()
        assert eventually(lambda: keeps(site, admin.file)), site.said()
        admin.file.write_text(policy_text({"members": ["file:first.txt", "file:second.txt"]}))
        assert eventually(lambda: keeps(site, admin.file)), site.said()
        second.write_text("10.7.0.0/24\n")
        assert eventually(lambda: keeps(site, admin.file)), site.said()
        assert len(load(admin.file).identity("inside").members) == 52


def test_what_large_sets_hold_is_left(admin: Admin) -> None:
    """After a reload of a long list the next verb knows what is in force: it is told, and reads nothing back."""
    many = admin.directory / "many.txt"
    many.write_text("".join(f"10.{number >> 8}.{number & 255}.0/24\n" for number in range(TRUSTED + 2)))
    with kept(admin, policy_text({"members": ["file:many.txt"]})) as site:
        assert eventually(lambda: _is_told(site)), site.said()
        many.write_text(many.read_text().replace("10.0.7.0/24", "10.99.7.0/24"))
        site.daemon.reload()
        assert eventually(lambda: _is_told(site)), site.said()


def _is_told(site: Site) -> bool:
    """Whether what was left is what the kernel has, and of its ruleset's generation."""
    left = known.left()
    with Nfnl() as untold:
        table = untold.table("idmark")
        assert table
        held = {item.name: item.elements for item in table.sets if len(item.elements) > TRUSTED}
        return bool(left and held and left.sets == held and left.generation == untold.generation())


def test_faulty_file(admin: Admin) -> None:
    """A faulty file changes nothing; each fault is logged once, the metrics say 0; and 1 when it is mended.

    What was in force is repaired meanwhile as ever.
    """
    with kept(admin, ONE) as site, site.watched() as watch:
        before = digest()
        admin.file.write_text(FAULTY)
        assert eventually(lambda: reloaded(site) == 0), site.said()
        time.sleep(1.5)  # the files have been looked at again
        for fault in ("identity.inside.id", "identity.inside.members", "identity.outside.colour"):
            assert site.daemon.logged(fault) == 1, site.said()
        assert digest() == before
        assert watch.settled() == {}
        everything = sorted(admin.inventory().splitlines())
        admin.host.nft("delete table inet idmark")
        assert eventually(lambda: sorted(admin.inventory().splitlines()) == everything), site.said()
        admin.file.write_text(OTHER)
        assert eventually(lambda: reloaded(site) == 1), site.said()
        assert keeps(site, admin.file)


def test_faulty_list(admin: Admin) -> None:
    """A list that can't be read any more changes nothing, and is logged; it need not be the policy that is mended."""
    members = admin.directory / "members.txt"
    members.write_text("10.9.0.0/24\n")
    with kept(admin, policy_text({"members": ["file:members.txt"]})) as site, site.watched() as watch:
        members.unlink()
        assert eventually(lambda: reloaded(site) == 0), site.said()
        assert site.daemon.logged("members.txt")
        assert watch.settled() == {}
        members.write_text("10.9.0.0/25\n")
        assert eventually(lambda: reloaded(site) == 1), site.said()
        assert keeps(site, admin.file)


def test_missing_file(admin: Admin) -> None:
    """A policy file that is deleted changes nothing; when there is one again it is taken."""
    with kept(admin, ONE) as site, site.watched() as watch:
        admin.file.unlink()
        assert eventually(lambda: reloaded(site) == 0), site.said()
        assert watch.settled() == {}
        admin.file.write_text(OTHER)
        assert eventually(lambda: reloaded(site) == 1), site.said()
        assert keeps(site, admin.file)


def test_not_on_this_host(admin: Admin) -> None:
    """A policy that can't be on this host is refused in the door's way: why, nothing changed, the metrics say 0."""
    with kept(admin, ONE) as site, site.watched() as watch:
        before = digest()
        admin.file.write_text(NOT_HERE)
        assert eventually(lambda: reloaded(site) == 0), site.said()
        assert site.daemon.logged("identity.inside.next_hop: 192.0.2.1 is not on vpn0") == 1
        assert digest() == before
        assert watch.settled() == {}


# --- other verbs beside it -------------------------------------------------------------------------------------------


def test_apply_the_same(admin: Admin) -> None:
    """`apply` of the very policy finds nothing to do, and the daemon says nothing."""
    with kept(admin, ONE) as site, site.watched() as watch:
        lines = site.daemon.log
        assert admin.idmark("apply").stdout == "in force: nothing to do\n"
        assert watch.settled() == {}
        assert site.daemon.log == lines


def test_apply_another(admin: Admin) -> None:
    """`apply -c OTHER` changes what the daemon keeps, which neither fights it nor takes it for repairs."""
    other = Admin(admin.host, admin.directory / "other")
    other.directory.mkdir()
    other.file.write_text(OTHER)
    with kept(admin, ONE) as site:
        done = other.idmark("apply")
        assert (done.returncode, done.stderr) == (0, ""), done
        assert eventually(lambda: keeps(site, other.file)), site.said()
        admin.host.nft("delete table inet idmark")
        admin.host.ip("rule", "flush", "protocol", "73")
        assert eventually(lambda: other.idmark("plan").returncode == 0), site.said()
        assert site.daemon.logged(f"policy {load(other.file).digest[:12]} was applied") == 1
        time.sleep(1.2)  # the files have been looked at: the first policy's is what it was
        assert digest() == load(other.file).digest


def test_apply_among_faults(admin: Admin) -> None:
    """Applies of two policies in turn succeed while rules and elements are deleted all the time; the last one stays."""
    other = Admin(admin.host, admin.directory / "other")
    other.directory.mkdir()
    other.file.write_text(OTHER)
    done = threading.Event()

    def break_things() -> None:
        chance = random.Random(4001)  # noqa: S311
        while not done.wait(0.02):
            rule = chance.choice(["fwmark 0x1000000/0x3f000000", "fwmark 0x2000000/0x3f000000"])
            # In a process that may not find what it is to delete.
            subprocess.run(["ip", "rule", "delete", *rule.split(), "protocol", "73"], capture_output=True, check=False)

    with kept(admin, ONE) as site:
        # A thread of this process is in the namespace that it was started in.
        breaking = threading.Thread(target=break_things)
        breaking.start()
        try:
            for turn in range(4):
                applied = (other, admin)[turn % 2].idmark("apply")
                assert "Traceback" not in applied.stderr
                # 2: applied, and it differs again already.
                assert applied.returncode in {0, 2}, applied
        finally:
            done.set()
            breaking.join()
        assert eventually(lambda: keeps(site, admin.file)), site.said()


def test_remove_is_refused(admin: Admin) -> None:
    """`remove` beside a daemon changes nothing and says what to do; after it, it takes all away."""
    before = sorted(admin.inventory().splitlines())
    with kept(admin, ONE) as site, site.watched() as watch:
        refused = admin.idmark("remove")
        assert refused.returncode == 2
        assert f"idmark run (pid {site.daemon.process.pid})" in refused.stderr
        assert "stop that first" in refused.stderr
        assert watch.settled() == {}
        site.daemon.stop()
        assert admin.idmark("remove").returncode == 0
    assert sorted(admin.inventory().splitlines()) == before


def test_second_daemon(admin: Admin) -> None:
    """A second daemon is refused, by the pid of the first, and leaves everything to it."""
    with kept(admin, ONE) as site, site.watched() as watch:
        refused = admin.idmark("run", "--listen", "none")
        assert refused.returncode == 2
        assert f"pid {site.daemon.process.pid} (idmark run) is at work in this network namespace" in refused.stderr
        assert watch.settled() == {}
        assert site.daemon.metric("idmark_in_sync") == 1


def test_status(admin: Admin) -> None:
    """`status --json` tells of the daemon: its pid, the policy, and the last repairs in words."""
    with kept(admin, ONE) as site:
        admin.host.ip_batch("rule delete priority 4001 from 192.0.2.130 lookup 4001 protocol 73")
        assert eventually(lambda: site.daemon.logged("repaired: ") == 1)
        told = json.loads(admin.idmark("status", "--json").stdout)["daemon"]
        assert (told["pid"], told["policy"], told["in_sync"], told["down"]) == (
            site.daemon.process.pid,
            load(admin.file).digest,
            True,
            {},
        )
        last = told["repairs"][-1]
        assert last["kind"] == "rule"
        assert last["words"] == "+ ip rule add priority 4001 from 192.0.2.130 lookup 4001 protocol 73"
        site.daemon.stop()
        assert json.loads(admin.idmark("status", "--json").stdout)["daemon"] is None


# --- start and end ---------------------------------------------------------------------------------------------------


def test_start_with_a_faulty_file(admin: Admin) -> None:
    """A daemon that finds a faulty file keeps what was in force before, and says so with every fault."""
    with kept(admin, ONE) as site:
        site.daemon.stop()
        kept_before = digest() or load(admin.file).digest
        before = admin.inventory()
    admin.file.write_text(FAULTY)
    with kept(admin) as site:
        assert admin.inventory() == before
        assert digest() == kept_before
        assert reloaded(site) == 0
        assert site.daemon.logged("identity.outside.colour") == 1
        assert site.daemon.logged(f"policy {kept_before[:12]} was in force before, and is kept") == 1
        admin.file.write_text(OTHER)
        assert eventually(lambda: keeps(site, admin.file)), site.said()


def test_start_with_nothing(admin: Admin) -> None:
    """With a faulty file and nothing from before the daemon ends at once: exit 2, every fault, nothing changed."""
    before = admin.inventory()
    admin.file.write_text(FAULTY)
    command = admin.command("run", "--listen", "none")
    state = {"STATE_DIRECTORY": os.fspath(admin.directory / "state")}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **state}, timeout=20
    )
    assert ended.returncode == 2
    for fault in ("identity.inside.id", "identity.inside.members", "identity.outside.colour"):
        assert fault in ended.stderr
    assert "Traceback" not in ended.stderr
    assert admin.inventory() == before


def test_ready_is_in_force(admin: Admin) -> None:
    """When the service manager hears READY=1 the first pass has been made: nothing is left to do."""
    admin.file.write_text(ONE)
    with running(admin.command("run", "--listen", "none"), admin.directory):
        assert admin.idmark("plan").returncode == 0


def test_not_ready_yet(admin: Admin) -> None:
    """While somebody else is at work on the kernel no first pass is made, and READY=1 is not said; then it is."""
    admin.file.write_text(ONE)
    command = admin.command("run", "--listen", "none")
    with contextlib.ExitStack() as work:
        work.enter_context(runtime.lock("test", 0.0))
        with running(command, admin.directory, until_ready=False) as daemon:
            assert eventually(lambda: runtime.daemon_pid() == daemon.process.pid)
            # It has been refused the lock several times by then.
            assert not select.select([daemon.manager], [], [], 0.3)[0]
            assert admin.idmark("plan").returncode == 1
            work.close()
            daemon.told("READY=1")
            assert admin.idmark("plan").returncode == 0


def test_port_taken(admin: Admin) -> None:
    """An address for metrics that is taken is said once; the policy is kept all the same."""
    admin.file.write_text(ONE)
    with admin.host.listen("127.0.0.1", 9473), running(admin.command("run"), admin.directory) as daemon:
        assert eventually(lambda: daemon.logged("127.0.0.1:9473") == 1)
        assert daemon.logged("to be tried again") == 1
        admin.host.nft("delete table inet idmark")
        assert eventually(lambda: admin.idmark("plan").returncode == 0)
        assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_end_and_start(admin: Admin, number: int) -> None:
    """However the daemon ends, all stays byte for byte; the next one sends nothing, and its counters go on."""
    with kept(admin, ONE) as site:
        for _ in range(5):
            admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
        sent = site.daemon.metric("idmark_identity_packets_total", identity="inside", direction="transmit")
        before = admin.inventory()
        code = site.daemon.stop(number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        assert admin.inventory() == before
        with site.watched() as watch, kept(admin) as again:
            admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
            assert (
                again.daemon.metric("idmark_identity_packets_total", identity="inside", direction="transmit")
                == sent + 1
            )
            assert watch.settled() == {}
            assert not again.daemon.logged("put in force")


def test_counters_over_flush_and_start(admin: Admin) -> None:
    """Counters go on over a `flush ruleset` and a restart behind it: what was read once is never taken back."""

    def sent(site: Site) -> float:
        return site.daemon.metric("idmark_identity_packets_total", identity="outside", direction="transmit")

    with kept(admin, ONE) as site:
        for _ in range(5):
            admin.host.send(WILD["ipv4"], OUTSIDE["ipv4"])
        assert sent(site) == 5
        admin.host.nft("flush ruleset")
        assert eventually(site.in_force)
        admin.host.send(WILD["ipv4"], OUTSIDE["ipv4"])
        assert sent(site) == 6
        site.daemon.stop()
    with kept(admin) as site:
        admin.host.send(WILD["ipv4"], OUTSIDE["ipv4"])
        assert sent(site) == 7


def test_killed_at_any_moment(admin: Admin) -> None:
    """Twenty daemons killed while links flap, files change and faults are made: the next one has all in force."""
    chance = random.Random(73)  # noqa: S311
    host = admin.host
    admin.file.write_text(ONE)
    command = admin.command("run", "--listen", "none")
    doings = (
        lambda: host.nft("flush ruleset"),
        lambda: host.ip("rule", "flush", "protocol", "73"),
        lambda: host.ip_batch("link set vpn0 down\nlink set vpn0 up"),
        lambda: host.ip("route", "flush", "table", "all", "protocol", "73"),
        lambda: admin.file.write_text(chance.choice((ONE, OTHER))),
    )
    for _ in range(20):
        daemon = subprocess.Popen(command, stderr=subprocess.PIPE)
        # An interpreter is up after some 400 ms, a first pass is made in 50 more.
        time.sleep(chance.uniform(0.25, 0.5))
        chance.choice(doings)()
        time.sleep(chance.uniform(0.0, 0.06))
        daemon.kill()
        said = daemon.communicate()[1].decode()
        assert "Traceback" not in said
    with kept(admin) as site:
        assert eventually(site.in_force), site.said()
        assert eventually(lambda: site.daemon.metric("idmark_in_sync") == 1)


# --- a fight ---------------------------------------------------------------------------------------------------------


def test_fight(admin: Admin) -> None:
    """A rule that another program deletes as soon as it is there: logged once, with advice, counted, slowed down.

    What else is gone comes back at once meanwhile: before the rule that is held back.
    """
    rule = "priority 4001 from 192.0.2.130 lookup 4001 protocol 73"
    other = "priority 4002 from 203.0.113.2 lookup 4002 protocol 73"
    host = admin.host

    def there(words: str) -> bool:
        return words.partition(" lookup")[0].rpartition(" ")[2] in {
            str(each.source) for each in site.kernel.rtnl.our_rules()
        }

    with kept(admin, ONE) as site:
        repairs = 0
        while not held_back(site, host, rule):
            repairs += 1
            assert repairs < 100
        assert site.daemon.logged("something on this host keeps undoing this: + ip rule add priority 4001") == 1
        assert site.daemon.logged("systemd-networkd deletes other programs' rules") == 1
        assert site.daemon.metric("idmark_fights_total", kind="rule") == 1
        assert site.daemon.metric("idmark_repairs_total", kind="rule") == repairs
        assert len(site.daemon.log) < 15
        assert there(rule) is False
        host.ip("rule", "delete", *other.split())
        assert eventually(lambda: there(other)), site.said()
        assert eventually(lambda: there(rule)), site.said()
        assert eventually(lambda: site.daemon.metric("idmark_in_sync") == 1)


def held_back(site: Site, host: Host, rule: str) -> bool:
    """Delete a rule; whether it is not put back in the time that a repair takes."""
    with host.events(socket.NETLINK_ROUTE, 8) as events:
        host.ip("rule", "delete", *rule.split())
        seen: list[int] = []
        deadline = time.monotonic() + QUIET
        while 32 not in seen:
            if time.monotonic() > deadline:
                return True
            seen += events.kinds()
            time.sleep(0.001)
    return False


def test_refused_by_the_kernel(admin: Admin) -> None:
    """A route that the kernel refuses for good keeps nothing else back; said once, and retried."""
    host = admin.host
    host.ip_batch("route add default via 192.0.2.140 dev vpn0 table 4001 metric 1024 protocol 99")
    with kept(admin, ONE) as site:
        assert eventually(lambda: site.daemon.logged("File exists") > 0), site.said()
        time.sleep(1.0)  # several tries
        assert site.daemon.logged("File exists") == 1, site.said()
        assert site.daemon.metric("idmark_in_sync") == 0
        assert site.daemon.metric("idmark_repairs_total") == 0
        assert site.daemon.metric("idmark_fights_total") == 0
        assert site.daemon.logged("put in force") == 1, site.said()
        host.ip("rule", "delete", *["priority", "4002", "from", "203.0.113.2", "lookup", "4002", "protocol", "73"])
        assert eventually(lambda: len(site.plan().steps) == 1), site.said()
        assert site.daemon.metric("idmark_repairs_total", kind="rule") == 1
        assert site.daemon.metric("idmark_repairs_total") == 1
        host.ip_batch("route delete default table 4001 metric 1024 protocol 99")
        assert eventually(site.in_force), site.said()
        assert eventually(lambda: site.daemon.metric("idmark_in_sync") == 1)


def test_damaged_record(admin: Admin) -> None:
    """A record of sysctls that can't be read any more is told once, and all else is kept in force meanwhile."""
    admin.host.sysctl("net/ipv4/conf/all/rp_filter", 1)
    with kept(admin, ONE) as site:
        record = runtime.directory() / "src_valid_mark.json"
        record.write_text("{")
        admin.host.ip("rule", "delete", "priority", "4002", "from", OUTSIDE["ipv4"])
        assert eventually(site.in_force), site.said()
        assert eventually(lambda: site.daemon.logged(f"read {record}: ") == 1), site.said()
        assert eventually(lambda: site.daemon.metric("idmark_in_sync") == 1), site.said()
        record.unlink()
        admin.host.ip("rule", "delete", "priority", "4002", "from", OUTSIDE["ipv4"])
        assert eventually(lambda: site.daemon.logged(f"no longer: read {record}: ") == 1), site.said()


@pytest.mark.parametrize("name", ["trial.json", "refused.json"])
def test_damaged_note(admin: Admin, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other verbs have left and can't be read is told once; what is kept is kept, also by the next daemon."""
    monkeypatch.setenv("STATE_DIRECTORY", str(admin.directory / "state"))
    base, below = state.place()
    damaged = runtime.directory() / name if name == "trial.json" else base / (below or "") / name
    for damage in (True, False):
        with kept(admin, ONE) as site:
            if damage:
                damaged.write_text("{")
            for _ in range(2):
                admin.host.ip("rule", "delete", "priority", "4002", "from", OUTSIDE["ipv4"])
                assert eventually(site.in_force), site.said()
            assert eventually(lambda: site.daemon.metric("idmark_repairs_total") == 2)
            told = site.daemon.logged(str(damaged))
            assert told == 1 if damage else told, site.said()


# --- what may be in the way ------------------------------------------------------------------------------------------


def test_stuck_verb(admin: Admin) -> None:
    """Another verb that holds the lock for ever is named, once; what was undone meanwhile is repaired after it."""
    with kept(admin, ONE) as site:
        with runtime.lock("apply"):
            admin.host.ip("rule", "delete", "priority", "4001", "from", INSIDE["ipv4"])
            assert eventually(lambda: site.daemon.logged(f"it is held by pid {os.getpid()} (idmark apply)") == 1)
            assert site.daemon.metric("idmark_in_sync") == 0
        assert eventually(site.in_force), site.said()
        assert eventually(lambda: site.daemon.metric("idmark_in_sync") == 1)
        assert site.daemon.logged("it is held by") == 2  # and that it is no longer


def test_change_that_has_to_wait(admin: Admin) -> None:
    """A policy that could not be put in force for a passing reason is, when the reason has passed."""
    with kept(admin, ONE) as site:
        with runtime.lock("apply"):
            admin.file.write_text(OTHER)
            assert eventually(lambda: site.daemon.logged("is to be tried again") == 1), site.said()
            assert reloaded(site) == 0
        admin.host.ip("link", "set", "lan", "down")
        admin.host.ip("link", "set", "lan", "up")
        assert eventually(lambda: keeps(site, admin.file)), site.said()
        assert eventually(lambda: reloaded(site) == 1)  # once the kernel's lookups have been asked for


@pytest.mark.parametrize("protocol", ["static", "73"])
def test_mark_that_does_not_fit_its_mask(admin: Admin, protocol: str) -> None:
    """The kernel takes a rule whose mark doesn't fit its mask: nobody's is let be, one in our name is taken away."""
    odd = f"rule add priority 100 fwmark 0x1ff/0xff lookup main protocol {protocol}"
    with kept(admin, ONE) as site:
        admin.host.ip(*odd.split())
        admin.host.nft("delete table inet idmark")
        assert eventually(site.in_force), site.said()
        assert ("0x1ff/0xff" in admin.host.ip("rule")) is (protocol == "static")
        assert admin.idmark("status").returncode == 0


def test_full_disk(admin: Admin, tmp_path: Path) -> None:
    """Where nothing can be written any more all is repaired and followed as before; it is said once."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        admin.file.write_text(ONE)
        with running(admin.command("run", "--listen", "none"), tmp_path, RUNTIME_DIRECTORY=str(small)) as daemon:
            with contextlib.suppress(OSError), (small / "full").open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
            for _ in range(3):
                admin.host.ip("rule", "delete", "priority", "4001", "from", INSIDE["ipv4"])
                assert eventually(lambda: INSIDE["ipv4"] in admin.host.ip("rule"))
            assert daemon.logged("the other verbs can't be told") == 1
            assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", small], check=True)


def test_applied_since(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart keeps what was applied after the daemon's own file was changed; a file that is changed later counts."""
    monkeypatch.setenv("STATE_DIRECTORY", os.fspath(admin.directory / "state"))
    other = Admin(admin.host, admin.directory / "other")
    other.directory.mkdir()
    other.file.write_text(OTHER)
    with kept(admin, ONE) as site:
        assert other.idmark("apply").returncode == 0
        assert eventually(lambda: keeps(site, other.file)), site.said()
        site.daemon.stop(signal.SIGKILL)
    with kept(admin) as site, site.watched() as watch:
        assert digest() == load(other.file).digest
        assert watch.settled() == {}
        site.daemon.stop()
    admin.file.write_text(ONE)
    with kept(admin) as site:
        assert keeps(site, admin.file), site.said()
