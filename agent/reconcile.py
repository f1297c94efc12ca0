"""One pass: observe, plan, apply in order. The only meeting of the pure rooms and the seams."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from agent import IdmarkError, model, ruleset
from agent import facts as host
from agent.addresses import Prefix
from agent.desired import NOBODY, Desired, desire
from agent.kernel import KernelError, known, passage, runtime
from agent.kernel.nfnl import Nfnl
from agent.kernel.nfset import Nfset
from agent.kernel.nft import Nft
from agent.kernel.rtnl import Rtnl
from agent.kernel.sysctl import Sysctls
from agent.model import Facts, Policy, Route, Table
from agent.plan import (
    AddRoute,
    AddRule,
    Change,
    DeleteRoute,
    DeleteRule,
    Load,
    Observed,
    Plan,
    ReplaceRoute,
    SetSrcValidMark,
    Step,
    closes,
    is_late,
    plan,
    removal,
    unsettles,
)
from agent.stages import relisting, replacement


class HostError(IdmarkError):
    """The policy can't be in force on this host; `faults` say why, each a sentence. Nothing was changed."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults

    @classmethod
    def check(cls, desired: Desired) -> None:
        """Raise it if there are faults."""
        if desired.faults:
            raise cls(desired.faults)


class ApplyError(IdmarkError):
    """A step failed. The text says which, and what is in force now."""


@dataclass(frozen=True, slots=True)
class Seams:
    """The seams, all opened in one network namespace."""

    rtnl: Rtnl
    nfnl: Nfnl
    nfset: Nfset
    nft: Nft
    sysctls: Sysctls


@contextmanager
def opened() -> Iterator[Seams]:
    """The seams to the kernel of this thread's namespace. Raises KernelError."""
    with Rtnl() as rtnl, Nfnl(known.left) as nfnl, Nfset() as nfset:
        yield Seams(rtnl, nfnl, nfset, Nft(), Sysctls(runtime.directory() / "src_valid_mark.json"))


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the host showed, what the policy makes of it, and what there is to do."""

    facts: Facts
    desired: Desired
    observed: Observed
    plan: Plan

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should hear of."""
        return (*self.desired.notes, *self.observed.notes)


def look(policy: Policy, kernel: Seams, down: Mapping[str, str] = NOBODY) -> Look:
    """Read the kernel and plan. Changes nothing. `down`: who counts as down, and why. Raises KernelError.

    What the policy gets wrong about this host is in `desired.faults`; the identities concerned are closed in it.
    """
    facts, ours = host.take_with_ours(policy, kernel.rtnl, kernel.nfnl, kernel.sysctls)
    desired = desire(policy, facts, down)
    tables = sorted({identity.table for identity in policy.identities})  # those that share a way out share one
    foreign = tuple(route for table in tables for route in kernel.rtnl.foreign_routes(table))
    observed = _observed(kernel, policy.kernel.nft_table, facts, ours, foreign)
    return Look(facts, desired, observed, plan(desired, observed))


def observe(kernel: Seams, table: str, facts: Facts) -> Observed:
    """What the kernel has that is ours. Raises KernelError."""
    return _observed(kernel, table, facts, kernel.rtnl.our_routes())


def _observed(
    kernel: Seams, table: str, facts: Facts, routes: frozenset[Route], foreign: tuple[Route, ...] = ()
) -> Observed:
    """The same, where routes are known: ours, and those that others have put into our routing tables."""
    closed = kernel.nfnl.table(ruleset.CLOSED) if ruleset.CLOSED in kernel.nfnl.tables() else None
    return Observed(
        routes=routes,
        rules=kernel.rtnl.our_rules(),
        table=kernel.nfnl.table(table),
        closed=ruleset.marks_closed(closed) if closed else None,
        other_tables=tuple(name for name in _idmark_tables(kernel) if name != table and _is_ours(kernel, name)),
        src_valid_mark=frozenset(link.name for link in facts.links if link.src_valid_mark),
        src_valid_mark_ours=kernel.sysctls.ours(),
        foreign_routes=foreign,
        addresses=frozenset(Prefix.host(item.address) for link in facts.links for item in link.addresses),
    )


