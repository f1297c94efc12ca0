"""The demo: the problem, the policy, and the problem gone, with real packets over a real VPN."""

from __future__ import annotations

import time

from agent.lab import sandbox
from agent.lab.lab import POLICY, STEPS, Lab
from agent.lab.probes import Outcome
from agent.lab.screen import PICTURE, Screen
from agent.lab.vpn import choose


def demo(vpn: str) -> int:
    """Show it. Returns 0 only when with the agent every probe passes and nothing leaks. Raises LabError."""
    sandbox.enter()
    choose(vpn)
    start = time.monotonic()
    screen = Screen()
    screen.heading("A gateway with two identities: O at its provider, I in a VPN")
    screen.line(PICTURE)
    with screen.progress(STEPS) as report:
        lab = Lab(vpn, report=report)
    with lab:
        screen.line(f"  Built in {time.monotonic() - start:.1f} s; the VPN is {lab.vpn.title}.", "dim")

        screen.heading("1. Without idmark: routing looks at destinations only")
        _probe(screen, lab)
        dropped = sum(seen.packets for seen in lab.leaks().values())
        screen.line(f"  {dropped} packets left by the other identity's link; isp and corp dropped them.", "yellow")

        screen.heading("2. The policy")
        screen.policy(POLICY.read_text(encoding="utf-8"))
        screen.line("")
        screen.command(f"idmark -c {POLICY.name} apply")
        environment = _like(screen)
        screen.ansi(lab.idmark("apply", env=environment).stdout)

        screen.heading("3. With idmark: every identity has its own routing")
        before = lab.leaks()
        outcomes = _probe(screen, lab)
        leaked = sum(seen.packets - before[place].packets for place, seen in lab.leaks().items())
        screen.line(f"  {leaked} packets left by the other identity's link.", "red" if leaked else "green")
        screen.line("")
        screen.command(f"idmark -c {POLICY.name} status")
        screen.ansi(lab.idmark("status", env=environment, check=False).stdout)
        screen.line(f"  outside also counts the tunnel's own packets: {lab.vpn.title} reaches its peer as O.", "dim")

    passed = sum(outcome.ok for outcome in outcomes)
    good = passed == len(outcomes) and not leaked
    screen.line("")
    took = f"{time.monotonic() - start:.0f} s"
    screen.line(f"{passed} of {len(outcomes)} probes pass, {took} in all.", "bold green" if good else "bold red")
    screen.line("Nothing is left behind. Play with it: idmark lab up, lab shell gw, lab down.")
    return 0 if good else 1


def _probe(screen: Screen, lab: Lab) -> list[Outcome]:
    with screen.waiting("pinging to and fro"):
        outcomes = lab.probe_matrix()
    screen.matrix(outcomes)
    return outcomes


def _like(screen: Screen) -> dict[str, str]:
    """The environment that makes a program print as it would on this screen, though it writes to a pipe."""
    environment = {"COLUMNS": str(min(screen.console.width, 100))}
    return environment | ({"FORCE_COLOR": "1"} if screen.console.is_terminal and not screen.console.no_color else {})
