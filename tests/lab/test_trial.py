"""A policy on trial over a real VPN, under traffic: whoever is killed and whenever, it goes back, and nothing leaks.

Enforcement is off: it would hide what the routes let through.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.kernel.admin import Table
from tests.kernel.running import Running, eventually, running
from tests.lab.gateway import Gateway
from tests.lab.processes import processes
from tests.lab.test_daemon import NOT_ENFORCED, all_is_well, in_force, talking

TIMES = 8
NEW: tuple[Table, Table] = ({"id": 2, "clamp_mss": True}, {"id": 1})


@contextlib.contextmanager
def daemon(gateway: Gateway) -> Iterator[Running]:
    """A daemon at the gateway, ready, which shares its state with the other verbs."""
    words = ["-c", os.fspath(gateway.policy), "run", "--listen", "none", "--netns", "gw"]
    state = os.environ["STATE_DIRECTORY"]
    with running([sys.executable, "-m", "agent", *words], gateway.directory, STATE_DIRECTORY=state) as started:
        yield started


def start(gateway: Gateway, *words: str) -> subprocess.Popen[bytes]:
    """Start a verb with the other policy, as from a terminal of its own."""
    other = gateway.directory / "other.toml"
    command = [sys.executable, "-m", "agent", "-c", os.fspath(other), *words, "--netns", "gw"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def watchmen() -> list[int]:
    """The watchmen at work."""
    return [pid for pid, words in processes().items() if "agent.watchman" in words]


def write_both(gateway: Gateway) -> None:
    """The policy that is to be kept, and another one beside it."""
    gateway.write(*NEW, kernel=NOT_ENFORCED)
    gateway.policy.rename(gateway.directory / "other.toml")
    gateway.write(kernel=NOT_ENFORCED)


def test_terminals_killed(gateway: Gateway) -> None:
    """apply with its whole session is killed at random moments: by the watchman's doing the old policy is back."""
    write_both(gateway)
    gateway.idmark("apply")
    chance = random.Random(73)  # noqa: S311
    with talking(gateway) as talk:
        for _ in range(TIMES):
            command = start(gateway, "apply", "--confirm-within", "1s")
            time.sleep(chance.uniform(0.2, 1.2))
            os.killpg(command.pid, signal.SIGKILL)
            command.wait()
            assert eventually(lambda: not watchmen())
            assert in_force(gateway)
        assert all_is_well(gateway)
        assert talk.taken > 0
    assert gateway.leaked() == {}


def test_all_killed(gateway: Gateway) -> None:
    """apply, the watchman and the daemon are killed at random moments: the next daemon brings the old policy back."""
    write_both(gateway)
    gateway.idmark("apply")
    chance = random.Random(731)  # noqa: S311
    with talking(gateway) as talk:
        for _ in range(TIMES):
            with daemon(gateway) as it:
                command = start(gateway, "apply", "--confirm-within", "1s")
                time.sleep(chance.uniform(0.2, 1.2))
                victims = [command.pid, *watchmen(), it.process.pid]
                chance.shuffle(victims)
                for pid in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                command.wait()
            with daemon(gateway):
                assert eventually(lambda: in_force(gateway))
                for pid in watchmen():  # one that had not been seen yet
                    os.kill(pid, signal.SIGKILL)
        assert all_is_well(gateway)
        assert talk.taken > 0
    assert gateway.leaked() == {}
