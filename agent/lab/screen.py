"""What the lab shows: the one room besides the CLI that prints, in colour where the terminal has any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.text import Text

from agent.addresses import Family
from agent.lab.probes import BROKEN, MATRIX, Outcome

#: ASCII, so that it stands in any log.
PICTURE = """\
  wild ------- isp ------(wan) gw (vpn0)====== corp ------- chost
  198.51.100.10 |         O    |    I           |      192.0.2.50
                |             lan               |
                |          10.9.0.5             |
                +-------------------------------+

  O 203.0.113.2   2001:db8:2::2     isp drops any other source from gw
  I 192.0.2.130   2001:db8:4::130   corp drops any other source from gw"""


class Screen:
    """The terminal, or whatever the output goes to. Nothing wider than 80 columns."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def heading(self, text: str) -> None:
        """The beginning of a part."""
        self.console.print()
        self.console.print(Text(text, style="bold cyan"))

    def line(self, text: str, style: str = "") -> None:
        """A line of plain text."""
        self.console.print(Text(text, style=style))

    def command(self, text: str) -> None:
        """A command line, as if typed."""
        self.console.print(Text.assemble(("$ ", "dim"), (text, "bold")))

    def ansi(self, text: str) -> None:
        """What a program printed, with its colours."""
        self.console.print(Text.from_ansi(text.rstrip()), soft_wrap=True)

    @contextmanager
    def progress(self, steps: int) -> Iterator[Callable[[str], None]]:
        """A bar of so many steps; what is yielded is told the next one. Where nothing moves, a line for each."""
        if not self.console.is_terminal:
            yield lambda step: self.line(f"  {step}")
            return
        columns = (SpinnerColumn(), TextColumn("{task.description:<40}"), BarColumn(24), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=steps)
            done = -1

            def report(step: str) -> None:
                nonlocal done
                done += 1
                bar.update(task, description=step, completed=done)

            yield report

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner while something takes a moment."""
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            self.line(f"  {text}")
            yield

    def matrix(self, outcomes: list[Outcome]) -> None:
        """The probe matrix: a row for each pair, and in one line why it fails."""
        self.line(f"{'':18}" + "  ".join(f"{family.value:<6}" for family in Family).rstrip(), "dim")
        by_name = {(outcome.probe.name, outcome.probe.family): outcome for outcome in outcomes}
        for pair in MATRIX:
            row = [by_name[pair.name, family] for family in Family]
            failed = [outcome for outcome in row if not outcome.ok]
            why = (BROKEN.get(pair.name) or failed[0].reason) if failed else ""
            line = Text.assemble(f"  {pair.name:<16}", *map(_verdict, row), (why, "yellow"))
            line.rstrip()
            self.console.print(line)

    def policy(self, text: str) -> None:
        """A policy, its TOML coloured."""
        coloured = Syntax("", "toml", theme="ansi_dark").highlight(text.rstrip())
        coloured.rstrip()
        for line in coloured.split("\n"):
            line.rstrip()
            self.console.print(Text.assemble("  ", line) if line else "")


def _verdict(outcome: Outcome) -> tuple[str, str]:
    return (f"{'ok':<8}", "green") if outcome.ok else (f"{'failed':<8}", "bold red")
