"""Elements by netlink: the kernel has what was sent, whole or not at all, and gives it back."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address

import pytest

from agent.kernel import KernelError, nfset
from agent.kernel.elements import Elements
from agent.kernel.nfnl import Nfnl
from agent.kernel.nfset import Change, FullError, Nfset, StaleError, following
from agent.model import NftSet
from tests.kernel.net import Host

NONE = Elements(4)
NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
NEWSETELEM, DELSETELEM, NEWGEN = 0xA0C, 0xA0E, 0xA0F
#: Enough for more than one message in a transaction, and for more than one transaction.
MANY = nfset.TRANSACTION + 1000


def marks(*values: int) -> bytes:
    """Marks as registers have them."""
    return struct.pack(f"={len(values)}I", *values)


def ipv4(*addresses: str) -> bytes:
    """Addresses as keys."""
    return b"".join(IPv4Address(address).packed for address in addresses)


def pairs(elements: Elements) -> dict[bytes, bytes]:
    """Values by keys, in no order."""
    size = elements.key_bytes
    return {
        elements.keys[place * size : (place + 1) * size]: elements.values[place * 4 : place * 4 + 4]
        for place in range(len(elements))
    }


#: Two keys, and room for one more.
MAP = """
table inet t {
    map m {
        type ipv4_addr : mark
        size 3
        elements = { 10.9.0.5 : 0x01000000, 10.9.0.6 : 0x02000000 }
    }
    set s {
        type ipv4_addr
        size 8
    }
}
"""
HELD = Elements(4, ipv4("10.9.0.5", "10.9.0.6"), marks(0x01000000, 0x02000000))


@pytest.mark.parametrize("valued", [pytest.param(True, id="map"), pytest.param(False, id="set")])
@pytest.mark.parametrize(
    ("kind", "size"), [pytest.param("ipv4_addr", 4, id="ipv4"), pytest.param("ipv6_addr", 16, id="ipv6")]
)
def test_filled(netns: Host, kind: str, size: int, valued: bool) -> None:
    """What is filled in, in whatever order, is what nft loads from text: to nft's eyes, to Nfnl's and to our own."""
    order = random.Random(5)  # noqa: S311
    keys = [order.randbytes(size) for _ in range(MANY)]
    values = [order.randrange(1 << 32) if valued else 0 for _ in keys]
    address = IPv4Address if size == 4 else IPv6Address
    words = [
        f"{address(key)} : {value}" if valued else f"{address(key)}" for key, value in zip(keys, values, strict=True)
    ]
    shape = ("map", f"{kind} : mark") if valued else ("set", kind)
    holds = "{} {} {{ type {}; size {}; {} }}\n"
    text = f"elements = {{ {', '.join(words)} }};"
    netns.nft(
        "table inet t {\n"
        + holds.format(shape[0], "text", shape[1], 2 * MANY, text)
        + holds.format(shape[0], "netlink", shape[1], 2 * MANY, "")
        + "}\n"
    )
    shuffled = order.sample(range(MANY), MANY)
    elements = Elements(
        size,
        b"".join(keys[place] for place in shuffled),
        marks(*(values[place] for place in shuffled)) if valued else b"",
    )
    with Nfset() as sets, Nfnl() as nfnl:
        sets.fill("t", "netlink", elements)
        assert pairs(sets.elements("t", "netlink", size, valued=valued)) == pairs(elements)
        assert pairs(sets.elements("t", "text", size, valued=valued)) == pairs(elements)
        table = nfnl.table("t")
    assert table
    assert (
        len({NftSet("", each.key, each.value, each.interval, tuple(sorted(each.elements))) for each in table.sets}) == 1
    )
    listed = [netns.nft_json("list", shape[0], "inet", "t", name)[0][shape[0]]["elem"] for name in ("text", "netlink")]
    assert sorted(map(str, listed[0])) == sorted(map(str, listed[1]))


@pytest.fixture
def two(netns: Host) -> Host:
    """A map with two keys and room for one more, and an empty set."""
    netns.nft(MAP)
    return netns


def test_change(two: Host) -> None:
    """In one commit a key goes, one comes and one gets another value; a set of the same table changes with it."""
    changes = [
        Change("m", HELD, Elements(4, ipv4("10.9.0.7"), marks(0x03000000))),
        Change("s", NONE, Elements(4, ipv4("10.9.0.1"))),
    ]
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        sets.commit("t", changes, before)
        assert nfnl.generation() == following(before)
        again = [Change("m", changes[0].new, Elements(4, ipv4("10.9.0.7"), marks(0x01000000)))]
        sets.commit("t", again, following(before))
        assert pairs(sets.elements("t", "m", 4, valued=True)) == {ipv4("10.9.0.7"): marks(0x01000000)}
        assert pairs(sets.elements("t", "s", 4, valued=False)) == {ipv4("10.9.0.1"): b""}


NEW = Elements(4, ipv4("10.9.0.7"), marks(0x01000000))


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        pytest.param(
            [Change("m", Elements(4, ipv4("10.9.0.6", "10.9.0.8")), NEW)],
            StaleError,
            "the table, the set or an element is not there (No such file or directory)",
            id="delete-what-is-not-there",
        ),
        pytest.param(
            [Change("m", NONE, NEW), Change("other", NONE, NEW)],
            StaleError,
            "the table, the set or an element is not there (No such file or directory)",
            id="no-such-set",
        ),
        pytest.param(
            [Change("m", NONE, HELD)],
            StaleError,
            "an element is there already (File exists)",
            id="add-what-is-there",
        ),
        pytest.param(
            [Change("m", NONE, Elements(4, HELD.keys[:4], marks(0x03000000)))],
            StaleError,
            "an element is there already (File exists)",
            id="another-value-without-delete",
        ),
        pytest.param(
            [Change("m", NONE, Elements(4, ipv4("10.9.0.7", "10.9.0.8"), marks(1, 1)))],
            FullError,
            "the set is full (Too many open files in system)",
            id="full",
        ),
        pytest.param(
            [Change("m", NONE, NEW), Change("s", NONE, HELD)],
            KernelError,
            "Invalid argument",
            id="values-for-a-set",
        ),
        pytest.param(
            [Change("m", NONE, Elements(4, bytes(4 * 700_000), bytes(4 * 700_000)))],
            KernelError,
            "Message too long",
            id="too-much-for-one-send",
        ),
        pytest.param(
            [Change("m", Elements(4, ipv4(f"10.8.{place >> 8}.{place & 255}")), NONE) for place in range(2000)],
            StaleError,
            "the table, the set or an element is not there (No such file or directory)",
            id="more-errors-than-there-is-room-for",
        ),
    ],
)
def test_refused(two: Host, changes: list[Change], error: type[KernelError], why: str) -> None:
    """A change of which any part is refused changes nothing, says why, and the next one is taken."""
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        with pytest.raises(KernelError) as raised:
            sets.commit("t", changes)
        assert (type(raised.value), raised.value.why) == (error, why)
        assert raised.value.doing == "change elements in nft table inet t"
        assert pairs(sets.elements("t", "m", 4, valued=True)) == pairs(HELD)
        assert nfnl.generation() == before
        sets.commit("t", [Change("m", NONE, NEW)], before)
        assert len(sets.elements("t", "m", 4, valued=True)) == 3


def test_change_in_a_full_set(two: Host) -> None:
    """What goes makes room for what comes in the same commit, so that a set is full by what it will hold."""
    full = Elements(4, HELD.keys + NEW.keys, HELD.values + NEW.values)
    after = Elements(4, ipv4("10.9.0.5", "10.9.0.6", "10.9.0.8"), marks(1, 2, 3))
    with Nfset() as sets:
        sets.commit("t", [Change("m", NONE, NEW)])
        sets.commit("t", [Change("m", full, after)])
        assert pairs(sets.elements("t", "m", 4, valued=True)) == pairs(after)


def test_stale_generation(two: Host) -> None:
    """A change that was made for an older ruleset is refused, however far from the set its last change was."""
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        two.nft("table inet foreign { }\n")
        with pytest.raises(StaleError, match="somebody else changed the ruleset"):
            sets.commit("t", [Change("m", NONE, NEW)], before)
        assert pairs(sets.elements("t", "m", 4, valued=True)) == pairs(HELD)
        sets.commit("t", [Change("m", NONE, NEW)], following(before))


def test_monitored(two: Host) -> None:
    """Who listens is told of a change whole, with one new generation behind it, and nothing of a refused one."""
    half = [Change("s", NONE, Elements(4, ipv4("10.9.0.1"))), Change("m", Elements(4, ipv4("10.9.0.8")), NONE)]
    whole = [Change("m", Elements(4, HELD.keys[:4]), Elements(4, HELD.keys[:4], marks(0x02000000)))]
    with Nfset() as sets, two.events(NETLINK_NETFILTER, NFNLGRP_NFTABLES) as events:
        with pytest.raises(StaleError):
            sets.commit("t", half)
        assert events.kinds() == []
        sets.commit("t", whole)
        assert events.kinds() == [DELSETELEM, NEWSETELEM, NEWGEN]


def test_nothing_to_change(two: Host) -> None:
    """A change of nothing is no commit, so that the generation stays."""
    with Nfset() as sets, Nfnl() as nfnl:
        before = nfnl.generation()
        sets.commit("t", [Change("m", NONE, NONE)], before)
        sets.fill("t", "m", NONE)
        assert nfnl.generation() == before


def test_nothing_there(two: Host) -> None:
    """A set without elements, a set that is not there and a table that is not there hold nothing."""
    with Nfset() as sets:
        found = [sets.elements(table, name, 4, valued=False) for table, name in (("t", "s"), ("t", "no"), ("no", "s"))]
    assert found == [NONE] * 3


def test_another_shape(two: Host) -> None:
    """A set with elements of another shape than expected is not read as something that it is not."""
    with Nfset() as sets, pytest.raises(KernelError, match=r"read the elements of m .*: not elements with keys of 16"):
        sets.elements("t", "m", 16, valued=True)


def test_fill_twice(two: Host) -> None:
    """To fill in what is there already is an error that names the set, not a silent success."""
    with Nfset() as sets, pytest.raises(StaleError, match="fill m in nft table inet t: an element is there already"):
        sets.fill("t", "m", HELD)


FILL = """
import os
from agent.kernel.elements import Elements
from agent.kernel.nfset import Change, Nfset
elements = Elements(16, os.urandom(16 * {many}), bytes(4 * {many}))
with Nfset() as sets:
    sets.fill("t", "m", elements)
    assert len(sets.elements("t", "m", 16, valued=True)) == len(elements)
"""


def test_in_a_user_namespace(netns: Host) -> None:
    """Where the kernel refuses a large buffer, large sets are filled all the same."""
    script = f"add table inet t\nadd map inet t m {{ type ipv6_addr : mark; size {2 * MANY}; }}\n"
    load = f"import subprocess\nsubprocess.run(['nft', '-f', '-'], input={script!r}, text=True, check=True)\n"
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", load + FILL.format(many=MANY)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stderr) == (0, "")
