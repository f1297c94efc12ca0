"""A benchmark of several parts: each measured by itself, so that one that fails leaves the others."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from agent import IdmarkError
from tests.bench import room
from tests.bench.figures import Report, Table
from tests.bench.world import FailedError

Effort = TypeVar("Effort")
#: Measures with so much effort, in a directory of its own, and adds what it finds.
Part = Callable[[Effort, Path, Report], None]


def measured(
    name: str, doc: str | None, parts: Mapping[str, Part[Effort]], chosen: Sequence[str], effort: Effort
) -> Report:
    """Measure; what was found has been printed as well. To be called inside the room. `doc` is the module's own."""
    about = " ".join(doc.split("\n\n", maxsplit=1)[1].split()) if doc else ""
    report = Report(name, about, room.machine())
    for part in chosen:
        print(f"measuring: {part}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir="/run") as directory:
            try:
                parts[part](effort, Path(directory), report)
            except (FailedError, IdmarkError) as error:
                report.add(Table(part, ("could not be measured to its end",), ((str(error),),)))
    return report
