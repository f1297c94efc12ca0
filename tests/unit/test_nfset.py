"""A change of sets becomes batches of messages, each as long as netlink allows and no longer; many become some."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Addresses, Family
from agent.kernel import nfset
from agent.kernel.attributes import attributes, text
from agent.kernel.elements import pack, unpack
from agent.kernel.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Message
from agent.kernel.nfset import portions, transaction
from agent.model import ElementChange

NONE = Addresses(Family.IPV4)
DELETE, NEW = 0xA0E, 0xA0C
ADD_FLAGS = NLM_F_CREATE | NLM_F_EXCL


def ipv4(first: int, count: int) -> Addresses:
    """That many addresses from 10.0.0.FIRST on."""
    return Addresses.of(Family.IPV4, range(0x0A000000 + first, 0x0A000000 + first + count))


def change(name: str, gone: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]]) -> ElementChange:
    return ElementChange(name, "ipv4_addr", gone, new)


def content(message: Message) -> tuple[int, str, str, bytes]:
    """What a message with elements says: type, table, set, elements."""
    found = attributes(message.body[4:])
    return message.kind, text(found[1]), text(found[2]), found[3]


def test_order() -> None:
    """Between the batch's ends everything goes before anything comes, of whatever set, and the last is answered."""
    marked = (("10.0.0.1", "goto id-a"), ("10.0.0.2", "goto id-b"))
    changes = [change("first", (("10.0.0.0", "goto id-b"), marked[0]), marked), change("second", NONE, ipv4(9, 1))]
    changes.append(change("third", ipv4(7, 1), NONE))
    begin, *messages, end = transaction("idmark", changes)
    assert begin == Message(16, 0, b"\0\0\0\x0a")
    assert end == Message(17, 0, b"\0\0\0\x0a")
    assert [message.flags for message in messages] == [0, 0, ADD_FLAGS, ADD_FLAGS | NLM_F_ACK]
    # A delete names the key alone: that is enough, and what is said besides would have to be right.
    assert [content(message) for message in messages] == [
        (DELETE, "idmark", "first", pack(ipv4(0, 2), "ipv4_addr")),
        (DELETE, "idmark", "third", pack(ipv4(7, 1), "ipv4_addr")),
        (NEW, "idmark", "first", pack(marked, "ipv4_addr")),
        (NEW, "idmark", "second", pack(ipv4(9, 1), "ipv4_addr")),
    ]


def test_nothing() -> None:
    """Without a change there is no batch."""
    assert transaction("idmark", []) == transaction("idmark", [change("m", NONE, NONE)]) == []


@given(st.integers(0, 10_000), st.sampled_from(Family))
def test_lengths(count: int, family: Family) -> None:
    """Every address is in one message, in order; the length of a list fits an attribute's 16 bits; all are aligned."""
    whole = Addresses.of(family, range(count))
    messages = transaction("idmark", [ElementChange("m", f"{family}_addr", (), whole)])[1:-1]
    lists = [content(message)[3] for message in messages]
    assert all(len(data) <= 0xFFFF - 4 for data in lists)
    assert all(len(message.body) % 4 == 0 for message in messages)
    assert b"".join(unpack(data, family).packed for data in lists) == whole.packed


LONGEST = ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", "goto id-" + "z" * 31)
COUNTER = ('0x01000000 . "fifteen-letters"', f'"id-{"z" * 31}-ipv6-misrouted-dropped"')


@pytest.mark.parametrize(
    ("key", "element"),
    [
        pytest.param("ipv6_addr", LONGEST, id="verdict"),
        pytest.param("mark . ifname", COUNTER, id="counter"),
        pytest.param("ipv6_addr . ifname", (f'{LONGEST[0]} . "fifteen-letters"', ""), id="address-and-link"),
    ],
)
def test_lengths_of_others(key: str, element: tuple[str, str]) -> None:
    """The longest elements of each kind fit into the room that is kept for one, so any number fits into messages."""
    assert len(pack([element], key)) <= nfset.ELEMENT_ROOM
    messages = transaction("idmark", [ElementChange("m", key, (), (element,) * 1000)])[1:-1]
    lists = [content(message)[3] for message in messages]
    assert all(len(data) <= 0xFFFF - 4 for data in lists)
    assert b"".join(lists) == pack([element] * 1000, key)


