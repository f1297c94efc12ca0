"""The net under an apply: history and rollback, plan files, and what nobody confirms goes back, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import applying, history, ledger, reconcile, snapshot, state, trial
from agent.kernel import runtime
from agent.plan import Plan
from agent.policy import load
from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, LAN_HOST, OUTSIDE, WILD, Host
from tests.kernel.running import eventually, kept

ONE = policy_text({"members": MEMBERS, "masquerade": True})
#: The ids exchanged, other members, a chain more.
OTHER = policy_text({"id": 2, "members": ["10.9.0.0/25"], "clamp_mss": True}, {"id": 1, "when_down": "main"})
#: As ONE, with a member more.
MORE = policy_text({"members": [*MEMBERS, "10.8.0.0/16"], "masquerade": True})
#: Of an inventory, what counting changes.
COUNTED = re.compile(r"packets \d+ bytes \d+")


@dataclass(frozen=True, slots=True)
class Operator:
    """An administrator at a keyboard, with folders of her own for the state. `environment` is what her shell has."""

    admin: Admin
    environment: dict[str, str]

    def command(self, *words: str, policy: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """Run the real command to its end."""
        if policy:
            self.admin.file.write_text(policy)
        environment = {**os.environ, **self.environment, **more}
        return subprocess.run(
            self.admin.command(*words), env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    def start(self, *words: str, policy: str = "") -> subprocess.Popen[bytes]:
        """Start the real command in a session of its own, as a terminal has."""
        if policy:
            self.admin.file.write_text(policy)
        return subprocess.Popen(
            self.admin.command(*words),
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def must(self, *words: str, policy: str = "", **more: str) -> str:
        """Run it; it must succeed. What it said."""
        done = self.command(*words, policy=policy, **more)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def outcomes(self) -> list[str]:
        """What became of each apply."""
        return [entry["outcome"] for entry in json.loads(self.must("history", "--json"))]

    def inventory(self) -> str:
        """All that is in the kernel of what idmark might touch, but for what counters have counted."""
        return COUNTED.sub("", self.admin.inventory())


@pytest.fixture
def operator(netns: Host, peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    lay_links(netns, peers("far"))
    netns.run(["sysctl", "-q", "-w", "net.ipv4.conf.wan.rp_filter=1"])
    environment = {"STATE_DIRECTORY": f"{tmp_path}/state", "RUNTIME_DIRECTORY": f"{tmp_path}/run"}
    for name, value in environment.items():  # for what this process itself asks, as a daemon that the test starts
        monkeypatch.setenv(name, value)
    return Operator(Admin(netns, tmp_path), environment)


def ended(seconds: float = 20.0) -> bool:
    """Whether nothing is on trial any more, soon."""
    deadline = time.monotonic() + seconds
    while trial.pending():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- history and rollback --------------------------------------------------------------------------------------------


def test_history(operator: Operator) -> None:
    """Each apply is written down with who, what and the outcome; its files are readable by their owner alone."""
    operator.must("apply", policy=ONE, SUDO_USER="alice")
    operator.must("apply", policy=OTHER)
    operator.must("apply")  # nothing to do is nothing to write down
    first, second = json.loads(operator.must("history", "--json"))
    assert (first["number"], first["outcome"], second["number"], second["outcome"]) == (1, "in force", 2, "in force")
    nobody_logged_in = Path("/proc/self/loginuid").read_text() == str(0xFFFFFFFF)
    assert not nobody_logged_in or (first["user"], second["user"]) == ("alice", "root")
    assert first["policy"] != second["policy"] == load(operator.admin.file).digest
    folder = Path(operator.environment["STATE_DIRECTORY"])
    (about,) = folder.rglob("0001.json")
    files = {path.name: path for path in about.parent.iterdir()}
    assert {name.partition(".")[2] for name in files} == {
        "json",
        "policy.toml",
        "plan.txt",
        "ruleset.nft",
        "routing.txt",
    }
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    assert about.parent.stat().st_mode & 0o777 == 0o700
    assert load(files["0001.policy.toml"]).digest == first["policy"]
    assert files["0001.plan.txt"].read_text().startswith("+ ")
    assert f"apply by {first['user']}: policy {first['policy'][:12]}" in operator.must("history")


def test_rollback(operator: Operator) -> None:
    """rollback goes to the policy before, and again comes back; rollback N to that of an apply; none before is told."""
    done = operator.command("rollback")
    assert (done.returncode, done.stderr) == (2, "idmark: rollback: there is no policy before\n")
    operator.must("apply", policy=ONE)
    one = operator.inventory()
    operator.must("apply", policy=OTHER)
    other = operator.inventory()
    operator.must("rollback")
    assert sorted(operator.inventory().splitlines()) == sorted(one.splitlines())
    operator.must("rollback")
    assert sorted(operator.inventory().splitlines()) == sorted(other.splitlines())
    operator.must("rollback", "1")
    assert sorted(operator.inventory().splitlines()) == sorted(one.splitlines())
    assert operator.outcomes() == ["in force"] * 5
    assert operator.command("rollback", "77").stderr == "idmark: rollback: there is no apply 77\n"


def test_history_is_bounded(operator: Operator) -> None:
    """So many applies are kept, numbers go on, and what a crash left behind goes."""
    policy = operator.admin.write(ONE)
    history.record("apply", policy, None, None, outcome=history.IN_FORCE)
    (about,) = Path(operator.environment["STATE_DIRECTORY"]).rglob("0001.json")
    (about.parent / "0900.plan.txt").write_text("left of a crash")
    for _ in range(history.NUMBER + 5):
        history.record("apply", policy, None, None, outcome=history.IN_FORCE)
    numbers = [entry.number for entry in history.entries()]
    assert numbers == list(range(7, history.NUMBER + 7))
    assert not (about.parent / "0900.plan.txt").exists()
    assert len(list(about.parent.iterdir())) == 2 * history.NUMBER


def test_history_is_bounded_in_bytes(operator: Operator) -> None:
    """Large ones are forgotten sooner, but for the last two: there is always one to go back to."""
    policy = operator.admin.write(ONE)
    for number in range(1, 5):
        history.record("apply", policy, None, None, outcome=history.IN_FORCE)
        (file,) = Path(operator.environment["STATE_DIRECTORY"]).rglob(f"{number:04}.policy.toml")
        os.truncate(file, history.BYTES)  # sparse
    assert [entry.number for entry in history.entries()] == [3, 4]


#: An entry of the history as it should be.
SOUND = {"number": 1, "at": 1, "user": "eve", "verb": "apply", "gateway": "g", "policy": "p", "plan": "", "changes": 1}
SOUND |= {"outcome": "in force", "why": ""}


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("", id="empty"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("[]", id="list"),
        pytest.param(json.dumps(SOUND | {"policy": 5}), id="type"),
        pytest.param(json.dumps(SOUND | {"number": 2}), id="number"),
        pytest.param(json.dumps(SOUND | {"at": float("nan")}), id="no-time"),
        pytest.param(json.dumps(SOUND | {"at": 1e300}), id="end-of-times"),
        pytest.param(json.dumps(SOUND | {"more": 1}), id="key"),
    ],
)
def test_damaged_history(operator: Operator, head: str) -> None:
    """An entry that is damaged is none; its number is not given again, and there is no way back to it."""
    operator.must("apply", policy=ONE)
    (about,) = Path(operator.environment["STATE_DIRECTORY"]).rglob("0001.json")
    about.write_text(head)
    assert operator.must("history") == ""
    assert operator.command("rollback", "1").stderr == "idmark: rollback: there is no apply 1\n"
    operator.must("apply", policy=MORE)
    assert [entry.number for entry in history.entries()] == [2]


def test_strange_history(operator: Operator) -> None:
    """What others have put among its files is in nobody's way, and nothing in an entry steers the terminal."""
    operator.must("apply", policy=ONE)
    (about,) = Path(operator.environment["STATE_DIRECTORY"]).rglob("0001.json")
    folder = about.parent
    os.mkfifo(folder / "0002.json")
    (folder / "0003.json").symlink_to("/etc/passwd")
    (folder / "0004.json").mkdir()
    (folder / f"{'9' * 30}.json").write_text("{}")
    operator.must("apply", policy=MORE)
    assert [entry.number for entry in history.entries()] == [1, 5]
    about.write_text(json.dumps(SOUND | {"user": "\x1b[2Jroot", "verb": "apply\n   9  fake"}))
    assert (
        operator.must("history")
        .splitlines()[0]
        .endswith(r"apply\x0a   9  fake by \x1b[2Jroot: policy p, changes: 1, in force")
    )


