"""A process beside a trace: it loads the table that has a flow traced, and deletes it when the trace ends, however.

Its standard input ends with the process that traces, also if that is killed. The kernel itself would take away a table
with the flag "owner"; but nft 1.0.6 lists the flags of such a table as JSON with whatever lies in its memory.
"""

from __future__ import annotations

import signal
import sys

from agent.kernel import KernelError
from agent.kernel.nft import Nft

READY = "ready"


def main() -> int:
    """The table's name is the argument; its text comes first, up to an empty line."""
    (name,) = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    text = "".join(iter(lambda: sys.stdin.readline().strip("\n") + "\n", "\n"))
    nft = Nft()
    try:
        nft.load(text)
        try:
            _say(READY)
            sys.stdin.read()
        finally:
            nft.load(f"delete table inet {name}")
    except KernelError as error:
        _say(error.why)
        return 1
    return 0


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