def test_frame() -> None:
    """A batch with the longest names and the most elements of a transaction has less besides them than is kept free."""
    count = nfset.TRANSACTION
    messages = transaction("t" * 255, [ElementChange("m" * 255, "ipv6_addr", (), (LONGEST,) * count)])
    assert sum(16 + len(message.body) for message in messages) <= nfset.ELEMENT_ROOM * count + nfset.FRAME_ROOM


# --- many changes ----------------------------------------------------------------------------------------------------

#: What sets hold: keys and values. Those of "s" and "t" have none.
Held = dict[str, dict[str, str]]
KEYS = st.integers(0, 7).map(lambda number: f"10.0.0.{number}")
MAPS = st.dictionaries(KEYS, st.sampled_from(["goto id-a", "goto id-b"]))
held = st.fixed_dictionaries({"m": MAPS, "n": MAPS, **dict.fromkeys("st", st.dictionaries(KEYS, st.just("")))})


def differences(before: Held, after: Held) -> list[ElementChange]:
    """Addresses packed, as those of sets are."""
    changes = []
    for name in before:
        gone = [(key, value) for key, value in before[name].items() if after[name].get(key) != value]
        new = [(key, value) for key, value in after[name].items() if before[name].get(key) != value]
        if name in "st":
            gone, new = (_packed(pairs) for pairs in (gone, new))  # type: ignore[assignment]
        changes.append(change(name, gone, new))
    return changes


def _packed(pairs: Sequence[tuple[str, str]]) -> Addresses:
    return Addresses.of(Family.IPV4, (0x0A000000 + int(key.rpartition(".")[2]) for key, _ in pairs))


@given(held, held, st.integers(1, 30))
def test_portions(before: Held, after: Held, size: int) -> None:
    """However many transactions a change is made in, each is small, all are legal, and they get there; meanwhile no key
    is missed that was there and is going to be.
    """
    sets = {name: dict(elements) for name, elements in before.items()}
    for part in portions(differences(before, after), size):
        # An old value goes with its new one, so that two is the least.
        assert 0 < sum(len(each.gone) + len(each.new) for each in part) <= max(2, size)
        for each in part:
            for key, value in each.gone:
                assert sets[each.set].pop(key) == value
        for each in part:
            for key, value in each.new:
                assert sets[each.set].setdefault(key, value) is value
        assert all({*before[name]} & {*after[name]} <= {*sets[name]} <= {*before[name], *after[name]} for name in sets)
    assert sets == after


def test_few_are_one() -> None:
    """What fits is one transaction; what doesn't comes first, and then goes."""
    changes = [change("a", ipv4(0, 3), ipv4(9, 2)), change("b", ipv4(7, 1), ipv4(0, 3))]
    assert list(portions(changes, 9)) == [tuple(changes)]
    coming, going = portions(changes, 8)
    assert [(each.set, len(each.gone), len(each.new)) for each in coming] == [("a", 0, 2), ("b", 0, 3)]
    assert [(each.set, len(each.gone), len(each.new)) for each in going] == [("a", 3, 0), ("b", 1, 0)]
    assert len(list(portions(changes, 3))) == 4


def test_addresses_stay_packed() -> None:
    """Portions of packed addresses are packed too: there is no Python object for each."""
    for part in portions([change("a", ipv4(0, 30), ipv4(90, 30))], 8):
        assert all(isinstance(each.new, Addresses) or not each.new for each in part)
        assert all(isinstance(each.gone, Addresses) or not each.gone for each in part)
