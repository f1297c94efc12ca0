"""The doctor at the lab's gateway: a real VPN with its program, real services, a daemon at work."""

from __future__ import annotations

import json

import pytest

from agent.addresses import Family
from agent.doctor import CHECKS
from agent.lab import net
from tests.kernel.admin import Table
from tests.lab.conftest import BuildGateway
from tests.lab.gateway import Gateway
from tests.lab.test_daemon import daemon

CLAMPED: Table = {"clamp_mss": True}


def found(gateway: Gateway) -> tuple[int, dict[str, str]]:
    """The exit code, and what hurts by the name of its check."""
    done = gateway.idmark("doctor", "--json", check=False)
    return done.returncode, {each["check"]: each["what"] for each in json.loads(done.stdout)["findings"]}


@pytest.mark.parametrize("kind", ["wireguard", "openvpn"])
def test_a_gateway_that_does_well(build_gateway: BuildGateway, kind: str) -> None:
    """At a gateway with a VPN, with the daemon at work, nothing is found, nor after it, nor before."""
    gateway = build_gateway(kind)
    gateway.write(CLAMPED)
    assert found(gateway) == (0, {})
    with daemon(gateway):
        assert found(gateway) == (0, {})
    done = gateway.idmark("doctor")
    assert done.stdout == f"{len(CHECKS)} checks: clean\n"


def test_a_tunnel_without_clamping(gateway: Gateway) -> None:
    """The tunnel is narrower than the LAN: that is found unless the policy clamps."""
    gateway.apply()
    assert list(found(gateway)[1]) == ["mtu"]


def test_the_findings_tell_true(gateway: Gateway) -> None:
    """A wildcard UDP service is found, and really answers as another identity than it was asked as."""
    gateway.apply(CLAMPED)
    with gateway.host("gw") as gw, gateway.host("wild") as wild, gw.udp("0.0.0.0", 514) as service:
        assert list(found(gateway)[1]) == ["udp-wildcard"]
        with wild.udp(net.WILD[Family.IPV4]) as client:
            client.sendto(b"who are you", (net.INSIDE[Family.IPV4], 514))
            _, asker = service.recvfrom(100)
            service.sendto(b"I am", asker)
            assert client.recvfrom(100)[1] == (net.OUTSIDE[Family.IPV4], 514)
