"""Sysctls, read as numbers. /proc/sys/net shows the namespace of the thread that opens it."""

from __future__ import annotations

import os
from pathlib import Path

from agent.kernel import KernelError

SYSCTLS = Path("/proc/sys")
PORTS = "net/ipv4/ip_local_port_range"


def number(key: str) -> int | None:
    """A sysctl by its path below /proc/sys; None: this kernel, or this link, has none. Raises KernelError."""
    text = _read(key)
    return None if text is None else int(text)


def port_range() -> range:
    """The ports that a socket gets which asks for none (ip-sysctl.rst). Raises KernelError."""
    first, last = map(int, (_read(PORTS) or "0 -1").split())
    return range(first, last + 1)


def _read(key: str) -> str | None:
    path = SYSCTLS / key
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError(f"read {path}", os.strerror(error.errno or 0)) from error
