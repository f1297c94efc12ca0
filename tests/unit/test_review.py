"""A change as text and as Markdown: short first, nothing of a policy is taken for markup, and a comment holds it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent import review
from agent.addresses import Family, Prefix, Prefixes
from agent.change import Change, change
from agent.desired import desire
from agent.model import Identity, Policy
from tests.unit.values import identity, policy, prefixes

INSIDE = identity("inside", 1, "wg0", addresses=["192.0.2.130"], members=["10.9.0.0/24", "10.9.7.0/24"])
OUTSIDE = identity("outside", 2, "wan", addresses=["203.0.113.2"], members=["10.9.0.0/16"], next_hop=["203.0.113.1"])
BEFORE = policy(INSIDE, OUTSIDE)
#: What GitHub takes of a comment.
COMMENT = 65_536


def to(after: Policy, before: Policy = BEFORE) -> Change:
    return change(desire(before, None), desire(after, None))


MOVED = to(policy(replace(INSIDE, members=prefixes("10.9.0.0/24"), when_down="main"), OUTSIDE))


def test_text() -> None:
    """For a terminal: what it means comes first, the risks ahead of all, and the text last."""
    lines = review.text(MOVED).splitlines()
    assert lines[:12] == [
        "gw1: 1 identity changes, 1 prefix changes hands",
        "",
        "look twice:",
        "  ! identity inside: while wg0 is down its packets leave by whatever table main says",
        "",
        "sources:",
        "  10.9.7.0/24 (256 IPv4 addresses)",
        "    moves from inside to outside: leaves by wan, not wg0",
        "",
        "identities:",
        "  inside changes, which concerns 10.9.0.0/24, 192.0.2.130 (257 IPv4 addresses)",
        "    when_down: closed -> table main",
    ]
    assert "-            10.9.7.0 : goto id-inside," in lines


def test_text_of_nothing() -> None:
    """Where nothing changes one line says so."""
    assert review.text(to(BEFORE)) == "gw1: nothing changes\n"


def test_markdown() -> None:
    """For a comment: the same in lists, and each file's diff folded."""
    lines = review.markdown(MOVED).splitlines()
    assert lines[0] == "### `gw1`: 1 identity changes, 1 prefix changes hands"
    assert "- `10.9.7.0/24` (256 IPv4 addresses) moves from inside to outside: leaves by wan, not wg0" in lines
    text = lines.index("<details><summary>ruleset.nft: 36 lines added, 3 taken away</summary>")
    assert lines[text + 1 : text + 3] == ["", "```diff"]
    assert lines.count("</details>") == 2


HUGE = tuple(Prefix(Family.IPV4, (10 << 24) + (number << 9), 24) for number in range(20_000))


def test_a_comment_holds_it() -> None:
    """However long the lists, and however many identities: a comment has room for it, and says what it left out."""
    many = [replace(each, members=Prefixes.of(HUGE[place::30])) for place, each in enumerate(thirty())]
    words = review.markdown(to(policy(*many), policy(*(replace(each, members=Prefixes()) for each in many))))
    assert len(words) < COMMENT
    assert " more lines." in words


def thirty() -> list[Identity]:
    """Identities with names and links as long as can be."""
    return [
        identity(
            f"customer-with-a-long-name-{number:02}",
            number,
            f"some-long-link{number % 10}",
            addresses=[f"192.0.2.{number}"],
        )
        for number in range(1, 31)
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("wg_a*b*", r"wg\_a\*b\*", id="emphasis"),
        pytest.param("<img>", r"\<img\>", id="html"),
        pytest.param("[x](y)", r"\[x\](y)", id="link"),
        pytest.param("a&lt;b", "a&amp;lt;b", id="entity"),
        pytest.param("@team", "&#64;team", id="mention"),
        pytest.param("#12", r"\#12", id="issue"),
        pytest.param("`x`", r"\`x\`", id="code"),
    ],
)
def test_prose(words: str, expected: str) -> None:
    """What means something to Markdown, in the name of a link, is text in a comment."""
    assert review.prose(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("wg0", "`wg0`", id="plain"),
        pytest.param("a`b", "``a`b``", id="a-backtick-inside"),
        pytest.param("`a", "`` `a ``", id="at-the-edge"),
        pytest.param("a``b", "```a``b```", id="two"),
    ],
)
def test_code(words: str, expected: str) -> None:
    """A code span holds whatever the words are."""
    assert review.code(words) == expected


def test_fence() -> None:
    """No line of a diff ends the block that it stands in."""
    found = to(policy(replace(INSIDE, link="a```b"), OUTSIDE))
    lines = review.markdown(found).splitlines()
    assert lines.count("````diff") == 2
    assert lines.count("````") == 2
