"""Classes of packets: what their properties may be, split where somebody asks what they don't all answer alike.

A walk is run again for each part that a question has split off; there it gets the answers of before, up to that place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple, TypeVar

from agent.addresses import Prefix

Answer = TypeVar("Answer", bound=Hashable)
Found = TypeVar("Found")

#: Values of a property, a bit for each place: of all that Python has, integers are cut and joined the fastest.
Rows = int
#: What is left of a group: rows of its one property, or by the place of a value of the first the rows of the second.
Left = Any
#: What a question splits rows, or a group, into, by the answer.
Parts = Mapping[Hashable, Any]


#: What all values answer to a question.
Known = dict["Values", Parts]
#: So few rows are asked one by one, whatever is known.
FEW = 8


class Seen(Exception):  # noqa: N818 - no error: there is nothing more to follow
    """From here on it goes as it went for others."""


class Values:
    """What a property may be: each value once, the plainest first; and what is known of them all."""

    def __init__(self, values: Iterable[object]) -> None:
        self.values = tuple(dict.fromkeys(values))
        self.places = {value: place for place, value in enumerate(self.values)}
        self._ordered = sorted(value for value in self.values if isinstance(value, int))
        self._inside: dict[Prefix, Rows] = {}
        self._among: dict[frozenset[object], Rows] = {}

    def inside(self, prefix: Prefix) -> Rows:
        """The rows with an address of a network."""
        if prefix not in self._inside:
            first, last = bisect_left(self._ordered, prefix.address), bisect_right(self._ordered, prefix.last)
            self._inside[prefix] = _rows([self.places[value] for value in self._ordered[first:last]])
        return self._inside[prefix]

    def among(self, values: frozenset[object]) -> Rows:
        """The rows with one of these values."""
        if values not in self._among:
            self._among[values] = _rows([self.places[value] for value in values if value in self.places])
        return self._among[values]

    def parts(self, left: Rows, by: Callable[[object], Hashable], known: Known | None = None) -> Parts:
        """Rows split by what their values answer. Only what is left is asked, which mostly is one row of thousands;
        what all of them answer is `known` afterwards, where somebody keeps it.
        """
        count = left.bit_count()
        if known is not None and count > FEW:
            if self not in known:
                known[self] = self.parts((1 << len(self.values)) - 1, by)
            if len(known[self]) < count:
                return {answer: here for answer, rows in known[self].items() if (here := rows & left)}
        found: dict[Hashable, list[int]] = {}
        for place in _places(left):
            found.setdefault(by(self.values[place]), []).append(place)
        return {answer: _rows(places) for answer, places in found.items()}


class _Column(NamedTuple):
    """One property: its group, and its place among those of the group."""

    group: int
    axis: int
    of: Values


class _Single:
    """A group of one property. What is left of it are rows."""

    def __init__(self, values: Values) -> None:
        self.all: Left = (1 << len(values.values)) - 1

    def split(self, left: Rows, axis: int, cut: Callable[[Rows], Parts]) -> Parts:
        return cut(left)

    def without(self, left: Rows, others: Rows) -> Rows:
        return left & ~others

    def union(self, one: Rows, another: Rows) -> Rows:
        return one | another

    def plainest(self, left: Rows) -> tuple[int, ...]:
        return (_lowest(left),)

    def key(self, left: Rows) -> Hashable:
        return left


class _Pair:
    """A group of two properties. What is left of it are, for each value of the first, rows of the second: most classes
    have one value of either, and a table of all pairs would be cut anew for each.
    """

    def __init__(self, first: Values, second: Values, rows: Iterable[tuple[object, ...]]) -> None:
        places: dict[int, list[int]] = {}
        for one, another in rows:
            places.setdefault(first.places[one], []).append(second.places[another])
        self.all: Left = {place: _rows(others) for place, others in places.items()}

    def split(self, left: dict[int, Rows], axis: int, cut: Callable[[Rows], Parts]) -> Parts:
        # Of the second all are asked at once, whichever of the first they stand beside.
        every = reduce(or_, left.values(), 0) if axis else _rows(left)
        parts = cut(every)
        return {
            answer: left if rows == every else self._half(left, axis, rows) for answer, rows in parts.items() if rows
        }

    def _half(self, left: dict[int, Rows], axis: int, rows: Rows) -> dict[int, Rows]:
        if axis:
            return {at: here for at, others in left.items() if (here := others & rows)}
        return {at: left[at] for at in _places(rows)}

    def without(self, left: dict[int, Rows], others: dict[int, Rows]) -> dict[int, Rows]:
        return {at: here for at, rows in left.items() if (here := rows & ~others.get(at, 0))}

    def union(self, one: dict[int, Rows], another: dict[int, Rows]) -> dict[int, Rows]:
        return {**one, **{at: one.get(at, 0) | rows for at, rows in another.items()}}

    def plainest(self, left: dict[int, Rows]) -> tuple[int, ...]:
        first = min(left)
        return (first, _lowest(left[first]))

    def key(self, left: dict[int, Rows]) -> Hashable:
        return frozenset(left.items())


class Choices:
    """What the properties of packets may be: groups of one or two, and for each the rows of values that there are.

    The first of them are the plainest.
    """

    def __init__(self, groups: Mapping[tuple[str, ...], Values | Iterable[tuple[object, ...]]]) -> None:
        self.columns: dict[str, _Column] = {}
        self.groups: list[_Single | _Pair] = []
        for names, given in groups.items():
            if isinstance(given, Values):
                values = [given]
            else:
                rows = tuple(given)
                values = [Values(column) for column in zip(*rows, strict=True)]
            for axis, (name, each) in enumerate(zip(names, values, strict=True)):
                self.columns[name] = _Column(len(self.groups), axis, each)
            self.groups.append(_Single(values[0]) if len(values) == 1 else _Pair(values[0], values[1], rows))
        #: All of each group.
        self.all: tuple[Left, ...] = tuple(group.all for group in self.groups)

    def parts(self, left: Left, question: Question) -> Parts:
        """What is left of a group, split by what the values of its properties answer."""
        names, by, head, known = question
        column = self.columns[names[0]]
        group = self.groups[column.group]
        if len(names) == 1:
            return group.split(left, column.axis, lambda rows: column.of.parts(rows, by, known))
        other = self.columns[names[1]]
        found: dict[Hashable, Left] = {}
        for first, those in group.split(left, column.axis, lambda rows: column.of.parts(rows, head, known)).items():
            alike = partial(by, first)
            parts = group.split(those, other.axis, lambda rows, alike=alike: other.of.parts(rows, alike))  # type: ignore[misc]
            for answer, part in parts.items():
                found[answer] = group.union(found[answer], part) if answer in found else part
        return found


def _itself(value: object) -> Hashable:
    return value


class Question(NamedTuple):
    """Something that is asked of packets, by the values of some of their properties.

    Of several the first one's value comes to `by` as what `head` makes of it: what is alike there needs not be told
    apart. Whoever asks the same again and again keeps in `known` what was answered.
    """

    names: tuple[str, ...]
    by: Callable[..., Any]
    head: Callable[[object], Hashable] = _itself
    known: Known | None = None


@dataclass(slots=True)
class _Join:
    """A place where ways may meet again: how many others waited then, what was left, what is asked from there on."""

    waiting: int
    state: Hashable
    left: tuple[Left, ...]
    asked: set[int] = field(default_factory=set)


class _Stretch(NamedTuple):
    """A stretch of the way that is behind a walk: the answers that were given by its end, and what it came to."""

    answers: int
    asked: frozenset[str]
    supposed: tuple[tuple[tuple[str, str], bool], ...]
    result: object


class _Part(NamedTuple):
    """A part that was split off: what is left in it, the answers that lead there, the stretches that lie before it."""

    left: tuple[Left, ...]
    answers: tuple[Hashable, ...]
    stretches: Mapping[Hashable, _Stretch]


class _Search:
    """All parts of all choices, the last one split off first."""

    def __init__(self, choices: Choices) -> None:
        self._groups = choices.groups
        self.waiting = [_Part(choices.all, (), {})]
        self.joins: list[_Join] = []
        # By the state at a join: which groups were asked after from there on, and what was left of them.
        self._done: dict[Hashable, dict[tuple[int, ...], set[Hashable]]] = {}

    def next(self) -> _Part:
        # Whatever was split off behind a join has been followed when no more waits than did before it.
        while self.joins and self.joins[-1].waiting >= len(self.waiting):
            self._finish(self.joins.pop())
        return self.waiting.pop()

    def _finish(self, join: _Join) -> None:
        asked = tuple(sorted(join.asked))
        self._done.setdefault(join.state, {}).setdefault(asked, set()).add(self._key(asked, join.left))

    def _key(self, asked: tuple[int, ...], left: tuple[Left, ...]) -> Hashable:
        return tuple([self._groups[group].key(left[group]) for group in asked])

    def asks(self, groups: Iterable[int]) -> None:
        for join in self.joins:
            join.asked.update(groups)

    def join(self, state: Hashable, left: tuple[Left, ...]) -> None:
        for asked, seen in self._done.get(state, {}).items():
            if self._key(asked, left) in seen:
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

    def has(self, name: str) -> bool:
        """Whether packets have such a property at all."""
        return name in self._choices.columns

    # --- questions ---

    def tell(self, names: tuple[str, ...], by: Callable[..., Answer]) -> Answer:
        """What all of these packets answer, by their values of some properties."""
        return self.ask(Question(names, by))  # type: ignore[no-any-return]

    def ask(self, question: Question) -> Any:
        """What all of these packets answer."""
        names, by, head, known = question
        groups = self._groups(names)
        if not groups:
            return by()
        if len(groups) > 1:
            first = self.ask(Question(names[:1], head, known=known))
            return self.ask(Question(names[1:], partial(by, first)))
        return self._split(names, groups[0], lambda left: self._choices.parts(left, question))

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
            return all(self.ask(question) for question in questions)
        (group,) = groups

        def parts(left: Left) -> Parts:
            yes = left
            for question in questions:
                yes = self._choices.parts(yes, question).get(True)
                if not yes:
                    return {False: left}
            return {True: yes, False: self._choices.groups[group].without(left, yes)}

        return bool(self._split(names, group, parts))

    def _groups(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys([self._choices.columns[name].group for name in names]))

    def within(self, name: str, values: frozenset[object] | frozenset[int] | frozenset[str]) -> bool:
        """Whether a property is one of these values."""
        column = self._choices.columns[name]

        def parts(left: Rows) -> Parts:
            rows = column.of.among(values)
            return {True: left & rows, False: left & ~rows}

        return bool(self._cut(column, name, parts))

    def first(self, name: str, networks: tuple[Prefix, ...]) -> int | None:
        """The place of the first of these networks that holds an address."""
        column = self._choices.columns[name]

        def parts(left: Rows) -> Parts:
            found: dict[Hashable, Rows] = {}
            for place, network in enumerate(networks):
                here = column.of.inside(network) & left
                if here:
                    found[place] = here
                    left &= ~here
            found[None] = left
            return found

        return self._cut(column, name, parts)  # type: ignore[return-value]

    def _cut(self, column: _Column, name: str, parts: Callable[[Rows], Parts]) -> Hashable:
        group = self._choices.groups[column.group]
        return self._split((name,), column.group, lambda left: group.split(left, column.axis, parts))

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

    def _split(self, names: tuple[str, ...], group: int, parts: Callable[[Left], Parts]) -> Hashable:
        self._asked.update(names)
        if len(self._answers) < len(self._before):
            answer = self._before[len(self._answers)]
            self._answers.append(answer)
            return answer
        found = [(rows, answer) for answer, rows in parts(self._left[group]).items() if rows]
        if len(found) > 1:
            plainest = self._choices.groups[group].plainest
            found.sort(key=lambda part: plainest(part[0]))
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
        place = self._choices.groups[column.group].plainest(self._left[column.group])[column.axis]
        return column.of.values[place]


def _lowest(rows: Rows) -> int:
    """The first choice first: of what goes wrong the plainest packet is told."""
    return (rows & -rows).bit_length() - 1


def _places(rows: Rows) -> Iterator[int]:
    text = f"{rows:b}"[::-1]
    place = text.find("1")
    while place >= 0:
        yield place
        place = text.find("1", place + 1)


def _rows(places: Collection[int]) -> Rows:
    # Bit by bit an integer would be copied as often as it has rows.
    bits = bytearray(max(places, default=0) // 8 + 1)
    for place in places:
        bits[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(bits, "little")


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
