"""Classes of packets: what their properties may be, split where somebody asks what they don't all answer alike.

A walk is run again for each part that a question has split off; there it gets the answers of before, up to that place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from agent.model import Prefix

Answer = TypeVar("Answer", bound=Hashable)
Found = TypeVar("Found")

#: Rows of a group, a bit for each: of all that Python has, integers are cut and joined the fastest.
Rows = int
#: What a question splits rows into, by the answer.
Parts = Mapping[Hashable, Rows]


class Seen(Exception):  # noqa: N818 - no error: there is nothing more to follow
    """From here on it goes as it went for others."""


class _Column:
    """One property, in the rows of its group."""

    def __init__(self, group: int, values: tuple[object, ...]) -> None:
        self.group, self.values = group, values
        self._rows: dict[object, Rows] = {}
        for row, value in enumerate(values):
            self._rows[value] = self._rows.get(value, 0) | 1 << row
        self._ordered = sorted(value for value in self._rows if isinstance(value, int))
        self._inside: dict[Prefix, Rows] = {}
        self._among: dict[frozenset[object], Rows] = {}

    def inside(self, prefix: Prefix) -> Rows:
        """The rows with an address of a network."""
        if prefix not in self._inside:
            first, last = bisect_left(self._ordered, prefix.address), bisect_right(self._ordered, prefix.last)
            self._inside[prefix] = self.among(frozenset(self._ordered[first:last]))
        return self._inside[prefix]

    def among(self, values: frozenset[object]) -> Rows:
        """The rows with one of these values."""
        if values not in self._among:
            rows = 0
            for value in values:
                rows |= self._rows.get(value, 0)
            self._among[values] = rows
        return self._among[values]

    def parts(self, left: Rows, by: Callable[[object], Hashable]) -> Parts:
        """Rows split by what their values answer: asked once a value, however many rows have it."""
        found: dict[Hashable, Rows] = {}
        for value, rows in self._rows.items():
            here = rows & left
            if here:
                answer = by(value)
                found[answer] = found.get(answer, 0) | here
        return found


class Choices:
    """What the properties of packets may be: groups of them, and for each the rows of values that there are."""

    def __init__(self, groups: Mapping[tuple[str, ...], Iterable[tuple[object, ...]]]) -> None:
        self.groups = tuple(tuple(rows) for rows in groups.values())
        self.columns = {
            name: _Column(group, tuple(row[place] for row in self.groups[group]))
            for group, names in enumerate(groups)
            for place, name in enumerate(names)
        }
        #: All rows of each group.
        self.all = tuple((1 << len(rows)) - 1 for rows in self.groups)

    def parts(self, left: Rows, names: tuple[str, ...], by: Callable[..., Hashable]) -> Parts:
        """Rows of a group, split by what the values of its properties answer."""
        columns = [self.columns[name] for name in names]
        if len(columns) == 1:
            return columns[0].parts(left, by)
        found: dict[Hashable, Rows] = {}
        for row in _places(left):
            answer = by(*[column.values[row] for column in columns])
            found[answer] = found.get(answer, 0) | 1 << row
        return found


class Question(NamedTuple):
    """Something that is asked of packets, by the values of some of their properties."""

    names: tuple[str, ...]
    by: Callable[..., Any]


@dataclass(slots=True)
class _Join:
    """A place where ways may meet again: how many others waited then, what was left, what is asked from there on."""

    waiting: int
    state: Hashable
    left: tuple[Rows, ...]
    asked: set[int] = field(default_factory=set)


class _Stretch(NamedTuple):
    """A stretch of the way that is behind a walk: the answers that were given by its end, and what it came to."""

    answers: int
    asked: frozenset[str]
    supposed: tuple[tuple[tuple[str, str], bool], ...]
    result: object


class _Part(NamedTuple):
    """A part that was split off: what is left in it, the answers that lead there, the stretches that lie before it."""

    left: tuple[Rows, ...]
    answers: tuple[Hashable, ...]
    stretches: Mapping[Hashable, _Stretch]


class _Search:
    """All parts of all choices, the last one split off first."""

    def __init__(self, choices: Choices) -> None:
        self.waiting = [_Part(choices.all, (), {})]
        self.joins: list[_Join] = []
        # By the state at a join: which groups were asked after from there on, and what was left of them.
        self._done: dict[Hashable, dict[tuple[int, ...], set[tuple[Rows, ...]]]] = {}

    def next(self) -> _Part:
        # Whatever was split off behind a join has been followed when no more waits than did before it.
        while self.joins and self.joins[-1].waiting >= len(self.waiting):
            self._finish(self.joins.pop())
        return self.waiting.pop()

    def _finish(self, join: _Join) -> None:
        asked = tuple(sorted(join.asked))
        seen = self._done.setdefault(join.state, {}).setdefault(asked, set())
        seen.add(tuple(join.left[group] for group in asked))

    def asks(self, groups: Iterable[int]) -> None:
        for join in self.joins:
            join.asked.update(groups)

    def join(self, state: Hashable, left: tuple[Rows, ...]) -> None:
        for asked, seen in self._done.get(state, {}).items():
            if tuple(left[group] for group in asked) in seen:
                self.asks(asked)
                raise Seen
        self.joins.append(_Join(len(self.waiting), state, left))


class Given:
    """A class of packets: for each group of properties the rows that are left."""

    def __init__(self, choices: Choices, part: _Part, search: _Search | None = None) -> None:
        self._choices, self._search = choices, search
        self._left = list(part.left)
        self._before, self._stretches = part.answers, part.stretches
        self._answers: list[Hashable] = []
        self._supposed: dict[tuple[str, str], bool] = {}
        self._asked: set[str] = set()

    @classmethod
    def of(cls, **properties: object) -> Given:
        """One packet, on a host where nothing has happened."""
        choices = Choices({(name,): [(value,)] for name, value in properties.items()})
        return cls(choices, _Part(choices.all, (), {}))

    # --- questions ---

    def tell(self, names: tuple[str, ...], by: Callable[..., Answer]) -> Answer:
        """What all of these packets answer, by their values of some properties."""
        groups = self._groups(names)
        if not groups:
            return by()
        if len(groups) > 1:
            # Of several groups: one after the other, the first value by value.
            first = self.tell(names[:1], _itself)
            return self.tell(names[1:], lambda *others: by(first, *others))
        return self._split(names, groups[0], lambda left: self._choices.parts(left, names, by))  # type: ignore[return-value]

    def all_of(self, questions: Iterable[Question]) -> bool:
        """Whether all of these packets answer one question after the other with yes, up to the first no.

        Questions of one group that follow each other split it once: those who say yes to all from the rest.
        """
        together: list[Question] = []
        for question in questions:
            if together and self._groups(question.names) != self._groups(together[0].names):
                if not self._all(together):
                    return False
                together = []
            together.append(question)
        return self._all(together)

    def _all(self, questions: list[Question]) -> bool:
        names = tuple(dict.fromkeys(name for question in questions for name in question.names))
        groups = self._groups(names)
        if len(groups) != 1:
            return all(self.tell(*question) for question in questions)

        def parts(left: Rows) -> Parts:
            rows = left
            for question in questions:
                rows = self._choices.parts(rows, *question).get(True, 0)
            return {True: rows, False: left & ~rows}

        return bool(self._split(names, groups[0], parts))

    def _groups(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._choices.columns[name].group for name in names))

    def within(self, name: str, values: frozenset[object] | frozenset[int] | frozenset[str]) -> bool:
        """Whether a property is one of these values."""
        column = self._choices.columns[name]

        def parts(left: Rows) -> Parts:
            rows = column.among(values)
            return {True: left & rows, False: left & ~rows}

        return bool(self._split((name,), column.group, parts))

    def first(self, name: str, networks: tuple[Prefix, ...]) -> int | None:
        """The place of the first of these networks that holds an address."""
        column = self._choices.columns[name]

        def parts(left: Rows) -> Parts:
            found: dict[Hashable, Rows] = {}
            for place, network in enumerate(networks):
                here = column.inside(network) & left
                if here:
                    found[place] = here
                    left &= ~here
            found[None] = left
            return found

        return self._split((name,), column.group, parts)  # type: ignore[return-value]

    def suppose(self, what: str, whom: str) -> bool:
        """Whether something has happened to the host: once asked, it is tried both ways."""
        key = (what, whom)
        if key not in self._supposed:
            if len(self._answers) < len(self._before):
                answer = bool(self._before[len(self._answers)])
            else:
                answer = False
                if self._search:
                    self._search.waiting.append(_Part(tuple(self._left), (*self._answers, True), self._stretches))
            self._answers.append(answer)
            self._supposed[key] = answer
        return self._supposed[key]

    def once(self, stretch: Hashable, go: Callable[[], Found]) -> Found:
        """What a stretch of the way comes to. Whoever was split off behind it doesn't go it again."""
        known = self._stretches.get(stretch)
        if known is None:
            result = go()
            known = _Stretch(len(self._answers), frozenset(self._asked), tuple(self._supposed.items()), result)
            self._stretches = {**self._stretches, stretch: known}
            return result
        self._answers = list(self._before[: known.answers])
        self._asked.update(known.asked)
        self._supposed = dict(known.supposed)
        return known.result  # type: ignore[return-value]

    def join(self, state: Hashable) -> None:
        """Ways may meet again here: with the same state, and the same left of what is asked from here on, it goes the
        same way. Then the walk ends (`Seen`).
        """
        if self._search and len(self._answers) >= len(self._before):
            self._search.join((state, frozenset(self._supposed.items())), tuple(self._left))

    def _split(self, names: tuple[str, ...], group: int, parts: Callable[[Rows], Parts]) -> Hashable:
        self._asked.update(names)
        if len(self._answers) < len(self._before):
            answer = self._before[len(self._answers)]
            self._answers.append(answer)
            return answer
        found = [(rows, answer) for answer, rows in parts(self._left[group]).items() if rows]
        found.sort(key=lambda part: _plainest(part[0]))
        (rows, answer), others = found[0], found[1:]
        if self._search:
            self._search.asks((group,))
        if self._search and others:
            left = tuple(self._left)
            for each, another in reversed(others):
                part = _Part((*left[:group], each, *left[group + 1 :]), (*self._answers, another), self._stretches)
                self._search.waiting.append(part)
        self._left[group] = rows
        self._answers.append(answer)
        return answer

    # --- what is known by now ---

    @property
    def happened(self) -> tuple[tuple[str, str], ...]:
        """What has happened to the host, as far as it was asked."""
        return tuple(key for key, answer in self._supposed.items() if answer)

    def example(self, name: str) -> object:
        """The plainest value of a property that was asked after; None: nobody did."""
        if name not in self._asked:
            return None
        column = self._choices.columns[name]
        return column.values[_plainest(self._left[column.group])]


def _plainest(rows: Rows) -> int:
    """The first choice first: of what goes wrong the plainest packet is told."""
    return (rows & -rows).bit_length() - 1


def _places(rows: Rows) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{rows:b}")) if bit == "1"]


def _itself(value: object) -> Hashable:
    return value


def follow(run: Callable[[Given], Found], choices: Choices) -> Iterator[tuple[Given, Found]]:
    """Every way that `run` can take, with the packets that take it. It must ask the same if it is answered the same."""
    search = _Search(choices)
    while search.waiting:
        given = Given(choices, search.next(), search)
        try:
            found = run(given)
        except Seen:
            continue
        yield given, found
