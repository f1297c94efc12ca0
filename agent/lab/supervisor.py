"""The process outside a sandbox: it waits for the sandbox's first process, and takes everything down with itself.

Run by path, isolated (`python -I supervisor.py COMMAND...`), where the package may be out of reach: standard library
only.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

#: asm-generic/siginfo.h: the signal was sent by the kernel, so for SIGINT by the terminal, to the whole foreground.
SI_KERNEL = 0x80
#: Seconds for the kernel to take a sandbox apart.
PATIENCE = 10.0
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


def end(unshare: int) -> None:
    """Kill the sandbox whose unshare(1) process has this pid, and return when everything inside has ended.

    Its child is the sandbox's first process. With that one the kernel kills the whole PID namespace, and it counts as
    ended only after all others (pid_namespaces(7)); the network namespaces go with their last user. Stopped meanwhile,
    unshare(1) can't complain of its child's end. Raises ProcessLookupError if there is no such process.
    """
    os.kill(unshare, signal.SIGSTOP)
    children = Path(f"/proc/{unshare}/task/{unshare}/children")
    if children.exists():  # else the kernel lacks CONFIG_PROC_CHILDREN, and --kill-child does it, a little later
        for pid in map(int, children.read_text(encoding="ascii").split()):
            descriptor = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([descriptor], [], [], PATIENCE)
            os.close(descriptor)
    os.kill(unshare, signal.SIGKILL)


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
