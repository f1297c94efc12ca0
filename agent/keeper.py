"""A policy kept in force: what a pass finds, puts right, and tells of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent import reconcile
from agent.desired import Desired, roads_changed
from agent.fights import WINDOW, Fights
from agent.flows import flows_of
from agent.kernel import KernelError
from agent.kernel.conntrack import Conntrack
from agent.ledger import Ledger, Repair
from agent.metrics import Metrics
from agent.model import Policy
from agent.plan import Load, Plan, Step, kind
from agent.probes import Prober, checks
from agent.reconcile import HostError, Look, Seams

#: How many of a pass's changes a line names.
NAMED = 3
#: What to do about an opponent, by the kind of thing that is fought for.
ADVICE = {
    "rule": "systemd-networkd deletes other programs' rules unless it is told not to (deploy/networkd), and some VPN "
    "clients do",
    "route": "look for a routing daemon, or a script, that cleans up routing tables which are not its own",
    "nft": "look for a script or a service that flushes the whole ruleset (`systemctl restart nftables`)",
    "sysctl": "look for a sysctl.d file, or a script, that sets src_valid_mark",
}


@dataclass(frozen=True, slots=True)
class Pass:
    """What became of a pass: steps taken, seconds until one that is held back may be, whether the kernel refused some.

    `status` is a line for an operator.
    """

    steps: int
    held: float | None
    refused: bool
    status: str


class Keeper:
    """Keeps `policy`, or what takes its place, as the kernel should have it.

    It takes the namespace's lock for granted: two that change the same things must not meet. Nothing is in force until
    the first pass.
    """

    def __init__(
        self, policy: Policy, kernel: Seams, prober: Prober, *, metrics: Metrics, ledger: Ledger, log: logging.Logger
    ) -> None:
        self.policy = policy
        self.ledger = replace(ledger, policy=policy.digest)
        self._published: Ledger | None = None
        self._kernel = kernel
        self._prober = prober
        self._metrics = metrics
        self._log = log
        self._fights = Fights()
        self._notes: tuple[str, ...] = ()
        # What was in force when all was last; the one is forgotten with its policy, the other tells of roads.
        self._kept: Desired | None = None
        self._roads: Desired | None = None

    def take(self, policy: Policy) -> None:
        """From the next pass on keep another policy, which is in force already. Raises KernelError."""
        self.policy = policy
        self._kept = None
        self._publish(replace(self.ledger, policy=policy.digest))

    def change(self, policy: Policy) -> None:
        """Put another policy in force and keep it; or the old one as it was, if that can't be.

        Raises HostError, ApplyError and KernelError.
        """
        look = reconcile.look(policy, self._kernel, self._prober.down)
        HostError.check(look.desired)
        reconcile.apply(look.plan, self._kernel)
        self.take(policy)
        self._log.info("policy %s is in force: %s", policy.digest[:12], _in_short(look.plan.steps) or "no change")

    def keep(self, *, moved: bool) -> Pass:
        """One pass. `moved`: links or addresses did, which takes routes along, and that is nobody's fault.

        Raises KernelError, and ApplyError for a step without which those behind it would not be right.
        """
        began = time.monotonic()
        complete, down = False, self._prober.down
        try:
            look = reconcile.look(self.policy, self._kernel, down)
            waits = [self._fights.due(_key(step), began) - began for step in look.plan.steps]
            steps = [step for step, wait in zip(look.plan.steps, waits, strict=True) if wait <= 0]
            refused = [reconcile.mend(Plan((step,)), self._kernel) for step in steps]
            left = [words for each in refused for words in each]
            complete = len(steps) == len(waits) and not left
        finally:
            self._metrics.passed(time.monotonic() - began, complete)
            self._publish(replace(self.ledger, in_sync=complete, down=down))
        self._tell(look, left)
        taken = [step for step, words in zip(steps, refused, strict=True) if not words]
        if taken:
            self._report(taken, look.desired, moved=moved)
        # What is gone from now on somebody took away, also while there is something that can't be put right.
        self._kept = look.desired
        if complete:
            self._forget_flows(look.desired)
            self._roads = look.desired
        self._metrics.keeps(look.desired, down)
        self._prober.watch(checks(look.desired))
        held = min((wait for wait in waits if wait > 0), default=None)
        return Pass(len(steps), held, bool(left), _status(look, complete))

    def _tell(self, look: Look, left: Sequence[str]) -> None:
        """Log what an operator should hear of, when it comes and when it goes."""
        notes = tuple(dict.fromkeys((*look.notes, *left)))
        for note in notes:
            if note not in self._notes:
                self._log.warning("%s", note)
        for note in self._notes:
            if note not in notes:
                self._log.info("no longer: %s", note)
        self._notes = notes
        for key in self._fights.over(time.monotonic()):
            self._log.info("nobody has undone this for %d minutes: %s", WINDOW // 60, key)

    def _report(self, steps: Sequence[Step], desired: Desired, *, moved: bool) -> None:
        """Tell what was done: for the host moves on, or because somebody had undone it."""
        weather = {"route", "sysctl"} if moved else set()
        undone = [step for step in steps if desired == self._kept and kind(step) not in weather]
        followed = [step for step in steps if step not in undone]
        if followed:
            words = _in_short(followed)
            self._log.info("%s: %s", "put in force" if self._kept is None else "followed the host", words)
            self._publish(self.ledger.repaired(Repair(time.time(), "follow", words)))
        if undone:
            self._repaired(undone)

    def _repaired(self, steps: Sequence[Step]) -> None:
        now = time.monotonic()
        known = [step for step in steps if self._fights.fighting(_key(step))]
        begun = [step for step in steps if self._fights.repaired(_key(step), now)]
        quiet = [step for step in steps if step not in (*known, *begun)]
        for step in steps:
            self._metrics.repaired(kind(step))
        for step in begun:
            self._metrics.fought(kind(step))
            self._log.warning(
                "something on this host keeps undoing this: %s. It was repaired again, and will be, without another "
                "line here; %s",
                _key(step),
                ADVICE[kind(step)],
            )
        if quiet:
            self._log.warning("repaired: %s", _in_short(quiet))
        if quiet or begun:
            kinds = ", ".join(dict.fromkeys(map(kind, steps)))
            self._publish(self.ledger.repaired(Repair(time.time(), kinds, _in_short(steps))))

    def _forget_flows(self, desired: Desired) -> None:
        """Connections of who has another road now, where the policy wants them to begin anew."""
        for name in sorted(roads_changed(self._roads, desired) if self._roads else ()):
            if desired.policy.identity(name).flush_flows:
                try:
                    count = Conntrack().forget(flows_of(name, desired))
                except KernelError as error:
                    self._log.error("identity %s has another road, and its connections go on: %s", name, error)
                else:
                    self._log.info("identity %s has another road: %d of its connections are forgotten", name, count)

    def _publish(self, ledger: Ledger) -> None:
        self.ledger = ledger
        if ledger != self._published:
            ledger.publish()
            self._published = ledger


def _key(step: Step) -> str:
    """What a step puts right, in one line of its own."""
    lines = list(step.lines())
    if isinstance(step, Load) and len(lines) > 1:
        return f"nft table inet {step.table}, {len(lines)} commands"
    return " / ".join(lines)


def _in_short(steps: Sequence[Step]) -> str:
    words = [_key(step) for step in steps]
    more = len(words) - NAMED
    return "; ".join(words[:NAMED] + [f"and {more} more"] * (more > 0))


def _status(look: Look, complete: bool) -> str:
    closed = [f"{s.identity.name} {way.family}" for s in look.desired.standings for way in s.ways if way.closed]
    words = f"policy {look.desired.policy.digest[:12]} {'in force' if complete else 'NOT in force'}"
    return f"{words}; closed: {', '.join(closed)}" if closed else words
