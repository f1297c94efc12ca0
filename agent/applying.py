"""One apply with a net under it: checked before, verified after, written down, and taken back where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from agent import IdmarkError, history, ledger, lookups, reconcile, session, snapshot, source, state, trial
from agent.desired import NOBODY
from agent.kernel import KernelError, runtime
from agent.model import Policy
from agent.plan import Plan
from agent.policy import PolicyError
from agent.reconcile import ApplyError, Look, Seams
from agent.snapshot import Snapshot

#: How often apply looks whether there is something left to do: a host may be in motion while it works.
PASSES = 3
#: How often the kernel is asked whether it routes as is wanted, and seconds in between.
ASKED, BETWEEN = 5, 0.2
#: Seconds that a line of the history waits for whoever is at work.
BRIEFLY = 1.0


class PendingError(IdmarkError):
    """A policy is on trial, and has to be confirmed or rolled back before anything else."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for. `verb` is for the history; `once`: only the plan that was approved, nothing that comes after.

    `within`: seconds until it goes back unless confirmed. `where`: the name of the namespace, if it was given one.
    `recorded`: into the history, and verified; at a boot whatever closes an identity is better than nothing.
    `unwanted`: a policy that no daemon shall take from its file after this.
    """

    verb: str = "apply"
    once: bool = False
    within: float | None = None
    where: str | None = None
    recorded: bool = True
    unwanted: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done: steps taken, what differs again already, what an operator should hear of."""

    changes: int
    left: Plan
    waiting: bool
    notes: tuple[str, ...]


def nothing_pending(kernel: Seams) -> tuple[str, ...]:
    """See that no policy is on trial; what an operator should hear of. Raises PendingError while one is, KernelError.

    One that is over, and whose watchman was killed, is taken back first.
    """
    found = trial.pending()
    if found and found.is_due(trial.clock() - trial.GRACE):
        told = trial.take_back(found, kernel, found.reason)
        return (f"policy {found.digest[:12]} was taken back first: {found.reason}", *told)
    if found:
        rest = max(0.0, found.deadline - trial.clock())
        words = f"policy {found.digest[:12]} waits for confirmation, {rest:.0f} more seconds"
        raise PendingError(f"{words}: idmark confirm, or idmark rollback, comes first")
    return ()


def kept(likely: Policy | None = None) -> Policy | None:
    """The policy that is to be in force now: the daemon's, or that of the last apply; None: none that can be read.

    `likely`: as in state.load().
    """
    at_work = ledger.current()
    for read in (partial(state.load, likely), source.handed_over):
        try:
            policy = read()
        except PolicyError:
            continue
        # Where the state can't be written the daemon may keep another one than was saved.
        if policy and (at_work is None or at_work.policy == policy.digest):
            return policy
        if at_work is None:
            break
    return None


def danger(seen: Look, before: Policy | None, kernel: Seams, down: Mapping[str, str] = NOBODY) -> str | None:
    """What would become of the operator's own SSH session, in words; None: nothing. Raises KernelError."""
    connection = session.connection()
    if connection is None:
        return None
    old = reconcile.look(before, kernel, down).desired if before else None
    return session.danger(connection, old, seen.desired, seen.facts, kernel.rtnl)


def refused(policy: Policy, seen: Look, verb: str, why: str) -> tuple[str, ...]:
    """Write down that it was not done; what an operator should hear of besides."""
    try:
        history.record(verb, policy, seen.plan, seen.desired, outcome=history.REFUSED, why=why)
    except IdmarkError as error:
        return (str(error),)
    return ()


def refused_at_the_door(error: PolicyError) -> tuple[str, ...]:
    """Write down that a policy with faults was to be applied; what an operator should hear of besides. No lock held."""
    try:
        with runtime.lock("apply", BRIEFLY):
            history.record_faults("apply", error)
    except IdmarkError as failure:
        return (str(failure),)
    return ()


def apply(
    policy: Policy, seen: Look, before: Policy | None, kernel: Seams, *, down: Mapping[str, str], order: Order
) -> Applied:
    """Put a policy in force, of which `seen` is the look; `before` is what `kept` gave. Under the namespace's lock.

    Raises ApplyError when it failed, or was taken back because the kernel does not route as is wanted; KernelError;
    StateError where a policy on trial could not be kept out of the next boot.
    """
    if not seen.plan.steps and before and before.digest == policy.digest:
        source.hand_over(policy)
        return Applied(0, seen.plan, False, (*_known(policy, kernel), *_kept_over_boot(policy, order)))
    net = _Net(policy, seen, before, kernel, down=down, order=order)
    changes, left = 0, seen.plan
    try:
        net.spread()
        for _attempt in range(1 if order.once else PASSES):
            reconcile.apply(left, kernel)
            changes += len(left.steps)
            seen = reconcile.look(policy, kernel, down)
            left = seen.plan
            if not left.steps:
                break
        if order.recorded and changes and not left.steps:
            left = verify(policy, kernel, down, seen)
        # Before the lock is free: what has been applied is what a daemon keeps from now on.
        source.hand_over(policy)
        waiting = net.hold()
    except BaseException as error:  # also Ctrl-C and the like
        # A failed step has taken back those before it; Ctrl-C may have come when all were taken, and none counted.
        words = net.catch(error, touched=changes > 0 or not isinstance(error, IdmarkError))
        if isinstance(error, DisagreesError):
            raise ApplyError(f"{error}\n{words}") from error
        raise
    notes = net.notes if waiting else (*net.notes, *_kept_over_boot(policy, order))
    if not left.steps:
        notes = (*notes, *_known(policy, kernel))
    return Applied(changes, left, waiting, notes)


