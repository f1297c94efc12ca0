"""The daemon: a pass whenever there is a reason to look, and another policy whenever there is one."""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections.abc import Callable, Mapping

from agent import IdmarkError, history, state, trial
from agent.applying import DisagreesError
from agent.keeper import Keeper
from agent.kernel import KernelError, runtime
from agent.kernel.wake import Wake
from agent.metrics import Metrics
from agent.model import Policy
from agent.notify import Notify
from agent.policy import PolicyError
from agent.reconcile import ApplyError, HostError, Look
from agent.source import Source
from agent.state import StateError

#: Signals that the daemon lives by.
RELOAD, STOP = signal.SIGHUP, frozenset({signal.SIGTERM, signal.SIGINT})
SIGNALS = frozenset({RELOAD, *STOP})
#: Seconds between two looks that nobody asked for, and between two looks at the policy's files.
RESYNC, FILES = 60.0, 1.0
#: Seconds until the next try after trouble: doubled each time, up to the last.
RETRY, RETRY_LAST = 0.05, 5.0
#: A look that found nothing to do earns a rest from news of routes, so many times its own length, seconds at most: a
#: routing daemon may change main a thousand times a second, and none of it may be about us.
REST, REST_LAST = 4.0, 1.0
#: Seconds that a change of policy waits for another verb of idmark, until a pass is tried again when there is one at
#: work, and from when on it takes too long.
PATIENCE, BUSY, BUSY_LONG = 1.0, 0.05, 1.0
#: Seconds that going round once may take: to read and load a policy of a million prefixes, say.
HEALTHY = 300.0
#: So many new objects, and the collector of cycles looks at them: a scrape makes some ten thousand, all for a moment.
YOUNG = 20_000
#: What becomes of a policy, for the history; it has failed by all other errors.
OUTCOMES: Mapping[type[Exception], str] = {HostError: history.REFUSED, DisagreesError: history.ROLLED_BACK}


class UnwantedError(IdmarkError):
    """The policy was taken back, or nobody has confirmed it: it is left alone until somebody applies it."""

    def __init__(self, policy: Policy, why: str) -> None:
        super().__init__(
            f"policy {policy.digest[:12]} is not wanted: {why}; apply it, or change it, to have it in force"
        )


