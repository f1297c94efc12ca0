"""Classes of packets: split by what is asked of them, so that each answer of all of them is found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from agent.addresses import Prefix
from agent.given import Choices, Given, Question, follow

CHOICES = Choices({("a", "b"): [*product(range(3), range(4))], ("c",): [(n,) for n in range(5)]})
PACKETS = [{"a": a, "b": b, "c": c} for a, b, c in product(range(3), range(4), range(5))]

#: Questions by the properties that they look at: (names, remainders, modulus).
questions = st.lists(
    st.tuples(
        st.sampled_from([("a",), ("b",), ("c",), ("a", "b"), ("b", "c")]),
        st.integers(1, 4),
        st.integers(2, 4),
    ),
    max_size=6,
)


def answer(values: tuple[int, ...], factor: int, modulus: int) -> int:
    return sum(int(factor**place) * value for place, value in enumerate(values, 1)) % modulus


@drawn(before=questions, after=questions)
def test_every_answer_is_found(
    before: list[tuple[tuple[str, ...], int, int]], after: list[tuple[tuple[str, ...], int, int]]
) -> None:
    """Whatever is asked, what is found is what the packets say one by one, also where ways meet again in between."""

    def run(given: Given) -> tuple[int, tuple[int, ...]]:
        state = sum(given.tell(names, lambda *values, f=f, m=m: answer(values, f, m)) for names, f, m in before) % 3
        given.join(state)
        return state, tuple(given.tell(names, lambda *values, f=f, m=m: answer(values, f, m)) for names, f, m in after)

    def alone(packet: dict[str, int]) -> tuple[int, tuple[int, ...]]:
        def said(asked: list[tuple[tuple[str, ...], int, int]]) -> list[int]:
            return [answer(tuple(packet[name] for name in names), f, m) for names, f, m in asked]

        return sum(said(before)) % 3, tuple(said(after))

    assert {found for _, found in follow(run, CHOICES)} == {alone(packet) for packet in PACKETS}


def remainder(number: int) -> Callable[[Any], int]:
    return lambda value: int(value) % (number + 1)


#: What may be asked: (kind, property, number), each of its own kind of question.
asked = st.lists(
    st.tuples(st.sampled_from(["tell", "within", "first", "both", "all"]), st.sampled_from("abc"), st.integers(0, 7)),
    max_size=8,
)


@drawn(
    pairs=st.sets(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=40),
    thirds=st.sets(st.integers(0, 15), min_size=1),
    before=asked,
    after=asked,
)
def test_whatever_is_left_of_pairs(
    pairs: set[tuple[int, int]], thirds: set[int], before: list[tuple[str, str, int]], after: list[tuple[str, str, int]]
) -> None:
    """Of any pairs of values, whichever way they are asked and whatever is kept of the answers, the classes are those
    that the packets say one by one; each packet is in one, and the example is one of them.
    """
    kept: dict[tuple[str, int], Question] = {}

    def both(name: str, number: int) -> Question:
        other = "abc"[("abc".index(name) + 1) % 3]
        new = Question((name, other), lambda head, value: (head + value) % 3, remainder(number), {})
        return kept.setdefault((name, number), new)

    def put(given: Given, kind: str, name: str, number: int) -> object:
        match kind:
            case "tell":
                return given.tell((name,), remainder(number))
            case "within":
                return given.within(name, frozenset(range(number, 16, 3)))
            case "first":
                return given.first(name, (Prefix.parse(f"0.0.0.{number & ~1}/31"), Prefix.parse("0.0.0.0/29")))
            case "both":
                return given.ask(both(name, number))
        less = Question((name,), lambda value: value > number)
        return given.all_of([less, both(name, number)._replace(by=lambda head, value: head < value, known=None)])

    def run(given: Given) -> tuple[object, ...]:
        state = sum(hash(put(given, *each)) for each in before) % 3
        given.join(state)
        return state, *(put(given, *each) for each in after)

    packets = [{"a": a, "b": b, "c": c} for (a, b), c in product(sorted(pairs), sorted(thirds))]
    choices = Choices({("a", "b"): sorted(pairs), ("c",): [(third,) for third in sorted(thirds)]})
    alone = {run(Given.of(**packet)) for packet in packets}
    ways = list(follow(run, choices))
    assert {found for _, found in ways} == alone
    for given, found in ways:
        told = {name: value for name in "abc" if (value := given.example(name)) is not None}
        assert any(told.items() <= packet.items() and run(Given.of(**packet)) == found for packet in packets)


def test_what_is_not_asked_is_not_split() -> None:
    """Packets that answer alike go one way together; an example is told of what was asked alone, the first choice."""
    ((given, found),) = follow(lambda given: given.within("c", frozenset(range(9))), CHOICES)
    assert (found, given.example("c"), given.example("a")) == (True, 0, None)


def test_the_rest_stays_together() -> None:
    """Those that do not hold a conjunction are one class, wherever it failed."""

    def run(given: Given) -> bool:
        return given.all_of([Question(("a",), lambda a: a == 1), Question(("b",), lambda b: b == 2)])

    assert [found for _, found in follow(run, CHOICES)] == [False, True]


def test_a_stretch_is_gone_once() -> None:
    """Whoever is split off behind a stretch of the way gets what it came to, and goes on with the next question."""
    gone = []

    def run(given: Given) -> tuple[int, int]:
        a = given.once("stretch", lambda: gone.append(1) or given.tell(("a",), int))  # type: ignore[func-returns-value]
        return a, given.tell(("c",), int)

    assert sorted(found for _, found in follow(run, CHOICES)) == [*product(range(3), range(5))]
    assert len(gone) == 3


def test_what_may_happen_is_tried_both_ways() -> None:
    """What is supposed of the host is tried both ways, once, and only where somebody asks."""

    def run(given: Given) -> tuple[bool, ...]:
        return (given.suppose("down", "wan"), given.suppose("down", "wan")) if given.within("a", frozenset({0})) else ()

    assert {found for _, found in follow(run, CHOICES)} == {(False, False), (True, True), ()}
    assert Given.of(a=0).suppose("down", "wan") is False


@pytest.mark.parametrize(
    ("address", "place"),
    [
        pytest.param("10.9.0.5", 0, id="first"),
        pytest.param("10.8.0.5", 1, id="second"),
        pytest.param("192.0.2.1", None, id="none"),
    ],
)
def test_first_network(address: str, place: int | None) -> None:
    """Of networks the first in their order that holds an address is told."""
    networks = (Prefix.parse("10.9.0.0/24"), Prefix.parse("10.0.0.0/8"))
    assert Given.of(source=Prefix.parse(address).address).first("source", networks) == place
