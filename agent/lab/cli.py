"""`idmark lab`: its words on the command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `lab` to those of idmark."""
    lab = verbs.add_parser("lab", help="a gateway, a VPN and the wild Internet on this machine, in namespaces")
    words = lab.add_subparsers(dest="lab_verb", metavar="WHAT", required=True)
    demo = words.add_parser("demo", help="the problem, the policy, and the problem gone: under a minute")
    up = words.add_parser("up", help="build the lab in the background, to play with")
    up.add_argument("--apply", action="store_true", help="and apply its policy")
    for parser in (demo, up):
        parser.add_argument("--vpn", default="wireguard", help="wireguard (the default) or openvpn")
    shell = words.add_parser("shell", help="a shell, or a command, on a host of the lab that is up")
    shell.add_argument("host", metavar="HOST", help="wild, isp, gw, corp, chost or lan")
    shell.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="run this instead of a shell")
    words.add_parser("down", help="end the lab that is up; nothing is left behind")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit code. Raises LabError, whose message is for the user."""
    from agent.lab import verbs  # noqa: PLC0415 (rich and the rest: of all verbs only this one wants them)

    try:
        match args.lab_verb:
            case "demo":
                return verbs.demo(args.vpn)
            case "up":
                return verbs.up(args.vpn, apply=args.apply)
            case "shell":
                verbs.shell(args.host, args.command)
            case _:
                return verbs.down()
    except KeyboardInterrupt:
        return 130  # as a shell tells of SIGINT; the sandbox goes with us
