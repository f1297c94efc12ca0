"""The one per-link sysctl that we may change, `src_valid_mark`, and the two that say whether we need to.

With strict rp_filter a packet that is translated to a host behind us is judged by the table of its mark only where
`src_valid_mark` is set. Never `conf/all`: it would judge every other mark user's packets too (tailscale#19796).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from agent.kernel import KernelError
from agent.kernel.runtime import read_record, write_record

#: /proc/sys/net shows the namespace of the thread that opens it.
CONF = Path("/proc/sys/net/ipv4/conf")


class Sysctls:
    """The sysctls of this namespace. `record` is where it is kept which links we changed. Methods raise KernelError.

    `notes` are what an operator should hear of since `ours` was asked last.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self.notes: tuple[str, ...] = ()

    def rp_filter(self, link: str) -> int:
        """The value that takes effect: the larger of `all` and the link's; 1 is strict (ip-sysctl.rst)."""
        return max(self._read("all", "rp_filter"), self._read(link, "rp_filter"))

    def src_valid_mark(self, link: str) -> bool:
        """The value that takes effect: `all` or the link's."""
        return bool(self._read("all", "src_valid_mark") or self._read(link, "src_valid_mark"))

    def ours(self) -> frozenset[str]:
        """The links on which it is we who set src_valid_mark, as they are named now; none that was re-created since.

        A record that can't be read is no reason to leave rules and routes as they are: then none is ours to restore,
        `notes` says so, and nothing is written over it.
        """
        try:
            record = read_record(self._record)
        except KernelError as error:
            self.notes = (str(error),)
            return frozenset()
        self.notes = ()
        return frozenset(filter(None, map(_name, record.values())))

    def set_src_valid_mark(self, link: str) -> None:
        """Set it. The record is written first: a crash in between gives back too much, never too little."""
        index = index_of(link)
        if index is None:
            raise KernelError(f"set src_valid_mark on {link}", "no such link")
        write_record(self._record, read_record(self._record) | {link: index})
        self._write(link, "1")

    def restore_src_valid_mark(self, link: str) -> None:
        """Clear it where we had set it."""
        record, index = read_record(self._record), index_of(link)
        if index in record.values():
            self._write(link, "0")
        # Renamed or not, a link keeps its index.
        write_record(self._record, {name: of for name, of in record.items() if name != link and of != index})

    def _read(self, link: str, name: str) -> int:
        path = CONF / link / name
        try:
            return int(path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0  # the link is gone, or has no IPv4
        except OSError as error:
            raise KernelError(f"read {path}", os.strerror(error.errno or 0)) from error

    def _write(self, link: str, value: str) -> None:
        path = CONF / link / "src_valid_mark"
        try:
            path.write_text(value, encoding="ascii")
        except OSError as error:
            raise KernelError(f"write {value} to {path}", os.strerror(error.errno or 0)) from error


def index_of(link: str) -> int | None:
    """The number of the link with this name, in this thread's namespace; None: there is none."""
    try:
        return socket.if_nametoindex(link)
    except OSError:
        return None


def _name(index: int) -> str | None:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None
