"""The last policy that was in force, kept over a reboot: identities are closed with it before the network comes up.

One file, `applied.toml`, whole and self-contained: the lists that the policy named may have changed since. It comes in
by the same door as every policy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from agent import IdmarkError, folder
from agent.draft import UnreadableError, read_text
from agent.kernel import netns, runtime
from agent.model import Identity, Policy, Probe
from agent.policy import PolicyError
from agent.policy import load as load_policy
from agent.policy import parse as parse_policy

#: systemd's StateDirectory= sets $STATE_DIRECTORY.
DEFAULT = Path("/var/lib/idmark")
NAME = "applied.toml"
#: The policy that was taken back, or that nobody has confirmed.
REFUSED = "refused.json"
HEAD = """\
# The policy that was in force last, as idmark keeps it for the next boot. Not the file to edit: the next apply, and the
# next reload of a changed policy, write it anew.
"""


class StateError(IdmarkError):
    """The policy of last time could not be kept, or not be found out."""


def save(policy: Policy) -> None:
    """Keep a policy as the one in force; it is on disk when this returns. Raises StateError."""
    _put(NAME, text(policy), "keep the policy for the next boot in {}")


def load(likely: Policy | None = None) -> Policy | None:
    """The policy that was kept last; None: none was yet. Raises PolicyError for one that the door no longer lets in.

    `likely` it is the one that is at hand: then it is that very value, and no million prefixes are read again.
    """
    path = _path(NAME)
    try:
        found = path.exists()
        if found and likely and path.read_bytes() == text(likely).encode():
            return likely
    except OSError as error:
        raise StateError(f"look for the policy of last time in {path}: {error.strerror}") from error
    return read(path) if found else None


def saved_at() -> float | None:
    """When a policy was kept last, in seconds since 1970; None: none is. Raises StateError."""
    path = _path(NAME)
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"look for the policy of last time in {path}: {error.strerror}") from error


def forget() -> None:
    """Nothing is in force any more, and nothing shall be at the next boot. Raises StateError."""
    drop()
    forgive()


def drop() -> None:
    """No policy is kept for the next boot. Raises StateError."""
    _delete(NAME, "forget the policy of last time in {}")


# --- the policy that is not wanted ------------------------------------------------------------------------------------


def refuse(digest: str, why: str) -> None:
    """No daemon takes this policy from its file until the file changes, or somebody applies it. Raises StateError.

    It is on disk when this returns: a policy that nobody has confirmed must not come up at the next boot.
    """
    record = json.dumps({"policy": digest, "why": why}, indent=1) + "\n"
    _put(REFUSED, record, "write down in {} which policy is not wanted")


def refused() -> tuple[str, str]:
    """The digest of the policy that is not wanted, and why; both empty if there is none. Raises StateError."""
    base, name = place()
    try:
        with folder.opened(base, name) as where:
            data = folder.got(where, REFUSED)
        record = json.loads(data or b"{}")
        return str(record.get("policy", "")), str(record.get("why", ""))
    except FileNotFoundError:
        return "", ""
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise StateError(f"read {_path(REFUSED)}: {error}; delete it if every policy is wanted") from error


def forgive() -> None:
    """Every policy is wanted again. Raises StateError."""
    _delete(REFUSED, "forget in {} which policy is not wanted")


# --- where it is kept -------------------------------------------------------------------------------------------------


def _put(file: str, content: str, doing: str) -> None:
    """Write one of the files, on disk when this returns. Raises StateError, with what was being done to {}."""
    base, name = place()
    try:
        with folder.made(base, 0o750, name, 0o750) as where:
            folder.put(where, file, content.encode(), 0o640, durable=True)
    except OSError as error:
        raise StateError(f"{doing.format(_path(file))}: {error.strerror or error}") from error


def _delete(file: str, doing: str) -> None:
    path = _path(file)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"{doing.format(path)}: {error.strerror}") from error


def _path(file: str) -> Path:
    base, name = place()
    return base / (name or "") / file


def place() -> tuple[Path, str | None]:
    """The folder, and which one in it, that belong to the network namespace of this thread.

    The machine's own namespace has the folder itself, one with a name of ip-netns(8) a folder in it. One that has no
    name, and isn't the machine's, will not be there after a boot: what is kept for it goes with the rest of /run.
    """
    base = Path(os.environ.get("STATE_DIRECTORY") or DEFAULT)
    own = _number(Path("/proc/thread-self/ns/net"))
    # Only who may trace process 1 gets to know its namespace: not the agent's own user. systemd started that one.
    first = _number(Path("/proc/1/ns/net"))
    if own == first:
        return base, None
    if name := _name(own):
        return base, f"netns-{name}"
    if first is None:
        return base, None
    own_directory = runtime.directory()
    return own_directory.parent, own_directory.name


def _number(namespace: Path) -> tuple[int, int] | None:
    """What tells a namespace from all others (namespaces(7)); None: it may not be asked for."""
    try:
        status = namespace.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _name(number: tuple[int, int] | None) -> str | None:
    """The name that ip-netns(8) has for a namespace."""
    names = sorted(netns.NAMES.iterdir()) if netns.NAMES.is_dir() else []
    return next((path.name for path in names if _number(path) == number), None)


# --- the text --------------------------------------------------------------------------------------------------------

#: What stands between two members, and they all as they stand there.
_BETWEEN = '",\n    "'
_MEMBERS = re.compile(r'^members = \[\n    "([^]]*)",\n\]$', re.MULTILINE)


def text(policy: Policy) -> str:
    """A policy as a file: every key that it has, all prefixes of its lists, one a line."""
    return _text(_Itself(policy))


def read(path: Path) -> Policy:
    """The policy of a file that `text` is in. Raises PolicyError, with every fault that there is."""
    try:
        return parse(read_text(path, ours=True), path)  # all lists in one, each at the limit perhaps
    except UnreadableError:
        return load_policy(path)


def parse(written: str, path: Path) -> Policy:
    """The policy of a text that `text` gave, and which stands, or stood, in a file. Raises PolicyError.

    Its members are lists that are at hand: a reader of TOML takes ten times as long.
    """
    lists: dict[str, str] = {}

    def put_aside(found: re.Match[str]) -> str:
        name = f"members {len(lists)}"
        lists[name] = found[1].replace(_BETWEEN, "\n")
        # A newline that stands anywhere else is none that `text` has written.
        if found[1].count("\n") != found[1].count(_BETWEEN):
            return found[0]
        below = "\n" * found[0].count("\n")  # for warnings tell of lines
        return f'members = ["file:{name}"{below}]'

    try:
        return parse_policy(_MEMBERS.sub(put_aside, written), path, lists)
    except PolicyError:
        return parse_policy(written, path)  # which tells the lines of its faults


@dataclass(frozen=True, slots=True, eq=False)
class _Itself:
    """A policy as a key to what was made of it: to compare a thousand identities is work."""

    policy: Policy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.policy is other.policy

    def __hash__(self) -> int:
        return id(self.policy)


@lru_cache(maxsize=2)
def _text(itself: _Itself) -> str:
    """History, trial and boot ask for it in turn."""
    return "\n".join([*_lines(itself.policy), ""])


def _lines(policy: Policy) -> Iterator[str]:
    yield HEAD.rstrip()
    yield f"gateway = {_toml(policy.gateway)}"
    yield f"downstream = {_toml('auto' if policy.downstream is None else policy.downstream)}"
    for identity in policy.identities:
        yield ""
        yield from _identity_lines(identity)
    yield ""
    yield "[kernel]"
    for key, value in asdict(policy.kernel).items():
        if value is None:  # "auto"
            continue
        yield f"{key} = {value:#x}" if key == "mark_mask" else f"{key} = {_toml(value)}"


def _identity_lines(identity: Identity) -> Iterator[str]:
    next_hop = identity.next_hop
    yield f"[identity.{identity.name}]"
    yield f"id = {identity.id}"
    yield f"link = {_toml(identity.link)}"
    yield f"addresses = {_toml('auto' if identity.addresses is None else [*map(str, identity.addresses)])}"
    yield f"next_hop = {_toml(next_hop if isinstance(next_hop, str) else [*map(str, next_hop)])}"
    yield f"when_down = {_toml(identity.when_down)}"
    yield f"masquerade = {_toml(identity.masquerade)}"
    yield f"clamp_mss = {_toml(identity.clamp_mss)}"
    if identity.probe:
        yield f"probe = {_probe(identity.probe)}"
    if identity.flush_flows:
        yield "flush_flows = true"
    if identity.members:
        yield "members = ["
        for (family, length), column in identity.members.columns.items():
            behind = "" if length == family.bits else f"/{length}"
            yield f'    "{column.text(f"{behind}{_BETWEEN}")}{behind}",'
        yield "]"


def _probe(probe: Probe) -> str:
    port = "" if probe.port is None else f", port = {probe.port}"
    every = f"{probe.every:.0f}s" if probe.every.is_integer() else f"{probe.every * 1000:.0f}ms"
    return f'{{ target = "{probe.target}"{port}, every = "{every}", fail_after = {probe.fail_after} }}'


def _toml(value: object) -> str:
    # What JSON writes of texts, integers, booleans and lists is TOML, but for \ud83d\ude00: hence as it is.
    return json.dumps(value, ensure_ascii=False)
