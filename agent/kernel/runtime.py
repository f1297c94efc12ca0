"""The agent's own directory for this network namespace: its locks, and what it must remember until the next boot.

Root and the agent's own user share it (see agent/folder.py): what root makes there belongs to the owner of /run/idmark.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from agent import folder
from agent.kernel import KernelError, netns

#: systemd's RuntimeDirectory= sets $RUNTIME_DIRECTORY; like the sysctls, what lies there is gone at the next boot.
DEFAULT = Path("/run/idmark")
#: How long a second apply waits for the first, in seconds.
PATIENCE = 30.0
#: How long a `run` waits for one that is just ending, or for somebody who only asks, in seconds.
RUN_PATIENCE = 1.0
#: What to do about a record that can't be read.
REMEDY = "delete it, and see to src_valid_mark of the identities' links yourself"


class BusyError(KernelError):
    """Somebody else holds the lock; the text says who."""


def directory() -> Path:
    """The directory of the namespace of this thread; it need not be there. Raises KernelError."""
    return Path(os.environ.get("RUNTIME_DIRECTORY") or DEFAULT) / f"netns-{netns.cookie()}"


# --- locks: the kernel drops one with its process, however that ends (flock(2)) --------------------------------------


@contextmanager
def lock(what: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the namespace's lock while changing its rules, routes and ruleset.

    Waits up to `patience` seconds for another holder. Raises BusyError naming that one: pid and command; KernelError.
    """
    path = directory() / "lock"
    with _locked(path, f"lock {path}", "it is held by {}", what, patience):
        yield


@contextmanager
def holding_run() -> Iterator[None]:
    """Be the one `idmark run` of this namespace. Raises BusyError naming the one at work by its pid; KernelError."""
    with _locked(directory() / "run.lock", "run", "{} is at work in this network namespace", "run", RUN_PATIENCE):
        yield


def daemon_pid() -> int | None:
    """The pid of the `idmark run` at work in this namespace, in its own words; None: none is. Raises KernelError."""
    path = directory() / "run.lock"
    doing = f"ask whether idmark run is at work ({path})"
    try:
        with folder.opened(path.parent.parent, path.parent.name) as place, folder.readable(place, path.name) as file:
            deadline = time.monotonic() + RUN_PATIENCE
            while not _try(file, fcntl.LOCK_SH):
                # One that has just begun has not said its number yet.
                words = os.pread(file, 200, 0).split()
                if len(words) > 1 and words[1].isdigit():
                    return int(words[1])
                if time.monotonic() >= deadline:
                    raise KernelError(doing, "it is, and does not say as which process")
                time.sleep(0.01)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError(doing, error.strerror or str(error)) from error
    return None


@contextmanager
def _locked(path: Path, doing: str, refusal: str, what: str, patience: float) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            place = stack.enter_context(_made(path.parent))
            file = stack.enter_context(folder.lockable(place, path.name))
            deadline = time.monotonic() + patience
            while not _try(file, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
                    raise BusyError(doing, refusal.format(holder))
                time.sleep(0.05)
        except OSError as error:
            raise KernelError(doing, error.strerror or str(error)) from error
        _tell_holder(file, f"pid {os.getpid()} (idmark {what})\n")
        yield
        _tell_holder(file, "")


def _try(file: int, operation: int) -> bool:
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tell_holder(file: int, text: str) -> None:
    """For whoever waits; a full disk is no reason not to go on."""
    with suppress(OSError):
        os.truncate(file, 0)
        os.pwrite(file, text.encode(), 0)


# --- files -----------------------------------------------------------------------------------------------------------


def _made(path: Path) -> AbstractContextManager[int]:
    """The descriptor of a directory for its owner's eyes only, which is made if need be."""
    return folder.made(path.parent, 0o755, path.name, 0o700)


def read(path: Path) -> Any:
    """What a JSON file says; an empty record while there is none. Raises OSError, ValueError or RecursionError."""
    try:
        with folder.opened(path.parent.parent, path.parent.name) as place:
            data = folder.got(place, path.name)
    except FileNotFoundError:
        data = None
    return {} if data is None else json.loads(data)


def leave(path: Path, text: str, *, durable: bool = False) -> None:
    """Put a file of text into the directory, in one step; a crash of the machine may lose it. Raises KernelError."""
    try:
        with _made(path.parent) as place:
            folder.put(place, path.name, text.encode(), 0o600, durable=durable)
    except OSError as error:
        raise KernelError(f"write {path}", error.strerror or str(error)) from error


def publish(name: str, value: Mapping[str, Any]) -> None:
    """Let others know, in one step; a crash of the machine may lose it. Raises KernelError."""
    leave(directory() / name, json.dumps(value, sort_keys=True))


def withdraw(name: str) -> None:
    """Nothing is published under that name any more. Raises KernelError."""
    path = directory() / name
    try:
        with folder.opened(path.parent.parent, path.parent.name) as place, suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=place)
    except FileNotFoundError:  # not even the directory
        return
    except OSError as error:
        raise KernelError(f"delete {path}", error.strerror or str(error)) from error


def published(name: str) -> dict[str, Any]:
    """What was published under that name; empty if nothing was since boot. Raises KernelError."""
    path = directory() / name
    try:
        value = read(path)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise KernelError(f"read {path}", _why(error)) from error
    return value


def read_record(path: Path) -> dict[str, int]:
    """A record of name: number from 1; empty while there is none. Raises KernelError for one that can't be read."""
    try:
        record = read(path)
    except (OSError, ValueError, RecursionError) as error:
        raise KernelError(f"read {path}", f"{_why(error)}; {REMEDY}") from error
    if not isinstance(record, dict) or not all(type(value) is int and 0 < value < 1 << 31 for value in record.values()):
        raise KernelError(f"read {path}", f"it is not a record of links and their numbers; {REMEDY}")
    return record


def write_record(path: Path, record: Mapping[str, int]) -> None:
    """Put a record in the place of the old one, in one step and on disk before this returns. Raises KernelError."""
    leave(path, json.dumps(record, sort_keys=True), durable=True)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