def _idmark_tables(kernel: Seams) -> Iterator[str]:
    return (name for name in kernel.nfnl.tables() if name.startswith(model.Kernel().nft_table))


def _is_ours(kernel: Seams, name: str) -> bool:
    """A table of ours carries its rules' digest; one that only sounds like ours may be an operator's."""
    table = kernel.nfnl.table(name)
    return table is not None and ruleset.digest(table) is not None


def apply(chosen: Plan, kernel: Seams) -> None:
    """Take the steps of a plan in their order.

    When one fails, those before it are taken back in reverse: what was in force before is in force again. Raises
    ApplyError, which says so, or which says what could not be taken back; then enforcement or a table's last route
    keeps the identities closed.
    """
    undo: list[Step | _Listed] = []
    taker = _Taker(kernel)
    try:
        # libnftables and the kernel look the ruleset over before anything is touched.
        for load in _checked(chosen):
            kernel.nft.check("\n".join((*load.behind, load.text)))
        before = _Before(chosen, kernel)
        for step in chosen.steps:
            with signals_held():
                back = before.back_from(step)
                taker.take(step)
                undo += [back] if back else []
    except BaseException as error:  # also Ctrl-C and the like: never a mixture
        with signals_held():
            left = _take_back(undo, kernel, taker)
        if left:
            raise ApplyError(f"{error}; and what was done could not all be taken back: {'; '.join(left)}") from error
        if isinstance(error, KernelError):
            raise ApplyError(f"{error}; what was in force before still is") from error
        raise


def _checked(chosen: Plan) -> Iterator[Load]:
    """The nft transactions of a plan, but those which stand whole before a later one where that is looked over."""
    loads = [step for step in chosen.steps if isinstance(step, Load)]
    for number, step in enumerate(loads):
        whole = (*step.behind, *step.commands)
        if not any(later.behind[: len(whole)] == whole for later in loads[number + 1 :]):
            yield step


@dataclass(frozen=True, slots=True)
class Mended:
    """The steps that were taken, those that the kernel refused, in words; and the failure that ended it, if one did."""

    taken: tuple[Step, ...]
    refused: tuple[str, ...] = ()
    failure: KernelError | None = None


def mend(chosen: Plan, kernel: Seams) -> Mended:
    """Take the steps of a plan as far as they go, for whoever is going to look again.

    One route that the kernel refuses is no reason to leave everything else as it is; but without a step that keeps an
    identity closed those behind it are not taken, and where roads change hands nothing is opened behind one that stays.
    """
    taken, refused = list[Step](), list[str]()
    taker = _Taker(kernel)
    handover = any(isinstance(step, Load) and step.table == ruleset.CLOSED for step in chosen.steps)
    for step in chosen.steps:
        try:
            taker.take(step)
        except KernelError as error:
            if handover or closes(step):
                return Mended(tuple(taken), tuple(refused), error)
            refused.append(str(error))
        else:
            taken.append(step)
    return Mended(tuple(taken), tuple(refused))


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a hang-up wait for the end: a step that was taken is on record to be taken back."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_known(table: str, kernel: Seams) -> None:
    """Leave what large sets hold to the next process, if that is certain and new. Raises KernelError."""
    certain = kernel.nfnl.certain(table)
    if certain:
        known.leave(certain)


def remove(kernel: Seams) -> Plan:
    """Take away all that is ours, and say what that was; it needs no policy. Raises KernelError or ApplyError."""
    taken = removal(observe(kernel, model.Kernel().nft_table, Facts()))
    apply(taken, kernel)
    left = removal(observe(kernel, model.Kernel().nft_table, Facts()))
    if left.steps:
        raise ApplyError(f"remove: this is there still, or again:\n{left.text.rstrip()}")
    return taken


