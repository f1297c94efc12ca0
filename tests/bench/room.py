"""Where a benchmark runs, what it is built from, and on what machine that was."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from agent.lab import sandbox, supervisor

TRAFFIC = Path(__file__).with_name("traffic.c")


def enter() -> None:
    """As sandbox.enter, but root goes without a user namespace. From outside it never returns. Raises LabError.

    Only the machine's own root may have socket buffers beyond net.core.wmem_max (socket(7), SO_SNDBUFFORCE), and nft
    sends a transaction in one message: an ordinary user can't load a set of some thousand prefixes with it.
    """
    if sandbox.inside():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    if os.geteuid() or not _is_initial_user_namespace():
        sandbox.enter()
    os.environ["PATH"] = sandbox.path_with_sbin()
    words = [*sandbox.UNSHARE, *sandbox.SETTLE, sys.executable, *sys.orig_argv[1:]]
    command = [sys.executable, "-I", supervisor.__file__, "setpriv", "--pdeathsig", "KILL", *words]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606


def is_privileged() -> bool:
    """Whether this is root over the machine, and not only over a user namespace."""
    return not os.geteuid() and _is_initial_user_namespace()


def _is_initial_user_namespace() -> bool:
    # user_namespaces(7): the first one maps all 2^32 - 1 users to themselves.
    return Path("/proc/self/uid_map").read_text(encoding="ascii").split() == ["0", "0", "4294967295"]


def build(directory: Path) -> Path:
    """The packet generator, compiled. Raises RuntimeError with the compiler's words."""
    program = directory / "traffic"
    words = ["cc", "-O2", "-Wall", "-Wextra", "-o", os.fspath(program), os.fspath(TRAFFIC)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"build the packet generator: {done.stderr}")
    return program


def cpu() -> int:
    """The CPU that all packets are sent, forwarded and thrown away on: the last one, for the first gets most work."""
    return max(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """Kernel, processor and programs; no name, no path."""
    information = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    model = re.search(r"^model name\s*: (.+)$", information, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "CPU": model[1] if model else "unknown",
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "hypervisor": "yes" if re.search(r"^flags.*\bhypervisor\b", information, re.MULTILINE) else "no",
        "nft": _version("nft", "--version"),
        "iptables": _version("iptables", "--version"),
        "ipset": _version("ipset", "--version"),
        "Python": platform.python_version(),
        "load when it began": f"{os.getloadavg()[0]:.1f}",
        "privilege": "root" if is_privileged() else "user namespace",
    }


def _version(program: str, option: str) -> str:
    if not shutil.which(program):
        return "none"
    said = subprocess.run([program, option], capture_output=True, text=True, check=False).stdout
    found = re.search(r"v(\d[\d.]*( \(nf_tables\)| \(legacy\))?)", said)
    return found[1] if found else "unknown"