def test_refusals_are_written_down(operator: Operator) -> None:
    """A plan that is not the expected one, and a policy that can't be here, are in the history as refused, once."""
    for _ in range(2):
        assert operator.command("apply", "--expect", "0" * 64, policy=ONE).returncode == 1
    assert operator.outcomes() == ["refused"]
    assert operator.command("apply", policy=policy_text({"next_hop": ["192.0.2.1", "2001:db8:4::1"]})).returncode == 2
    assert operator.outcomes() == ["refused", "refused"]


def test_faults_are_written_down(operator: Operator) -> None:
    """A policy that was refused at the door is in the history with its faults, of apply and of reload; once each."""
    faulty = ONE.replace("id = 2", "id = 77") + "nonsense = 1\n"
    for _ in range(2):
        done = operator.command("apply", policy=faulty)
        assert done.returncode == 2
    (file,) = Path(operator.environment["STATE_DIRECTORY"]).rglob("0001.faults.txt")
    assert file.read_text() == done.stderr
    with kept(operator.admin, ONE) as site:
        operator.admin.file.write_text(faulty)
        site.daemon.reload()
    assert [(entry.verb, entry.outcome) for entry in history.entries()] == [
        ("apply", "refused"),
        ("start", "in force"),
        ("reload", "refused"),
    ]
    assert "apply by root: a policy with faults, changes: 0, refused: " in operator.must("history")


