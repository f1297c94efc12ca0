"""The document's two readers: one for what is good, and the schema, which has the words for what is not."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agent import document, schema
from agent.document import read_document

#: By key what may stand there, and what may not.
WORDS = st.sampled_from(["auto", "none", "main", "wan", "10.9.0.1", "10.9.0.0/24", "2001:db8::1", "file:a", "2s", ""])
SCALARS = WORDS | st.integers(-1, 70) | st.sampled_from([1 << 64, 0x3F000000, -145]) | st.booleans() | st.floats(0, 1)
VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(["a", "target"]), SCALARS, max_size=2)
)

GOOD: dict[str, dict[str, Any]] = {
    "probe": {"target": "192.0.2.1", "every": "500ms", "fail_after": 5, "port": 443},
    "identity": {
        "id": 1,
        "link": "wg0",
        "addresses": ["192.0.2.130", "2001:db8:4::130"],
        "members": ["10.9.0.0/24", "file:members.txt"],
        "next_hop": ["192.0.2.129", "fe80::1"],
        "when_down": "main",
        "masquerade": True,
        "clamp_mss": True,
        "flush_flows": True,
    },
    "kernel": {
        "mark_mask": 0xFF0000,
        "table_base": 100,
        "rule_priority": 200,
        "nft_table": "idmark_2",
        "hook_priority": -140,
        "enforce": False,
        "way_bits": 2,
        "nat": False,
        "drop_own_sources": True,
    },
}


@st.composite
def tables(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A table most of whose keys are good; some are missing, some have any value, one may be no key at all."""
    found = {key: value for key, value in GOOD[kind].items() if draw(st.integers(0, 9))}
    for key in draw(st.sets(st.sampled_from([*found, "unknown"]), max_size=1)) if draw(st.booleans()) else ():
        found[key] = draw(VALUES)
    if kind == "identity" and draw(st.booleans()):
        found["probe"] = draw(tables("probe"))
    return found


documents = st.fixed_dictionaries(
    {"gateway": st.just("gw1") | VALUES, "identity": st.dictionaries(st.just("inside"), tables("identity")) | VALUES},
    optional={"downstream": st.just(["lan"]) | VALUES, "kernel": tables("kernel") | VALUES, "other": VALUES},
)


def same(model: object, plain: object) -> bool:
    """Whether pydantic's model holds what the plain table does."""
    if isinstance(model, BaseModel):
        return all(same(getattr(model, each.name), getattr(plain, each.name)) for each in fields(plain))  # type: ignore[arg-type]
    if isinstance(model, dict):
        return isinstance(plain, dict) and all(same(value, plain[key]) for key, value in model.items())
    return model == plain and type(model) is type(plain)


@given(documents)
def test_both_readers_agree(tables: dict[str, Any]) -> None:
    """What the schema finds no fault with is read, to the same values; and with what it finds at fault nobody is left
    alone: the rest is read all the same.
    """
    expected = copy.deepcopy(tables)
    found = schema.faults(expected)  # puts None where a fault is
    read, faults = read_document(tables)
    assert faults == found
    assert same(schema.Document.model_validate(expected), read)


@pytest.mark.parametrize("name", ["Document", "IdentityTable", "KernelTable", "ProbeTable"])
def test_same_keys(name: str) -> None:
    """Both readers know the same keys."""
    plain: Any = getattr(document, name)
    assert {each.name for each in fields(plain)} == set(getattr(schema, name).model_fields)
