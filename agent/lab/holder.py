"""A lab that stays up in the background, for a person to play with: up, shell and down."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from agent.lab import LabError, sandbox, supervisor
from agent.lab.lab import POLICY, Lab, Report
from agent.lab.net import HOSTS
from agent.lab.vpn import VPNS, choose

#: Where the lab's own copy of the policy lies, inside: for the player to change.
PLAY_POLICY = Path("/run/policy.toml")
#: How a holder tells the process that started it about its progress.
STEP, READY, ERROR = "step ", "ready", "error "


class Holder(NamedTuple):
    """The background lab: pid and start time (clock ticks since boot, proc(5)) of its unshare(1), and its VPN.

    A pid alone may have been reused since: both together name one process for ever.
    """

    pid: int
    start: int
    vpn: str


def up(vpn: str, *, apply: bool, report: Report) -> Holder:
    """Build a lab in the background, its policy applied if `apply`; `report` hears of each step. Raises LabError."""
    choose(vpn)
    with _state() as file:
        there = _read(file)
        if there:
            title = VPNS[there.vpn].title
            raise LabError(f"a lab is up already ({title}, pid {there.pid}): idmark lab shell HOST, or idmark lab down")
        command = sandbox.wrapped([sys.executable, "-m", "agent.lab.holder", vpn, *(["apply"] if apply else [])])
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # it outlives this terminal
                env={**os.environ, "PATH": sandbox.path_with_sbin()},
            )
            try:
                holder = Holder(process.pid, _start_of(process.pid) or 0, vpn)
                _follow(process, report, lambda: _last_words(errors))
                file.write_text(json.dumps(holder._asdict()), encoding="ascii")
            except BaseException:
                supervisor.end(process.pid)
                process.wait()
                raise
    return holder


def shell(host: str, command: list[str]) -> NoReturn:
    """Become a command, or a shell, on a host of the lab that is up: never returns. Raises LabError."""
    if host not in HOSTS:
        raise LabError(f"no host {host} in the lab: there are {', '.join(HOSTS)}")
    with _state() as file:
        holder = _read(file)
    if not holder:
        raise LabError("no lab is up: idmark lab up")
    # unshare(1) itself is in all of the sandbox's namespaces but the PID one, which is only its children's.
    spaces = Path(f"/proc/{holder.pid}/ns")
    enter = [f"--mount={spaces}/mnt", f"--net={spaces}/net", f"--pid={spaces}/pid_for_children"]
    if (spaces / "user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino:
        enter += [f"--user={spaces}/user", "--preserve-credentials"]
    bash = shutil.which("bash")
    interactive = [bash, "--noprofile", "--norc"] if bash else ["sh"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("IDMARK")}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), sandbox.path_with_sbin()])
    environment["STATE_DIRECTORY"] = str(sandbox.STATE)
    environment["PS1"] = f"{host}:\\w# " if bash else f"{host}# "
    words = ["nsenter", *enter, "ip", "netns", "exec", host, "env", "-C", os.getcwd(), *(command or interactive)]
    os.execvpe(words[0], words, environment)  # noqa: S606


def down() -> None:
    """End the lab that is up, with everything in it. Raises LabError."""
    with _state() as file:
        holder = _read(file)
        if not holder:
            raise LabError("no lab is up")
        # While the descriptor is open and its process has that start time, the pid can't mean another one.
        descriptor = os.pidfd_open(holder.pid)
        try:
            if _start_of(holder.pid) == holder.start:
                supervisor.end(holder.pid)
                select.select([descriptor], [], [], supervisor.PATIENCE)
        finally:
            os.close(descriptor)
        file.unlink()


# --- what is remembered of it ----------------------------------------------------------------------------------------


@contextmanager
def _state() -> Iterator[Path]:
    """The file that names the lab which is up, locked: its directory is the user's own, and gone when it is empty."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    own = Path(tempfile.gettempdir()) / f"idmark-lab-{os.getuid()}"
    directory = Path(runtime) / "idmark-lab" if runtime and Path(runtime).is_dir() else own
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    # In /tmp somebody else may have been there before us, with a directory of theirs or a link to one.
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LabError(f"{directory} is not a directory of this user's alone: remove it")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError("another idmark lab up or down is at work") from None
        yield directory / "holder.json"
    finally:
        os.close(descriptor)
        with suppress(OSError):  # not empty: a lab is up
            directory.rmdir()


def _read(file: Path) -> Holder | None:
    """The lab that is up, or None; what is left of one that isn't any more is removed."""
    try:
        holder = Holder(**json.loads(file.read_text(encoding="ascii")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise LabError(f"{file} is not what idmark lab up wrote ({error}): remove it") from None
    if _start_of(holder.pid) == holder.start:
        return holder
    file.unlink()
    return None


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or only what waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if fields[0] == "Z" else int(fields[19])


def _follow(process: subprocess.Popen[str], report: Report, last_words: Callable[[], str]) -> None:
    """Read what the holder tells until it is ready. Raises LabError if it fails or ends."""
    if process.stdout is None:
        raise TypeError("the holder's output must be a pipe")
    with process.stdout as told:
        for line in told:
            if line.startswith(STEP):
                report(line.removeprefix(STEP).strip())
            elif line.startswith(ERROR):
                raise LabError(line.removeprefix(ERROR).strip())
            elif line.strip() == READY:
                return
    raise LabError(f"the lab ended while it was being built: {last_words()}")


def _last_words(errors: IO[str]) -> str:
    errors.seek(0)
    return " | ".join(errors.read().strip().splitlines()[-3:])


# --- the process in the background -----------------------------------------------------------------------------------


def hold(vpn: str, *, apply: bool) -> None:
    """Build the lab and stay, as the first process of a sandbox."""
    try:
        lab = Lab(vpn, report=lambda step: _tell(STEP + step))
        shutil.copyfile(POLICY, PLAY_POLICY)
        if apply:
            _tell(f"{STEP}the policy")
            lab.idmark("apply", policy=PLAY_POLICY)
    except LabError as error:
        _tell(f"{ERROR}{error}")
        sys.exit(2)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    _tell(READY)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    while True:  # the first process of a PID namespace inherits all orphans, and must reap them
        signal.sigwait({signal.SIGCHLD})
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    hold(sys.argv[1], apply="apply" in sys.argv[2:])
