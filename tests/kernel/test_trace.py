"""explain --trace: the kernel's own account of one flow, and nothing left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, LAN_GATEWAY, LAN_HOST, PATIENCE, WILD, Host

#: What is printed once the flow is being traced.
STARTED = "tracing for "


@pytest.fixture
def far(netns: Host, peers: Peers) -> Host:
    """The far end of all links; on the LAN's it is the host behind the gateway."""
    far = peers("far")
    lay_links(netns, far)
    for family, option in (("ipv4", "-4"), ("ipv6", "-6")):
        length = "24" if family == "ipv4" else "64"
        far.ip("address", "add", f"{LAN_HOST[family]}/{length}", "dev", "lan")
        far.ip(option, "route", "add", "default", "via", LAN_GATEWAY[family], "dev", "lan")
    far.settle()
    return far


@pytest.fixture
def admin(netns: Host, far: Host, tmp_path: Path) -> Admin:
    admin = Admin(netns, tmp_path)
    admin.apply(policy_text({"members": MEMBERS}))
    return admin


def started(admin: Admin, *words: str) -> subprocess.Popen[str]:
    """explain, from the moment on that it traces."""
    process = subprocess.Popen(
        admin.command("explain", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    while not (line := process.stdout.readline()).startswith(STARTED):
        assert line, process.communicate()
    return process


def tables(host: Host) -> list[str]:
    return [item["table"]["name"] for item in host.nft_json("list", "tables")]


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_a_forwarded_flow(admin: Admin, far: Host, family: str) -> None:
    """Each rule that a forwarded packet of the flow meets is told by its comment, with hook, verdict and mark."""
    process = started(admin, LAN_HOST[family], WILD[family], "--in", "lan", "--trace", "1")
    far.send(WILD[family], LAN_HOST[family])
    far.send(INSIDE[family], LAN_HOST[family])  # another flow
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"packet 1: {LAN_HOST[family]} -> {WILD[family]}, UDP"
    assert [line for line in lines if line.startswith("packet")] == lines[:1]
    title = "IPv4 /24" if family == "ipv4" else "IPv6 /64"
    told = "\n".join(lines)
    assert f'  prerouting  inet idmark prerouting, "{title}" -> goto id-inside\n' in told
    assert '  prerouting  inet idmark id-inside, "fwmark 0x1000000/0x3f000000" -> continue, mark 0x1000000\n' in told
    assert '  postrouting inet idmark postrouting, "by its own link" -> goto left-inside, mark 0x1000000' in told


def test_what_this_host_sends(admin: Admin) -> None:
    """A flow of this host's own is traced from the output hook on; --json has each place as a program wants it."""
    words = admin.command("explain", INSIDE["ipv4"], WILD["ipv4"], "--trace", "1", "--json")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    while not any(name.startswith("tracing-") for name in tables(admin.host)):
        assert process.poll() is None
    admin.host.send(WILD["ipv4"], INSIDE["ipv4"])
    out, _ = process.communicate(timeout=PATIENCE)
    trace = json.loads(out)["trace"]
    assert {place["packet"] for place in trace} == {1}
    assert [place["hook"] for place in trace if place["chain"] == "id-inside"][:1] == ["postrouting"]  # by its own road
    last = trace[-1]
    assert (last["hook"], last["verdict"], last["mark"]) == ("postrouting", "accept", 0x1000000)


def test_a_misrouted_packet_is_seen_dropped(admin: Admin, far: Host) -> None:
    """Where somebody's rule sends the flow by another link, the trace ends where it is dropped."""
    admin.host.ip("rule", "add", "priority", "100", "from", LAN_HOST["ipv4"], "lookup", "main")
    process = started(admin, LAN_HOST["ipv4"], WILD["ipv4"], "--in", "lan", "--trace", "1")
    far.send(WILD["ipv4"], LAN_HOST["ipv4"])
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1  # the kernel's route lookup disagrees, too
    assert out.splitlines()[-1].startswith('  postrouting inet idmark leaving, "misrouted')
    assert " -> drop, mark 0x1000000" in out.splitlines()[-1]


def test_so_many_packets_at_most(admin: Admin, far: Host) -> None:
    """Of a busy flow the first packets are told, and then it is over, long before the time is."""
    process = started(admin, LAN_HOST["ipv4"], WILD["ipv4"], "--in", "lan", "--trace", "60")
    for _ in range(15):
        far.send(WILD["ipv4"], LAN_HOST["ipv4"])
    out, _ = process.communicate(timeout=PATIENCE)
    assert sum(line.startswith("packet") for line in out.splitlines()) == 10


def test_nothing_came(admin: Admin) -> None:
    """Silence is said."""
    done = admin.idmark("explain", LAN_HOST["ipv4"], WILD["ipv4"], "--in", "lan", "--trace", "0.1")
    assert done.stdout.splitlines()[-1] == "no such packet came"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left(admin: Admin, number: signal.Signals) -> None:
    """However it ends, the table that traces goes with it, and idmark's own is as it was."""
    before = admin.inventory()
    process = started(admin, INSIDE["ipv4"], WILD["ipv4"], "--trace", "60")
    assert [name for name in tables(admin.host) if name != "idmark"] == [f"tracing-{process.pid}"]
    assert admin.idmark("plan").returncode == 0
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=PATIENCE)
    assert err == ""
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    # The kernel takes it away in work of its own.
    for _ in range(100):
        if tables(admin.host) == ["idmark"]:
            break
        select.select([], [], [], 0.02)
    assert admin.inventory() == before


def test_no_such_link(admin: Admin) -> None:
    """A link that isn't there can't be watched: trouble, in a line."""
    done = admin.idmark("explain", LAN_HOST["ipv4"], WILD["ipv4"], "--in", "nowhere", "--trace", "1")
    assert done.returncode == 2
    assert done.stderr == "idmark: find link nowhere: No such device\n"
