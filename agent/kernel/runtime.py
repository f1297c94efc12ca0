"""The agent's own directory for this network namespace: its lock, and what it must remember until the next boot."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agent.kernel import KernelError, netns

#: systemd's RuntimeDirectory= sets $RUNTIME_DIRECTORY; like the sysctls, what lies there is gone at the next boot.
DEFAULT = Path("/run/idmark")
#: How long a second apply waits for the first, in seconds.
PATIENCE = 30.0


def directory() -> Path:
    """The directory of the namespace of this thread, made if need be, for root's eyes only. Raises KernelError."""
    path = Path(os.environ.get("RUNTIME_DIRECTORY") or DEFAULT) / f"netns-{netns.cookie()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"make {path}", os.strerror(error.errno or 0)) from error
    return path


@contextmanager
def lock(what: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the namespace's lock while changing its rules, routes and ruleset.

    Waits up to `patience` seconds for another holder. Raises KernelError naming that one: pid and command.
    The kernel drops the lock with the process, however it ends (flock(2)).
    """
    path = directory() / "lock"
    try:
        with path.open("a+", encoding="utf-8") as file:
            deadline = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        file.seek(0)
                        holder = file.read().strip() or "another process"
                        raise KernelError(f"lock {path}", f"it is held by {holder}") from None
                    time.sleep(0.05)
            file.truncate(0)
            file.write(f"pid {os.getpid()} (idmark {what})\n")
            file.flush()
            yield
            file.truncate(0)
    except OSError as error:
        raise KernelError(f"lock {path}", os.strerror(error.errno or 0)) from error


def read_record(path: Path) -> dict[str, int]:
    """A record of name: number; empty while there is none. Raises KernelError for one that can't be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise KernelError(f"read {path}", str(error)) from error
    if not isinstance(record, dict) or not all(isinstance(value, int) for value in record.values()):
        raise KernelError(f"read {path}", "it is not a record of names and numbers")
    return record


def write_record(path: Path, record: Mapping[str, int]) -> None:
    """Put a record in the place of the old one, in one step and on disk before this returns. Raises KernelError."""
    new = path.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            json.dump(record, file, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except OSError as error:
        raise KernelError(f"write {path}", os.strerror(error.errno or 0)) from error
