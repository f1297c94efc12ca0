"""The lab, built: its hosts with their links, the VPN, what answers the probes, and what can be done with them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any, NamedTuple

from agent.addresses import Family
from agent.lab import LabError, endpoint, net, sandbox, vpn
from agent.lab.hosts import Hosts, require, run
from agent.lab.probes import PORT, Outcome, Probe, matrix

#: The lab's policy, as an operator would write it.
POLICY = Path(__file__).with_name("policy.toml")
#: How many steps of building `report` hears of.
STEPS = 4
#: Seconds until the first packet must have come through the VPN.
PATIENCE = 30.0
#: A small program of ours: isolated and without site-packages it is up in ten milliseconds.
PYTHON = [sys.executable, "-I", "-S"]

Report = Callable[[str], None]


class Count(NamedTuple):
    """What a counter has seen."""

    packets: int
    bytes: int


class Lab:
    """The lab, in this process's sandbox. Methods raise LabError with the words of whatever refused.

    `kind` is a key of `vpn.VPNS`, `mtu` the tunnel's. `report` hears of each step of building. Use `with`, or `close`.
    """

    def __init__(self, kind: str = "wireguard", mtu: int | None = None, report: Report = lambda _: None) -> None:
        if not sandbox.inside():
            raise LabError("the lab is built in a sandbox only, not in this machine's own namespaces")
        require(["ip", "nft", "sysctl", "conntrack"])
        self.vpn = vpn.choose(kind)
        self.mtu = mtu or self.vpn.mtu
        self._hosts = Hosts()
        self._counters = count(1)
        try:
            self._build(report)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self, report: Report) -> None:
        report(f"{len(net.HOSTS)} hosts and {len(net.WIRES)} links")
        run(["ip", "-batch", "-"], text="\n".join([*net.namespace_lines(), ""]))
        for host in net.HOSTS:
            self.run(host, ["sysctl", "-qw", *net.sysctl_words(host)])
        run(["ip", "-batch", "-"], text="\n".join([*net.wire_lines(), ""]))
        for host in net.HOSTS:
            self._hosts.batch(host, ["link set lo up", *self._link_lines(host, tunnel=False)])
        for host in net.FILTERS:
            self._hosts.nft(host, net.filter_text(host))
        report(f"the VPN: {self.vpn.title}")
        self.vpn.start(self._hosts, self.mtu)
        for end in vpn.ENDS:
            # A tun device makes up a new link-local address each time that it goes up; a VPN has no use for it.
            self._hosts.batch(end.host, [f"link set {end.name} addrgenmode none", *self._link_lines(end.host)])
        report("who answers the probes")
        self._start_answering()
        report("the first packet through the VPN")
        ends = [Probe("tunnel", "gw", net.INSIDE[f], net.TUNNEL_END[f], wait=0.3) for f in Family]
        self._hosts.wait("the VPN", lambda: all(outcome.ok for outcome in self.probe(ends)), PATIENCE)

    @staticmethod
    def _link_lines(host: str, *, tunnel: bool = True) -> list[str]:
        ends = [end for end in net.interfaces(host) if tunnel or end not in net.TUNNEL]
        lines = [line for end in ends for line in net.interface_lines(end)]
        return lines + [line for end in ends for line in net.route_lines(host, end.name)]

    def _start_answering(self) -> None:
        for host in ("wild", "chost", "gw", "lan"):
            addresses = [address.partition("/")[0] for end in net.interfaces(host) for address in end.addresses]
            daemon = self._hosts.daemon(host, [*PYTHON, endpoint.__file__, "answer", str(PORT), *addresses])
            self._hosts.wait(f"what answers on {host}", partial(daemon.said, "ready"), PATIENCE)

    # --- what to do with it ------------------------------------------------------------------------------------------

    def run(self, host: str, command: list[str], **options: Any) -> CompletedProcess[str]:
        """Run a command on a host to its end; options: text (for its standard input), check, timeout, env."""
        return self._hosts.run(host, command, **options)

    def popen(self, host: str, command: list[str], **options: Any) -> Popen[str]:
        """Start a command on a host; options are subprocess.Popen's. It is ended by `close`, at the latest."""
        return self._hosts.popen(host, command, **options)

    def nft(self, host: str, text: str) -> None:
        """Load nft text on a host as one transaction."""
        self._hosts.nft(host, text)

    def idmark(self, *words: str, policy: Path = POLICY, **options: Any) -> CompletedProcess[str]:
        """Run `idmark -c POLICY WORDS... --netns gw`; options as for `run`."""
        command = [sys.executable, "-m", "agent", "-c", os.fspath(policy), *words, "--netns", "gw"]
        return run(command, **options)

    def probe(self, probes: Iterable[Probe]) -> list[Outcome]:
        """Run probes, all at once, and tell what became of each, in their order."""
        probes = list(probes)
        asked = {host: [probe for probe in probes if probe.host == host] for host in {probe.host for probe in probes}}
        running = {}
        for host, mine in asked.items():
            process = self.popen(host, [*PYTHON, endpoint.__file__, "ask"], stdin=-1, stdout=-1, stderr=-1)
            running[host] = process
            if process.stdin:
                process.stdin.write(json.dumps([asdict(probe) for probe in mine]))
                process.stdin.close()
                process.stdin = None
        outcomes: dict[Probe, str | None] = {}
        for host, process in running.items():
            stdout, stderr = process.communicate()
            if process.returncode:
                raise LabError(f"the probes on {host}: {' | '.join(stderr.strip().splitlines()[-3:])}")
            outcomes.update(zip(asked[host], json.loads(stdout), strict=True))
        return [Outcome(probe, outcomes[probe] or "") for probe in probes]

    def probe_matrix(self, kind: str = "ping") -> list[Outcome]:
        """Run the whole matrix, both families."""
        return self.probe(matrix(kind))

    def ping(self, host: str, target: str, source: str | None = None, **options: Any) -> Outcome:
        """One probe: `count` echo requests, exactly, while they are answered; options are Probe's."""
        return self.probe([Probe(f"{host} -> {target}", host, source, target, **options)])[0]

    # --- what got where ----------------------------------------------------------------------------------------------

    def leaks(self) -> dict[str, Count]:
        """What isp and corp dropped because its source is none of their customer's, by "HOST FAMILY"."""
        return {
            f"{host} {name}": seen
            for host in net.FILTERS
            for name, seen in self._counters_of(host, net.FILTER_TABLE).items()
        }

    @contextmanager
    def counting(self, host: str, match: str, hook: str = "prerouting") -> Iterator[Callable[[], Count]]:
        """Count on a host the packets that an nft expression matches; what is yielded tells how many till now.

        Before anything else there sees or drops them: `with lab.counting("isp", 'iifname "gw" ip saddr 192.0.2.130')`.
        """
        table = f"capture{next(self._counters)}"
        rule = f"{match} counter name seen"
        chain = f"type filter hook {hook} priority -450; {rule}"
        self.nft(host, f"table inet {table} {{ counter seen {{ }}\n chain c {{ {chain}\n }}\n }}\n")
        try:
            yield lambda: self._counters_of(host, table)["seen"]
        finally:
            self.run(host, ["nft", "delete", "table", "inet", table])

    def _counters_of(self, host: str, table: str) -> dict[str, Count]:
        listed = json.loads(self.run(host, ["nft", "-j", "list", "counters", "table", "inet", table]).stdout)
        found = [item["counter"] for item in listed["nftables"] if "counter" in item]
        return {counter["name"]: Count(counter["packets"], counter["bytes"]) for counter in found}

    def snapshot(self, host: str) -> str:
        """What an agent could have changed on a host, as text: ruleset, rules, routes, addresses, links, sysctls."""
        commands = [
            ["nft", "list", "ruleset"],
            *(["ip", family, "-N", *words] for family in ("-4", "-6") for words in (
                ["rule", "show"], ["route", "show", "table", "all"], ["-o", "address", "show"],
            )),
            ["ip", "-o", "link", "show"],
            ["sysctl", "-a", "-r", r"^net\.ipv[46]\.conf\."],
        ]  # fmt: skip
        return "".join(f"# {' '.join(command)}\n{self.run(host, command).stdout}" for command in commands)

    # --- what happens to it ------------------------------------------------------------------------------------------

    def link_down(self, host: str, link: str) -> None:
        """Take a link down; its routes and its IPv6 addresses go."""
        self._hosts.batch(host, [f"link set {link} down"])

    def link_up(self, host: str, link: str) -> None:
        """Take a link up, and give back its addresses and its routes in main, as a VPN client or DHCP does."""
        end = next(end for end in net.interfaces(host) if end.name == link)
        self._hosts.batch(host, [*net.interface_lines(end), *net.route_lines(host, link)])

    def close(self) -> None:
        """End every process and take away every host."""
        self._hosts.close()
        there = [name.name for name in Path("/run/netns").glob("*")]
        run(["ip", "-batch", "-"], text="".join(f"netns delete {host}\n" for host in net.HOSTS if host in there))
