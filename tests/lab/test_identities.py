"""Each identity's packets go by its own link: the matrix, on gateways of many kinds, and every packet counted once."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest

from agent.addresses import Family
from agent.lab import net, vpn
from agent.lab.lab import Count, Lab
from agent.lab.probes import matrix
from tests.kernel.net import ISP
from tests.lab.conftest import BuildGateway
from tests.lab.gateway import FORWARDED, REDIRECTED, Gateway, failures, forward_probes, forwards

#: A counter's identity, family and kind.
Key = tuple[str, Family, str]

LINKS = [end.name for end in net.interfaces("gw")]


# --- the matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vpn_kind", list(vpn.VPNS))
@pytest.mark.parametrize("kind", ["ping", "udp", "tcp"])
def test_matrix(build_gateway: BuildGateway, vpn_kind: str, kind: str) -> None:
    """With the agent every probe of the matrix passes in both families, and nothing leaks."""
    gateway = build_gateway(vpn_kind)
    gateway.apply()
    assert failures(gateway.lab.probe_matrix(kind)) == {}
    assert gateway.leaked() == {}


def strict(lab: Lab) -> None:
    """Strict reverse path filters everywhere."""
    keys = [f"net.ipv4.conf.{name}.rp_filter=1" for name in ("all", "default", *LINKS)]
    lab.run("gw", ["sysctl", "-qw", *keys])


def no_default(lab: Lab) -> None:
    """Main knows the connected networks and the way to the VPN's endpoint only."""
    for family in ("-4", "-6"):
        lab.run("gw", ["ip", family, "route", "delete", "default"])


def both(lab: Lab) -> None:
    strict(lab)
    no_default(lab)


@pytest.mark.parametrize("harden", [strict, no_default, both])
def test_hardened_gateway(gateway: Gateway, harden: Callable[[Lab], None]) -> None:
    """Strict rp_filter everywhere and no default in main take nothing away: the matrix, port forwards, downloads."""
    harden(gateway.lab)
    gateway.lab.nft("gw", forwards())
    gateway.apply(outside={"next_hop": [*ISP.values()]})
    for kind in ("ping", "tcp"):
        assert failures(gateway.lab.probe_matrix(kind)) == {}
    # Not to an address of the gateway that is no identity's: where main has no default, its reply finds no first route.
    for port in (FORWARDED, REDIRECTED):
        assert failures(gateway.lab.probe(forward_probes(port, kind="tcp", size=200_000))) == {}
    assert gateway.leaked() == {}


def test_strict_filters_without_the_setting_of_all(gateway: Gateway) -> None:
    """For strict rp_filter only the identities' own links get src_valid_mark: not `all`, and no other link."""
    strict(gateway.lab)
    gateway.apply()
    keys = [f"net.ipv4.conf.{name}.src_valid_mark" for name in ("all", "default", *LINKS)]
    values = gateway.lab.run("gw", ["sysctl", "-n", *keys]).stdout.split()
    found = dict(zip(("all", "default", *LINKS), values, strict=True))
    assert found == {"all": "0", "default": "0", "wan": "1", "lan": "0", "vpn0": "1"}
    filters = gateway.lab.run("gw", ["sysctl", "-n", *(key.replace("src_valid_mark", "rp_filter") for key in keys)])
    assert set(filters.stdout.split()) == {"1"}


# --- marks -----------------------------------------------------------------------------------------------------------

#: Bits outside of our mask, which a neighbour sets and reads again.
FOREIGN = 0x40FF0002
NEIGHBOUR = f"""
    table inet neighbour {{
        counter kept {{ }}
        counter lost {{ }}
        chain prerouting {{
            type filter hook prerouting priority mangle; policy accept;
            meta mark set {FOREIGN:#x}
        }}
        chain output {{
            type route hook output priority mangle; policy accept;
            meta mark set {FOREIGN:#x}
        }}
        chain postrouting {{
            type filter hook postrouting priority 400; policy accept;
            oifname {{ "wan", "vpn0" }} meta mark & 0xc0ffffff == {FOREIGN:#x} counter name kept
            oifname {{ "wan", "vpn0" }} meta mark & 0xc0ffffff != {FOREIGN:#x} counter name lost
        }}
    }}
"""


def test_foreign_mark_bits(gateway: Gateway) -> None:
    """The bits that a neighbour has set are on every packet of every identity that leaves, forwarded and local."""
    gateway.lab.nft("gw", NEIGHBOUR)
    gateway.apply()
    assert failures(gateway.lab.probe_matrix()) == {}
    listed = gateway.lab.run("gw", ["nft", "list", "counters", "table", "inet", "neighbour"]).stdout
    packets = {name: int(number) for name, number in re.findall(r"counter (\w+) {\s+packets (\d+)", listed)}
    assert packets["kept"] >= len(matrix()) - 4  # all rows but those between the gateway and its LAN
    assert packets["lost"] == 0


CONNECTION_MARKS = """
    table inet neighbour {
        chain prerouting {
            type filter hook prerouting priority mangle; policy accept;
            ct state new ct mark set 0x1234
        }
        chain output {
            type route hook output priority mangle; policy accept;
            ct state new ct mark set 0x1234
        }
    }
"""


@pytest.mark.parametrize(("table", "mark"), [("", "0"), (CONNECTION_MARKS, "4660")], ids=["none", "foreign"])
def test_connection_marks(gateway: Gateway, table: str, mark: str) -> None:
    """A connection's mark is what a neighbour has made it, or nothing: we never write it."""
    gateway.lab.nft("gw", table)
    gateway.apply()
    gateway.lab.run("gw", ["conntrack", "-F"])
    assert failures(gateway.lab.probe_matrix()) == {}
    listed = [
        line
        for family in ("ipv4", "ipv6")
        for line in gateway.lab.run("gw", ["conntrack", "-L", "-f", family]).stdout.splitlines()
        if "icmp" in line
    ]
    assert len(listed) >= 20
    assert [line for line in listed if f"mark={mark} " not in line] == []


