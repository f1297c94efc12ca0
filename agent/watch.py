"""A live view of a host's identities: links, ways, rates and their last minute, and what was repaired."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent import IdmarkError

#: Seconds between two looks, and how much of the past is shown.
EVERY, PAST = 1.0, 60.0
DIRECTIONS = ("transmit", "receive")
#: Counters of packets that went another way than their own; shown when they are not zero.
ASTRAY = ("misrouted-dropped", "misrouted-passed", "diverted")
#: Lines that repairs and remarks may have at the foot of the screen.
FOOT = 4
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
#: Columns of a graph on a terminal of 80; what is wider goes to the graphs and to the ways.
GRAPH = 8

Report = Mapping[str, Any]
#: Identity, family and counter.
Key = tuple[str, str, str]


class WatchError(IdmarkError):
    """There is nothing to draw on."""


class Rate(NamedTuple):
    """Per second."""

    packets: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at one moment (seconds, monotonic): packets and bytes."""

    at: float
    counters: Mapping[Key, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class History:
    """The samples of the last minute, oldest first."""

    samples: tuple[Sample, ...] = ()

    def grown(self, report: Report, at: float) -> History:
        """With one more sample, and without those that are too old."""
        kept = tuple(sample for sample in self.samples if at - sample.at <= PAST)
        return History((*kept, Sample(at, dict(_counters(report)))))

    def rates(self, key: Key) -> list[tuple[float, Rate | None]]:
        """The rates between two samples, each with its time; None where one of the two has no such counter."""
        return [(after.at, _rate(before, after, key)) for before, after in pairwise(self.samples)]


def _counters(report: Report) -> Iterator[tuple[Key, tuple[int, int]]]:
    for identity in report["identities"]:
        for family, state in identity["families"].items():
            for name, count in state["counters"].items():
                if count is not None:
                    yield (identity["name"], family, name), (count["packets"], count["bytes"])


def _rate(before: Sample, after: Sample, key: Key) -> Rate | None:
    old, new = before.counters.get(key), after.counters.get(key)
    seconds = after.at - before.at
    if old is None or new is None or seconds <= 0:
        return None
    if new[0] < old[0] or new[1] < old[1]:
        old = (0, 0)  # a counter that was made anew: all that it has came since
    return Rate((new[0] - old[0]) / seconds, (new[1] - old[1]) / seconds)


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, as wide and as high as the terminal is."""

    history: History
    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Head, a line an identity and family, what needs attention, what was repaired."""
        height = options.height or console.height
        lines = [(identity, family) for identity in self.report["identities"] for family in identity["families"]]
        # The foot has some lines in any case, and what the identities leave free.
        foot = min(FOOT, (height - 3) // 3)
        attention = list(_attention(self.report))
        repairs = list(_repairs(self.report))
        free = height - 2 - len(lines)
        attention = _first(attention, max(foot, free - min(len(repairs), foot)))
        repairs = repairs[: max(foot, free - len(attention))]
        room = height - 2 - len(attention) - len(repairs)
        shown = lines if len(lines) <= room else self._busiest(lines, room - 1)
        yield self._head()
        yield self._table(shown, options)
        if len(shown) < len(lines):
            yield _line(Text(f"… {len(lines) - len(shown)} more, with less traffic", "dim"))
        yield from attention
        yield from repairs

    def _head(self) -> Text:
        report, daemon = self.report, self.report.get("daemon")
        force = Text("in force", "green") if report["in_force"] else Text("NOT IN FORCE", "bold red")
        at_work = Text("idmark run is not at work", "yellow")
        if daemon:
            at_work = Text(f"run pid {daemon['pid']} since {_clock(daemon['since'])}")
            at_work.append(", in sync" if daemon["in_sync"] else ", NOT IN SYNC", "" if daemon["in_sync"] else "red")
        head = Text.assemble((report["gateway"], "bold"), "  ", force, f"  policy {report['policy_digest'][:12]}  ")
        return _line(head.append_text(at_work))

    def _table(self, lines: Sequence[tuple[Report, str]], options: ConsoleOptions) -> Table:
        wide = options.max_width >= 110
        graph = GRAPH + max(options.max_width - 110, 0) // 4
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="dim")
        table.add_column("identity", no_wrap=True, overflow="ellipsis", ratio=3)
        table.add_column("link", no_wrap=True, overflow="ellipsis", ratio=3)
        table.add_column("", no_wrap=True, width=4)
        table.add_column("", no_wrap=True, width=6)
        if wide:
            table.add_column("way", no_wrap=True, overflow="ellipsis", ratio=6)
        for direction in DIRECTIONS:
            table.add_column("pkt/s", no_wrap=True, justify="right", width=5)
            table.add_column("B/s", no_wrap=True, justify="right", width=5)
            table.add_column(direction, no_wrap=True, width=graph)
        name = None
        for identity, family in lines:
            same, name = identity["name"] == name, identity["name"]
            state = identity["families"][family]
            cells = [Text("" if same else name), Text("") if same else _link(identity), Text(family), _state(state)]
            if wide:
                cells.append(Text(state["way"]))
            for direction in DIRECTIONS:
                cells += self._cells((name, family, direction), graph, options)
            table.add_row(*cells)
        return table

    def _busiest(self, lines: Sequence[tuple[Report, str]], room: int) -> list[tuple[Report, str]]:
        """Those with the most bytes in the last minute, in the policy's order: a line stays where it is as it may."""

        def bytes_of(place: int) -> float:
            identity, family = lines[place]
            rates = (self.history.rates((identity["name"], family, direction)) for direction in DIRECTIONS)
            return sum(rate.bytes for each in rates for _, rate in each if rate)

        places = sorted(range(len(lines)), key=bytes_of, reverse=True)[: max(room, 0)]
        return [lines[place] for place in sorted(places)]

    def _cells(self, key: Key, graph: int, options: ConsoleOptions) -> list[Text]:
        rates = self.history.rates(key)
        now = rates[-1][1] if rates else None
        if now is None:  # no counter, or only one look: that is no zero
            return [Text("-"), Text("-"), Text("")]
        packets = [(at, rate.packets) for at, rate in rates if rate]
        bars = sparkline(packets, rates[-1][0], graph, PLAIN_BARS if options.ascii_only else BARS)
        return [Text(amount(now.packets)), Text(amount(now.bytes)), Text(bars, "cyan")]


def sparkline(values: Sequence[tuple[float, float]], now: float, columns: int, bars: str) -> str:
    """The last minute up to `now`, the present at the right: each column the largest value of its share of it."""
    highest: list[float | None] = [None] * columns
    for at, value in values:
        column = columns - 1 - int((now - at) * columns / PAST)
        if column >= 0:
            highest[column] = max(value, highest[column] or 0.0)
    top = max((value for value in highest if value), default=1.0)

    def bar(value: float | None) -> str:
        # The lowest bar is for nothing at all.
        return " " if value is None else bars[min(math.ceil(value / top * (len(bars) - 1)), len(bars) - 1)]

    return "".join(map(bar, highest))


def amount(value: float) -> str:
    """A number in at most five characters: 0.3, 12, 999, 1.2k, 123k, 4.5M."""
    if 0 < value < 9.95:
        return f"{value:.1f}"
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"
        value /= 1000
    raise AssertionError(value)


def _link(identity: Report) -> Text:
    up = identity["link_state"] == "up"
    return Text(f"{identity['link']} {identity['link_state']}", "" if up else "yellow")


def _state(state: Report) -> Text:
    if not state["in_force"]:
        return Text("DRIFT", "bold red")
    return Text("open", "green") if state["open"] else Text("CLOSED", "yellow")


def _attention(report: Report) -> Iterator[Text]:
    """What is not as it should be, the worst first."""
    yield from (_line(Text(f"differs: {words}", "red")) for words in report["differences"])
    closed = []
    for identity in report["identities"]:
        for family, state in identity["families"].items():
            who = f"{identity['name']} {family}"
            for name in ASTRAY:
                count = state["counters"].get(name)
                if count and count["packets"]:
                    style = "yellow" if name == "diverted" else "bold red"
                    yield _line(Text(f"{who}: {name} {count['packets']:,} packets ({count['bytes']:,} bytes)", style))
            if state["in_force"] and not state["open"]:
                closed.append(_line(Text(f"{who}: closed, {state['way']}", "yellow")))
    down = (report.get("daemon") or {}).get("down", {})
    yield from (_line(Text(f"{name}: down, {words}", "yellow")) for name, words in down.items())
    yield from closed
    yield from (_line(Text(f"note: {note}", "yellow")) for note in report["notes"])


def _repairs(report: Report) -> Iterator[Text]:
    """The daemon's last repairs, the newest first."""
    repairs = (report.get("daemon") or {}).get("repairs", ())
    for repair in reversed(repairs):
        yield _line(Text.assemble((_clock(repair["at"]), "dim"), f" {repair['kind']}: {repair['words']}"))


def _first(lines: list[Text], room: int) -> list[Text]:
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], _line(Text(f"… {len(lines) - room + 1} more: idmark status tells", "dim"))][:room]


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _clock(at: float) -> str:
    """Local time; the day too if it isn't today."""
    then = time.localtime(at)
    return time.strftime("%H:%M:%S" if then[:3] == time.localtime()[:3] else "%b %d %H:%M", then)


def show(take: Callable[[], Report], console: Console | None = None) -> None:
    """Draw a report a second, until a signal ends it. Raises WatchError without a terminal, and whatever `take` does.

    Never busy for more than half of the time, however long a look takes.
    """
    console = console or Console()
    if not console.is_terminal or console.is_dumb_terminal:
        raise WatchError("status --watch draws on a terminal, and this is none: leave --watch out")
    history = History()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            report = take()
            history = history.grown(report, began)
            live.update(Frame(history, report), refresh=True)
            ended = time.monotonic()
            time.sleep(max(began + EVERY - ended, ended - began))
