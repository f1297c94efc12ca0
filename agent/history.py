"""What was applied here: when, by whom, what it was and what became of it. Readable files, a bounded number.

In the state directory, `history/`: for the apply with number 12 `0012.policy.toml`, `0012.plan.txt`,
`0012.ruleset.nft`, `0012.routing.txt` (`0012.faults.txt` alone for a policy that was refused at the door), and
`0012.json` about it, which is written last and deleted first: without it the others are nothing. Whoever writes holds
the namespace's lock.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from agent import folder, render, session, state
from agent.desired import Desired
from agent.model import Policy
from agent.plan import Plan
from agent.policy import PolicyError
from agent.state import StateError

#: How many applies are kept, and how many bytes of them at most; the last two are kept whatever their size.
NUMBER, BYTES = 50, 256 << 20
FOLDER = "history"
POLICY, ABOUT = "policy.toml", "json"

#: What became of an apply. What has not come to its end yet was cut short, until it says otherwise.
IN_FORCE, WAITING, REFUSED, FAILED, ROLLED_BACK, CUT_SHORT = (
    "in force",
    "waiting for confirmation",
    "refused",
    "failed",
    "rolled back",
    "cut short",
)

#: What JSON has for each type of an entry's fields; and the end of all times that can be printed (some 34,000 years).
TYPES: Mapping[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}
LAST = 1 << 40


@dataclass(frozen=True, slots=True)
class Entry:
    """An apply. `at` is in seconds since 1970, `verb` what was asked for, `policy` and `plan` are digests.

    `changes` is the number of steps of the plan, `outcome` a word of the above, `why` what there is to say of it.
    """

    number: int
    at: float
    user: str
    verb: str
    gateway: str
    policy: str
    plan: str
    changes: int
    outcome: str
    why: str = ""

    @property
    def when(self) -> str:
        """The time as people here have it, with the zone (ISO 8601)."""
        return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.at))


def record(
    verb: str,
    policy: Policy,
    plan: Plan | None,
    desired: Desired | None,
    *,
    outcome: str = CUT_SHORT,
    why: str = "",
) -> Entry:
    """Write down an apply; it is on disk when this returns. Raises StateError.

    The same refusal twice is written down once.
    """
    texts = {POLICY: state.text(policy)}
    if plan:
        texts["plan.txt"] = plan.text
    if desired:
        texts |= render.files(desired)
    return _record(
        Entry(
            number=_last() + 1,
            at=time.time(),
            user=session.user(),
            verb=verb,
            gateway=policy.gateway,
            policy=policy.digest,
            plan=plan.digest if plan else "",
            changes=len(plan.steps) if plan else 0,
            outcome=outcome,
            why=why,
        ),
        texts,
    )


def record_faults(verb: str, error: PolicyError) -> Entry:
    """Write down that a policy was refused at the door, with every fault in `faults.txt`; it has no digest.

    Raises StateError. The same refusal twice is written down once.
    """
    entry = Entry(
        number=_last() + 1,
        at=time.time(),
        user=session.user(),
        verb=verb,
        gateway="",
        policy="",
        plan="",
        changes=0,
        outcome=REFUSED,
        why="\n".join(error.lines()[:2]),
    )
    return _record(entry, {"faults.txt": "".join(f"{line}\n" for line in error.lines())})


def _record(entry: Entry, texts: Mapping[str, str]) -> Entry:
    known = entries()
    last = replace(entry, number=known[-1].number, at=known[-1].at) if known else None
    if known and entry.outcome in (REFUSED, FAILED) and last == known[-1]:
        return known[-1]
    _write(entry, texts)
    _prune([*known, entry])
    return entry


def ended(entry: Entry, outcome: str, why: str = "") -> Entry:
    """Write down what became of an apply. Raises StateError."""
    entry = replace(entry, outcome=outcome, why=why)
    _write(entry, {})
    return entry


def entries() -> list[Entry]:
    """The applies that are kept, the oldest first. Raises StateError."""
    path = _path()
    found: list[Entry | None] = []
    try:
        with folder.opened(*_place()) as place:
            for name in sorted(os.listdir(place), key=_number):
                if name.endswith(f".{ABOUT}") and _number(name):
                    with suppress(OSError):  # nobody's file of ours: a pipe, a link
                        found.append(_entry(_number(name), folder.got(place, name) or b""))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StateError(f"read {path}: {error.strerror or error}") from error
    return [entry for entry in found if entry]


def _entry(number: int, data: bytes) -> Entry | None:
    """The apply that a file is about; None: it is damaged, or of another version of the agent."""
    try:
        entry = Entry(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    typed = all(isinstance(getattr(entry, each.name), TYPES[str(each.type)]) for each in fields(entry))
    return entry if typed and entry.number == number and 0 <= entry.at < LAST else None


def find(number: int) -> Entry | None:
    """The apply with this number. Raises StateError."""
    return next((entry for entry in entries() if entry.number == number), None)


def before(digest: str) -> Entry | None:
    """The last apply that came into force of another policy than this one. Raises StateError."""
    return next((entry for entry in reversed(entries()) if entry.outcome == IN_FORCE and entry.policy != digest), None)


def policy_of(entry: Entry) -> Policy:
    """The policy of an apply. Raises PolicyError, and StateError for one that had none: its file was faulty."""
    if not entry.policy:
        raise StateError(f"apply {entry.number} has no policy to go back to: it was refused for faults of its file")
    return state.read(_path() / f"{entry.number:04}.{POLICY}")


def plain(entry: Entry) -> Mapping[str, Any]:
    """As JSON has it."""
    return {**asdict(entry), "when": entry.when, "files": f"{_path()}/{entry.number:04}.*"}


def _write(entry: Entry, texts: Mapping[str, str]) -> None:
    about = json.dumps(asdict(entry), indent=1) + "\n"
    try:
        with folder.made(_place()[0], 0o750, _place()[1], 0o700) as place:
            for name, text in {**texts, ABOUT: about}.items():
                folder.put(place, f"{entry.number:04}.{name}", text.encode(), 0o600, durable=True)
    except OSError as error:
        raise StateError(f"write down the apply in {_path()}: {error.strerror or error}") from error


def _last() -> int:
    """The highest number that is taken, also by what can't be read; 0: none. Raises StateError."""
    try:
        with folder.opened(*_place()) as place:
            return max((_number(name) for name in os.listdir(place) if name.endswith(f".{ABOUT}")), default=0)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StateError(f"read {_path()}: {error.strerror or error}") from error


