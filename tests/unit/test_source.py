"""When a policy's files count as changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.policy import PolicyError
from agent.source import Source

POLICY = """
gateway = "gw1"
[identity.inside]
id = 1
link = "vpn0"
addresses = ["192.0.2.130"]
next_hop = "none"
members = ["file:members.txt"]
"""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A policy with a list, both read."""
    (tmp_path / "members.txt").write_text("10.9.0.0/24\n")
    (tmp_path / "policy.toml").write_text(POLICY)
    source = Source(tmp_path / "policy.toml")
    source.read()
    return source


def changed(source: Source) -> tuple[bool, bool]:
    """Whether the files have changed, asked twice."""
    return source.has_changed(), source.has_changed()


def test_nothing(source: Source) -> None:
    """What was read and left alone has not changed."""
    assert changed(source) == (False, False)


@pytest.mark.parametrize("name", ["policy.toml", "members.txt"])
def test_written(source: Source, name: str) -> None:
    """A policy or a list that was written to has changed when it is the same at two questions: it may be half done."""
    with (source.path.parent / name).open("a") as file:
        file.write("# more\n")
    assert changed(source) == (False, True)
    source.read()
    assert changed(source) == (False, False)


def test_being_written(source: Source) -> None:
    """A file that changes between each two questions is not read."""
    for _ in range(5):
        with source.path.open("a") as file:
            file.write("# more\n")
        assert not source.has_changed()
    assert source.has_changed()


def test_replaced(source: Source) -> None:
    """Another file of the same size and time has changed."""
    status = source.path.stat()
    new = source.path.with_suffix(".new")
    new.write_text(POLICY.replace("gw1", "gw2"))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(source.path)
    assert changed(source) == (False, True)
    assert source.read().gateway == "gw2"


def test_faulty(source: Source) -> None:
    """A faulty policy is not read again and again, but when it, or a list that it had named before, has changed."""
    source.path.write_text("gateway = ")
    assert changed(source) == (False, True)
    with pytest.raises(PolicyError):
        source.read()
    assert changed(source) == (False, False)
    source.path.write_text(POLICY)
    assert changed(source) == (False, True)
    source.read()
    (source.path.parent / "members.txt").write_text("10.9.0.0/25\n")
    assert changed(source) == (False, True)


@pytest.mark.parametrize("name", ["policy.toml", "members.txt"])
def test_gone(source: Source, name: str) -> None:
    """A file that is gone has changed, and once more when it is back."""
    path = source.path.parent / name
    text = path.read_text()
    path.unlink()
    assert changed(source) == (False, True)
    with pytest.raises(PolicyError):
        source.read()
    assert changed(source) == (False, False)
    path.write_text(text)
    assert changed(source) == (False, True)
    source.read()
    assert changed(source) == (False, False)
