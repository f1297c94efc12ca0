"""Tests that touch a kernel run in a sandbox, and nowhere else: the whole session moves there before it begins."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from agent.lab import LabError, sandbox

#: These need no kernel of their own, and so no sandbox.
PURE = Path(__file__).with_name("unit")


def pytest_configure() -> None:
    """What a test finds in a terminal it finds in a sandbox and in the background, too.

    A new network namespace has its loopback down; a background job begins with Ctrl-C ignored (POSIX, sh, 2.11), and
    so would all that the tests start.
    """
    if sandbox.inside():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run this very command line again inside a sandbox, unless all that it names is pure.

    Nothing has been collected or printed yet, so output and exit code are those of the session inside.
    """
    named = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    if sandbox.inside() or all(path.is_relative_to(PURE) for path in named):
        return
    # Inside, another user's /tmp/pytest-of-NAME may look like nobody's; what lies in /run goes with the sandbox.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/run")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture:
        capture.suspend_global_capture(in_=True)
    try:
        sandbox.enter()
    except LabError as error:
        raise pytest.UsageError(str(error)) from error
