"""A host's facts as a file, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from agent.facts import FactsError, dump, load
from agent.model import Facts
from tests.unit.values import GATEWAY, WAN, hosts, route


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "facts.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@given(hosts())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_there_and_back(tmp_path: Path, facts: Facts) -> None:
    """What was taken on a host is, read from its file, the same facts."""
    assert load(write(tmp_path, dump(facts))) == facts


def test_every_field_there_and_back(tmp_path: Path) -> None:
    """Next hops of the other family, onlink, weights, kinds and sources come back as they were."""
    legs = route("10.66.0.0/16 nexthop via 203.0.113.1 dev wan weight 3 nexthop dev vpn0 weight 1")
    onlink = route("0.0.0.0/0 via fe80::1 dev wan metric 7 src 203.0.113.2")
    onlink = replace(onlink, hops=(replace(onlink.hops[0], onlink=True),))
    wan = replace(WAN, rp_filter=2, src_valid_mark=True, mtu=9000)
    facts = Facts((wan,), (legs, onlink, route("blackhole ::/0")), nat=False)
    assert load(write(tmp_path, dump(facts))) == facts


def test_one_key_a_line() -> None:
    """Facts are written for a change-control repository: a route more is some lines more, and no other one changes."""
    one, two = dump(GATEWAY), dump(replace(GATEWAY, routes=(*GATEWAY.routes, route("10.66.0.0/16 dev lan"))))
    assert two.startswith(one.partition('\n  }\n ],\n "nat"')[0])
    assert '   "destination": "10.66.0.0/16",' in two.splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "is no facts file as `idmark facts` writes it", id="empty"),
        pytest.param(b"\xff\xfe", "is no facts file", id="binary"),
        pytest.param("[]", "is no facts file", id="a-list"),
        pytest.param("null", "is no facts file", id="null"),
        pytest.param("{}", "is no facts file", id="no-routes"),
        pytest.param('{"routes": 7}', "is no facts file", id="routes-not-a-list"),
        pytest.param('{"routes": [7]}', "is no facts file", id="route-not-an-object"),
        pytest.param('{"routes": [{}]}', "is no facts file", id="route-without-destination"),
        pytest.param('{"routes": [{"destination": 7}]}', "is no facts file", id="destination-not-text"),
        pytest.param('{"routes": [{"destination": "10.0.0.1/8"}]}', "has host bits set", id="host-bits"),
        pytest.param('{"routes": [{"destination": "10.0.0.0/8"}]}', "routes.0.table: Field required", id="no-table"),
        pytest.param('{"routes": [], "links": [{"name": "wan"}]}', "links.0.index: Field required", id="no-index"),
    ],
)
def test_no_facts_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    """What is no facts file is refused in one line with the file's name and what is wrong with it."""
    path = write(tmp_path, text)
    with pytest.raises(FactsError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    """A file that isn't there is said so."""
    with pytest.raises(FactsError, match=r"none\.json: No such file or directory$"):
        load(tmp_path / "none.json")


def test_wrong_address(tmp_path: Path) -> None:
    """A wrong value deep in the file is told by its place."""
    document = json.loads(dump(GATEWAY))
    document["links"][1]["addresses"][0]["address"] = "203.0.113.256"
    with pytest.raises(FactsError, match=r"facts\.json: links\.1\.addresses\.0\.address"):
        load(write(tmp_path, json.dumps(document)))


def test_nested_too_deeply(tmp_path: Path) -> None:
    """A file that is nested beyond reason is no facts file either."""
    with pytest.raises(FactsError, match="is no facts file"):
        load(write(tmp_path, "[" * 200_000))
