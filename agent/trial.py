"""A policy on trial: in force, but only until a moment on the clock unless somebody confirms it.

What is written down about it lies in the runtime directory, and is gone at the next boot like all that it is about;
what has to outlast one, that this policy is not wanted, is in the state directory from before the first change on
(agent/state.py). Whoever changes anything here holds the namespace's lock.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agent import history, ledger, snapshot, source, state
from agent.desired import NOBODY
from agent.kernel import KernelError, runtime
from agent.model import Policy
from agent.policy import parse
from agent.reconcile import Seams
from agent.snapshot import Snapshot

#: The files in the runtime directory: what is asked for again and again, and what is long.
NAME, CONTENTS = "trial.json", "trial-contents.json"
#: Stages: changes are under way, by whoever holds the lock; all is done, and has to be confirmed.
APPLYING, WAITING = "applying", "waiting"
#: Seconds that the daemon leaves to the watchman, whose job it is.
GRACE = 1.0


@dataclass(frozen=True, slots=True)
class Trial:
    """`digest` is that of the policy on trial, `number` the apply's in the history.

    `within` is how long it may last, in seconds; `deadline` when it ends, by `clock`. `unwanted` is the digest of the
    policy that no daemon is to take from its file if this one is confirmed; empty: none.
    """

    id: str
    digest: str
    within: float
    deadline: float
    stage: str = APPLYING
    unwanted: str = ""
    number: int = 0

    @property
    def reason(self) -> str:
        """Why it ends, when it is due."""
        return "cut short" if self.stage == APPLYING else f"not confirmed within {self.within:g} seconds"

    def is_due(self, now: float) -> bool:
        """Whether it ends now, for whoever holds the lock: then a change under way is one that was cut short."""
        return self.stage == APPLYING or now >= self.deadline


def clock() -> float:
    """Seconds since boot: nobody sets this clock, and it goes on while the machine sleeps (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def pending() -> Trial | None:
    """The policy on trial in this namespace; None: there is none. Raises KernelError."""
    found: Mapping[str, Any] = runtime.published(NAME)
    if not found:
        return None
    try:
        return Trial(**found)
    except TypeError as error:
        raise _unreadable(NAME, error) from error


def contents(trial: Trial) -> tuple[str, Snapshot]:
    """The text of the policy on trial, and what to go back to. Raises KernelError."""
    found: Mapping[str, Any] = runtime.published(CONTENTS)
    try:
        if found["trial"] != trial.id:
            raise ValueError(f"it is about trial {found['trial']}, not {trial.id}")
        return str(found["policy"]), Snapshot.of(found["before"])
    except (LookupError, TypeError, ValueError) as error:
        raise _unreadable(CONTENTS, error) from error


def _unreadable(name: str, error: Exception) -> KernelError:
    path = runtime.directory() / name
    return KernelError(f"read {path}", f"{error!r}; idmark remove forgets it, and takes away all that is in force")


def begin(policy: Policy, before: Snapshot, within: float, *, number: int, unwanted: str = "") -> Trial:
    """Write down what is about to be tried. Raises KernelError."""
    trial = Trial(
        id=secrets.token_hex(4),
        digest=policy.digest,
        within=within,
        deadline=clock() + within,
        unwanted=unwanted,
        number=number,
    )
    # First: who finds the one finds the other.
    runtime.publish(CONTENTS, {"trial": trial.id, "policy": state.text(policy), "before": before.plain()})
    runtime.publish(NAME, asdict(trial))
    return trial


def wait(trial: Trial) -> Trial:
    """All is done: from now on it waits for confirmation. Raises KernelError."""
    trial = replace(trial, stage=WAITING, deadline=clock() + trial.within)
    runtime.publish(NAME, asdict(trial))
    return trial


def forget() -> None:
    """Nothing is on trial. Raises KernelError."""
    runtime.withdraw(NAME)
    runtime.withdraw(CONTENTS)


def policy_of(trial: Trial) -> Policy:
    """The policy on trial. Raises PolicyError, KernelError."""
    return parse(contents(trial)[0], Path(source.APPLIED))


def confirm(trial: Trial) -> None:
    """It stays. Raises StateError, KernelError."""
    state.save(policy_of(trial))
    if trial.unwanted:
        state.refuse(trial.unwanted, "it was rolled back")
    else:
        state.forgive()
    end(trial.number, history.IN_FORCE, "confirmed")
    forget()


def take_back(trial: Trial, kernel: Seams, why: str) -> list[str]:
    """All goes back to what was before, and stays with the daemon; what could not be, in words. Raises KernelError.

    Whoever is killed in the midst of it leaves it to be done again.
    """
    at_work = ledger.current()
    _, before = contents(trial)
    left = snapshot.restore(before, kernel, at_work.down if at_work else NOBODY)
    if before.policy:
        source.hand_over(parse(before.policy, Path(state.NAME)))
    words = "; ".join([why, *(f"could not be put back: {each}" for each in left)])
    try:
        end(trial.number, history.ROLLED_BACK, words)
    finally:
        forget()
    return left


def end(number: int, outcome: str, why: str) -> None:
    """Write into the history what became of an apply. Raises StateError."""
    entry = history.find(number)
    if entry:
        history.ended(entry, outcome, why)
