"""What passes tell: lines of the log, repairs and fights in the metrics, the ledger for the other verbs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from agent.fights import WINDOW, Fights
from agent.kernel import KernelError
from agent.ledger import Ledger, Repair
from agent.metrics import Metrics
from agent.plan import Change, Load, Step, kind

#: How many of a pass's changes a line names.
NAMED = 3
#: So many elements that are changed together are named.
ELEMENTS = 8
#: What to do about an opponent, by the kind of thing that is fought for.
ADVICE = {
    "rule": "systemd-networkd deletes other programs' rules unless it is told not to (deploy/networkd), and some VPN "
    "clients do",
    "route": "look for a routing daemon, or a script, that cleans up routing tables which are not its own",
    "nft": "look for a script or a service that flushes the whole ruleset (`systemctl restart nftables`)",
    "sysctl": "look for a sysctl.d file, or a script, that sets src_valid_mark",
}


class Chronicle:
    """What has happened, told once each. Nobody who can't be told is a reason to stop."""

    def __init__(self, metrics: Metrics, ledger: Ledger, log: logging.Logger) -> None:
        self._metrics = metrics
        self._log = log
        self._ledger = ledger
        self._published: Ledger | None = None
        self._unpublished = ""
        self._fights = Fights()
        self._opponents: dict[str, str] = {}
        self._notes: tuple[str, ...] = ()

    def due(self, step: Step, now: float) -> float:
        """From when on a step may be taken again that others keep undoing, on a clock that never goes back."""
        return self._fights.due(words(step), now)

    def noted(self, faults: Iterable[str], notes: Iterable[str]) -> None:
        """What an operator should hear of now: logged when it comes and when it goes."""
        faults = tuple(faults)
        present = tuple(dict.fromkeys((*faults, *notes)))
        for note in present:
            if note not in self._notes:
                self._log.log(logging.ERROR if note in faults else logging.WARNING, "%s", note)
        for note in self._notes:
            if note not in present:
                self._log.info("no longer: %s", note)
        self._notes = present
        for key in self._fights.over(time.monotonic()):
            self._log.info("nobody has undone this for %d minutes: %s", WINDOW // 60, key)
            self._opponents.pop(key, None)
        self._metrics.fighting(Counter(self._opponents.values()))

    def followed(self, steps: Sequence[Step], *, at_first: bool) -> None:
        """Steps that were taken because the host has moved on, or because nothing was in force yet."""
        self._log.info("%s: %s", "put in force" if at_first else "followed the host", in_short(steps))
        self.publish(self._ledger.repaired(Repair(time.time(), "follow", in_short(steps))))

    def repaired(self, steps: Sequence[Step]) -> None:
        """Steps that were taken because somebody had undone them: a line, but for what is fought over already."""
        now = time.monotonic()
        begun, quiet = list[Step](), list[Step]()
        for step in steps:
            fought_over = self._fights.fighting(words(step))
            if self._fights.repaired(words(step), now):
                begun.append(step)
            elif not fought_over:
                quiet.append(step)
            self._metrics.repaired(kind(step))
        for step in begun:
            self._opponents[words(step)] = kind(step)
            self._metrics.fought(kind(step))
            self._log.warning(
                "something on this host keeps undoing this: %s. It was repaired again, and will be, without another "
                "line here; %s",
                words(step),
                ADVICE[kind(step)],
            )
        if quiet:
            self._log.warning("repaired: %s", in_short(quiet))
        if quiet or begun:
            kinds = ", ".join(dict.fromkeys(map(kind, steps)))
            self.publish(self._ledger.repaired(Repair(time.time(), kinds, in_short(steps))))

    def stands(self, policy: str, *, in_sync: bool, down: Mapping[str, str]) -> None:
        """How it stands now: the policy by its digest, whether it is in force, who counts as down."""
        self.publish(replace(self._ledger, policy=policy, in_sync=in_sync, down=dict(down)))

    def publish(self, ledger: Ledger) -> None:
        """Let the other verbs know, if there is anything new; or nothing was for a while."""
        self._ledger = ledger
        if not ledger.tells_more_than(self._published):
            return
        try:
            self._published = ledger.publish()
            self._unpublished = ""
        except KernelError as error:
            if str(error) != self._unpublished:
                self._log.warning("the other verbs can't be told: %s", error)
            self._unpublished = str(error)


def words(step: Step) -> str:
    """What a step puts right, in one line of its own."""
    if isinstance(step, Change) and (count := sum(len(each.gone) + len(each.new) for each in step.changes)) > ELEMENTS:
        return f"nft table inet {step.table}, {count} elements"
    lines = list(step.lines())
    if isinstance(step, Load) and len(lines) > 1:
        return f"nft table inet {step.table}, {len(lines)} commands"
    return " / ".join(lines)


def in_short(steps: Sequence[Step]) -> str:
    """Steps in one line."""
    named = [words(step) for step in steps[:NAMED]]
    more = len(steps) - NAMED
    return "; ".join(named + [f"and {more} more"] * (more > 0))
