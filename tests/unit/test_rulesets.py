"""The example gateways are what their policies render to."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import facts, render
from agent.desired import desire
from agent.policy import load

EXAMPLES = sorted(path.parent for path in Path(__file__).parents[2].glob("rulesets/*/policy.toml"))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_example_is_what_its_policy_renders_to(folder: Path) -> None:
    """What stands in the folder is, byte for byte, what the policy beside it renders to, with its facts if any."""
    known = folder / "facts.json"
    desired = desire(load(folder / "policy.toml"), facts.load(known) if known.exists() else None)
    assert render.files(desired) == {
        name: (folder / name).read_text(encoding="utf-8") for name in (render.RULESET, render.ROUTING)
    }
    assert not desired.faults


def test_there_are_examples() -> None:
    """At least five gateways of real life are shown."""
    assert len(EXAMPLES) >= 5