#: What wg-quick and NetworkManager do for their own marks, here for every packet.
SAVE_AND_RESTORE = """
    table inet wg-quick-vpn0 {
        chain premangle {
            type filter hook prerouting priority mangle; policy accept;
            meta mark set ct mark
        }
        chain outmangle {
            type route hook output priority mangle; policy accept;
            meta mark set ct mark
        }
        chain postmangle {
            type filter hook postrouting priority mangle; policy accept;
            ct mark set meta mark
        }
    }
"""


def test_beside_a_table_that_saves_and_restores_marks(gateway: Gateway) -> None:
    """A neighbour that saves whole marks and restores them into our bits changes no packet's way.

    A few exchanges each: what is restored is the mark of a packet before, also that of the other direction.
    """
    gateway.lab.nft("gw", SAVE_AND_RESTORE)
    gateway.lab.nft("gw", forwards())
    gateway.apply()
    for kind in ("ping", "udp"):
        assert failures(gateway.lab.probe(replace(probe, count=3) for probe in matrix(kind))) == {}
    assert failures(gateway.lab.probe(forward_probes(kind="tcp", size=200_000))) == {}
    assert gateway.leaked() == {}
    counts = gateway.counts()
    assert {key: count for key, count in counts.items() if "misrouted" in key[2] and count.packets} == {}


# --- counters --------------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """Who pings whom; `identity` is the one that it counts for, or none."""

    name: str
    host: str
    source: dict[Family, str] | None
    target: dict[Family, str]
    identity: str


FLOWS = [
    Flow("gw(I) -> chost", "gw", net.INSIDE, net.CHOST, "inside"),
    Flow("gw(I) -> wild", "gw", net.INSIDE, net.WILD, "inside"),
    Flow("gw(O) -> wild", "gw", net.OUTSIDE, net.WILD, "outside"),
    Flow("gw(O) -> chost", "gw", net.OUTSIDE, net.CHOST, "outside"),
    Flow("wild -> I", "wild", None, net.INSIDE, "inside"),
    Flow("chost -> I", "chost", None, net.INSIDE, "inside"),
    Flow("wild -> O", "wild", None, net.OUTSIDE, "outside"),
    Flow("chost -> O", "chost", None, net.OUTSIDE, "outside"),
    Flow("lan -> wild", "lan", None, net.WILD, "inside"),
    Flow("lan -> chost", "lan", None, net.CHOST, "inside"),
    Flow("lan -> gw", "lan", None, net.LAN_GATEWAY, ""),
    Flow("gw(I) -> lan", "gw", net.INSIDE, net.LAN, ""),
    Flow("lan -> O", "lan", None, net.OUTSIDE, ""),
]


PINGS, SIZE = 7, 100
#: Bytes of a ping: IP header, ICMP header, body.
LENGTH = {Family.IPV4: 20 + 8 + SIZE, Family.IPV6: 40 + 8 + SIZE}
#: The transport header's first byte: an echo's ICMP type; of a UDP packet the upper half of its port.
NO_ECHO = "@th,0,8 != { 0, 8, 128, 129 }"


@pytest.fixture
def echoes(gateway: Gateway) -> Iterator[Callable[[], dict[Key, Count]]]:
    """The counters as `status` has them, less what O sends and gets on wan besides echoes.

    That is the tunnel's own packets and neighbour discovery; counters of the test's own say how much it was.
    """
    with contextlib.ExitStack() as stack:
        besides = {}
        for family in Family:
            own, ip = net.OUTSIDE[family], family.nft
            sent = gateway.lab.counting("gw", f'oifname "wan" {ip} saddr {own} {NO_ECHO}', "postrouting")
            received = gateway.lab.counting("gw", f'iifname "wan" {ip} daddr {own} {NO_ECHO}')
            besides["outside", family, "transmit"] = stack.enter_context(sent)
            besides["outside", family, "receive"] = stack.enter_context(received)

        def read() -> dict[Key, Count]:
            while True:
                seen = {key: count() for key, count in besides.items()}
                counts = gateway.counts()
                # Nothing of it came between these readings.
                if seen == {key: count() for key, count in besides.items()}:
                    return {key: less(count, seen.get(key, Count(0, 0))) for key, count in counts.items()}

        yield read


def less(count: Count, other: Count) -> Count:
    return Count(count.packets - other.packets, count.bytes - other.bytes)


def test_counters_are_exact(gateway: Gateway, echoes: Callable[[], dict[Key, Count]]) -> None:
    """N pings are N packets and their bytes, on their identity and family, once each way; nothing else counts them."""
    gateway.apply()
    before = echoes()
    for flow in FLOWS:
        for family in Family:
            source = flow.source[family] if flow.source else None
            outcome = gateway.lab.ping(flow.host, flow.target[family], source, count=PINGS, size=SIZE)
            assert outcome.ok, (flow.name, outcome.reason)
        after = echoes()
        expected = {
            (flow.identity, family, way): Count(PINGS, PINGS * LENGTH[family])
            for family in Family
            for way in ("transmit", "receive")
            if flow.identity
        }
        counted = {key: less(count, before[key]) for key, count in after.items()}
        assert {key: count for key, count in counted.items() if count != Count(0, 0)} == expected, flow.name
        before = after
