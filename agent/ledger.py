"""What the daemon tells the other verbs: since when it is at work, who counts as down and why, its last repairs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agent.kernel import runtime

#: The file in the runtime directory, and how many repairs it holds.
NAME, REPAIRS = "run.json", 20
#: Seconds after which it says nothing any more of a daemon that has ended.
STALE = 300.0


@dataclass(frozen=True, slots=True)
class Repair:
    """What was put right: when (seconds since the epoch), what kind of thing, and in words."""

    at: float
    kind: str
    words: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """The daemon's state, as far as others need it. `down` are identities with the reason, `repairs` the last ones.

    `since` and `at`, when it was published, are seconds since 1970.
    """

    pid: int
    since: float
    policy: str = ""
    in_sync: bool = False
    down: Mapping[str, str] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    at: float = field(default=0.0, compare=False)

    def repaired(self, repair: Repair) -> Ledger:
        """The ledger with one more repair, and without the oldest."""
        return replace(self, repairs=(*self.repairs, repair)[-REPAIRS:])

    @property
    def age(self) -> float:
        """Seconds since it was published."""
        return time.time() - self.at

    def tells_more_than(self, published: Ledger | None) -> bool:
        """Whether it is to be published: it says something else, or the other one is getting old."""
        return self != published or published.age > STALE / 2

    def publish(self) -> Ledger:
        """Let the others read it; as it is published. Raises KernelError."""
        published = replace(self, at=time.time())
        runtime.publish(NAME, published.plain())
        return published

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "pid": self.pid,
            "since": self.since,
            "policy": self.policy,
            "in_sync": self.in_sync,
            "down": dict(self.down),
            "repairs": [asdict(repair) for repair in self.repairs],
            "at": self.at,
        }


def left() -> Ledger | None:
    """The ledger of the daemon that is at work in this namespace, or that was. Raises KernelError."""
    found = runtime.published(NAME)
    if not found:
        return None
    try:
        return Ledger(**{**found, "repairs": tuple(Repair(**repair) for repair in found["repairs"])})
    except (TypeError, KeyError):  # of another version of the agent
        return None


def current() -> Ledger | None:
    """The ledger of the daemon that is at work in this namespace; None while there is none. Raises KernelError."""
    return left() if runtime.daemon_pid() is not None else None


def down() -> Mapping[str, str]:
    """Who counts as down, and why, by the word of the daemon at work; nobody without one. Raises KernelError."""
    at_work = current()
    return at_work.down if at_work else {}
