"""The problem that idmark solves, reproduced: what the test net's probes do while nothing is installed."""

from __future__ import annotations

import pytest

from tests.kernel.conftest import Gateway
from tests.kernel.net import CHOST, INSIDE, OUTSIDE, WILD


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_the_problem(gateway: Gateway, family: str) -> None:
    """Without the agent each identity works only where main's route happens to fit; the far ends drop the rest."""
    o, i, wild, chost = (ends[family] for ends in (OUTSIDE, INSIDE, WILD, CHOST))
    foreign = f"foreign{family[-1]}"

    assert gateway.wild.ping(o)
    assert gateway.chost.ping(i)
    assert gateway.isp.counter(foreign, "bcp38") == gateway.corp.counter(foreign, "bcp38") == 0

    assert not gateway.chost.ping(o, timeout=0.1)
    assert not gateway.gw.ping(chost, o, timeout=0.1)
    assert gateway.corp.counter(foreign, "bcp38") == 2

    assert not gateway.wild.ping(i, timeout=0.1)
    assert not gateway.gw.ping(wild, i, timeout=0.1)
    assert gateway.isp.counter(foreign, "bcp38") == 2
