"""What a policy changes, as text for a terminal and as Markdown for a review's comment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from agent.addresses import Prefix
from agent.change import CHANGED, GONE, NEW, SAME, Change, Part
from agent.moves import few, size
from agent.settings import Setting

#: How many characters of a comment are for what changes, and how many for all that is folded: GitHub takes 65,536.
OPEN, FOLDED = 30_000, 24_000
#: How many prefixes are named where they are not listed.
NAMED = 6


# --- text ------------------------------------------------------------------------------------------------------------


def text(found: Change) -> str:
    """For a terminal: what it means first, the text behind it."""
    return "".join(f"{line}\n" for line in _text(found))


def _text(found: Change) -> Iterator[str]:
    yield f"{found.after.gateway}: {found.headline}"
    if found.risks:
        yield from ("", "look twice:")
        yield from (f"  ! {risk}" for risk in found.risks)
    if found.moves:
        yield from ("", "sources:")
        for move in found.moves:
            yield f"  {few(move.prefixes, 50)} ({size(move.prefixes)})"
            yield f"    {found.fate_of(move)}"
    if any(part.fate != SAME for part in found.parts):
        yield from ("", "identities:")
        for part in found.parts:
            yield from _text_part(part)
    if found.gateway:
        yield from ("", "gateway:")
        yield from _text_settings(found.gateway)
    for note in found.notes:
        yield from ("", f"note: {note}")
    for each in found.texts:
        yield from ("", f"{each.name}: {each.counts}", *each.lines)


def _text_part(part: Part) -> Iterator[str]:
    if part.fate == SAME:
        return
    yield f"  {part.name} {_fate(part)}"
    yield from (f"  {line}" for line in _text_settings(part.settings))


def _text_settings(settings: Iterable[Setting]) -> Iterator[str]:
    for each in settings:
        value = f"{each.before} -> {each.after}" if each.before else each.after
        yield f"  {each.key}: {value}"
        if each.effect:
            yield f"    {each.effect}"


def _fate(part: Part) -> str:
    speaks = f"{few(part.sources)} ({size(part.speaks)})" if part.sources else "nothing that is written down"
    match part.fate:
        case "new":
            return f"is new: {speaks} speaks as it"
        case "gone":
            return f"is gone: {speaks} spoke as it"
        case _:
            return f"changes, which concerns {speaks}"


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(found: Change) -> str:
    """For a comment under a review: short, and the details folded. Nothing in it can be taken for markup."""
    lines, folds = [*_markdown(found)], [*_folds(found)]
    shown = _within(lines, OPEN)
    if len(shown) < len(lines):
        shown += ["", f"… and {len(lines) - len(shown):,} more lines, which `idmark plan --against` prints."]
    for title, language, details in folds:
        shown += _folded(title, language, details, FOLDED // len(folds))
    return "".join(f"{line}\n" for line in shown)


def _markdown(found: Change) -> Iterator[str]:
    yield f"### {code(found.after.gateway)}: {found.headline}"
    if found.risks:
        yield from ("", "**Look twice**", "")
        yield from (f"- ⚠️ {prose(risk)}" for risk in found.risks)
    if found.moves:
        yield from ("", "**Sources**", "")
        for move in found.moves:
            yield f"- {_codes(move.prefixes)} ({size(move.prefixes)}) {prose(found.fate_of(move))}"
    if any(part.fate != SAME for part in found.parts):
        yield from ("", "**Identities**", "")
        for part in found.parts:
            yield from _markdown_part(part)
    if found.gateway:
        yield from ("", "**Gateway**", "")
        yield from _markdown_settings(found.gateway, "")
    if found.notes:
        yield ""
        yield from (f"> {prose(note)}" for note in found.notes)


def _folds(found: Change) -> Iterator[tuple[str, str, list[str]]]:
    """Title, language and lines of what a reader may unfold."""
    for move in found.moves:
        if len(move.prefixes) > NAMED:
            title = f"{len(move.prefixes):,} prefixes: {move.before or 'nobody'} → {move.after or 'nobody'}"
            yield title, "", [*map(str, move.prefixes)]
    for each in found.texts:
        yield f"{each.name}: {each.counts}", "diff", [*each.lines]


def _markdown_part(part: Part) -> Iterator[str]:
    if part.fate == SAME:
        return
    signs = {NEW: "🟢", GONE: "🔴", CHANGED: "🟡"}
    yield f"- {signs[part.fate]} **{prose(part.name)}** {prose(_fate(part))}"
    yield from _markdown_settings(part.settings, "  ")


def _markdown_settings(settings: Iterable[Setting], indent: str) -> Iterator[str]:
    for each in settings:
        values = " → ".join(code(value) for value in (each.before, each.after) if value)
        effect = f": {prose(each.effect)}" if each.effect else ""
        yield f"{indent}- {prose(each.key)} {values}{effect}"


def _codes(prefixes: Sequence[Prefix]) -> str:
    words = ", ".join(code(str(prefix)) for prefix in prefixes[:NAMED])
    more = len(prefixes) - NAMED
    return f"{words} and {more:,} more" if more > 0 else words


def _folded(title: str, language: str, lines: list[str], room: int) -> Iterator[str]:
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0))
    shown = _within(lines, room)
    yield from ("", f"<details><summary>{prose(title)}</summary>", "", f"{fence}{language}", *shown, fence)
    if len(shown) < len(lines):
        yield from ("", f"… and {len(lines) - len(shown):,} more lines.")
    yield from ("", "</details>")


def _within(lines: list[str], room: int) -> list[str]:
    """As many lines, from the first on, as there is room for, in characters."""
    ends = accumulate(len(line) + 1 for line in lines)
    return [line for line, end in zip(lines, ends, strict=True) if end <= room]


def code(words: str) -> str:
    """Words as a code span, whatever is in them."""
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    pad = " " * (words[:1] == "`" or words[-1:] == "`")
    return f"{fence}{pad}{words}{pad}{fence}"


def prose(words: str) -> str:
    """Words that stay what they are: names of links may hold whatever means something to Markdown, or call somebody."""
    marked = re.sub(r"([\\`*_\[\]#|~<>])", r"\\\1", words.replace("&", "&amp;"))
    return marked.replace("@", "&#64;")
