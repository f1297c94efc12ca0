"""Runs a command and says what it cost: `python -I -S launcher.py LIMIT COMMAND...`, a JSON object on standard output.

A process of its own and a small one: the kernel counts what the parent holds in memory as the child's, for between
vfork(2) and execve(2) they share it (exec_mmap(), setmax_mm_hiwater_rss()). Standard library only, as little as can be.
"""

import json
import os
import signal
import sys
import time

limit, command = float(sys.argv[1]), sys.argv[2:]
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
began = time.monotonic()
child = os.posix_spawnp(command[0], command, os.environ, file_actions=quiet)
signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
signal.setitimer(signal.ITIMER_REAL, limit)
_, status, used = os.wait4(child, 0)
cost = {
    "seconds": time.monotonic() - began,
    "cpu": used.ru_utime + used.ru_stime,
    "mebibytes": used.ru_maxrss / 1024,
    "code": os.waitstatus_to_exitcode(status),
}
sys.stdout.write(json.dumps(cost))
