"""`idmark run` as a service manager starts it: told to be ready by its own word, stopped by a signal."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from agent import ledger, reconcile
from agent.addresses import parse_address
from agent.model import Lookup
from agent.plan import Plan
from agent.policy import load
from agent.reconcile import Seams
from tests.kernel.admin import Admin
from tests.kernel.net import Events

#: Seconds until something that must come is given up.
PATIENCE = 20.0
#: Seconds in which a daemon that has something to do would have begun to.
QUIET = 0.15
#: linux/rtnetlink.h: RTNLGRP_IPV4_ROUTE and _RULE, and IPv6's; and the types of what is announced there.
ROUTES_AND_RULES = (7, 8, 11, 19)
KINDS = {24: "new route", 25: "del route", 32: "new rule", 33: "del rule"}


@dataclass(frozen=True, slots=True)
class Running:
    """A daemon. `manager` is where it reports, `file` what it has logged, `metrics` the socket where it serves them."""

    process: subprocess.Popen[bytes]
    manager: socket.socket
    file: Path
    metrics: Path

    @property
    def log(self) -> list[str]:
        """The lines of its log."""
        return self.file.read_text(encoding="utf-8").splitlines()

    def logged(self, words: str) -> int:
        """How many lines of its log hold these words."""
        return sum(words in line for line in self.log)

    def told(self, word: str) -> None:
        """Wait until the service manager is told this: `READY=1`. Raises TimeoutError, with the log."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if select.select([self.manager], [], [], 0.05)[0] and word in self.manager.recv(4096).decode().splitlines():
                return
        raise TimeoutError(f"{word} was not said; exit {self.process.poll()}\n{self.file.read_text()}")

    def reload(self) -> None:
        """SIGHUP, and wait until it is done."""
        self.process.send_signal(signal.SIGHUP)
        self.told("RELOADING=1")
        self.told("READY=1")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It sleeps meanwhile, and wakes to all that has happened at once."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample; the sum of those that have these labels. Raises LookupError, OSError."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self._scraped())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise LookupError(f"{name} {labels}")
        return sum(found)

    def _scraped(self) -> str:
        connection = http.client.HTTPConnection("localhost")
        with contextlib.closing(connection):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(PATIENCE)
            connection.sock.connect(os.fspath(self.metrics))
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()


@contextlib.contextmanager
def running(command: list[str], directory: Path, *, until_ready: bool = True, **environment: str) -> Iterator[Running]:
    """Start a daemon, wait until it is ready, and see that it ends with the block.

    A daemon that logged a fault of its own has failed, whatever else it did.
    """
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        path = directory / f"manager{time.monotonic_ns()}"
        manager.bind(os.fspath(path))
        log = path.with_suffix(".log")
        stderr = stack.enter_context(log.open("wb"))
        # In a test the first process's namespace is the test's own: without a directory all tests would share one.
        own = {"NOTIFY_SOCKET": os.fspath(path), "STATE_DIRECTORY": os.fspath(directory / "state")}
        process = subprocess.Popen(command, stderr=stderr, env={**os.environ, **own, **environment})
        listening = [word.removeprefix("unix:") for word in command if word.startswith("unix:")]
        started = Running(process, manager, log, Path(listening[0] if listening else os.devnull))
        try:
            if until_ready:
                started.told("READY=1")
            yield started
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        text = log.read_text(encoding="utf-8")
        assert "Traceback" not in text, text
        assert "internal error" not in text, text


def eventually(done: Callable[[], bool]) -> bool:
    """Whether it comes true."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- a daemon, and an administrator beside it -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Site:
    """A host where an administrator has a daemon. `kernel` is the test's own view of it."""

    admin: Admin
    daemon: Running
    kernel: Seams

    def plan(self, file: Path | None = None) -> Plan:
        """What there is to do for a file's policy, its own as a rule, with the identities down that the daemon says."""
        return reconcile.look(load(file or self.admin.file), self.kernel, ledger.down()).plan

    def in_force(self, file: Path | None = None) -> bool:
        """Whether there is nothing to do."""
        return not self.plan(file).steps

    def said(self) -> str:
        """What is still to do, and the log: for a test that fails."""
        return f"{self.plan().text}\n{self.daemon.file.read_text(encoding='utf-8')}"

    def road(self, destination: str, source: str) -> Lookup:
        """Where a packet of this host's own goes."""
        self.kernel.rtnl.links()  # one may have another name by now
        return self.kernel.rtnl.lookup(parse_address(destination), source=parse_address(source))

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Take down what happens to routes, rules and rulesets."""
        with self.admin.host.events(socket.NETLINK_ROUTE, *ROUTES_AND_RULES) as events:
            yield Watch(events, self.kernel)


class Watch:
    """What has happened since it was made."""

    def __init__(self, events: Events, kernel: Seams) -> None:
        self._events = events
        self._kernel = kernel
        self._since = kernel.nfnl.generation()
        self._seen: Counter[str] = Counter()

    def seen(self) -> dict[str, int]:
        """How many routes and rules came and went, and how many transactions were committed to nf_tables."""
        self._seen.update(KINDS[kind] for kind in self._events.kinds())
        commits = self._kernel.nfnl.generation() - self._since
        return dict(self._seen) | ({"commits": commits} if commits else {})

    def settled(self) -> dict[str, int]:
        """As `seen`, when nothing has happened for a while."""
        before = self.seen()
        while True:
            time.sleep(QUIET)
            now = self.seen()
            if now == before:
                return now
            before = now


@contextlib.contextmanager
def kept(admin: Admin, text: str = "", *words: str) -> Iterator[Site]:
    """A daemon that keeps a policy, the one in the file if none is given, until the block ends; `words` are `run`'s."""
    if text:
        admin.file.write_text(text)
    where = admin.directory / "metrics.sock"
    command = admin.command("run", "--listen", f"unix:{where}", *words)
    with reconcile.opened() as kernel, running(command, admin.directory) as daemon:
        assert eventually(where.exists)
        yield Site(admin, daemon, kernel)
