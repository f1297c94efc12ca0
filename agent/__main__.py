"""Where the command begins: `idmark`, which is `python -m agent`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run one verb; the exit code. Until the command line is there to answer it, Ctrl-C ends this without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from agent import cli  # noqa: PLC0415

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
