"""What the daemon writes down for the other verbs."""

from __future__ import annotations

import json
import time
from dataclasses import replace

from agent.ledger import REPAIRS, STALE, Ledger, Repair


def test_last_repairs() -> None:
    """The last repairs are kept in their order, and the oldest go."""
    ledger = Ledger(pid=1, since=0.0)
    for number in range(REPAIRS + 5):
        ledger = ledger.repaired(Repair(float(number), "rule", f"+ ip rule add priority {number}"))
    assert [repair.at for repair in ledger.repairs] == [float(number) for number in range(5, REPAIRS + 5)]


def test_plain() -> None:
    """As JSON it is whole: who is down and why, and the repairs with their words."""
    ledger = Ledger(7, 1.5, "abc", True, {"inside": "its probe is not answered"}, (Repair(2.5, "nft", "+ nft"),))
    assert json.loads(json.dumps(ledger.plain())) == {
        "pid": 7,
        "since": 1.5,
        "policy": "abc",
        "in_sync": True,
        "down": {"inside": "its probe is not answered"},
        "repairs": [{"at": 2.5, "kind": "nft", "words": "+ nft"}],
        "at": 0.0,
    }


def test_when_to_publish() -> None:
    """What says nothing new is published again only when what was published gets old."""
    now = time.time()
    ledger = Ledger(7, 1.5)
    assert ledger.tells_more_than(None)
    assert not ledger.tells_more_than(replace(ledger, at=now))
    assert ledger.tells_more_than(replace(ledger, at=now - STALE))
    assert ledger.tells_more_than(replace(ledger, at=now, in_sync=True))
