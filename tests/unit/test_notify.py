"""What a service manager and the journal are told."""

from __future__ import annotations

import io
import logging
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.notify import JournalFormatter, Notify, TerminalFormatter, formatter, watchdog_seconds

LOG = logging.getLogger("tests.notify")


class Manager:
    """A service manager's socket."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        self.socket.settimeout(5)
        self.environment = {"NOTIFY_SOCKET": name}

    def heard(self) -> str:
        return self.socket.recv(4096).decode()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_messages(tmp_path: Path, abstract: bool) -> None:
    """Each message as in sd_notify(3), to a socket with a path or an abstract one."""
    manager = Manager(f"@idmark-test-{os.getpid()}" if abstract else str(tmp_path / "socket"))
    notify = Notify(LOG, manager.environment | {"WATCHDOG_USEC": "60000000"})
    notify.ready()
    assert manager.heard() == "READY=1"
    notify.reloading()
    assert manager.heard().startswith("RELOADING=1\nMONOTONIC_USEC=")
    notify.status("two\nlines")
    assert manager.heard() == "STATUS=two lines"
    notify.status("two lines")
    notify.watchdog()
    assert manager.heard() == "WATCHDOG=1"
    notify.watchdog()  # so soon nobody wants to hear of it again
    notify.stopping()
    assert manager.heard() == "STOPPING=1"


def test_nobody_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    """Without a manager nothing is said, and that is nothing to speak of."""
    Notify(LOG, {}).ready()
    assert not caplog.records


def test_a_manager_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A manager that can't be told is a warning, and no more."""
    notify = Notify(LOG, {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notify.ready()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tell the service manager READY=1" in caplog.text


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"WATCHDOG_USEC": "30000000"}, 30.0, id="for-us"),
        pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0, id="for-this-pid"),
        pytest.param({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None, id="for-another"),
        pytest.param({"WATCHDOG_USEC": "0"}, None, id="zero"),
        pytest.param({"WATCHDOG_USEC": "soon"}, None, id="garbage"),
    ],
)
def test_watchdog(environment: Mapping[str, str], seconds: float | None) -> None:
    """The manager says how often it wants to hear of us; we speak twice as often."""
    assert watchdog_seconds(environment) == seconds
    assert Notify(LOG, environment).interval == (math.inf if seconds is None else seconds / 2)


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("agent", level, __file__, 1, text, None, None)


@pytest.mark.parametrize(
    ("level", "number"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_journal(level: int, number: int) -> None:
    """Every line has its level as in sd-daemon(3), so that none of them is a message of another level."""
    assert JournalFormatter().format(record(level, "one\ntwo")) == f"<{number}>one\n<{number}>two"


def test_terminal() -> None:
    """A person gets the time, and the level where it matters."""
    assert TerminalFormatter().format(record(logging.INFO, "text"))[8:] == " text"
    assert TerminalFormatter().format(record(logging.WARNING, "text"))[8:] == " warning: text"


def test_who_reads(tmp_path: Path) -> None:
    """Levels are for the journal: where it reads that very stream, and nowhere else."""
    with (tmp_path / "log").open("w") as stream, (tmp_path / "other").open("w") as other:
        status = os.fstat(stream.fileno())
        environment = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert isinstance(formatter(stream, environment), JournalFormatter)
        assert isinstance(formatter(other, environment), TerminalFormatter)
        assert isinstance(formatter(stream, {}), TerminalFormatter)
        assert isinstance(formatter(io.StringIO(), environment), TerminalFormatter)
