"""The units on a real systemd. Not among the ordinary tests: it takes real root. `./dev boot` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.machine import Machine

#: 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW (linux/capability.h)
CAPABILITIES = f"{1 << 12 | 1 << 13:016x}"

POLICY = """
gateway = "gw1"

[identity.inside]
id = 1
link = "vpn0"
addresses = ["192.0.2.130"]
members = ["10.9.0.0/24"]
next_hop = "none"

[identity.outside]
id = 2
link = "eth0"
addresses = "auto"
"""

UNITS = {
    # Stands for whatever brings the links up here; writes down what was in force before.
    "network.service": """
[Unit]
DefaultDependencies=no
Wants=network-pre.target
After=network-pre.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'nft list ruleset; ip rule; ip route list table all proto 73; systemctl is-active idmark || :'
StandardOutput=file:/before-the-network
ExecStart=ip link set eth0 up
ExecStart=ip address add 203.0.113.2/24 dev eth0
ExecStart=ip route add default via 203.0.113.1
[Install]
WantedBy=multi-user.target
""",
    "idmark.service.d/impatient.conf": """
[Service]
WatchdogSec=3s
TimeoutAbortSec=1s
""",
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Iterator[Machine]:
    """A machine that has been switched on for the first time with a policy in /etc."""
    base, state, units = (tmp_path_factory.mktemp(name) for name in ("base", "state", "units"))
    for name, text in UNITS.items():
        (units / name).parent.mkdir(exist_ok=True)
        (units / name).write_text(text)
    machine = Machine(base, state, units)
    try:
        machine.boot(policy)
        yield machine
    finally:
        machine.power_off()


def main_pid(machine: Machine) -> int:
    return int(machine.run("systemctl show idmark -P MainPID"))


def ours(machine: Machine) -> str:
    """What is in force, without counters."""
    return machine.run("nft -s list ruleset; ip -N rule; ip -N route list table all proto 73")


def test_the_first_boot(machine: Machine) -> None:
    """Nothing has failed; the early unit had nothing to do, the other has said that it is ready, and what it does."""
    assert machine.run("systemctl list-units --failed --plain --no-legend") == ""
    assert machine.run("systemctl is-active idmark-early idmark") == "active\nactive\n"
    assert "no policy has been in force here yet" in machine.journal()
    assert "in force" in machine.run("systemctl show idmark -P StatusText")


def test_ready_before_the_network(machine: Machine) -> None:
    """On the first boot already the identities are closed before a link comes up."""
    before = machine.run("cat /before-the-network")
    assert "table inet idmark" in before
    assert "unreachable default table 4001" in before
    assert before.endswith("\nactive\n")


def test_beside_nftables_service(machine: Machine) -> None:
    """nftables.service, which begins with "flush ruleset", is through when we begin; later we put back what it took."""
    assert machine.run("systemctl is-active nftables && grep '^flush ruleset' /etc/nftables.conf")
    assert "nftables.service" in machine.run("systemctl show idmark-early -P After")
    before = ours(machine)
    machine.run("systemctl restart nftables")
    machine.wait("nft list table inet idmark && idmark plan")
    assert ours(machine) == before


def test_two_capabilities(machine: Machine) -> None:
    """It runs as its own user with two capabilities, and can get no others."""
    status = machine.run(f"cat /proc/{main_pid(machine)}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {CAPABILITIES}
    assert fields["Uid"].split()[0] == machine.run("id -u idmark").strip()
    assert fields["NoNewPrivs"] == "1"


def test_sysctls_are_within_reach(machine: Machine) -> None:
    """All of /proc/sys is read-only to it but for the network's, so that src_valid_mark is set where it must be."""
    assert machine.run("cat /proc/sys/net/ipv4/conf/eth0/src_valid_mark") == "1\n"
    assert machine.try_(f"nsenter -t {main_pid(machine)} -m sh -c ': > /proc/sys/kernel/hostname'").returncode != 0


def test_root_beside_it(machine: Machine) -> None:
    """What root applies is taken over, and whatever root leaves in the shared folders belongs to the agent's user."""
    machine.run("sed -i 's/10.9.0.0/10.10.0.0/' /etc/idmark/policy.toml && idmark apply")
    machine.wait("grep -q 10.10.0.0/24 /var/lib/idmark/applied.toml")
    assert "10.10.0.0/24" in ours(machine)
    assert machine.run("find /run/idmark /var/lib/idmark ! -user idmark") == ""
    machine.run("idmark plan")


def test_a_second_one_is_refused(machine: Machine) -> None:
    """Another run in the same namespace is told by which process it is kept in force already."""
    done = machine.try_("idmark run --listen none")
    assert done.returncode == 2
    assert f"pid {main_pid(machine)} (idmark run) is at work" in done.stderr


