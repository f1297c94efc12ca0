"""A policy on trial: in force, but only until a moment on the clock unless somebody confirms it.

What is written down about it lies in the runtime directory, and is gone at the next boot like all that it is about;
what has to outlast one, that this policy is not wanted, is in the state directory from before the first change on
(agent/state.py). Whoever changes anything here holds the namespace's lock.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agent import IdmarkError, history, ledger, snapshot, source, state
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


class DamagedError(KernelError):
    """What is written down about the policy on trial can't be read; the text says the way out."""


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
    """The policy on trial in this namespace; None: there is none. Raises DamagedError."""
    try:
        found: Mapping[str, Any] = runtime.published(NAME)
        if not found:
            return None
        trial = Trial(**found)
        if not isinstance(trial.digest, str) or not math.isfinite(trial.within + trial.deadline):
            raise ValueError("it is not about a trial")
    except (KernelError, TypeError, ValueError) as error:
        raise _damaged(NAME, error) from error
    return trial


def contents(trial: Trial) -> tuple[str, Snapshot]:
    """The text of the policy on trial, and what to go back to. Raises DamagedError."""
    try:
        found: Mapping[str, Any] = runtime.published(CONTENTS)
        if found["trial"] != trial.id:
            raise ValueError(f"it is about trial {found['trial']}, not {trial.id}")
        return str(found["policy"]), Snapshot.of(found["before"])
    except (KernelError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(CONTENTS, error) from error


def _damaged(name: str, error: Exception) -> DamagedError:
    place = runtime.directory()
    why = error.why if isinstance(error, KernelError) else repr(error)
    remedy = f"delete {place / NAME} and apply what is to stay; or idmark remove, which takes away all that is in force"
    return DamagedError(f"read {place / name}", f"{why}; {remedy}")


def begin(policy: Policy, before: Snapshot, within: float, *, number: int, unwanted: str = "") -> Trial:
    """Write down what is about to be tried. Raises KernelError."""
    trial = Trial(
        id=os.urandom(4).hex(),
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


def confirm(trial: Trial) -> tuple[str, ...]:
    """It stays; what could not be written down of that, in words.

    Raises StateError where the next boot would not have it, and KernelError: then it is on trial still.
    """
    state.save(policy_of(trial))
    if trial.unwanted:
        state.refuse(trial.unwanted, "it was rolled back")
    else:
        state.forgive()
    forget()
    return _end(trial, history.IN_FORCE, "confirmed")


def take_back(trial: Trial, kernel: Seams, why: str) -> tuple[str, ...]:
    """All goes back to what was before, and stays with the daemon. Raises KernelError.

    What could not be put back, or written down, is told, each a sentence. Whoever is killed in the midst of it leaves
    it to be done again.
    """
    down = ledger.down()
    _, before = contents(trial)
    left = [f"could not be put back: {each}" for each in snapshot.restore(before, kernel, down)]
    kept = parse(before.policy, Path(state.NAME)) if before.policy else None
    if kept:
        source.hand_over(kept)
    told = (*left, *_not_kept(trial, kept, why), *_end(trial, history.ROLLED_BACK, "; ".join([why, *left])))
    forget()
    return told


def _not_kept(trial: Trial, before: Policy | None, why: str) -> tuple[str, ...]:
    """A confirmation that was cut short may have kept it for the next boot already. What is in the way, in words."""
    try:
        saved = state.load()
        if saved is None or saved.digest != trial.digest or (before and before.digest == trial.digest):
            return ()
        state.refuse(trial.digest, why)
        if before:
            state.save(before)
        else:
            state.drop()
    except IdmarkError as error:
        return (str(error),)
    return ()


def _end(trial: Trial, outcome: str, why: str) -> tuple[str, ...]:
    """Write into the history what became of the apply. What is in the way, in words: it changes nothing else."""
    try:
        entry = history.find(trial.number)
        if entry:
            history.ended(entry, outcome, why)
    except state.StateError as error:
        return (str(error),)
    return ()
