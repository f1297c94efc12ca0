"""A policy kept in force: what a pass finds, and what it does about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agent import reconcile, trial
from agent.addresses import Family
from agent.applying import DisagreesError, verify
from agent.chronicle import Chronicle, in_short
from agent.desired import Desired, RoadsTaken, roads_changed, roads_taken
from agent.flows import flows_of
from agent.kernel import KernelError
from agent.kernel.conntrack import Conntrack
from agent.metrics import Metrics
from agent.model import Policy
from agent.plan import DeleteRoute, Plan, Step, closes, kind
from agent.probes import Prober, checks
from agent.reconcile import HostError, Look, Seams


@dataclass(frozen=True, slots=True)
class Pass:
    """What became of a pass: steps taken, seconds until one that is held back may be, whether the kernel refused some.

    `usable`: the policy fits this host. `status` is a line for an operator.
    """

    steps: int
    held: float | None
    refused: bool
    usable: bool
    status: str


class Keeper:
    """Keeps `policy`, or what takes its place, as the kernel should have it.

    It takes the namespace's lock for granted: two that change the same things must not meet. Nothing is in force until
    the first pass.
    """

    def __init__(
        self,
        policy: Policy,
        kernel: Seams,
        prober: Prober,
        *,
        metrics: Metrics,
        chronicle: Chronicle,
        log: logging.Logger,
    ) -> None:
        self.policy = policy
        self._kernel = kernel
        self._prober = prober
        self._metrics = metrics
        self._chronicle = chronicle
        self._log = log
        # What was put in force last, forgotten with its policy; and the roads that connections have begun on.
        self._settled: Desired | None = None
        self._roads: RoadsTaken = {}

    def take(self, policy: Policy) -> None:
        """From the next pass on keep another policy, which is in force already."""
        self.policy = policy
        self._settled = None
        self._chronicle.stands(policy.digest, in_sync=False, down=self._prober.down)

    def change(self, policy: Policy) -> Look:
        """Put another policy in force and keep it; or the old one as it was, if that can't be. The look before.

        Raises HostError, DisagreesError where the kernel does not route as is wanted then, ApplyError and KernelError.
        """
        down = self._prober.down
        look = reconcile.look(policy, self._kernel, down)
        HostError.check(look.desired)
        self._forget_closed(look)
        reconcile.apply(look.plan, self._kernel)
        try:
            verify(policy, self._kernel, down)
        except DisagreesError as error:
            reconcile.apply(reconcile.look(self.policy, self._kernel, down).plan, self._kernel)
            raise DisagreesError(f"{error}\nwhat was in force before is in force again") from error
        self.take(policy)
        self._log.info("policy %s is in force: %s", policy.digest[:12], in_short(look.plan.steps) or "no change")
        return look

    def take_back(self) -> None:
        """Go back to what was before a policy on trial, if its watchman has not done it in time. Raises KernelError."""
        found = trial.pending()
        if found and found.is_due(trial.clock() - trial.GRACE):
            self._log.warning("policy %s is taken back: %s", found.digest[:12], found.reason)
            for words in trial.take_back(found, self._kernel, found.reason):
                self._log.error("%s", words)

    def keep(self, *, moved: bool) -> Pass:
        """One pass. `moved`: links or addresses did, which takes routes along, and that is nobody's fault.

        Raises KernelError, and ApplyError for a step without which those behind it would not be right.
        """
        began = time.monotonic()
        down = self._prober.down
        look = reconcile.look(self.policy, self._kernel, down)
        waits = {index: self._chronicle.due(step, began) - began for index, step in enumerate(look.plan.steps)}
        due = tuple(_due(look.plan.steps, waits))
        changing = self._forget_closed(look)
        mended = reconcile.mend(Plan(due), self._kernel)
        complete = len(mended.taken) == len(look.plan.steps)
        self._metrics.passed(time.monotonic() - began, complete)
        self._report(mended.taken, look.desired, moved=moved)
        self._chronicle.noted(look.desired.faults, (*look.notes, *self._kernel.sysctls.notes, *mended.refused))
        if complete:
            self._forget_flows(changing, look.desired)
            self._roads = roads_taken(look.desired)
        if not look.plan.steps:
            self._leave_known()
        # What is gone from now on somebody took away, also while there is something that can't be put right.
        self._settled = look.desired
        self._metrics.keeps(look.desired, down)
        self._prober.watch(checks(look.desired))
        self._chronicle.stands(self.policy.digest, in_sync=complete, down=down)
        if mended.failure:
            raise mended.failure
        held = min((wait for wait in waits.values() if wait > 0), default=None)
        return Pass(
            len(mended.taken), held, bool(mended.refused), not look.desired.faults, _status(look, complete=complete)
        )

    def _leave_known(self) -> None:
        """Spare the next verb the reading of large sets. All is as it should be: no rule lets packets change them."""
        try:
            reconcile.leave_known(self.policy.kernel.nft_table, self._kernel)
        except KernelError as error:
            self._log.warning("%s", error)

    def _report(self, taken: Sequence[Step], desired: Desired, *, moved: bool) -> None:
        """Tell what was done: for the host moves on, or because somebody had undone it."""
        undone, followed = told_apart(taken, as_before=desired == self._settled, moved=moved)
        if followed:
            self._chronicle.followed(followed, at_first=self._settled is None)
        if undone:
            self._chronicle.repaired(undone)

    def _forget_closed(self, look: Look) -> frozenset[tuple[str, Family]]:
        """Forget connections whose road is closed, before another one opens: none begins meanwhile, nor goes on as it
        was. The roads that are left, and change while they are open.
        """
        wanted = roads_taken(look.desired)
        changed = roads_changed(self._roads, wanted)
        # Only where rules are there already are roads opened behind them.
        opening = {pair: wanted[pair] for pair in changed if look.observed.table and not _has_road(*pair, look)}
        self._forget_flows(opening, look.desired)
        self._roads = {**self._roads, **opening}
        return changed - opening.keys()

    def _forget_flows(self, changed: Iterable[tuple[str, Family]], desired: Desired) -> None:
        """Forget connections of who has another road, where the policy wants them to begin anew."""
        families: dict[str, set[Family]] = {}
        for name, family in sorted(changed):
            families.setdefault(name, set()).add(family)
        for name, those in families.items():
            if desired.policy.identity(name).flush_flows:
                try:
                    count = Conntrack().forget(flows_of(name, desired, those))
                except KernelError as error:
                    self._log.error("identity %s has another road, and its connections go on: %s", name, error)
                else:
                    self._log.info("identity %s has another road: %d of its connections are forgotten", name, count)


def _has_road(name: str, family: Family, look: Look) -> bool:
    """Whether an identity's packets have a road now; without any default their table leaves it to main."""
    table = look.desired.policy.identity(name).table
    routes = [route for route in look.observed.routes if (route.table, route.family) == (table, family)]
    defaults = [route for route in routes if not route.destination.length]
    return not defaults or any(route.hops for route in defaults)


def told_apart(taken: Sequence[Step], *, as_before: bool, moved: bool) -> tuple[list[Step], list[Step]]:
    """Steps of a pass that put right what somebody had undone, and those that follow the host.

    `as_before`: the same is wanted as at the last pass. `moved`: links or addresses did, and routes and sysctls with
    them.
    """
    weather = {"route", "sysctl"} if moved else set()
    undone, followed = list[Step](), list[Step]()
    for step in taken:
        (undone if as_before and kind(step) not in weather else followed).append(step)
    return undone, followed


def _due(steps: Sequence[Step], waits: dict[int, float]) -> Iterator[Step]:
    """The steps that need not wait; nor those that would not be right before one that has to."""
    held = False
    for index, step in enumerate(steps):
        if waits[index] > 0:
            if closes(step):
                return
            held = True
        elif not (held and isinstance(step, DeleteRoute)):
            yield step
        elif closes(step):
            return


def _status(look: Look, *, complete: bool) -> str:
    closed = [f"{s.identity.name} {way.family}" for s in look.desired.standings for way in s.ways if way.closed]
    words = f"policy {look.desired.policy.digest[:12]} {'in force' if complete else 'NOT in force'}"
    return f"{words}; closed: {', '.join(closed)}" if closed else words