# --- plan files ------------------------------------------------------------------------------------------------------


def test_plan_file(operator: Operator) -> None:
    """apply --plan puts in force what plan --out wrote, whatever the policy's file says by then."""
    file = operator.admin.directory / "plan.json"
    assert operator.command("plan", "--out", str(file), policy=ONE).returncode == 1
    assert file.stat().st_mode & 0o777 == 0o600
    wanted = load(operator.admin.file)
    operator.must("apply", "--plan", str(file), policy=OTHER)
    assert operator.command("plan", policy=ONE).stdout == "# in force: nothing to do\n"
    assert history.entries()[-1].policy == wanted.digest


def test_plan_file_of_another_world(operator: Operator) -> None:
    """When the host has moved since, nothing is changed, and what moved is said line by line."""
    file = operator.admin.directory / "plan.json"
    operator.command("plan", "--out", str(file), policy=ONE)
    operator.admin.host.ip("route", "replace", "default", "via", "203.0.113.9", "dev", "wan")
    before = operator.inventory()
    done = operator.command("apply", "--plan", str(file))
    assert done.returncode == 1
    gone, new = (
        f"+ ip route add default via {hop} dev wan table 4002 metric 1024 src {OUTSIDE['ipv4']} protocol 73"
        for hop in ("203.0.113.1", "203.0.113.9")
    )
    assert done.stdout.splitlines() == [f"< {gone}", f"> {new}"]
    assert "nothing was changed" in done.stderr
    assert operator.inventory() == before


@pytest.mark.parametrize("key", ["changes", "policy"])
def test_altered_plan_file(operator: Operator, key: str) -> None:
    """A plan file that somebody has altered is told, and nothing is changed."""
    file = operator.admin.directory / "plan.json"
    operator.command("plan", "--out", str(file), policy=ONE)
    document = json.loads(file.read_text())
    document[key] = [line.replace("10.9.0.0/24", "10.0.0.0/8") for line in document[key]]
    file.write_text(json.dumps(document))
    before = operator.inventory()
    done = operator.command("apply", "--plan", str(file))
    assert (done.returncode, "it was altered" in done.stderr) == (2, True)
    assert operator.inventory() == before


# --- on trial --------------------------------------------------------------------------------------------------------


