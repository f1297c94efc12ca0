"""The command line: verbs, printing, exit codes. The only room that prints or exits (the lab draws its own screen).

Exit codes as diff(1): 0 in force or nothing found, 1 differs or something found, 2 trouble.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from agent import IdmarkError

if TYPE_CHECKING:
    from agent.addresses import Address
    from agent.applying import Order
    from agent.change import Change
    from agent.model import Facts, Policy
    from agent.planfile import Reviewed
    from agent.proof import Explanation, Packet
    from agent.reconcile import Seams

# Rooms are imported where a verb needs them: pyroute2 and pydantic take longer to import than most verbs to run.

DEFAULT_POLICY = Path("/etc/idmark/policy.toml")
#: What `plan --against` calls the policy that was in force last.
APPLIED = "applied"
OK, DIFFERS, TROUBLE = 0, 1, 2
#: The verbs that may be caught in the middle of something.
CHANGING = frozenset({"apply", "rollback", "remove"})
#: The verbs that may go on for days (`status --watch` does).
LASTING = frozenset({"run", "status", "lab"})
CAP_NET_ADMIN = 12
#: So many identities are named one by one.
FEW = 20
#: So long a flow is traced, at most.
MOST_SECONDS = 600


class UsageError(IdmarkError):
    """What was asked can't be done as asked; the text says how it can."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code."""
    with suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    args = _parser().parse_args(argv)
    try:
        # A unit that is stopped, a terminal that hangs up, or Ctrl-C in the middle of an apply: what was begun is taken
        # back. Who ignores Ctrl-C (nohup does) goes on doing so.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _stop)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with _collecting(args.verb in LASTING):
            code: int = args.run(args)
        if sys.stdout:  # closed by whoever started us: then there is nobody to read either
            sys.stdout.flush()
    except (KeyboardInterrupt, _Stopped) as error:
        ended_by = error.number if isinstance(error, _Stopped) else int(signal.SIGINT)
        if args.verb in CHANGING:
            _trouble([f"idmark: {args.verb}: interrupted; idmark plan tells what is in force"])
        return 128 + ended_by
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TROUBLE
    except IdmarkError as error:
        return _trouble(error.lines())
    except OSError as error:
        return _trouble([f"idmark: {args.verb}: write the output: {error.strerror}"])
    except Exception as error:
        # A fault of ours; no traceback ever reaches an operator.
        return _trouble([f"idmark: internal error, please report it: {type(error).__name__}: {error}"])
    return code


@contextmanager
def _collecting(wanted: bool) -> Iterator[None]:
    """With the collector of cycles or without: it walks through a million prefixes again and again while they are read,
    and what has cycles of most verbs is little, and goes with their end. There nobody need look for them either.
    """
    atexit.register(gc.freeze)
    if not wanted:
        gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _trouble(lines: Iterable[str]) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return TROUBLE


class _Stopped(BaseException):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, frame: object) -> NoReturn:
    raise _Stopped(number)


# --- verbs -----------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> int:
    """The policy alone; every fault."""
    from agent.policy import PolicyError  # noqa: PLC0415

    try:
        policy = _policy(args, quiet=args.json)
    except PolicyError as error:
        if not args.json:
            raise
        print(
            json.dumps({"usable": False, "faults": [_plain(fault) for fault in error.faults], "warnings": []}, indent=1)
        )
        return TROUBLE
    if args.json:
        warnings = list(policy.warnings)
        print(json.dumps({"usable": True, "faults": [], "warnings": warnings, "digest": policy.digest}, indent=1))
    else:
        names = [identity.name for identity in policy.identities]
        identities = ", ".join(names) if len(names) <= FEW else f"{len(names)} identities"
        print(f"{args.policy}: good: {policy.gateway} with {identities}; policy {policy.digest[:12]}")
    return OK


def render(args: argparse.Namespace) -> int:
    """The files of a review: to a folder, to stdout, or compared with what a folder holds."""
    from agent import facts, render  # noqa: PLC0415
    from agent.desired import desire  # noqa: PLC0415

    policy = _policy(args)
    desired = desire(policy, facts.load(args.facts) if args.facts else None)
    _host_faults(desired.faults)
    files = render.files(desired)
    if args.check:
        if not args.output:
            raise UsageError("render --check wants the folder to compare with: -o DIR")
        different = [name for name, text in files.items() if _content(args.output / name) != text.encode()]
        for name in different:
            print(f"{args.output / name}: is not what {args.policy} renders to")
        return DIFFERS if different else OK
    if not args.output:
        for name, text in files.items():
            print(f"# ==> {name} <==\n{text}")
        return OK
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"write {args.output}: {error.strerror}") from error
    for name, text in files.items():
        _write(args.output / name, text)
    print("\n".join(str(args.output / name) for name in files))
    return OK


