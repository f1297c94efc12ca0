"""A list read as a whole is the list that is read line by line, or is left to that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import listing
from agent.addresses import Prefix, Prefixes
from agent.values import parse_source
from tests.unit.values import prefixes

#: Sources in every spelling that there is, few enough for one to stand there twice.
SOURCES = (
    "10.0.0.0/8",
    "10.9.0.0/16",
    "10.9.0.1",
    "10.9.0.1/32",
    "10.9.0.2/032",
    "0.0.0.0/0",
    "2001:DB8::/32",
    "2001:db8:0::1",
    "::/0",
    "::fffe:0:0/95",
)
#: What is none, for each reason that there is.
NO_SOURCES = (
    "10.9.0.0/33",
    "10.9.0.1/16",
    "10.9.0.0/16/8",
    "10.9.0/16",
    "10.09.0.0/16",
    "10.9.0.0/",
    "10.9.0.0/-1",
    "10.9.0.0/a",
    "10.9.0.0/0016",
    "10.9.0.0 /16",
    "10.9.0.0/16 10.8.0.0/16",
    "10.9.0.0/16,10.8.0.0/16",
    "10.9.0.0/٨",
    "2001:db8::1/64",
    "2001:db8::/129",
    "2001:db8::/3:2",
    "fe80::1%eth0",
    "10.9.0.0/1:6",
    "127.0.0.1",
    "224.0.0.0/5",
    "fe80::/64",
    "::1",
    "::ffff:192.0.2.1",
    "/8",
    "engineering",
    "10.9.0.\0",
)
#: What may stand around one on its line.
BEFORE, BEHIND = ("", " ", "\t  "), ("", " ", "\t", "\r", "  # a, b: 10.7.0.0/16", "#", "# ü\r")


@st.composite
def lines(draw: st.DrawFn, entries: Sequence[str], most: int) -> list[tuple[str, str]]:
    """Entries, and each with what stands around it."""
    found = draw(st.lists(st.sampled_from(entries), max_size=most))
    return [(each, draw(st.sampled_from(BEFORE)) + each + draw(st.sampled_from(BEHIND))) for each in found]


def slowly(text: str) -> list[Prefix] | None:
    try:
        return [parse_source(entry) for _, entry in listing.entries(text)]
    except ValueError:
        return None


@given(lines((*SOURCES, *NO_SOURCES, "", "\v10.0.0.0/8", "10.0.0.0/8\x85"), 6), st.integers(1, 40))
@example([(each, each) for each in SOURCES], 1)
def test_as_line_by_line(written: list[tuple[str, str]], block: int) -> None:
    """What is read as a whole is what the lines say, wherever it is cut into blocks; what is wrong never is."""
    text = "\n".join(line for _, line in written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "BLOCK", block)
        whole = listing.read(text)
    one_by_one = slowly(text)
    if one_by_one is None or len(one_by_one) > len(set(one_by_one)):
        assert whole is None
    else:
        assert whole in (None, Prefixes.of(one_by_one))


@given(lines((*SOURCES, "", ""), 8))
def test_what_is_plain_is_read_whole(written: list[tuple[str, str]]) -> None:
    """Blanks, comments, empty lines and any end of a line cost no list its speed."""
    found = [parse_source(entry) for entry, _ in written if entry]
    if len(found) == len(set(found)):
        assert listing.read("\n".join(line for _, line in written)) == Prefixes.of(found)


@pytest.mark.parametrize("entry", NO_SOURCES)
def test_what_is_none_is_not_read(entry: str) -> None:
    """A single line at fault leaves the whole list to who tells the faults."""
    assert listing.read(f"10.1.0.0/16\n{entry}\n") is None
    assert slowly(entry) is None


def test_a_long_run_of_blanks() -> None:
    """What takes the time of its square with a hundred times as many would never come to an end here."""
    blanks = " \t" * 500_000
    assert listing.read(f"10.9.0.0/16{blanks}\n{blanks}10.8.0.0/16{blanks}#{blanks}\n") == prefixes(
        "10.8.0.0/16", "10.9.0.0/16"
    )
    assert listing.read(f"10.9.0.0/16{blanks}and\n") is None


def test_lines() -> None:
    """Entries go with the lines that they stand on, as often as they stand there."""
    text = "# two\n10.9.0.0/16\n\n 10.8.0.0/16 # and\n10.9.0.0/16"
    assert [*listing.located(text)] == [
        (2, Prefix.parse("10.9.0.0/16")),
        (4, Prefix.parse("10.8.0.0/16")),
        (5, Prefix.parse("10.9.0.0/16")),
    ]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n\n"])
def test_empty(text: str) -> None:
    """A list of nothing is one."""
    assert listing.read(text) == prefixes()
