"""The systemd units, and the other files of deploy/. On a real systemd they are tried by tests/boot."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from agent.model import PROTOCOL

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
#: Exposure in tenths, as `systemd-analyze security` counts it: 2.0 and better is "OK".
EXPOSURE = 20


@pytest.fixture
def installed(tmp_path: Path) -> list[str]:
    """The units as they are, but for the command, which need not be on this machine."""
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/local/sbin/idmark", "/bin/true"))
    return [str(tmp_path / unit.name) for unit in UNITS]


def test_verify(installed: list[str]) -> None:
    """systemd has nothing to say about the units: no unknown key, no cycle, no missing reference."""
    done = subprocess.run(["systemd-analyze", "verify", *installed], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "idmark" in line]
    assert (done.returncode, ours) == (0, [])


def test_security(installed: list[str]) -> None:
    """`systemd-analyze security` says OK of each unit."""
    for unit in installed:
        words = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", unit]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_same_walls() -> None:
    """Both units run as the same user, behind the same walls."""
    walls = [unit.read_text().partition("# Who it is")[2].partition("[Install]")[0] for unit in UNITS]
    assert len(walls) == 2
    assert walls[0] == walls[1] != ""


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_it_waits_for_nobody_who_waits_for_it(unit: Path) -> None:
    """The units come before the network, and so wait for nothing that comes after it."""
    after = " ".join(re.findall(r"^(?:After|Wants|Requires)=(.*)$", unit.read_text(), re.MULTILINE)).split()
    assert "network-pre.target" in " ".join(re.findall(r"^Before=(.*)$", unit.read_text(), re.MULTILINE)).split()
    assert not {"network.target", "network-online.target", "dbus.service", "basic.target", "sysinit.target"} & {*after}


def test_names_for_ip() -> None:
    """ip(8) gets the name of our protocol number, and an example's table names that go with the default numbers."""
    protocols = (DEPLOY / "iproute2/rt_protos.d/idmark.conf").read_text()
    assert re.search(rf"^{PROTOCOL}\s+idmark$", protocols, re.MULTILINE)
    tables = (DEPLOY / "iproute2/rt_tables.d/idmark.conf").read_text()
    assert re.findall(r"^(\d+)\s+(\S+)$", tables, re.MULTILINE) == [
        ("4001", "idmark-inside"),
        ("4002", "idmark-outside"),
    ]


def test_sysctls_change_nothing_unasked() -> None:
    """What an operator may want is there to be chosen: installed as it is, the file sets nothing, and for no `all`."""
    lines = (DEPLOY / "sysctl.d/50-idmark.conf").read_text().splitlines()
    assert all(line.startswith("#") or not line for line in lines)
    settings = [line.removeprefix("#").strip() for line in lines if re.match(r"#\s?net\.", line)]
    assert settings
    assert not [line for line in settings if re.search(r"conf\.all\.(rp_filter|src_valid_mark)", line)]
