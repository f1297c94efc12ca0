"""The network namespace that this process works in."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

from agent.kernel import KernelError

#: Where ip-netns(8) keeps its names.
NAMES = Path("/run/netns")
#: asm-generic/socket.h; Linux 5.14. Python's socket module does not name it yet.
SO_NETNS_COOKIE = 71
CLONE_NEWNET = 0x40000000


def enter(name: str) -> None:
    """Move this thread into the namespace `name` of ip-netns(8), which must exist. Raises KernelError.

    Before any socket or libnftables context is made: these stay bound to the namespace that they were made in.
    """
    doing = f"enter network namespace {name}"
    if not name or "/" in name or name in {".", ".."}:
        raise KernelError(doing, "this is not the name of a namespace")
    try:
        fd = os.open(NAMES / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KernelError(doing, f"there is no {NAMES / name} (see: ip netns list)") from None
    except OSError as error:
        raise KernelError(doing, os.strerror(error.errno or 0)) from error
    try:
        # os.setns is in Python from 3.12 on.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, CLONE_NEWNET):
            raise KernelError(doing, os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)


def cookie() -> int:
    """A number for this network namespace that no other one has until the next boot (socket(7), SO_NETNS_COOKIE)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError as error:
            raise KernelError(
                "ask for the network namespace's cookie (Linux 5.14)", os.strerror(error.errno or 0)
            ) from error
