"""The picture of a policy: identities as lanes from their sources to their links, through the hooks in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from agent.change import CHANGED, GONE, NEW, SAME, Change, Part
from agent.model import Identity
from agent.moves import Move
from agent.ruleset import POSTROUTING_PRIORITY, SRCNAT_PRIORITY
from agent.settings import Setting

#: Pixels: a line of text, what is left free in a box, between boxes, between lanes; a letter of the type (0.6 em).
LINE, PAD, GAP, LANE, LETTER = 17, 9, 24, 12, 7.25
#: The width of the picture where boxes stand one below the other.
NARROW = 328
#: How many sources a lane names, and how many that come or go.
SHOWN = 3


class Stage(NamedTuple):
    """A column: where in the kernel a packet is, and how wide its boxes are, in pixels."""

    title: str
    about: str
    width: int


STAGES = (
    Stage("sources", "who speaks", 300),
    Stage("prerouting, output", "marked by its source", 246),
    Stage("rule, table", "its own routes", 216),
    Stage("postrouting", "translated, counted", 130),
    Stage("link", "leaves", 134),
)
WIDE = sum(stage.width for stage in STAGES) + GAP * (len(STAGES) - 1) + 2 * PAD


class Line(NamedTuple):
    """A line of a box. `kind` is a class of the page's style: name, dim, add, cut, edit."""

    text: str
    kind: str = ""


class Lane(NamedTuple):
    """A box a stage; `fate` is the part's, and `badge` what stands over the lane."""

    boxes: tuple[tuple[Line, ...], ...]
    fate: str
    badge: str


def wide(found: Change) -> str:
    """For a screen or a page of paper: an SVG with a column a stage."""
    lanes = _lanes(found)
    drawn, y = [], 54
    for lane in lanes:
        height = max(map(_height, lane.boxes)) + (LINE if lane.badge else 0)
        drawn += [*_behind(lane, 0, y - 4, WIDE, height + 8), *_badge(lane, PAD, y + 12)]
        top, x = y + (LINE if lane.badge else 0), PAD
        middle = top + max(map(_height, lane.boxes)) / 2
        for place, (stage, lines) in enumerate(zip(STAGES, lane.boxes, strict=True)):
            high = _height(lines)
            if place:
                drawn.append(f'<path class="road" d="M{x - GAP} {middle:.1f}h{GAP - 7}" marker-end="url(#to-wide)"/>')
            drawn += _box(lines, x, middle - high / 2, stage.width)
            x += stage.width + GAP
        y += height + LANE
    heads, x = [], PAD
    for stage, title in zip(STAGES, _titles(found), strict=True):
        heads += [
            _text(x, 18, title._replace(kind=f"name {title.kind}"), 99),
            _text(x, 36, Line(stage.about, "dim"), 99),
        ]
        x += stage.width + GAP
    return _svg(found, "wide", WIDE, y, [*heads, *drawn])


def narrow(found: Change) -> str:
    """For a telephone: the same boxes, one below the other."""
    drawn: list[str] = []
    y = 4
    for lane in _lanes(found):
        heights = [_height(lines) + LINE for lines in lane.boxes]
        height = sum(heights) + 16 * (len(heights) - 1) + LINE * bool(lane.badge)
        drawn += [*_behind(lane, 0, y, NARROW, height + 2 * PAD), *_badge(lane, PAD, y + 16)]
        top = y + PAD + LINE * bool(lane.badge)
        for place, (title, lines) in enumerate(zip(_titles(found), lane.boxes, strict=True)):
            if place:
                drawn.append(f'<path class="road" d="M{NARROW / 2} {top - 14}v8" marker-end="url(#to-narrow)"/>')
            drawn.append(_text(PAD, top + 12, title._replace(kind=title.kind or "dim"), 99))
            drawn += _box(lines, PAD, top + LINE, NARROW - 2 * PAD)
            top += heights[place] + 16
        y += height + 2 * PAD + LANE
    return _svg(found, "narrow", NARROW, y, drawn)


