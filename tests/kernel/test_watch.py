"""`idmark status --watch` on a terminal, over a real kernel."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import termios
from pathlib import Path

from tests.kernel.admin import MEMBERS, Admin, lay_links, policy_text
from tests.kernel.conftest import Peers
from tests.kernel.net import Host


def test_watched(netns: Host, peers: Peers, tmp_path: Path) -> None:
    """Each identity is drawn with its link; Ctrl-C ends it with 130 and gives the screen back."""
    lay_links(netns, peers("far"))
    admin = Admin(netns, tmp_path)
    admin.apply(policy_text({"members": MEMBERS}))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    words, environment = admin.command("status", "--watch"), os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while seen.count(b"outside") < 2:
        seen += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # EIO: the other side has hung up
        while data := os.read(ours, 1 << 16):
            seen += data
    os.close(ours)
    assert process.wait() == 130
    assert b"vpn0 up" in seen
    assert b"Traceback" not in seen
    assert b"\x1b[?1049l" in seen


def test_not_on_a_terminal(netns: Host, peers: Peers, tmp_path: Path) -> None:
    """Where the output is no terminal it is said that this needs one, and the answer is 2."""
    lay_links(netns, peers("far"))
    admin = Admin(netns, tmp_path)
    admin.apply(policy_text({"members": MEMBERS}))
    done = admin.idmark("status", "--watch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "idmark: status --watch draws on a terminal, and this is none: leave --watch out\n"
