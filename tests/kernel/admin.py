"""What an administrator does on a gateway: writes a policy, plans, applies, removes, and lists what is there."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent import reconcile
from agent.model import Count, Policy
from agent.plan import Plan
from agent.policy import load
from tests.kernel.net import CORP, INSIDE, ISP, LAN_GATEWAY, OUTSIDE, Host

#: The keys of a policy's table; JSON writes strings, numbers, lists and booleans as TOML does.
Table = Mapping[str, object]

#: I and O of the test net.
INSIDE_TABLE: Table = {"id": 1, "link": "vpn0", "addresses": [*INSIDE.values()], "next_hop": [*CORP.values()]}
OUTSIDE_TABLE: Table = {"id": 2, "link": "wan", "addresses": "auto", "next_hop": "auto"}
MEMBERS = ["10.9.0.0/24", "2001:db8:9::/64"]

LINKS = ("wan", "vpn0", "lan")


def policy_text(
    inside: Table | None = None,
    outside: Table | None = None,
    *,
    kernel: Table | None = None,
    downstream: list[str] | None = None,
    **others: Table,
) -> str:
    """A policy of I, O and others. What is given of I and of O replaces what they usually have."""
    identities = {"inside": {**INSIDE_TABLE, **(inside or {})}, "outside": {**OUTSIDE_TABLE, **(outside or {})}}
    lines = ['gateway = "gw1"'] + [f"downstream = {json.dumps(downstream)}"] * (downstream is not None)
    for name, table in (identities | others).items():
        lines += [f"[identity.{name}]", *_lines(table)]
    return "\n".join([*lines, "[kernel]", *_lines(kernel or {}), ""])


def _lines(table: Table) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]


def lay_links(gw: Host, far: Host) -> None:
    """The gateway's links and addresses as in the test net, with one host at the far end of them all.

    Nobody there answers; the next hops are known once for all, or the kernel's asking for them would be counted, too.
    """
    gw.ip_batch("\n".join(f"link add {link} type veth peer name {link} netns {far.name}" for link in LINKS))
    for host in (gw, far):
        host.ip_batch("\n".join(f"link set {link} up" for link in LINKS))
    gw.ip_batch(f"""
        address add {OUTSIDE["ipv4"]}/24 dev wan
        address add {OUTSIDE["ipv6"]}/64 dev wan
        address add {INSIDE["ipv4"]}/25 dev vpn0
        address add {INSIDE["ipv6"]}/64 dev vpn0
        address add {LAN_GATEWAY["ipv4"]}/24 dev lan
        address add {LAN_GATEWAY["ipv6"]}/64 dev lan
        route add default via {ISP["ipv4"]} dev wan
        route add default via {ISP["ipv6"]} dev wan
    """)
    hops = [(hop, "vpn0") for hop in CORP.values()] + [(hop, "wan") for hop in ISP.values()]
    gw.ip_batch("\n".join(f"neighbour add {hop} lladdr 02:00:00:00:00:01 dev {link}" for hop, link in hops))
    gw.settle()


@dataclass(frozen=True, slots=True)
class Admin:
    """An administrator of the host that this thread is in. `directory` is where the policy lies."""

    host: Host
    directory: Path

    @property
    def file(self) -> Path:
        return self.directory / "policy.toml"

    def write(self, text: str) -> Policy:
        """Write the policy and read it."""
        self.file.write_text(text)
        return load(self.file)

    def plan(self, text: str) -> Plan:
        """What is to be done to have this policy in force."""
        with reconcile.opened() as kernel:
            return reconcile.look(self.write(text), kernel).plan

    def apply(self, text: str) -> Plan:
        """Put a policy in force; the plan of it."""
        with reconcile.opened() as kernel:
            plan = reconcile.look(self.write(text), kernel).plan
            reconcile.apply(plan, kernel)
        return plan

    def remove(self) -> Plan:
        """Take away all that is idmark's; what that was."""
        with reconcile.opened() as kernel:
            return reconcile.remove(kernel)

    def counts(self, table: str = "idmark") -> dict[str, Count]:
        """The named counters by name, without those at zero."""
        with reconcile.opened() as kernel:
            return {name: count for name, count in kernel.nfnl.counts(table).items() if count.packets}

    def inventory(self) -> str:
        """All that this namespace has of what idmark might touch; what is the same is the same byte for byte."""
        routing = "rule list\nroute list table all\n"
        return "".join(
            (
                self.host.run(["nft", "list", "ruleset"]),
                *(self.host.run(["ip", "-N", family, "-batch", "-"], routing) for family in ("-4", "-6")),
                *_sysctls(),
            )
        )

    def words(self, *words: str) -> list[str]:
        """What stands behind `idmark` on a command line, with this policy."""
        return ["-c", str(self.file), *words]

    def command(self, *words: str) -> list[str]:
        """A command line of the real command."""
        return [sys.executable, "-m", "agent", *self.words(*words)]

    def idmark(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the real command to its end."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False)


def _sysctls() -> Iterator[str]:
    for path in sorted(Path("/proc/sys/net").glob("ipv[46]/conf/*/*")):
        with contextlib.suppress(OSError):  # stable_secret has no value until somebody writes one
            yield f"{path} {path.read_text()}"
