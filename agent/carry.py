"""Counters that go on where earlier ones of the same name left off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from agent.kernel import KernelError, runtime
from agent.model import Count


@dataclass(frozen=True, slots=True)
class Carried:
    """A counter of this `handle` holds `last`; those of the same name before it had counted packets and bytes."""

    handle: int
    packets: int
    bytes: int
    last_packets: int
    last_bytes: int

    @property
    def before(self) -> tuple[int, int, int]:
        """Which counter it is, and what had been counted when it began."""
        return self.handle, self.packets, self.bytes

    @property
    def total(self) -> Count:
        """What all of them together have counted."""
        return Count(self.packets + self.last_packets, self.bytes + self.last_bytes, self.handle)


def carry(known: Carried | None, now: Count) -> Carried:
    """What is known of a counter after it was read again: another one, or one that was reset, begins from 0."""
    if known is None:
        return Carried(now.handle, 0, 0, now.packets, now.bytes)
    begins = now.handle != known.handle or now.packets < known.last_packets or now.bytes < known.last_bytes
    had = known.total if begins else Count(known.packets, known.bytes)
    return Carried(now.handle, had.packets, had.bytes, now.packets, now.bytes)


class Carry:
    """The counters of one nft table, in memory and in a file for the next start; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Carried] = {}
        self.changed = False

    def load(self) -> None:
        """Go on from the file; without one from 0. Raises KernelError for one that can't be read: then also from 0."""
        try:
            self._known = {name: _carried(values) for name, values in runtime.read(self._path).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise KernelError(f"read {self._path}", f"{error}; its counters begin again from 0") from error

    def totals(self, counts: Mapping[str, Count]) -> dict[str, Count]:
        """What each counter and those before it have counted. `changed` says whether there is something to save."""
        found = {}
        for name, now in counts.items():
            known = self._known.get(name)
            if known is None or (known.handle, known.last_packets, known.last_bytes) != (
                now.handle,
                now.packets,
                now.bytes,
            ):
                carried = carry(known, now)
                if known is None or known.before != carried.before:
                    self.changed = True
                self._known[name] = known = carried
            # Nearly all have been there since the start: nothing was before them.
            found[name] = known.total if known.packets or known.bytes else now
        return found

    def save(self) -> None:
        """Put what is known in the file's place, in one step. Raises KernelError.

        A counter that only counts on needs no saving: what was before it stays the same, and the rest is in the kernel.
        """
        runtime.leave(self._path, json.dumps({name: astuple(known) for name, known in sorted(self._known.items())}))
        self.changed = False


def _carried(values: object) -> Carried:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("it is no record of counters")
    return Carried(*values)
