"""Faults of a policy, told in the reader's terms: the key, the value, the rule it broke."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, time

from agent.toml_lines import Place


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, where it stands, and the rule it breaks. `path` is dotted, `line` counts from 1."""

    file: str
    line: int | None
    path: str
    message: str

    def __str__(self) -> str:
        file = self.file if self.file.isprintable() else spelled(self.file)
        place = file if self.line is None else f"{file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


def in_order(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Faults sorted by file and line."""
    return tuple(sorted(faults, key=lambda fault: (fault.file, fault.line or 0)))


#: What a reader calls the kinds of values that tomllib gives.
KINDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "a table",
    datetime: "a date",
    date: "a date",
    time: "a time",
}


def dotted(where: Place) -> str:
    """The path of a key as TOML writes it. An element of a list goes by the list's name: messages show the element."""
    keys = [part for part in where if isinstance(part, str)]
    return ".".join(key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _short(json.dumps(key)) for key in keys)


def spelled(value: object) -> str:
    """A value as TOML spells it."""
    match value:
        case bool():
            return str(value).lower()
        case int():  # str() refuses a number of thousands of digits
            return str(value) if abs(value) < 1 << 64 else _short(hex(value))
        case str():
            return _short(json.dumps(value))
        case list():
            return "[…]" if value else "[]"
        case dict():
            return "{…}" if value else "{}"
    return str(value)


def plain(value: object) -> str:
    """A text as it stands, when nothing in it can mislead; anything else as TOML spells it."""
    return _short(value) if isinstance(value, str) and re.fullmatch(r"[!#-\[\]-~]+", value) else spelled(value)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def meant(word: str, words: Iterable[str]) -> str:
    """The end of a message about a word that is none of `words`."""
    close = difflib.get_close_matches(word[:80], list(words), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
