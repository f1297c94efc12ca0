"""What a policy changes, as one HTML file that needs nothing else: no script, no network; light, dark, on paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from agent import picture
from agent.change import CHANGED, GONE, NEW, SAME, Change, Part, TextChange
from agent.moves import Move, size
from agent.settings import Setting

#: How many prefixes of a move, and how many lines of a text, a page shows.
PREFIXES, LINES = 1_000, 3_000
#: What a browser may load for it: nothing.
CONTENT = "default-src 'none'; style-src 'unsafe-inline'"
#: Sources that stand open in the table; the rest is folded.
OPEN = 12

STYLE = Path(__file__).with_name("page.css")


def html(found: Change) -> str:
    """The whole page. Every word of a policy is escaped, and a policy of its own forbids it to load anything."""
    return "".join(f"{line}\n" for line in _page(found))


def _page(found: Change) -> Iterator[str]:
    gateway = escape(found.after.gateway)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{CONTENT}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{gateway}: {escape(found.headline)}</title>"
    yield f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>"
    yield f"<header>\n<h1>What changes on {gateway}</h1>"
    yield f'<p class="lead">{escape(found.headline[:1].upper() + found.headline[1:])}.</p>'
    yield f'<p class="dim">Policy <span class="digest">{found.before.digest[:12]}</span> → '
    yield f'<span class="digest">{found.after.digest[:12]}</span></p>\n</header>\n<main>'
    if found.risks:
        yield '<section class="risks" aria-labelledby="risks">\n<h2 id="risks">Look twice</h2>\n<ul>'
        yield from (f"<li>{escape(risk)}</li>" for risk in found.risks)
        yield "</ul>\n</section>"
    if found.moves:
        yield '<section aria-labelledby="sources">\n<h2 id="sources">Sources that change hands</h2>\n<ul class="moves">'
        for move in found.moves:
            yield from _move(found, move)
        yield "</ul>\n</section>"
    yield from _identities(found)
    if found.gateway:
        yield '<section aria-labelledby="gateway">\n<h2 id="gateway">The gateway itself</h2>'
        yield from _settings(found.gateway)
        yield "</section>"
    if found.notes:
        yield '<section aria-labelledby="notes">\n<h2 id="notes">Besides</h2>'
        yield from (f"<p>{escape(note)}</p>" for note in found.notes)
        yield "</section>"
    yield '<section aria-labelledby="picture">\n<h2 id="picture">The picture</h2>'
    yield '<p class="dim">A packet\'s way, from its source to its link; what changes is marked.</p>'
    yield f'<div class="scroll" tabindex="0" role="region" aria-labelledby="picture">\n{picture.wide(found)}\n</div>'
    yield f"{picture.narrow(found)}\n</section>"
    if found.texts:
        yield '<section aria-labelledby="text">\n<h2 id="text">The text</h2>'
        for each in found.texts:
            yield from _text(each)
        yield "</section>"
    yield "</main>\n<footer>"
    yield "<p>What speaks as nobody follows the routing table main.</p>\n</footer>\n</body>\n</html>"


def _move(found: Change, move: Move) -> Iterator[str]:
    kind = NEW if move.before is None else GONE if move.after is None else CHANGED
    where = f"{move.before or 'nobody'} → {move.after or 'nobody'}"
    much = escape(size(move.prefixes))
    yield f'<li class="{kind}"><span class="to">{escape(where)}</span> <span class="tag">{much}</span>'
    yield _prefixes(map(str, move.prefixes[:OPEN]))
    if len(move.prefixes) > OPEN:
        yield f"<details><summary>{len(move.prefixes) - OPEN:,} more prefixes</summary>"
        yield _prefixes(map(str, move.prefixes[OPEN:PREFIXES]))
        if len(move.prefixes) > PREFIXES:
            yield f"<p>… and {len(move.prefixes) - PREFIXES:,} more, which --json lists.</p>"
        yield "</details>"
    yield f"<span>{escape(found.fate_of(move))}</span></li>"


def _prefixes(prefixes: Iterable[str]) -> str:
    return f'<ul class="prefixes">{"".join(f"<li><code>{escape(each)}</code></li>" for each in prefixes)}</ul>'


def _identities(found: Change) -> Iterator[str]:
    parts = [part for part in found.parts if part.fate != SAME]
    if not parts:
        return
    yield '<section aria-labelledby="identities">\n<h2 id="identities">Identities</h2>\n<div class="identities">'
    for part in parts:
        yield from _part(part)
    yield "</div>\n</section>"


def _part(part: Part) -> Iterator[str]:
    yield f'<article class="{part.fate}">\n<h3>{escape(part.name)} <span class="tag">{part.fate}</span></h3>'
    if part.sources:
        shown = ", ".join(map(str, part.sources[:4]))
        more = f" and {len(part.sources) - 4:,} more" if len(part.sources) > 4 else ""
        verb = "Spoke" if part.fate == GONE else "Speaks"
        yield f'<p class="dim">{verb} for <code>{escape(shown)}</code>{more} ({escape(size(part.speaks))})</p>'
    yield from _settings(part.settings)
    yield "</article>"


def _settings(settings: Iterable[Setting]) -> Iterator[str]:
    yield "<dl>"
    for each in settings:
        values = [f"<del><code>{escape(each.before)}</code></del>"] if each.before else []
        values.append(f"<ins><code>{escape(each.after)}</code></ins>")
        effect = f'<span class="effect">{escape(each.effect)}</span>' if each.effect else ""
        yield f"<dt>{escape(each.key)}</dt><dd>{' → '.join(values)}{effect}</dd>"
    yield "</dl>"


def _text(each: TextChange) -> Iterator[str]:
    yield f"<details><summary>{escape(each.name)}: {each.counts}</summary>"
    yield f'<pre tabindex="0" role="region" aria-label="{escape(each.name)}">'
    kinds = {"+": "add", "-": "cut", "@": "at", " ": "same"}
    yield "".join(f'<span class="{kinds[line[0]]}">{escape(line)}</span>' for line in each.lines[:LINES])
    if len(each.lines) > LINES:
        yield f'<span class="at">… and {len(each.lines) - LINES:,} more lines</span>'
    yield "</pre></details>"
