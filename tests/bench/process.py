"""What a command costs: time and memory, its own and what the kernel takes for it meanwhile."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.world import FailedError

LAUNCHER = Path(__file__).with_name("launcher.py")
#: Seconds after which a command is given up.
LIMIT = 120.0
#: Seconds between two looks at the machine's memory.
SAMPLING = 0.01


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds from start to end, seconds of CPU time (the kernel's work for it included), MiB at the most."""

    seconds: float
    cpu: float
    mebibytes: float


def timed(words: Sequence[str], *, environment: Mapping[str, str] | None = None, text: str = "") -> Cost:
    """Run a command in this thread's namespace, with a text on its standard input.

    Raises FailedError: it failed, or it took longer than LIMIT.
    """
    launcher = [sys.executable, "-I", "-S", os.fspath(LAUNCHER), str(LIMIT)]
    # A file, as nft gets it from an operator: a pipe would cost the reader two context switches a page.
    with os.fdopen(os.memfd_create("input"), "w+b") as source:
        source.write(text.encode())
        source.seek(0)
        done = subprocess.run(
            [*launcher, *words],
            stdin=source,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    name = Path(words[0]).name
    if done.returncode:
        raise FailedError(f"{name}: {done.stderr.strip()}")
    said = json.loads(done.stdout)
    if said["code"] == -signal.SIGKILL and said["seconds"] >= LIMIT:
        raise FailedError(f"{name}: not done after {LIMIT:.0f} s")
    if said["code"]:
        reason = done.stderr.strip() or f"exit code {said['code']}"
        raise FailedError(f"{name}: {reason.splitlines()[-1]}")
    return Cost(said["seconds"], said["cpu"], said["mebibytes"])


def took(what: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


class KernelMemory:
    """How much memory the machine was short of at the worst, beyond what this process and its children held.

    MemAvailable before, less MemAvailable, less what the processes have grown by. Other programs on the machine disturb
    it. Use `with`.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.mebibytes = 0.0

    def __enter__(self) -> KernelMemory:
        self._available, self._held = _available(), _held()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING):
            self.mebibytes = max(self.mebibytes, self._available - _available() - (_held() - self._held))


def _available() -> float:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 1024


def _held() -> float:
    """MiB that the processes of this sandbox have resident; those of the machine besides are not seen from here."""
    pages = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pages += int((process / "statm").read_text(encoding="ascii").split()[1])
        except OSError:  # it has ended
            continue
    return pages * resource.getpagesize() / 2**20


def settle(pid: int) -> None:
    """Wait until a process has nothing to do: until a second costs it less than two hundredths, or LIMIT is over."""
    deadline, before = time.monotonic() + LIMIT, -1.0
    while time.monotonic() < deadline and (now := _used(pid)) - before > 0.02:
        before = now
        time.sleep(1)


def _used(pid: int) -> float:
    """Seconds of CPU time that a process has used (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> tuple[float, float]:
    """MiB that a process has resident now, and at the most so far."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
    return found["VmRSS"], found["VmHWM"]
