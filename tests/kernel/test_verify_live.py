"""The proof beside a real kernel: what is in force is proved, and what somebody changes there is told by a packet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import INSIDE, Host

POLICY = policy_text({"members": MEMBERS})


@pytest.fixture
def admin(netns: Host, peers: Peers, tmp_path: Path) -> Admin:
    lay_links(netns, peers("far"))
    admin = Admin(netns, tmp_path)
    admin.write(POLICY)
    return admin


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(POLICY, id="members"),
        pytest.param(
            policy_text({"members": MEMBERS, "masquerade": True, "clamp_mss": True, "when_down": "outside"}), id="more"
        ),
        pytest.param(policy_text({"when_down": "main"}, kernel={"enforce": False}), id="main"),
        pytest.param(policy_text({"members": ["10.9.0.0/16"]}, downstream=["lan"]), id="downstream"),
    ],
)
def test_what_is_in_force_is_proved(admin: Admin, policy: str) -> None:
    """After an apply the kernel is found to do what the policy wants, for every class; before it, not."""
    admin.write(policy)
    assert admin.idmark("verify", "--live").returncode == 1
    admin.apply(policy)
    done = admin.idmark("verify", "--live")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("proved: ")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        pytest.param("nft flush ruleset", "the nft table", id="no-table"),
        pytest.param("nft delete rule inet idmark postrouting handle LAST", "chain postrouting", id="a-rule-less"),
        pytest.param(
            "nft add element inet idmark left { 0x01000000 . wan : goto left-inside }",
            "leaving by wan",
            id="an-element",
        ),
        pytest.param("nft flush map inet idmark sources-ipv4-24", "fwmark", id="no-sources"),
        pytest.param("ip rule add priority 100 from 192.0.2.130 lookup main", "priority 100", id="a-foreign-rule"),
        pytest.param("ip rule delete priority 4001 fwmark 0x1000000/0x3f000000", "table 254", id="a-rule-of-ours"),
        pytest.param("ip route add 198.51.100.0/24 dev wan table 4001", "dev wan", id="a-foreign-route"),
        pytest.param("ip -6 route flush table 4001 proto 73", "2001:db8", id="no-ipv6-routes"),
    ],
)  # fmt: skip
def test_what_somebody_changed_is_told(admin: Admin, command: str, word: str) -> None:
    """What somebody changes in the kernel is found, with a packet that goes wrong by it."""
    admin.apply(POLICY)
    words = command.split()
    if words[-1] == "LAST":
        listing = admin.host.run(["nft", "-a", "-j", "list", "chain", "inet", "idmark", "postrouting"])
        words[-1] = str(max(item["rule"]["handle"] for item in json.loads(listing)["nftables"] if "rule" in item))
    admin.host.run(words)
    done = admin.idmark("verify", "--live")
    assert (done.returncode, done.stderr) == (1, "")
    assert word in done.stdout
    assert done.stdout.splitlines()[-1].startswith("REFUTED: ")


def test_an_empty_foreign_table_is_no_fault(admin: Admin) -> None:
    """A rule of somebody else's that comes first, to a table without a route for the packet, takes none."""
    admin.apply(POLICY)
    admin.host.ip("rule", "add", "priority", "220", "lookup", "220")
    assert admin.idmark("verify", "--live").returncode == 0
    admin.host.ip("route", "add", "198.51.100.0/24", "dev", "wan", "table", "220")
    done = admin.idmark("verify", "--live", "--json")
    assert done.returncode == 1
    (first, *_) = json.loads(done.stdout)["counterexamples"]
    assert "priority 220 lookup 220" in " ".join(first["by"])


def test_a_lookup_that_disagrees(admin: Admin) -> None:
    """Also where the texts and what was read back agree, the kernel's own answer is asked for."""
    admin.apply(POLICY)
    admin.host.sysctl("net/ipv4/ip_forward", 0)
    done = admin.idmark("verify", "--live")
    assert done.returncode == 1
    assert "the kernel's own route lookup" in done.stdout
    assert INSIDE["ipv4"] not in done.stdout