# --- what is in it ---------------------------------------------------------------------------------------------------


def _titles(found: Change) -> Iterator[Line]:
    """What stands over the columns; the hooks with their priorities."""
    for stage in STAGES:
        match stage.title:
            case "prerouting, output":
                changed = _if("kernel.hook_priority", found.gateway)
                yield Line(f"{stage.title} {found.after.kernel.hook_priority}", changed)
            case "postrouting":
                yield Line(f"{stage.title} {SRCNAT_PRIORITY}, {POSTROUTING_PRIORITY}")
            case title:
                yield Line(title)


def _lanes(found: Change) -> list[Lane]:
    lanes = [_lane(found, part) for part in found.parts]
    moved = [*_moved(found.moves, None)]
    nobody = (
        (Line("everything else", "dim"), *moved),
        (Line("nobody", "name"), Line("no mark", "dim")),
        (Line("rule 32766"), Line("table main")),
        (Line("untouched", "dim"),),
        (Line("as main says", "dim"),),
    )
    return [*lanes, Lane(nobody, CHANGED if moved else SAME, "sources change hands" if moved else "")]


def _lane(found: Change, part: Part) -> Lane:
    identity, settings = part.identity, {each.key: each for each in part.settings if part.before and part.after}
    moved = [*_moved(found.moves, part.name)]
    fate = part.fate if part.fate != SAME or not moved else CHANGED
    badges = [part.fate] if part.fate != SAME else []
    badges += ["sources change hands"] if moved and part.before and part.after else []
    policy = found.after if part.after else found.before
    boxes = (
        (*_sources(part), *moved),
        (
            _said("name", settings, identity.name, "name"),
            _said("fwmark", settings, f"mark {identity.fwmark}"),
            *_was(settings, "name"),
        ),
        (
            _said("table", settings, f"table {identity.table}"),
            *_hops(identity, settings),
            *_was(settings, "next_hop"),
            _said("when_down", settings, f"down: {_down(part, settings)}"),
            *_probe(identity, settings),
        ),
        (
            *_leaving(
                identity,
                settings,
                enforce=policy.kernel.enforce,
                changed=_if("kernel.enforce", found.gateway) if part.before and part.after else "",
            ),
        ),
        (_said("link", settings, identity.link, "name"), *_was(settings, "link")),
    )
    return Lane(boxes, fate, ", ".join(badges))


def _sources(part: Part) -> Iterator[Line]:
    if part.identity.addresses is None:
        yield Line("auto: the link's own addresses")
    if part.fate in (NEW, GONE):  # all of them come, or go
        return
    yield from (Line(str(prefix)) for prefix in part.sources[:SHOWN])
    if len(part.sources) > SHOWN:
        yield Line(f"and {len(part.sources) - SHOWN:,} more", "dim")


def _moved(moves: Iterable[Move], name: str | None) -> Iterator[Line]:
    """Who comes to an identity, or to nobody, and who goes."""
    moves = tuple(moves)
    for sign, kind, mine in (
        ("+", "add", [m for m in moves if m.after == name]),
        ("-", "cut", [m for m in moves if m.before == name]),
    ):
        for move in mine[:SHOWN]:
            other = (move.before if sign == "+" else move.after) or "nobody"
            more = f" and {len(move.prefixes) - 1:,} more" if len(move.prefixes) > 1 else ""
            yield Line(f"{sign} {move.prefixes[0]}{more}", kind)
            yield Line(f"  {'from' if sign == '+' else 'to'} {other}", kind)
        if len(mine) > SHOWN:
            yield Line(f"{sign} and {len(mine) - SHOWN} others", kind)


def _hops(identity: Identity, settings: dict[str, Setting]) -> Iterator[Line]:
    match identity.next_hop:
        case "none":
            yield _said("next_hop", settings, "straight into the link")
        case "auto":
            yield _said("next_hop", settings, "by main's default")
        case hops:
            yield from (_said("next_hop", settings, f"via {hop}") for hop in hops)


