"""The watchman of a policy on trial: a process that nobody's terminal takes along, and that takes back what nobody has
confirmed in time.

Under systemd it is a transient unit, which is started again if it is killed; else a session of its own. It asks for
nothing that the one who started it has: no terminal, no directory, no file.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import agent
from agent import IdmarkError, reconcile, trial
from agent.kernel import KernelError, netns, runtime
from agent.reconcile import Seams

#: Where a watchman says that it is at work.
NAME = "watchman.json"
#: Seconds: until it must be at work, between two looks, until it tries again, for another's hands on the kernel.
START, LOOK, RETRY, PATIENCE = 20.0, 0.2, 1.0, 1.0
#: systemd is process 1 where this is (sd_booted(3)).
BOOTED = Path("/run/systemd/system")
#: What a transient unit does not inherit and Python or we may need.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "RUNTIME_DIRECTORY", "STATE_DIRECTORY")


def start(watched: str, where: str | None) -> None:
    """Set a watchman on the trial with this id, in the namespace `where` of ip-netns(8), and wait until it is at work.

    Raises KernelError.
    """
    words = [sys.executable, "-m", "agent.watchman", watched, *([where] if where else [])]
    environment = os.environ | {"PYTHONPATH": _packages()}
    if BOOTED.is_dir() and os.geteuid() == 0 and _systemd_leads_here(where) and shutil.which("systemd-run"):
        _as_unit(watched, words, environment)
    else:
        subprocess.Popen(
            words,
            env=environment,
            cwd="/",
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    deadline = time.monotonic() + START
    while runtime.published(NAME).get("trial") != watched:
        if time.monotonic() >= deadline:
            raise KernelError("set a watchman on the policy", f"it was not at work after {START:.0f} seconds")
        time.sleep(0.02)


def _as_unit(watched: str, words: list[str], environment: dict[str, str]) -> None:
    kept = [f"--setenv={name}={environment[name]}" for name in ("PYTHONPATH", *ENVIRONMENT) if name in environment]
    unit = ["systemd-run", "--quiet", "--collect", "--no-ask-password", f"--unit=idmark-trial-{watched}"]
    unit += ["--description=idmark: takes back a policy that nobody confirms", "--property=SyslogIdentifier=idmark"]
    unit += ["--property=Restart=on-failure", "--property=RestartSec=200ms", "--property=StartLimitIntervalSec=0"]
    done = subprocess.run([*unit, *kept, "--", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError("set a watchman on the policy", f"systemd-run: {done.stderr.strip()}")


def _systemd_leads_here(where: str | None) -> bool:
    """Whether a unit would work in our namespace: by its name, or because it is that of process 1."""
    try:
        return where is not None or os.path.samefile("/proc/1/ns/net", "/proc/thread-self/ns/net")
    except OSError:
        return False


def _packages() -> str:
    """Where Python finds us, whatever directory it is started in."""
    here = os.fspath(Path(agent.__file__).resolve().parent.parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def watch(watched: str, kernel: Seams) -> None:
    """Returns when the trial with this id has ended, by confirmation or otherwise."""
    runtime.publish(NAME, {"trial": watched, "pid": os.getpid()})
    while True:
        try:
            found = trial.pending()
            if found is None or found.id != watched:
                return
            rest = found.deadline - trial.clock()
            if found.stage == trial.WAITING and rest > 0:
                time.sleep(min(LOOK, rest))
                continue
            with runtime.lock("watchman", PATIENCE):
                found = trial.pending()
                if found is None or found.id != watched:
                    return
                if found.is_due(trial.clock()):
                    for words in trial.take_back(found, kernel, found.reason):
                        _tell(words)
        except runtime.BusyError:
            continue
        except (IdmarkError, OSError) as error:
            _tell(str(error))
            time.sleep(RETRY)


def _tell(words: str) -> None:
    """For the journal, where there is one."""
    os.write(2, f"idmark: {words}\n".encode())


def main(arguments: list[str]) -> int:
    """`python -m agent.watchman TRIAL [NETNS]`."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    watched, *where = arguments
    if where:
        netns.enter(where[0])
    with reconcile.opened() as kernel:
        watch(watched, kernel)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