def test_confirmed(operator: Operator) -> None:
    """What is confirmed stays, and is what comes up at the next boot; a second confirmation finds nothing."""
    operator.must("apply", policy=ONE)
    said = operator.must("apply", "--confirm-within", "60s", policy=OTHER)
    assert "waiting for: idmark confirm" in said
    assert operator.command("apply", policy=ONE).returncode == 2  # one after the other
    operator.must("confirm")
    after = operator.inventory()
    assert operator.outcomes() == ["in force", "in force"]
    assert operator.command("confirm").returncode == 1
    time.sleep(0.5)
    assert operator.command("plan", policy=OTHER).returncode == 0
    assert operator.inventory() == after
    (applied,) = Path(operator.environment["STATE_DIRECTORY"]).parent.rglob("applied.toml")
    assert load(applied).digest == load(operator.admin.file).digest


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("", ONE, id="nothing-before"),
        pytest.param(ONE, MORE, id="a-member-more"),
        pytest.param(ONE, policy_text({"id": 2}, {"id": 1}, kernel={"enforce": False}), id="ids-exchanged"),
        pytest.param(OTHER, ONE, id="all-of-it"),
        pytest.param(ONE, policy_text(kernel={"nft_table": "idmark2", "table_base": 6000}), id="another-table"),
    ],
)
def test_not_confirmed(operator: Operator, before: str, after: str) -> None:
    """What nobody confirms goes back in time: the kernel is as it was, and so is what the next boot would find."""
    if before:
        operator.must("apply", policy=before)
    was = operator.inventory()
    operator.must("apply", "--confirm-within", "1s", policy=after)
    assert operator.inventory() != was
    assert ended()
    assert sorted(operator.inventory().splitlines()) == sorted(was.splitlines())
    assert operator.outcomes()[-1] == "rolled back"
    kept_for_boot = list(Path(operator.environment["STATE_DIRECTORY"]).parent.rglob("applied.toml"))
    assert len(kept_for_boot) == bool(before)
    if before:
        operator.admin.file.write_text(before)
        assert load(kept_for_boot[0]).digest == load(operator.admin.file).digest


def test_byte_for_byte(operator: Operator) -> None:
    """Where nothing had to be taken away on the way, not even the order of what is listed is another."""
    for policy in ("", ONE):
        if policy:
            operator.must("apply", policy=policy)
        was = operator.inventory()
        operator.must("apply", "--confirm-within", "1s", policy=MORE)
        assert ended()
        assert operator.inventory() == was


def test_counters_go_on(operator: Operator) -> None:
    """Nothing that was counted, before or meanwhile, is lost by going back."""
    operator.must("apply", policy=ONE)
    operator.admin.host.send(WILD["ipv4"], INSIDE["ipv4"], data=b"12345")
    operator.must("apply", "--confirm-within", "2s", policy=OTHER)
    operator.admin.host.send(WILD["ipv4"], INSIDE["ipv4"], data=b"12345")
    assert ended()
    assert operator.admin.counts()["id-inside-ipv4-transmit"].packets == 2


def test_what_no_policy_made(operator: Operator) -> None:
    """A state that is nobody's policy, for somebody has changed it, comes back as well: byte for byte, counters on."""
    operator.must("apply", policy=ONE)
    host = operator.admin.host
    host.nft('add rule inet idmark output counter comment "somebody\'s"')
    host.ip("route", "add", "10.77.0.0/16", "dev", "wan", "table", "4002", "protocol", "73")
    host.ip("rule", "delete", "priority", "4002", "from", OUTSIDE["ipv4"])
    host.send(WILD["ipv4"], INSIDE["ipv4"], data=b"12345")
    was = operator.inventory()
    operator.must("apply", "--confirm-within", "1s", policy=OTHER)
    assert ended()
    assert operator.inventory() == was
    assert operator.admin.counts()["id-inside-ipv4-transmit"].packets >= 1


def test_rolled_back_by_hand(operator: Operator) -> None:
    """rollback ends what waits for confirmation at once; confirm comes too late then."""
    operator.must("apply", policy=ONE)
    was = operator.inventory()
    operator.must("apply", "--confirm-within", "60s", policy=MORE)
    operator.must("rollback")
    assert operator.inventory() == was
    assert operator.command("confirm").returncode == 1


@pytest.mark.parametrize(("clock", "moved"), [("boottime", True), ("monotonic", False)])
def test_clock(netns: Host, clock: str, moved: bool) -> None:
    """What ends a trial is the time since boot, sleep included: no clock that anybody sets (time_namespaces(7))."""
    script = "from agent import trial; print(trial.clock())"
    shifted = ["unshare", "--time", f"--{clock}", "100000", "--fork"]
    here, there = (float(netns.run([*words, sys.executable, "-c", script])) for words in ([], shifted))
    assert (there - here > 90_000) is moved


