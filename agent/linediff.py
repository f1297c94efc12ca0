"""Two texts to the lines that tell them apart, in time for lists of 100,000 lines."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

#: Lines around a change that are shown with it.
CONTEXT = 3
#: A stretch without a landmark is compared line by line up to this many pairs of lines.
PAIRS = 1_000_000


class Stretch(NamedTuple):
    """Lines i1..i2 of one text, and j1..j2 of the other; ends are not included."""

    i1: int
    i2: int
    j1: int
    j2: int


def unified(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """Lines as diff -u prints them, from the first @@ on; none for equal texts."""
    group: list[Stretch] = []
    for changed in _changes(before, after):
        if group and changed.i1 - group[-1].i2 > 2 * CONTEXT:
            yield from _hunk(before, after, group)
            group = []
        group.append(changed)
    if group:
        yield from _hunk(before, after, group)


def _hunk(before: Sequence[str], after: Sequence[str], group: list[Stretch]) -> Iterator[str]:
    first, last = group[0], group[-1]
    ahead, behind = min(CONTEXT, first.i1), min(CONTEXT, len(before) - last.i2)
    old, new = (first.i1 - ahead, last.i2 + behind), (first.j1 - ahead, last.j2 + behind)
    yield f"@@ -{_range(*old)} +{_range(*new)} @@"
    place = old[0]
    for each in group:
        yield from (f" {line}" for line in before[place : each.i1])
        yield from (f"-{line}" for line in before[each.i1 : each.i2])
        yield from (f"+{line}" for line in after[each.j1 : each.j2])
        place = each.i2
    yield from (f" {line}" for line in before[place : old[1]])


def _range(first: int, end: int) -> str:
    # An empty range is told by the line before it.
    return f"{first + 1},{end - first}" if end > first else f"{first},0"


def _changes(before: Sequence[str], after: Sequence[str]) -> Iterator[Stretch]:
    """What is not the same, in order: the gaps between the lines that are."""
    i = j = 0
    for same in (*_same(before, after), Stretch(len(before), len(before), len(after), len(after))):
        if (i, j) != (same.i1, same.j1):
            yield Stretch(i, same.i1, j, same.j1)
        i, j = same.i2, same.j2


def _same(before: Sequence[str], after: Sequence[str]) -> list[Stretch]:
    """Stretches of equal lines, in order and joined where they touch.

    Lines that both texts have exactly once are landmarks (Bram Cohen's patience diff): a rendered list has hardly any
    others, and the time is then that of sorting. Between two landmarks the same is done again.
    """
    found: list[Stretch] = []
    todo = [Stretch(0, len(before), 0, len(after))]
    while todo:
        i1, i2, j1, j2 = todo.pop()
        head = 0
        while i1 + head < i2 and j1 + head < j2 and before[i1 + head] == after[j1 + head]:
            head += 1
        tail = 0
        while i1 + head < i2 - tail and j1 + head < j2 - tail and before[i2 - tail - 1] == after[j2 - tail - 1]:
            tail += 1
        found += [Stretch(i1, i1 + head, j1, j1 + head)] * (head > 0)
        found += [Stretch(i2 - tail, i2, j2 - tail, j2)] * (tail > 0)
        inner = Stretch(i1 + head, i2 - tail, j1 + head, j2 - tail)
        if inner.i1 == inner.i2 or inner.j1 == inner.j2:
            continue
        landmarks = _landmarks(before, after, inner)
        if landmarks:
            ends = [*landmarks, (inner.i2, inner.j2)]
            todo.append(Stretch(inner.i1, ends[0][0], inner.j1, ends[0][1]))
            todo += [Stretch(i, next_i, j, next_j) for (i, j), (next_i, next_j) in pairwise(ends)]
        elif (inner.i2 - inner.i1) * (inner.j2 - inner.j1) <= PAIRS:
            matcher = SequenceMatcher(None, before[inner.i1 : inner.i2], after[inner.j1 : inner.j2], autojunk=False)
            found += [
                Stretch(inner.i1 + i, inner.i1 + i + size, inner.j1 + j, inner.j1 + j + size)
                for i, j, size in matcher.get_matching_blocks()
                if size
            ]
    return sorted(found)


def _landmarks(before: Sequence[str], after: Sequence[str], where: Stretch) -> list[tuple[int, int]]:
    """Pairs of places of lines that stand once on either side, as many as come in the same order."""
    i1, i2, j1, j2 = where
    mine, others = Counter(before[i1:i2]), Counter(after[j1:j2])
    place = {after[j]: j for j in range(j1, j2) if others[after[j]] == 1}
    pairs = [(i, place[before[i]]) for i in range(i1, i2) if mine[before[i]] == 1 and before[i] in place]
    # The longest rising run of the second numbers, by patience sorting.
    tops: list[int] = []
    piles: list[int] = []
    below: list[int | None] = []
    for index, (_, j) in enumerate(pairs):
        pile = bisect_left(tops, j)
        below.append(piles[pile - 1] if pile else None)
        tops[pile : pile + 1] = [j]
        piles[pile : pile + 1] = [index]
    rising: list[tuple[int, int]] = []
    index_ = piles[-1] if piles else None
    while index_ is not None:
        rising.append(pairs[index_])
        index_ = below[index_]
    return rising[::-1]
