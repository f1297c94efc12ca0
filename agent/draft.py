"""The draft: a policy's document with the lists that it names, as far as they are sound."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from agent import listing
from agent.addresses import Family, Prefix, Prefixes
from agent.document import Document, IdentityTable, KernelTable
from agent.faults import Fault, dotted, plain
from agent.model import Identity
from agent.toml_lines import Lines, Place
from agent.values import ListFile, parse_source

T = TypeVar("T")

#: The largest file of others that is read, policy or list: some three million prefixes.
FILE_LIMIT = 64 << 20
#: What of a list is quoted when it is no prefix. A policy may name any file, and what stands in a secret one is not for
#: whoever reads the faults.
HARMLESS = re.compile(r"[\w\s.,:;/%-]{1,50}", re.ASCII)
#: A list that is wholly wrong (another format, say) is not told line by line.
FAULTS_PER_LIST = 20


class UnreadableError(Exception):
    """A file that isn't there, or isn't text. The message completes "FILE …"."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def read_text(path: Path, *, ours: bool = False) -> str:
    """The text of a policy or a list; of any size if it is one of `ours`. Raises UnreadableError."""
    try:
        # Asked before it is opened: opening a FIFO waits for its writer.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UnreadableError("is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
        with path.open("rb") as file:
            data = file.read(None if ours else FILE_LIMIT + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnreadableError("cannot be read: a NUL is in its name") from error
    if len(data) > FILE_LIMIT and not ours:
        raise UnreadableError(f"is larger than {FILE_LIMIT >> 20} MiB")
    if data.startswith(b"\xef\xbb\xbf"):
        raise UnreadableError("begins with a byte order mark: save it as UTF-8 without one", line=1)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError("is not UTF-8", line=data.count(b"\n", 0, error.start) + 1) from error


#: The keys of an identity that hold sources, and what one of them is to it.
ROLES = {"addresses": "an address", "members": "a member"}


@dataclass(frozen=True, slots=True)
class Source:
    """Prefixes of one identity that stand in one file, `count` of them, and the faults of what else stands there.

    `located` are they with their lines, in the file's order, each as often as it stands there. That takes many times as
    long as to read a list without them, and only who has a fault to tell asks.
    """

    identity: str
    key: Literal["addresses", "members"]
    file: str
    prefixes: Prefixes
    count: int
    located: Callable[[], Iterable[tuple[int, Prefix]]]
    faults: Sequence[Fault] = ()

    @property
    def path(self) -> str:
        return dotted(("identity", self.identity, self.key))


def first_faults(source: Source, wrong: Iterable[tuple[int, T]], tell: Callable[[T], str]) -> Iterator[Fault]:
    """What is wrong in a source, by line: as much as a person will read, and how much more there is."""
    entries = iter(wrong)
    for line, entry in islice(entries, FAULTS_PER_LIST):
        yield Fault(source.file, line, source.path, tell(entry))
    if more := [line for line, _ in entries]:
        yield Fault(source.file, more[0], source.path, f"… and {len(more)} more")


def _read_list(identity: str, file: str, text: str) -> Source:
    listed = listing.read(text)
    if listed is not None:
        return Source(identity, "members", file, listed, len(listed), lambda: listing.located(text))
    found: list[tuple[int, Prefix]] = []
    wrong: list[tuple[int, str]] = []
    for line, entry in listing.entries(text):
        try:
            found.append((line, parse_source(entry)))
        except ValueError as error:
            wrong.append((line, f"{plain(entry) if HARMLESS.fullmatch(entry) else 'this line'} {error}"))
    source = Source(identity, "members", file, Prefixes.of(prefix for _, prefix in found), len(found), lambda: found)
    return replace(source, faults=tuple(first_faults(source, wrong, str)))


class Draft:
    """All that the checks look at. What is None in it is at fault, and has been told.

    `lists` are at hand, by their names, and not read from files.
    """

    def __init__(self, path: Path, document: Document, lines: Lines, lists: Mapping[str, str]) -> None:
        self.path = path
        self.file = str(path)
        self.document = document
        self.lines = lines
        self.lists = lists
        self.names = tuple(document.identity or ())
        self.identities = [(name, table) for name, table in (document.identity or {}).items() if table is not None]
        self.kernel = document.kernel or KernelTable(**dict.fromkeys(each.name for each in fields(KernelTable)))
        self.sources = [source for name, table in self.identities for source in self._read(name, table)]

    @property
    def files(self) -> tuple[str, ...]:
        """The policy, and the lists that it names, readable or not."""
        return tuple(dict.fromkeys((self.file, *(source.file for source in self.sources))))

    def _read(self, name: str, table: IdentityTable) -> Iterator[Source]:
        if isinstance(table.addresses, list):
            own = {i: Prefix.host(address) for i, address in enumerate(table.addresses) if address is not None}
            yield self._inline(name, "addresses", own)
        members = dict(enumerate(table.members or ()))
        yield self._inline(name, "members", {i: member for i, member in members.items() if isinstance(member, Prefix)})
        for index, member in members.items():
            if isinstance(member, ListFile):
                yield self._list(name, index, member)

    def _inline(self, name: str, key: Literal["addresses", "members"], prefixes: dict[int, Prefix]) -> Source:
        lines = self.lines  # and not the draft, which would keep itself and all its lists: a daemon reads them for ever

        def located() -> Iterator[tuple[int, Prefix]]:
            numbers = (lines.of(("identity", name, key, index)) or 0 for index in prefixes)
            return zip(numbers, prefixes.values(), strict=True)

        return Source(name, key, self.file, Prefixes.of(prefixes.values()), len(prefixes), located)

    def _list(self, name: str, index: int, member: ListFile) -> Source:
        if member.name in self.lists:
            return _read_list(name, self.file, self.lists[member.name])
        path = self.path.parent / member.name
        try:
            return _read_list(name, str(path), read_text(path))
        except UnreadableError as error:
            line = f" (line {error.line})" if error.line else ""
            fault = self.fault(("identity", name, "members", index), f"{plain(str(path))} {error}{line}")
            return Source(name, "members", str(path), Prefixes(), 0, tuple, [fault])

    def fault(self, where: Place, message: str) -> Fault:
        """A fault of the policy's own file."""
        return Fault(self.file, self.lines.of(where), dotted(where), message)

    def owner(self, *where: str | int) -> str:
        """The identity that a key belongs to, and the key's line: where the reader finds the other half of a fault."""
        return f"{dotted(where[:2])} (line {self.lines.of(where)})"

    @cached_property
    def families(self) -> dict[tuple[str, str], set[Family]]:
        """The families of an identity's own addresses and of its members, by its name and the key of these."""
        families = {(name, key): set[Family]() for name in self.names for key in ROLES}
        for source in self.sources:
            families[source.identity, source.key].update(source.prefixes.families)
        for name, table in self.identities:
            if table.addresses == "auto":
                families[name, "addresses"].update(Family)
        return families

    @cached_property
    def known(self) -> list[tuple[str, IdentityTable, list[Family]]]:
        """The identities all of whose sources are known, with the families that they have."""
        unknown = {source.identity for source in self.sources if source.faults}
        for name, table in self.identities:
            if None in (table.addresses, table.members, *(table.addresses or ()), *(table.members or ())):
                unknown.add(name)
        return [
            (name, table, sorted(self.families[name, "addresses"] | self.families[name, "members"]))
            for name, table in self.identities
            if name not in unknown
        ]


def way_of(identity: Identity | IdentityTable) -> tuple[object, ...] | None:
    """What makes a way out that identities may share; None: it has a way of its own.

    Who has addresses of its own, or a probe, does: a source for it, a say on whether it is open.
    """
    if identity.addresses is None or len(identity.addresses) or identity.probe:
        return None
    hops = identity.next_hop
    return (identity.link, hops if hops is None or isinstance(hops, str) else frozenset(hops), identity.when_down)