def _probe(identity: Identity, settings: dict[str, Setting]) -> Iterator[Line]:
    if identity.probe or "probe" in settings:
        yield _said("probe", settings, f"probe {identity.probe}" if identity.probe else "no probe")


def _down(part: Part, settings: dict[str, Setting]) -> str:
    if "when_down" in settings:
        return settings["when_down"].after
    when = part.identity.when_down
    return {"unreachable": "closed", "main": "table main"}.get(when, when)


def _leaving(identity: Identity, settings: dict[str, Setting], *, enforce: bool, changed: str) -> Iterator[Line]:
    if identity.masquerade or "masquerade" in settings:
        yield _said("masquerade", settings, "masquerade" if identity.masquerade else "no masquerade")
    if identity.clamp_mss or "clamp_mss" in settings:
        yield _said("clamp_mss", settings, "MSS clamped" if identity.clamp_mss else "MSS not clamped")
    yield Line("strays dropped" if enforce else "strays counted", changed)


def _said(key: str, settings: dict[str, Setting], text: str, kind: str = "") -> Line:
    return Line(text, f"{kind} edit".strip() if key in settings else kind)


def _was(settings: dict[str, Setting], key: str) -> Iterator[Line]:
    if key in settings:
        yield Line(f"was {settings[key].before}", "cut")


def _if(key: str, settings: Sequence[Setting]) -> str:
    return "edit" if any(each.key == key for each in settings) else ""


# --- how it is drawn -------------------------------------------------------------------------------------------------


def _svg(found: Change, name: str, width: int, height: float, drawn: Iterable[str]) -> str:
    # The size is said, so that no text is ever smaller than it is meant to be.
    return "\n".join(
        [
            f'<svg class="{name}" viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img" '
            f'aria-label="{escape(_label(found))}">',
            f'<defs><marker id="to-{name}" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="tip" d="M0 0l8 4-8 4z"/></marker></defs>',
            *drawn,
            "</svg>",
        ]
    )


def _label(found: Change) -> str:
    lanes = "; ".join(f"{part.name} ({part.fate}) leaves by {part.identity.link}" for part in found.parts)
    return f"Identities from their sources to their links: {lanes}. Sources of nobody follow table main."


def _height(lines: Sequence[Line]) -> int:
    return LINE * max(1, len(lines)) + 2 * PAD - 4


def _behind(lane: Lane, x: float, y: float, width: float, height: float) -> Iterator[str]:
    if lane.fate != SAME:
        yield f'<rect class="lane {lane.fate}" x="{x}" y="{y:.1f}" width="{width}" height="{height:.1f}" rx="8"/>'
        yield f'<rect class="bar {lane.fate}" x="{x}" y="{y:.1f}" width="4" height="{height:.1f}" rx="2"/>'


def _badge(lane: Lane, x: float, y: float) -> Iterator[str]:
    if lane.badge:
        yield _text(x + 2, y, Line(lane.badge, f"badge {lane.fate}"), 99)


def _box(lines: Sequence[Line], x: float, y: float, width: int) -> Iterator[str]:
    yield f'<rect class="box" x="{x}" y="{y:.1f}" width="{width}" height="{_height(lines)}" rx="6"/>'
    letters = int((width - 2 * PAD) / LETTER)
    for place, line in enumerate(lines):
        yield _text(x + PAD, y + PAD + 10 + place * LINE, line, letters)


def _text(x: float, y: float, line: Line, letters: int) -> str:
    """A line of text; what there is no room for is told by a hovering pointer, and stands in the lists of the page."""
    kind = f' class="{line.kind}"' if line.kind else ""
    if len(line.text) <= letters:
        return f'<text x="{x:.0f}" y="{y:.1f}"{kind}>{escape(line.text)}</text>'
    short = escape(f"{line.text[: letters - 1]}…")
    return f'<text x="{x:.0f}" y="{y:.1f}"{kind}>{short}<title>{escape(line.text)}</title></text>'
