"""The processes of this machine, as far as they are to be seen: names, sockets, network namespaces (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SOCKET = "socket:["


@dataclass(frozen=True, slots=True)
class Process:
    """A process: number, name (15 bytes at most), inodes of its sockets, whether it is in this network namespace."""

    pid: int
    name: str
    sockets: frozenset[int]
    here: bool


def processes() -> Iterator[Process]:
    """All that are to be seen; one that ends meanwhile, or that others may not look into, is left out."""
    namespace = (PROC / "thread-self/ns/net").stat().st_ino
    for path in PROC.iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                yield Process(
                    pid=int(path.name),
                    name=(path / "comm").read_text(encoding="utf-8", errors="replace").rstrip("\n"),
                    sockets=frozenset(_sockets(path / "fd")),
                    here=(path / "ns/net").stat().st_ino == namespace,
                )


def _sockets(directory: Path) -> Iterator[int]:
    for descriptor in os.scandir(directory):
        with suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptor.path)
            if target.startswith(SOCKET):
                yield int(target[len(SOCKET) : -1])
