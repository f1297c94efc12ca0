"""What `idmark lab` does for each of its words. Each returns the exit code, and raises LabError."""

from __future__ import annotations

from typing import NoReturn

from agent.lab import holder
from agent.lab.demo import demo
from agent.lab.lab import STEPS
from agent.lab.screen import Screen

__all__ = ["demo", "down", "shell", "up"]


def up(vpn: str, *, apply: bool) -> int:
    """Build the lab in the background, and say what to do with it."""
    screen = Screen()
    with screen.progress(STEPS + apply) as report:
        holder.up(vpn, apply=apply, report=report)
    screen.line("The lab is up. Try:", "bold")
    screen.line("  idmark lab shell gw                                 a shell on the gateway")
    for verb in ("status",) if apply else ("plan", "apply"):
        screen.line(f"  idmark lab shell gw -- idmark -c {holder.PLAY_POLICY} {verb}")
    screen.line("  idmark lab shell wild -- ping -c 3 192.0.2.130      from the wild side to I")
    screen.line("  idmark lab down")
    return 0


def shell(host: str, command: list[str]) -> NoReturn:
    """Become a shell, or a command, on a host."""
    holder.shell(host, command[1:] if command[:1] == ["--"] else command)


def down() -> int:
    """End the lab."""
    holder.down()
    Screen().line("The lab is gone.")
    return 0
