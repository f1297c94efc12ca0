"""Where things stand in a TOML document: tomllib reads the values, this finds their lines."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from functools import cached_property

#: A place in a document: keys of tables, indices of arrays.
Place = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_SCALAR = re.compile(
    # A multi-line string may end in one or two quotes of its own, before the three that close it.
    r'''"""(?:[^\\]|\\.)*?"""(?:"{0,2})|'''
    r"""'{3}.*?'{3}(?:'{0,2})|"""
    r""""(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s,#\]}"'\[{][^,#\]}\n]*""",
    re.DOTALL,
)


class Lines:
    """The lines, counted from 1, of everything in a TOML document that tomllib has accepted."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _lines(self) -> dict[Place, int]:
        """Not before somebody asks: a document without a fault needs none of them."""
        scanner = _Scanner(self._text)
        # A reader that has lost its way knows what it saw before; for the rest the surrounding table will do.
        with suppress(_LostError, RecursionError):
            scanner.document()
        return scanner.lines

    def of(self, place: Place) -> int | None:
        """The line of a key or of an array's element; of what is around it when it has none; None: of nothing."""
        while place and place not in self._lines:
            place = place[:-1]
        return self._lines.get(place)


class _LostError(Exception):
    """The text isn't what the scanner takes TOML to be."""


class _Scanner:
    """One walk through a document, which notes where each key and each element of an array is first seen."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Place, int] = {}
        self.newlines = [match.start() for match in re.finditer("\n", text)]

    def document(self) -> None:
        table: Place = ()
        elements: Counter[Place] = Counter()  # of arrays of tables, by now
        self.match(_BLANK)
        while self.at < len(self.text):
            if self.take("[["):
                place: Place = ()
                for key in self.key():
                    place = (*self.newest(place, elements), key)
                    self.note(place)
                elements[place] += 1
                table = self.newest(place, elements)
                self.note(table)
                self.expect("]]")
            elif self.take("["):
                table = ()
                for key in self.key():
                    table = self.newest((*table, key), elements)
                    self.note(table)
                self.expect("]")
            else:
                self.pair(table)
            self.match(_BLANK)

    @staticmethod
    def newest(place: Place, elements: Counter[Place]) -> Place:
        """The table that a header means: of an array of tables its last one."""
        return (*place, elements[place] - 1) if place in elements else place

    def pair(self, table: Place) -> None:
        for key in self.key():
            table = (*table, key)
            self.note(table)
        self.expect("=")
        self.match(_SPACE)
        self.value(table)

    def value(self, place: Place) -> None:
        if self.take("["):
            index = 0
            while not self.take("]", after=_BLANK):
                self.note((*place, index))
                self.value((*place, index))
                self.take(",", after=_BLANK)
                index += 1
        elif self.take("{"):
            while not self.take("}", after=_BLANK):
                self.pair(place)
                self.take(",", after=_BLANK)
        else:
            self.match(_SCALAR)

    def key(self) -> list[str]:
        parts: list[str] = []
        while not parts or self.take("."):
            self.match(_SPACE)
            part = self.match(_KEY)
            parts.append(tomllib.loads(f"key = {part}")["key"] if part[0] in "\"'" else part)
            self.match(_SPACE)
        return parts

    def note(self, place: Place) -> None:
        self.lines.setdefault(place, bisect_left(self.newlines, self.at) + 1)

    def match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _LostError
        self.at = match.end()
        return match[0]

    def take(self, word: str, after: re.Pattern[str] = _SPACE) -> bool:
        """Step over a word if it comes next."""
        self.match(after)
        if not self.text.startswith(word, self.at):
            return False
        self.at += len(word)
        return True

    def expect(self, word: str) -> None:
        if not self.take(word):
            raise _LostError
