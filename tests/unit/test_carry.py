"""A counter never goes backwards by our doing: what is carried on, from reading to reading and from start to start."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.carry import Carried, Carry, carry
from agent.kernel import KernelError
from agent.model import Count

NAME = "id-inside-ipv4-transmit"

#: A life of a counter: what each of those that had the name had counted when it was read.
lives = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 900)), min_size=1, max_size=4).map(sorted),
    min_size=1,
    max_size=4,
)


@given(lives)
def test_never_backwards(life: list[list[tuple[int, int]]]) -> None:
    """Whatever happens to a counter, its total never falls, and is the sum of what all of them had last."""
    known: Carried | None = None
    had = before = Count()
    for handle, readings in enumerate(life, start=1):
        packets = size = 0
        for packets, more in readings:
            size = max(size, more)
            known = carry(known, Count(packets, size, handle))
            assert known.total.packets >= had.packets
            assert known.total.bytes >= had.bytes
            had = known.total
            assert had == Count(before.packets + packets, before.bytes + size)
        before = Count(before.packets + packets, before.bytes + size)


def test_another_counter() -> None:
    """Another counter of the same name adds to what the first had, also where it has counted more than that."""
    known = carry(carry(None, Count(5, 500, handle=1)), Count(7, 700, handle=2))
    assert known.total == Count(12, 1200)


def test_reset() -> None:
    """`nft reset counters` keeps the handle: a counter that holds less than before adds to what it had."""
    known = carry(carry(None, Count(5, 500, handle=1)), Count(2, 200, handle=1))
    assert known.total == Count(7, 700)


def test_over_a_restart(tmp_path: Path) -> None:
    """What was saved goes on: the counter that is there still, and another one in its place."""
    first = Carry(tmp_path / "counters.json")
    first.load()
    first.totals({NAME: Count(5, 500, handle=1)})
    first.save()
    second = Carry(tmp_path / "counters.json")
    second.load()
    assert second.totals({NAME: Count(6, 600, handle=1)}) == {NAME: Count(6, 600)}
    assert second.totals({NAME: Count(1, 100, handle=2)}) == {NAME: Count(7, 700)}


def test_removed_and_there_again(tmp_path: Path) -> None:
    """The counters of an identity that was taken away go on when it is there again, also after a restart."""
    first = Carry(tmp_path / "counters.json")
    first.totals({NAME: Count(5, 500, handle=1)})
    first.totals({})
    first.save()
    second = Carry(tmp_path / "counters.json")
    second.load()
    assert second.totals({NAME: Count(1, 100, handle=9)}) == {NAME: Count(6, 600)}


def test_when_to_save(tmp_path: Path) -> None:
    """There is something to save when a counter is new, another one or was reset, not when it only counts on."""
    counters = Carry(tmp_path / "counters.json")
    changes = []
    for count in (Count(5, 500, handle=1), Count(6, 600, handle=1), Count(0, 0, handle=1), Count(0, 0, handle=2)):
        counters.totals({NAME: count})
        changes.append(counters.changed)
        counters.save()
    assert changes == [True, False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut-off"),
        pytest.param("[1, 2]", id="list"),
        pytest.param('{"a": 1}', id="number"),
        pytest.param('{"a": [1, 2]}', id="too-short"),
        pytest.param('{"a": [1, 2, 3, 4, -5]}', id="negative"),
        pytest.param('{"a": [1, 2, 3, 4, true]}', id="no-number"),
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_unreadable(tmp_path: Path, text: str) -> None:
    """A file that is no record of counters is said to be none, and counters begin from 0."""
    file = tmp_path / "counters.json"
    file.write_text(text)
    counters = Carry(file)
    with pytest.raises(KernelError, match=f"read {file}: .*begin again from 0"):
        counters.load()
    assert counters.totals({NAME: Count(1, 100, handle=9)}) == {NAME: Count(1, 100)}


def test_nowhere_to_write(tmp_path: Path) -> None:
    """A file that can't be written is said to be so."""
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match=r"write .*Not a directory|write .*File exists"):
        Carry(tmp_path / "file" / "counters.json").save()