def test_nothing_can_be_written_down(operator: Operator) -> None:
    """Where the history can't be written a policy is confirmed, or rolled back, all the same, and that is said."""
    operator.must("apply", policy=ONE)
    was = operator.inventory()
    operator.must("apply", "--confirm-within", "60s", policy=MORE)
    (folder,) = Path(operator.environment["STATE_DIRECTORY"]).parent.rglob("history")
    folder.rename(folder.with_name("moved"))
    folder.write_text("in the way")
    done = operator.command("rollback")
    assert (done.returncode, "history: Not a directory" in done.stderr) == (2, True)
    assert operator.inventory() == was
    operator.must("apply", "--confirm-within", "1s", policy=MORE)
    done = operator.command("confirm")
    assert (done.returncode, "history: Not a directory" in done.stderr) == (0, True)
    time.sleep(2)
    assert operator.command("plan").returncode == 0


def test_confirmation_cut_short(operator: Operator) -> None:
    """A confirmation that was killed after it had kept the policy for the next boot is none: that goes back as well."""
    for before in ("", ONE):
        if before:
            operator.must("apply", policy=before)
        kept_before = state.load()
        operator.must("apply", "--confirm-within", "2s", policy=MORE)
        on_trial = load(operator.admin.file)
        state.save(on_trial)
        state.forgive()
        assert ended()
        assert state.load() == kept_before
        assert state.refused()[0] == on_trial.digest


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("trial.json", "{", id="cut-short"),
        pytest.param("trial.json", '{"id": "x"}', id="incomplete"),
        pytest.param("trial.json", '{"id": "x", "digest": "d", "within": "a", "deadline": 1}', id="type"),
        pytest.param("trial.json", '{"id": "x", "digest": "d", "within": 1, "deadline": NaN}', id="never"),
        pytest.param("trial-contents.json", "{}", id="of-nothing"),
        pytest.param("trial-contents.json", "[", id="contents-cut-short"),
    ],
)
def test_damaged_trial(operator: Operator, name: str, text: str) -> None:
    """What is written down about a trial and can't be read is told with the two ways out of it; and they are."""
    begun = trial.begin(operator.admin.write(ONE), snapshot.Snapshot(), 60.0, number=1)
    assert trial.pending() == begun
    (runtime.directory() / name).write_text(text)
    done = operator.command("rollback")
    assert done.returncode == 2
    assert done.stderr.startswith(f"idmark: read {runtime.directory() / name}: ")
    head = runtime.directory() / "trial.json"
    assert f"; delete {head} and apply what is to stay; or idmark remove" in done.stderr
    operator.must("remove")
    assert trial.pending() is None
    trial.begin(load(operator.admin.file), snapshot.Snapshot(), 60.0, number=1)
    (runtime.directory() / name).write_text(text)
    head.unlink()
    operator.must("apply")


def test_removed_meanwhile(operator: Operator) -> None:
    """remove is for good: no watchman brings back what was before."""
    clean = operator.inventory()
    operator.must("apply", policy=ONE)
    operator.must("apply", "--confirm-within", "1s", policy=MORE)
    operator.must("remove")
    time.sleep(2)
    assert operator.inventory() == clean


def test_killed_at_random_moments(operator: Operator) -> None:
    """Whenever apply, its terminal and all that belongs to it are killed: it goes back, or nothing had begun."""
    operator.must("apply", policy=ONE)
    was = operator.inventory()
    chance = random.Random(73)  # noqa: S311
    for _ in range(8):
        command = operator.start("apply", "--confirm-within", "1s", policy=MORE)
        time.sleep(chance.uniform(0.2, 1.0))
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()
        assert ended()
        assert operator.inventory() == was


def test_watchman_killed(operator: Operator) -> None:
    """Where nobody starts the watchman again the daemon does its work, as soon as there is one."""
    operator.must("apply", policy=ONE)
    was = operator.inventory()
    operator.must("apply", "--confirm-within", "1s", policy=MORE)
    os.kill(runtime.published("watchman.json")["pid"], signal.SIGKILL)
    time.sleep(1.2)
    assert operator.inventory() != was
    with kept(operator.admin):
        assert ended()
        assert eventually(lambda: operator.inventory() == was)


# --- beside the daemon -----------------------------------------------------------------------------------------------


def at_work() -> str:
    """The digest of the policy that the daemon says it keeps."""
    found = ledger.current()
    return found.policy if found else ""


def elsewhere(operator: Operator, text: str) -> list[str]:
    """A policy beside the daemon's, and the words that choose it."""
    file = operator.admin.directory / "other.toml"
    file.write_text(text)
    return ["-c", str(file)]


