"""The process outside a sandbox: it waits for the sandbox's first process, and takes everything down with itself.

Run by path, isolated (`python -I supervisor.py COMMAND...`), where the package may be out of reach: standard library
only.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

#: asm-generic/siginfo.h: the signal was sent by the kernel, so for SIGINT by the terminal, to the whole foreground.
SI_KERNEL = 0x80
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


def end(unshare: int) -> None:
    """Kill the sandbox whose unshare(1) process has this pid; that process ends as soon as everything inside has.

    The children of unshare(1) are the sandbox's first process. When it is killed the kernel kills the whole PID
    namespace before the parent may wait for it (pid_namespaces(7)), and the network namespaces go with the last user.
    """
    children = Path(f"/proc/{unshare}/task/{unshare}/children")
    try:
        first = [int(pid) for pid in children.read_text(encoding="ascii").split()]
    except FileNotFoundError:
        first = []  # it has ended; or the kernel lacks CONFIG_PROC_CHILDREN, and --kill-child does the rest
    for pid in first or [unshare]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def supervise(command: list[str]) -> int:
    """Run the command; pass on its exit code, or 128 + the signal that ended it or us.

    A Ctrl-C at the terminal reaches the command by itself, and it is left to the command what to make of it. Any other
    request to end ends the sandbox at once: nothing in there needs tidying.
    """
    watched = ENDING | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=before)
    asked = 0
    while True:
        info = signal.sigwaitinfo(watched)
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return 128 + asked if asked else code if code >= 0 else 128 - code
        elif info.si_code != SI_KERNEL or info.si_signo != signal.SIGINT:
            asked = info.si_signo
            end(child)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