def facts(args: argparse.Namespace) -> int:
    """What the policy needs to know of this host, for `render --facts` elsewhere."""
    from agent import facts  # noqa: PLC0415

    policy = _policy(args)
    with _kernel(args) as kernel:
        print(facts.dump(facts.take(policy, kernel.rtnl, kernel.nfnl, kernel.sysctls)), end="")
    return OK


def plan(args: argparse.Namespace) -> int:
    """What `apply` would do, and the digest to approve it by; or what the policy changes against another one."""
    if args.against is not None:
        if args.out:
            raise UsageError("plan: --out is for a plan of this host, not --against another policy (there: -o)")
        return _against(args)
    if args.facts or args.format or args.output:
        raise UsageError("plan: --facts, --format and -o go with --against")
    from agent import planfile  # noqa: PLC0415
    from agent.reconcile import look  # noqa: PLC0415

    policy = _policy(args)
    with _kernel(args) as kernel:
        seen = look(policy, kernel, _down())
        notes = (*seen.notes, *kernel.sysctls.notes)
    _host_faults(seen.desired.faults)
    steps = seen.plan.text
    if args.out:
        planfile.write(args.out, policy, seen.plan)
    if args.json:
        print(json.dumps({"changes": steps.splitlines(), "digest": seen.plan.digest, "notes": list(notes)}, indent=1))
    else:
        _notes(notes)
        print(steps, end="")
        print(f"# plan {seen.plan.digest}" if steps else "# in force: nothing to do")
    return DIFFERS if steps else OK


def apply(args: argparse.Namespace) -> int:
    """Put the policy in force."""
    from agent import planfile  # noqa: PLC0415
    from agent.applying import Order  # noqa: PLC0415
    from agent.kernel import runtime  # noqa: PLC0415

    reviewed = planfile.read(args.plan) if args.plan else None
    policy = reviewed.policy if reviewed else None if args.approved else _wanted(args)
    with _kernel(args) as kernel, runtime.lock("apply"):
        policy = policy or _approved()
        if policy is None:
            print("no policy has been in force here yet: nothing to do")
            return OK
        order = Order(once=bool(reviewed) or args.expect is not None, recorded=not args.approved, **_net(args))
        said = _apply(policy, kernel, order, yes=args.yes, expect=args.expect, reviewed=reviewed)
    return said.tell()


def _wanted(args: argparse.Namespace) -> Policy:
    """The policy to apply; one with faults was tried, and the history tells of it, too."""
    from agent import applying  # noqa: PLC0415
    from agent.policy import PolicyError  # noqa: PLC0415

    try:
        return _policy(args)
    except PolicyError as error:
        if _may_administer():
            _kernel(args)
            _notes(applying.refused_at_the_door(error))
        raise


def rollback(args: argparse.Namespace) -> int:
    """Back to the policy before, or to that of an apply with this number; or end what waits for confirmation."""
    from agent import applying, history, trial  # noqa: PLC0415
    from agent.kernel import runtime  # noqa: PLC0415

    with _kernel(args) as kernel, runtime.lock("rollback"):
        waiting = trial.pending()
        if waiting and args.number is None:
            told = trial.take_back(waiting, kernel, "rolled back")
            _notes(told)
            print(f"policy {waiting.digest[:12]} is rolled back: what was in force before it is in force again")
            return TROUBLE if told else OK
        now = applying.kept()
        number = args.number
        entry = history.before(now.digest if now else "") if number is None else history.find(number)
        if entry is None:
            raise UsageError(f"rollback: there is no {'policy before' if number is None else f'apply {number}'}")
        policy = history.policy_of(entry)
        unwanted = now.digest if now and now.digest != policy.digest else ""
        order = applying.Order(verb=f"rollback to {entry.number}", unwanted=unwanted, **_net(args))
        said = _apply(policy, kernel, order, yes=args.yes)
    return said.tell()


