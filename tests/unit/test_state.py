"""The policy that is kept for the next boot, as a file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import draft, state
from agent.addresses import Family, Prefix, Prefixes, parse_address
from agent.model import Kernel, Policy, Probe
from agent.policy import PolicyError, load
from agent.policy import parse as policy_of
from tests.unit.values import INSIDE, OUTSIDE, identity, policies, policy, toml


def through_the_door(text: str) -> Policy:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "policy.toml"
        file.write_text(text, encoding="utf-8")
        return load(file)


@given(policies())
def test_it_is_the_same_policy(written: Policy) -> None:
    """What is kept comes in by the door, and is the policy that was in force, digest and all."""
    read = through_the_door(toml(written))
    kept = through_the_door(state.text(read))
    assert replace(kept, warnings=()) == replace(read, warnings=())
    assert kept.digest == read.digest
    assert state.text(kept) == state.text(read)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        pytest.param(Probe(parse_address("192.0.2.53"), 2.0, 3), 'every = "2s", fail_after = 3', id="echo"),
        pytest.param(Probe(parse_address("192.0.2.53"), 0.5, 1, 443), 'port = 443, every = "500ms"', id="tcp"),
        pytest.param(Probe(parse_address("2001:db8::53"), 1.25, 9), 'every = "1250ms"', id="a-fraction"),
    ],
)
def test_probes(probe: Probe, words: str) -> None:
    """A probe is kept, and so is whether flows are to be forgotten."""
    inside = replace(INSIDE, probe=probe, flush_flows=True)
    text = state.text(policy(inside, OUTSIDE))
    assert words in text
    kept = through_the_door(text).identity("inside")
    assert (kept.probe, kept.flush_flows) == (probe, True)


@pytest.mark.parametrize("link", ["tun✓", "名", "😀", "a'b", "a.b@c"])
def test_strange_links(link: str) -> None:
    """Whatever name the kernel and the door let a link have, it is kept."""
    kept = through_the_door(state.text(policy(identity("a", 1, link), downstream=["lan", "b✓"])))
    assert kept.identity("a").link == link
    assert kept.downstream == ("b✓", "lan")


def test_for_a_reader() -> None:
    """A prefix a line, in order, so that what has changed is seen; what it is and isn't stands on top."""
    lines = state.text(policy(INSIDE, OUTSIDE)).splitlines()
    assert lines[0].startswith("# The policy that was in force last")
    start = lines.index("members = [")
    assert lines[start : start + 3] == ["members = [", '    "10.9.0.0/24",', "]"]
    assert "mark_mask = 0x3f000000" in lines


def test_a_hundred_thousand_members() -> None:
    """Long lists are kept whole."""
    members = Prefixes.of(Prefix(Family.IPV4, 0x0A000000 + 2 * number, 32) for number in range(100_000))
    kept = through_the_door(state.text(policy(replace(INSIDE, members=members), OUTSIDE)))
    assert kept.identity("inside").members == members


def test_larger_than_any_list_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came in by several lists, each as large as may be, comes back from the one file that it is kept in."""
    text = state.text(policy(INSIDE, OUTSIDE))
    (tmp_path / state.NAME).write_text(text, encoding="utf-8")
    monkeypatch.setattr(draft, "FILE_LIMIT", len(text) - 1)
    assert state.text(state.read(tmp_path / state.NAME)) == text


@given(policies(), st.sampled_from(['"10.0.0.0/8", "10.0.0.0/9"', '"10.0.0.0/8"\n', '"10.0.0.0/8",\n    "nothing",\n']))
def test_at_once(written: Policy, by_hand: str) -> None:
    """What was kept is read without TOML's reader for the members: the same policy, or the very same faults."""
    text = state.text(written)
    assert state.parse(text, Path("applied.toml")) == policy_of(text, Path("applied.toml"))
    changed = re.sub(r"^members = \[[^]]*\]$", f"members = [\n    {by_hand}]", text, flags=re.MULTILINE)
    assert _or_faults(state.parse, changed) == _or_faults(policy_of, changed)


def test_warnings_tell_the_lines_of_the_text() -> None:
    """Members that are not read as TOML leave the lines behind them where they are."""
    text = state.text(policy(INSIDE, OUTSIDE, kernel=Kernel(hook_priority=-150)))
    line = text.splitlines().index("hook_priority = -150") + 1
    (warning,) = state.parse(text, Path("applied.toml")).warnings
    assert warning.startswith(f"applied.toml:{line}: kernel.hook_priority: ")


def _or_faults(read: Callable[[str, Path], Policy], text: str) -> Policy | list[str]:
    try:
        return read(text, Path("applied.toml"))
    except PolicyError as error:
        return error.lines()
