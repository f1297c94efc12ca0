"""Private namespaces for the lab and the tests: nothing done in there is seen outside, or outlives it.

Users, network, mounts and processes are the sandbox's own. Inside, one is root over them and over nothing else, so no
privilege is needed to enter, and none of the machine's own settings can be reached, not even by mistake. The kernel
takes the sandbox apart with its first process, however that one ends.

Root is needed only where the machine refuses user namespaces: then the other namespaces must be asked for with the
machine's own root (CAP_SYS_ADMIN, user_namespaces(7)).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from agent.lab import LabError, supervisor

UNSHARE = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child"]
#: The caller's user becomes root inside; everybody else's files belong to nobody there.
AS_ROOT = ["-U", "--map-root-user"]
#: ip-netns(8) keeps its names below /run, which without privilege can't be written to: the sandbox has its own.
MARKER = Path("/run/idmark-sandbox")
#: Where the agent keeps what is to outlive a boot: here nothing is to outlive the sandbox.
STATE = Path("/run/idmark-state")
SETTLE = ["sh", "-c", f'mount -t tmpfs tmpfs /run && : > {MARKER} && STATE_DIRECTORY={STATE} exec "$@"', "sh"]
#: Debian leaves these out of a user's PATH, and ip, nft and openvpn are there.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def inside() -> bool:
    """Whether this process is the first of a sandbox. A deeper one isn't: it may enter a sandbox of its own."""
    return os.getpid() == 1 and MARKER.exists()


def path_with_sbin() -> str:
    """$PATH, with the administrator's directories."""
    have = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*have, *(directory for directory in SBIN if directory not in have)])


def wrapped(command: list[str]) -> list[str]:
    """The command line that runs a command as the first process of a new sandbox. Raises LabError."""
    return [*_unshare(), *SETTLE, *command]


def supervised(command: list[str]) -> list[str]:
    """As `wrapped`, and the sandbox ends with the process that runs this line, by whatever signal. Raises LabError."""
    return [sys.executable, "-I", supervisor.__file__, "setpriv", "--pdeathsig", "KILL", *wrapped(command)]


def enter() -> None:
    """Run this very command line anew inside a sandbox, unless this is one. From outside it never returns.

    The process becomes the sandbox's supervisor. Exit code, terminal, directory and environment pass through.
    Raises LabError when no sandbox can be had.
    """
    if inside():
        return
    os.environ["PATH"] = path_with_sbin()
    command = supervised([sys.executable, *sys.orig_argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606


@functools.cache
def _unshare() -> tuple[str, ...]:
    """unshare(1) with the options that work here: a user namespace if there may be one, else root's own privilege."""
    attempts = [[*UNSHARE, *AS_ROOT]]
    if os.geteuid() == 0:
        attempts.append(UNSHARE)
    answers = []
    for attempt in attempts:
        try:
            done = subprocess.run([*attempt, *SETTLE, "true"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise LabError("the lab needs unshare(1), from the package util-linux") from None
        if done.returncode == 0:
            return tuple(attempt)
        answers.append(done.stderr.strip().replace("\n", "; "))
    # Ubuntu 24.04: only programs with an AppArmor profile for it may make user namespaces; in containers often none.
    advice = (
        "this needs more privilege than root has here (a container? run it with --privileged)"
        if os.geteuid() == 0
        else "user namespaces are not allowed here: run it as root, or see sysctl "
        "kernel.apparmor_restrict_unprivileged_userns, kernel.unprivileged_userns_clone and user.max_user_namespaces"
    )
    raise LabError(f"cannot make private namespaces ({' / '.join(answers)}): {advice}")