def _net(args: argparse.Namespace) -> dict[str, Any]:
    return {"within": args.confirm_within, "where": args.netns}


def _apply(
    policy: Policy,
    kernel: Seams,
    order: Order,
    *,
    yes: bool,
    expect: str | None = None,
    reviewed: Reviewed | None = None,
) -> _Said:
    """Look, refuse what is not to be done, do the rest; what there is to say of it."""
    from agent import applying, reconcile  # noqa: PLC0415

    notes = applying.nothing_pending(kernel)
    down = _down()
    seen = reconcile.look(policy, kernel, down)
    if seen.desired.faults:
        applying.refused(policy, seen, order.verb, "; ".join(seen.desired.faults))
        _host_faults(seen.desired.faults)
    expected = reviewed.digest if reviewed else seen.plan.digest if expect is None else expect
    if expected.lower() != seen.plan.digest:
        text = "".join(f"{line}\n" for line in reviewed.moved(seen.plan)) if reviewed else seen.plan.text
        words = f"the plan is {seen.plan.digest}, not {expected!r} as expected"
        notes += applying.refused(policy, seen, order.verb, words)
        return _Said(DIFFERS, text, notes, f"{words}; nothing was changed")
    before = applying.kept(policy)
    danger = applying.danger(seen, before, kernel, down) if order.recorded and not yes and not order.within else None
    if danger:
        notes += applying.refused(policy, seen, order.verb, danger)
        remedy = "--confirm-within 60s takes it back unless you confirm; --yes does it all the same"
        return _Said(DIFFERS, "", notes, f"{danger}; nothing was changed: {remedy}")
    done = applying.apply(policy, seen, before, kernel, down=down, order=order)
    notes += (*seen.notes, *kernel.sysctls.notes, *done.notes)
    text = ""
    if done.waiting:
        text = f"waiting for: idmark confirm, within {order.within:g} seconds; else all goes back as it was\n"
    elif order.within is not None:
        notes += ("there is nothing to confirm: it was in force already",)
    if done.left.steps:
        complaint = "applied, and this differs again already: somebody else changes it, or the host is in motion"
        return _Said(TROUBLE, text + done.left.text, notes, complaint)
    many = "change" if done.changes == 1 else "changes"
    words = f"{done.changes} {many}, plan {seen.plan.digest}" if done.changes else "nothing to do"
    return _Said(OK, f"{text}in force: {words}\n", notes)


@dataclass(frozen=True, slots=True)
class _Said:
    """What a verb has to say when it has given the lock back: whoever reads it may take his time."""

    code: int
    text: str
    notes: tuple[str, ...] = ()
    complaint: str = ""

    def tell(self) -> int:
        _notes(self.notes)
        print(self.text, end="")
        if self.complaint:
            _complain(self.complaint)
        return self.code


def confirm(args: argparse.Namespace) -> int:
    """Keep what `apply --confirm-within` has put in force."""
    from agent import trial  # noqa: PLC0415
    from agent.kernel import runtime  # noqa: PLC0415

    with _kernel(args), runtime.lock("confirm"):
        waiting = trial.pending()
        if waiting is None:
            _complain("nothing waits for confirmation")
            return DIFFERS
        if waiting.is_due(trial.clock()):
            _complain(f"too late: policy {waiting.digest[:12]} is being taken back")
            return DIFFERS
        notes = trial.confirm(waiting)
    _notes(notes)
    print(f"confirmed: policy {waiting.digest[:12]} stays in force")
    return OK


def history(args: argparse.Namespace) -> int:
    """What was applied here: when, by whom, and what became of it."""
    from agent import history  # noqa: PLC0415

    if args.netns is not None:
        _kernel(args)
    found = history.entries()
    if args.json:
        print(json.dumps([history.plain(entry) for entry in found], indent=1))
    for entry in () if args.json else found:
        policy = f"policy {entry.policy[:12]}" if entry.policy else "a policy with faults"
        what = f"{entry.verb} by {entry.user}: {policy}, changes: {entry.changes}"
        why = f": {' '.join(entry.why.splitlines()[:2])}" if entry.why else ""
        line = f"{entry.number:>4}  {entry.when}  {what}, {entry.outcome}{why}"
        # What stands in a file is for the reader, and not for the terminal.
        print("".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in line))
    return OK