def test_the_daemon_keeps_what_is_on_trial(operator: Operator) -> None:
    """While it waits the daemon keeps the new policy, after that the old one: restarted and killed on the way."""
    with kept(operator.admin, ONE) as site:
        old = load(operator.admin.file).digest
        was = operator.inventory()
        new = elsewhere(operator, MORE)
        operator.must(*new, "apply", "--confirm-within", "8s")
        tried = operator.inventory()
        operator.admin.host.ip("rule", "delete", "priority", "4001", "from", INSIDE["ipv4"])
        assert eventually(lambda: sorted(operator.inventory().splitlines()) == sorted(tried.splitlines()))
        site.daemon.stop(signal.SIGKILL)
        with kept(operator.admin) as again:
            assert again.daemon.logged("waits for confirmation: it is kept meanwhile")
            assert eventually(lambda: sorted(operator.inventory().splitlines()) == sorted(tried.splitlines()))
            assert trial.pending()
            again.daemon.stop(signal.SIGTERM)
        with kept(operator.admin):
            assert ended()
            assert eventually(lambda: at_work() == old)
            assert eventually(lambda: sorted(operator.inventory().splitlines()) == sorted(was.splitlines()))


def test_what_was_not_confirmed_is_left_alone(operator: Operator) -> None:
    """A daemon whose file holds what nobody confirmed keeps what was before, also after a boot; until it is applied."""
    operator.must("apply", policy=ONE)
    was = operator.inventory()
    operator.must("apply", "--confirm-within", "1s", policy=MORE)
    assert ended()
    for path in Path(operator.environment["RUNTIME_DIRECTORY"]).rglob("*.toml"):
        path.unlink()  # as a boot does
    with kept(operator.admin) as site:
        assert site.daemon.logged("is not wanted: nobody confirmed it within 1 seconds") == 1
        assert sorted(operator.inventory().splitlines()) == sorted(was.splitlines())
        site.daemon.reload()
        assert sorted(operator.inventory().splitlines()) == sorted(was.splitlines())
        operator.must("apply")
        assert eventually(site.in_force)
    with kept(operator.admin) as site:
        assert site.in_force()


def test_rolled_back_stays_so(operator: Operator) -> None:
    """What was rolled back does not come back with the daemon's next start, though its file holds it."""
    operator.must("apply", policy=ONE)
    was = operator.inventory()
    with kept(operator.admin, MORE) as site:
        assert operator.inventory() != was
        operator.must("rollback")
        assert eventually(lambda: operator.inventory() == was), site.said()
    with kept(operator.admin):
        assert operator.inventory() == was
    assert [entry.verb for entry in history.entries()] == ["apply", "start", "rollback to 1"]


def test_nothing_to_go_back_to(operator: Operator) -> None:
    """A daemon that came while the first policy ever was on trial puts nothing in force when nobody confirms it."""
    clean = operator.inventory()
    operator.must("apply", "--confirm-within", "4s", policy=ONE)
    with kept(operator.admin) as site:
        assert ended()
        assert eventually(lambda: site.daemon.logged("is not wanted") > 0)
        time.sleep(1.0)
        assert operator.inventory() == clean
        operator.must("apply")
        assert eventually(site.in_force)


def test_reloads_are_written_down(operator: Operator) -> None:
    """A reload is in the history as an apply is, with its plan, and rollback leads back from it."""
    with kept(operator.admin, ONE) as site:
        operator.admin.file.write_text(MORE)
        site.daemon.reload()
        assert [(entry.verb, entry.outcome) for entry in history.entries()] == [
            ("start", "in force"),
            ("reload", "in force"),
        ]
        operator.must("rollback")
        start = history.policy_of(history.entries()[0])
        assert eventually(lambda: at_work() == start.digest)
        assert eventually(lambda: not reconcile.look(start, site.kernel).plan.steps)


# --- verified, and guarded -------------------------------------------------------------------------------------------


def test_verified(operator: Operator) -> None:
    """Where the kernel routes otherwise than is wanted, by a rule of somebody's, all goes back, and why is said."""
    operator.admin.host.ip("rule", "add", "priority", "100", "from", INSIDE["ipv4"], "lookup", "main")
    before = operator.inventory()
    done = operator.command("apply", policy=ONE)
    assert done.returncode == 2
    assert "identity inside: ipv4 should go via 192.0.2.129 dev vpn0 table 4001" in done.stderr
    assert "the kernel says: via 203.0.113.1 dev wan table 254" in done.stderr
    assert operator.inventory() == before
    assert operator.outcomes() == ["rolled back"]


