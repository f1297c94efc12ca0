"""Whose state it is: every network namespace keeps its own policy for the next boot, and its own daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.kernel import KernelError, runtime
from tests.kernel.conftest import Peers
from tests.kernel.net import Host

SAVE = """
from agent import state
from tests.unit.values import INSIDE, OUTSIDE, policy
before = state.load()
state.save(policy(INSIDE, OUTSIDE))
after = state.load()
assert (before, after.identities) == (None, policy(INSIDE, OUTSIDE).identities)
"""
IN_NAMED = ["ip", "netns", "exec", "far"]
IN_NAMELESS = ["unshare", "-n"]


def keep(directory: Path, *where: str, script: str = SAVE) -> subprocess.CompletedProcess[str]:
    """Keep a policy in another process, with the folders of its own below `directory`."""
    environment = os.environ | {"STATE_DIRECTORY": f"{directory}/state", "RUNTIME_DIRECTORY": f"{directory}/run"}
    words = [*where, sys.executable, "-c", script]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("where", "place"),
    [
        pytest.param([], "state/applied.toml", id="the-machine's"),
        pytest.param(IN_NAMED, "state/netns-far/applied.toml", id="named"),
        pytest.param(IN_NAMELESS, "run/netns-*/applied.toml", id="nameless"),
    ],
)
def test_places(netns: Host, peers: Peers, tmp_path: Path, where: list[str], place: str) -> None:
    """The namespace of process 1 has the folder itself, a named one a folder in it, and one without a name, which no
    boot brings back, nothing there at all.
    """
    peers("far")
    done = keep(tmp_path, *where)
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("**/applied.toml")
    assert kept.relative_to(tmp_path).match(place)
    assert kept.stat().st_mode & 0o777 == 0o640
    assert kept.parent.stat().st_mode & 0o777 in {0o750, 0o700}


def test_forgotten(netns: Host, tmp_path: Path) -> None:
    """What is forgotten is not there at the next boot; forgetting twice is no trouble."""
    script = f"{SAVE}\nstate.forget(); state.forget()\nassert state.load() is None"
    done = keep(tmp_path, script=script)
    assert done.returncode == 0, done.stderr


def test_where_nothing_can_be_kept(netns: Host, tmp_path: Path) -> None:
    """A policy that can't be kept is told with the file and what it is for."""
    (tmp_path / "state").write_text("no folder")
    done = keep(tmp_path)
    assert "StateError" in done.stderr
    assert f"{tmp_path}/state/applied.toml" in done.stderr


# --- the daemon of a namespace ---------------------------------------------------------------------------------------

HOLD = """
import sys
from agent.kernel import runtime
with runtime.holding_run():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_daemon_a_namespace(netns: Host, peers: Peers) -> None:
    """Whoever asks is told the daemon's pid; a second daemon is refused with it, but not one in another namespace; and
    after kill -9 there is none.
    """
    peers("far")
    assert runtime.daemon_pid() is None
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        assert runtime.daemon_pid() == first.pid
        with (
            pytest.raises(runtime.BusyError, match=rf"pid {first.pid} \(idmark run\) is at work"),
            runtime.holding_run(),
        ):
            pass
        other = subprocess.run([*IN_NAMED, sys.executable, "-c", HOLD], input=b"", stdout=subprocess.PIPE, check=True)
        assert other.stdout == b"held\n"
        first.kill()
        first.wait()
        assert runtime.daemon_pid() is None
    with runtime.holding_run():
        assert runtime.daemon_pid() == os.getpid()
    assert runtime.daemon_pid() is None


def test_published(netns: Host) -> None:
    """What is published is there for everybody in the namespace; before that there is nothing, and garbage is told."""
    assert runtime.published("test.json") == {}
    runtime.publish("test.json", {"in_sync": True})
    assert runtime.published("test.json") == {"in_sync": True}
    path = runtime.directory() / "test.json"
    assert path.stat().st_mode & 0o777 == 0o600
    for garbage in ("[]", "{", "[" * 100_000):
        path.write_text(garbage)
        with pytest.raises(KernelError, match=str(path)):
            runtime.published("test.json")
    path.unlink()