def status(args: argparse.Namespace) -> int:
    """Identities, links, ways out, counters, differences."""
    from agent.status import text  # noqa: PLC0415

    policy = _policy(args, quiet=args.json)
    with _kernel(args) as kernel:
        if args.watch:
            from agent import watch  # noqa: PLC0415

            watch.show(lambda: _report(policy, kernel))
        found = _report(policy, kernel)
    print(json.dumps(found, indent=1) if args.json else "\n".join(text(found)))
    return OK if found["in_force"] else DIFFERS


def _report(policy: Policy, kernel: Seams) -> dict[str, Any]:
    from agent import ledger  # noqa: PLC0415
    from agent.reconcile import look  # noqa: PLC0415
    from agent.status import report  # noqa: PLC0415

    seen = look(policy, kernel, _down())
    at_work = ledger.current()
    counts = kernel.nfnl.counts(policy.kernel.nft_table)
    return {**report(policy, seen, counts), "daemon": at_work and at_work.plain()}


def explain(args: argparse.Namespace) -> int:
    """One packet's way, step by step, and whether the kernel agrees."""
    from agent.addresses import Family  # noqa: PLC0415

    source, destination = _address(args.source), _address(args.destination)
    if Family.of(source) is not Family.of(destination):
        raise UsageError(f"explain {source} {destination}: a packet has two addresses of one family")
    if args.facts and not args.offline:
        raise UsageError("explain asks this host: --facts goes with --offline")
    if args.trace is not None and args.offline:
        raise UsageError("explain --trace watches this host's packets: it takes no --offline")
    explanation = _explain_offline(args, source, destination) if args.offline else _explain(args, source, destination)
    if not args.json:
        print("\n".join(explanation.lines()))
    found = explanation.plain()
    if args.trace is not None:
        found["trace"] = _trace(args, explanation.packet)
    if args.json:
        print(json.dumps(found, indent=1))
    return DIFFERS if explanation.agrees is False else OK


def _trace(args: argparse.Namespace, packet: Packet) -> list[dict[str, object]]:
    """What the kernel says of such packets in the next seconds: printed as it comes, or for a program."""
    from agent import trace  # noqa: PLC0415
    from agent.kernel.nftrace import Tracer  # noqa: PLC0415

    with Tracer(trace.Flow(packet.source, packet.destination, packet.arriving), args.trace) as tracer:
        if args.json:
            return [*trace.plain(tracer.events())]
        print(f"tracing for {args.trace:g} s, {trace.PACKETS} packets at most", flush=True)
        told = 0
        for line in trace.lines(tracer.events()):
            print(line, flush=True)
            told += 1
        if not told:
            print("no such packet came")
    return []


def _explain_offline(args: argparse.Namespace, source: Address, destination: Address) -> Explanation:
    """By the policy, and what is known of a host."""
    from agent import artefact, proof, render  # noqa: PLC0415
    from agent.desired import desire  # noqa: PLC0415

    known = _facts(args)
    desired = desire(_policy(args), known)
    packet = proof.Packet(source, destination, args.arriving or proof.arrival(desired, known, source))
    return proof.explain(desired, known, artefact.read(render.files(desired)), packet)


def _explain(args: argparse.Namespace, source: Address, destination: Address) -> Explanation:
    """On this host, beside what is loaded and what the kernel answers."""
    from agent import artefact, proof, render, witness  # noqa: PLC0415
    from agent.reconcile import look  # noqa: PLC0415

    policy = _policy(args)
    with _kernel(args) as kernel:
        seen = look(policy, kernel, _down())
        packet = proof.Packet(source, destination, args.arriving or proof.arrival(seen.desired, seen.facts, source))
        rendered = artefact.read(render.files(seen.desired))
        loaded = witness.loaded(seen, rendered, kernel)
        return proof.explain(seen.desired, seen.facts, rendered, packet, loaded)


def doctor(args: argparse.Namespace) -> int:
    """What on this host will hurt, with the evidence and the remedy; without a policy, what would hurt one."""
    from dataclasses import asdict  # noqa: PLC0415

    from agent import doctor  # noqa: PLC0415
    from agent.examination import examine  # noqa: PLC0415
    from agent.model import Policy  # noqa: PLC0415

    here = args.policy != DEFAULT_POLICY or args.policy.exists()
    policy = _policy(args, quiet=args.json) if here else Policy("", None, ())
    with _kernel(args) as kernel:
        found = doctor.findings(*examine(policy, kernel, _down()))
    if args.json:
        checks, findings = list(doctor.CHECKS), [asdict(finding) for finding in found]
        print(json.dumps({"policy": policy.digest or None, "checks": checks, "findings": findings}, indent=1))
    else:
        for line in doctor.text(found):
            print(line)
        many = "finding" if len(found) == 1 else "findings"
        print(f"{len(doctor.CHECKS)} checks, {len(found)} {many}" if found else f"{len(doctor.CHECKS)} checks: clean")
        if not here:
            print(f"there is no {args.policy}: what concerns single identities was not looked at")
    return DIFFERS if found else OK


