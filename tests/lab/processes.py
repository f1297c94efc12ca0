"""The sandbox's processes."""

from __future__ import annotations

import os
from pathlib import Path


def processes() -> dict[int, str]:
    """The processes in this sandbox but our own: pid and command line. What waits to be reaped has no command line."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        words = (directory / "cmdline").read_text().replace("\0", " ").strip() if directory.exists() else ""
        if words and int(directory.name) != os.getpid():
            found[int(directory.name)] = words
    return found
