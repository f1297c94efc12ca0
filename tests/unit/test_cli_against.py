"""`plan --against`: offline, by exit codes as diff(1), in each format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent import facts, state
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, policy, toml

Idmark = Callable[..., "subprocess.CompletedProcess[str]"]
OTHER = policy(replace(INSIDE, masquerade=True), OUTSIDE)


@pytest.fixture
def idmark(tmp_path: Path) -> Idmark:
    """Run idmark beside two policies, with a state directory of its own."""
    (tmp_path / "policy.toml").write_text(toml(policy(INSIDE, OUTSIDE)), encoding="utf-8")
    (tmp_path / "other.toml").write_text(toml(OTHER), encoding="utf-8")
    (tmp_path / "facts.json").write_text(facts.dump(GATEWAY), encoding="utf-8")
    words = [sys.executable, "-m", "agent", "-c", "policy.toml"]
    root = Path(__file__).parents[2]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        # env: neither root nor a PATH that leads to nft or ip.
        env = {"STATE_DIRECTORY": str(tmp_path / "state"), "PYTHONPATH": str(root), "PATH": "/nonexistent"}
        return subprocess.run([*words, *more], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return run


def test_nothing_changes(idmark: Idmark) -> None:
    """The same policy changes nothing: 0."""
    done = idmark("plan", "--against", "policy.toml")
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, "gw1: nothing changes", "")


def test_something_changes(idmark: Idmark) -> None:
    """Another one does: 1, and what it is stands on stdout."""
    done = idmark("plan", "--against", "other.toml")
    assert (done.returncode, done.stderr) == (1, "")
    assert "  ! identity inside: members are not translated any more: vpn0 shows their own addresses" in done.stdout


@pytest.mark.parametrize(
    "against", [pytest.param("nowhere.toml", id="not-there"), pytest.param("facts.json", id="no-policy")]
)
def test_trouble(idmark: Idmark, against: str) -> None:
    """One that can't be used is trouble: 2, and the fault names that file."""
    done = idmark("plan", "--against", against)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(against)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        pytest.param("text", "gw1: 1 identity changes", id="text"),
        pytest.param("markdown", "### `gw1`: 1 identity changes", id="markdown"),
        pytest.param("html", "<!DOCTYPE html>", id="html"),
    ],
)
def test_format(idmark: Idmark, tmp_path: Path, name: str, begins: str) -> None:
    """Each format goes to stdout, or to a file, and is the same there."""
    done = idmark("plan", "--against", "other.toml", "--format", name)
    assert done.stdout.startswith(begins)
    again = idmark("plan", "--against", "other.toml", "--format", name, "-o", "change")
    assert (again.returncode, again.stdout) == (1, "")
    assert (tmp_path / "change").read_text(encoding="utf-8") == done.stdout


def test_output_that_is_no_file(idmark: Idmark, tmp_path: Path) -> None:
    """A pipe, or a device, is written into and not replaced: root's /dev/null is everybody's."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0) as reader:
        assert idmark("plan", "--against", "other.toml", "-o", "pipe").returncode == 1
        assert reader.read(1 << 16).startswith(b"gw1: 1 identity changes")
    assert pipe.is_fifo()


def test_json(idmark: Idmark) -> None:
    """A program may read it."""
    found = json.loads(idmark("plan", "--against", "other.toml", "--json").stdout)
    assert [(each["name"], each["fate"]) for each in found["identities"]] == [("inside", "changed")]


def test_facts(idmark: Idmark) -> None:
    """With facts what is "auto" is known, and nothing is said to be unknown."""
    assert 'are "auto"' in idmark("plan", "--against", "other.toml").stdout
    done = idmark("plan", "--against", "other.toml", "--facts", "facts.json")
    assert (done.returncode, 'are "auto"' in done.stdout) == (1, False)


def test_applied(idmark: Idmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what was in force last: it is read from the state directory; before the first there is nothing to say."""
    done = idmark("plan", "--against", "applied")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no policy has been in force here yet" in done.stderr
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    state.save(OTHER)
    assert idmark("plan", "--against", "applied").returncode == 1
    state.save(policy(INSIDE, OUTSIDE))
    assert idmark("plan", "--against", "applied").returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--format", "html"], id="format"),
        pytest.param(["-o", "change"], id="output"),
        pytest.param(["--facts", "facts.json"], id="facts"),
        pytest.param(["--against", "other.toml", "--json", "--format", "html"], id="two-formats"),
    ],
)
def test_usage(idmark: Idmark, words: list[str]) -> None:
    """What makes no sense together is refused, in words."""
    done = idmark("plan", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("idmark: plan: ")