def test_reload(machine: Machine) -> None:
    """systemctl reload takes the changed policy; a faulty one is told in the journal, and changes nothing."""
    pid = main_pid(machine)
    machine.run("sed -i 's/10.10.0.0/10.11.0.0/' /etc/idmark/policy.toml && systemctl reload idmark")
    machine.wait("nft list map inet idmark sources-ipv4-24 | grep -q 10.11.0.0")
    before = ours(machine)
    machine.run("cp /etc/idmark/policy.toml /good; sed -i 's/id = 2/id = 99/' /etc/idmark/policy.toml")
    machine.run("systemctl reload idmark")
    machine.wait("journalctl -u idmark | grep -q '99 does not fit mask'")
    assert ours(machine) == before
    machine.run("cp /good /etc/idmark/policy.toml; systemctl reload idmark")
    assert main_pid(machine) == pid


def test_killed(machine: Machine) -> None:
    """After kill -9 it is started again; what was in force was so all the time."""
    before, pid = ours(machine), main_pid(machine)
    machine.run(f"kill -9 {pid}")
    assert ours(machine) == before
    machine.wait(f"systemctl is-active idmark && test $(systemctl show idmark -P MainPID) != {pid}")
    assert ours(machine) == before


def test_stopped_dead(machine: Machine) -> None:
    """One that does not move any longer is ended by the watchdog, and started again."""
    pid, before = main_pid(machine), ours(machine)
    machine.run(f"kill -STOP {pid}")
    machine.wait(f"systemctl is-active idmark && test $(systemctl show idmark -P MainPID) != {pid}")
    assert "Watchdog timeout" in machine.run("journalctl -u idmark")
    assert ours(machine) == before


def test_stop_and_start(machine: Machine) -> None:
    """Neither stopping nor restarting takes anything away."""
    before = ours(machine)
    machine.run("systemctl stop idmark idmark-early")
    assert machine.run("systemctl show idmark -P Result") == "success\n"
    assert ours(machine) == before
    machine.run("systemctl start idmark-early idmark")
    assert ours(machine) == before


def test_no_tricks_on_root(machine: Machine) -> None:
    """Where the agent's user has put a link to a file of root's in the place of a lock, root's apply refuses."""
    machine.run("systemctl stop idmark; echo precious > /run/precious; chmod 600 /run/precious")
    as_user = "setpriv --reuid=idmark --regid=idmark --clear-groups"
    for link in ("ln -s /run/precious", "mkfifo"):
        machine.run(f"cd /run/idmark/netns-* && {as_user} rm lock && {as_user} {link} lock")
        done = machine.try_("idmark apply")
        assert (done.returncode, "lock /run/idmark/netns-" in done.stderr) == (2, True)
        assert machine.run("cat /run/precious") == "precious\n"
    # A user can't make this one where fs.protected_hardlinks is on, as it should be.
    machine.run("cd /run/idmark/netns-* && rm lock && ln /run/precious lock")
    assert "it is not a file of this folder's owner" in machine.try_("idmark apply").stderr
    machine.run("rm /run/idmark/netns-*/lock; systemctl start idmark")


def test_beside_networkd(machine: Machine) -> None:
    """With the drop-in systemd-networkd comes and goes, and no identity loses what keeps it closed; without it,
    networkd takes all of that away, and it is put back.
    """
    network = "[Match]\\nName=eth0\\n[Network]\\nAddress=203.0.113.2/24\\nGateway=203.0.113.1\\n"
    machine.run(f"printf '{network}' > /etc/systemd/network/10-eth0.network")
    machine.run("journalctl --rotate && journalctl --vacuum-time=1s")
    for verb in ("start systemd-networkd", "restart systemd-networkd"):
        machine.run(f"systemctl {verb}")
        machine.wait("networkctl status eth0 | grep -q '(configured)'")
    machine.wait("idmark plan")
    before = ours(machine)
    assert "unreachable" not in machine.run("journalctl -u idmark")

    machine.run("rm /etc/systemd/networkd.conf.d/50-idmark.conf; systemctl restart systemd-networkd")
    machine.wait("journalctl -u idmark | grep -q 'repaired: .*unreachable'")
    machine.wait("idmark plan")
    assert ours(machine) == before
    machine.run("systemctl stop systemd-networkd")


def test_the_next_boot(machine: Machine) -> None:
    """After a power cut, and with the policy gone from /etc, the one of last time is in force before a link is up."""
    machine.power_off()
    machine.boot(None)
    before = machine.run("cat /before-the-network")
    assert "10.11.0.0/24" in before
    assert "unreachable default table 4002" in before
    early = machine.run("journalctl -u idmark-early")
    assert "in force: " in early
    # With the policy of last time it keeps on, and says why.
    machine.wait("systemctl is-active idmark")
    assert "10.11.0.0/24" in ours(machine)


def test_closed_even_when_the_daemon_cannot_start(machine: Machine) -> None:
    """Where the daemon can't start the early unit alone has closed the identities; the boot goes on, and so do the
    tries: more than the five in ten seconds that systemd stops at if it isn't told otherwise.
    """
    (machine.units / "idmark.service.d" / "broken.conf").write_text("[Service]\nExecStart=\nExecStart=/bin/false\n")
    machine.power_off()
    machine.boot(None)
    before = machine.run("cat /before-the-network")
    assert "10.11.0.0/24" in before
    assert "unreachable default table 4001" in before
    machine.wait("test $(systemctl show idmark -P NRestarts) -gt 5")
