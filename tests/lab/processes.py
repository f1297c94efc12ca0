"""The sandbox's processes, and waiting for what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

#: Seconds until something that must come is given up.
PATIENCE = 10.0


def processes() -> dict[int, str]:
    """The processes in this sandbox but our own: pid and command line. What waits to be reaped has no command line."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        words = (directory / "cmdline").read_text().replace("\0", " ").strip() if directory.exists() else ""
        if words and int(directory.name) != os.getpid():
            found[int(directory.name)] = words
    return found


def eventually(done: Callable[[], bool]) -> bool:
    """Whether it comes true."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
