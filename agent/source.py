"""Where the daemon's policy comes from: a file with its lists, and what `apply` has put in force beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from agent import state
from agent.kernel import runtime
from agent.model import Policy
from agent.policy import PolicyError, load

#: Where `apply` leaves the policy that it has put in force in this namespace, for a daemon to keep.
APPLIED = "handed-over.toml"

#: What tells one state of a file from the next: time of the last change (ns), size and inode; None: it isn't there.
Stamp = tuple[int, int, int] | None


def hand_over(policy: Policy) -> None:
    """Leave a policy to the daemon of this namespace. Raises KernelError."""
    runtime.leave(_place(), state.text(policy))


def handed_over() -> Policy | None:
    """What was left last by `hand_over` since boot; None: nothing was. Raises PolicyError, KernelError."""
    path = _place()
    return state.read(path) if path.exists() else None


def forget() -> None:
    """Nothing is left to the daemon any more. Raises KernelError."""
    runtime.withdraw(APPLIED)


def _place() -> Path:
    return runtime.directory() / APPLIED


class Source:
    """A policy's file, its lists, and what was left by `hand_over`. `path` is the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: tuple[str, ...] = (str(path),)
        self._read = self._seen = _stamps(self._files)
        self._place = _place()  # once: what namespace this is costs the kernel a socket
        self._applied = _stamp(self._place)

    def read(self) -> Policy:
        """The policy that the file holds now. Raises PolicyError, with every fault that there is."""
        before = _stamps(self._files)
        try:
            policy = load(self.path)
            self._files = policy.files
        except PolicyError as error:
            self._files = tuple(dict.fromkeys((*error.files, *self._files)))
            raise
        finally:
            # What was changed while it was read is read again; of files that are new here nothing is known before.
            self._read = self._seen = {name: before.get(name, _stamp(Path(name))) for name in self._files}
        return policy

    def has_changed(self) -> bool:
        """Whether a file is another than the one that was read, and has been left alone since the last question."""
        now = _stamps(self._files)
        still, self._seen = now == self._seen, now
        return still and now != self._read

    def handed_over(self) -> Policy | None:
        """What was left by another's `hand_over` since the last question. Raises PolicyError."""
        stamp = _stamp(self._place)
        if stamp in (self._applied, None):
            return None
        self._applied = stamp
        return state.read(self._place)

    def is_handed_over(self) -> bool:
        """Whether `handed_over` has something to tell."""
        return _stamp(self._place) not in (self._applied, None)

    @property
    def changed_at(self) -> float:
        """When the file or one of its lists was changed or put into its place last, in seconds since 1970."""
        found = [path.stat() for path in map(Path, self._files) if path.exists()]
        return max((max(each.st_mtime, each.st_ctime) for each in found), default=0.0)


def _stamps(files: Iterable[str]) -> dict[str, Stamp]:
    return {name: _stamp(Path(name)) for name in files}


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)