def verify(args: argparse.Namespace) -> int:
    """Prove that no packet of an identity leaves by another's link."""
    from agent import artefact, facts, render  # noqa: PLC0415
    from agent.desired import desire  # noqa: PLC0415
    from agent.verify import prove, report, text  # noqa: PLC0415

    policy = _policy(args, quiet=args.json)
    if args.live and args.facts:
        raise UsageError("verify --live asks this host: it takes no --facts")
    if args.live:
        from agent import witness  # noqa: PLC0415

        with _kernel(args) as kernel:
            proof = witness.verify(policy, kernel, _down())
    else:
        known = facts.load(args.facts) if args.facts else None
        desired = desire(policy, known)
        proof = prove(desired, known, artefact.read(render.files(desired)))
    print(json.dumps(report(proof), indent=1) if args.json else "\n".join(text(proof)))
    return DIFFERS if proof.counterexamples else OK


def _address(text: str) -> Address:
    from agent.addresses import parse_address  # noqa: PLC0415

    try:
        return parse_address(text)
    except ValueError as error:
        raise UsageError(f"explain: {text} {error}") from error


def remove(args: argparse.Namespace) -> int:
    """Take away all that is ours. Needs no policy."""
    from agent import reconcile, source, state, trial  # noqa: PLC0415
    from agent.kernel import known, runtime  # noqa: PLC0415

    with _kernel(args) as kernel, runtime.lock("remove"):
        pid = runtime.daemon_pid()
        if pid is not None:
            raise UsageError(f"remove: idmark run (pid {pid}) would put it back: stop that first")
        gone = reconcile.remove(kernel)
        trial.forget()
        state.forget()
        source.forget()
        known.forget()
        unknown = kernel.sysctls.notes
    print(gone.text, end="")
    print("removed" if gone.steps else "nothing of idmark's is here")
    for words in unknown:
        _complain(words)
    return TROUBLE if unknown else OK


def schema(args: argparse.Namespace) -> int:
    """The policy's JSON Schema."""
    from agent.schema import schema  # noqa: PLC0415

    print(json.dumps(schema(), indent=1))
    return OK


def run(args: argparse.Namespace) -> int:
    """The daemon: keep the policy in force, serve metrics."""
    from agent import service  # noqa: PLC0415

    listening = service.Listening(args.listen, args.certificate, args.key, args.client_ca)
    with _kernel(args) as kernel:
        service.run(args.policy, None if args.listen == "none" else listening, kernel)
    return OK


def lab(args: argparse.Namespace) -> int:
    """The lab's own words."""
    from agent.lab import cli  # noqa: PLC0415

    return cli.run(args)


# --- what verbs share ------------------------------------------------------------------------------------------------


def _down() -> Mapping[str, str]:
    from agent import ledger  # noqa: PLC0415

    return ledger.down()


def _approved() -> Policy | None:
    """The policy that was in force last; None before the first."""
    from agent import state  # noqa: PLC0415

    return state.load()


def _policy(args: argparse.Namespace, *, quiet: bool = False) -> Policy:
    from agent.policy import load  # noqa: PLC0415

    policy = load(args.policy)
    if not quiet:
        for warning in policy.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return policy


def _kernel(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from agent.kernel import netns  # noqa: PLC0415
    from agent.reconcile import opened  # noqa: PLC0415

    if not _may_administer():
        raise UsageError(f"{args.verb} looks at the kernel's network state: it needs CAP_NET_ADMIN (sudo)")
    if args.netns is not None:  # an empty name is a script's mistake, and not this namespace
        netns.enter(args.netns)
    return opened()


def _may_administer() -> bool:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> CAP_NET_ADMIN & 1)


def _host_faults(faults: tuple[str, ...]) -> None:
    if faults:
        from agent.reconcile import HostError  # noqa: PLC0415

        raise HostError(faults)


