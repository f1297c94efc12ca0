"""What on a host hurts identities: pure rules, each a small function over what is wanted and what the host has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

#: How many things of one kind a line names.
NAMED = 3


class Symptom(NamedTuple):
    """What hurts, by which evidence (what was read where), and the remedy: a command, or a line for a file."""

    what: str
    evidence: str
    remedy: str


def some(things: Iterable[object], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    named = [str(each) for each in things]
    more = len(named) - NAMED
    return between.join(named[:NAMED]) + (f" and {more} more" if more > 0 else "")
