"""The lab's gateway with an administrator at it, who has a policy and the real command, and sees what got where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.addresses import Family
from agent.lab import hosts, net
from agent.lab.lab import Count, Lab
from agent.lab.probes import Outcome, Probe
from tests.kernel.admin import MEMBERS, Table, policy_text
from tests.kernel.net import Host
from tests.lab.processes import processes

#: What the LAN speaks as: I, under I's own address.
MASQUERADED: Table = {"next_hop": "none", "members": MEMBERS, "masquerade": True}
#: Ports of I and of O that are forwarded: to the LAN host, to I or O itself, to the gateway's address on the LAN.
FORWARDED, REDIRECTED, LOCAL = 8080, 8081, 8082

#: Port forwards as an operator writes them.
FORWARDS = """
    table inet forwards {{
        chain prerouting {{
            type nat hook prerouting priority dstnat; policy accept;
            {rules}
        }}
    }}
"""
FORWARD = """
            {ip} daddr {{ {inside}, {outside} }} {protocol} dport 8080 dnat {ip} to {lan}
            {ip} daddr {{ {inside}, {outside} }} {protocol} dport 8081 redirect to :5007
            {ip} daddr {{ {inside}, {outside} }} {protocol} dport 8082 dnat {ip} to {gateway}
"""


def forwards() -> str:
    """The port forwards' nft text, for TCP and UDP in both families."""
    hosts = {Family.IPV4: "{}:5007", Family.IPV6: "[{}]:5007"}
    rules = [
        FORWARD.format(
            ip=family.nft,
            protocol=protocol,
            inside=net.INSIDE[family],
            outside=net.OUTSIDE[family],
            lan=hosts[family].format(net.LAN[family]),
            gateway=hosts[family].format(net.LAN_GATEWAY[family]),
        )
        for family in Family
        for protocol in ("tcp", "udp")
    ]
    return FORWARDS.format(rules="".join(rules))


def forward_probes(port: int = FORWARDED, **options: Any) -> list[Probe]:
    """A port forward on I and on O, asked from both sides, in both families. `options` are Probe's."""
    return [
        Probe(f"{host} -> {name}:{port}", host, None, addresses[family], port=port, **options)
        for family in Family
        for host in ("wild", "chost")
        for name, addresses in (("I", net.INSIDE), ("O", net.OUTSIDE))
    ]


def failures(outcomes: Iterable[Outcome]) -> dict[tuple[str, Family], str]:
    """What failed, and why."""
    return {(outcome.probe.name, outcome.probe.family): outcome.reason for outcome in outcomes if not outcome.ok}


#: Where packets arrive that have left by a foreign link: I and its members at the provider's, O at the company's.
CROSSINGS = {
    ("I", "isp"): 'iifname "gw" ip saddr { 192.0.2.0/24, 10.9.0.0/24 }',
    ("I (IPv6)", "isp"): 'iifname "gw" ip6 saddr { 2001:db8:4::/64, 2001:db8:9::/64 }',
    ("O", "corp"): 'iifname "gw" ip saddr 203.0.113.0/24',
    ("O (IPv6)", "corp"): 'iifname "gw" ip6 saddr 2001:db8:2::/64',
}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A lab whose gateway has a policy. `directory` is where the policy lies."""

    lab: Lab
    directory: Path

    @property
    def policy(self) -> Path:
        return self.directory / "policy.toml"

    def write(self, inside: Table | None = None, outside: Table | None = None, **others: Any) -> None:
        """Write the policy: I with the LAN masqueraded and O, but for what is given; others are policy_text's."""
        self.policy.write_text(policy_text({**MASQUERADED, **(inside or {})}, outside, **others), encoding="utf-8")

    def apply(self, inside: Table | None = None, outside: Table | None = None, **others: Any) -> str:
        """Write a policy and put it in force; what the command said. Raises LabError if it can't be."""
        self.write(inside, outside, **others)
        return self.idmark("apply").stdout

    def idmark(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a verb with the policy in the gateway's namespace."""
        return self.lab.idmark(*words, policy=self.policy, check=check)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a verb, its output thrown away; whoever starts it waits for it."""
        command = [*self._command(*words), "--netns", "gw"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def rendered(self) -> str:
        """The ruleset that `render` writes of the policy, with the gateway's facts."""
        facts = self.directory / "facts.json"
        facts.write_text(self.idmark("facts").stdout, encoding="utf-8")
        hosts.run(self._command("render", "--facts", os.fspath(facts), "-o", os.fspath(self.directory)))
        return (self.directory / "ruleset.nft").read_text(encoding="utf-8")

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "agent", "-c", os.fspath(self.policy), *words]

    def status(self) -> dict[str, Any]:
        """What `status --json` says."""
        found: dict[str, Any] = json.loads(self.idmark("status", "--json", check=False).stdout)
        return found

    def counts(self) -> dict[tuple[str, Family, str], Count]:
        """The counters that `status` shows, by identity, family and kind."""
        return {
            (identity["name"], Family(family), kind): Count(counter["packets"], counter["bytes"])
            for identity in self.status()["identities"]
            for family, state in identity["families"].items()
            for kind, counter in state["counters"].items()
        }

    @contextmanager
    def crossings(self) -> Iterator[Callable[[], Mapping[str, int]]]:
        """Count the packets of an identity that leave by the other one's link, from now on; what is yielded tells.

        Not every stranger: an ICMPv6 error of the gateway's own may go to corp with an address that it has on the LAN.
        """
        with ExitStack() as stack:
            seen = {
                f"{who} at {host}": stack.enter_context(self.lab.counting(host, match))
                for (who, host), match in CROSSINGS.items()
            }
            yield lambda: {place: count().packets for place, count in seen.items() if count().packets}

    def leaked(self) -> Mapping[str, Count]:
        """Whose packets isp and corp dropped, by host and family: empty if none."""
        return {place: seen for place, seen in self.lab.leaks().items() if seen.packets}

    @contextmanager
    def host(self, name: str) -> Iterator[Host]:
        """A host of the lab, for sockets of the test's own in there."""
        descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield Host(name, descriptor)
        finally:
            os.close(descriptor)

    def vpn_process(self) -> tuple[int, list[str]]:
        """The pid and the command line of the VPN's program on the gateway. Raises LookupError: it is the kernel."""
        for pid, words in processes().items():
            if re.match("(wireguard-go|openvpn) .*vpn0", words):
                return pid, words.split()
        raise LookupError("no VPN's program runs on the gateway")
