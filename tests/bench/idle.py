"""What the daemon costs while nothing happens: `./dev bench idle`. CPU time of all its threads, wake-ups, system calls.

Beside it, in the same run, a shell's `sleep 0.05` loop that asks the kernel nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import time
from pathlib import Path

from agent.lab import sandbox
from tests.bench.stage import stage


def main() -> int:
    """Always 0: it only tells."""
    parser = argparse.ArgumentParser(prog="./dev bench idle", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    arguments = parser.parse_args()
    sandbox.enter()
    with stage() as here:
        here.traffic.done.set()
        pid = here.daemon.process.pid
        time.sleep(5)
        with subprocess.Popen(["sh", "-c", "while sleep 0.05; do :; done"]) as peer:
            cpu, wakes, peer_cpu = _cpu(pid), _wakes(pid), _cpu(peer.pid) + _of_children(peer.pid)
            time.sleep(arguments.seconds)
            cpu, wakes, peer_cpu = (
                _cpu(pid) - cpu,
                _wakes(pid) - wakes,
                _cpu(peer.pid) + _of_children(peer.pid) - peer_cpu,
            )
            peer.kill()
        print(
            f"{arguments.seconds} s: {cpu * 1000:.0f} ms of CPU time ({cpu / arguments.seconds:.3%} of one), ", end=""
        )
        print(f"{wakes / arguments.seconds:.1f} wake-ups a second")
        print(f"a shell that sleeps 0.05 s again and again: {peer_cpu * 1000:.0f} ms; ratio {cpu / peer_cpu:.2f}")
        if shutil.which("strace"):
            traced = ["timeout", "-s", "INT", "20", "strace", "-f", "-c", "-p", str(pid)]
            said = subprocess.run(traced, capture_output=True, text=True, check=False).stderr
            total = re.search(r"^100\.00 +\S+ +\S+ +(\d+)", said, re.MULTILINE)
            print(f"{int(total[1]) / 20:.0f} system calls a second" if total else "strace could not count")
    return 0


def _cpu(pid: int) -> float:
    """Seconds that a process's threads have run (Documentation/scheduler/sched-stats.rst)."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text(encoding="ascii").split()[0]) for each in threads) / 1e9


def _of_children(pid: int) -> float:
    """Seconds of CPU time of the children that a process has waited for (proc_pid_stat(5), cutime and cstime)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / 100


def _wakes(pid: int) -> int:
    return sum(
        int(line.split()[1])
        for each in Path(f"/proc/{pid}/task").glob("*/status")
        for line in each.read_text(encoding="ascii", errors="replace").splitlines()
        if line.startswith("voluntary_ctxt_switches")
    )


if __name__ == "__main__":
    raise SystemExit(main())
