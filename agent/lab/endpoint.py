"""The two ends of a probe, as programs of their own that run on the lab's hosts: who asks, and who answers.

Run by path, `python -I -S endpoint.py`: standard library only, and up in a few milliseconds.

`endpoint.py ask`: a JSON list of probes on standard input, a JSON list of outcomes on standard output. A probe is an
object with kind, source (or null), target, port, count, size and wait (seconds); an outcome is null or what failed.

`endpoint.py answer PORT ADDRESS...`: a UDP echo, and TCP that sends as many bytes as the first line asks for. Pings are
the kernel's to answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ICMP_ECHO, ICMPV6_ECHO_REQUEST = 8, 128
#: Linux: bind also to an address that is not there yet, or not any more (ip(7), ipv6(7)).
IP_FREEBIND, IPV6_FREEBIND = 15, 78


def content(size: int) -> bytes:
    """The bytes that a TCP probe asks for: the same at both ends, and nothing that could be repeated by accident."""
    return hashlib.shake_128(b"idmark").digest(size)


# --- who asks --------------------------------------------------------------------------------------------------------


def opened(probe: dict[str, Any], kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
    """A socket bound to the probe's source and connected to its target. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in probe["target"] else socket.AF_INET, kind, protocol)
    try:
        sock.settimeout(probe["wait"])
        if probe["source"]:
            sock.bind((probe["source"], 0))
        sock.connect((probe["target"], probe["port"]))
    except OSError:
        sock.close()
        raise
    return sock


def exchange(sock: socket.socket, request: bytes, answer: bytes, wait: float) -> None:
    """Send a datagram and wait for the one that ends like its answer. Raises OSError."""
    sock.send(request)
    deadline = time.monotonic() + wait
    while True:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        if sock.recv(65535).endswith(answer):
            return


def ping(probe: dict[str, Any]) -> None:
    """Echo requests, each answered before the next. The kernel fills in identifier and checksum (icmp(7))."""
    family6 = ":" in probe["target"]
    protocol = socket.IPPROTO_ICMPV6 if family6 else socket.IPPROTO_ICMP
    with opened({**probe, "port": 0}, socket.SOCK_DGRAM, protocol) as sock:
        for sequence in range(1, probe["count"] + 1):
            body = os.urandom(8).ljust(probe["size"], b"\0")[: probe["size"]]
            tail = struct.pack("!H", sequence & 0xFFFF) + body
            kind = ICMPV6_ECHO_REQUEST if family6 else ICMP_ECHO
            exchange(sock, struct.pack("!BBHH", kind, 0, 0, 0) + tail, tail, probe["wait"])


def udp(probe: dict[str, Any]) -> None:
    """Datagrams, each echoed before the next."""
    with opened(probe, socket.SOCK_DGRAM) as sock:
        for _ in range(probe["count"]):
            body = os.urandom(8).ljust(probe["size"], b"\0")
            exchange(sock, body, body, probe["wait"])


def tcp(probe: dict[str, Any]) -> None:
    """Connections, each of which fetches `size` bytes; they must be the right ones."""
    for _ in range(probe["count"]):
        with opened(probe, socket.SOCK_STREAM) as sock:
            sock.sendall(f"{probe['size']}\n".encode())
            received = bytearray()
            while part := sock.recv(1 << 16):
                received += part
        if received != content(probe["size"]):
            raise OSError(0, f"{len(received)} of {probe['size']} bytes, or the wrong ones")


def outcome(probe: dict[str, Any]) -> str | None:
    """None, or why it failed."""
    try:
        {"ping": ping, "udp": udp, "tcp": tcp}[probe["kind"]](probe)
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)
    return None


def ask() -> None:
    """Run all probes of standard input at once, and tell what became of each."""
    probes = json.load(sys.stdin)
    with ThreadPoolExecutor(max(len(probes), 1)) as pool:
        json.dump(list(pool.map(outcome, probes)), sys.stdout)


# --- who answers -----------------------------------------------------------------------------------------------------


def bound(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    """A socket of one address and port. Raises OSError.

    Never a wildcard: from such a socket UDP answers leave with whatever source the route lookup picks.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    level, option = (socket.IPPROTO_IPV6, IPV6_FREEBIND) if ":" in address else (socket.IPPROTO_IP, IP_FREEBIND)
    sock.setsockopt(level, option, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    return sock


def serve(connection: socket.socket) -> None:
    """Read a number and a line end; send as many bytes."""
    with connection:
        connection.settimeout(60)
        try:
            request = b""
            while not request.endswith(b"\n"):
                part = connection.recv(32)
                if not part:
                    return
                request += part
            connection.sendall(content(int(request)))
        except OSError:
            return  # the prober has given up: that is its outcome, and nothing to us


def answer(port: int, addresses: list[str]) -> None:
    """Answer until killed."""
    selector = selectors.DefaultSelector()
    for address in addresses:
        selector.register(bound(socket.SOCK_DGRAM, address, port), selectors.EVENT_READ)
        listener = bound(socket.SOCK_STREAM, address, port)
        listener.listen(16)
        selector.register(listener, selectors.EVENT_READ)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            if not isinstance(sock, socket.socket):
                continue
            if sock.type == socket.SOCK_STREAM:
                threading.Thread(target=serve, args=(sock.accept()[0],), daemon=True).start()
                continue
            try:
                sock.sendto(*sock.recvfrom(65535))
            except OSError:
                continue  # no way back to the prober, which will see for itself


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask()
    else:
        answer(int(sys.argv[2]), sys.argv[3:])