def test_interrupted_at_the_end(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C that comes when the last step was taken, and before anybody knows of it, takes all back."""
    operator.must("apply", policy=ONE)
    before = load(operator.admin.file)
    was = operator.inventory()
    take = reconcile.apply

    def take_and_be_interrupted(chosen: Plan, kernel: reconcile.Seams) -> None:
        monkeypatch.setattr(reconcile, "apply", take)
        take(chosen, kernel)
        raise KeyboardInterrupt

    with reconcile.opened() as kernel:
        policy = operator.admin.write(MORE)
        seen = reconcile.look(policy, kernel)
        monkeypatch.setattr(reconcile, "apply", take_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt):
            applying.apply(policy, seen, before, kernel, down={}, order=applying.Order())
    assert operator.inventory() == was
    assert operator.outcomes()[-1] == "rolled back"


def test_verified_reload(operator: Operator) -> None:
    """A reload is verified as an apply is: where the kernel routes otherwise, the policy before is in force again.

    It is not tried again by itself: each time it would be in force for a moment.
    """
    with kept(operator.admin, ONE) as site:
        before = load(operator.admin.file)
        operator.admin.host.ip("rule", "add", "priority", "100", "from", INSIDE["ipv4"], "lookup", "main")
        operator.admin.file.write_text(MORE)
        site.daemon.reload()
        assert site.daemon.logged("the kernel does not route as is wanted") == 1, site.said()
        assert site.daemon.logged("to be tried again") == 0
        assert at_work() == before.digest
        assert not reconcile.look(before, site.kernel).plan.steps
        last = history.entries()[-1]
        assert (last.verb, last.outcome) == ("reload", "rolled back")
        operator.admin.host.ip("rule", "delete", "priority", "100")
        site.daemon.reload()
        assert eventually(site.in_force), site.said()


SESSIONS = {
    "another-road": (INSIDE["ipv4"], WILD["ipv4"], "would take another road: its replies leave by wan via 203.0.113.1"),
    "the-same-road": (OUTSIDE["ipv4"], WILD["ipv4"], ""),
    "behind": ("10.9.0.1", LAN_HOST["ipv4"], ""),
    "not-here": ("198.18.0.1", WILD["ipv4"], ""),
}


@pytest.mark.parametrize("name", SESSIONS)
def test_own_session(operator: Operator, name: str) -> None:
    """apply refuses to move the operator's own SSH session to another road, unless it may go back, or she says yes."""
    server, client, words = SESSIONS[name]
    session = {"SSH_CONNECTION": f"{client} 50022 {server} 22"}
    before = operator.inventory()
    done = operator.command("apply", policy=ONE, **session)
    assert (done.returncode, words in done.stderr) == (1 if words else 0, True)
    if words:
        assert operator.inventory() == before
        operator.must("apply", "--confirm-within", "60s", **session)
        operator.must("rollback")
        assert operator.inventory() == before
        operator.must("apply", "--yes", **session)


def test_session_behind_sudo(operator: Operator) -> None:
    """The connection is found in the environment of the shell that sudo was started from, too."""
    script = f"env -u SSH_CONNECTION {' '.join(operator.admin.command('apply'))}; exit $?"
    operator.admin.file.write_text(ONE)
    environment = {**os.environ, **operator.environment, "SSH_CONNECTION": f"{WILD['ipv4']} 50022 {INSIDE['ipv4']} 22"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "another road" in done.stderr) == (1, True)


def test_session_cut(operator: Operator) -> None:
    """A session whose identity would be closed is told to be cut; one that would be somebody else's is told, too."""
    session = {"SSH_CONNECTION": f"{WILD['ipv4']} 50022 {OUTSIDE['ipv4']} 22"}
    operator.must("apply", policy=ONE, **session)
    closed = policy_text({"members": MEMBERS}, {"next_hop": ["2001:db8:2::1"]})
    done = operator.command("apply", policy=closed, **session)
    assert (done.returncode, "would be cut" in done.stderr) == (1, True)
    renamed = ONE.replace("[identity.outside]", "[identity.street]")
    done = operator.command("apply", policy=renamed, **session)
    assert (done.returncode, "would change identity: from outside to street" in done.stderr) == (1, True)
