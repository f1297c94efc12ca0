"""Plans as files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given

from agent import planfile
from agent.addresses import Family, Prefix
from agent.desired import desire
from agent.model import Policy, Route
from agent.plan import AddRoute, Observed, Plan, plan
from agent.planfile import PlanFileError, Reviewed
from agent.policy import load
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, policies, policy, toml


def written(path: Path, chosen: Policy) -> tuple[Policy, Plan]:
    """A plan file of a policy as the door lets it in."""
    source = path.with_suffix(".toml")
    source.write_text(toml(chosen), encoding="utf-8")
    through = load(source)
    steps = plan(desire(through, GATEWAY), Observed())
    planfile.write(path, through, steps)
    return through, steps


@given(chosen=policies())
def test_read_as_written(tmp_path_factory: pytest.TempPathFactory, chosen: Policy) -> None:
    """What is written is read, policy and digest and text, and nothing has moved then."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    through, steps = written(path, chosen)
    reviewed = planfile.read(path)
    assert (reviewed.policy.digest, reviewed.text, reviewed.digest) == (through.digest, steps.text, steps.digest)
    assert list(reviewed.moved(steps)) == []


def test_for_a_reader(tmp_path: Path) -> None:
    """A line a change and a line a line of the policy, for its owner's eyes alone."""
    path = tmp_path / "plan.json"
    _, steps = written(path, policy(INSIDE, OUTSIDE))
    lines = path.read_text().splitlines()
    assert f'  "{steps.text.splitlines()[0]}",' in lines
    assert '  "gateway = \\"gw1\\"",' in lines
    assert path.stat().st_mode & 0o777 == 0o600


def test_moved(tmp_path: Path) -> None:
    """What is gone and what is new, each with its sign."""
    path = tmp_path / "plan.json"
    _, steps = written(path, policy(INSIDE, OUTSIDE))
    fewer = Plan(steps.steps[1:])
    first = [f"< {line}" for line in steps.steps[0].lines()]
    assert list(planfile.read(path).moved(fewer)) == first


def test_all_of_a_large_one_moved() -> None:
    """Where a list of 20,000 prefixes is another identity's now, each line is told, and nobody waits for hours."""
    was, now = ([AddRoute(Route(Prefix(Family.IPV4, n << 8, 24), table)) for n in range(20_000)] for table in (1, 2))
    told = list(Reviewed(policy(INSIDE), Plan(tuple(was)).text, "").moved(Plan(tuple(now))))
    assert sorted(line[0] for line in told) == ["<"] * 20_000 + [">"] * 20_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "this is no plan", id="empty"),
        pytest.param("[]", "this is no plan", id="a-list"),
        pytest.param('{"idmark_plan": 2}', "its format is 2, and not 1", id="of-a-later-version"),
        pytest.param("[" * 100_000, "this is no plan", id="deep"),
        pytest.param('{"idmark_plan": 1, "changes": [], "policy": [], "digest": "x", "policy_digest": ""}', "altered"),
        pytest.param(
            '{"idmark_plan": 1, "changes": ["\\ud800"], "policy": [], "digest": "x", "policy_digest": ""}',
            "this is no plan",
            id="no-text",
        ),
    ],
)
def test_no_plan(tmp_path: Path, text: str, words: str) -> None:
    """A file that is no plan is told with its name and why."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanFileError, match=words) as told:
        planfile.read(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("key", ["changes", "policy"])
def test_altered(tmp_path: Path, key: str) -> None:
    """A file in which somebody has changed a line is no plan any more."""
    path = tmp_path / "plan.json"
    written(path, policy(INSIDE, OUTSIDE))
    document = json.loads(path.read_text())
    document[key] = [line.replace("vpn0", "vpn1") for line in document[key]]
    path.write_text(json.dumps(document))
    with pytest.raises(PlanFileError, match="it was altered"):
        planfile.read(path)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """A device or a pipe is written into, and stays what it is: /dev/null is everybody's. A folder is refused."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with open(os.open(path, os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        planfile.write(path, policy(INSIDE), Plan(()))
        assert json.loads(pipe.read(1 << 16))["gateway"] == "gw1"
    assert path.is_fifo()
    with pytest.raises(PlanFileError, match="Is a directory"):
        planfile.write(tmp_path, policy(INSIDE), Plan(()))


def test_where_it_cannot_be(tmp_path: Path) -> None:
    """A file that can't be written or read is told."""
    path = tmp_path / "nowhere" / "plan.json"
    with pytest.raises(PlanFileError, match=re.escape(f"write {path}: No such file")):
        planfile.write(path, policy(INSIDE, OUTSIDE), Plan(()))
    with pytest.raises(PlanFileError, match=re.escape(f"read {path}: No such file")):
        planfile.read(path)