def _write(path: Path, text: str) -> None:
    """Put a file in the place of the old one: a full disk leaves the old one whole. Nothing but a file is replaced."""
    try:
        if path.exists() and not path.is_file():  # a pipe, /dev/null
            path.write_text(text, encoding="utf-8")
            return
        new = path.with_name(f".{path.name}.new")
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"write {path}: {error.strerror}") from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"read {path}: {error.strerror}") from error


def _against(args: argparse.Namespace) -> int:
    from agent import change  # noqa: PLC0415
    from agent.desired import desire  # noqa: PLC0415
    from agent.policy import load  # noqa: PLC0415

    if args.json and args.format:
        raise UsageError("plan: either --json or --format")
    policy = _policy(args, quiet=args.json)
    if args.against == APPLIED and args.netns is not None:  # what was in force there
        from agent.kernel import netns  # noqa: PLC0415

        netns.enter(args.netns)
    before = _approved() if args.against == APPLIED else load(Path(args.against))
    if before is None:
        raise UsageError("plan --against applied: no policy has been in force here yet")
    known = _facts(args)
    after = desire(policy, known)
    _host_faults(after.faults)
    found = change.change(desire(before, known), after)
    words = json.dumps(change.plain(found), indent=1) + "\n" if args.json else _format(args.format)(found)
    if args.output:
        _write(args.output, words)
    else:
        print(words, end="")
    return OK if found.nothing else DIFFERS


def _facts(args: argparse.Namespace) -> Facts | None:
    if args.facts is None:
        return None
    from agent import facts  # noqa: PLC0415

    return facts.load(args.facts)


def _format(name: str | None) -> Callable[[Change], str]:
    from agent import page, review  # noqa: PLC0415

    return {"markdown": review.markdown, "html": page.html}.get(name or "", review.text)


def _plain(fault: object) -> dict[str, object]:
    return {name: getattr(fault, name) for name in ("file", "line", "path", "message")}


