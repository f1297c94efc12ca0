"""A policy on trial on a real systemd: its watchman is a unit, and no boot brings up what nobody has confirmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.machine import Machine
from tests.boot.units import POLICY, UNITS, ours

WATCHMAN = "$(systemctl list-units --plain --no-legend 'idmark-trial-*' | cut -d' ' -f1)"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with a policy in force, and another one beside it, /new.toml."""
    base, state, units, policy = (tmp_path_factory.mktemp(name) for name in ("base", "state", "units", "policy"))
    (policy / "policy.toml").write_text(POLICY)
    for name, text in UNITS.items():
        (units / name).parent.mkdir(exist_ok=True)
        (units / name).write_text(text)
    machine = Machine(base, state, units)
    try:
        machine.boot(policy / "policy.toml")
        machine.wait("systemctl is-active idmark && idmark plan")
        yield machine
    finally:
        machine.power_off()


@pytest.fixture(autouse=True)
def new(machine: Machine) -> None:
    machine.run("sed s/10.9.0.0/10.20.0.0/ /etc/idmark/policy.toml > /new.toml")


def test_a_unit_watches(machine: Machine) -> None:
    """The watchman is a unit of systemd's, killed and started again; the daemon is restarted; all goes back in time."""
    before = ours(machine)
    machine.run("idmark -c /new.toml apply --confirm-within 8s")
    assert "10.20.0.0/24" in ours(machine)
    machine.run(f"systemctl is-active {WATCHMAN} && systemctl kill -s KILL {WATCHMAN}")
    machine.run("systemctl restart idmark")
    machine.wait("systemctl is-active idmark")
    assert "10.20.0.0/24" in ours(machine)
    machine.wait("idmark history | tail -n 1 | grep -q 'rolled back: not confirmed within 8 seconds'")
    machine.wait("idmark plan")
    assert ours(machine) == before
    machine.wait(f"test -z {WATCHMAN}")
    assert machine.run("systemctl list-units --failed --plain --no-legend") == ""
    assert machine.run("find /run/idmark /var/lib/idmark ! -user idmark") == ""


def test_the_session_ends(machine: Machine) -> None:
    """The session that apply was started in ends, and systemd kills all that is left in it: but the watchman."""
    before = ours(machine)
    machine.run(
        "systemd-run --quiet --wait --collect --property=KillMode=control-group idmark -c /new.toml apply "
        "--confirm-within 4s"
    )
    assert "10.20.0.0/24" in ours(machine)
    machine.wait("idmark history | tail -n 1 | grep -q 'rolled back'")
    machine.wait("idmark plan")
    assert ours(machine) == before


def test_confirmed(machine: Machine) -> None:
    """What is confirmed stays, with the daemon and at the next boot of a machine whose policy it has become."""
    machine.run("idmark -c /new.toml apply --confirm-within 60s && idmark confirm")
    machine.wait("grep -q 10.20.0.0/24 /var/lib/idmark/applied.toml")
    machine.run("idmark rollback")
    machine.wait("grep -q 10.9.0.0/24 /var/lib/idmark/applied.toml && idmark plan")


def test_a_boot_in_between(machine: Machine, tmp_path: Path) -> None:
    """The power fails while a policy waits for confirmation: what comes up is the one before, though the file of the
    daemon holds the other one; until somebody applies it.
    """
    machine.run("systemctl stop idmark; cp /new.toml /etc/idmark/policy.toml; idmark apply --confirm-within 1h")
    assert "10.20.0.0/24" in ours(machine)
    machine.power_off()
    unconfirmed = tmp_path / "policy.toml"
    unconfirmed.write_text(POLICY.replace("10.9.0.0", "10.20.0.0"))
    machine.boot(unconfirmed)
    assert "10.9.0.0/24" in machine.run("cat /before-the-network")
    machine.wait("systemctl is-active idmark")
    assert "10.9.0.0/24" in ours(machine)
    assert "is not wanted: nobody confirmed it" in machine.run("journalctl -u idmark")
    machine.run("idmark apply")
    machine.run("systemctl restart idmark")
    assert "10.20.0.0/24" in ours(machine)
