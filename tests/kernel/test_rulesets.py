"""The example gateways load into a real kernel as they stand."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from agent.kernel.nfnl import Nfnl
from agent.model import Count, Table
from agent.policy import load
from agent.render import RULESET

EXAMPLES = sorted(path.parent for path in Path(__file__).parents[2].glob("rulesets/*/policy.toml"))
pytestmark = pytest.mark.usefixtures("netns")


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_example_loads_again_and_again(folder: Path) -> None:
    """`nft -f` takes the ruleset twice, the second time changes nothing, and counters keep what they had counted."""
    table = load(folder / "policy.toml").kernel.nft_table
    nft("-f", str(folder / RULESET))
    with Nfnl() as nfnl:
        first = contents(nfnl, table)
        counter = next(iter(nfnl.counts(table)))
        # The only way to make one count without a packet: put it there with a value.
        nft(f"delete table inet {table}; add table inet {table}; "
            f"add counter inet {table} {counter} {{ packets 7 bytes 700 }}")  # fmt: skip
        nft("-f", str(folder / RULESET))
        nft("-f", str(folder / RULESET))
        assert contents(nfnl, table) == first
        assert nfnl.counts(table)[counter] == Count(packets=7, bytes=700)


@pytest.mark.parametrize("name", ["port-forwards.nft"])
def test_operators_own_table_loads(name: str) -> None:
    """The port forwards that stand beside the LAN gateway's policy load as well."""
    (folder,) = (folder for folder in EXAMPLES if (folder / name).exists())
    nft("-f", str(folder / name))


def contents(nfnl: Nfnl, name: str) -> Table:
    """A table whose sets are in order: the kernel's hash tables have none."""
    table = nfnl.table(name)
    assert table is not None
    sets = tuple(replace(nft_set, elements=tuple(sorted(nft_set.elements))) for nft_set in table.sets)
    return replace(table, sets=sets)


def nft(*words: str) -> None:
    """Run nft(8) in the test's namespace."""
    subprocess.run(["nft", *words], check=True)
