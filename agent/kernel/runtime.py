"""The agent's own directory for this network namespace: its lock, and what it must remember until the next boot."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.kernel import KernelError, netns

#: systemd's RuntimeDirectory= sets $RUNTIME_DIRECTORY; like the sysctls, what lies there is gone at the next boot.
DEFAULT = Path("/run/idmark")
#: How long a second apply waits for the first, in seconds.
PATIENCE = 30.0
#: What to do about a record that can't be read.
REMEDY = "delete it, and see to src_valid_mark of the identities' links yourself"


def directory() -> Path:
    """The directory of the namespace of this thread; it need not be there. Raises KernelError."""
    return Path(os.environ.get("RUNTIME_DIRECTORY") or DEFAULT) / f"netns-{netns.cookie()}"


def _make(path: Path) -> None:
    """Make a directory for root's eyes only, if need be. Raises KernelError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"make {path}", os.strerror(error.errno or 0)) from error


@contextmanager
def lock(what: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the namespace's lock while changing its rules, routes and ruleset.

    Waits up to `patience` seconds for another holder. Raises KernelError naming that one: pid and command.
    The kernel drops the lock with the process, however it ends (flock(2)).
    """
    path = directory() / "lock"
    _make(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise KernelError(f"lock {path}", os.strerror(error.errno or 0)) from error
    try:
        deadline = time.monotonic() + patience
        while not _locked(descriptor, path):
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise KernelError(f"lock {path}", f"it is held by {holder}")
            time.sleep(0.05)
        _tell_holder(descriptor, f"pid {os.getpid()} (idmark {what})\n")
        yield
        _tell_holder(descriptor, "")
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise KernelError(f"lock {path}", os.strerror(error.errno or 0)) from error
    return True


def _tell_holder(descriptor: int, text: str) -> None:
    """For whoever waits; a full disk is no reason not to go on."""
    with suppress(OSError):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def read_record(path: Path) -> dict[str, int]:
    """A record of name: number from 1; empty while there is none. Raises KernelError for one that can't be read."""
    try:
        if not path.exists():
            return {}
        if not path.is_file():
            raise ValueError("it is not a regular file")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KernelError(f"read {path}", f"{error}; {REMEDY}") from error
    if not isinstance(record, dict) or not all(type(value) is int and 0 < value < 1 << 31 for value in record.values()):
        raise KernelError(f"read {path}", f"it is not a record of links and their numbers; {REMEDY}")
    return record


def write_record(path: Path, record: Mapping[str, int]) -> None:
    """Put a record in the place of the old one, in one step and on disk before this returns. Raises KernelError."""
    _make(path.parent)
    new = path.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            json.dump(record, file, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except OSError as error:
        raise KernelError(f"write {path}", os.strerror(error.errno or 0)) from error