@dataclass(frozen=True, slots=True)
class _Listed:
    """A step back: to a table as it was."""

    then: Table
    text: str

    def steps(self, kernel: Seams) -> Iterator[Load]:
        """Late: who is on his way by a road that has been opened meets the rules that belong to it."""
        listing = relisting(self.then, self.text, kernel.nfnl.table(self.then.name))
        return (replace(step, late=True) for step in listing)


class _Before:
    """How things are before each step of a plan.

    Only the kernel knows what an nft transaction is going to change, and its table is listed before, which takes
    seconds where sets are large: once for all the steps on it that follow one another. When something else lies between
    two of them, a rule, say, each has to be taken back in its turn. While marks are closed none has to wait for that:
    then tables are listed beforehand.
    """

    def __init__(self, chosen: Plan, kernel: Seams) -> None:
        self._kernel = kernel
        tables = dict.fromkeys(step.table for step in chosen.steps if isinstance(step, Load | Change))
        self._ahead = {name: self._listing(name) for name in tables} if ruleset.CLOSED in tables else {}
        # Tables that this plan has made itself, which go as a whole; and those that the steps back restore already.
        self._made: set[str] = set()
        self._listed: set[str] = set()

    def back_from(self, step: Step) -> Step | _Listed | None:
        """The step back; None: an earlier one leads there. Raises KernelError."""
        if not isinstance(step, Load | Change):
            self._listed.clear()
            return step.inverse()
        name = step.table
        if name in self._made | self._listed:
            return None
        listed = self._ahead.pop(name, None)
        if listed is None:
            if isinstance(step, Change):
                return step.inverse()
            if deletes := _plain_inverse(step):
                return deletes
            listed = self._listing(name)
        (self._listed if listed else self._made).add(name)
        return listed or replacement(name, "")

    def _listing(self, name: str) -> _Listed | None:
        then = self._kernel.nfnl.table(name)
        return _Listed(then, self._kernel.nft.text(name) or "") if then else None


def _plain_inverse(step: Load) -> Load | None:
    """Of a transaction that only adds counters."""
    words = [command.split() for command in step.commands]
    if any(each[:2] != ["add", "counter"] for each in words):
        return None
    return Load(step.table, tuple(" ".join(["delete", *each[1:]]) for each in words))


class _Taker:
    """Who takes steps one after the other, late ones when all packets are through that were on their way before."""

    def __init__(self, kernel: Seams) -> None:
        self._kernel = kernel
        # Somebody may have taken steps just before.
        self._unsettled = True

    def take(self, step: Step) -> None:
        """Raises KernelError."""
        if self._unsettled and is_late(step):
            passage.wait()
            self._unsettled = False
        self._unsettled |= unsettles(step)
        _take(step, self._kernel)


def _take(step: Step, kernel: Seams) -> None:
    match step:
        case AddRoute(route):
            kernel.rtnl.add_route(route)
        case ReplaceRoute(_, new):
            kernel.rtnl.replace_route(new)
        case DeleteRoute(route):
            kernel.rtnl.delete_route(route)
        case AddRule(rule):
            kernel.rtnl.add_rule(rule)
        case DeleteRule(rule):
            kernel.rtnl.delete_rule(rule)
        case SetSrcValidMark(link, True):
            kernel.sysctls.set_src_valid_mark(link)
        case SetSrcValidMark(link, False):
            kernel.sysctls.restore_src_valid_mark(link)
        case Change(table, changes):
            with kernel.nfnl.changing(table, changes) as tell:
                tell(kernel.nfset.change(table, changes))
        case Load():
            with kernel.nfnl.loading(step.table, step.text):
                kernel.nft.load(step.text)


def _take_back(undo: list[Step | _Listed], kernel: Seams, taker: _Taker) -> list[str]:
    """What could not be taken back, in words."""
    left = []
    for step in reversed(undo):
        try:
            for each in step.steps(kernel) if isinstance(step, _Listed) else (step,):
                taker.take(each)
        except KernelError as error:
            left.append(str(error))
    return left
