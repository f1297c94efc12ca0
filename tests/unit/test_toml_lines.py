"""The lines of a TOML document's keys and elements: right, or those of what is around them."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.toml_lines import Lines, Place

DOCUMENT = (
    r'''# a comment with [brackets] and key = 1
gateway = "gw # no comment" # a comment

"quoted.key" = [ # before
  "a ] \" # b", '[', # after
  # between
  [1, 2,
   3], { x = 1, y.z = "}" },
]
text = """
key = "not a key"
[nor.a.table]
ends in quotes"""""
other = 'C:\'
'''
    + r"""raw = '''
[neither]
''''
when = 1979-05-27 07:32:00Z
a . "b \u00e9" .c = 1e5

[ identity . 'in side' ] # header
id=1
next.hop = [ ]
[identity.bob]
id = 2
[[list]]
x = 7
[[list]]
x = 2
[list.sub]
y = 3
[[list.deep]]
z = 4
[identity]
late = true
"""
)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        pytest.param(("gateway",), "gateway =", id="key"),
        pytest.param(("quoted.key",), '"quoted.key"', id="quoted-key"),
        pytest.param(("quoted.key", 0), '"a ] ', id="element"),
        pytest.param(("quoted.key", 1), "'['", id="element-on-the-same-line"),
        pytest.param(("quoted.key", 2), "[1, 2,", id="nested-list"),
        pytest.param(("quoted.key", 2, 2), "   3]", id="element-of-nested-list"),
        pytest.param(("quoted.key", 3, "y", "z"), "y.z", id="inline-table"),
        pytest.param(("text",), 'text = """', id="multi-line-string"),
        pytest.param(("other",), "other =", id="after-multi-line-string"),
        pytest.param(("when",), "when =", id="after-literal-multi-line-string"),
        pytest.param(("a", "b é", "c"), "a . ", id="dotted-key"),
        pytest.param(("a", "b é"), "a . ", id="table-of-a-dotted-key"),
        pytest.param(("identity",), "[ identity . ", id="table-first-seen-in-a-header"),
        pytest.param(("identity", "in side"), "[ identity . ", id="header"),
        pytest.param(("identity", "in side", "id"), "id=1", id="no-blanks"),
        pytest.param(("identity", "in side", "next", "hop"), "next.hop", id="dotted-key-in-a-table"),
        pytest.param(("identity", "bob", "id"), "id = 2", id="next-table"),
        pytest.param(("identity", "late"), "late", id="table-opened-late"),
        pytest.param(("list", 0, "x"), "x = 7", id="first-of-tables"),
        pytest.param(("list", 1, "x"), "x = 2", id="second-of-tables"),
        pytest.param(("list", 1, "sub", "y"), "y = 3", id="table-of-the-last-of-tables"),
        pytest.param(("list", 1, "deep", 0, "z"), "z = 4", id="tables-in-tables"),
        # what isn't there has the line of what is around it
        pytest.param(("identity", "bob", "link"), "[identity.bob]", id="missing-key"),
        pytest.param(("gateway", 7, "x"), "gateway =", id="nothing-inside"),
    ],
)
def test_line(place: Place, text: str) -> None:
    """A key or element has the line that it stands on; what is missing, the line of the table where it belongs."""
    tomllib.loads(DOCUMENT)
    line = Lines(DOCUMENT).of(place)
    assert line is not None
    assert text in DOCUMENT.split("\n")[line - 1]
    assert DOCUMENT.count(text) == 1


def test_no_line() -> None:
    """What is missing at the top of a document has no line."""
    assert Lines(DOCUMENT).of(("downstream",)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param("= 2", id="no-key"),
        pytest.param("[table", id="open-header"),
        pytest.param("c = ]", id="no-value"),
        pytest.param(f"c = {5000 * '['}", id="too-deep"),
    ],
)
def test_lost(wrong: str) -> None:
    """A reader that loses its way keeps what it has seen, and guesses nothing."""
    lines = Lines(f"a = 1\n{wrong}\nb = 3\n")
    assert (lines.of(("a",)), lines.of(("b",))) == (1, None)


def test_crlf() -> None:
    """Windows line ends count once."""
    assert Lines('a = 1\r\nb = """\r\n"""\r\nc = 1 # x\r\nd = 1\r\n').of(("d",)) == 5


STRINGS = st.text(st.sampled_from("ab[]{}#=,.'\"\\\n é"), max_size=6)
VALUES = st.recursive(
    STRINGS | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.datetimes() | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
)
BETWEEN = st.sampled_from(["\n", " # ] } = [x]\n\n", "\r\n", "\n\t# \"'\n "])


def key_text(key: str) -> str:
    if "'" not in key and "\n" not in key:
        return f"'{key}'"
    return json.dumps(key, ensure_ascii=False)


class Writer:
    """Writes values as TOML, with the line of each key and each element noted on the way."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.text = ""
        self.lines: dict[Place, int] = {}

    def note(self, place: Place) -> None:
        self.lines[place] = self.text.count("\n") + 1

    def value(self, place: Place, value: Any) -> None:
        match value:
            case bool():
                self.text += str(value).lower()
            case str():
                self.text += self.string(value)
            case list():
                self.text += "["
                for index, element in enumerate(value):
                    self.text += self.draw(BETWEEN)
                    self.note((*place, index))
                    self.value((*place, index), element)
                    self.text += self.draw(BETWEEN) + ","
                self.text += self.draw(BETWEEN) + "]"
            case dict():
                self.text += "{"
                for index, (key, element) in enumerate(value.items()):
                    self.text += ", " if index else " "
                    self.pair((*place, key), element)
                self.text += " }"
            case _:
                self.text += str(value)

    def string(self, value: str) -> str:
        forms = [
            json.dumps(value, ensure_ascii=False),
            '"""\n' + value.replace("\\", "\\\\").replace('"', '\\"') + '"""',
        ]
        if "'" not in value:
            forms += [f"'''\n{value}'''"] if "\n" in value else [f"'{value}'", f"'''{value}'''"]
        if '"' not in value:
            forms.append('"""\n' + value.replace("\\", "\\\\") + '"""')
        return self.draw(st.sampled_from(forms))

    def pair(self, place: Place, value: Any) -> None:
        self.note(place)
        self.text += f"{key_text(str(place[-1]))} = "
        self.value(place, value)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[Place, int]]:
    """A document's text, its values, and the lines of all that stands in it."""
    writer = Writer(draw)
    tables = draw(st.dictionaries(STRINGS, st.dictionaries(STRINGS, VALUES, max_size=3), max_size=3))
    for name, table in tables.items():
        writer.note((name,))
        writer.text += f"[ {key_text(name)} ]" + draw(BETWEEN)
        for key, value in table.items():
            writer.pair((name, key), value)
            writer.text += draw(BETWEEN)
    return writer.text, tables, writer.lines


@given(documents())
def test_every_place_has_its_line(document: tuple[str, dict[str, Any], dict[Place, int]]) -> None:
    """Whatever the values and however they are written, every key and every element is found on its own line."""
    text, tables, expected = document
    assert tomllib.loads(text) == tables
    lines = Lines(text)
    assert {place: lines.of(place) for place in expected} == expected
