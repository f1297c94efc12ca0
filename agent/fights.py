"""Who repairs the same thing again and again has an opponent: how often to go on, and when to say so. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

#: So many repairs of one thing within so many seconds are a fight.
REPAIRS, WINDOW = 5, 600.0
#: So many may follow each other at once, one more is earned each second; then they come so many seconds apart.
BURST, HOLD = 50, 0.4


@dataclass(slots=True)
class _Record:
    """The repairs of one thing: their moments, what may still follow at once, and whether it was told."""

    moments: deque[float] = field(default_factory=lambda: deque(maxlen=REPAIRS))
    left: float = BURST
    fighting: bool = False


class Fights:
    """The repairs of the last minutes. Things go by a key, moments are seconds of one clock that never goes back."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def due(self, key: str, now: float) -> float:
        """From when on a thing may be repaired; `now` or earlier: at once."""
        record = self._records.get(key)
        if record is None or not record.moments or self._saved(record, now) >= 1:
            return now
        return record.moments[-1] + HOLD

    def repaired(self, key: str, now: float) -> bool:
        """Take down a repair. Whether it made a fight of it: said once, until it is `over`."""
        record = self._records.setdefault(key, _Record())
        record.left = max(self._saved(record, now) - 1, 0.0)
        record.moments.append(now)
        begins = not record.fighting and len(record.moments) == REPAIRS and now - record.moments[0] <= WINDOW
        record.fighting |= begins
        return begins

    def fighting(self, key: str) -> bool:
        """Whether a thing is fought for."""
        return key in self._records and self._records[key].fighting

    def over(self, now: float) -> Iterator[str]:
        """The fights that have ended, for nothing happened for a while; what is long past is forgotten."""
        for key, record in [*self._records.items()]:
            if now - record.moments[-1] > WINDOW:
                del self._records[key]
                if record.fighting:
                    yield key

    @staticmethod
    def _saved(record: _Record, now: float) -> float:
        """What may follow at once, with what was earned since the last repair."""
        since = now - record.moments[-1] if record.moments else 0.0
        return min(record.left + since, BURST)
