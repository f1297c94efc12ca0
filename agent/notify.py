"""What a service tells its manager: sd_notify(3), the watchdog, and levels in the journal. Standard library only."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from typing import TextIO


class Notify:
    """What is told to the manager that $NOTIFY_SOCKET names; without one nothing is said.

    A manager that can't be told is no reason to wait or to end: the log says so once, and the next message is tried.
    """

    def __init__(self, log: logging.Logger, environment: Mapping[str, str] = os.environ) -> None:
        self._log = log
        address = environment.get("NOTIFY_SOCKET", "")
        # @ stands for the NUL that the name of an abstract socket begins with (unix(7)).
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._status = ""
        self._deaf = False
        self._alive_at = -math.inf
        #: How often `watchdog` is to be said, in seconds: twice as often as the manager waits for it.
        self.interval = (watchdog_seconds(environment) or math.inf) / 2

    def ready(self) -> None:
        """Started, or reloaded."""
        self._send("READY=1")

    def reloading(self) -> None:
        """About to reload; `ready` says when it is done."""
        # sd_notify(3): the manager tells by the time which reload it is that has begun.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """About to end."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; one that was said before is not said again."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def watchdog(self) -> None:
        """Still alive; may be said at any time, and is passed on as often as it has to be."""
        now = time.monotonic()
        # Asked once within the interval: so it is never later than the manager waits.
        if self.interval < math.inf and now - self._alive_at >= self.interval / 2:
            self._alive_at = now
            self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        """One datagram."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # A manager that does not read must not hold up what it watches.
                sock.setblocking(False)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            if not self._deaf:
                self._log.warning("tell the service manager %s: %s", assignments[0], error)
            self._deaf = True
        else:
            self._deaf = False


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Within how many seconds the manager wants to hear of us again; None: it doesn't (sd_watchdog_enabled(3))."""
    # Meant for another process: it has come down by inheritance.
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) else None


# --- the log ---------------------------------------------------------------------------------------------------------

#: syslog(3)'s levels of logging's.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class JournalFormatter(logging.Formatter):
    """Each line begins with its level as in sd-daemon(3): `<4>text`. The journal knows time and unit."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as lines."""
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class TerminalFormatter(logging.Formatter):
    """`15:04:05 warning: text`; an ordinary line goes without its level."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as text."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{super().format(record)}"


def formatter(stream: TextIO, environment: Mapping[str, str] = os.environ) -> logging.Formatter:
    """The formatter for whoever reads a stream: the journal, if it is what $JOURNAL_STREAM says, or a person."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file at all
        return TerminalFormatter()
    # systemd.exec(5): device and inode of what the journal reads.
    journal = environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return JournalFormatter() if journal else TerminalFormatter()
