"""What large sets hold, left by one process to the next: the same again, or nothing at all."""

from __future__ import annotations

import pytest

from agent.addresses import Addresses, Family
from agent.kernel.known import Known, dump, load

KNOWN = Known(
    "idmark",
    7,
    {
        "id-inside-ipv4-32": Addresses.of(Family.IPV4, [0, 10 << 24, (1 << 32) - 1]),
        "id-inside-ipv6-64": Addresses.of(Family.IPV6, [1 << 127]),
        "id-outside-ipv4-32": Addresses(Family.IPV4),
    },
)


def test_left_and_found() -> None:
    """What was left is found as it was, by whoever comes at the same boot."""
    assert load(dump(KNOWN, "boot"), "boot") == KNOWN


def test_another_boot() -> None:
    """What was left at another boot is nothing: generations begin anew."""
    with pytest.raises(ValueError, match="of another boot"):
        load(dump(KNOWN, "boot"), "another")


@pytest.mark.parametrize("place", range(len(dump(KNOWN, "boot"))))
def test_damaged(place: int) -> None:
    """One byte that is another, and nothing is believed; nor is what was cut off there."""
    data = dump(KNOWN, "boot")
    for damaged in (data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], data[:place]):
        with pytest.raises(ValueError, match="not whole"):
            load(damaged, "boot")
