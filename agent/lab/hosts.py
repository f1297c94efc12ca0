"""Commands in the hosts' namespaces: run to their end, or kept as daemons with a log, and ended together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agent.lab import LabError, sandbox

#: In the sandbox's own /run: it goes with the sandbox.
DIRECTORY = Path("/run/lab")
#: Seconds that a command may take which nobody gave another limit.
TIMEOUT = 60.0
#: Debian's package of each program.
PACKAGES = {
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nft": "nftables",
    "openssl": "openssl",
    "openvpn": "openvpn",
    "sysctl": "procps",
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
}


def require(programs: Iterable[str]) -> None:
    """Raises LabError that names every missing program and the package which has it."""
    path = sandbox.path_with_sbin()
    missing = [program for program in programs if not shutil.which(program, path=path)]
    if missing:
        packages = " ".join(sorted({PACKAGES[program] for program in missing}))
        raise LabError(f"the lab needs {', '.join(missing)}: install {packages}")


@dataclass(frozen=True, slots=True)
class Daemon:
    """A program that stays, and the file that it writes to."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def said(self, word: str) -> bool:
        """Whether its log has the word."""
        return word in self._read()

    def last_words(self) -> str:
        """The end of its log, in one line."""
        lines = self._read().strip().splitlines()
        return " | ".join(line.strip() for line in lines[-4:]) or "nothing in its log"

    def _read(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Hosts:
    """The hosts' namespaces, by name. Commands raise LabError with their own words when they fail."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._daemons: list[Daemon] = []
        DIRECTORY.mkdir(exist_ok=True)

    def run(
        self,
        host: str,
        command: list[str],
        *,
        text: str | None = None,
        check: bool = True,
        timeout: float = TIMEOUT,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, with `text` on its standard input. `check`: a failure raises LabError."""
        return run(["ip", "netns", "exec", host, *command], text=text, check=check, timeout=timeout, env=env)

    def succeeds(self, host: str, command: list[str]) -> bool:
        """Whether a command on a host exits with 0."""
        return self.run(host, command, check=False).returncode == 0

    def popen(self, host: str, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host; `options` are subprocess.Popen's. It is ended by `close`, at the latest."""
        process = self._start(host, command, options)
        self._processes.append(process)
        return process

    def daemon(self, host: str, command: list[str]) -> Daemon:
        """Start a program that stays until `close`."""
        name = f"{Path(command[0]).name} on {host}"
        log = DIRECTORY / f"{name.replace(' ', '-')}-{len(self._daemons)}.log"
        with log.open("w", encoding="utf-8") as output:
            process = self._start(host, command, {"stdout": output, "stderr": output})
        daemon = Daemon(name, process, log)
        self._daemons.append(daemon)
        return daemon

    def batch(self, host: str, lines: Iterable[str], *options: str) -> None:
        """Run lines of ip(8) on a host in one go, stopping at the first that fails."""
        run(["ip", *options, "-n", host, "-batch", "-"], text="".join(f"{line}\n" for line in lines))

    def nft(self, host: str, text: str) -> None:
        """Load nft text on a host as one transaction."""
        self.run(host, ["nft", "-f", "-"], text=text)

    def wait(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        """Ask `done` until it says yes. Raises LabError after `seconds`, or when a daemon ends meanwhile."""
        deadline = time.monotonic() + seconds
        while not done():
            for daemon in self._daemons:
                if daemon.process.poll() is not None:
                    code = daemon.process.returncode
                    raise LabError(f"{what}: {daemon.name} ended with {code}: {daemon.last_words()}")
            if time.monotonic() > deadline:
                logs = "; ".join(f"{daemon.name}: {daemon.last_words()}" for daemon in self._daemons)
                raise LabError(f"{what}: not there after {seconds:.0f} s; {logs}")
            time.sleep(0.02)

    def close(self) -> None:
        """End everything that was started here, daemons too, and take away the files."""
        _end([*self._processes, *(daemon.process for daemon in self._daemons)])
        self._processes.clear()
        self._daemons.clear()
        shutil.rmtree(DIRECTORY, ignore_errors=True)

    @staticmethod
    def _start(host: str, command: list[str], options: dict[str, Any]) -> subprocess.Popen[str]:
        # A process group of its own: a Ctrl-C at the terminal is not for the VPN.
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(["ip", "netns", "exec", host, *command], text=True, process_group=0, **options)


def run(
    command: list[str],
    *,
    text: str | None = None,
    check: bool = True,
    timeout: float = TIMEOUT,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `env` is added to the environment. Raises LabError with its words if it fails."""
    line = " ".join(command)
    try:
        done = subprocess.run(
            command,
            input="" if text is None else text,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"{line}: not done after {timeout:.0f} s") from None
    except OSError as error:
        raise LabError(f"{line}: {error.strerror}") from error
    if check and done.returncode:
        words = " | ".join((done.stderr or done.stdout).strip().splitlines())
        raise LabError(f"{line}: exit {done.returncode}: {words}")
    return done


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """Ask, and after two seconds insist."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + 2
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            _close(stream)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To the process and what it started; unless it has ended, and been waited for."""
    if process.poll() is None:
        os.killpg(process.pid, number)


def _close(stream: IO[str] | None) -> None:
    if stream and not stream.closed:
        stream.close()
