"""The lab itself: it shows the problem, it counts what leaks, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent.addresses import Family
from agent.lab import LabError, hosts, net, sandbox, vpn
from agent.lab.lab import POLICY, Lab
from agent.lab.probes import BROKEN, Outcome, matrix
from tests.kernel.running import PATIENCE, eventually
from tests.lab.conftest import Build
from tests.lab.processes import processes

VPNS = pytest.mark.parametrize("kind", list(vpn.VPNS))


def failed(outcomes: list[Outcome]) -> set[tuple[str, Family]]:
    """Which probes failed."""
    return {(outcome.probe.name, outcome.probe.family) for outcome in outcomes if not outcome.ok}


# --- the problem -----------------------------------------------------------------------------------------------------


@VPNS
def test_the_problem(build: Build, kind: str) -> None:
    """Without the agent exactly the probes fail that the demo explains, in both families; the others pass."""
    assert failed(build(kind).probe_matrix()) == {(name, family) for name in BROKEN for family in Family}


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_the_problem_is_no_matter_of_icmp(lab: Lab, kind: str) -> None:
    """Without the agent the same probes fail by UDP and TCP."""
    assert failed(lab.probe_matrix(kind)) == {(name, family) for name in BROKEN for family in Family}


@pytest.mark.parametrize("name", list(BROKEN))
def test_why(lab: Lab, name: str) -> None:
    """The explanation of each failure is true: one packet a family is dropped where it says, and none elsewhere."""
    lab.probe(replace(probe, wait=0.5) for probe in matrix() if probe.name == name)
    dropped = {place.partition(" ")[0]: seen.packets for place, seen in lab.leaks().items() if seen.packets}
    assert len(dropped) == 1
    assert f"{next(iter(dropped))} drops" in BROKEN[name]
    assert [seen.packets for seen in lab.leaks().values() if seen.packets] == [1, 1]


def test_policy_fits_the_net() -> None:
    """The lab's policy speaks of the lab's addresses and links."""
    identities = tomllib.loads(POLICY.read_text(encoding="utf-8"))["identity"]
    assert identities["inside"]["addresses"] == list(net.INSIDE.values())
    assert identities["inside"]["link"] == net.TUNNEL.near.name
    for family in Family:
        members = [ip_network(text) for text in identities["inside"]["members"]]
        assert any(ip_address(net.LAN[family]) in network for network in members)
    assert identities["outside"]["link"] in {end.name for end in net.interfaces("gw")}


# --- what a test can do with it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "header"), [(Family.IPV4, 20), (Family.IPV6, 40)], ids=list(Family))
def test_counting_is_exact(lab: Lab, family: Family, header: int) -> None:
    """So many pings are so many packets on the far side, with the bytes of IP header, ICMP header and body."""
    match = f'iifname "gw" {family.nft} saddr {net.INSIDE[family]}'
    with lab.counting("corp", match) as seen:
        assert lab.ping("gw", net.CHOST[family], net.INSIDE[family], count=5, size=100).ok
        assert seen() == (5, 5 * (header + 8 + 100))


@VPNS
def test_mtu(build: Build, kind: str) -> None:
    """Both ends of the tunnel have the MTU that was asked for."""
    lab = build(kind, 1280)
    shown = [json.loads(lab.run(end.host, ["ip", "-j", "link", "show", end.name]).stdout)[0] for end in net.TUNNEL]
    assert [link["mtu"] for link in shown] == [1280, 1280]


def test_link_down_and_up(lab: Lab) -> None:
    """A link that was down is as before when it is up again, with its addresses and its routes of main."""
    before = lab.snapshot("gw")
    lab.link_down("gw", "vpn0")
    assert lab.snapshot("gw") != before
    assert not lab.ping("chost", net.INSIDE[Family.IPV4], wait=0.5).ok
    lab.link_up("gw", "vpn0")
    assert sorted(lab.snapshot("gw").splitlines()) == sorted(before.splitlines())
    assert lab.ping("chost", net.INSIDE[Family.IPV4]).ok


def test_failure_says_what_failed(lab: Lab) -> None:
    """A command that fails raises with its host, its words and its exit code."""
    with pytest.raises(LabError, match=r"exec wild ip link show nowhere: exit 1: Device \"nowhere\" does not exist"):
        lab.run("wild", ["ip", "link", "show", "nowhere"])


def test_daemon_that_ends_tells_why() -> None:
    """Waiting ends at once when a daemon has ended, with the last words of its log."""
    hosts.run(["ip", "netns", "add", "wild"])
    try:
        alone = hosts.Hosts()
        alone.daemon("wild", ["sh", "-c", "echo the key does not fit; exit 3"])
        with pytest.raises(LabError, match="the VPN: sh on wild ended with 3: the key does not fit"):
            alone.wait("the VPN", lambda: False, PATIENCE)
        alone.close()
    finally:
        hosts.run(["ip", "netns", "delete", "wild"])


# --- nothing stays ---------------------------------------------------------------------------------------------------


def interrupt(step: str) -> None:
    """Somebody presses Ctrl-C when the hosts are there, and the VPN is about to be started."""
    if "VPN" in step:
        raise KeyboardInterrupt


def traces() -> tuple[list[str], list[str], list[str]]:
    """What a lab could leave behind in the sandbox: namespaces, processes, files."""
    names = [path.name for path in Path("/run/netns").glob("*")]
    return names, sorted(processes().values()), [path.name for path in hosts.DIRECTORY.glob("*")]


@VPNS
def test_close_leaves_nothing(kind: str) -> None:
    """When a lab is closed, its namespaces, processes and files are gone."""
    before = traces()
    with Lab(kind) as lab:
        lab.popen("wild", ["sleep", "1000"])
        assert traces() != before
    assert traces() == before


def test_interrupted_building_leaves_nothing() -> None:
    """A Ctrl-C when the VPN is about to be started takes down what is there already."""
    before = traces()
    with pytest.raises(KeyboardInterrupt):
        Lab(report=interrupt)
    assert traces() == before


def test_sandbox_is_private() -> None:
    """Namespaces and links that are made in a sandbox are not seen outside; output and exit code are."""
    script = "ip netns add elsewhere; ip link add cable type veth; ip -br link; exit 7"
    done = subprocess.run(sandbox.supervised(["sh", "-c", script]), capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "cable" in done.stdout
    assert "cable" not in subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert not Path("/run/netns/elsewhere").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
def test_killed_sandbox_leaves_nothing(number: signal.Signals) -> None:
    """However its supervisor is ended, all that runs in a sandbox is ended too."""
    script = "setsid sleep 54321 & echo ready; wait"
    with subprocess.Popen(sandbox.supervised(["sh", "-c", script]), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert eventually(lambda: any("sleep 54321" in words for words in processes().values()))
        process.send_signal(number)
        code = process.wait(PATIENCE)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert eventually(lambda: not any("54321" in words for words in processes().values()))


# --- up, shell and down ----------------------------------------------------------------------------------------------


@pytest.fixture
def idmark_lab(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `idmark lab WORDS...`, with a state directory of the test's own; ends what is up."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent", "lab", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    yield run
    run("down")


def test_up_shell_down(idmark_lab: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """A lab that is up takes commands on its hosts, passes on their exit codes, and goes without a trace."""
    before = traces()
    assert idmark_lab("up").returncode == 0
    done = idmark_lab("shell", "wild", "--", "sh", "-c", "ip -4 -br address show isp; command -v idmark; exit 7")
    assert "198.51.100.10/24" in done.stdout
    assert "/idmark" in done.stdout
    assert done.returncode == 7
    assert idmark_lab("down").returncode == 0
    assert traces() == before
    assert not list(tmp_path.iterdir())


def test_up_with_the_policy_applied(idmark_lab: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """With --apply the policy is in force on the gateway as soon as the lab is up."""
    assert idmark_lab("up", "--apply").returncode == 0
    done = idmark_lab("shell", "gw", "--", "idmark", "-c", os.fspath(POLICY), "plan")
    assert (done.returncode, done.stdout) == (0, "# in force: nothing to do\n")


@VPNS
def test_demo(idmark_lab: Callable[..., subprocess.CompletedProcess[str]], kind: str) -> None:
    """The demo shows the problem and its cure, says that every probe passes, and leaves nothing behind."""
    before = traces()
    done = idmark_lab("demo", "--vpn", kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 packets left by the other identity's link" in done.stdout
    assert "\n24 of 24 probes pass, " in done.stdout
    assert "in force    policy " in done.stdout
    assert traces() == before


def test_one_lab_at_a_time(idmark_lab: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A second lab is refused, and the first one stays."""
    assert idmark_lab("up").returncode == 0
    second = idmark_lab("up")
    assert second.returncode == 2
    assert "a lab is up already (WireGuard, pid " in second.stderr
    assert idmark_lab("shell", "gw", "true").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["shell", "gw"], "no lab is up: idmark lab up", id="shell"),
        pytest.param(["down"], "no lab is up", id="down"),
        pytest.param(["shell", "moon"], "no host moon in the lab: there are wild, isp, gw", id="host"),
        pytest.param(["up", "--vpn", "vtun"], "no such VPN: vtun (there are wireguard, openvpn)", id="vpn"),
    ],
)
def test_friendly_refusals(
    idmark_lab: Callable[..., subprocess.CompletedProcess[str]], words: list[str], message: str
) -> None:
    """What can't be done is refused in one line, with exit code 2."""
    done = idmark_lab(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_reused_pid_is_not_killed(idmark_lab: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """A process that has the pid of a lab which was is left alone: its start time is another."""
    directory = tmp_path / "idmark-lab"
    directory.mkdir(mode=0o700)
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        (directory / "holder.json").write_text(json.dumps({"pid": stranger.pid, "start": 1, "vpn": "wireguard"}))
        done = idmark_lab("down")
        survives = stranger.poll() is None
        stranger.kill()
    assert "no lab is up" in done.stderr
    assert survives


def test_foreign_state_directory(idmark_lab: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """A state directory which others may write to is not trusted."""
    (tmp_path / "idmark-lab").mkdir(mode=0o700)
    (tmp_path / "idmark-lab").chmod(0o777)
    assert "not a directory of this user's alone" in idmark_lab("up").stderr
