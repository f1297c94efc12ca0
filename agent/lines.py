"""Families of metrics as text: prometheus_client writes them, and what it has written before is not written again.

Of thousands of samples only the values are new at a scrape: names and labels are most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain, takewhile
from operator import attrgetter, is_
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

#: What makes text of all that a collector has (prometheus_client.exposition.choose_encoder).
Encoder = Callable[[Collector], bytes]

_labels, _value = attrgetter("labels"), attrgetter("value")


@lru_cache(maxsize=1 << 12)
def _end(value: float) -> str:
    """What stands behind a line's head."""
    return f" {floatToGoString(value)}\n"  # type: ignore[no-untyped-call]


class _Written(NamedTuple):
    """A family as it was written: its comments, and its samples' lines up to their values."""

    labels: Sequence[dict[str, str]]
    comments: str
    heads: Sequence[str]

    def fits(self, labels: Sequence[dict[str, str]]) -> bool:
        """Whether samples have these very labels: the same objects."""
        return len(labels) == len(self.labels) and all(map(is_, labels, self.labels))

    def text(self, family: Metric) -> bytes:
        """The family with the values that it has now."""
        ends = map(_end, map(_value, family.samples))
        return "".join((self.comments, *chain.from_iterable(zip(self.heads, ends, strict=True)))).encode()

    @classmethod
    def of(cls, family: Metric, text: bytes) -> _Written | None:
        """Taken from a text; None if it isn't comments, and then a line a sample."""
        lines = text.decode().splitlines(keepends=True)
        comments = [*takewhile(lambda line: line.startswith("#"), lines)]
        heads = [line.rpartition(" ")[0] for line in lines[len(comments) :]]
        written = cls([*map(_labels, family.samples)], "".join(comments), heads)
        return written if len(heads) == len(family.samples) and written.text(family) == text else None


class _These(Collector):
    """A collector of some families."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Lines:
    """Writes what collectors have, in any of the library's formats. Whose labels are new objects is written anew."""

    def __init__(self) -> None:
        self._written: dict[tuple[str, str], _Written] = {}

    def text(self, collector: Collector, encoder: Encoder, content_type: str) -> bytes:
        """What `encoder` makes of a collector; `content_type` is what that is called."""
        end = encoder(_These())  # OpenMetrics has one
        parts = [self._family(family, encoder, content_type, end) for family in collector.collect()]
        return b"".join((*parts, end))

    def _family(self, family: Metric, encoder: Encoder, content_type: str, end: bytes) -> bytes:
        key = (content_type, family.name)
        written = self._written.pop(key, None)
        if written is None or not written.fits([*map(_labels, family.samples)]):
            text = encoder(_These(family)).removesuffix(end)
            written = _Written.of(family, text)
        else:
            text = written.text(family)
        if written:
            self._written[key] = written
        return text