class Daemon:
    """Keeps what a source gives in force in this thread's namespace, until a signal stops it; then it stays."""

    def __init__(
        self,
        source: Source,
        wake: Wake,
        keeper: Callable[[Policy], Keeper],
        *,
        metrics: Metrics,
        notify: Notify,
        log: logging.Logger,
    ) -> None:
        """Raises PolicyError if neither the file nor what was in force before the last boot can be used."""
        self._source = source
        self._wake = wake
        self._metrics = metrics
        self._notify = notify
        self._log = log
        self._due = self._files_due = 0.0
        self._retry = RETRY
        self._deaf = 0.0
        self._moved = True
        self._trouble = self._refusal = ""
        # Records of the other verbs that can't be read, in words.
        self._damaged: list[str] = []
        # A policy that was read and could not be put in force yet, and when that is tried again.
        self._wanted: Policy | None = None
        self._wanted_due = 0.0
        self._busy_since: float | None = None
        self._ready = self._told = False
        self._alive = time.monotonic()
        self._keeper = keeper(self._first())

    def is_ready(self) -> bool:
        """Whether a first pass was made, without trouble."""
        return self._ready

    def is_healthy(self) -> bool:
        """Whether the daemon has gone round not long ago."""
        return time.monotonic() - self._alive < HEALTHY

    def run(self) -> None:
        """Returns when a signal says so."""
        self._look()
        while True:
            now = self._alive = time.monotonic()
            until = min(self._due, self._files_due, now + self._notify.interval)
            woken = self._wake.wait(max(until - now, 0.0), self._deaf)
            if woken.signals & STOP:
                break
            self._moved |= woken.moved
            self._see_to_policy(told_to=RELOAD in woken.signals)
            if woken.changed or woken.poked or time.monotonic() >= self._due:
                self._look()
            self._notify.watchdog()
        self._notify.stopping()
        self._log.info("stopped; policy %s stays in force", self._keeper.policy.digest[:12])

    # --- the policy --------------------------------------------------------------------------------------------------

    def _first(self) -> Policy:
        """The policy on trial, if there is one; the file's; or the one that was in force last, if the file has faults,
        was changed before that, or holds what was taken back.
        """
        try:
            on_trial = trial.pending()
            if on_trial:
                self._log.info("policy %s waits for confirmation: it is kept meanwhile", on_trial.digest[:12])
                return trial.policy_of(on_trial)
        except trial.DamagedError:  # the first pass tells of it; and it was refused before it was tried
            pass
        try:
            policy = self._unless_refused(self._source.read())
        except (PolicyError, UnwantedError, StateError) as error:
            self._refused(error)
            kept = state.load()
            if kept is None:
                raise
            self._log.warning("policy %s was in force before, and is kept", kept.digest[:12])
            return kept
        self._accepted(policy)
        return self._applied_since(policy) or policy

    def _applied_since(self, policy: Policy) -> Policy | None:
        """Another policy that was applied after the file was changed: what was done last counts."""
        saved_at = state.saved_at()
        if saved_at is None or saved_at < self._source.changed_at:
            return None
        try:
            applied = state.load()
        except IdmarkError as error:
            self._log.warning("%s", error)
            return None
        if applied is None or applied.digest == policy.digest:
            return None
        self._log.warning(
            "policy %s was applied since %s was changed, and is kept", applied.digest[:12], policy.files[0]
        )
        return applied

    def _see_to_policy(self, *, told_to: bool) -> None:
        now = time.monotonic()
        self._told |= told_to
        if now >= self._files_due or told_to:
            self._files_due = now + FILES
            if self._source.is_handed_over() or self._waits(told_to=told_to):
                self._due = now
            elif self._told or self._source.has_changed():
                self._told = False
                self._reload()
        if self._wanted and not self._told and (self._moved or now >= self._wanted_due):
            self._change(self._wanted)

    def _waits(self, *, told_to: bool) -> bool:
        """Whether a policy is on trial: whoever confirms is to find that one; files are seen to when it has ended."""
        try:
            on_trial = trial.pending()
        except KernelError:  # the next pass tells of it
            return True
        if on_trial and told_to:
            self._log.warning("policy %s waits for confirmation: the reload comes after it", on_trial.digest[:12])
        return on_trial is not None

    def _reload(self) -> None:
        self._notify.reloading()
        try:
            self._change(self._unless_refused(self._source.read()))
        except PolicyError as error:
            self._refused(error)
            self._record_faults(error)
        except IdmarkError as error:
            self._refused(error)
        self._notify.ready()

    def _unless_refused(self, policy: Policy) -> Policy:
        """The file's policy. Raises UnwantedError for the one that was taken back; another one ends the refusal."""
        digest, why = state.refused()
        if digest == policy.digest:
            raise UnwantedError(policy, why)
        if digest:
            state.forgive()
        return policy

    def _change(self, policy: Policy) -> None:
        """Put a policy in force. What refuses it may pass (another verb at work, a network that isn't there yet)."""
        self._wanted = None
        try:
            if policy.digest != self._keeper.policy.digest:
                with runtime.lock("run", PATIENCE):
                    self._put_in_force(policy)
                    self._save()
                self._due = 0.0  # to see that all is as it should be
        except DisagreesError as error:  # with every other try it would be in force for a moment
            self._refused(error)
        except IdmarkError as error:
            if str(error) != self._refusal:
                self._refused(error)
                self._log.error("policy %s is to be tried again", policy.digest[:12])
            self._refusal = str(error)
            self._wanted, self._wanted_due = policy, time.monotonic() + RESYNC
        else:
            self._accepted(policy)

    def _put_in_force(self, policy: Policy) -> None:
        """Raises HostError, ApplyError and KernelError, written into the history too."""
        try:
            look = self._keeper.change(policy)
        except (HostError, ApplyError) as error:
            outcome = OUTCOMES.get(type(error), history.FAILED)
            self._record("reload", policy, outcome=outcome, why=str(error))
            raise
        self._record("reload", policy, look, outcome=history.IN_FORCE)

    def _record(self, verb: str, policy: Policy, look: Look | None = None, *, outcome: str, why: str = "") -> None:
        try:
            plan, desired = (look.plan, look.desired) if look else (None, None)
            history.record(verb, policy, plan, desired, outcome=outcome, why=why)
        except IdmarkError as error:
            self._log.warning("%s", error)

    def _record_faults(self, error: PolicyError) -> None:
        try:
            with runtime.lock("run", PATIENCE):
                history.record_faults("reload", error)
        except IdmarkError as failure:
            self._log.warning("%s", failure)

    def _remember(self) -> None:
        """A policy that came into force by the daemon's start."""
        policy = self._keeper.policy
        try:
            entries = history.entries()
        except IdmarkError as error:
            self._log.warning("%s", error)
            return
        known = [entry for entry in entries if entry.outcome in (history.IN_FORCE, history.WAITING)]
        if not known or known[-1].policy != policy.digest:
            self._record("start", policy, outcome=history.IN_FORCE)

    def _accepted(self, policy: Policy) -> None:
        self._refusal = ""
        self._metrics.reloaded(time.time())
        for warning in policy.warnings:
            self._log.warning("%s", warning)

    def _refused(self, error: IdmarkError) -> None:
        self._metrics.not_reloaded()
        for line in error.lines():
            self._log.error("%s", line)

    def _save(self) -> None:
        """What is in force, for the next boot. Where nothing can be written it is in force all the same."""
        try:
            if not trial.pending():
                state.save(self._keeper.policy)
        except IdmarkError as error:
            self._log.warning("%s", error)

    # --- passes ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        began = time.monotonic()
        self._deaf = 0.0
        try:
            with runtime.lock("run", 0.0):
                self._see_to_records()
                found = self._keeper.keep(moved=self._moved)
                if not self._ready and found.usable:
                    self._save()
                    self._remember()
        except runtime.BusyError as error:
            self._due = began + BUSY
            if self._busy_since is None:
                self._busy_since = began
            elif began - self._busy_since > BUSY_LONG:
                self._in_trouble(f"nothing can be put right: {error}")
            return
        except IdmarkError as error:
            self._metrics.failed()
            self._in_trouble(str(error))
            self._try_again(began)
            return
        if self._trouble:
            self._log.info("no longer: %s", self._trouble)
        self._moved, self._trouble, self._busy_since = False, "", None
        now = time.monotonic()
        if found.refused:
            self._try_again(now)
        else:
            self._retry = RETRY
            self._due = now + (RESYNC if found.held is None else found.held)
        if not found.steps:
            self._deaf = min(REST * (now - began), REST_LAST)
        self._notify.status(found.status)
        if not self._ready:
            self._ready = True
            self._notify.ready()
            # What is there by now stays: the collector of cycles need not walk through it during every scrape.
            gc.collect()
            gc.freeze()
            gc.set_threshold(YOUNG)

    def _see_to_records(self) -> None:
        """Do what other verbs have left to be done; one record that is damaged keeps nothing else from its place."""
        damaged = []
        for see_to in (self._keeper.take_back, self._take_over, self._let_be):
            try:
                see_to()
            except (trial.DamagedError, StateError) as error:
                damaged.append(str(error))
        for words in dict.fromkeys(damaged):
            if words not in self._damaged:
                self._log.error("%s", words)
        self._damaged = damaged

    def _take_over(self) -> None:
        """Keep what another verb has put in force since; it had the lock until then."""
        try:
            policy = self._source.handed_over()
        except IdmarkError as error:
            self._refused(error)
            return
        if policy and policy.digest != self._keeper.policy.digest:
            self._keeper.take(policy)
            self._wanted = None
            self._log.info("policy %s was applied: it is what is kept now", policy.digest[:12])

    def _let_be(self) -> None:
        """Raises UnwantedError when what is kept was taken back, and there was nothing before it to be handed over."""
        digest, why = state.refused()
        if digest == self._keeper.policy.digest and not trial.pending():
            raise UnwantedError(self._keeper.policy, why)

    def _in_trouble(self, words: str) -> None:
        """Said once, in the log; and for as long as it lasts to whoever asks."""
        if words != self._trouble:
            self._log.error("%s", words)
            self._metrics.out_of_sync()
            self._notify.status(f"in trouble: {words}")
        self._trouble = words

    def _try_again(self, now: float) -> None:
        self._due = now + self._retry
        self._retry = min(self._retry * 2, RETRY_LAST)