class DisagreesError(ApplyError):
    """The kernel's own lookups are not what is wanted, once it is in force."""


class _Net:
    """What is spread under one apply: a snapshot, the history's entry, and for a trial the trial with its watchman."""

    def __init__(
        self, policy: Policy, seen: Look, before: Policy | None, kernel: Seams, *, down: Mapping[str, str], order: Order
    ) -> None:
        self.notes: tuple[str, ...] = ()
        self._policy, self._seen, self._before = policy, seen, before
        self._kernel, self._down, self._order = kernel, down, order
        self._snapshot: Snapshot | None = None
        self._entry: history.Entry | None = None
        self._trial: trial.Trial | None = None
        self._unwanted = ("", "")

    def spread(self) -> None:
        """Before anything is touched."""
        order = self._order
        if order.recorded:
            self._snapshot = snapshot.take(self._kernel, self._before, self._down)
            self._note(self._record)
        if order.within is not None and self._snapshot:
            self._unwanted = state.refused()
            if not self._before or self._before.digest != self._policy.digest:
                state.refuse(self._policy.digest, f"nobody confirmed it within {order.within:g} seconds")
            number = self._entry.number if self._entry else 0
            self._trial = trial.begin(
                self._policy, self._snapshot, order.within, number=number, unwanted=order.unwanted
            )
            from agent import watchman  # noqa: PLC0415

            watchman.start(self._trial.id, order.where)

    def hold(self) -> bool:
        """All is done. Whether it is to be confirmed."""
        if self._trial:
            self._trial = trial.wait(self._trial)
            self._note(
                lambda: self._end(history.WAITING, f"within {self._trial.within:g} seconds" if self._trial else "")
            )
            return True
        self._note(lambda: self._end(history.IN_FORCE, ""))
        if self._order.unwanted:
            self._note(lambda: state.refuse(self._order.unwanted, "it was rolled back"))
        elif self._order.recorded:
            self._note(state.forgive)
        return False

    def catch(self, error: BaseException, *, touched: bool) -> str:
        """It failed: go back, and say in words what is in force."""
        words, outcome = "what was in force before is in force again", history.FAILED
        with reconcile.signals_held():
            if touched and self._snapshot:
                left = snapshot.restore(self._snapshot, self._kernel, self._down)
                outcome = history.ROLLED_BACK
                if left:
                    words = f"it was taken back, but for: {'; '.join(left)}"
                if self._before:
                    source.hand_over(self._before)
            if self._trial:
                trial.forget()
            if self._order.within is not None and self._snapshot:
                self._note(lambda: state.refuse(*self._unwanted) if self._unwanted[0] else state.forgive())
            self._note(lambda: self._end(outcome, str(error) or type(error).__name__))
        return words

    def _record(self) -> None:
        self._entry = history.record(self._order.verb, self._policy, self._seen.plan, self._seen.desired)

    def _end(self, outcome: str, why: str) -> None:
        if self._entry:
            self._entry = history.ended(self._entry, outcome, why)

    def _note(self, write: Callable[[], None]) -> None:
        """What is in force is in force, also where nothing can be written."""
        try:
            write()
        except state.StateError as error:
            self.notes = (*self.notes, str(error))


def verify(policy: Policy, kernel: Seams, down: Mapping[str, str], seen: Look | None = None) -> Plan:
    """Ask the kernel for its own routes; what differs again. Raises DisagreesError, KernelError.

    `seen` is a look that was made just now, if one was. Where something differs again nothing is proved against the
    policy: that is somebody's doing, and is told as such.
    """
    for attempt in range(ASKED):
        if attempt:
            time.sleep(BETWEEN)
        # Afresh each time: a link that has just gone has taken its route along, and nothing is wrong then.
        now = reconcile.look(policy, kernel, down) if attempt or seen is None else seen
        if now.plan.steps:  # somebody has taken something away: that is not to wait
            return now.plan
        faults = lookups.faults(now.desired, kernel.rtnl)
        if not faults:
            return Plan(())
    left = reconcile.look(policy, kernel, down).plan
    if not left.steps:
        raise DisagreesError("\n".join(("the kernel does not route as is wanted:", *faults)))
    return left


def _known(policy: Policy, kernel: Seams) -> tuple[str, ...]:
    """Once all is as it should be: then no rule of the table is a stranger's, who might let packets change sets."""
    try:
        reconcile.leave_known(policy.kernel.nft_table, kernel)
    except KernelError as error:
        return (str(error),)
    return ()


def _kept_over_boot(policy: Policy, order: Order) -> tuple[str, ...]:
    """For `apply --approved` at the next boot. What is in force is in force, also where nothing can be written."""
    if not order.recorded:  # it is that boot
        return ()
    try:
        state.save(policy)
        if not order.unwanted:
            state.forgive()
    except state.StateError as error:
        return (str(error),)
    return ()
