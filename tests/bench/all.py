"""All that is measured beside the usual ways to the same end: `./dev bench`, and `./dev bench-quick`.

Packets, changes and the program, one after the other. Nothing is asserted; what was found is written as Markdown and
JSON, and as plots where matplotlib is installed (the extra `bench`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.bench import changes, packets, plots, program, room
from tests.bench.contestants import SOME
from tests.bench.figures import Report

RESULTS = Path(__file__).with_name("results")


def _packets(quick: bool) -> Report:
    if quick:
        return packets.run(packets.QUICK, packets.usual(quick=True), SOME)
    return packets.run(packets.FULL, packets.usual(quick=False))


def _changes(quick: bool) -> Report:
    return changes.run(changes.QUICK if quick else changes.FULL)


def _program(quick: bool) -> Report:
    return program.run(program.QUICK if quick else program.FULL)


def main() -> int:
    """Always 0: it only tells."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="less of everything; results go into a folder of their own"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="where to write (tests/bench/results)")
    arguments = parser.parse_args()
    room.enter()
    quick = arguments.quick
    directory = arguments.results or (RESULTS / "quick" if quick else RESULTS)
    reports = []
    for measure in (_packets, _changes, _program):
        reports.append(measure(quick))
        reports[-1].write(directory)
    drawn = plots.plot({report.name: report.figures for report in reports}, directory)
    written = ", ".join(f"{report.name}.md" for report in reports)
    print(f"written to {directory}: {written}, the same as .json, {len(drawn)} plots")
    if not drawn:
        print("for plots:  .venv/bin/pip install -e '.[bench]'")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
