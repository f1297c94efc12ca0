"""The prober: asks for every identity that has a probe, and says who counts as down."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agent.addresses import Address, Family
from agent.desired import NOBODY, Desired
from agent.kernel.probe import Question, ask
from agent.model import Probe


@dataclass(frozen=True, slots=True)
class Check:
    """What to ask for an identity: from which own address, if it has one now, and by which link."""

    identity: str
    probe: Probe
    source: Address | None
    link: str


def checks(desired: Desired) -> tuple[Check, ...]:
    """What is to be asked, given what the host has now."""
    found = []
    for standing in desired.standings:
        identity, probe = standing.identity, standing.identity.probe
        if probe:
            source = next(iter(standing.own(Family.of(probe.target))), None)
            found.append(Check(identity.name, probe, source, identity.link))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Record:
    """How many of the last questions in a row were answered, or were not, and what follows: `down` or not."""

    answered: int = 0
    unanswered: int = 0
    down: bool = False

    def after(self, answered: bool, fail_after: int) -> Record:
        """The record with one more question."""
        if answered:
            return Record(self.answered + 1, 0, self.down and self.answered + 1 < fail_after)
        return Record(0, self.unanswered + 1, self.down or self.unanswered + 1 >= fail_after)


def is_late(lateness: float, every: float) -> bool:
    """Whether the end of a question's time was noticed so late (seconds) that it says nothing of the far end: this
    machine slept, or had no time for us.
    """
    return lateness > every / 2


class Prober:
    """One thread that asks, in the network namespace of the thread that calls `watch` first.

    `changed` is called from it whenever `down` is another one. Who was `down` when this began is so until the answers
    say otherwise; of everybody else nothing is known, and who is not known to be down is up.
    """

    def __init__(self, changed: Callable[[], None], down: Mapping[str, str] = NOBODY) -> None:
        self._changed = changed
        self._down = down
        self._checks: tuple[Check, ...] = ()
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)

    @property
    def down(self) -> Mapping[str, str]:
        """Who counts as down, by name, and why in words; another mapping, never a changed one, when that changes."""
        return self._down

    def is_healthy(self) -> bool:
        """Whether somebody asks, if there is anything to ask."""
        return not self._checks or self._thread.is_alive()

    def watch(self, checks: Iterable[Check]) -> None:
        """Ask these from now on, each at once if it is new. A record goes on while identity and probe are the same."""
        wanted = tuple(checks)
        if wanted == self._checks and self._down.keys() <= {check.identity for check in wanted}:
            return
        self._checks = wanted
        # Who has no probe has no use for a thread.
        if not self._thread.is_alive():
            self._thread.start()
        self._wake.send(b"\0")

    def close(self) -> None:
        """Ask no more. Who was down stays so in `down`."""
        self._closed = True
        if self._thread.is_alive():
            self._wake.send(b"\0")
            self._thread.join()
        self._wake.close()
        self._woken.close()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            # Who was down before this began is so until the first answers, whatever the probe was then.
            asked = {
                (check.identity, check.probe): _Asked(check, selector, self._down.get(check.identity, ""))
                for check in self._checks
            }
            while not self._closed:
                due = min((each.due for each in asked.values()), default=None)
                for key, _ in selector.select(None if due is None else max(0.0, due - _now())):
                    if key.data:
                        key.data.ready()
                    else:
                        self._woken.recv(1024)
                        asked = self._follow(asked, selector)
                now = _now()
                for each in asked.values():
                    if each.due <= now:
                        each.turn(now)
                self._tell(asked.values())
            for each in asked.values():
                each.drop()

    def _follow(
        self, asked: dict[tuple[str, Probe], _Asked], selector: selectors.BaseSelector
    ) -> dict[tuple[str, Probe], _Asked]:
        """What is asked, after `watch`."""
        wanted = {(check.identity, check.probe): check for check in self._checks}
        for place, each in asked.items():
            if wanted.get(place) != each.check:
                # From another address, or by another link: what is on its way says nothing.
                each.drop()
        for place, check in wanted.items():
            if place in asked:
                asked[place].check = check
            else:
                asked[place] = _Asked(check, selector)
        return {place: asked[place] for place in wanted}

    def _tell(self, asked: Iterable[_Asked]) -> None:
        down = {each.check.identity: each.why for each in asked if each.record.down}
        if down != self._down:
            self._down = MappingProxyType(down)
            self._changed()


class _Asked:
    """A check that is asked again and again: its record, `why` it is down if it is, the question on its way, and when
    that one's time is over.
    """

    def __init__(self, check: Check, selector: selectors.BaseSelector, why: str = "") -> None:
        self.check = check
        self.record = Record(down=bool(why))
        self.why = why
        self.due = _now()
        self._selector = selector
        self._question: Question | None = None
        self._open = False  # a question was asked, or could not be, and is not yet settled
        self._number = 0
        self._trouble = ""

    def ready(self) -> None:
        """Something came for the question on its way."""
        if self._question and self._question.answered():
            self._settle(answered=True)
        elif self._question and self._question.events == selectors.EVENT_WRITE:
            # A connection that was refused stays ready for ever.
            self.drop(settled=False)

    def turn(self, now: float) -> None:
        """The time is over: what is unanswered now stays so; ask again."""
        every = self.check.probe.every
        late = is_late(now - self.due, every)
        if self._open and not late:
            self._settle(answered=False)
        self.drop()
        # By the clock and not by when we woke: nothing drifts. What was slept through is not made up for.
        self.due = now + every if late else self.due + every
        self._open = True
        self._number += 1
        # No route, no link, no address, no permission: a question that can't be sent is not answered.
        probe, source = self.check.probe, self.check.source
        if source is None:
            self._trouble = "there is no address to ask from"
            return
        try:
            question = ask(probe.target, source, self.check.link, port=probe.port, number=self._number)
        except OSError as error:
            self._trouble = os.strerror(error.errno or 0)
            return
        self._trouble = ""
        self._question = question
        self._selector.register(question.socket, question.events, self)

    def drop(self, *, settled: bool = True) -> None:
        """Wait no more for the question on its way; unless it is `settled` it is unanswered when its time is over."""
        if settled:
            self._open = False
        if self._question:
            self._selector.unregister(self._question.socket)
            self._question.close()
            self._question = None

    def _settle(self, *, answered: bool) -> None:
        before = self.record
        self.record = before.after(answered, self.check.probe.fail_after)
        if self.record.down and not before.down:
            what = f"cannot be sent: {self._trouble}" if self._trouble else "is not answered"
            self.why = f"its probe {self.check.probe} {what}"
        self.drop()


def _now() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps: the monotonic one stops then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