def _prune(known: list[Entry]) -> None:
    """Forget the oldest, so that it does not grow for ever; and what a crash left without its head."""
    try:
        with folder.opened(*_place()) as place:
            names: dict[int, list[str]] = {}
            for name in os.listdir(place):
                names.setdefault(_number(name), []).append(name)
            names.pop(0, None)  # not ours
            sizes = {
                number: sum(os.stat(name, dir_fd=place).st_size for name in files) for number, files in names.items()
            }
            kept: list[int] = []
            for entry in reversed(known):
                total = sum(sizes.get(number, 0) for number in (*kept, entry.number))
                if len(kept) >= 2 and (len(kept) >= NUMBER or total > BYTES):
                    break
                kept.append(entry.number)
            for number in names.keys() - set(kept):
                for name in sorted(names[number], key=lambda name: not name.endswith(f".{ABOUT}")):
                    with suppress(IsADirectoryError):  # nothing of ours
                        os.unlink(name, dir_fd=place)
    except OSError as error:
        raise StateError(f"forget old applies in {_path()}: {error.strerror or error}") from error


def _number(name: str) -> int:
    """The number of the apply that a file belongs to; 0: none."""
    match = re.match(r"(\d{4,9})\.", name, re.ASCII)
    return int(match[1]) if match else 0


def _place() -> tuple[Path, str]:
    base, name = state.place()
    return base, f"{name}/{FOLDER}" if name else FOLDER


def _path() -> Path:
    base, name = _place()
    return base / name
