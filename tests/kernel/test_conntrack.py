"""Connections that are forgotten: those of one identity, translated or not, and nobody else's."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from agent import reconcile
from agent.desired import Desired
from agent.flows import flows_of
from agent.kernel.conntrack import BATCH, Conntrack
from tests.kernel.admin import MEMBERS, Admin, policy_text
from tests.kernel.conftest import Gateway
from tests.kernel.net import CHOST, INSIDE, LAN_GATEWAY, LAN_HOST, OUTSIDE, WILD, Host
from tests.kernel.test_facts_marking import both_families

POLICY = policy_text({"members": MEMBERS, "masquerade": True})


@pytest.fixture
def desired(gateway: Gateway, tmp_path: Path) -> Desired:
    """I with members that it translates, and O, in force; and a port of O's that leads to a member of I's."""
    gateway.gw.nft(f"""
        table inet forward {{
            chain dstnat {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr {OUTSIDE["ipv4"]} udp dport 8053 dnat ip to {LAN_HOST["ipv4"]}:53
                ip6 daddr {OUTSIDE["ipv6"]} udp dport 8053 dnat ip6 to [{LAN_HOST["ipv6"]}]:53
            }}
        }}
    """)
    admin = Admin(gateway.gw, tmp_path)
    admin.apply(POLICY)
    with reconcile.opened() as kernel:
        return reconcile.look(admin.write(POLICY), kernel).desired


def tracked(gw: Host) -> set[str]:
    """The connections as conntrack(8) lists them: who began it with whom, at which port."""
    listed = "".join(gw.run(["conntrack", "-f", family, "-L", "-p", "udp"]) for family in ("ipv4", "ipv6"))
    return {" ".join(found) for found in re.findall(r"^\S+ .*?src=(\S+) dst=(\S+) sport=\d+ dport=(\d+)", listed, re.M)}


def talk(gateway: Gateway, family: str) -> dict[str, str]:
    """A datagram of each kind, by what it is: the connections that are tracked of them."""
    o, i, wild, chost = (ends[family] for ends in (OUTSIDE, INSIDE, WILD, CHOST))
    member, lan = LAN_HOST[family], LAN_GATEWAY[family]
    kinds = {
        "from I": (gateway.gw, chost, i, 1),
        "to I": (gateway.chost, i, chost, 2),
        "from a member, translated": (gateway.lan, wild, member, 3),
        "from O": (gateway.gw, wild, o, 4),
        "to O": (gateway.wild, o, wild, 5),
        "to O, and on to a member": (gateway.wild, o, wild, 8053),
        "a member with its gateway": (gateway.lan, lan, member, 7),
        "the gateway with a member": (gateway.gw, member, lan, 9),
    }
    for host, destination, source, port in kinds.values():
        with contextlib.suppress(ConnectionRefusedError):
            host.send(destination, source, port=port)
    return {kind: f"{source} {destination} {port}" for kind, (_, destination, source, port) in kinds.items()}


@both_families
@pytest.mark.parametrize(
    ("name", "forgotten"),
    [
        pytest.param("inside", {"from I", "to I", "from a member, translated"}, id="inside"),
        pytest.param("outside", {"from O", "to O", "to O, and on to a member"}, id="outside"),
    ],
)
def test_one_identitys_connections(
    gateway: Gateway, desired: Desired, family: str, name: str, forgotten: set[str]
) -> None:
    """What goes by an identity's road is forgotten, by whatever end it is that identity's and wherever it is sent on;
    what others do, and what members do with their gateway, stays.
    """
    kinds = talk(gateway, family)
    assert set(kinds.values()) <= tracked(gateway.gw)
    count = Conntrack().forget(flows_of(name, desired))
    left = tracked(gateway.gw)
    assert {kind for kind, flow in kinds.items() if flow not in left} == forgotten
    assert count >= len(forgotten)


def test_a_second_time_there_is_nothing(gateway: Gateway, desired: Desired) -> None:
    """What is forgotten is gone: it is counted once."""
    talk(gateway, "ipv4")
    assert Conntrack().forget(flows_of("inside", desired)) > 0
    assert Conntrack().forget(flows_of("inside", desired)) == 0


def test_more_than_a_batch(gateway: Gateway, desired: Desired) -> None:
    """Many connections go in several messages to the kernel, and every one of them is counted."""
    count = 2 * BATCH + 1
    with gateway.gw.udp(INSIDE["ipv4"]) as mine, gateway.gw.udp(OUTSIDE["ipv4"]) as others:
        for port in range(1, count + 1):
            mine.sendto(b"x", (CHOST["ipv4"], port))
        others.sendto(b"x", (WILD["ipv4"], 1))
    assert Conntrack().forget(flows_of("inside", desired)) == count
    assert tracked(gateway.gw) == {f"{OUTSIDE['ipv4']} {WILD['ipv4']} 1"}


def test_zones_are_told_apart(gateway: Gateway, desired: Desired) -> None:
    """A connection of another zone is deleted there, and its twin of no zone where that is."""
    flow = f"-p udp -t 60 -s {INSIDE['ipv4']} -d {CHOST['ipv4']} --sport 1 --dport 2"
    for zone in ("", "-w 7"):
        gateway.gw.run(f"conntrack -I {flow} {zone}".split())
    assert Conntrack().forget(flows_of("inside", desired)) == 2
    assert tracked(gateway.gw) == set()


def test_nothing_is_wanted(gateway: Gateway, desired: Desired) -> None:
    """Where no connection is wanted none is touched."""
    kinds = talk(gateway, "ipv4")
    assert Conntrack().forget(lambda _: False) == 0
    assert set(kinds.values()) <= tracked(gateway.gw)


def test_the_road_is_taken_anew(gateway: Gateway, desired: Desired) -> None:
    """A member's stream that is forgotten is translated anew: to the address that its identity has then."""
    with gateway.lan.udp(LAN_HOST["ipv4"], 4000) as stream, gateway.corp.sniff("gw") as link:
        stream.sendto(b"x", (CHOST["ipv4"], 9))
        gateway.gw.ip("address", "add", "192.0.2.131/25", "dev", "vpn0")
        gateway.gw.nft(f"""
            table inet first {{
                chain srcnat {{
                    type nat hook postrouting priority 90; policy accept;
                    ip saddr {LAN_HOST["ipv4"]} snat ip to 192.0.2.131
                }}
            }}
        """)
        stream.sendto(b"x", (CHOST["ipv4"], 9))
        Conntrack().forget(flows_of("inside", desired))
        stream.sendto(b"x", (CHOST["ipv4"], 9))
        sources = [str(packet.source) for packet in link.packets(destination=CHOST["ipv4"])]
    assert sources == [INSIDE["ipv4"], INSIDE["ipv4"], "192.0.2.131"]
