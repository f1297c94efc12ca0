"""Plots of what was measured, as SVG; they take matplotlib, which the extra `bench` installs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.bench.contestants import IDMARK, PARTS

Figure = dict[str, Any]


def plot(results: dict[str, list[Figure]], directory: Path) -> list[Path]:
    """Plot the figures of the reports, by their names; the files. None without matplotlib. Raises OSError."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return []
    pyplot.switch_backend("svg")
    pyplot.rcParams.update({"svg.hashsalt": "idmark", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    drawn = []
    for name, make in (("packets", _packets), ("changes", _changes)):
        figure = make(pyplot, results.get(name, []))
        if figure:
            drawn.append(directory / f"{name}.svg")
            figure.savefig(drawn[-1], bbox_inches="tight", metadata={"Date": None})
            pyplot.close(figure)
    return drawn


def _packets(pyplot: Any, figures: Iterable[Figure]) -> Any:
    """Cost per packet over number of sources: a panel a family and shape; with conntrack lines are dashed."""
    parts = {contestant.name for contestant in PARTS}  # measured at one size only: no line
    forwarded = [figure for figure in figures if figure["traffic"] == "forwarded" and figure["contestant"] not in parts]
    colours: dict[str, str] = {}

    def draw(panel: Any, here: list[Figure]) -> None:
        for name, line in _lines(here, "contestant", "sources"):
            kind = name.removesuffix(", ct")
            colour = colours.setdefault(kind, f"C{len(colours)}")
            style = "--" if name != kind else "-"
            _draw_line(panel, line, ("sources", "nanoseconds", 1.0), colour + style, name)

    panels = _panels(forwarded, lambda figure: f"{figure['family']}, {figure['shape']}")
    return _canvas(pyplot, panels, draw, ("sources", "ns a packet"))


def _changes(pyplot: Any, figures: Iterable[Figure]) -> Any:
    """Time of a change over its size: a panel a number of sources."""
    changes = [figure for figure in figures if figure["what"] == "change"]

    def draw(panel: Any, here: list[Figure]) -> None:
        for number, (name, line) in enumerate(_lines(here, "way", "changed")):
            _draw_line(panel, line, ("changed", "seconds", 1000.0), f"C{number}-", name)

    panels = _panels(changes, lambda figure: f"{figure['sources']:,} sources")
    return _canvas(pyplot, panels, draw, ("sources changed", "ms"))


def _panels(figures: Iterable[Figure], title: Callable[[Figure], str]) -> dict[str, list[Figure]]:
    panels: dict[str, list[Figure]] = {}
    for figure in figures:
        panels.setdefault(title(figure), []).append(figure)
    return panels


def _canvas(
    pyplot: Any,
    panels: dict[str, list[Figure]],
    draw: Callable[[Any, list[Figure]], None],
    labels: tuple[str, str],
) -> Any:
    """The panels side by side, with one legend; None where there is nothing to draw."""
    if not panels:
        return None
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2), sharey=True, squeeze=False)
    legend: dict[str, Any] = {}
    for panel, (title, figures) in zip(axes[0], panels.items(), strict=True):
        draw(panel, figures)
        panel.set(xscale="log", yscale="log", title=title, xlabel=labels[0])
        panel.yaxis.set_major_locator(pyplot.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.yaxis.set_minor_formatter("")
        ticks = sorted({tick for line in panel.lines for tick in line.get_xdata()})
        panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
        legend |= {line.get_label(): line for line in panel.lines}
    axes[0][0].set_ylabel(labels[1])
    axes[0][-1].legend(legend.values(), legend.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return canvas


def _lines(figures: Iterable[Figure], key: str, over: str) -> Iterator[tuple[str, list[Figure]]]:
    """The figures of each name, in the order in which they are joined."""
    ordered = sorted(figures, key=lambda figure: (figure[key], figure[over]))
    for name, line in groupby(ordered, lambda figure: str(figure[key])):
        yield name, [*line]


def _draw_line(panel: Any, line: list[Figure], what: tuple[str, str, float], style: str, label: str) -> None:
    """Medians, with a band from quartile to quartile. `what`: over which figure, which one, and in what unit."""
    over, of, scale = what
    across = [figure[over] for figure in line]
    medians, lows, highs = ([figure[of][part] * scale for figure in line] for part in ("median", "low", "high"))
    width = 2.5 if label == IDMARK.name else 1.2
    panel.plot(across, medians, style, label=label, linewidth=width, marker="o", markersize=3)
    panel.fill_between(across, lows, highs, color=style[:2], alpha=0.15, linewidth=0)
