"""What was measured: a median with its quartiles, tables in Markdown, and the same for programs in JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several values and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError where there are no values."""
        several = sorted(values)
        if not several:
            raise ValueError("nothing was measured")
        if len(several) == 1:
            return cls(several[0], several[0], several[0])
        low, median, high = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int = 0, scale: float = 1.0) -> str:
        """`1.23 (1.20..1.25)`."""
        median, low, high = (f"{value * scale:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} ({low}..{high})"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading; `notes` say what is not in the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """A table that reads as such in a terminal, too."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        aligned = [
            _line(self.columns, widths),
            "|" + "|".join(_rule(at, width) for at, width in enumerate(widths)) + "|",
        ]
        aligned += [_line(row, widths) for row in self.rows]
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([f"### {self.title}", "", *aligned, *notes, ""])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = (
        f"{cell:<{width}}" if not at else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join(words) + " |"


def _rule(at: int, width: int) -> str:
    return "-" * (width + 2) if not at else "-" * (width + 1) + ":"


@dataclass
class Report:
    """What a benchmark found: tables for people, figures for programs and plots."""

    name: str
    about: str
    machine: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, table: Table) -> None:
        """Keep a table, and show it."""
        self.tables.append(table)
        print(table.markdown(), flush=True)

    def markdown(self) -> str:
        """The whole report."""
        machine = "; ".join(f"{key} {value}" for key, value in self.machine.items())
        return (
            "\n".join([f"# {self.name}", "", self.about, "", f"Measured on: {machine}.", ""])
            + "\n"
            + "\n".join(table.markdown() for table in self.tables)
        )

    def write(self, directory: Path) -> None:
        """NAME.md and NAME.json. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        data = {"machine": self.machine, "figures": self.figures}
        (directory / f"{self.name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def spread_figure(spread: Spread) -> dict[str, float]:
    """A spread for JSON."""
    return {key: round(value, 4) for key, value in asdict(spread).items()}