def _notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _complain(words: str) -> None:
    print(f"idmark: {words}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="idmark",
        description="Everything from an address inside the VPN over the VPN, everything from the address outside over "
        "the regular link, whatever the destination.",
        epilog="Exit codes: 0 in force or nothing found, 1 differs or something found, 2 trouble; "
        "128 and the number of the signal that ended it.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument(
        "-c", "--policy", type=Path, default=DEFAULT_POLICY, metavar="POLICY", help=f"the policy ({DEFAULT_POLICY})"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for function, words, options in (
        (check, "check the policy alone; every fault", ("json",)),
        (render, "write ruleset.nft and routing.txt for review", ()),
        (plan, "show what apply would do, and its digest", ("json", "netns")),
        (apply, "put the policy in force", ("netns",)),
        (confirm, "keep what apply --confirm-within has put in force", ("netns",)),
        (rollback, "go back to the policy before, or to that of an apply of the history", ("netns",)),
        (history, "list what was applied, when, by whom, and what became of it", ("json", "netns")),
        (run, "keep the policy in force whatever happens to the host, and serve metrics", ("netns",)),
        (status, "show identities, links, ways out and counters", ("json", "netns")),
        (explain, "show one packet's way step by step, and whether the kernel agrees", ("json", "netns")),
        (doctor, "say what on this host will hurt, with the evidence and the remedy", ("json", "netns")),
        (verify, "prove that no packet of an identity leaves by another's link", ("json", "netns")),
        (remove, "take away all that is idmark's; needs no policy", ("netns",)),
        (facts, "print what the policy needs to know of this host, for render --facts", ("netns",)),
        (schema, "print the policy's JSON Schema", ()),
    ):
        verb = verbs.add_parser(function.__name__, help=words, description=f"{words[0].upper()}{words[1:]}.")
        verb.set_defaults(run=function)
        if "json" in options:
            verb.add_argument("--json", action="store_true", help="for a program")
        if "netns" in options:
            verb.add_argument("--netns", metavar="NAME", help="in this network namespace (see: ip netns)")
    _options(verbs.choices)
    from agent.lab import cli  # noqa: PLC0415

    cli.add_parser(verbs)
    verbs.choices["lab"].set_defaults(run=lab)
    return parser


def _options(verbs: dict[str, argparse.ArgumentParser]) -> None:
    verbs["render"].add_argument("-o", "--output", type=Path, metavar="DIR", help="the folder; else stdout")
    verbs["render"].add_argument("--check", action="store_true", help="does DIR hold exactly this? 0 yes, 1 no")
    verbs["render"].add_argument("--facts", type=Path, metavar="FILE", help="fill in what idmark facts printed")
    verbs["plan"].add_argument("--out", type=Path, metavar="FILE", help="write plan and policy there, for apply --plan")
    what = verbs["apply"].add_mutually_exclusive_group()
    what.add_argument("--expect", metavar="DIGEST", help="refuse (1) unless the plan has this digest")
    what.add_argument("--plan", type=Path, metavar="FILE", help="exactly what plan --out wrote, or nothing (1)")
    verbs["rollback"].add_argument("number", nargs="?", type=int, metavar="N", help="the apply's number in the history")
    for name in ("apply", "rollback"):
        verbs[name].add_argument(
            "--confirm-within", type=_duration, metavar="60s", help="all goes back unless idmark confirm comes in time"
        )
        verbs[name].add_argument("--yes", action="store_true", help="also if your own SSH session takes another road")
    verbs["status"].add_argument("--watch", action="store_true", help="live, in this terminal, until Ctrl-C")
    what.add_argument(
        "--approved", action="store_true", help="not the file's policy, but the one in force last: for the boot"
    )
    metrics = verbs["run"].add_argument_group("metrics")
    metrics.add_argument(
        "--listen",
        default="127.0.0.1:9473",
        metavar="ADDRESS",
        help="where: ADDRESS:PORT, unix:PATH or none (127.0.0.1:9473)",
    )
    metrics.add_argument("--certificate", type=Path, metavar="FILE", help="serve them by TLS, with this certificate")
    metrics.add_argument("--key", type=Path, metavar="FILE", help="the certificate's private key")
    metrics.add_argument("--client-ca", type=Path, metavar="FILE", help="let in only whom this CA has signed")
    verbs["verify"].add_argument(
        "--facts", type=Path, metavar="FILE", help="of the host that idmark facts printed this of"
    )
    verbs["verify"].add_argument("--live", action="store_true", help="then against the running kernel, of this host")
    verbs["explain"].add_argument("source", metavar="SRC", help="the packet's source address")
    verbs["explain"].add_argument("destination", metavar="DST", help="and its destination")
    verbs["explain"].add_argument("--in", dest="arriving", metavar="LINK", help="the link it arrives on, if forwarded")
    verbs["explain"].add_argument(
        "--trace",
        nargs="?",
        type=_seconds,
        const=5.0,
        metavar="SECONDS",
        help="then watch such packets for some seconds (5), and print the kernel's own account of each",
    )
    verbs["explain"].add_argument(
        "--offline", action="store_true", help="by the policy alone; needs no root, no kernel"
    )
    verbs["explain"].add_argument(
        "--facts", type=Path, metavar="FILE", help="with --offline: of the host that idmark facts printed this of"
    )
    against = verbs["plan"].add_argument_group("against another policy, which needs neither root nor this host")
    against.add_argument(
        "--against",
        metavar="OTHER",
        help=f'what changes in meaning: a policy\'s file, or "{APPLIED}": the last in force',
    )
    against.add_argument("--facts", type=Path, metavar="FILE", help="fill in what idmark facts printed, on both sides")
    against.add_argument("--format", choices=("text", "markdown", "html"), help="for a terminal, a comment, a browser")
    against.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write it there; else stdout")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text}: seconds, more than 0 and {MOST_SECONDS} at most")
    return seconds


def _duration(text: str) -> float:
    """Seconds, from 60, 60s, 5m or 1h."""
    number, unit = (text[:-1], text[-1]) if text.endswith(tuple(_UNITS)) else (text, "s")
    if not (number.isascii() and number.isdigit()) or not 0 < int(number) * _UNITS[unit] <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration from 1s to 24h")
    return float(int(number) * _UNITS[unit])


_UNITS, _LONGEST = {"s": 1, "m": 60, "h": 3600}, 24 * 3600


class _Version(argparse.Action):
    """What is installed is only looked up where somebody asks: that takes as long as all other verbs' words."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **options: object) -> NoReturn:
        from importlib import metadata  # noqa: PLC0415

        del args, options
        print(f"idmark {metadata.version('idmark')}")
        parser.exit()
