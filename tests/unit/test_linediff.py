"""The diff behind a review: it leads from one text to the other, is short, and long lists take no time."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.linediff import unified

_lines = st.lists(st.sampled_from(["a", "b", "c", "", "{", "}", "10.0.0.0/8", "10.1.0.0/16"]), max_size=30)


def patched(before: list[str], hunks: list[str]) -> list[str]:
    """What patch(1) makes of a text and hunks."""
    after: list[str] = []
    place = 0
    for line in hunks:
        if at := re.fullmatch(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@", line):
            first = int(at[1]) - (int(at[2]) > 0)
            after += before[place:first]
            place = first
            assert len(after) == int(at[3]) - (int(at[4]) > 0)
            continue
        if line[0] in " -":
            assert before[place] == line[1:]
            place += 1
        if line[0] in " +":
            after.append(line[1:])
    return after + before[place:]


@given(_lines, _lines)
def test_it_leads_there(before: list[str], after: list[str]) -> None:
    """The hunks make the second text of the first, and there are none just when the two are equal."""
    hunks = list(unified(before, after))
    assert patched(before, hunks) == after
    assert bool(hunks) == (before != after)


@given(st.lists(st.integers(0, 99), unique=True).map(sorted), st.sets(st.integers(0, 99), max_size=5))
def test_no_longer_than_needed(numbers: list[int], other: set[int]) -> None:
    """Of sorted lists without doubles only what is on one side alone is told."""
    before, after = [*map(str, numbers)], [*map(str, sorted({*numbers} ^ other))]
    told = [line for line in unified(before, after) if line[0] in "+-"]
    assert sorted(line[1:] for line in told) == sorted(map(str, other))


def test_as_diff_prints_it(tmp_path: Path) -> None:
    """diff -u says the same of a small change in a long text."""
    before = [f"line {number}" for number in range(40)]
    after = [*before[:10], "new", *before[11:30], *before[31:]]
    for name, lines in (("a", before), ("b", after)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    done = subprocess.run(["diff", "-u", "a", "b"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert list(unified(before, after)) == done.stdout.splitlines()[2:]


@pytest.mark.parametrize("length", [pytest.param(50_000, id="every-second-line")])
def test_long_lists(length: int) -> None:
    """A list of 100,000 lines, every second of them another, is told line by line."""
    before = [f"10.{number} : goto id-inside," for number in range(2 * length)]
    after = [line if number % 2 else line.replace("inside", "outside") for number, line in enumerate(before)]
    assert sum(line[0] == "+" for line in unified(before, after)) == length
