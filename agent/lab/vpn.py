"""The VPN between gateway and corporate network: real programs, keys made on the spot, one tunnel link at either end.

Each function starts the programs on both sides and returns as soon as both links are there, down and without addresses.
Neither VPN is allowed to touch addresses, routes or rules: that is the net's business, and the agent's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from agent.addresses import Family
from agent.lab import LabError
from agent.lab.hosts import DIRECTORY, Hosts, require, run
from agent.lab.net import ENDPOINT, OUTSIDE, TUNNEL

WIREGUARD_PORT = 51820
OPENVPN_PORT = 1194
#: Seconds for a tunnel program to make its link.
PATIENCE = 10.0
#: The line of a link's socket in /proc/net/unix once somebody listens: __SO_ACCEPTCON among its flags (net/unix).
LISTENS = "^[^ ]* [^ ]* [^ ]* 00010000 .*/wireguard/{}.sock$"
#: The server first: WireGuard repeats an unanswered handshake after five seconds only.
ENDS = (TUNNEL.far, TUNNEL.near)


class Vpn(NamedTuple):
    """A way to make the tunnel: the programs that it needs, how to start it, and the MTU that it has by itself."""

    title: str
    programs: tuple[str, ...]
    start: Callable[[Hosts, int], None]
    mtu: int


def wireguard(hosts: Hosts, mtu: int) -> None:
    """WireGuard, the kernel's if it has it, else wireguard-go over a tun device. Raises LabError.

    What `wg-quick` does with `Table = off`: every destination is allowed in the tunnel, and no route points there.
    """
    if not all(hosts.succeeds(end.host, ["ip", "link", "add", end.name, "type", "wireguard"]) for end in ENDS):
        require(["wireguard-go"])
        for end in ENDS:
            hosts.daemon(end.host, ["wireguard-go", "-f", end.name])
        # Not by asking wg(8): it deletes the socket of who doesn't listen to it yet (userspace_interface_file() in
        # wireguard-tools), and wireguard-go ends over that.
        _wait(hosts, lambda link: ["grep", "-q", LISTENS.format(link), "/proc/net/unix"])
    keys = {end.host: run(["wg", "genkey"]).stdout.strip() for end in ENDS}
    for end, peer in (ENDS, ENDS[::-1]):
        public = run(["wg", "pubkey"], text=keys[peer.host]).stdout.strip()
        words = ["wg", "set", end.name, "listen-port", str(WIREGUARD_PORT), "private-key", "/dev/stdin"]
        words += ["peer", public, "allowed-ips", "0.0.0.0/0,::/0"]
        if end == TUNNEL.near:  # the far end learns where we are from the first packet, as with any roaming client
            words += ["endpoint", f"{ENDPOINT}:{WIREGUARD_PORT}", "persistent-keepalive", "25"]
        hosts.run(end.host, words, text=keys[end.host])
        hosts.run(end.host, ["ip", "link", "set", end.name, "mtu", str(mtu)])


def openvpn(hosts: Hosts, mtu: int) -> None:
    """OpenVPN between two points, TLS with certificates that know each other by fingerprint. Raises LabError."""
    fingerprints = {end.host: _certificate(end.host) for end in ENDS}
    for end, peer in (ENDS, ENDS[::-1]):
        words = ["openvpn", "--dev", end.name, "--dev-type", "tun", "--mode", "p2p", "--proto", "udp4"]
        words += ["--cert", f"{DIRECTORY}/{end.host}.crt", "--key", f"{DIRECTORY}/{end.host}.key"]
        words += ["--peer-fingerprint", fingerprints[peer.host]]
        words += ["--tun-mtu", str(mtu), "--ifconfig-noexec", "--route-noexec", "--disable-dco"]
        words += ["--keepalive", "5", "60", "--persist-tun", "--persist-key", "--verb", "3"]
        if end == TUNNEL.near:
            words += ["--tls-client", "--nobind", "--remote", ENDPOINT, str(OPENVPN_PORT), "--connect-retry", "1"]
        else:
            words += ["--tls-server", "--dh", "none", "--local", ENDPOINT, "--port", str(OPENVPN_PORT)]
            words += ["--remote", OUTSIDE[Family.IPV4], "--float"]
        hosts.daemon(end.host, words)
    _wait(hosts, lambda link: ["ip", "link", "show", link])
    for end in ENDS:
        hosts.run(end.host, ["ip", "link", "set", end.name, "mtu", str(mtu)])


VPNS = {
    "wireguard": Vpn("WireGuard", ("wg",), wireguard, 1420),
    "openvpn": Vpn("OpenVPN", ("openvpn", "openssl"), openvpn, 1500),
}


def choose(name: str) -> Vpn:
    """The VPN of that name, its programs being there. Raises LabError."""
    if name not in VPNS:
        raise LabError(f"no such VPN: {name} (there are {', '.join(VPNS)})")
    require(VPNS[name].programs)
    return VPNS[name]


def _wait(hosts: Hosts, command: Callable[[str], list[str]]) -> None:
    """Until a command about the link succeeds at both ends."""
    for end in ENDS:
        hosts.wait(f"{end.name} on {end.host}", partial(hosts.succeeds, end.host, command(end.name)), PATIENCE)


def _certificate(host: str) -> str:
    """Make a key and a self-signed certificate in DIRECTORY; its SHA-256 fingerprint as OpenVPN writes it."""
    key, certificate = DIRECTORY / f"{host}.key", DIRECTORY / f"{host}.crt"
    key.touch(mode=0o600)
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run([*words, "-days", "2", "-subj", f"/CN={host}", "-keyout", os.fspath(key), "-out", os.fspath(certificate)])
    # "sha256 Fingerprint=AB:CD:…", which is how OpenVPN wants it behind the equals sign.
    shown = run(["openssl", "x509", "-in", os.fspath(certificate), "-noout", "-fingerprint", "-sha256"]).stdout
    return shown.strip().partition("=")[2]
